"""Numbers of a step that leave the device together: in one buffer, so that one copy takes them all."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Packed(NamedTuple):
    """0-d tensors of any dtypes, side by side in one buffer."""

    buffer: Tensor  # uint8: their bytes, wide ones first, so that each is aligned
    fields: dict[str, tuple[torch.dtype, int]]  # dtype and first byte, in the order that they were given

    @classmethod
    def of(cls, values: Mapping[str, Tensor]) -> Packed:
        """`values`, copied; all on one device."""
        # Wide ones first: then each begins at a multiple of its own size.
        wide_first = sorted(values, key=lambda name: -values[name].itemsize)
        starts, end = {}, 0
        for name in wide_first:
            starts[name], end = end, end + values[name].itemsize
        buffer = torch.cat([values[name].detach().reshape(1).view(torch.uint8) for name in wide_first])
        return cls(buffer, {name: (value.dtype, starts[name]) for name, value in values.items()})

    def unpacked(self) -> dict[str, Tensor]:
        """The tensors, copied: they stay when the buffer changes."""
        copy = self.buffer.clone()
        return {
            name: copy[start : start + dtype.itemsize].view(dtype)[0]
            for name, (dtype, start) in self.fields.items()
        }


class Arriving:
    """Numbers on their way to the host: one copy into pinned memory, queued behind the work that makes them.

    Args:
        values: 0-d tensors, all on one device; numbers that the host knows pass through.

    Attributes:
        since: when they were there, by `time.perf_counter`: on a CPU at once, else as soon as they were read.
    """

    def __init__(self, values: Mapping[str, Tensor | float]):
        self._values = dict(values)
        tensors = {name: value for name, value in values.items() if isinstance(value, Tensor)}
        self._packed = Packed.of(tensors)
        self._copied: torch.cuda.Event | None = None
        buffer = self._packed.buffer
        if buffer.is_cuda:
            host = torch.empty(buffer.shape, dtype=buffer.dtype, pin_memory=True)
            self._packed = self._packed._replace(buffer=host.copy_(buffer, non_blocking=True))
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(buffer.device))
        self.since = time.perf_counter()

    def read(self) -> dict[str, float]:
        """The numbers, in the order given.

        Waits for the work that was queued before the copy, and for none that was queued since.
        """
        if self._copied is not None:
            self._copied.synchronize()
            self._copied, self.since = None, time.perf_counter()
        numbers = {name: value.item() for name, value in self._packed.unpacked().items()}
        return self._values | numbers
