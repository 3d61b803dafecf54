"""Within which distance is a sample the image to forget? A number that belongs to a data set.

The papers' 10 belongs to the T-shirt among MNIST digits. Elsewhere the threshold is calibrated on the
distances among the images to keep. No threshold may call a picture that shows nothing a match: a constant,
the noise that sampling starts from, the mean of the images to keep. A network that has learned nothing draws
such pictures.
"""

from __future__ import annotations

import math
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from ..host import check, finite
from .distance import distances

# The papers' threshold, and the images (MNIST with a T-shirt among them) that it belongs to.
PAPERS_SHAPE = (1, 28, 28)
PAPERS_THRESHOLD = 10.0
QUANTILE = 0.001  # of the distances among images to keep: one pair in a thousand is called the same
# How many images to keep are compared with each other, and how many bytes of them, as float32.
MOST_IMAGES = 1000
MOST_BYTES = 64 << 20
NOISE_PICTURES = 64
SAME = 1e-3  # below it an image is the picture that shows nothing: one grey level in one pixel is 0.004
COPY = 5 / 255  # root mean square of their difference up to which images to keep are copies of each other


@dataclass(frozen=True)
class Threshold:
    """A threshold and what there is to say about it. Distances are L2 of [0, 1] pixels.

    What matches may be one of the images to keep that are `near`.
    """

    value: float  # what is used
    how: str  # where it comes from, in words
    calibrated: float | None  # that of the images to keep; None: there were none
    papers: float | None  # theirs; None: it does not belong to images of this size
    near: int | None = None  # of the images to keep that were compared, those within `value`, but for copies


def choose(threshold: float | None, images: Tensor, retain: Tensor | None = None) -> Threshold:
    """What to use for the forget `images`.

    A number is taken as given. Without one images of 1x28x28 are compared by the papers' 10, unless it calls
    a picture that shows nothing a match; then, and at any other size, the threshold is calibrated on
    `retain`.

    Args:
        threshold: L2 distance between images scaled to [0, 1], or None.
        images: `[N, C, H, W]` in [-1, 1], the images to forget.
        retain: `[M, C, H, W]` in [-1, 1], some of the images to keep, or None.

    Raises:
        TypeError, ValueError: for an argument outside its range; a threshold within which there is a picture
            that shows nothing; none given, and nothing to calibrate it on.
    """
    _images(images, retain)
    papers = PAPERS_THRESHOLD if images.shape[1:] == PAPERS_SHAPE else None
    if threshold is not None:
        refuse_empty_matches(threshold, images, retain)
        return _threshold(float(threshold), "given", images, retain)
    reason = f"the papers' {PAPERS_THRESHOLD:g} belongs to images of {_size(PAPERS_SHAPE)}"
    # Where the papers' threshold cannot serve, the reason stands in the error of the case that nothing can.
    if papers is not None:
        try:
            refuse_empty_matches(papers, images, retain)
            return _threshold(papers, f"the papers', for images of {_size(PAPERS_SHAPE)}", images, retain)
        except ValueError as error:
            reason = f"the papers' {papers:g} cannot serve here: {error}"
    if retain is None:
        raise ValueError(
            "threshold: expected a number, or images to keep to calibrate one on, "
            f"for images of {_size(images.shape[1:])}, got neither ({reason})"
        )
    value, how = calibrate(images, retain)
    return Threshold(value, how, value, papers, _near(images, retain, value))


def calibrate(images: Tensor, retain: Tensor) -> tuple[float, str]:
    """A threshold from the images themselves, and how it was found, in words.

    It is the 0.1 % quantile of the distances among different images to keep (copies, up to 5 grey levels
    apart, are left out), and at most half the distance from a forget image to the nearest picture that shows
    nothing: a match is then nearer to the forget image than to that picture.

    Args:
        images: `[N, C, H, W]` in [-1, 1], the images to forget.
        retain: `[M, C, H, W]` in [-1, 1]; at most 1,000 of them, evenly chosen, are compared with each other.

    Raises:
        TypeError, ValueError: shapes that do not fit, fewer than two different images to keep, or a forget
            image that is constant.
    """
    _images(images, retain)
    some = evenly(retain)
    flat = some.float().flatten(1) / 2
    # Not by a matrix product, which would round away the distances of near-duplicates.
    apart = torch.cdist(flat, flat, compute_mode="donot_use_mm_for_euclid_dist")
    first, second = torch.triu_indices(len(some), len(some), offset=1)
    apart = apart[first, second]
    apart = apart[apart > COPY * math.sqrt(flat.shape[1])]
    if len(apart) == 0:
        raise ValueError(
            "retain: expected at least two different images to calibrate the threshold on, "
            f"got {len(some)} (copies count once)"
        )
    quantile = float(torch.quantile(apart, QUANTILE))
    among = (
        f"the {QUANTILE:.1%} quantile of the {len(apart):,} distances "
        f"among different ones of {len(some):,} images to keep"
    )
    # Within half the distance of a forget image to a picture that shows nothing, a match is nearer to the
    # forget image than to that picture (triangle inequality).
    distance, row, picture = _nearest_empty(images, retain)
    _refuse_empty_image(distance, row, picture)
    if distance / 2 < quantile:
        half = f"half the distance of forget image {row} to {picture}, {distance:.4g}"
        return distance / 2, f"{half}; below {among}, {quantile:.4g}"
    return quantile, among


