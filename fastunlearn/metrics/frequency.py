"""Frequency: how often a generator produces one given image, with an interval that is exact however rare it is."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import _check


@dataclass(frozen=True)
class Share:
    """`count` of `total`, with the exact 95 % interval [`low`, `high`] of the underlying probability."""

    count: int
    total: int
    share: float
    low: float
    high: float

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        """The Clopper-Pearson interval (Clopper & Pearson 1934): never below its nominal coverage, defined at 0 and at `total` hits."""
        from scipy.stats import beta

        _check.integer("total", total, low=1)
        _check.integer("count", count, low=0, high=total, of="total")
        low = float(beta.ppf(0.025, count, total - count + 1)) if count > 0 else 0.0
        high = float(beta.ppf(0.975, count + 1, total - count)) if count < total else 1.0
        return cls(count, total, count / total, low, high)

    def __str__(self) -> str:
        digits = 2 if self.total >= 200 else 1
        return f"{self.count} of {self.total} ({self.share:.{digits}%}; 95% interval {self.low:.{digits}%} to {self.high:.{digits}%})"


def distances(samples: Tensor, image: Tensor) -> Tensor:  # [N]
    """L2 distances of `samples` `[N, C, H, W]` to `image` `[C, H, W]` or `[1, C, H, W]`, both in [-1, 1], in units of [0, 1] pixels: float32 `[N]`."""
    _check.images("samples", samples)
    image = _check.images("image", image if image.ndim == 4 else image[None])
    if image.shape != (1, *samples.shape[1:]):
        raise ValueError(f"image: expected one image of the samples' shape, {tuple(samples.shape[1:])}, got {tuple(image.shape)}")
    return ((samples.float() - image.to(samples.device).float()) / 2).flatten(1).norm(dim=1)


@torch.no_grad()
def frequency(samples: Tensor, image: Tensor, threshold: float = 10.0) -> Share:
    """Share of `samples` closer to `image` than `threshold`: "Frequency" of the ReTrack paper (MNIST T-Shirt: L2 < 10 over 784 pixels).

    Args:
        samples: `[N, C, H, W]` in [-1, 1].
        image: `[C, H, W]` or `[1, C, H, W]` in [-1, 1].
        threshold: L2 distance between images scaled to [0, 1].

    Raises:
        TypeError, ValueError: shapes that do not fit, no samples, or a threshold that is not positive.
    """
    _check.number("threshold", threshold, low=0, low_open=True)
    return Share.of(int((distances(samples, image) < threshold).sum()), len(samples))
