"""The Triton kernels, on the GPU where there is one, else under Triton's interpreter (`TRITON_INTERPRET=1
python -m pytest tests/triton`).

The variable decides when a kernel is decorated, so it must stand before triton is first imported: the
interpreter needs a process of its own, which tests/test_triton_interpreter.py starts. Without a GPU and
without the interpreter nothing is collected here. The interpreter takes about 10 ms a program, whatever its
tile: small batches, tiles as large as they get.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastunlearn.host import philox
from fastunlearn.testing.cuda_division import CudaDivision
from fastunlearn.testing.factories import served

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
if not INTERPRETED and not torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]

# elements on both sides of an output that a kernel must leave alone: more than a tile, and a multiple of 16
# bytes
_GUARD = 8192


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture(autouse=True)
def division_as_on_cuda():
    """Under the interpreter torch on a CPU stands for torch on CUDA, and divides by a number as that does."""
    with CudaDivision() if INTERPRETED else nullcontext():
        yield


@pytest.fixture
def output(device) -> Callable[..., Tensor]:
    """`output(*shape, dtype=..., channels_last=False)`: an output full of NaN between guards.

    A write into the guards fails the test.
    """
    buffers: list[tuple[Tensor, int]] = []

    def allocate(*shape: int, dtype: torch.dtype = torch.float32, channels_last: bool = False) -> Tensor:
        count = torch.Size(shape).numel()
        buffer = torch.full((count + 2 * _GUARD,), torch.nan, dtype=dtype, device=device)
        buffers.append((buffer, count))
        inner = buffer[_GUARD : _GUARD + count]
        if channels_last:
            batch, channels, height, width = shape
            return inner.view(batch, height, width, channels).permute(0, 3, 1, 2)
        return inner.view(shape)

    yield allocate
    for buffer, count in buffers:
        assert buffer[:_GUARD].isnan().all(), "written before the start of an output"
        assert buffer[_GUARD + count :].isnan().all(), "written past the end of an output"


@pytest.fixture
def rows(device) -> Callable[..., tuple[Tensor, Tensor]]:
    """`rows(count, shape, dtype, seed=0)`: images `[count, *shape]` as a store holds them, and what they
    stand for in float64.
    """

    def make(count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
        pixels = torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(seed))
        pixels = pixels.to(torch.uint8)
        images = pixels if dtype == torch.uint8 else served(pixels).to(dtype)
        return images.to(device), served(images).to(device, torch.float64)

    return make


class NoiseInput(NamedTuple):
    """Noise as a kernel gets it (`given` or `counter`), as plain torch has it in float32, and exactly."""

    given: Tensor | None
    counter: Tensor | None
    plain: Tensor
    truth: Tensor


@pytest.fixture
def noise(device) -> Callable[..., NoiseInput]:
    """`noise(shape, dtype, purpose)`: explicit noise in `dtype`, or Philox noise for dtype None."""

    def make(shape: tuple[int, ...], dtype: torch.dtype | None, purpose: int) -> NoiseInput:
        if dtype is not None:
            given = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
            return NoiseInput(given, None, given.float(), given.double())
        counter = torch.tensor([2**40 + 11, 3, 640], device=device)
        words = philox.unit(philox.words(shape, counter, purpose)).double()
        radius, angle = torch.sqrt(-2 * torch.log(words[..., 0::2] + 2**-24)), 2 * math.pi * words[..., 1::2]
        numbers = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
        return NoiseInput(
            None,
            counter,
            philox.normal(shape, counter, purpose),
            numbers[:, : math.prod(shape[1:])].reshape(shape),
        )

    return make


def _round_to_nearest_even() -> None:
    """Makes the interpreter round float32 to bfloat16 as GPUs do.

    Triton's own interpreter cuts the lower bits off.
    """
    import numpy as np
    import triton.language as tl
    from triton.runtime import interpreter

    convert = interpreter._convert_float

    def rounded(values, source, destination, rounding_mode):
        if (source, destination) != (tl.float32, tl.bfloat16):
            return convert(values, source, destination, rounding_mode)
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        half = np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))
        upper = ((bits + half) >> np.uint32(16)).astype(np.uint16)
        return np.where(np.isnan(values), np.uint16(0x7FC0), upper)

    interpreter._convert_float = rounded


if INTERPRETED:
    _round_to_nearest_even()