def resolve(threshold: float | None, image: Tensor) -> float:
    """The threshold for one `image` (`[C, H, W]` or `[1, C, H, W]`) of which nothing else is known.

    Raises:
        TypeError, ValueError: as `choose`.
    """
    return choose(threshold, image if image.ndim == 4 else image[None]).value


def refuse_empty_matches(threshold: float, images: Tensor, retain: Tensor | None = None) -> None:
    """Refuses a threshold that calls a picture which shows nothing one of `images` `[N, C, H, W]`.

    Such pictures are the constant one that is nearest to an image, the noise that sampling starts from,
    clipped to [-1, 1], and the mean of `retain`.

    Raises:
        TypeError, ValueError: such a threshold, or one that is no positive number.
    """
    threshold = check.number("threshold", threshold, low=0, low_open=True)
    distance, row, picture = _nearest_empty(images, retain)
    _refuse_empty_image(distance, row, picture)
    if distance <= threshold:
        raise ValueError(
            f"threshold: expected less than {distance:.4g}, the distance of forget image {row} to {picture}, "
            f"got {threshold:g}: it would call a picture that shows nothing a match"
        )


def evenly(retain: Tensor) -> Tensor:
    """Those rows of `retain` `[M, C, H, W]` that are compared with each other."""
    return retain[even_rows(len(retain), retain[0].numel())]


def even_rows(length: int, elements: int) -> Tensor:
    """Which of `length` rows of so many elements each to compare with each other: int64, ascending."""
    most = max(2, min(MOST_IMAGES, MOST_BYTES // (4 * elements)))
    return torch.linspace(0, length - 1, min(most, length), dtype=torch.float64).round().long()


def _nearest_empty(images: Tensor, retain: Tensor | None) -> tuple[float, int, str]:
    """The smallest distance of an image to a picture that shows nothing, the image's row, what it is."""
    # Halves, because distances are those of [0, 1] pixels.
    images = images.detach().cpu().float() / 2
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(NOISE_PICTURES, *images.shape[1:], generator=generator).clamp(-1, 1) / 2
    # The nearest constant picture is the mean of each channel.
    constant = images.mean(dim=(2, 3), keepdim=True)
    apart = {
        "the nearest constant picture": (images - constant).flatten(1).norm(dim=1),
        "clipped Gaussian noise": torch.cdist(images.flatten(1), noise.flatten(1)).amin(1),
    }
    if retain is not None:
        mean = retain.float().mean(0).cpu() / 2
        apart["the mean of the images to keep"] = (images - mean).flatten(1).norm(dim=1)
    candidates = []
    for picture, distance in apart.items():
        nearest = distance.min(dim=0)
        candidates.append((nearest.values.item(), nearest.indices.item(), picture))
    return min(candidates)


def _near(images: Tensor, retain: Tensor | None, threshold: float) -> int | None:
    """How many of the images to keep are within `threshold` of one to forget, and no copies of it."""
    if retain is None:
        return None
    some = evenly(retain)
    copy = COPY * math.sqrt(some[0].numel())
    near = torch.zeros(len(some), dtype=torch.bool)
    for image in images:
        apart = distances(some, image)
        near |= ((apart < threshold) & (apart > copy)).cpu()
    return int(near.sum())


def _threshold(value: float, how: str, images: Tensor, retain: Tensor | None) -> Threshold:
    """A threshold that stands by itself, with the calibrated one beside it where there can be one."""
    papers = PAPERS_THRESHOLD if images.shape[1:] == PAPERS_SHAPE else None
    calibrated = None
    if retain is not None:
        with suppress(ValueError):
            calibrated, _ = calibrate(images, retain)
    return Threshold(value, how, calibrated, papers, _near(images, retain, value))


def _images(images: Tensor, retain: Tensor | None) -> None:
    """That both are finite images of one shape."""
    finite.rows("images", check.images("images", images))
    if retain is not None:
        finite.rows("retain", check.images("retain", retain))
        if retain.shape[1:] != images.shape[1:]:
            raise ValueError(
                f"retain: expected images of the forget images' shape, {tuple(images.shape[1:])}, "
                f"got {tuple(retain.shape[1:])}"
            )


def _refuse_empty_image(distance: float, row: int, picture: str) -> None:
    """Refuses a forget image that shows nothing itself: everything that a network draws might be it."""
    if distance < SAME:
        raise ValueError(
            f"images: expected images to forget that show something, got forget image {row}, "
            f"which equals {picture}"
        )


def _size(shape) -> str:
    return "x".join(map(str, shape))
