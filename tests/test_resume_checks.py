"""A checkpoint that is not quite one: whatever is changed in its files, under a manifest that fits, is
refused and named, and model, optimizer, average, scheduler, scaler, counters and generator are as they
were."""

from __future__ import annotations

import copy
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastunlearn.methods.registry import get
from fastunlearn.runs.identity import described, identity, start_weights
from fastunlearn.runs.processes import Processes
from fastunlearn.runs.resume import load_checkpoint
from fastunlearn.runs.state_checks import Entry, check_tensor
from fastunlearn.testing.factories import TinyDenoiser

MAKE = {"scale": 1024.0, "autocast_dtype": torch.float16}  # with a scaler: everything that has a state
FILES = ("model", "ema", "optimizer", "random")


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """The checkpoint of a run's second step."""
    folder = tmp_path_factory.mktemp("saved")
    return runs.stop(runs.make(**MAKE), folder)


class Resuming:
    """A new unlearner, and whether it takes a checkpoint over."""

    def __init__(self):
        self.unlearner = runs.make(**MAKE)
        self.identity = identity(self.unlearner) | described({"start_weights": start_weights(self.unlearner)})
        self.before = runs.snapshot(self.unlearner)

    def load(self, path: Path) -> None:
        load_checkpoint(self.unlearner, path, Processes(None), self.identity)

    def assert_refused(self, path: Path, *words: str) -> str:
        with pytest.raises(ValueError) as refusal:
            self.load(path)
        text = str(refusal.value)
        assert str(path) in text
        assert all(word in text for word in words), text
        assert runs.same(runs.snapshot(self.unlearner), self.before)
        return text


@pytest.fixture
def resuming() -> Resuming:
    """One for all refusals of a test: they must not change it."""
    return Resuming()


@pytest.fixture
def copied(saved: Path, tmp_path: Path) -> Path:
    shutil.copy(saved.with_name("record.json"), tmp_path)
    return Path(shutil.copytree(saved, tmp_path / saved.name))


def test_what_is_not_changed_is_taken(copied: Path):
    runs.sign(copied)
    resuming = Resuming()
    resuming.load(copied)
    assert resuming.unlearner.step_index == 2
    assert not runs.same(runs.snapshot(resuming.unlearner), resuming.before)


# --- numbers and texts ------------------------------------------------------------------------------------

VALUES = [float("nan"), float("inf"), -1, 2**63, -(2**70), "text", None, [], {}, True, False, 0.25, 1e308]
# What may have any value in a range: it changes in a run, and a file that was written to deceive can say
# anything.
FREE = {
    "scale", "_last_lr", "lr", "betas", "eps", "weight_decay", "decay",
    "_is_initial", "_get_lr_called_within_step",
}  # fmt: skip
PLAUSIBLE = (0.25, True, False)


@pytest.mark.parametrize("value", VALUES, ids=str)
def test_every_number_and_text_is_checked(copied: Path, resuming: Resuming, value):
    content = json.loads((copied / "metadata.json").read_text())
    refused = 0
    for at, before in runs.leaves(content):
        if before == value and type(before) is type(value):
            continue
        if value in PLAUSIBLE and FREE & set(map(str, at)):
            continue
        changed = json.loads(json.dumps(content))
        runs.put(changed, at, value)
        (copied / "metadata.json").write_text(json.dumps(changed))
        runs.sign(copied)
        resuming.assert_refused(copied)
        refused += 1
    assert refused > 80


@pytest.mark.parametrize("removes", [True, False], ids=["missing", "added"])
def test_missing_and_added_keys_are_refused(copied: Path, resuming: Resuming, removes: bool):
    text = (copied / "metadata.json").read_text()
    ways = {at[:depth] for at, _ in runs.leaves(json.loads(text)) for depth in range(1, len(at) + 1)}
    refused = 0
    for way in ways:
        if not removes and len(way) == 1:
            continue  # beside metadata and states: of a version to come
        if removes and way[-1] in get("retrack").later and "method" in way:
            continue  # of a version that had no such hyperparameter
        changed = json.loads(text)
        inside = changed
        for key in way[:-1]:
            inside = inside[key]
        if removes:
            del inside[way[-1]]
        elif isinstance(inside, dict):
            inside["added"] = 1
        else:
            inside.append(inside[-1])
        (copied / "metadata.json").write_text(json.dumps(changed))
        runs.sign(copied)
        resuming.assert_refused(copied)
        refused += 1
    assert refused > 100


