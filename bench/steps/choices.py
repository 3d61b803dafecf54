"""What is chosen by measurement before the contestants start: the memory format of the weights, and whether
ReTrack's branches share a network call.
"""

from __future__ import annotations

import time
from contextlib import ExitStack

import torch

from fastunlearn.testing.accelerator import Accelerator

from .contestants import LIMIT, Mode, Setting, keeping
from .job import Job
from .networks import Step

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
_ROUNDS = 3  # the first is the warm-up


def by_layout(
    job: Job, accelerator: Accelerator | None, official: dict[str, str], only: str | None = None
) -> dict[str, Setting]:
    """The settings among which the layout is chosen: all, or the one that is asked for."""
    layouts = {name: layout for name, layout in LAYOUTS.items() if only in (None, name)}
    return {name: Setting(job, layout, True, accelerator, official) for name, layout in layouts.items()}


def faster_layout(settings: dict[str, Setting], mode: Mode) -> tuple[str, dict[str, float]]:
    """In which layout the method's network passes and the optimizer are faster in `mode`, and the seconds in
    each.
    """
    with ExitStack() as kept:
        for setting in settings.values():
            kept.enter_context(keeping(list(setting.models[setting.layout].parameters())))
        steps = {name: setting.build(mode.of(LIMIT)) for name, setting in settings.items()}
        seconds = _best(steps, next(iter(settings.values())).accelerator)
    return min(seconds, key=seconds.get), seconds


def faster_joined(setting: Setting) -> tuple[bool, dict[str, float]]:
    """Whether one network call of 2B rows is faster than two of B rows, and the seconds of each."""
    steps = {}
    with keeping(list(setting.models[setting.layout].parameters())):
        for name in ("joined", "apart"):
            setting.joined = name == "joined"
            steps[name] = setting.build(LIMIT)
        seconds = _best(steps, setting.accelerator)
    return seconds["joined"] <= seconds["apart"], seconds


def _best(steps: dict[str, Step], accelerator: Accelerator | None) -> dict[str, float]:
    """Seconds of each step, alternating."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(_ROUNDS):
        for name, step in steps.items():
            synchronize(accelerator)
            began = time.perf_counter()
            step()
            synchronize(accelerator)
            seconds[name].append(time.perf_counter() - began)
    return {name: min(values[1:]) for name, values in seconds.items()}


def synchronize(accelerator: Accelerator | None) -> None:
    """Waits until the work that was given to the device is done."""
    if accelerator is not None:
        accelerator.synchronize()
