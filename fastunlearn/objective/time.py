"""From which density a branch draws its timesteps (arXiv 2510.17917, Eq. 6 and 7).

A density is a float64 table of the probabilities of all indices of a schedule. It is drawn from by inversion:
a random integer is looked up between the borders of the indices, which are integers, too. So an index of
probability 0 is never drawn, and nothing is rounded on the way.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from fractions import Fraction
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..host import check
from ..host.philox import FRACTION_BITS
from ..host.tables import on_device
from .schedule import NoiseSchedule

LARGEST_ERROR = 1e-9  # of the sum of probabilities: what float64 loses over 10^6 of them


class Density:
    """Base of the densities: frozen dataclasses, equal where their numbers are."""

    def table(self, num_timesteps: int) -> Tensor:
        """The probability of each index, float64 `[T]`; they add up to 1.

        Raises:
            TypeError, ValueError: for a schedule that is too short for the density.
        """
        raise NotImplementedError

    def drawn(self, num_timesteps: int) -> Tensor:
        """The probability with which each index is drawn, float64 `[T]`.

        It is the `table`, unless the density is a weight.
        """
        return self.table(num_timesteps)

    @property
    def weighted(self) -> bool:
        """Whether losses are multiplied by `weights`; else they are all 1."""
        return False

    def weights(self, num_timesteps: int) -> Tensor:
        """What the loss at each index is multiplied by, float64 `[T]`: `table / drawn`."""
        return torch.ones_like(self.table(num_timesteps))

    def draw(self, source, purpose: int, count: int, num_timesteps: int) -> Tensor:
        """Timesteps int64 `[count]`, made on the device of the source; nothing waits for it.

        Args:
            source: where the random numbers come from, `CounterSource` or `GeneratorSource`.
            purpose: what they are for.
        """
        return _look_up(self, source.fractions(count, purpose), 2**FRACTION_BITS, num_timesteps)

    def transfer(self, source: NoiseSchedule, target: NoiseSchedule) -> Density:
        """The density of `target` whose windows have the signal-to-noise ratios that they have in `source`.

        `Uniform` and `LogitNormal` have no bounds. They are about the indices of whatever schedule there is,
        and stay as they are.

        Raises:
            TypeError: a schedule is something else, such as its length, or nothing is known of the density.
            ValueError: a window ends beyond `source`, or `target` has no such ratios.
        """
        expected = "expected a TimeWindow, or a density made of others of this module"
        raise TypeError(f"transfer: {expected}, got {check.describe(self)}")


@dataclass(frozen=True)
class Uniform(Density):
    """Every index is equally likely."""

    def table(self, num_timesteps: int) -> Tensor:
        num_timesteps = check.integer("num_timesteps", num_timesteps, low=1)
        return torch.full((num_timesteps,), 1 / num_timesteps, dtype=torch.float64)

    def draw(self, source, purpose: int, count: int, num_timesteps: int) -> Tensor:
        return source.integers(count, num_timesteps, purpose)

    def transfer(self, source: NoiseSchedule, target: NoiseSchedule) -> Uniform:
        _check_schedules(source, target)
        return self


UNIFORM = Uniform()


@dataclass(frozen=True)
class TimeWindow(Density):
    """Indices in [start, stop), and the others less often, or never (arXiv 2510.17917, Eq. 7).

    Args:
        start: the first index of the window.
        stop: the first index after it, at most T.
        outside: the density outside of the window relative to that within: 0 leaves the others out, 1 is
            uniform.
        as_weight: indices are drawn uniformly, and the loss is multiplied by `p(t) T`. The gradient is the
            same on average, its variance higher; a pair of images may share its timestep.

    Raises:
        TypeError, ValueError: for bounds that hold no index, or a negative density.
    """

    start: int
    stop: int
    outside: float = 0.0
    as_weight: bool = False

    def __post_init__(self) -> None:
        start = check.integer("start", self.start, low=0)
        stop = check.integer("stop", self.stop, low=1)
        if start >= stop:
            raise ValueError(f"start: expected an index below stop, {stop}, got {start}")
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)
        object.__setattr__(self, "outside", check.number("outside", self.outside, low=0))
        if not isinstance(self.as_weight, bool):
            raise TypeError(f"as_weight: expected a bool, got {check.describe(self.as_weight)}")

    @classmethod
    def middle(cls, of: NoiseSchedule | int = 1000, **options) -> TimeWindow:
        """The middle half of the indices, [250, 750) of 1000: the paper's for faces, unconditional.

        Args:
            of: a schedule, or how many timesteps it has.
        """
        num_timesteps = _length(of)
        return cls(num_timesteps // 4, num_timesteps * 3 // 4, **options)

    @classmethod
    def late(cls, of: NoiseSchedule | int = 1000, **options) -> TimeWindow:
        """The last quarter, where noise is strongest, [750, 1000) of 1000: the paper's for Stable Diffusion.

        Args:
            of: a schedule, or how many timesteps it has.
        """
        num_timesteps = _length(of)
        return cls(num_timesteps * 3 // 4, num_timesteps, **options)

    @classmethod
    def last(cls, of: NoiseSchedule | int = 1000, **options) -> TimeWindow:
        """The last index alone, 999 of 1000: where SISS' released code trains faces and Stable Diffusion.

        Args:
            of: a schedule, or how many timesteps it has.
        """
        num_timesteps = _length(of, least=1)
        return cls(num_timesteps - 1, num_timesteps, **options)

    def transfer(self, source: NoiseSchedule, target: NoiseSchedule) -> TimeWindow:
        """The window of `target` with the signal-to-noise ratios that this one has in `source`.

        Each bound goes to the first index of `target` whose ratio is at most that of the source's index. A
        bound after the last index stays after the last index.

        Raises:
            TypeError: a schedule is something else, such as its length.
            ValueError: the window ends beyond `source`, or `target` has no such ratios.
        """
        _check_schedules(source, target)
        self._check_within(len(source))
        start, stop = (_index_of_equal_snr(bound, source, target) for bound in (self.start, self.stop))
        if start >= stop:
            expected = f"expected a schedule with noise levels of the window [{self.start}, {self.stop})"
            raise ValueError(f"target: {expected}, got none in {target}")
        return TimeWindow(start, stop, self.outside, self.as_weight)

    def table(self, num_timesteps: int) -> Tensor:
        num_timesteps = check.integer("num_timesteps", num_timesteps, low=1)
        self._check_within(num_timesteps)
        table = torch.full((num_timesteps,), self.outside, dtype=torch.float64)
        table[self.start : self.stop] = 1
        within = self.stop - self.start
        return table / (within + self.outside * (num_timesteps - within))

    def drawn(self, num_timesteps: int) -> Tensor:
        return Uniform().table(num_timesteps) if self.as_weight else self.table(num_timesteps)

    @property
    def weighted(self) -> bool:
        return self.as_weight

    def weights(self, num_timesteps: int) -> Tensor:
        return self.table(num_timesteps) * num_timesteps if self.as_weight else super().weights(num_timesteps)

    def draw(self, source, purpose: int, count: int, num_timesteps: int) -> Tensor:
        self._check_within(num_timesteps)
        if self.as_weight:
            return Uniform().draw(source, purpose, count, num_timesteps)
        return super().draw(source, purpose, count, num_timesteps)

    def _check_within(self, num_timesteps: int) -> None:
        if self.stop > num_timesteps:
            expected = f"expected at most the {num_timesteps} timesteps of the schedule"
            raise ValueError(f"stop: {expected}, got {self.stop}")


@dataclass(frozen=True)
class LogitNormal(Density):
    """diffusers' density for flow matching.

    Its scripts draw `u = sigmoid(N(mean, std^2))`, and take the timestep at place `floor(u T)` of a list that
    begins with the noisiest: index `T - 1 - floor(u T)`.

    A larger mean means less noise. The noise levels themselves are those of the schedule, shifted or not.

    Raises:
        TypeError, ValueError: for a standard deviation that is not positive.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", check.number("mean", self.mean))
        object.__setattr__(self, "std", check.number("std", self.std, low=0, low_open=True))

    def table(self, num_timesteps: int) -> Tensor:
        num_timesteps = check.integer("num_timesteps", num_timesteps, low=1)
        # Place k holds u in [k / T, (k + 1) / T): the normal numbers between the logits of both.
        logits = [math.log(k / (num_timesteps - k)) for k in range(1, num_timesteps)]
        borders = [-math.inf, *((logit - self.mean) / self.std for logit in logits), math.inf]
        places = [_normal_probability(low, high) for low, high in pairwise(borders)]
        return torch.tensor(places[::-1], dtype=torch.float64)

    def transfer(self, source: NoiseSchedule, target: NoiseSchedule) -> LogitNormal:
        _check_schedules(source, target)
        return self