# --- tensors ----------------------------------------------------------------------------------------------


def with_value(tensor: Tensor, value: float) -> Tensor:
    tensor = tensor.clone()
    tensor.view(-1)[-1] = value
    return tensor


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "empty": lambda tensor: tensor.new_empty(0),
    "short": lambda tensor: tensor.flatten()[:-1].clone() if tensor.numel() > 1 else tensor.new_zeros(2),
    "oversized": lambda tensor: torch.cat([tensor.flatten(), tensor.flatten()]),
    "one axis more": lambda tensor: tensor.unsqueeze(0).clone(),
    "integer": lambda tensor: tensor.to(torch.int32),
    "boolean": lambda tensor: tensor.bool(),
    "complex": lambda tensor: tensor.to(torch.complex64),
    "NaN": lambda tensor: with_value(tensor, float("nan")),
    "Inf": lambda tensor: with_value(tensor, float("inf")),
    "-Inf": lambda tensor: with_value(tensor, -float("inf")),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_every_tensor_is_checked(saved: Path, copied: Path, resuming: Resuming, kind: str):
    refused = 0
    for stem in FILES:
        file = f"{stem}.safetensors"
        for name, value in load_file(saved / file).items():
            if not value.is_floating_point() and kind in ("NaN", "Inf", "-Inf"):
                continue
            shutil.copy(saved / file, copied / file)
            runs.change_tensors(
                copied, stem, lambda named, name=name: named.update({name: CHANGES[kind](named[name])})
            )
            resuming.assert_refused(copied, name.removeprefix(f"{stem}.").removeprefix("by_parameter."))
            refused += 1
        shutil.copy(saved / file, copied / file)
    assert refused >= 24


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_moments_of_another_precision_are_refused(copied: Path, resuming: Resuming, dtype: torch.dtype):
    name = "optimizer.state.enter.weight.exp_avg"
    runs.change_tensors(copied, "optimizer", lambda named: named.update({name: named[name].to(dtype)}))
    resuming.assert_refused(
        copied, "optimizer.safetensors", "enter.weight.exp_avg", "expected float32", "got " + str(dtype)[6:]
    )


def test_a_negative_mean_of_squares_is_refused(copied: Path, resuming: Resuming):
    for name in ("exp_avg_sq", "step"):
        key = f"optimizer.state.enter.bias.{name}"
        runs.change_tensors(
            copied,
            "optimizer",
            lambda named, key=key: named.update({key: with_value(named[key].abs(), -0.5)}),
        )
        resuming.assert_refused(copied, f"enter.bias.{name}", "expected values >= 0, not -0.5")
        runs.change_tensors(copied, "optimizer", lambda named, key=key: named.update({key: named[key].abs()}))


@pytest.mark.parametrize("byte", [0, 255])
def test_bytes_that_are_no_generator_are_refused(copied: Path, resuming: Resuming, byte: int):
    """Of the right number and dtype."""
    runs.change_tensors(
        copied,
        "random",
        lambda named: named.update({name: value * 0 + byte for name, value in named.items()}),
    )
    resuming.assert_refused(copied, "random.safetensors", "expected the state of a generator")


@pytest.mark.parametrize("stem", FILES)
def test_missing_added_and_swapped_tensors_are_refused(
    saved: Path, copied: Path, resuming: Resuming, stem: str
):
    file = f"{stem}.safetensors"
    names = list(load_file(saved / file))
    for name in names:
        runs.change_tensors(copied, stem, lambda named, name=name: named.pop(name))
        resuming.assert_refused(copied)
        shutil.copy(saved / file, copied / file)
    runs.change_tensors(copied, stem, lambda named: named.update(added=torch.zeros(3)))
    resuming.assert_refused(copied, "added")


def test_files_that_belong_to_nothing_are_refused(saved: Path, copied: Path, resuming: Resuming):
    shutil.copy(saved / "model.safetensors", copied / "other.safetensors")
    runs.sign(copied)
    resuming.assert_refused(copied, "other")
    (copied / "other.safetensors").unlink()
    (copied / "model.safetensors").unlink()
    runs.sign(copied)
    resuming.assert_refused(copied, "no model")


