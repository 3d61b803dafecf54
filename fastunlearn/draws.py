"""Every random number of a step: given by the caller, from a torch generator, or counter-based (Philox4x32-10).

A counter-based draw is a pure function of (seed, step, purpose, position in the global batch, element): a run can be restarted at any
step, does not depend on the number of processes, and gives every row its own noise even where the forget set is one image.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from . import _check


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step; what is None is drawn. Forget and retain branch have their own (as in ReTrack's code)."""

    forget_noise: Tensor | None = None  # [B, C, H, W]
    retain_noise: Tensor | None = None  # [B, C, H, W]
    forget_timesteps: Tensor | None = None  # [B] int64
    retain_timesteps: Tensor | None = None  # [B] int64
    from_forget: Tensor | None = None  # [B] bool: SISS makes x_t from the forget image
    uniform_target: Tensor | None = None  # [B, C, H, W] in [0, 1): EraseDiff's target
    forget_rows: Tensor | None = None  # [B] int64, rows of the forget store (Unlearner only)
    retain_rows: Tensor | None = None  # [B] int64, rows of the retain store (Unlearner only)

    def given(self) -> set[str]:
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}


class Purpose(IntEnum):
    """What a counter-based number is for: the last word of its counter, so that no two draws share one."""

    FORGET_ROWS = 0
    RETAIN_ROWS = 1
    FORGET_TIMESTEPS = 2
    RETAIN_TIMESTEPS = 3
    FROM_FORGET = 4
    FORGET_NOISE = 5
    RETAIN_NOISE = 6
    UNIFORM_TARGET = 7


class GeneratorSource:
    """Numbers from a torch generator (None: torch's global one), in the order in which they are asked for."""

    def __init__(self, device: torch.device, generator: torch.Generator | None):
        if generator is not None and generator.device.type != device.type:
            raise ValueError(f"generator: expected a generator on the device of the images, {device}, got one on {generator.device}")
        self.device, self.generator = device, generator

    def normal(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, count: int, high: int, purpose: Purpose) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


class CounterSource:
    """Philox4x32-10 with key = seed and counter = (element / 4, row of the global batch, step, purpose)."""

    def __init__(self, device: torch.device, seed: int, step: int):
        self.device, self.seed, self.step = device, seed, step

    def normal(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        """Standard normal numbers, two from each pair of words (Box-Muller)."""
        words = self._words(shape, purpose)
        radius = torch.sqrt(-2 * torch.log(_unit(words[..., 0::2]) + 2**-24))  # the argument lies in (0, 1]
        angle = (2 * math.pi) * _unit(words[..., 1::2])
        return self._first(torch.stack([radius * torch.cos(angle), radius * torch.sin(angle)], dim=-1), shape).to(dtype)

    def uniform(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        """Uniform numbers in [0, 1), multiples of 2^-24."""
        return self._first(_unit(self._words(shape, purpose)), shape).to(dtype)

    def integers(self, count: int, high: int, purpose: Purpose) -> Tensor:
        """Uniform int64 in [0, high), `high <= 2^31` (bias below high / 2^32)."""
        return (self._words((count,), purpose)[:, 0, 0] * high) >> 32

    def _words(self, shape: Sequence[int], purpose: Purpose) -> Tensor:
        """`[rows, ceil(elements of a row / 4), 4]` 32-bit words, as int64."""
        rows, elements = shape[0], math.prod(shape[1:])
        quads = torch.arange(-(-elements // 4), device=self.device).view(1, -1)
        row = torch.arange(rows, device=self.device).view(-1, 1)
        constant = torch.zeros_like(row * quads)
        return torch.stack(philox((constant + quads, constant + row, constant + self.step, constant + int(purpose)), self.seed), dim=-1)

    @staticmethod
    def _first(numbers: Tensor, shape: Sequence[int]) -> Tensor:
        """The first elements of every row, in the shape asked for: a row's last quad may hold more than it needs."""
        return numbers.flatten(1)[:, : math.prod(shape[1:])].reshape(shape)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32-10 (Salmon et al. 2011): four 32-bit words for a counter of four 32-bit words (int64 tensors) and a 64-bit key."""
    mask = 0xFFFFFFFF
    c0, c1, c2, c3 = counter
    k0, k1 = seed & mask, (seed >> 32) & mask
    for _ in range(10):
        product0, product1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64: both halves are still exact
        c0, c1, c2, c3 = (product1 >> 32 & mask) ^ c1 ^ k0, product1 & mask, (product0 >> 32 & mask) ^ c3 ^ k1, product0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def complete(draws: Draws, method, source: GeneratorSource | CounterSource, forget: Tensor | None, retain: Tensor | None, num_timesteps: int) -> Draws:
    """`draws` with every number that `method` needs: noise in the shape and dtype of the batches `[B, C, H, W]`, timesteps uniform over the schedule.

    Where a pair has one noise and one timestep (`method.shared_draws`), what one branch has serves the other.
    """
    drawn: dict[str, Tensor] = {}
    for branch, batch, twin in (("forget", forget, "retain"), ("retain", retain, "forget")):
        for what in ("timesteps", "noise"):
            name, known = f"{branch}_{what}", drawn.get(f"{twin}_{what}", getattr(draws, f"{twin}_{what}"))
            if name not in method.draws or getattr(draws, name) is not None:
                continue
            if method.shared_draws and known is not None:
                drawn[name] = known
            elif what == "timesteps":
                drawn[name] = source.integers(len(batch), num_timesteps, Purpose[name.upper()])
            else:
                drawn[name] = source.normal(batch.shape, Purpose[name.upper()], batch.dtype)
    if "from_forget" in method.draws and draws.from_forget is None:
        uniform = source.uniform((len(forget),), Purpose.FROM_FORGET)
        drawn["from_forget"] = (uniform <= method.forget_probability) & (method.forget_probability > 0)  # 0 is drawn once in 2^24
    if "uniform_target" in method.draws and draws.uniform_target is None:
        drawn["uniform_target"] = source.uniform(forget.shape, Purpose.UNIFORM_TARGET, forget.dtype)
    return replace(draws, **drawn)


def validate(draws: Draws, needs: frozenset[str], forget: Tensor | None, retain: Tensor | None) -> None:
    """Refuses what a caller gave in another shape than its batch, and what the method does not use."""
    unused = draws.given() - needs
    if unused:
        raise ValueError(f"draws: expected only {', '.join(sorted(needs))} for this method, got {', '.join(sorted(unused))} too")
    for branch, batch in (("forget", forget), ("retain", retain)):
        noise, timesteps = getattr(draws, f"{branch}_noise"), getattr(draws, f"{branch}_timesteps")
        if noise is not None:
            _check.like(f"draws.{branch}_noise", noise, branch, batch)
            if noise.dtype != batch.dtype:
                raise TypeError(f"draws.{branch}_noise: expected the dtype of {branch}, {batch.dtype}, got {noise.dtype}")
        if timesteps is not None:
            _check.vector(f"draws.{branch}_timesteps", timesteps, len(batch), batch.device, floating=False)
    if draws.uniform_target is not None:
        _check.like("draws.uniform_target", draws.uniform_target, "forget", forget)
    chosen = draws.from_forget
    if chosen is not None and (not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != forget.shape[:1]):
        raise ValueError(f"draws.from_forget: expected bool of shape ({len(forget)},), got {_check.describe(chosen)}")


def _unit(words: Tensor) -> Tensor:
    """The upper 24 bits of 32-bit words as float32 in [0, 1)."""
    return (words >> 8).float() * 2**-24
