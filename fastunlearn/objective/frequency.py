"""Which spatial frequencies of the residual a forget loss sees (arXiv 2510.17917, Eq. 8 and 9)."""

from __future__ import annotations

import functools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields, replace
from fractions import Fraction
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import check
from ..host.tables import on_device

SCHEDULES = ("fixed", "linear_increase", "linear_decay", "step_increase", "step_decay")
RADII = ("radius", "inner", "start", "stop")  # fields of a `LowPass`
STAGES = 4  # of a stepwise schedule
MOST_STEPS = 2**31 - 1  # of a schedule: the tables of steps are int32


class BandMask(NamedTuple):
    """M of one step for images of one size: `inside` where the table is 1, else `outside`, also beyond it."""

    table: Tensor  # [U, V] float32, of the frequencies from 0 on
    inside: float
    outside: float
    size = None  # no field: (height, width) of the images that it is for; None: it does not say


class SizedMask(BandMask):
    """A `BandMask` that says which size of images it is for. It unpacks alike, into three."""

    def __new__(
        cls, table: Tensor, inside: float, outside: float, size: tuple[int, int] | None = None
    ) -> SizedMask:
        mask = super().__new__(cls, table, inside, outside)
        mask.size = size
        return mask


@dataclass(frozen=True)
class LowPass:
    """A mask M of spatial frequencies: 1 on a band, `high_frequency_weight` elsewhere.

    The loss is `||F^-1(M o F(prediction - target))||^2`.

    F is the DFT of each channel, `u` and `v` the integer frequencies of its rows and columns, at most half
    the size. Frequencies are compared with the radius exactly, in integers: 0.3 means 3/10, not the float
    nearest to it. Bands are equal where their exact radii are: `LowPass(0.3) == LowPass(Fraction(3, 10))`.

    The paper prints neither its radii nor their unit. Fractions of the Nyquist frequency carry over from
    images to latents, bins do not.

    A `schedule` moves the radius while a run trains. Of S = `total_steps` steps, the first has `start`, the
    last `stop`; step s has `start + (stop - start) s / (S - 1)` if it is linear, and
    `start + (stop - start) floor(s n / S) / (n - 1)` if it is stepwise, in n stages of equal length. Later
    steps keep `stop`. A linear schedule of a single step is at its first: it has `start`, and so do steps
    after it. A stepwise one has as many steps as stages, at least two.

    Args:
        radius: where the band ends. In units of `"nyquist"` a frequency lies within it if `(u / (H/2))^2 + (v
            / (W/2))^2 <= radius^2`, so 1 reaches the highest frequency of each axis; in `"bins"` if `u^2 +
            v^2 <= radius^2`.
        kind: `"disc"`, or `"box"`: both `u` and `v` are at most the radius of their axis.
        band: `"low"`, within the radius; `"mid"`, within it but not within `inner`; `"high"`, not within it.
        inner: where a mid band begins, in the unit of `radius`.
        high_frequency_weight: `s`, M outside the band, whatever the band is; 0 leaves those frequencies out.
        unit: `"nyquist"` or `"bins"`.
        schedule: `"fixed"`, `"linear_increase"`, `"linear_decay"`, `"step_increase"` or `"step_decay"`: what
            becomes of the radius.
        start, stop: the radii of a schedule that is not fixed. `radius` is the larger one: it may be left out
            where both are given, and stands for the larger one where that is not.
        stages: n of a stepwise schedule, 4 if it is None.

    Raises:
        TypeError, ValueError: for values that make no mask.
    """

    radius: float | Fraction | None = None
    _: KW_ONLY
    kind: str = "disc"
    band: str = "low"
    inner: float | Fraction | None = None
    high_frequency_weight: float = 0.0
    unit: str = "nyquist"
    schedule: str = "fixed"
    start: float | Fraction | None = None
    stop: float | Fraction | None = None
    stages: int | None = None

    def __post_init__(self) -> None:
        for name in ("radius", "inner", "high_frequency_weight", "start", "stop", "stages"):
            object.__setattr__(self, name, check.scalar(name, getattr(self, name)))
        check.one_of("kind", self.kind, ("disc", "box"))
        check.one_of("band", self.band, ("low", "mid", "high"))
        check.one_of("unit", self.unit, ("nyquist", "bins"))
        check.number("high_frequency_weight", self.high_frequency_weight, low=0)
        check.one_of("schedule", self.schedule, SCHEDULES)
        self._check_schedule()
        _radius("radius", self.radius)
        if (self.inner is not None) != (self.band == "mid"):
            expected = "a number" if self.band == "mid" else "None"
            got = check.describe(self.inner)
            raise ValueError(f"inner: expected {expected} with band={self.band!r}, got {got}")
        if self.inner is not None and not _radius("inner", self.inner) < _radius("radius", self.radius):
            raise ValueError(f"inner: expected a number below radius, {self.radius}, got {self.inner}")
        if self.inner is not None and self.scheduled:
            smallest = min(self.start, self.stop, key=_exact)
            if not _exact(self.inner) < _exact(smallest):
                expected = f"expected a number below every radius of the schedule, {smallest}"
                raise ValueError(f"inner: {expected}, got {self.inner}")

    def _check_schedule(self) -> None:
        """Fills in `start`, `stop`, `radius` and `stages` where one follows from the others."""
        if not self.scheduled:
            for name in ("start", "stop", "stages"):
                if getattr(self, name) is not None:
                    got = check.describe(getattr(self, name))
                    raise ValueError(f"{name}: expected None with schedule='fixed', got {got}")
            return
        larger, smaller = ("stop", "start") if self.grows else ("start", "stop")
        if getattr(self, larger) is None:
            object.__setattr__(self, larger, self.radius)
        low, high = (_radius(name, getattr(self, name)) for name in (smaller, larger))
        if not low < high:
            expected = f"expected a radius above {smaller}, {getattr(self, smaller)}, with {self.schedule}"
            raise ValueError(f"{larger}: {expected}, got {getattr(self, larger)}")
        if self.radius is None:
            object.__setattr__(self, "radius", getattr(self, larger))
        if _radius("radius", self.radius) != high:
            expected = f"expected None, or {larger}, {getattr(self, larger)}, with {self.schedule}"
            raise ValueError(f"radius: {expected}, got {self.radius}")
        if self.schedule.startswith("step"):
            stages = STAGES if self.stages is None else self.stages
            object.__setattr__(self, "stages", check.integer("stages", stages, low=2))
        elif self.stages is not None:
            got = check.describe(self.stages)
            raise ValueError(f"stages: expected None with schedule={self.schedule!r}, got {got}")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, LowPass):
            return NotImplemented
        return self._identity() == other._identity()

    def __hash__(self) -> int:
        return hash(self._identity())

    def _identity(self) -> tuple:
        """Its fields, with radii as they are compared with frequencies.

        In Python 0.3 and Fraction(0.3) are equal, as radii they are not: 3/10 and a number below it.
        """
        if not hasattr(self, "_known_identity"):
            values = [getattr(self, field.name) for field in fields(self)]
            for index, field in enumerate(fields(self)):
                if field.name in RADII and values[index] is not None:
                    values[index] = _exact(values[index])
            # It is a key at every step, and its fields are set once.
            object.__setattr__(self, "_known_identity", tuple(values))
        return self._known_identity

    def in_words(self, total_steps: int | None = None) -> str:
        """The band as people say it; `total_steps` those of a run, where the radius moves over them."""
        radius = _written(self.radius)
        if self.scheduled:
            radius = f"{_written(self.start)} to {_written(self.stop)}, {self.schedule}"
        if self.scheduled and total_steps is not None:
            radius += f" over {total_steps} steps"
        if self.stages is not None:
            radius += f" in {self.stages} stages"
        words = f"{self.band} band, {self.kind} of radius {radius}, in {self.unit}"
        if self.inner is not None:
            words += f", without the radius {_written(self.inner)}"
        if self.high_frequency_weight:
            words += f", the others times {self.high_frequency_weight:g}"
        return words

    @property
    def scheduled(self) -> bool:
        """Whether the radius depends on the step."""
        return self.schedule != "fixed"

    @property
    def grows(self) -> bool:
        """Whether the schedule is one whose radius increases."""
        return self.schedule.endswith("increase")

    def at(self, step: int, total_steps: int) -> LowPass:
        """The band of one step, with a fixed radius: a fraction, exactly what the schedule says.

        Raises:
            TypeError, ValueError: for a step below 0, or fewer steps than stages.
        """
        if not self.scheduled:
            return self
        total_steps = self._check_steps(total_steps)
        step = min(check.integer("step", step, low=0), total_steps - 1)
        numerator, denominator = self._radii(total_steps)
        radius = Fraction(numerator(step), denominator)
        return replace(self, radius=radius, schedule="fixed", start=None, stop=None, stages=None)

    def steps(self, height: int, width: int, total_steps: int) -> Tensor:
        """When each frequency of images of that size comes into the band, or leaves it.

        Returns:
            int32 `[U, V]` with values in [0, `total_steps`], as large as the table of the largest radius.
            Where the radius grows, it is the first step with that frequency, `total_steps` if there is none;
            where it shrinks, the first step without it, `total_steps` if it stays. A mid band's inner
            frequencies are in at no step.

        Raises:
            TypeError, ValueError: for a size that is no positive integer, a fixed radius, fewer steps than
                stages, or M = 0 at every frequency at some step.
        """
        if not self.scheduled:
            raise ValueError("schedule: expected one that moves the radius, got 'fixed' (mask has its table)")
        total_steps = self._check_steps(total_steps)
        smallest, largest = (self.at(step, total_steps) for step in self._smallest_first(total_steps))
        smallest.mask(height, width)  # refuses a band of nothing
        ever, _, _ = largest.mask(height, width)

        # Frequencies of equal radius change at the same step: each radius is looked up once.
        ever = ever.bool()
        squares, unit = self._squares(*ever.shape, height, width)
        distinct, which = squares[ever].unique(return_inverse=True)
        changes = self._changes(distinct.tolist(), unit, total_steps)
        steps = torch.full(ever.shape, total_steps if self.grows else 0, dtype=torch.int32)
        steps[ever] = torch.tensor(changes, dtype=torch.int32)[which]
        return steps

    def _changes(self, squares: list[int], unit: int, total_steps: int) -> list[int]:
        """The steps at which radii come into the band, or leave it; they are the roots of `squares / unit^2`.

        A radius is in where the numerator of the step's is at least as large as its own.
        """
        numerator, denominator = self._radii(total_steps)
        all_steps, found = range(total_steps), []
        for square in squares:
            own = _root(denominator**2 * square, unit**2)
            if self.grows:
                found.append(bisect_left(all_steps, own, key=numerator))
            else:
                found.append(bisect_right(all_steps, -own, key=lambda step: -numerator(step)))
        return found

    def check_fits(self, height: int, width: int, total_steps: int | None) -> None:
        """Whether there is a mask for images of that size at every step.

        What is computed for it is kept, and is what `mask_at` and `mask_on` need.

        Raises:
            TypeError, ValueError: as `steps`, or for a fixed radius `mask`.
        """
        if self.scheduled:
            _steps(self, height, width, total_steps)
        else:
            _table(self, height, width)

    def mask_at(
        self,
        height: int,
        width: int,
        step: int | Tensor,
        total_steps: int,
        device: torch.device | None = None,
    ) -> BandMask:
        """`mask` of one step, as large at every step, made on the device.

        Nothing waits for it but the first call, which copies `steps` there.

        Args:
            step: a number, or a 0-d integer tensor on the device; from `total_steps` on the last step's mask.
                A tensor below 0, which nobody reads off the CPU, has a mask of NaN.
            device: of the table; None: that of `step`, the CPU for a number.
        """
        if device is None:
            device = step.device if isinstance(step, Tensor) else torch.device("cpu")

        # A fixed radius needs no step.
        if not self.scheduled:
            return self.mask_on(height, width, device)
        steps = on_device(_steps, (self, height, width, total_steps), device)
        if isinstance(step, Tensor) and check.readable(step):
            check.integer("step", int(step), low=0)
        if isinstance(step, Tensor):
            # In int64: a small integer dtype holds the step, but maybe not the number of all steps.
            step = check.tensor("step", step, ndim=0, floating=False).long().clamp(max=total_steps - 1)
        else:
            step = min(check.integer("step", step, low=0), total_steps - 1)
        within = (steps <= step if self.grows else steps > step).float()
        if isinstance(step, Tensor):
            within = torch.where(step < 0, torch.nan, within)
        return SizedMask(within, *self._values(), (height, width))

    def mask_on(self, height: int, width: int, device: torch.device) -> BandMask:
        """`mask`, whose table is made once and kept on `device`."""
        table = on_device(_table, (self, height, width), device)
        return SizedMask(table, *self._values(), (height, width))

    def mask(self, height: int, width: int) -> BandMask:
        """The mask for images of that size, as `ops.lowpass_residual` takes it.

        Returns:
            `table, inside, outside`: M is `inside` where the float32 `table[u, v]` is 1 and `outside`
                elsewhere, also at frequencies beyond the table, which is no larger than its ones.

        Raises:
            TypeError, ValueError: for a size that is no positive integer, or one where M is 0 at every
                frequency, or a radius that depends on the step.
        """
        if self.scheduled:
            expected = f"expected a step and total_steps with {self.schedule} (see mask_at)"
            raise ValueError(f"schedule: {expected}, got neither")
        height = check.integer("height", height, low=1)
        width = check.integer("width", width, low=1)
        table = self._within(self.radius, height, width)
        if self.inner is not None:
            table = table - self._within(self.inner, height, width)

        # The table of a high band is 1 outside of the band, within the radius. A low band is never empty: it
        # has the frequency 0.
        nothing = self.band == "mid" and not table.any()
        if self.band == "high":
            nothing = bool(table.all())
        if nothing and self.high_frequency_weight == 0:
            raise ValueError(
                f"LowPass: expected a band with frequencies of images of {height} x {width}, "
                f"got none in the {self.in_words()}"
            )
        return SizedMask(_trimmed(table), *self._values(), (height, width))

    def _values(self) -> tuple[float, float]:
        """M where the table is 1, and elsewhere."""
        weight = float(self.high_frequency_weight)
        if self.band == "high":
            return weight, 1.0
        return 1.0, weight

    def _check_steps(self, total_steps: int) -> int:
        least, of = 1, ""
        if self.stages is not None:
            least, of = self.stages, "one for each stage"
        return check.integer("total_steps", total_steps, low=least, high=MOST_STEPS, of=of)

    def _smallest_first(self, total_steps: int) -> tuple[int, int]:
        """The steps with the smallest and the largest radius."""
        if self.grows:
            return 0, total_steps - 1
        return total_steps - 1, 0

    def _radii(self, total_steps: int) -> tuple[Callable[[int], int], int]:
        """The radius of every step as a fraction: the numerator of a step, and the denominator of all."""
        start, stop = _exact(self.start), _exact(self.stop)
        common = math.lcm(start.denominator, stop.denominator)
        first, last = int(start * common), int(stop * common)
        # The way from start to stop has as many parts as there are steps, or stages, after the first.
        parts = max(total_steps - 1, 1)
        if self.stages is not None:
            parts = self.stages - 1

        def numerator(step: int) -> int:
            done = step
            if self.stages is not None:
                done = step * self.stages // total_steps
            return first * (parts - done) + last * done

        return numerator, common * parts

    def _squares(self, rows: int, columns: int, height: int, width: int) -> tuple[Tensor, int]:
        """The squared radius of the smallest disc or box that holds each frequency, in integers.

        They are `squares / unit^2`: int64 `[rows, columns]`, and the unit.
        """
        u, v, unit = torch.arange(rows)[:, None], torch.arange(columns), 1
        if self.unit == "nyquist":
            # u / (H/2) = 2 u W / (H W).
            u, v, unit = 2 * u * width, 2 * v * height, height * width
        if self.kind == "box":
            return torch.maximum(u, v) ** 2, unit
        return u**2 + v**2, unit

    def _within(self, radius: float | Fraction, height: int, width: int) -> Tensor:
        """1 at the frequencies within `radius`: float32 `[H // 2 + 1, W // 2 + 1]`."""
        radius = _exact(radius)
        row_unit = column_unit = Fraction(1)
        if self.unit == "nyquist":
            row_unit, column_unit = Fraction(height, 2), Fraction(width, 2)
        table = torch.zeros(height // 2 + 1, width // 2 + 1)
        for u in range(height // 2 + 1):
            # What is left of the squared radius for v.
            left = radius**2 - (u / row_unit) ** 2
            if left < 0:
                continue
            # box: v / column_unit <= radius. disc: (v / column_unit)^2 <= left.
            if self.kind == "box":
                last = math.floor(radius * column_unit)
            else:
                last = math.isqrt(math.floor(left * column_unit**2))
            table[u, : last + 1] = 1
        return table


def check_mask(name: str, mask: BandMask, height: int, width: int) -> None:
    """
    Raises:
        ValueError: naming `name`, for a mask that is for images of another size.
    """
    if mask.size is not None and mask.size != (height, width):
        of_mask = "{} x {}".format(*mask.size)
        raise ValueError(f"{name}: expected a mask for images of {height} x {width}, got one for {of_mask}")


def _exact(radius: float | Fraction) -> Fraction:
    """A float as it is written in decimals."""
    if isinstance(radius, Fraction):
        return radius
    return Fraction(repr(float(radius)))


def _written(radius: float | Fraction) -> str:
    """As a decimal that means the same to `_exact`, where there is one: 9/20 is 0.45."""
    decimal = float(radius)
    if _exact(decimal) != _exact(radius):
        return str(radius)
    return str(decimal).removesuffix(".0")


def _radius(name: str, value) -> Fraction:
    check.number(name, float(value) if isinstance(value, Fraction) else value, low=0)
    return _exact(value)


@functools.lru_cache(maxsize=64)
def _table(lowpass: LowPass, height: int, width: int) -> Tensor:
    return lowpass.mask(height, width)[0]


@functools.lru_cache(maxsize=64)
def _steps(lowpass: LowPass, height: int, width: int, total_steps: int) -> Tensor:
    return lowpass.steps(height, width, total_steps)


def _root(numerator: int, denominator: int) -> int:
    """The smallest integer whose square is at least `numerator / denominator`."""
    whole = -(-numerator // denominator)
    if whole <= 0:
        return 0
    return math.isqrt(whole - 1) + 1


def _trimmed(table: Tensor) -> Tensor:
    """Without the rows and columns beyond the last 1; at least one of each."""
    rows = columns = 1
    if table.any():
        rows = int(table.any(1).nonzero().max()) + 1
        columns = int(table.any(0).nonzero().max()) + 1
    return table[:rows, :columns].contiguous()
