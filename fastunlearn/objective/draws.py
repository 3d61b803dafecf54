"""Every random number of a step: given by the caller, from a torch generator, or counter-based.

A counter-based (Philox4x32-10) draw is a pure function of (seed, step, purpose, position in the global batch,
element): a run can be restarted at any step, does not depend on the number of processes, and gives every row
its own noise even where the forget set is one image.
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
from . import time
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
    # [B]: SISS' `log p_forget(t) - log p_retain(t)` at the timestep of each row, where the densities of both
    # branches differ. Computed from those of the step, not drawn.
    time_log_ratio: Tensor | None = None

    def given(self) -> set[str]:
        return {field.name for field in fields(self) if getattr(self, field.name) is not None}


MIXED = ("from_forget", "forget_timesteps", "retain_timesteps")  # what a ratio of a mixture is made of
DRAWN = tuple(field.name for field in fields(Draws) if not field.name.endswith("_rows"))


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


@dataclass(frozen=True)
class Time:
    """Timesteps `[B]` of a branch, from a density over the schedule.

    Without one it is that of the step, which fills it in (`Selection.draws_of`); uniform where nobody does.
    """

    branch: str  # "forget" or "retain"
    density: time.Density | None = None

    def draw(self, source, purpose: Purpose, batch: Tensor | Rows, num_timesteps: int) -> Tensor:
        density = time.UNIFORM if self.density is None else self.density
        return density.draw(source, purpose, len(batch), num_timesteps)


@dataclass(frozen=True)
class Normal:
    """Standard normal noise in the shape and dtype of a branch's images."""

    branch: str

    def draw(self, source, purpose: Purpose, batch: Tensor | Rows, num_timesteps: int) -> Tensor | Noise:
        return source.noise(batch.shape, purpose, batch.dtype)


@dataclass(frozen=True)
class Uniform:
    """Numbers in [0, 1) in the shape and dtype of a branch's images."""

    branch: str

    def draw(self, source, purpose: Purpose, batch: Tensor | Rows, num_timesteps: int) -> Tensor:
        return source.uniform(batch.shape, purpose, batch.dtype)


@dataclass(frozen=True)
class Bernoulli:
    """True with a probability: bool `[B]` for the rows of a branch."""

    branch: str
    probability: float

    def draw(self, source, purpose: Purpose, batch: Tensor | Rows, num_timesteps: int) -> Tensor:
        # 0 is drawn once in 2^24, and must not count as a hit where nothing is wanted.
        return (source.uniform((len(batch),), purpose) <= self.probability) & (self.probability > 0)


@dataclass(frozen=True)
class Same:
    """What another field of `Draws` has: one noise, one timestep for a pair. Given for one, it is both's."""

    name: str


@dataclass(frozen=True)
class TimeLogRatio:
    """`log p_forget(t) - log p_retain(t)` of the timestep that each row of a mixture has, float64 `[B]`.

    Row by row that of the branch which `from_forget` picks. Nothing is drawn. The densities are filled in by
    the step where they differ; without them there is no ratio.
    """

    forget: time.Density | None = None
    retain: time.Density | None = None

    def of(self, known: dict[str, Tensor | Noise | None], num_timesteps: int) -> Tensor | None:
        """The ratio, from what else has been drawn."""
        if self.forget is None or self.retain is None:
            return None
        timesteps = torch.where(known["from_forget"], known["forget_timesteps"], known["retain_timesteps"])
        ratio = time.log_ratio_of(timesteps, self.forget, self.retain, num_timesteps)
        # Given ones: elsewhere than on a CPU their step is not finite, and skipped.
        if ratio is not None and check.readable(ratio) and ratio.isnan().any():
            never = int(timesteps[ratio.isnan()][0])
            expected = f"expected timesteps that a branch draws ({self.forget}, {self.retain})"
            raise ValueError(f"draws: {expected}, got t = {never}")
        return ratio


Draw = Time | Normal | Uniform | Bernoulli | Same | TimeLogRatio

# What most methods draw for a branch. The order is that of the numbers that a generator gives.
FORGET: dict[str, Draw] = {"forget_timesteps": Time("forget"), "forget_noise": Normal("forget")}
RETAIN: dict[str, Draw] = {"retain_timesteps": Time("retain"), "retain_noise": Normal("retain")}
# One noise and one timestep for a pair of images.
PAIR = FORGET | {"retain_timesteps": Same("forget_timesteps"), "retain_noise": Same("forget_noise")}


