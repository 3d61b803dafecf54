"""`unlearn --protocol separate | continual` and `--from_scratch`: the commands, on a tiny network."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import crash
import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file

from fastunlearn import ImageStore, NoiseSchedule, Unlearner, Vanilla
from fastunlearn.cli import main
from fastunlearn.metrics.deletion import denoising_losses
from fastunlearn.metrics.distance import distances
from fastunlearn.models import fresh_network, load_checkpoint
from fastunlearn.models.sampling import inject_and_denoise
from fastunlearn.runs.lineage import LINEAGE_KEY
from fastunlearn.runs.protocols import FILE, folders, read_protocol
from fastunlearn.runs.run_record import read_metrics, read_run, without_identifiers
from fastunlearn.testing.checkpoints import save_tiny_checkpoint

pytest.importorskip("tyro")
pytest.importorskip("diffusers")
FAST = ("--steps", "3", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", "--checkpointing_steps", "2")
FAST += ("--seed", "0")
METHODS = {"retrack": ("--k", "3"), "siss": (), "neggrad": (), "vanilla": ()}
WEIGHTS = Path("model") / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, three images to forget, each in a file of its own, too, and twenty to keep."""
    root = tmp_path_factory.mktemp("world")
    images = np.random.default_rng(0).integers(0, 256, (23, 1, 8, 8), dtype=np.uint8)
    np.save(root / "forget.npy", images[:3])
    for row in range(3):
        np.save(root / f"forget-{row}.npy", images[row : row + 1])
    np.save(root / "retain.npy", images[3:])
    np.save(root / "all.npy", images)
    paths = {name: root / f"{name}.npy" for name in ("forget", "retain", "all")}
    return SimpleNamespace(root=root, images=images, model=save_tiny_checkpoint(root / "model"), **paths)


def run(world, output: Path, *more: object, method: str = "retrack") -> int:
    paths = ("--model", world.model, "--forget", world.forget, "--retain", world.retain, "--output", output)
    arguments = ("unlearn", *paths, "--method", method, *FAST, *METHODS[method], *more)
    return main([str(argument) for argument in arguments])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(first: Path, second: Path) -> bool:
    left, right = weights(first), weights(second)
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# Of the others the same is shown without the command, in seconds (tests/test_protocols.py).
QUICK = ("neggrad", "retrack")


@pytest.mark.parametrize(
    "method",
    [method if method in QUICK else pytest.param(method, marks=pytest.mark.slow) for method in METHODS],
)
@pytest.mark.parametrize("protocol", ["separate", "continual"])
def test_every_request_is_what_the_command_alone_would_do(world, tmp_path, protocol, method):
    """With its own image, and the model and seed that its place gives it."""
    average = ("--use_ema", "--ema_decay", "0.5", "--seed", 7)
    assert run(world, tmp_path / "all", "--protocol", protocol, *average, method=method) == 0
    assert [folder.name for folder in folders(tmp_path / "all")] == ["request-1", "request-2", "request-3"]
    for row in range(3):
        model, seed = world.model, 7
        if protocol == "continual" and row > 0:
            model, seed = tmp_path / f"alone-{row - 1}" / "model", 7 + row
        own = ("--model", model, "--forget", world.root / f"forget-{row}.npy")
        alone = tmp_path / f"alone-{row}"
        assert run(world, alone, *average, *own, "--seed", seed, method=method) == 0
        assert same(tmp_path / "all" / f"request-{row + 1}", alone)