@dataclass(frozen=True)
class Product(Density):
    """Two densities multiplied and normalised.

    `Product(TimeWindow(250, 750), LogitNormal())` is the logit-normal density within the window.

    Raises:
        TypeError, ValueError: for what is no density, or one that is not drawn from as it is.
    """

    first: Density
    second: Density

    def __post_init__(self) -> None:
        for name in ("first", "second"):
            density = check_density(name, getattr(self, name))
            if isinstance(density, Stratified):
                raise ValueError(f"{name}: expected a density to multiply, got a Stratified (put it outside)")
            if density.weighted:
                raise ValueError(f"{name}: expected a density that is drawn from, got as_weight=True")

    def table(self, num_timesteps: int) -> Tensor:
        product = self.first.table(num_timesteps) * self.second.table(num_timesteps)
        total = product.sum()
        if total == 0:
            raise ValueError(f"second: expected a density that meets {self.first}, got {self.second}")
        return product / total

    def transfer(self, source: NoiseSchedule, target: NoiseSchedule) -> Product:
        return Product(self.first.transfer(source, target), self.second.transfer(source, target))


@dataclass(frozen=True)
class Stratified(Density):
    """Draws from `density`, one in each of B strata of equal probability.

    B is the number of rows of the global batch. A sum over the batch has the same mean, and a variance that
    is lower by what differs between strata.

    Which row gets which stratum is drawn anew at every step, for each branch: so each row alone is drawn from
    `density`, whatever image it has, and is independent of its partner in the other branch.

    With counters (`Unlearner`) all processes together have one set of strata; with torch generators, which
    agree on nothing, each process has its own.

    Raises:
        TypeError, ValueError: for what is no density, or is stratified already.
    """

    density: Density

    def __post_init__(self) -> None:
        if isinstance(check_density("density", self.density), Stratified):
            raise ValueError("density: expected one that is not stratified yet, got a Stratified")

    def table(self, num_timesteps: int) -> Tensor:
        return self.density.table(num_timesteps)

    def drawn(self, num_timesteps: int) -> Tensor:
        return self.density.drawn(num_timesteps)

    @property
    def weighted(self) -> bool:
        return self.density.weighted

    def weights(self, num_timesteps: int) -> Tensor:
        return self.density.weights(num_timesteps)

    def transfer(self, source: NoiseSchedule, target: NoiseSchedule) -> Stratified:
        return Stratified(self.density.transfer(source, target))

    def draw(self, source, purpose: int, count: int, num_timesteps: int) -> Tensor:
        strata, total = source.strata(count, purpose)
        # A stratum is 2^bits of the integers in [0, total 2^bits), which are at most 2^53.
        bits = FRACTION_BITS - (total - 1).bit_length()
        within = source.fractions(count, purpose) >> (FRACTION_BITS - bits)
        return _look_up(self.density, (strata << bits) + within, total << bits, num_timesteps)


