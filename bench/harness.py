"""Contestants take turns within one process, so that a busy machine slows all of them alike; what counts is
the ratio of their medians.

Every call starts with cold caches, unless `--warm` asks for warm ones: between two calls a buffer of at least
twice the last-level cache is overwritten, which evicts code as well as data, as a network between two steps
does. A copy of 1 GiB takes part in every comparison: its bandwidth is the yardstick for the bytes that a
kernel moves.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from fastunlearn.ops import _backends
from fastunlearn.step import compilation
from fastunlearn.testing.accelerator import DRY, Accelerator

COPY_BYTES = 1 << 30
Call = Callable[[], object]

_CPU_CACHE = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
_LAUNCHES = 2 if DRY else 20  # in a graph
_LEAST_WAIT = 50e-6  # seconds of the device before a timed call


class Yardstick:
    """A copy of `size` bytes, and the memory with which caches are flushed.

    Args:
        accelerator: where the calls run; None: on the CPU.
        warm: nothing is flushed.
    """

    def __init__(self, accelerator: Accelerator | None, size: int = COPY_BYTES, *, warm: bool = False):
        self.accelerator, self.size, self.warm = accelerator, size, warm
        self.device = torch.device("cpu") if accelerator is None else accelerator.device
        self._source = torch.ones(size // 4, device=self.device)
        self._target = torch.zeros_like(self._source).fill_(2)  # written, so that the pages exist
        self._flushed = self._target[: 2 * self._cache() // 4]

    def copy(self) -> None:
        self._target.copy_(self._source)

    def flush(self) -> None:
        if not self.warm:
            self._flushed.zero_()

    def bandwidth(self, seconds: float) -> float:
        """Bytes/s, reads and writes, of a copy that took `seconds`."""
        return 2 * self.size / seconds

    def _cache(self) -> int:
        """Bytes of the last-level cache."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_properties(self.device).L2_cache_size
        return last_level_cache()


def last_level_cache() -> int:
    """Bytes of the CPU's last-level cache; 64 MiB where the system does not tell."""
    with contextlib.suppress(OSError, ValueError):
        return int(_CPU_CACHE.read_text().strip().removesuffix("K")) << 10
    return 64 << 20


def alternate(
    calls: dict[str, Call], yardstick: Yardstick, seconds: float, least: int
) -> dict[str, list[float]]:
    """The seconds of each call, in rounds in which every call has one turn: about `seconds` in all, but
    `least` rounds at least.

    Whoever starts a round ends the next one, so that no call always follows the same one.
    """
    clock = (
        HostClock(yardstick)
        if yardstick.accelerator is None
        else _DeviceClock(yardstick, yardstick.accelerator)
    )
    clock(calls)  # warm-up: pages, plans
    return take_turns(calls, clock, seconds, least)


def take_turns(
    calls: dict[str, Callable[..., object]],
    clock: Callable[[dict[str, Callable[..., object]]], dict[str, float]],
    seconds: float,
    least: int,
    most: int = 100,
) -> dict[str, list[float]]:
    """As `alternate`, without a warm-up, and with a `clock` that times one round: calls by name, in order, to
    seconds by name.
    """
    started, rounds = time.perf_counter(), clock(calls)
    count = min(most, max(least, int(seconds / (time.perf_counter() - started))))
    samples = {name: [rounds[name]] for name in calls}
    names = list(calls)
    for _ in range(count - 1):
        names = names[1:] + names[:1]
        for name, value in clock({name: calls[name] for name in names}).items():
            samples[name].append(value)
    return samples


class HostClock:
    """Times calls on a CPU.

    Args:
        now: the seconds of what counts: those of the wall, or of the calling thread.
    """

    def __init__(self, yardstick: Yardstick, now: Callable[[], float] = time.perf_counter):
        self.yardstick, self.now = yardstick, now

    def __call__(self, calls: dict[str, Call]) -> dict[str, float]:
        taken = {}
        for name, call in calls.items():
            self.yardstick.flush()
            started = self.now()
            result = call()
            taken[name] = self.now() - started
            del result  # freeing the outputs is not timed
        return taken