def test_the_numbers_are_those_of_the_models_that_were_written(world, tmp_path, capsys):
    assert run(world, tmp_path, "--protocol", "continual") == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert shown.endswith(f"protocol: {tmp_path / FILE}")
    content = read_protocol(tmp_path)
    images = ImageStore(torch.from_numpy(world.images))
    forget, retain = images.select(torch.arange(3)), images.select(torch.arange(3, 23))
    for number in range(4):
        folder = world.model if number == 0 else tmp_path / f"request-{number}" / "model"
        model, scheduler = load_checkpoint(folder)
        found = content["before"] if number == 0 else content["after"][number - 1]
        schedule = NoiseSchedule.from_diffusers(scheduler)
        losses = denoising_losses(model, schedule, forget).tolist()
        for image in found["images"]:
            clean = forget.rows(torch.tensor([image["row"]]))
            ends = inject_and_denoise(model, scheduler, clean, 19, chains=4)
            assert image["loss"] == pytest.approx(losses[image["row"]], rel=1e-6)
            assert image["distance"] == pytest.approx(distances(ends, clean).mean().item(), rel=1e-5)
        kept = denoising_losses(model, schedule, retain, draws=8).mean().item()
        assert found["retain"]["loss"] == pytest.approx(kept, rel=1e-6)
    for row, request in enumerate(content["summary"]["requests"]):
        before, after = request["own"]["before"]["loss"], request["own"]["after"]["loss"]
        assert before == content["before"]["images"][row]["loss"]
        assert f"{before:.4g} -> " in shown
        assert f"{after:.4g}" in shown


def test_groups_of_images_and_methods_without_a_retain_set(world, tmp_path, capsys):
    paths = ("--model", world.model, "--forget", world.forget, "--output", tmp_path)
    more = ("--method", "neggrad", *FAST, "--protocol", "separate", "--images_per_request", 2)
    assert main([str(word) for word in ("unlearn", *paths, *more)]) == 0
    assert "0-1" in capsys.readouterr().out
    content = read_protocol(tmp_path)
    assert [request["rows"] for request in content["requests"]] == [[0, 1], [2]]
    assert content["before"]["retain"] == content["after"][0]["retain"] == {}
    assert content["summary"]["mean"]["retain"] == {}
    assert read_run(tmp_path / "request-1")["data"]["forget"]["rows"] == 2


def test_images_to_forget_are_kept_by_no_request(world, tmp_path, capsys):
    """Not before their own one either: all requests keep the same images."""
    flags = ("--protocol", "continual", "--retain", world.all)
    assert run(world, tmp_path / "refused", *flags) == 2
    assert "expected images that are not in retain, got 3 that are" in capsys.readouterr().err
    assert run(world, tmp_path / "run", *flags, "--drop_overlap") == 0
    for folder in folders(tmp_path / "run"):
        record = read_run(folder)
        assert record["data"]["retain"]["rows"] == 20
        assert record["forget_in_retain"]["dropped_equal"] == 3
        assert record["protocol"]["of"] == 3
    assert run(world, tmp_path / "other", "--protocol", "continual") == 0
    assert same(tmp_path / "run" / "request-3", tmp_path / "other" / "request-3")


def whole(output: str, root: str) -> None:
    """A continual protocol, begun or gone on with; a forked child has nothing but this."""
    torch.set_num_threads(1)
    root = Path(root)
    world = SimpleNamespace(model=root / "model", forget=root / "forget.npy", retain=root / "retain.npy")
    options = ("--protocol", "continual", "--resume_from_checkpoint", "latest", "--use_ema")
    assert run(world, Path(output), *options) == 0


def test_a_command_that_is_killed_goes_on(world, tmp_path):
    target = partial(whole, root=str(world.root))
    lines = crash.lines_of(target, tmp_path / "whole").all
    for part in (0.35, 0.7):
        crash.kill_at(int(part * lines), target, tmp_path / "killed", tmp_path, crash.Kills(), saving=False)
    assert read_protocol(tmp_path / "killed")["status"] == "running"
    crash.run_to_end(target, tmp_path / "killed")
    contents = (read_protocol(tmp_path / name) for name in ("killed", "whole"))
    assert without_identifiers(next(contents)) == without_identifiers(next(contents))
    for number in (1, 2, 3):
        request = f"request-{number}"
        assert same(tmp_path / "killed" / request, tmp_path / "whole" / request)
        numbers = [
            [{**entry, "seconds": 0} for entry in read_metrics(tmp_path / folder / request)]
            for folder in ("killed", "whole")
        ]
        assert numbers[0] == numbers[1]


