"""How far two images are apart, in the papers' unit."""

from __future__ import annotations

from torch import Tensor

from ..host import finite


def distances(samples: Tensor, image: Tensor) -> Tensor:  # [N]
    """L2 distances of `samples` to `image`, in units of [0, 1] pixels.

    Args:
        samples: `[N, C, H, W]` in [-1, 1].
        image: `[C, H, W]` or `[1, C, H, W]` in [-1, 1].

    Returns:
        float32 `[N]`.

    Raises:
        TypeError, ValueError: shapes that do not fit, no samples, or values outside [-1, 1].
        NotFiniteError: a ValueError; NaN or Inf in a sample or the image, which nothing is near to.
    """
    finite.pixels("samples", samples)
    if image.ndim != 4:
        image = image[None]
    finite.pixels("image", image)
    if image.shape != (1, *samples.shape[1:]):
        raise ValueError(
            f"image: expected one image of the samples' shape, {tuple(samples.shape[1:])}, "
            f"got {tuple(image.shape)}"
        )
    # ||s - x||_2 of pixels in [0, 1]: half of that of pixels in [-1, 1].
    difference = (samples.float() - image.to(samples.device).float()) / 2
    return difference.flatten(1).norm(dim=1)
