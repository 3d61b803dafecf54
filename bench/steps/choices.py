"""What is chosen by measurement before the contestants start: the memory format of the weights, and whether ReTrack's branches share a network call."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from .job import Job
from .limit import passes

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


def faster_layout(job: Job) -> tuple[torch.memory_format, dict[str, float]]:
    """The memory format in which the method's network passes are faster on `job.device`, and the seconds in each."""
    calls, models = {}, {}
    for name, layout in LAYOUTS.items():
        models[name] = job.network.build().to(job.device, memory_format=layout)
        calls[name] = _without_gradients(models[name], passes(job, models[name], job.in_layout(layout), joined=False))
    seconds = _best_of_two(calls, job.device)
    return LAYOUTS[min(seconds, key=seconds.get)], seconds


def faster_joined(job: Job, model: nn.Module, layout: torch.memory_format) -> tuple[bool, dict[str, float]]:
    """Whether one network call of 2B rows is faster than two of B rows, and the seconds of each."""
    images = job.in_layout(layout)
    calls = {name: _without_gradients(model, passes(job, model, images, name == "joined")) for name in ("joined", "apart")}
    seconds = _best_of_two(calls, job.device)
    return seconds["joined"] <= seconds["apart"], seconds


def _without_gradients(model: nn.Module, run: Callable[[], None]) -> Callable[[], None]:
    def call() -> None:
        run()
        model.zero_grad(set_to_none=True)

    return call


def _best_of_two(calls: dict[str, Callable[[], None]], device: torch.device) -> dict[str, float]:
    """Alternating, after a warm-up."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(3):
        for name, call in calls.items():
            synchronize(device)
            began = time.perf_counter()
            call()
            synchronize(device)
            seconds[name].append(time.perf_counter() - began)
    return {name: min(values[1:]) for name, values in seconds.items()}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
