"""Small runs with everything that has a state, and ways to change what they leave: shared by the tests of
resuming."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
import signal
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastunlearn import ImageStore, Unlearner
from fastunlearn.methods import Method, ReTrack
from fastunlearn.runs import checkpoint
from fastunlearn.runs.run_record import without_identifiers
from fastunlearn.runs.training import RunInterrupted, unlearn
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

STEPS, SAVED_AT = 4, 2


def images(count: int, seed: int) -> Tensor:
    """`[count, 1, 8, 8]` uint8."""
    return torch.randint(
        0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


class Ema:
    """A moving average with numbers of its own, of the interface of diffusers' `EMAModel`."""

    def __init__(self, parameters: Any, decay: float = 0.9):
        self.decay, self.optimization_step = decay, 0
        self.shadow_params = [parameter.detach().clone() for parameter in parameters]

    def step(self, parameters: Any) -> None:
        self.optimization_step += 1
        torch._foreach_lerp_(
            self.shadow_params, [parameter.detach() for parameter in parameters], 1 - self.decay
        )

    def state_dict(self) -> dict[str, Any]:
        return {
            "decay": self.decay,
            "optimization_step": self.optimization_step,
            "shadow_params": self.shadow_params,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)


def make(
    *,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    order: Callable[[list], list] = list,
    optimizer: Callable[..., torch.optim.Optimizer] | None = None,
    lr_scheduler: Callable[..., Any] | None = None,
    method: Method | None = None,
    ema: float | None = 0.9,
    scale: float | None = None,
    model: nn.Module | None = None,
    **options: Any,
) -> Unlearner:
    """An `Unlearner` of a run: `wrap` is put around the network, `order` around the list of its
    parameters."""
    torch.manual_seed(0)
    model = TinyDenoiser() if model is None else model
    parameters = order(list(model.parameters()))
    make_optimizer = optimizer or (lambda given: torch.optim.AdamW(given, lr=1e-3, fused=True))
    trained = make_optimizer(parameters)
    make_scheduler = lr_scheduler or (lambda given: torch.optim.lr_scheduler.LinearLR(given, 0.5, 1.0, STEPS))
    model = wrap(model)
    parts = {
        "ema": None if ema is None else Ema(model.parameters(), ema),
        "lr_scheduler": make_scheduler(trained),
        "grad_scaler": None if scale is None else torch.amp.GradScaler("cpu", init_scale=scale),
    }
    stores = {"forget": ImageStore(images(4, 1)), "retain": ImageStore(images(20, 2))}
    options = {"batch_size": 4, "seed": 5, "schedule": linear_schedule()} | stores | parts | options
    schedule = options.pop("schedule")
    return Unlearner(model, trained, schedule, method or ReTrack(k=2, lambd=0.3), **options)


def run(unlearner: Unlearner, folder: Path, num_steps: int = STEPS, **options: Any):
    """`unlearn` with a checkpoint every second step."""
    return unlearn(
        unlearner,
        num_steps=num_steps,
        output_dir=folder,
        **{"show_progress": False, "checkpointing_steps": SAVED_AT} | options,
    )


def stop(unlearner: Unlearner, folder: Path, step: int = SAVED_AT, **options: Any) -> Path:
    """The same, but a signal stops it after `step`: the checkpoint that it leaves."""
    take = unlearner.step

    def stopping(*arguments: Any) -> Any:
        output = take(*arguments)
        if unlearner.step_index == step:
            signal.raise_signal(signal.SIGTERM)
        return output

    unlearner.step = stopping
    try:
        run(unlearner, folder, **options)
    except RunInterrupted as interrupted:
        return interrupted.checkpoint
    raise AssertionError("the signal did not stop the run")


def saved_in(folder: Path, step: int) -> Path:
    """The checkpoint that a run wrote after `step`."""
    return folder / "private" / f"checkpoint-{step}"


def same_run(first: Path, second: Path) -> bool:
    """Whether two checkpoints say the same of their runs; each run has its own key for its hashes."""
    about = [checkpoint.load(path).metadata for path in (first, second)]
    hashes = [without_identifiers(each["identity"]) for each in about]
    return hashes[0] == hashes[1] and about[0]["unlearner"] == about[1]["unlearner"]


def unfinish(folder: Path, step: int) -> Path:
    """Makes of a finished run that kept its checkpoints what it had been, had it been killed after `step`."""
    for place in (folder, folder / "private"):
        for path in place.glob("checkpoint-*"):
            if int(path.name.removeprefix("checkpoint-")) > step:
                shutil.rmtree(path)
    shutil.rmtree(folder / "model", ignore_errors=True)
    record = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps(record | {"status": "running"}))
    return folder


def weights(unlearner: Unlearner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in unlearner.model.parameters()])


def whole(folder: Path) -> tuple[Path, Tensor]:
    """A run of the plain network to its end that keeps its checkpoints: its folder, and its weights."""
    unlearner = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what they give away
        run(unlearner, folder, keep_checkpoints=True)
    return folder, weights(unlearner)


def snapshot(unlearner: Unlearner) -> dict[str, Any]:
    """A copy of everything that a resume may change."""
    parts = {
        name: getattr(unlearner, name)
        for name in ("model", "optimizer", "lr_scheduler", "ema", "grad_scaler")
    }
    state = {name: part.state_dict() for name, part in parts.items() if part is not None}
    return copy.deepcopy(state | {"unlearner": unlearner.state_dict(), "random": torch.get_rng_state()})


def same(first: Any, second: Any) -> bool:
    """Equal bit for bit, tensors included."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and first == second


# --- changing a checkpoint --------------------------------------------------------------------------------


def sign(path: Path) -> None:
    """Writes the manifest of what is in the folder, as somebody would who wants it to be believed."""
    files = [file for file in sorted(path.iterdir()) if file.name != "manifest.json"]
    manifest = {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}
    (path / "manifest.json").write_text(json.dumps(manifest))


def change_json(path: Path, change: Callable[[Any], None]) -> None:
    """`change` is called with the content of metadata.json."""
    content = json.loads((path / "metadata.json").read_text())
    change(content)
    (path / "metadata.json").write_text(json.dumps(content))
    sign(path)


def change_tensors(path: Path, stem: str, change: Callable[[dict[str, Tensor]], None]) -> None:
    """`change` is called with the tensors of STEM.safetensors."""
    tensors = {name: value.clone() for name, value in load_file(path / f"{stem}.safetensors").items()}
    change(tensors)
    save_file(tensors, path / f"{stem}.safetensors")
    sign(path)


def leaves(value: Any, at: tuple = ()) -> Iterator[tuple[tuple, Any]]:
    """Every number, text, boolean and None of a JSON value, with the keys that lead to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*at, key))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from leaves(item, (*at, index))
    else:
        yield at, value


def put(content: Any, at: tuple, value: Any) -> None:
    """Puts `value` where the keys `at` lead."""
    *way, last = at
    for key in way:
        content = content[key]
    content[last] = value