class _DeviceClock:
    """Times calls by events on the device.

    The device waits before the first event until Python has queued the whole call behind it, so that what is
    timed is the work of the device and never the host's pace.
    """

    def __init__(self, yardstick: Yardstick, accelerator: Accelerator):
        self.yardstick, self.accelerator = yardstick, accelerator
        self._host: dict[str, float] = {}  # seconds that a call occupies the host

    def __call__(self, calls: dict[str, Call]) -> dict[str, float]:
        events = {}
        for name, call in calls.items():
            wait = _LEAST_WAIT + 2 * self._host_seconds(name, call)
            start, end = self.accelerator.event(), self.accelerator.event()
            self.yardstick.flush()
            self.accelerator.wait(wait)
            start.record()
            call()
            end.record()
            events[name] = start, end
        self.accelerator.synchronize()
        return {name: start.elapsed_time(end) / 1000 for name, (start, end) in events.items()}

    def _host_seconds(self, name: str, call: Call) -> float:
        """Measured at the first turn, on a call of its own."""
        if name not in self._host:
            call()
            self.accelerator.synchronize()
            started = time.perf_counter()
            call()
            self._host[name] = time.perf_counter() - started
        return self._host[name]


def launch_seconds(call: Call, accelerator: Accelerator) -> float:
    """Of one call out of many in a graph: caches are warm and Python is not in the way, so this is the launch
    and the arithmetic.
    """
    graphs = accelerator.graphs()
    graphs.warm_up(call)

    def many() -> None:
        for _ in range(_LAUNCHES):
            call()

    replay = graphs.capture(many)
    samples = []
    for _ in range(10):
        start, end = accelerator.event(), accelerator.event()
        accelerator.wait(_LEAST_WAIT)
        start.record()
        replay()
        end.record()
        accelerator.synchronize()
        samples.append(start.elapsed_time(end) / 1000 / _LAUNCHES)
    return statistics.median(samples)


# --- backends
# -----------------------------------------------------------------------------


def kernel_name(op: str, device: torch.device) -> str:
    """What runs `op` on `device`: "C++", "CUDA", "CuPy" or "Triton".

    Raises:
        LookupError: nothing but plain torch; the message says why.
    """
    try:
        kernel = _backends.find_kernel(op, device, (), required=True)
    except RuntimeError as error:
        raise LookupError(str(error)) from None
    if not isinstance(kernel, torch._ops.OpOverload):
        return "CuPy" if "cupy" in kernel.__module__ else "Triton"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(f"fastunlearn_native::{op}", device.type.upper()):
        raise LookupError(f"the extension that is built has no {op} for {device.type}")
    return "C++" if device.type == "cpu" else "CUDA"


def filling(op: str, module: ModuleType, arguments: tuple) -> Callable[[], tuple[Tensor, ...]]:
    """The kernel of `op` (defined in `module`) alone: into outputs that exist already, as in a CUDA graph,
    without the dispatcher.
    """
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    kernel, outputs = _backends.find_kernel(op, device, arguments, required=True), module._empty(*arguments)
    prepared = module._prepare(arguments, outputs)

    def fill() -> tuple[Tensor, ...]:
        kernel(*prepared, *outputs)
        return outputs

    return fill


def compiled(
    function: Callable[..., tuple[Tensor, ...]],
) -> tuple[Callable[..., tuple[Tensor, ...]], dict[str, float]]:
    """`function` under torch.compile in one graph, and a dict that gets the `seconds` of its first call."""
    torch.compiler.reset()  # the shapes of earlier comparisons count towards dynamo's limit of recompilations
    inner, took = torch.compile(function, fullgraph=True, dynamic=False, backend=compilation.BACKEND), {}

    def call(*args):
        if took:
            return inner(*args)
        started = time.perf_counter()
        result = inner(*args)
        took["seconds"] = time.perf_counter() - started
        return result

    return call, took
