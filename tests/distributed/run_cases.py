"""What the processes of `test_distributed_runs.py` do: whole runs of `unlearn`."""

from __future__ import annotations

import os
import signal
import warnings
from pathlib import Path
from typing import Any

import crash
import torch
import torch.distributed as dist
from step_cases import SCHEDULE, images
from torch import Tensor, nn

from fastunlearn import ImageStore, ReTrack, Unlearner
from fastunlearn.objective.draws import Draws
from fastunlearn.runs import time_limit
from fastunlearn.runs.processes import OtherProcessFailed, Processes
from fastunlearn.runs.training import RunInterrupted, unlearn
from fastunlearn.testing.factories import Average, TinyDenoiser

STEPS = 6


class Denoiser(TinyDenoiser):
    def __init__(self, dropout: float, seed: int):
        super().__init__(seed=seed)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return super().forward(self.dropout(x_t), t)


class Watched(Unlearner):
    """Calls `before_step(rank, step)` with the number of the step that is about to be taken.

    A noise of NaN makes it fail.
    """

    before_step: Any = None

    def step(self, draws: Draws | None = None):
        found = None if self.before_step is None else self.before_step(self.rank, self.step_index + 1)
        return super().step(draws if found is None else found)


def build(
    alone: bool,
    *,
    wrapped: bool = True,
    dropout: float = 0.0,
    own_weights: bool = False,
    own_seed: bool = False,
    before_step: Any = None,
) -> Unlearner:
    rank = 0 if alone else dist.get_rank()
    torch.manual_seed(100 + rank)  # dropout: each process its own
    model: nn.Module = Denoiser(dropout, seed=rank if own_weights else 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    parts = {
        "ema": Average(model.parameters()),
        "lr_scheduler": torch.optim.lr_scheduler.LinearLR(optimizer, 0.5, 1.0, STEPS),
    }
    stores = {"forget": ImageStore(images(4, 1)), "retain": ImageStore(images(20, 2))}
    if wrapped and not alone:
        model = nn.parallel.DistributedDataParallel(model)
    group = None if alone or wrapped else dist.group.WORLD
    seed = 5 + rank if own_seed else 5
    unlearner = Watched(
        model,
        optimizer,
        SCHEDULE,
        ReTrack(k=2, lambd=0.3),
        batch_size=6,
        seed=seed,
        process_group=group,
        **stores,
        **parts,
    )
    unlearner.before_step = before_step
    if isinstance(before_step, Ruin):
        before_step.ema = unlearner.ema
    return unlearner


def run(
    alone: bool, folder: Path, num_steps: int, options: dict[str, Any], of_unlearner: dict[str, Any]
) -> dict[str, Any]:
    """A run to its end, or until a signal stops it."""
    unlearner = build(alone, **of_unlearner)
    stopped = None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            history = unlearn(
                unlearner, num_steps=num_steps, output_dir=folder, **{"show_progress": False} | options
            )
        except RunInterrupted as interrupted:
            stopped, history = (interrupted.code, interrupted.checkpoint), None
        except MemoryError:
            os._exit(7)  # as an error that nobody catches ends a process
    weights = torch.cat([parameter.detach().flatten() for parameter in unlearner.model.parameters()])
    told = [str(warning.message) for warning in caught]
    return {
        "weights": weights,
        "history": history,
        "stopped": stopped,
        "step": unlearner.step_index,
        "warnings": told,
    }


KILLED = {"checkpointing_steps": 2}  # options of the runs that are killed


def lines_of_run(folder: Path) -> int:
    """How many lines of the package a run takes in this process."""
    return crash.lines_in(lambda: run(False, folder, STEPS, KILLED, {}))


def run_killed(folder: Path, rank: int, line: int) -> None:
    """A run in which process `rank` ends itself at a line of the package."""
    if dist.get_rank() == rank:
        crash.killed_in(lambda: run(False, folder, STEPS, KILLED, {}), line)
    else:
        run(False, folder, STEPS, KILLED, {})


class SignalAt:
    """For `before_step`: process `rank` sends itself a signal in step `steps[rank]`."""

    def __init__(self, steps: dict[int, int], number: int = signal.SIGTERM):
        self.steps, self.number = steps, number

    def __call__(self, rank: int, step: int) -> None:
        if self.steps.get(rank) == step:
            os.kill(os.getpid(), self.number)


def interrupt_first() -> str:
    """A signal that raises at once in process 0, while the others wait for it: what each is told."""

    def work() -> None:
        raise RunInterrupted(signal.SIGTERM, None)

    with Processes(dist.group.WORLD) as processes:
        try:
            processes.by_first(work)
        except (RunInterrupted, OtherProcessFailed) as error:
            return f"{type(error).__name__}: {error}"


class LongStep:
    """For `before_step`: one step of one process seems to take 30 years."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def __call__(self, rank: int, step: int) -> None:
        if (rank, step) != (self.rank, self.step):
            return
        real = time_limit.process_seconds

        def late() -> float:
            time_limit.process_seconds = real
            return real() + 1e9

        time_limit.process_seconds = late


class FailAt:
    """For `before_step`: an error in one process."""

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def __call__(self, rank: int, step: int) -> None:
        if (rank, step) == (self.rank, self.step):
            raise MemoryError


class NotFinite:
    """For `before_step`: from some step on, noise of one process is NaN."""

    def __init__(self, rank: int, first: int):
        self.rank, self.first = rank, first

    def __call__(self, rank: int, step: int) -> Draws | None:
        return (
            Draws(retain_noise=torch.full((3, 1, 8, 8), float("nan")))
            if rank == self.rank and step >= self.first
            else None
        )


class Ruin:
    """For `before_step`: in one process a number of the average, which no step reads, becomes NaN."""

    ema: Any = None

    def __init__(self, rank: int, step: int):
        self.rank, self.step = rank, step

    def __call__(self, rank: int, step: int) -> None:
        if (rank, step) == (self.rank, self.step):
            self.ema.shadow_params[0].view(-1)[0] = float("nan")