def test_masks_and_anchors_are_those_of_each_request(world, tmp_path):
    """From its images and the network that it begins with, as the command alone would make them."""
    rules = ("--mask_fraction", "0.5", "--mask_batches", "2", "--anchor", "vdu_l2", "--anchor_gamma", "1")
    assert run(world, tmp_path / "all", "--protocol", "continual", *rules, method="neggrad") == 0
    second = ("--model", tmp_path / "all" / "request-1" / "model", "--forget", world.root / "forget-1.npy")
    assert run(world, tmp_path / "alone", *rules, *second, "--seed", 1, method="neggrad") == 0
    assert same(tmp_path / "all" / "request-2", tmp_path / "alone")
    before, after = (weights(tmp_path / "all" / f"request-{number}") for number in (1, 2))
    moved = sum(int((before[name] != after[name]).sum()) for name in before)
    assert 0 < moved <= sum(tensor.numel() for tensor in before.values()) / 2 + 1


def test_private_files_of_every_request_are_purged(world, tmp_path, capsys):
    assert run(world, tmp_path, "--protocol", "separate", "--report_images") == 0
    private = [sorted((folder / "private").iterdir()) for folder in folders(tmp_path)]
    names = [LINEAGE_KEY, "reconstructions.png", "record.json"]
    assert [sorted(file.name for file in files) for files in private] == [sorted(names)] * 3
    assert [file for file in tmp_path.rglob("*.png") if file.parent.name != "private"] == []
    assert main(["purge", str(tmp_path)]) == 0
    left = [file.name for files in private for file in files if file.exists()]
    assert left == [LINEAGE_KEY] * 3
    assert capsys.readouterr().out.count("2 files removed") == 3


REFUSED = {
    "a group of one run": (("--images_per_request", 2), "--images_per_request: expected --protocol separate"),
    "a group of none": (("--protocol", "separate", "--images_per_request", 0), "--images_per_request"),
    "a larger group": (("--protocol", "separate", "--images_per_request", 4), "images_per_request: expected"),
    "images that are kept": (
        ("--protocol", "continual", "--allow_overlap"),
        "--allow_overlap: expected --drop_overlap with --protocol continual",
    ),
    "one checkpoint": (
        ("--protocol", "separate", "--resume_from_checkpoint", "here"),
        "--resume_from_checkpoint: expected latest with --protocol separate",
    ),
    "new weights that forget": (
        ("--from_scratch", "--steps", "9"),
        "--from_scratch: expected --method vanilla",
    ),
}
OF_VANILLA = {
    "new weights for every request": (
        ("--protocol", "separate", "--steps", "9"),
        "--from_scratch: expected --protocol together",
    ),
    "new weights that are held": (
        ("--anchor", "vdu_l2", "--anchor_gamma", "1", "--steps", "9"),
        "--from_scratch: expected no --anchor",
    ),
    "new weights behind a mask": (
        ("--mask_fraction", "0.5", "--steps", "9"),
        "--from_scratch: expected no --mask_fraction",
    ),
    "training as short as unlearning": (
        ("--steps", "50"),
        "--from_scratch: expected --max_train_steps beside it (the papers' MNIST T-Shirt: 118500), got the",
    ),
    "a seed that torch does not read": (("--steps", "9", "--seed", 2**32), "seed: expected"),
}


@pytest.mark.parametrize("case", [*REFUSED, *OF_VANILLA])
def test_what_has_no_meaning_is_refused(world, tmp_path, capsys, case):
    flags, message = {**REFUSED, **OF_VANILLA}[case]
    if case in OF_VANILLA:
        code = run(world, tmp_path / "run", "--from_scratch", *flags, method="vanilla")
    else:
        code = run(world, tmp_path / "run", *flags)
    assert code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run").exists()


def test_a_protocol_needs_images_to_forget(world, tmp_path, capsys):
    paths = ("--model", world.model, "--retain", world.retain, "--output", tmp_path / "run")
    words = ("unlearn", *paths, "--method", "vanilla", *FAST, "--protocol", "separate")
    assert main([str(word) for word in words]) == 2
    assert (
        "--forget: expected at least one path with --protocol separate, got none" in capsys.readouterr().err
    )


