"""Which spatial frequencies of the residual a forget loss sees (arXiv 2510.17917, Eq. 8 and 9)."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction

import torch
from torch import Tensor

from ..host import check


@dataclass(frozen=True)
class LowPass:
    """A mask M of spatial frequencies: 1 on a band, `high_frequency_weight` elsewhere.

    The loss is `||F^-1(M o F(prediction - target))||^2`.

    F is the DFT of each channel, `u` and `v` the integer frequencies of its rows and columns, at most half
    the size. Frequencies are compared with the radius exactly, in integers: 0.3 means 3/10, not the float
    nearest to it.

    The paper prints neither its radii nor their unit. Fractions of the Nyquist frequency carry over from
    images to latents, bins do not.

    Args:
        radius: where the band ends. In units of `"nyquist"` a frequency lies within it if `(u / (H/2))^2 + (v
            / (W/2))^2 <= radius^2`, so 1 reaches the highest frequency of each axis; in `"bins"` if `u^2 +
            v^2 <= radius^2`.
        kind: `"disc"`, or `"box"`: both `u` and `v` are at most the radius of their axis.
        band: `"low"`, within the radius; `"mid"`, within it but not within `inner`; `"high"`, not within it.
        inner: where a mid band begins, in the unit of `radius`.
        high_frequency_weight: `s`, M outside the band, whatever the band is; 0 leaves those frequencies out.
        unit: `"nyquist"` or `"bins"`.

    Raises:
        TypeError, ValueError: for values that make no mask.
    """

    radius: float | Fraction
    _: KW_ONLY
    kind: str = "disc"
    band: str = "low"
    inner: float | Fraction | None = None
    high_frequency_weight: float = 0.0
    unit: str = "nyquist"

    def __post_init__(self) -> None:
        for name in ("radius", "inner", "high_frequency_weight"):
            object.__setattr__(self, name, check.scalar(name, getattr(self, name)))
        check.one_of("kind", self.kind, ("disc", "box"))
        check.one_of("band", self.band, ("low", "mid", "high"))
        check.one_of("unit", self.unit, ("nyquist", "bins"))
        check.number("high_frequency_weight", self.high_frequency_weight, low=0)
        _radius("radius", self.radius)
        if (self.inner is not None) != (self.band == "mid"):
            expected = "a number" if self.band == "mid" else "None"
            got = check.describe(self.inner)
            raise ValueError(f"inner: expected {expected} with band={self.band!r}, got {got}")
        if self.inner is not None and not _radius("inner", self.inner) < _radius("radius", self.radius):
            raise ValueError(f"inner: expected a number below radius, {self.radius}, got {self.inner}")

    def mask(self, height: int, width: int) -> tuple[Tensor, float, float]:
        """The mask for images of that size, as `ops.lowpass_residual` takes it.

        Returns:
            `table, inside, outside`: M is `inside` where the float32 `table[u, v]` is 1 and `outside`
                elsewhere, also at frequencies beyond the table, which is no larger than its ones.

        Raises:
            TypeError, ValueError: for a size that is no positive integer, or one where M is 0 at every
                frequency.
        """
        height = check.integer("height", height, low=1)
        width = check.integer("width", width, low=1)
        table = self._within(self.radius, height, width)
        if self.inner is not None:
            table = table - self._within(self.inner, height, width)

        # The table of a high band is 1 outside of the band, within the radius. A low band is never empty: it
        # has the frequency 0.
        inside, outside = 1.0, self.high_frequency_weight
        nothing = self.band == "mid" and not table.any()
        if self.band == "high":
            inside, outside = outside, inside
            nothing = bool(table.all())
        if nothing and self.high_frequency_weight == 0:
            raise ValueError(
                f"LowPass: expected a band with frequencies of images of {height} x {width}, "
                f"got none in {self}"
            )
        return _trimmed(table), float(inside), float(outside)

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


def _exact(radius: float | Fraction) -> Fraction:
    """A float as it is written in decimals."""
    if isinstance(radius, Fraction):
        return radius
    return Fraction(repr(float(radius)))


def _radius(name: str, value) -> Fraction:
    check.number(name, float(value) if isinstance(value, Fraction) else value, low=0)
    return _exact(value)


def _trimmed(table: Tensor) -> Tensor:
    """Without the rows and columns beyond the last 1; at least one of each."""
    rows = columns = 1
    if table.any():
        rows = int(table.any(1).nonzero().max()) + 1
        columns = int(table.any(0).nonzero().max()) + 1
    return table[:rows, :columns].contiguous()
