"""Frequency: how often a generator produces one given image, with an interval that is exact however rare."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..host import check, finite
from .distance import distances
from .threshold import resolve


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with the exact 95 % interval [`low`, `high`] of the underlying probability."""

    count: int
    total: int
    share: float
    low: float
    high: float

    def __post_init__(self):
        check.integer("total", self.total, low=1)
        check.integer("count", self.count, low=0, high=self.total, of="total")
        finite.numbers("share", share=self.share, low=self.low, high=self.high)

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        """The share, with the interval of Clopper & Pearson (1934).

        It never covers less than it says, and is defined at 0 and at `total` hits.
        """
        from scipy.stats import beta

        total = check.integer("total", total, low=1)
        count = check.integer("count", count, low=0, high=total, of="total")
        # With X binomial of n draws, low is the p at which P(X >= k) = 2.5 %, and high that at which
        # P(X <= k) = 2.5 %. As quantiles of beta distributions: B(0.025; k, n - k + 1) and
        # B(0.975; k + 1, n - k).
        low, high = 0.0, 1.0
        if count > 0:
            low = float(beta.ppf(0.025, count, total - count + 1))
        if count < total:
            high = float(beta.ppf(0.975, count + 1, total - count))
        return cls(count, total, count / total, low, high)

    def __str__(self) -> str:
        # Of fewer samples than 200 one hit is more than half a percent.
        digits = 2 if self.total >= 200 else 1
        share, low, high = (f"{value:.{digits}%}" for value in (self.share, self.low, self.high))
        return f"{self.count} of {self.total} ({share}; 95% interval {low} to {high})"


@torch.no_grad()
def frequency(samples: Tensor, image: Tensor, threshold: float | None = None) -> Share:
    """Share of `samples` closer to `image` than `threshold`: "Frequency" of the ReTrack paper.

    For MNIST T-Shirt the paper counts samples at L2 < 10 over 784 pixels.

    Args:
        samples: `[N, C, H, W]` in [-1, 1].
        image: `[C, H, W]` or `[1, C, H, W]` in [-1, 1].
        threshold: L2 distance between images scaled to [0, 1]; None: the papers' 10, for images of 1x28x28
            alone. `threshold.calibrate` finds one for images of other sizes.

    Raises:
        TypeError, ValueError: shapes that do not fit, no samples, a threshold that is not positive, none for
            images of another size, or one within which there is a picture that shows nothing
            (`threshold.refuse_empty_matches`).
        NotFiniteError: NaN or Inf in a sample or the image.
    """
    distance = distances(samples, image)
    threshold = resolve(threshold, image)
    return Share.of(int((distance < threshold).sum()), len(samples))
