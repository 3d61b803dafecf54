"""Frequency: how often a generator produces one given image, with an interval that is exact however rare it
is.
"""

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
        """The Clopper-Pearson interval (Clopper & Pearson 1934): never below its nominal coverage, defined at
        0 and at `total` hits.
        """
        from scipy.stats import beta

        total = check.integer("total", total, low=1)
        count = check.integer("count", count, low=0, high=total, of="total")
        low = float(beta.ppf(0.025, count, total - count + 1)) if count > 0 else 0.0
        high = float(beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
        return cls(count, total, count / total, low, high)

    def __str__(self) -> str:
        digits = 2 if self.total >= 200 else 1
        return f"{self.count} of {self.total} ({self.share:.{digits}%}; 95% interval {self.low:.{digits}%} to {self.high:.{digits}%})"


@torch.no_grad()
def frequency(samples: Tensor, image: Tensor, threshold: float | None = None) -> Share:
    """Share of `samples` closer to `image` than `threshold`: "Frequency" of the ReTrack paper (MNIST T-Shirt:
    L2 < 10 over 784 pixels).

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