def check_density(name: str, value) -> Density:
    """
    Raises:
        TypeError: naming `name`, for what is no density, or cannot be told from others by its numbers.
    """
    if not isinstance(value, Density):
        expected = "expected a density of timesteps (Uniform(), TimeWindow(...), LogitNormal(...), ...)"
        raise TypeError(f"{name}: {expected}, got {check.describe(value)}")
    try:
        hash(value)
    except TypeError:
        expected = "expected a density that is hashable (a frozen dataclass of numbers)"
        raise TypeError(f"{name}: {expected}, got {check.describe(value)}") from None
    return value


@functools.lru_cache(maxsize=64)
def check_tables(density: Density, num_timesteps: int) -> None:
    """Whether `density` has probabilities for a schedule of that length. Read once for each of both.

    Raises:
        TypeError, ValueError: naming the table of a density that has none.
    """
    for name in ("table", "drawn", "weights"):
        table = getattr(density, name)(num_timesteps)
        if not isinstance(table, Tensor) or table.dtype != torch.float64 or table.shape != (num_timesteps,):
            expected = f"expected float64 of shape ({num_timesteps},)"
            raise ValueError(f"{name}: {expected}, got {check.describe(table)} of {type(density).__name__}")
        if not torch.isfinite(table).all() or (table < 0).any():
            expected = "expected finite numbers >= 0"
            raise ValueError(f"{name}: {expected}, got others in that of {density}")
        total = float(table.sum())
        if name != "weights" and abs(total - 1) > LARGEST_ERROR:
            raise ValueError(f"{name}: expected probabilities that add up to 1, got {total:.6g} of {density}")


def log_ratio(forget: Density, retain: Density, num_timesteps: int) -> Tensor:
    """`log p_forget(t) - log p_retain(t)` of the densities that are drawn from, float64 `[T]`.

    Infinite where one branch never draws t, NaN where none does. A density that is a weight (`as_weight`) is
    drawn from uniformly.
    """
    return forget.drawn(num_timesteps).log() - retain.drawn(num_timesteps).log()


