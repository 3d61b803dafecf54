"""What a step spends its time on, from an eager profile: ranges stand outside compiled regions and graphs."""

from __future__ import annotations

import os

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from fastunlearn.host import profiling
from fastunlearn.testing.accelerator import Accelerator

from .networks import Step

STAGES = ("draw", "compose", "predict", "residual", "combine", "update")
_PREFIX, _WHOLE = "fastunlearn::", "bench::step"


def shares(step: Step, accelerator: Accelerator | None) -> dict[str, float]:
    """Stage -> share of the time of one call of `step`; `"between"` is what no stage covers.

    On a GPU, of the time of the kernels that it launches.

    The spans are those that the package records under its profiler's switch. Backward passes count to the
    stage that starts them.
    """
    profiling.enable(nvtx=False)
    try:
        step()  # what the ranges set up at their first use is not part of it
        # Backward passes on the calling thread, so that the profiler sees whose kernels they launch.
        with torch.autograd.set_multithreading_enabled(False):
            recorded = _profiled(step, accelerator)
    finally:
        profiling.enable(os.environ.get("FASTUNLEARN_NVTX", "0") not in ("", "0"))
    on_device = accelerator is not None and accelerator.device.type == "cuda"
    seconds = span_times(recorded.key_averages(), "device_time_total" if on_device else "cpu_time_total")
    found = {name: seconds.get(_PREFIX + name, 0.0) / seconds[_WHOLE] for name in STAGES}
    return {**found, "between": 1 - sum(found.values())}


def span_times(averages, kind: str) -> dict[str, float]:
    """Span -> `kind` of its entry in a profile.

    A profile of a GPU has every span twice. The host's entry sums up the kernels that were launched within
    it; the device's is the time from the first of them to the last, gaps included.
    """
    on_host = (event for event in averages if event.device_type == torch.autograd.DeviceType.CPU)
    # not the ops of the same names
    return {event.key: getattr(event, kind) for event in on_host if event.is_user_annotation}


def launches(step: Step, accelerator: Accelerator) -> int:
    """How often one call of `step` calls the device: kernels, and graphs of them."""
    return accelerator.launches(_profiled(step, accelerator))


def _profiled(step: Step, accelerator: Accelerator | None) -> profile:
    activities = (ProfilerActivity.CPU,) if accelerator is None else accelerator.activities
    with profile(activities=activities) as recorded, record_function(_WHOLE):
        step()
        if accelerator is not None:
            accelerator.synchronize()
    return recorded
