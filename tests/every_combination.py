"""What the processes of test_every_combination.py do, and the one that they are compared with: steps of an
objective under a selection, and runs that are killed.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from every_objective import OBJECTIVES, make
from every_selection import BANDS, TIMES, fitting
from torch import Tensor, nn

from fastunlearn import Unlearner
from fastunlearn.runs.training import unlearn
from fastunlearn.testing.factories import TinyDenoiser

LOOKED_AT = 3  # the step of a run, in the middle of a band's way
LENGTH, SAVED_AT, KILLED_AT = 5, 2, 3  # of a run that is killed before it takes its step 3


def selection_of(objective: str, time: str, band: str) -> dict[str, Any]:
    """The selection as far as it has a meaning for the objective."""
    return fitting(OBJECTIVES[objective].method, TIMES[time] | BANDS[band])


class Taken(NamedTuple):
    gradient: list[Tensor]  # what the trained weights moved by, over the learning rate
    report: dict[str, float]


def take(
    objective: str,
    time: str,
    band: str,
    *,
    together: bool = False,
    model: nn.Module | None = None,
    **options: Any,
) -> Taken:
    """A step by gradient descent, as if the run had come that far.

    Args:
        together: by all processes of a team.
    """
    model = TinyDenoiser() if model is None else model
    trained = [own for own in model.parameters() if own.requires_grad]
    # So large a rate leaves nothing of the weights in what they are after a step. (Inner steps would lead out
    # of the numbers; their gradients are large by themselves.)
    rate = 2.0**-10 if OBJECTIVES[objective].method.inner_steps else 2.0**10
    optimizer = torch.optim.SGD(trained, lr=rate, fused=True)
    group = dist.group.WORLD if together else None
    options = {"max_grad_norm": None, "process_group": group} | options
    given = selection_of(objective, time, band)
    run = make(OBJECTIVES[objective], given, model=model, optimizer=optimizer, **options)
    go_to(run, LOOKED_AT)
    before = [own.detach().clone() for own in trained]
    output = run.step()
    gradient = [(start - own.detach()) / rate for start, own in zip(before, trained, strict=True)]
    return Taken(gradient, {name: float(each) for name, each in output._asdict().items() if each is not None})


def take_together(objective: str, time: str, band: str) -> Taken:
    return take(objective, time, band, together=True)


def go_to(run: Unlearner, step: int) -> None:
    run.load_state_dict({"seed": run.seed, "step_index": step, "skipped_steps": 0})


def begin_runs(objective: str, cells: list[tuple[str, str]], folder: Path) -> None:
    """Begins a run for each of `cells`, and kills all of them at their step `KILLED_AT`.

    A run starts the next one where it is to end, and the last one ends the process.
    """
    if not cells:
        os.kill(os.getpid(), signal.SIGKILL)
    (time, band), *others = cells
    run = make(OBJECTIVES[objective], selection_of(objective, time, band))
    take_step = run.step

    def step_or_end(draws=None):
        if run.step_index == KILLED_AT:
            begin_runs(objective, others, folder)
        return take_step(draws)

    run.step = step_or_end
    unlearn(run, output_dir=folder / f"{time}, {band}", **RUN)


RUN = {"num_steps": LENGTH, "checkpointing_steps": SAVED_AT, "show_progress": False}