def log_ratio_of(timesteps: Tensor, forget: Density, retain: Density, num_timesteps: int) -> Tensor | None:
    """`log_ratio` of timesteps `[B]`, float64 `[B]` on their device, as `functional.mixture` takes it.

    None where both branches draw from one density: a pair may then share its timestep.
    """
    if draw_alike(forget, retain, num_timesteps):
        return None
    table = on_device(log_ratio, (forget, retain, num_timesteps), timesteps.device)
    return _rows_of(table, timesteps)


def weights_of(timesteps: Tensor, density: Density, num_timesteps: int) -> Tensor | None:
    """What the losses at timesteps `[B]` are multiplied by, float64 `[B]` on their device. None: by 1."""
    if not density.weighted:
        return None
    return _rows_of(on_device(_weight_table, (density, num_timesteps), timesteps.device), timesteps)


@functools.lru_cache(maxsize=64)
def draw_alike(forget: Density, retain: Density, num_timesteps: int) -> bool:
    """Whether both densities draw every index with the same probability."""
    return torch.equal(forget.drawn(num_timesteps), retain.drawn(num_timesteps))


# --- drawing by inversion -----------------------------------------------------------------------------------


def _look_up(density: Density, numbers: Tensor, units: int, num_timesteps: int) -> Tensor:
    """The index whose share of the integers in [0, units) each of `numbers` `[B]` lies in."""
    borders = on_device(_borders, (density, num_timesteps, units), numbers.device)
    # The first index whose border is above the number: one that has no share is never the first.
    return torch.searchsorted(borders, numbers, right=True)


def _borders(density: Density, num_timesteps: int, units: int) -> Tensor:
    """Where the share of each index ends in [0, units): sums of probabilities, rounded once; int64 `[T]`."""
    sums = list(accumulate(Fraction(probability) for probability in density.drawn(num_timesteps).tolist()))
    # The probabilities add up to 1 but for roundings, the last border to `units` exactly.
    return torch.tensor([round(units * part / sums[-1]) for part in sums], dtype=torch.int64)


def _weight_table(density: Density, num_timesteps: int) -> Tensor:
    """What a `density` with weights has, float64 `[T]`."""
    return density.weights(num_timesteps)


def _rows_of(table: Tensor, timesteps: Tensor) -> Tensor:
    """`table` at `timesteps`. Those outside the schedule get an end's: their coefficients are NaN anyway."""
    return table[timesteps.long().clamp(0, len(table) - 1)]


# --- numbers ------------------------------------------------------------------------------------------------


def _normal_probability(low: float, high: float) -> float:
    """That a standard normal number lies in [low, high): in each tail a difference of what is beyond."""
    if low >= 0:
        return _beyond(low) - _beyond(high)
    if high <= 0:
        return _beyond(-high) - _beyond(-low)
    return 1 - _beyond(-low) - _beyond(high)


def _beyond(number: float) -> float:
    """That a standard normal number is larger than `number`, to the last digits in the tail, too."""
    return math.erfc(number / math.sqrt(2)) / 2


def _length(of: NoiseSchedule | int, least: int = 4) -> int:
    """How many timesteps there are; a window of a quarter needs four."""
    length = len(of) if isinstance(of, NoiseSchedule) else of
    return check.integer("of", length, low=least, of="the timesteps of a schedule")


def _check_schedules(source, target) -> None:
    """
    Raises:
        TypeError: naming the one that is no schedule.
    """
    for name, schedule in (("source", source), ("target", target)):
        if not isinstance(schedule, NoiseSchedule):
            expected = "a NoiseSchedule, whose noise levels are compared"
            raise TypeError(f"{name}: expected {expected}, got {check.describe(schedule)}")


def _index_of_equal_snr(bound: int, source: NoiseSchedule, target: NoiseSchedule) -> int:
    """The first index of `target` with at most the signal-to-noise ratio of index `bound` of `source`.

    The length of `target` where `bound` is that of `source`, or no ratio is so low.
    """
    if bound == len(source):
        return len(target)
    wanted = _snr(source)[bound]
    reached = (_snr(target) <= wanted).tolist()
    return reached.index(True) if any(reached) else len(target)


def _snr(schedule: NoiseSchedule) -> Tensor:
    """`alpha^2 / sigma^2` of each index, float64 `[T]`; infinite where there is no noise."""
    return (schedule.alpha / schedule.sigma).square()
