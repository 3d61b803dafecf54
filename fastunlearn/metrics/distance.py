"""How far two images are apart, in the papers' unit."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _check, _finite

ROUNDING = 1e-2  # bfloat16 has eight bits: an image in [-1, 1] may come out of it a little larger


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
    _pixels("samples", samples)
    image = _pixels("image", image if image.ndim == 4 else image[None])
    if image.shape != (1, *samples.shape[1:]):
        raise ValueError(
            f"image: expected one image of the samples' shape, {tuple(samples.shape[1:])}, "
            f"got {tuple(image.shape)}"
        )
    return ((samples.float() - image.to(samples.device).float()) / 2).flatten(1).norm(dim=1)


def _pixels(name: str, images: Tensor) -> Tensor:
    """Images `[N, C, H, W]` in [-1, 1]; of others, such as floats up to 255, no sample would be near."""
    _finite.rows(name, _check.images(name, images))
    low, high = (bound.item() for bound in torch.aminmax(images))
    if max(-low, high) > 1 + ROUNDING:
        raise ValueError(f"{name}: expected values in [-1, 1], got values in [{low:.6g}, {high:.6g}]")
    return images
