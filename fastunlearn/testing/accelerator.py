"""The GPU that checks and benchmarks run on, and a stand-in for it on machines without one.

GPUs are at hand rarely, so whatever a check does there is rehearsed before: with `FASTUNLEARN_DRY=1` a CPU
stands in for the GPU. Triton's interpreter runs the kernels, tapes take the place of CUDA graphs, torch's
eager backend that of inductor, and what would wait for the device is an error where CUDA would say so. What
comes out is no measurement.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Protocol
from unittest import mock

import torch
from torch.profiler import ProfilerActivity, profile

from ..engine import replay
from ..methods import Pass
from ..objective.schedule import NoiseSchedule
from ..ops import _backends
from ..step import compilation
from .host_sync import TapeGraphs, no_host_sync

DRY = os.environ.get("FASTUNLEARN_DRY", "0") not in ("", "0")

_CYCLES = 2e9  # a second, of a GPU that runs at its fastest
# As the profiler names the calls of CUDA.
_LAUNCH = re.compile(r"cu(da)?(Launch(Cooperative)?Kernel|GraphLaunch)\w*")


class Event(Protocol):
    """A point in the device's queue."""

    def record(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds from this point to `end`."""


class Accelerator(Protocol):
    """What a check asks of the device."""

    device: torch.device
    name: str
    activities: tuple[ProfilerActivity, ...]

    def graphs(self) -> replay.Graphs:
        """Records the device's work."""

    def synchronize(self) -> None: ...

    def event(self) -> Event: ...

    def wait(self, seconds: float) -> None:
        """Makes the device wait for at least `seconds`, while the host goes on and queues work behind."""

    def busy(self) -> bool:
        """Whether the device has still work to do."""

    def waiting_raises(self) -> AbstractContextManager:
        """Within the block it is an error if the host waits for the device."""

    def allocated(self) -> int:
        """Bytes of tensors on the device."""

    def peak_of(self, call: Callable[[], object]) -> int:
        """Bytes of tensors on the device at the peak of `call`."""

    def launches(self, recorded: profile) -> int:
        """How often the host called the device in a profile: kernels, and graphs of them."""


class Cuda:
    """The current CUDA device."""

    activities = (ProfilerActivity.CPU, ProfilerActivity.CUDA)

    def __init__(self):
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.name = torch.cuda.get_device_name(self.device)

    def graphs(self) -> replay.Graphs:
        return replay.CudaGraphs(self.device)

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def event(self) -> Event:
        return torch.cuda.Event(enable_timing=True)

    def wait(self, seconds: float) -> None:
        torch.cuda._sleep(int(seconds * _CYCLES))

    def busy(self) -> bool:
        return not torch.cuda.current_stream(self.device).query()

    @contextmanager
    def waiting_raises(self) -> Iterator[None]:
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def allocated(self) -> int:
        return torch.cuda.memory_allocated(self.device)

    def peak_of(self, call: Callable[[], object]) -> int:
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    def launches(self, recorded: profile) -> int:
        return sum(event.count for event in recorded.key_averages() if _LAUNCH.fullmatch(event.key))


class StandIn:
    """A CPU in the place of a GPU. Nothing that it measures means anything."""

    activities = (ProfilerActivity.CPU,)

    def __init__(self):
        self.device = torch.device("cpu")
        self.name = "stand-in"

    def graphs(self) -> replay.Graphs:
        return TapeGraphs()

    def synchronize(self) -> None:
        pass

    def event(self) -> Event:
        return _HostEvent()

    def wait(self, seconds: float) -> None:
        pass

    def busy(self) -> bool:
        """As if it had waited: a CPU has done all when the host asks."""
        return True

    @contextmanager
    def waiting_raises(self) -> Iterator[None]:
        # What the schedule looks at lies on the host, which a CPU cannot tell from the device.
        with mock.patch.object(NoiseSchedule, "check_usable"), no_host_sync():
            yield

    def allocated(self) -> int:
        return 0

    def peak_of(self, call: Callable[[], object]) -> int:
        call()
        return 0

    def launches(self, recorded: profile) -> int:
        """Every op counts as one."""
        return sum(event.count for event in recorded.key_averages() if event.key.startswith("aten::"))


class _HostEvent:
    def __init__(self):
        self.seconds = 0.0

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1000 * (end.seconds - self.seconds)


def find_accelerator() -> Accelerator | None:
    """The GPU that torch sees; its stand-in where `FASTUNLEARN_DRY` asks for one; None: neither."""
    if DRY:
        return StandIn()
    return Cuda() if torch.cuda.is_available() else None


@contextmanager
def rehearsal() -> Iterator[None]:
    """Within the block the package takes a CPU for a GPU. Does nothing unless `FASTUNLEARN_DRY` is set."""
    with ExitStack() as patches:
        if DRY:
            for target, name, value in _replacements():
                patches.enter_context(mock.patch.object(target, name, value))
        yield


def _replacements() -> list[tuple[object, str, object]]:
    """What differs on a CPU: object, attribute, stand-in."""
    found: list[tuple[object, str, object]] = [
        (replay, "RECORDERS", {**replay.RECORDERS, "cpu": lambda device: TapeGraphs()}),
        (compilation, "BACKEND", "eager"),
        # On a CPU the step reads weights, to leave out rows that count nothing; no other device does.
        (Pass, "by_role", lambda self: [self]),
    ]
    if os.environ.get("TRITON_INTERPRET", "0") == "1":
        found.append((_backends, "find_kernel", _interpreted))
    return found


_find_kernel = _backends.find_kernel


def _interpreted(name: str, device: torch.device, args: tuple, *, required: bool) -> Callable | None:
    """`find_kernel`, which takes a CPU for a GPU where Triton has a kernel. Not under a tape, which sees only
    what torch dispatches.
    """
    if device.type != "cpu" or name not in _backends._TRITON or torch._C._len_torch_dispatch_stack():
        return _find_kernel(name, device, args, required=required)
    images = [value for value in args if isinstance(value, torch.Tensor) and value.ndim >= 4]
    if any(image.dtype == torch.float64 for image in images):
        return None
    return _backends._on_gpu(name)[0]