class GeneratorSource:
    """Numbers from a torch generator (None: torch's global one), in the order in which they are asked for."""

    def __init__(self, device: torch.device, generator: torch.Generator | None):
        if generator is not None and generator.device.type != device.type:
            raise ValueError(
                f"generator: expected a generator on the device of the images, {device}, "
                f"got one on {generator.device}"
            )
        self.device, self.generator = device, generator

    def noise(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device, dtype=dtype)

    def uniform(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device, dtype=dtype)

    def integers(self, count: int, high: int, purpose: Purpose) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)

    def fractions(self, count: int, purpose: Purpose) -> Tensor:
        """Int64 `[count]`, uniform in [0, 2^53)."""
        return self.integers(count, 2**philox.FRACTION_BITS, purpose)

    def strata(self, count: int, purpose: Purpose) -> tuple[Tensor, int]:
        """A stratum for each row, in random order, `[count]` int64, and how many there are: one for each row.

        They are those of this process: generators of several ones agree on nothing.
        """
        return torch.argsort(self.fractions(count, purpose), stable=True), count


class CounterSource:
    """Numbers that are a function of `counter`.

    It is int64 `[3]`: seed, step, and the position of row 0 in the global batch; see `philox.py`.

    Args:
        rank, num_processes: which part of the global batch this process has, and of how many equal parts.
    """

    def __init__(self, counter: Tensor, rank: int = 0, num_processes: int = 1):
        self.counter, self.rank, self.num_processes = counter, rank, num_processes

    def noise(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Noise:
        """Not numbers yet: the op that reads the noise makes it."""
        return Noise(self.counter, purpose, tuple(shape))

    def uniform(self, shape: Sequence[int], purpose: Purpose, dtype: torch.dtype = torch.float32) -> Tensor:
        return philox.uniform(shape, self.counter, purpose).to(dtype)

    def integers(self, count: int, high: int, purpose: Purpose) -> Tensor:
        return philox.integers(count, high, self.counter, purpose)

    def fractions(self, count: int, purpose: Purpose) -> Tensor:
        """Int64 `[count]`, uniform in [0, 2^53)."""
        return philox.fractions(count, self.counter, purpose)

    def strata(self, count: int, purpose: Purpose) -> tuple[Tensor, int]:
        """A stratum for each row, in random order, `[count]` int64, and how many there are.

        There is one for each row of the global batch. All processes know one order, and take their parts.
        """
        total = count * self.num_processes
        order = philox.permutation(total, self.counter, purpose)
        return order[self.rank * count : (self.rank + 1) * count], total


def rows_of_step(count: int, high: int, seed: int, first_row: int, purpose: Purpose, step: int) -> Tensor:
    """Rows `[count]` in [0, high) that `CounterSource.integers` draws at `step`, on the CPU and ahead of it.

    Raises:
        ValueError: a step that the counter does not tell from an earlier one.
    """
    check.integer("step", step, low=0, high=philox.STEPS - 1)
    return philox.integers(count, high, torch.tensor([seed, step, first_row]), purpose)


def complete(
    draws: Draws,
    wanted: dict[str, Draw],
    source: GeneratorSource | CounterSource,
    forget: Tensor | Rows | None,
    retain: Tensor | Rows | None,
    num_timesteps: int,
) -> Draws:
    """`draws` with every number that is `wanted`, drawn in that order.

    Noise has the shape and dtype of the batches `[B, C, H, W]`; timesteps are indices of the schedule.
    """
    batches = {"forget": forget, "retain": retain}
    known = {name: getattr(draws, name) for name in wanted}
    twins = {how.name: name for name, how in wanted.items() if type(how) is Same}
    for name, how in wanted.items():
        if known[name] is not None:
            continue
        # Where two are the same, the one that is given or drawn serves the other.
        twin = how.name if type(how) is Same else twins.get(name)
        if twin is not None and known[twin] is not None:
            known[name] = known[twin]
        elif not isinstance(how, Same | TimeLogRatio):
            known[name] = how.draw(source, Purpose[name.upper()], batches[how.branch], num_timesteps)
    for name, how in wanted.items():
        if known[name] is None and isinstance(how, Same):  # as what stood after it
            known[name] = known[how.name]
    # What is computed from the numbers, now that they are there.
    for name, how in wanted.items():
        if known[name] is None and isinstance(how, TimeLogRatio):
            known[name] = how.of(known, num_timesteps)
    return replace(draws, **known)


def _check_wanted(wanted: dict[str, Draw], batches: dict[str, Tensor | Rows | None]) -> None:
    """
    Raises:
        ValueError: a method draws what there is no field for, or for a branch that it does not read.
    """
    for name, how in wanted.items():
        if name not in DRAWN:
            raise ValueError(f"Method.draws: expected fields of Draws, got {name!r}")
        if isinstance(how, Same):
            other = wanted.get(how.name)
            if other is None or isinstance(other, Same):
                expected = f"for {name!r} the same as another field that is drawn"
                raise ValueError(f"Method.draws: expected {expected}, got Same({how.name!r})")
        elif isinstance(how, TimeLogRatio):
            missing = [each for each in MIXED if each not in wanted]
            if missing:
                raise ValueError(
                    f"Method.draws: expected {', '.join(MIXED)} for {name!r}, got no {missing[0]}"
                )
        elif batches.get(how.branch) is None:
            expected = "numbers for branches that the method needs"
            raise ValueError(f"Method.draws: expected {expected}, got {name!r} for {how.branch!r}")


def without_timesteps(draws: Draws, wanted: Tensor) -> Draws:
    """`draws` whose step is skipped where `wanted` (0-d bool, on the device): its timesteps are nowhere."""
    # -1 is outside of every schedule: its coefficients are NaN, and so is the loss.
    nowhere = {}
    for name in ("forget_timesteps", "retain_timesteps"):
        timesteps = getattr(draws, name)
        if timesteps is not None:
            nowhere[name] = torch.where(wanted, -1, timesteps.long())
    return replace(draws, **nowhere)


def validate(
    draws: Draws,
    wanted: dict[str, Draw],
    forget: Tensor | Rows | None,
    retain: Tensor | Rows | None,
    schedule: NoiseSchedule,
) -> None:
    """Refuses what a caller gave in another shape than its batch, and what the method does not use.

    Timesteps that `schedule` cannot train at are refused where they can be read; elsewhere their step is not
    finite, and skipped.
    """
    _check_wanted(wanted, {"forget": forget, "retain": retain})
    unused = draws.given() - wanted.keys()
    if unused:
        raise ValueError(
            f"draws: expected only {', '.join(sorted(wanted))} for this method, "
            f"got {', '.join(sorted(unused))} too"
        )
    for branch, batch in (("forget", forget), ("retain", retain)):
        _check_noise(f"draws.{branch}_noise", getattr(draws, f"{branch}_noise"), branch, batch)
        timesteps = getattr(draws, f"{branch}_timesteps")
        if timesteps is not None:
            name = f"draws.{branch}_timesteps"
            check.vector(name, timesteps, len(batch), batch.device, floating=False)
            if check.readable(timesteps):
                schedule.check_timesteps(name, timesteps)
                _check_drawn(name, timesteps, wanted, len(schedule))
    if draws.uniform_target is not None:
        check.like("draws.uniform_target", draws.uniform_target, "forget", forget)
    if draws.from_forget is not None:
        _check_chosen(draws.from_forget, forget)
    if draws.time_log_ratio is not None:
        check.vector("draws.time_log_ratio", draws.time_log_ratio, len(forget), forget.device)


def _check_drawn(name: str, timesteps: Tensor, wanted: dict[str, Draw], num_timesteps: int) -> None:
    """Refuses given timesteps that their branch never draws. In a mixture a row may be the other branch's."""
    how = wanted.get(name.removeprefix("draws."))
    mixed = any(isinstance(each, Bernoulli) for each in wanted.values())
    if mixed or not isinstance(how, Time) or how.density is None or how.density == time.UNIFORM:
        return
    never = timesteps[how.density.drawn(num_timesteps)[timesteps.cpu().long()] == 0]
    if len(never):
        raise ValueError(f"{name}: expected timesteps of {how.density}, got t = {int(never[0])}")


def _check_noise(name: str, noise: Tensor | Noise | None, branch: str, batch: Tensor | Rows | None) -> None:
    if noise is None:
        return
    # Noise that is not numbers yet takes dtype and device where it is made.
    if isinstance(noise, Noise):
        check.same_shape(name, noise, branch, batch)
        return
    check.like(name, noise, branch, batch)
    if noise.dtype != batch.dtype:
        raise TypeError(f"{name}: expected the dtype of {branch}, {batch.dtype}, got {noise.dtype}")


def _check_chosen(chosen: Tensor, forget: Tensor | Rows) -> None:
    fits = isinstance(chosen, Tensor) and chosen.dtype == torch.bool
    if not fits or chosen.shape != forget.shape[:1]:
        raise ValueError(
            f"draws.from_forget: expected bool of shape ({len(forget)},), got {check.describe(chosen)}"
        )