def test_strides_that_no_dense_layout_has_are_refused(copied: Path, resuming: Resuming):
    """They say where memory is read and written."""
    content = json.loads((copied / "metadata.json").read_text())
    entry = content["states"]["optimizer"]["state"]["enter.weight"]["exp_avg"]
    for stride in (
        [0, 0, 0, 0],
        [2**40, 9, 3, 1],
        [-9, 9, 3, 1],
        [9, 9, 3],
        [9, 9, 3, 1.0],
        "9931",
        [2**70, 9, 3, 1],
        [9, 9, 1, 1],
        [1, 9, 3, 1],
    ):
        entry["stride"] = stride
        (copied / "metadata.json").write_text(json.dumps(content))
        runs.sign(copied)
        resuming.assert_refused(copied, "strides")


def test_bytes_of_the_headers_are_no_way_around(saved: Path, copied: Path, resuming: Resuming):
    """A changed header is refused, or says what it said before (a space for a space)."""
    generator = random.Random(0)
    refused = 0
    for stem in FILES:
        whole = (saved / f"{stem}.safetensors").read_bytes()
        length = 8 + int.from_bytes(whole[:8], "little")
        for _ in range(60):
            changed = bytearray(whole)
            for _ in range(generator.randint(1, 3)):
                changed[generator.randrange(length)] = generator.randrange(256)
            (copied / f"{stem}.safetensors").write_bytes(changed)
            runs.sign(copied)
            try:
                found = load_file(copied / f"{stem}.safetensors")
            except Exception:
                found = {}
            if runs.same(found, load_file(saved / f"{stem}.safetensors")):
                continue
            resuming.assert_refused(copied)
            refused += 1
        (copied / f"{stem}.safetensors").write_bytes(whole)
    assert refused > 100


@pytest.mark.parametrize(
    "text",
    ["[" * 100_000, '{"version": 2, "metadata": ' + '{"a":' * 50_000, "{}", "null", "1e999", '"', "\x00"],
)
def test_json_of_another_shape_is_refused(copied: Path, resuming: Resuming, text: str):
    for file in ("metadata.json", "manifest.json"):
        before = (copied / file).read_text()
        (copied / file).write_text(text)
        if file == "metadata.json":
            runs.sign(copied)
        resuming.assert_refused(copied)
        (copied / file).write_text(before)


# --- what an object of the user's refuses -----------------------------------------------------------------


def test_a_part_that_refuses_its_state_undoes_the_rest(saved: Path, monkeypatch):
    """Scheduler and average are loaded by then."""
    resuming = Resuming()

    def refuse(state: dict) -> None:
        resuming.unlearner.optimizer.param_groups[0]["lr"] = 7.0
        raise RuntimeError("not today")

    before = runs.snapshot(resuming.unlearner)
    monkeypatch.setattr(resuming.unlearner, "load_state_dict", refuse)
    with pytest.raises(
        ValueError, match=r"unlearner: expected a state that it takes, .*RuntimeError: not today"
    ):
        resuming.load(saved)
    assert runs.same(runs.snapshot(resuming.unlearner), before)


def test_an_average_of_diffusers_goes_on_and_is_checked(tmp_path: Path):
    ema_model = pytest.importorskip("diffusers.training_utils").EMAModel

    def make(**options):
        unlearner = runs.make(ema=None)
        unlearner.ema = ema_model(unlearner.model.parameters(), **{"decay": 0.9} | options)
        return unlearner

    whole, resumed = make(), make()
    runs.run(whole, tmp_path / "whole")
    runs.stop(make(), tmp_path / "run")
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "again"))
    runs.run(resumed, tmp_path / "run", 4, resume_from_checkpoint="latest")
    assert runs.same(resumed.ema.state_dict(), whole.ema.state_dict())
    with pytest.raises(ValueError, match=r"decay \(0.8 here, 0.9 there\)"):
        runs.run(make(decay=0.8), again, resume_from_checkpoint="latest")
    saved = runs.saved_in(again, 2)
    for key, value in (
        ("decay", 0.5),
        ("power", 2),
        ("optimization_step", -1),
        ("optimization_step", 2.5),
        ("use_ema_warmup", True),
    ):
        content = json.loads((saved / "metadata.json").read_text())
        before = content["states"]["ema"][key]
        runs.change_json(
            saved, lambda content, key=key, value=value: content["states"]["ema"].update({key: value})
        )
        with pytest.raises(ValueError, match=rf"metadata\.json: ema\.{key}: expected"):
            runs.run(make(), again, resume_from_checkpoint="latest")
        runs.change_json(
            saved, lambda content, key=key, value=before: content["states"]["ema"].update({key: value})
        )
    runs.run(make(), again, resume_from_checkpoint="latest")


