"""Runs that forget one image of 8x8, and ten candidates for it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from runs import images
from torch import Tensor

from fastunlearn import ImageStore, Unlearner
from fastunlearn.methods import Method
from fastunlearn.runs.training import unlearn
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SEED = 4_611_686_018_427_388_889  # with so many digits that nothing else in a file looks like it
BATCH = 2
SHAPE = (1, 8, 8)
CANDIDATES = images(10, seed=3)  # [10, 1, 8, 8] uint8
RIGHT = 7  # which of them is forgotten
RETAIN = images(20, seed=2)


class Killed(Exception):
    """What ends a run before its last step."""


def network() -> TinyDenoiser:
    """With the weights before the run."""
    return TinyDenoiser(width=12)


def adamw(parameters: Iterable) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def unlearner(
    method: Method, candidate: int = RIGHT, seed: int = SEED, optimizer: Callable = adamw
) -> Unlearner:
    """A run that forgets one of the candidates."""
    model = network()
    return Unlearner(
        model,
        optimizer(model.parameters()),
        linear_schedule(),
        method,
        forget=ImageStore(CANDIDATES[candidate][None]),
        retain=ImageStore(RETAIN),
        batch_size=BATCH,
        seed=seed,
    )


def run(method: Method, folder: Path, *, steps: int = 1, optimizer: Callable = adamw, **options: Any) -> Path:
    """A run to its end."""
    unlearn(
        unlearner(method, optimizer=optimizer),
        num_steps=steps,
        output_dir=folder,
        show_progress=False,
        **options,
    )
    return folder


def stopped_run(method: Method, folder: Path) -> Path:
    """A run that ended after its first step, and left a checkpoint to go on from."""

    def kill(step: int, numbers: dict) -> None:
        if step == 2:
            raise Killed

    try:
        run(method, folder, steps=2, checkpointing_steps=1, report_to=kill)
    except Killed:
        return folder
    raise AssertionError("the run was not stopped")


def first_moments(method: Method, candidate: int, seed: int = SEED) -> dict[str, Tensor]:
    """Adam's means of the gradients after a first step on this candidate."""
    tried = unlearner(method, candidate, seed)
    tried.step()
    state = tried.optimizer.state
    return {name: state[parameter]["exp_avg"] for name, parameter in tried.model.named_parameters()}
