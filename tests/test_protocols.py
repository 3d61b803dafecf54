"""Deletion protocols: what each request begins with, that nothing of them depends on interruptions, and that
the numbers of the report are those that a measurement by hand gives.
"""

from __future__ import annotations

import json
import weakref
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import crash
import protocols
import pytest
import runs
import torch
from protocols import FORGET, METHODS, STEPS, forget_set, left, make, measures, retain_set, with_weights

from fastunlearn import ImageStore
from fastunlearn import functional as F
from fastunlearn.host import philox
from fastunlearn.metrics.deletion import PURPOSE, denoising_losses
from fastunlearn.runs import checkpoint
from fastunlearn.runs.private import read_private
from fastunlearn.runs.protocols import FILE, Request, folders, read_protocol, requests
from fastunlearn.runs.run_record import read_metrics, read_run, without_identifiers
from fastunlearn.runs.training import unlearn
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

PROTOCOLS = ("separate", "continual")


def same(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


# --- what a request is


def test_rows_seeds_and_starts_of_requests(tmp_path):
    store = ImageStore(runs.images(5, 1))
    separate = requests(store, "separate", tmp_path, images_per_request=2, seed=7)
    continual = requests(store, "continual", tmp_path, images_per_request=2, seed=7)
    assert [request.rows for request in separate] == [(0, 1), (2, 3), (4,)]
    assert [request.rows for request in continual] == [(0, 1), (2, 3), (4,)]
    assert torch.equal(continual[1].forget.images, store.images[2:4])
    assert [request.seed for request in separate] == [7, 7, 7]
    assert [request.seed for request in continual] == [7, 8, 9]
    assert [request.start for request in separate] == [None] * 3
    folder = [tmp_path / f"request-{number}" for number in (1, 2, 3)]
    assert [request.start for request in continual] == [None, folder[0], folder[1]]
    assert [request.folder for request in continual] == folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_every_request_is_the_run_that_it_would_be_by_itself(tmp_path, protocol, method):
    """With a new optimizer and average, a seed of its own, and the right network to begin with."""
    protocols.run(tmp_path / "all", protocol, method)
    for number in range(1, FORGET + 1):
        alone = tmp_path / f"alone-{number}"
        earlier = tmp_path / f"alone-{number - 1}" if protocol == "continual" and number > 1 else None
        request = Request(
            number=number,
            rows=(number - 1,),
            forget=forget_set().select(torch.tensor([number - 1])),
            seed=5 + number - 1 if protocol == "continual" else 5,
            folder=alone,
            start=earlier,
        )
        torch.manual_seed(torch.initial_seed())
        unlearner = make(request, method=method)
        unlearn(unlearner, num_steps=STEPS, output_dir=alone, show_progress=False)
        protocols.leave(request, unlearner)
        expected = runs.load_file(alone / "left.safetensors")
        assert same(left(tmp_path / "all", number), expected), number
    if method != "vanilla":  # which does not look at what is to be forgotten
        assert not same(left(tmp_path / "all", 1), left(tmp_path / "all", 2))


def test_each_request_has_a_run_folder_and_its_record_says_what_it_is(tmp_path):
    content = protocols.run(tmp_path, "continual", record={"base_model": "somewhere"})
    assert folders(tmp_path) == [tmp_path / f"request-{number}" for number in (1, 2, 3)]
    for number, folder in enumerate(folders(tmp_path), start=1):
        record = read_run(folder)
        assert (record["status"], record["base_model"]) == ("complete", "somewhere")
        assert read_private(folder / "private")["seed"] == 4 + number
        start = None if number == 1 else f"request-{number - 1}"
        assert record["protocol"] == {
            "name": "continual",
            "request": number,
            "of": FORGET,
            "start": start,
        }
        assert [entry["step"] for entry in read_metrics(folder)] == [1, 2, 3]
        assert record["data"]["forget"]["rows"] == 1
    assert content == json.loads((tmp_path / FILE).read_text()) == read_protocol(tmp_path)
    assert content["status"] == "complete"
    assert [entry["rows"] for entry in content["requests"]] == [[0], [1], [2]]
    kept = read_private(tmp_path / "private")
    assert (kept["seed"], kept["measured_seed"]) == (5, 0)
    assert [entry["folder"] for entry in content["requests"]] == [path.name for path in folders(tmp_path)]


# --- the numbers


def by_hand(model: torch.nn.Module, images: ImageStore, draws: int) -> list[float]:
    """The losses of `measures`, one network call after the other."""
    schedule, model = linear_schedule(50), model.eval()
    losses = []
    for row in range(len(images)):
        clean, total = images.rows(torch.tensor([row])), 0.0
        noises = philox.normal((draws, *images.shape), torch.tensor([0, 0, 0]), PURPOSE)
        for draw in range(draws):
            timestep = torch.tensor([int((draw + 0.5) * 50 / draws)])
            alpha, sigma = schedule.alpha[timestep].float(), schedule.sigma[timestep].float()
            with torch.no_grad():
                predicted = model(alpha * clean + sigma * noises[draw : draw + 1], timestep)
            total += (predicted - noises[draw]).square().mean().item()
        losses.append(total / draws)
    return losses


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_numbers_are_those_of_a_measurement_by_hand(tmp_path, protocol):
    content = protocols.run(tmp_path, protocol, "neggrad")
    kept = retain_set().select(torch.tensor([0, 4, 9, 14, 19]))
    networks = {0: with_weights(None)} | {n: with_weights(tmp_path / f"request-{n}") for n in (1, 2, 3)}
    for number, network in networks.items():
        found = content["before"] if number == 0 else content["after"][number - 1]
        rows = [image["row"] for image in found["images"]]
        if number == 0:
            assert rows == [0, 1, 2]
        else:
            assert rows == ([number - 1] if protocol == "separate" else list(range(number)))
        expected = by_hand(network, forget_set(), 8)
        assert [image["loss"] for image in found["images"]] == pytest.approx(
            [expected[row] for row in rows], rel=1e-5
        )
        retained = by_hand(network, kept, 2)
        assert found["retain"]["loss"] == pytest.approx(sum(retained) / len(retained), rel=1e-5)


def test_the_summary_compares_each_image_with_itself(tmp_path):
    content = protocols.run(tmp_path, "continual", "neggrad")
    first, second, third = content["summary"]["requests"]
    after = [{image["row"]: image["loss"] for image in entry["images"]} for entry in content["after"]]
    assert first["earlier"] is None
    assert second["earlier"]["when_deleted"]["loss"] == after[0][0]
    assert second["earlier"]["now"]["loss"] == after[1][0]
    assert third["earlier"]["when_deleted"]["loss"] == pytest.approx((after[0][0] + after[1][1]) / 2)
    assert third["earlier"]["now"]["loss"] == pytest.approx((after[2][0] + after[2][1]) / 2)
    assert third["own"]["before"]["loss"] == content["before"]["images"][2]["loss"]
    own = torch.tensor([after[0][0], after[1][1], after[2][2]], dtype=torch.float64)
    assert content["summary"]["mean"]["own"]["loss"] == pytest.approx(own.mean().item())
    assert content["summary"]["std"]["own"]["loss"] == pytest.approx(own.std().item())
    assert content["summary"]["mean"]["retain"]["loss"] == pytest.approx(
        sum(entry["retain"]["loss"] for entry in content["after"]) / 3
    )


def test_the_loss_of_an_image_is_its_own():
    """Whatever is measured with it, in however large calls, and in the mode that the network was in."""
    model, images = protocols.original().train(), forget_set()
    together = denoising_losses(model, linear_schedule(50), images, draws=8)
    assert model.training
    assert model.dropout.training
    third = images.select(torch.tensor([2]))
    alone = denoising_losses(model, linear_schedule(50), third, draws=8, batch_size=3)
    torch.testing.assert_close(together[2:], alone, rtol=1e-6, atol=0)
    assert together.unique().numel() == FORGET


@pytest.mark.parametrize("kind", ["v_prediction", "sample", "flow"])
def test_other_prediction_types_are_measured_by_what_they_predict(kind):
    model, schedule, images = TinyDenoiser(), linear_schedule(50, kind), forget_set()
    found = denoising_losses(model, schedule, images, draws=4, batch_size=1)
    timesteps = torch.tensor([6, 18, 31, 43])
    noise = philox.normal((4, 1, 8, 8), torch.tensor([0, 0, 0]), PURPOSE)
    for row, loss in enumerate(found):
        clean = images.rows(torch.tensor([row] * 4))
        x_t, target = F.noised(clean, noise, timesteps, schedule)
        with torch.no_grad():
            expected = (model(x_t, schedule.model_input(timesteps)) - target).square().mean()
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_what_is_not_finite_has_no_number_and_no_mean():
    model = TinyDenoiser()
    with torch.no_grad():
        model.leave.bias.fill_(1e30)
    assert measures().of_images(model, forget_set())[0] == {"loss": None}
    assert measures().of_retain(model) == {"loss": None}


# --- interruptions


def whole(folder: Path, protocol: str) -> None:
    protocols.run(Path(folder), protocol, keep_checkpoints=True)  # to be compared


@pytest.fixture(scope="module", params=PROTOCOLS)
def uninterrupted(request, tmp_path_factory) -> SimpleNamespace:
    """A protocol run to its end in a process of its own, and how many lines of the package that took."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    target = partial(whole, protocol=request.param)
    return SimpleNamespace(folder=folder, target=target, lines=crash.lines_of(target, folder).all)


def results(folder: Path) -> tuple[dict, list[dict]]:
    """What may not depend on interruptions."""
    numbers = [
        [{name: value for name, value in entry.items() if name != "seconds"} for entry in read_metrics(run)]
        for run in folders(folder)
    ]
    return without_identifiers(read_protocol(folder)), numbers


@pytest.mark.parametrize("part", [0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95])
def test_a_protocol_that_is_killed_goes_on_and_ends_with_the_same_bits(uninterrupted, tmp_path, part):
    kills = crash.Kills()
    line = int(part * uninterrupted.lines)
    crash.kill_at(line, uninterrupted.target, tmp_path, tmp_path, kills, saving=False)
    crash.run_to_end(uninterrupted.target, tmp_path)
    assert results(tmp_path) == results(uninterrupted.folder)
    for number in range(1, FORGET + 1):
        assert same(left(tmp_path, number), left(uninterrupted.folder, number))
        found, expected = (
            checkpoint.latest(folder / f"request-{number}" / "private")
            for folder in (tmp_path, uninterrupted.folder)
        )
        for file in ("model", "optimizer", "ema", "random"):
            name = f"{file}.safetensors"
            assert (found / name).read_bytes() == (expected / name).read_bytes(), (number, file)


class Stop(Exception):
    pass


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("seam", ["before it is built", "after its run", "before its numbers are written"])
@pytest.mark.parametrize("number", [1, 2])
def test_at_the_seams_nothing_is_done_twice(tmp_path, monkeypatch, protocol, seam, number):
    """A request that ended is not built again; one whose numbers are missing takes no step again."""
    built, stepped = [], []

    def counted(request: Request):
        built.append(request.number)
        unlearner = make(request)
        take = unlearner.step

        def step(*arguments):
            stepped.append(request.number)
            return take(*arguments)

        unlearner.step = step
        return unlearner

    def stopping(function, at):
        def stop(*arguments, **options):
            if at(*arguments):
                raise Stop
            return function(*arguments, **options)

        return stop

    from fastunlearn.runs import protocols as room

    with monkeypatch.context() as patched:
        stopped = counted
        if seam == "before it is built":
            stopped = stopping(counted, lambda request: request.number == number)
        elif seam == "after its run":
            patched.setattr(protocols, "leave", stopping(protocols.leave, lambda r, u: r.number == number))
        else:
            patched.setattr(
                room._Book, "deleted_by", stopping(room._Book.deleted_by, lambda b, r: r.number == number)
            )
        with pytest.raises(Stop):
            protocols.run(tmp_path / "stopped", protocol, make=stopped)
    ended = number if seam != "before it is built" else number - 1
    assert stepped == [n for n in range(1, ended + 1) for _ in range(STEPS)]
    before = len(built)
    protocols.run(tmp_path / "stopped", protocol, make=counted)
    assert built[before:] == list(range(number, FORGET + 1))
    assert stepped == [n for n in range(1, FORGET + 1) for _ in range(STEPS)]
    protocols.run(tmp_path / "whole", protocol)
    assert results(tmp_path / "stopped") == results(tmp_path / "whole")


def test_two_requests_do_not_lie_in_memory_at_once(tmp_path):
    built = []

    def watched(request: Request):
        assert [unlearner() for unlearner in built] == [None] * len(built)
        unlearner = make(request)
        built.append(weakref.ref(unlearner))
        return unlearner

    protocols.run(tmp_path, "continual", make=watched)
    assert len(built) == FORGET


def test_a_finished_protocol_is_left_as_it_is(tmp_path):
    first = protocols.run(tmp_path, "separate")

    def built(request: Request):
        raise AssertionError(request)

    assert protocols.run(tmp_path, "separate", make=built) == first


def stop_before_the_second(folder: Path) -> None:
    """A continual protocol that ends between its first two requests."""

    def stopped(request: Request):
        if request.number == 2:
            raise Stop
        return make(request)

    with pytest.raises(Stop):
        protocols.run(folder, "continual", make=stopped)


def test_a_run_whose_numbers_are_there_is_ended(tmp_path):
    """A kill between the two leaves its checkpoints, and nobody builds it again."""
    stop_before_the_second(tmp_path)
    first = tmp_path / "request-1"
    assert read_run(first)["status"] == "complete"
    edit(first / "run.json", status="running")
    checkpoint.save(first / "private", STEPS, {}, {})
    protocols.run(tmp_path, "continual")
    assert read_run(first)["status"] == "complete"
    assert [path.name for path in (first / "private").iterdir()] == ["record.json"]


def test_a_protocol_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """It had seeds and plain hashes in its file."""
    from fastunlearn.runs import protocols as room

    def stopped(request: Request):
        if request.number == 2:
            raise Stop
        return make(request)

    with monkeypatch.context() as patched:
        patched.setattr(room, "keyed", lambda description, key: description)
        with pytest.raises(Stop):
            protocols.run(tmp_path / "old", "continual", make=stopped)
    content = json.loads((tmp_path / "old" / FILE).read_text())
    assert content["forget"]["sha256"] == forget_set().content_hash()
    measured = content["measured"] | {"seed": 0}
    requests = [content["requests"][0] | {"seed": 5}]
    edit(tmp_path / "old" / FILE, version=1, seed=5, measured=measured, requests=requests)
    (tmp_path / "old" / "private" / "record.json").unlink()

    assert room.kept_seed("latest", tmp_path / "old") == 5
    protocols.run(tmp_path / "old", "continual")
    protocols.run(tmp_path / "whole", "continual")
    assert results(tmp_path / "old") == results(tmp_path / "whole")
    text = (tmp_path / "old" / FILE).read_text()
    assert "sha256" not in text.replace("hmac_sha256", "")
    assert '"seed"' not in text


# --- refusals


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": 2e-3}, r"expected a checkpoint of a run with optimizer .*0.002.*protocol.json"),
        ({"num_steps": 4}, "num_steps 4, got 3"),
        ({"seed": 6}, "^seed: expected that which the protocol in .* began with, got another"),
        ({"measures": measures(seed=1)}, "^measures.seed: expected that which"),
        ({"images_per_request": 2}, "images_per_request 2, got 1"),
        ({"measures": measures(draws=4)}, "draws"),
        ({"forget": ImageStore(runs.images(3, 9))}, "forget"),
        ({"retain": ImageStore(runs.images(20, 9))}, "retain"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_was_done_otherwise_is_not_gone_on_with(tmp_path, options, message):
    """Also between two requests, where there is no checkpoint to say so."""
    stop_before_the_second(tmp_path)
    before = (tmp_path / FILE).read_bytes()
    with pytest.raises(ValueError, match=message):
        protocols.run(tmp_path, "continual", **options)
    with pytest.raises(ValueError, match="protocol separate, got continual"):
        protocols.run(tmp_path, "separate")
    assert (tmp_path / FILE).read_bytes() == before
    assert folders(tmp_path) == [tmp_path / "request-1"]


def test_a_network_of_other_weights_is_refused(tmp_path):
    def changed(request: Request):
        unlearner = make(request)
        if request.number == 2:
            with torch.no_grad():
                unlearner.model.network.leave.bias.add_(1)
        return unlearner

    with pytest.raises(ValueError, match="expected the weights that request-1 left"):
        protocols.run(tmp_path / "continual", "continual", make=changed)
    with pytest.raises(ValueError, match="expected the weights that the protocol began with"):
        protocols.run(tmp_path / "separate", "separate", make=changed)


def test_images_to_keep_that_a_later_request_would_learn_again_are_refused(tmp_path):
    both = ImageStore(torch.cat([runs.images(20, 2), runs.images(FORGET, 1)[2:]]))
    with pytest.raises(ValueError, match=r"retain: .* got 1 of them \(first: row 2 of forget\)"):
        protocols.run(tmp_path / "run", "continual", retain=both)
    # Each of the first two requests by itself would not be seen to overlap.
    with pytest.raises(ValueError, match="expected images that are not in retain"):
        protocols.run(tmp_path / "other", "separate", retain=both)
    assert folders(tmp_path / "run") == []


def test_an_image_in_two_requests_is_refused(tmp_path):
    images = runs.images(3, 1)[[0, 1, 0]]
    with pytest.raises(ValueError, match=r"got 1 again \(row 2 equals row 0\)"):
        requests(ImageStore(images), "continual", tmp_path)
    assert len(requests(ImageStore(images), "continual", tmp_path, images_per_request=3)) == 1


def test_arguments_that_are_none(tmp_path):
    store = forget_set()
    with pytest.raises(ValueError, match="protocol: expected "):
        requests(store, "together", tmp_path)
    for size in (0, 4):
        with pytest.raises(ValueError, match="images_per_request"):
            requests(store, "separate", tmp_path, images_per_request=size)
    with pytest.raises(ValueError, match="seed"):
        requests(store, "continual", tmp_path, seed=2**63 - 2)
    requests(store, "separate", tmp_path, seed=2**63 - 1)
    with pytest.raises(ValueError, match="every request has checkpoints of its own"):
        protocols.run(tmp_path, "separate", resume_from_checkpoint="somewhere")
    with pytest.raises(TypeError, match="measures: expected a Measures"):
        protocols.run(tmp_path, "separate", measures=None)
    with pytest.raises(TypeError, match="forget: expected an ImageStore"):
        requests(store.images, "separate", tmp_path)
    with pytest.raises(TypeError, match="make: expected a function"):
        protocols.run(tmp_path, "separate", make=None)
    wrong = {
        "seed=5": lambda request: make(Request(**vars(request) | {"seed": 9})),
        "a new Unlearner": lambda request: taken(make(request)),
        "another set": lambda request: make(Request(**vars(request) | {"forget": store})),
    }
    for message, build in wrong.items():
        with pytest.raises(ValueError, match=message):
            protocols.run(tmp_path / message, "separate", make=build)


def taken(unlearner):
    unlearner.step()
    return unlearner


def test_a_new_protocol_is_not_begun_beside_another(tmp_path):
    protocols.run(tmp_path, "separate")
    with pytest.raises(ValueError, match=r"output_dir: expected a folder without a finished protocol"):
        protocols.run(tmp_path, "separate", resume_from_checkpoint=None)
    with pytest.raises(ValueError, match=r"num_steps: expected the 3 steps of the finished protocol"):
        protocols.run(tmp_path, "separate", num_steps=4)
    edit(tmp_path / FILE, status="running")
    with pytest.raises(ValueError, match=r"without requests for a new protocol, got .*protocol.json"):
        protocols.run(tmp_path, "separate", resume_from_checkpoint=None)
    (tmp_path / FILE).unlink()
    with pytest.raises(ValueError, match=r"without requests for a new protocol, got .*request-1"):
        protocols.run(tmp_path, "separate", resume_from_checkpoint=None)


def edit(path: Path, **entries) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def test_a_record_that_was_changed_is_refused_whole(tmp_path):
    whole = protocols.run(tmp_path, "separate") | {"status": "running"}
    entry = whole["after"][0]
    changed = [
        [],
        {},
        {**whole, "format": "another"},
        {**whole, "after": {}},
        {**whole, "after": [{**entry, "request": 2}, *whole["after"][1:]]},
        {**whole, "after": [{}, *whole["after"][1:]]},
        {**whole, "after": whole["after"][:1]},
        {name: value for name, value in whole.items() if name != "start_weights"},
    ]
    for content in changed:
        (tmp_path / FILE).write_text(json.dumps(content))
        with pytest.raises(ValueError, match="to be a fastunlearn-protocol record"):
            protocols.run(tmp_path, "separate")
    (tmp_path / FILE).write_text(json.dumps(whole)[:-9])
    with pytest.raises(ValueError, match=r"expected a folder with a readable protocol.json"):
        protocols.run(tmp_path, "separate")