class Network(torch.nn.Module):
    """An average that is a network itself, as torch's `AveragedModel`."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.averaged = torch.compile(copy.deepcopy(model), backend="eager")

    def step(self, parameters) -> None:
        for own, other in zip(self.averaged.parameters(), parameters, strict=True):
            own.data.lerp_(other.data, 0.1)


def test_an_average_that_is_a_network_goes_on(tmp_path: Path):
    def make():
        unlearner = runs.make(ema=None)
        unlearner.ema = Network(unlearner.model)
        return unlearner

    whole, resumed = make(), make()
    runs.run(whole, tmp_path / "whole")
    runs.stop(make(), tmp_path / "run")
    assert "ema.averaged.enter.weight" in load_file(runs.saved_in(tmp_path / "run", 2) / "ema.safetensors")
    runs.run(resumed, tmp_path / "run", resume_from_checkpoint="latest")
    assert runs.same(dict(resumed.ema.state_dict()), dict(whole.ema.state_dict()))


class Lazy(runs.Ema):
    """An average that begins with the first step, and keeps a list of what it did."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.shadow_params, self.rates = None, []

    def step(self, parameters) -> None:
        parameters = list(parameters)
        if self.shadow_params is None:
            self.shadow_params = [parameter.detach().clone() for parameter in parameters]
        super().step(parameters)
        self.rates.append(self.decay)

    def state_dict(self) -> dict:
        return super().state_dict() | {"rates": self.rates}


def test_a_state_of_the_users_may_grow(tmp_path: Path):
    def make():
        unlearner = runs.make(ema=None)
        unlearner.ema = Lazy(unlearner.model.parameters())
        return unlearner

    whole, resumed = make(), make()
    runs.run(whole, tmp_path / "whole")
    runs.stop(make(), tmp_path / "run")
    again = Path(shutil.copytree(tmp_path / "run", tmp_path / "again"))
    runs.run(resumed, tmp_path / "run", 4, resume_from_checkpoint="latest")
    assert runs.same(resumed.ema.state_dict(), whole.ema.state_dict())
    runs.change_json(
        runs.saved_in(again, 2),
        lambda content: content["states"]["ema"]["rates"].append(float("nan")),
    )
    with pytest.raises(ValueError, match=r"ema\.rates\.2: expected a finite number, got nan"):
        runs.run(make(), again, resume_from_checkpoint="latest")


def test_a_network_whose_state_no_checkpoint_can_hold_is_refused_at_the_start(tmp_path: Path):
    class Extra(TinyDenoiser):
        def get_extra_state(self):
            return 5

        def set_extra_state(self, state):
            """Nothing."""

    with pytest.raises(TypeError, match="model: expected a state dict of tensors, got 5 for _extra_state"):
        runs.run(runs.make(model=Extra()), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_buffer_may_hold_infinities_where_it_does():
    """As a mask of attention does; a weight may not."""
    place, own = Entry(Path("checkpoint-1"), "model", "mask"), torch.tensor([0.0, -float("inf")])
    check_tensor(place, own.clone(), own)
    for found in (torch.tensor([float("nan"), -float("inf")]), torch.tensor([float("inf"), 0.0])):
        with pytest.raises(ValueError, match=r"model\.mask: expected finite values"):
            check_tensor(place, found, own)


@pytest.mark.parametrize(
    ("state", "text"),
    [
        ({"step_index": -1}, r"step_index: expected an integer in \[0, 42949672\d\d\]"),
        ({"step_index": 2**63}, r"step_index: expected an integer in \[0, 42949672\d\d\]"),
        ({"step_index": 2**32 + 1}, r"step_index: expected an integer in \[0, 42949672\d\d\]"),
        ({"step_index": 1.0}, "step_index: expected an integer, got 1.0"),
        ({"skipped_steps": -1}, r"skipped_steps: expected an integer in \[0, 3\]"),
        ({"skipped_steps": 4}, r"skipped_steps: expected an integer in \[0, 3\]"),
        ({"seed": 6}, "seed: expected the seed of the run that is resumed, 6, got 5"),
    ],
)
def test_the_unlearner_checks_its_own_state(state: dict, text: str):
    unlearner = runs.make()
    with pytest.raises((TypeError, ValueError), match=text):
        unlearner.load_state_dict({"seed": 5, "step_index": 3, "skipped_steps": 0} | state)
    assert (unlearner.step_index, unlearner._counter.tolist()) == (0, [5, 0, 0])
