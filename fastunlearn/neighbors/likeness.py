"""Whether two pictures are one: what resizing leaves of their distance, beside what compression does.

Images that merely look alike and copies cannot be told apart by one radius for all: half the size and back
moves a digit as far as the next digit is. So the distance is measured to every resized version of either
picture, and what is left is compared with what a JPEG changes in that very image.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from . import renderings
from .renderings import Resizes

# Times the change by a JPEG of quality 50: copies reach 1.1 times that, other images begin at 1.4 times.
COMPRESSION = 1.2
# Times the distance that all but 1 % of the images of the set keep from their nearest: below it, a copy.
CLOSE = 0.2
# Times the median of these distances: beyond it, no copy.
APART = 0.4
# Grey levels, root mean square: two pictures that differ by less are one.
ROUNDING = 1.0
# Times the limit: what compression may have done to the sharper of two pictures.
SHARPER = 1.5
# Times the limit: pairs farther apart when softened are not worth resizing the second picture.
WORTH_A_LOOK = 3.0
EXACT = "donot_use_mm_for_euclid_dist"  # of torch.cdist: equal images are at a distance of 0
SOFT_SCALES, SOFT_FILTER = (0.5, 0.75, 2.0), "BILINEAR"


@lru_cache(maxsize=4)
def soft_resizes(height: int, width: int) -> Resizes:
    """A few resizings, to find candidates with."""
    # On images that are reduced to a quarter they leave no trace.
    scales = []
    if max(height, width) < 4 * renderings.LARGEST_SIDE:
        scales = list(SOFT_SCALES)
    return Resizes(height, width, scales, (SOFT_FILTER,))


@lru_cache(maxsize=4)
def fine_resizes(height: int, width: int) -> Resizes:
    """All resizings, to decide with."""
    return Resizes(height, width, renderings.all_scales(height, width))


class Judge:
    """Says of pictures, float32 `[C, H, W]` in 0..255, whether they are near copies.

    Args:
        nearest: float64 `[n]`: distances, in the reduced size, of images of the set to their nearest others;
            empty where they are unknown.
    """

    def __init__(self, nearest: Tensor):
        self.close, self.largest = 0.0, torch.inf
        nearest = nearest[nearest > 0]  # equal images say nothing of a scale
        if len(nearest) > 0:
            self.close = CLOSE * nearest.quantile(0.01).item()
            self.largest = APART * nearest.median().item()

    def limit(self, image: Tensor) -> float:
        """How far, in the reduced size, a compressed copy of `image` may be."""
        compressed = COMPRESSION * renderings.change_by_jpeg(image)
        rounding = ROUNDING * renderings.reduced(image[None]).numel() ** 0.5
        return min(max(compressed, rounding, self.close), self.largest)

    def copies(self, image: Tensor, others: Tensor) -> Tensor:
        """bool `[n]`: which of `others` `[n, C, H, W]`, turned alike, are copies of `image` `[C, H, W]`."""
        limit = self.limit(image)
        resized = fine_resizes(*image.shape[1:])(image[None])[0].flatten(1)
        left = torch.cdist(renderings.reduced(others).flatten(1), resized, compute_mode=EXACT).amin(1)

        # Where the copy is the sharper of the two, it is the one to resize, and compression changes it more.
        softened = _softened_distances(image, others)
        unsettled = (left > limit) & (softened <= WORTH_A_LOOK * limit)
        for number in unsettled.nonzero().flatten().tolist():
            left[number] = min(left[number].item(), _left_of_sharper(others[number], image))
            # A little beyond the limit of `image` the copy's own limit decides, which takes a JPEG of it.
            beyond = limit < left[number] <= SHARPER * limit
            if beyond and left[number] <= self.limit(others[number]):
                left[number] = limit
        return left <= limit


def _left_of_sharper(sharper: Tensor, image: Tensor) -> float:
    """The distance of `image` to the nearest of the resized versions of `sharper`."""
    resized = fine_resizes(*image.shape[1:])(sharper[None])[0]
    return (resized - renderings.reduced(image[None])).flatten(1).norm(dim=1).min().item()


def _softened_distances(image: Tensor, others: Tensor) -> Tensor:
    """float32 `[n]`: the least with one of the two as it is, the other as it is or softened."""
    soften = soft_resizes(*image.shape[1:])
    one, many = soften(image[None]).flatten(2), soften(others).flatten(2)
    first_softened = (one - many[:, :1]).norm(dim=2).amin(1)
    second_softened = (many - one[:, :1]).norm(dim=2).amin(1)
    return torch.minimum(first_softened, second_softened)
