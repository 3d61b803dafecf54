"""Every random number of a step: given by the caller, from a torch generator, or counter-based
(Philox4x32-10).

A counter-based draw is a pure function of (seed, step, purpose, position in the global batch, element): a run
can be restarted at any step, does not depend on the number of processes, and gives every row its own noise
even where the forget set is one image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from enum import IntEnum

import torch
from torch import Tensor

from ..host import check, philox
from ..host.philox import Noise
from ..host.store import Rows
from .schedule import NoiseSchedule


@dataclass(frozen=True)
class Draws:
    """The random numbers of one step; what is None is drawn.

    Forget and retain branch have their own noise and timesteps (as in ReTrack's code). SISS makes one noisy
    image of a pair: row by row with those of the branch that `from_forget` picks, so that the other's go
    unused there.
    """

    forget_noise: Tensor | Noise | None = None  # [B, C, H, W]
    retain_noise: Tensor | Noise | None = None  # [B, C, H, W]
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
    FORGET_POSTERIOR = 8
    RETAIN_POSTERIOR = 9


class GeneratorSource:
    """Numbers from a torch generator (None: torch's global one), in the order in which they are asked for."""

    def __init__(self, device: torch.device, generator: torch.Generator | None):
        if generator is not None and generator.device.type != device.type:
            raise ValueError(
                f"generator: expected a generator on the device of the images, {device}, got one on {generator.device}"
            )
        self.device, self.generator = device, generator

    def noise(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, count: int, high: int, purpose: Purpose) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


class CounterSource:
    """Numbers that are a function of `counter`: int64 `[3]`, seed, step, and the position of row 0 in the
    global batch; see `philox.py`.
    """

    def __init__(self, counter: Tensor):
        self.counter = counter

    def noise(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Noise:
        """Not numbers yet: the op that reads the noise makes it."""
        return Noise(self.counter, purpose, tuple(shape))

    def uniform(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return philox.uniform(shape, self.counter, purpose).to(dtype)

    def integers(self, count: int, high: int, purpose: Purpose) -> Tensor:
        return philox.integers(count, high, self.counter, purpose)


def rows_of_step(count: int, high: int, seed: int, first_row: int, purpose: Purpose, step: int) -> Tensor:
    """Rows `[count]` in [0, high) that `CounterSource.integers` draws at `step`, on the CPU and ahead of it.

    Raises:
        ValueError: a step that the counter does not tell from an earlier one.
    """
    check.integer("step", step, low=0, high=philox.STEPS - 1)
    return philox.integers(count, high, torch.tensor([seed, step, first_row]), purpose)


def complete(
    draws: Draws,
    method,
    source: GeneratorSource | CounterSource,
    forget: Tensor | Rows | None,
    retain: Tensor | Rows | None,
    num_timesteps: int,
) -> Draws:
    """`draws` with every number that `method` needs: noise in the shape and dtype of the batches `[B, C, H,
    W]`, timesteps uniform over the schedule.

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
                drawn[name] = source.noise(batch.shape, Purpose[name.upper()], batch.dtype)
    if "from_forget" in method.draws and draws.from_forget is None:
        uniform = source.uniform((len(forget),), Purpose.FROM_FORGET)
        # 0 is drawn once in 2^24
        drawn["from_forget"] = (uniform <= method.forget_probability) & (method.forget_probability > 0)
    if "uniform_target" in method.draws and draws.uniform_target is None:
        drawn["uniform_target"] = source.uniform(forget.shape, Purpose.UNIFORM_TARGET, forget.dtype)
    return replace(draws, **drawn)


def without_timesteps(draws: Draws, wanted: Tensor) -> Draws:
    """`draws` whose step is skipped where `wanted` (0-d bool, on the device): its timesteps are nowhere."""
    nowhere = {}
    for name in ("forget_timesteps", "retain_timesteps"):
        timesteps = getattr(draws, name)
        if timesteps is not None:
            nowhere[name] = torch.where(wanted, -1, timesteps.long())
    return replace(draws, **nowhere)


def validate(
    draws: Draws,
    needs: frozenset[str],
    forget: Tensor | Rows | None,
    retain: Tensor | Rows | None,
    schedule: NoiseSchedule,
) -> None:
    """Refuses what a caller gave in another shape than its batch, and what the method does not use.

    Timesteps that `schedule` cannot train at are refused where they can be read; elsewhere their step is not
    finite, and skipped.
    """
    unused = draws.given() - needs
    if unused:
        raise ValueError(
            f"draws: expected only {', '.join(sorted(needs))} for this method, got {', '.join(sorted(unused))} too"
        )
    for branch, batch in (("forget", forget), ("retain", retain)):
        noise, timesteps = getattr(draws, f"{branch}_noise"), getattr(draws, f"{branch}_timesteps")
        if isinstance(noise, Noise):
            check.same_shape(f"draws.{branch}_noise", noise, branch, batch)
        elif noise is not None:
            check.like(f"draws.{branch}_noise", noise, branch, batch)
            if noise.dtype != batch.dtype:
                raise TypeError(
                    f"draws.{branch}_noise: expected the dtype of {branch}, {batch.dtype}, got {noise.dtype}"
                )
        if timesteps is not None:
            name = f"draws.{branch}_timesteps"
            check.vector(name, timesteps, len(batch), batch.device, floating=False)
            if check.readable(timesteps):
                schedule.check_timesteps(name, timesteps)
    if draws.uniform_target is not None:
        check.like("draws.uniform_target", draws.uniform_target, "forget", forget)
    chosen = draws.from_forget
    if chosen is not None and (
        not isinstance(chosen, Tensor) or chosen.dtype != torch.bool or chosen.shape != forget.shape[:1]
    ):
        raise ValueError(
            f"draws.from_forget: expected bool of shape ({len(forget)},), got {check.describe(chosen)}"
        )