def test_the_files_of_a_run_and_a_protocol_do_not_mix(world, tmp_path, capsys):
    assert run(world, tmp_path / "run") == 0
    assert run(world, tmp_path / "run", "--protocol", "separate") == 2
    assert "--output: expected a folder without run.json" in capsys.readouterr().err
    assert run(world, tmp_path / "each", "--protocol", "separate") == 0
    assert run(world, tmp_path / "each") == 2
    assert "--output: expected a folder without protocol.json" in capsys.readouterr().err
    assert run(world, tmp_path / "each", "--protocol", "separate") == 2
    assert "--output: expected a folder without a finished protocol" in capsys.readouterr().err
    resumed = ("--protocol", "separate", "--resume_from_checkpoint", "latest")
    assert run(world, tmp_path / "each", *resumed, "--lr", "2e-3") == 0  # nothing was left to do
    assert f"{tmp_path / 'each'}: the protocol is complete" in capsys.readouterr().out
    assert run(world, tmp_path / "each", *resumed, "--steps", 9) == 2
    assert "--max_train_steps: expected the 3 steps of the finished protocol" in capsys.readouterr().err


# --- retraining from scratch


def scratch(world, output: Path, *more: object) -> int:
    return run(world, output, "--from_scratch", "--use_ema", "--ema_decay", "0.5", *more, method="vanilla")


def test_a_network_is_trained_from_new_weights_on_what_is_kept(world, tmp_path):
    """As an `Unlearner` with the vanilla method does by hand."""
    from diffusers.training_utils import EMAModel

    assert scratch(world, tmp_path, "--seed", 3) == 0
    known, scheduler = load_checkpoint(world.model)
    model = fresh_network(known, 3).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8, fused=True
    )
    ema = EMAModel(model.parameters(), decay=0.5)
    unlearner = Unlearner(
        model,
        optimizer,
        NoiseSchedule.from_diffusers(scheduler),
        Vanilla(),
        retain=ImageStore(torch.from_numpy(world.images[3:])),
        batch_size=4,
        total_steps=3,
        seed=3,
        ema=ema,
        autocast_dtype=None,
    )
    for _ in range(3):
        unlearner.step()
    ema.copy_to(model.parameters())
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in weights(tmp_path).items())
    record = read_run(tmp_path)
    assert record["from_scratch"] is True
    assert record["base_model"] == str(world.model)


def test_new_weights_depend_on_the_seed_alone(world, tmp_path):
    known, _ = load_checkpoint(world.model)
    other, _ = load_checkpoint(save_tiny_checkpoint(tmp_path / "other", seed=1))
    before = torch.get_rng_state()
    first = torch.cat([parameter.flatten() for parameter in fresh_network(known, 3).parameters()])
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(5)
    again = torch.cat([parameter.flatten() for parameter in fresh_network(other, 3).parameters()])
    assert torch.equal(first, again)
    fourth = torch.cat([parameter.flatten() for parameter in fresh_network(known, 4).parameters()])
    old = torch.cat([parameter.flatten() for parameter in known.parameters()])
    assert not torch.equal(first, fourth)
    assert not torch.equal(first, old)
    assert dict(fresh_network(known, 3).config) == dict(known.config)


def test_a_retraining_that_was_stopped_goes_on(world, tmp_path, capsys):
    assert scratch(world, tmp_path / "whole", "--seed", 3) == 0
    assert scratch(world, tmp_path / "stopped", "--seed", 3, "--steps", 2, "--keep_checkpoints") == 0
    runs.unfinish(tmp_path / "stopped", 2)
    # Without the flag it would be another run: it begins with other weights.
    resumed = ("--seed", 3, "--resume_from_checkpoint", "latest")
    more = ("--use_ema", "--ema_decay", "0.5", *resumed)
    assert run(world, tmp_path / "stopped", *more, method="vanilla") == 2
    assert "start_weights" in capsys.readouterr().err
    assert scratch(world, tmp_path / "stopped", *resumed) == 0
    assert same(tmp_path / "whole", tmp_path / "stopped")


def test_retraining_learns(world, tmp_path):
    assert scratch(world, tmp_path, "--steps", 60, "--mixed_precision", "bf16") == 0
    losses = [json.loads(line)["loss"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-20:]) < sum(losses[:20])
