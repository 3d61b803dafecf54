"""Counter-based random numbers (Philox4x32-10), the same on every device.

A number is a pure function of (seed, step, purpose, row, element): key = seed; counter = (element / 4, row of
the global batch, step, purpose). The four words of a counter make four numbers, elements 4i to 4i + 3 of a
row in NCHW order. Kernels compute the same words in registers (`csrc/philox.h`, `kernels/philox.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import check

# What a counter of four 32-bit words tells apart. Beyond, a number would be one that was drawn before.
STEPS = 2**32
ROWS = 2**32  # of the global batch
ELEMENTS = 2**34  # of a row: four share a counter
LARGEST_RANGE = 2**31  # of integers: a 32-bit word times it is an int64
FRACTION_BITS = 53  # of a fraction: as many as a float64 holds
_MASK = 0xFFFFFFFF


@dataclass(frozen=True, eq=False)
class Noise:
    """Standard normal noise `[B, C, H, W]` that a kernel makes where it needs it, so that it is never stored.

    `counter` is int64 `[3]` on the device of the images: seed, step, first row (the position of row 0 in the
    global batch).
    """

    counter: Tensor
    purpose: int
    shape: tuple[int, ...]

    def numbers(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The noise as a tensor."""
        return normal(self.shape, self.counter, self.purpose).to(dtype)


def normal(shape: Sequence[int], counter: Tensor, purpose: int) -> Tensor:
    """Standard normal numbers, float32, two from each pair of words (Box-Muller)."""
    numbers = words(shape, counter, purpose)
    # sqrt(-2 log v) (cos 2 pi u, sin 2 pi u), v in (0, 1] from the first word of a pair, u in [0, 1) from the
    # second.
    radius = torch.sqrt(-2 * torch.log(unit(numbers[..., 0::2]) + 2**-24))
    angle = (2 * math.pi) * unit(numbers[..., 1::2])
    return _first(torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1), shape)


def uniform(shape: Sequence[int], counter: Tensor, purpose: int) -> Tensor:
    """Uniform numbers in [0, 1), float32 multiples of 2^-24."""
    return _first(unit(words(shape, counter, purpose)), shape)


def integers(count: int, high: int, counter: Tensor, purpose: int) -> Tensor:
    """Uniform int64 `[count]` in [0, high) (bias below high / 2^32).

    Raises:
        TypeError, ValueError: `high` is no integer in [1, 2^31].
    """
    check.integer("high", high, low=1, high=LARGEST_RANGE, of="they are made of 32 random bits")
    # The upper 32 bits of word * high: the word as a fraction of 2^32, times high.
    return (words((count,), counter, purpose)[:, 0, 0] * high) >> 32


def fractions(count: int, counter: Tensor, purpose: int) -> Tensor:
    """Uniform int64 `[count]` in [0, 2^53): the numerators of fractions of 2^53, each equally likely."""
    return _numerator(words((count,), counter, purpose)[:, 0, 0:2])


def permutation(count: int, counter: Tensor, purpose: int) -> Tensor:
    """A random order of `count` things, int64 `[count]`: a function of seed, step and purpose alone.

    The first row of `counter` does not count, so that all processes know one order. It shares no bit with the
    `fractions` of the same purpose.
    """
    of_all = torch.cat([counter[:2], torch.zeros_like(counter[2:])])
    keys = _numerator(words((count,), of_all, purpose)[:, 0, 2:4])
    # Two keys are equal once in 2^53; stable, so that this is the same order on every device.
    return torch.argsort(keys, stable=True)


def _numerator(pairs: Tensor) -> Tensor:
    """53 bits of each pair of 32-bit words `[count, 2]`: all of the first, the upper 21 of the second."""
    return (pairs[:, 0] << 21) | (pairs[:, 1] >> 11)


def words(shape: Sequence[int], counter: Tensor, purpose: int) -> Tensor:
    """`[rows, ceil(elements of a row / 4), 4]` 32-bit words, as int64.

    `counter`: int64 `[3]`, seed, step, first row.

    Raises:
        ValueError: more rows, or elements of a row, than a counter tells apart.
    """
    rows, elements = shape[0], math.prod(shape[1:])
    _check_extent(rows, elements)
    seed, step, first_row = counter.long().unbind()
    # Four words for each quad of elements: the counter is (quad, row, step, purpose).
    quads = torch.arange(-(-elements // 4), device=counter.device).view(1, -1)
    row = (first_row + torch.arange(rows, device=counter.device)).view(-1, 1) & _MASK
    zero = torch.zeros_like(row * quads)
    counters = zero + quads, zero + row, zero + (step & _MASK), zero + int(purpose)
    return torch.stack(philox(counters, seed), dim=-1)


def check_noise(name: str, noise: Noise) -> None:
    """Refuses noise whose counter repeats itself; the counter is read where a check may read it.

    Raises:
        ValueError: naming `name`, for a step or a row outside 32 bits, or too many elements.
    """
    rows, elements = noise.shape[0], math.prod(noise.shape[1:])
    _check_extent(rows, elements)
    if check.readable(noise.counter):
        _, step, first_row = noise.counter.tolist()
        check.integer(f"{name}.counter[1]", step, low=0, high=STEPS - 1, of="the step")
        check.integer(f"{name}.counter[2]", first_row, low=0, high=ROWS - rows, of="the first of its rows")


def _check_extent(rows: int, elements: int) -> None:
    if rows > ROWS or elements > ELEMENTS:
        expected = "at most 2^32 rows of 2^34 random numbers"
        raise ValueError(f"shape: expected {expected}, got {rows} of {elements}")


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor | int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for a counter of four and a 64-bit key.

    Words are int64 tensors.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = seed & _MASK, (seed >> 32) & _MASK
    for _ in range(10):
        # An int64 product wraps modulo 2^64; the mask takes the sign bits off the shifted half, so that both
        # halves are exact.
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (product1 >> 32 & _MASK) ^ c1 ^ k0,
            product1 & _MASK,
            (product0 >> 32 & _MASK) ^ c3 ^ k1,
            product0 & _MASK,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK, (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def unit(numbers: Tensor) -> Tensor:
    """The upper 24 bits of 32-bit words as float32 in [0, 1)."""
    return (numbers >> 8).float() * 2**-24


def _first(numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """The first elements of every row, in the shape asked for: a row's last quad may hold some too many."""
    return numbers.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)
