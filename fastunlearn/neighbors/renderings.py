"""What a picture becomes in another copy: turned or mirrored, resized there and back, compressed.

Pictures are grey levels 0..255 in float32 on the CPU. They are compared in a reduced size, `[n, C, H, W]` as
`[n, C, h, w]` with `h, w <= LARGEST_SIDE`, by averages over areas, which is the same in every orientation.
"""

from __future__ import annotations

import io
import itertools

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_SIDE = 32
FILTERS = ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")  # Pillow's names
SAME = 0.04  # how far the weights of two ways to resize may differ that count as one
# The resizing that changes nothing, which is the first version of every picture.
UNCHANGED = ("BOX", 1.0)
JPEG_QUALITY, JPEG_BLOCK = 50, 8


# --- orientations -------------------------------------------------------------------------------------------


def orientations(height: int, width: int) -> tuple[int, ...]:
    """Those that keep the shape. Number o turns by `o % 4` quarters and then, from 4 on, mirrors."""
    if height == width:
        return tuple(range(8))
    return (0, 2, 4, 6)


def oriented(images: Tensor, orientation: int) -> Tensor:
    """`images` `[..., H, W]` in another orientation."""
    turned = images.rot90(orientation % 4, (-2, -1))
    if orientation >= 4:
        return turned.flip(-1)
    return turned


def upright(images: Tensor, orientation: int) -> Tensor:
    """Undoes `oriented`."""
    if orientation >= 4:
        images = images.flip(-1)
    return images.rot90(-(orientation % 4), (-2, -1))


def in_words(orientation: int) -> str:
    """Empty for a copy that stands as the image does."""
    parts = []
    if orientation % 4 != 0:
        parts.append(f"turned by {90 * (orientation % 4)} degrees")
    if orientation >= 4:
        parts.append("mirrored")
    return " and ".join(parts)


# --- sizes --------------------------------------------------------------------------------------------------


def grey_levels(images: Tensor) -> Tensor:
    """Rows of a store, uint8 or float in [-1, 1], as float32 in 0..255 on the CPU."""
    values = images.cpu().float()
    if images.dtype == torch.uint8:
        return values
    return (values + 1) * 127.5


def reduced_size(height: int, width: int) -> tuple[int, int]:
    """`(h, w)` in which images of `(H, W)` are compared."""
    factor = max(1.0, max(height, width) / LARGEST_SIDE)
    return max(1, round(height / factor)), max(1, round(width / factor))


def reduced(images: Tensor) -> Tensor:
    """`[n, C, H, W]` to `[n, C, h, w]`; the images themselves where they are small."""
    size = reduced_size(*images.shape[-2:])
    if size == tuple(images.shape[-2:]):
        return images
    return F.adaptive_avg_pool2d(images, size)


def all_scales(height: int, width: int) -> list[float]:
    """From half the size to double: every size in pixels, of larger images fewer."""
    side = min(height, width)
    if side <= LARGEST_SIDE:
        return [size / side for size in range(-(-side // 2), 2 * side + 1)]
    # The more an image is reduced, the less of a resizing shows.
    count = 16 if side < 4 * LARGEST_SIDE else 4
    smaller = np.linspace(0.5, 1, count, endpoint=False)
    larger = np.linspace(2, 1, count // 2, endpoint=False)
    return [*smaller, *larger]


class Resizes:
    """Images as they are, and resized there and back by every filter and scale, in the reduced size.

    Args:
        height, width: of the images.
        scales: sizes in between, of the size of the images.
        filters: Pillow's names.

    Attributes:
        left: `[V, h, H]`, and right `[V, W, w]`: what resizing does is linear, `left[v] @ image @ right[v]`.
            The first pair resizes nothing; pairs that do nearly the same as one before are left out.
    """

    def __init__(self, height: int, width: int, scales: list[float], filters: tuple[str, ...] = FILTERS):
        # Filters of Pillow work on one axis after the other, so a way to resize is a pair of matrices, one
        # for each axis. Here the pairs are lines, [V, h * H + w * W], to be compared with each other.
        reduced_height, reduced_width = reduced_size(height, width)
        pairs = np.empty((0, reduced_height * height + reduced_width * width), np.float32)
        for name, scale in (UNCHANGED, *itertools.product(filters, scales)):
            left = _there_and_back(height, max(1, round(height * scale)), name, reduced_height)
            right = _there_and_back(width, max(1, round(width * scale)), name, reduced_width)
            pair = np.concatenate([left.ravel(), right.ravel()])
            differences = np.abs(pairs - pair).max(axis=1, initial=0)
            if not (differences <= SAME).any():
                pairs = np.concatenate([pairs, pair[None]])
        left, right = np.split(pairs, [reduced_height * height], axis=1)
        self.left = torch.from_numpy(left.reshape(-1, reduced_height, height))
        self.right = torch.from_numpy(right.reshape(-1, reduced_width, width)).mT.contiguous()

    def __len__(self) -> int:
        return len(self.left)

    def __call__(self, images: Tensor) -> Tensor:
        """`[n, C, H, W]` to `[n, V, C, h, w]`."""
        return (self.left[:, None] @ images[:, None] @ self.right[:, None]).clamp_(0, 255)

    def one(self, number: int, images: Tensor) -> Tensor:
        """The version `number` alone, `[n, C, h, w]`."""
        if number == 0:
            return reduced(images)
        return (self.left[number] @ images @ self.right[number]).clamp_(0, 255)


def _there_and_back(side: int, size: int, name: str, reduced_side: int) -> np.ndarray:
    """float32 `[reduced_side, side]`: an axis of `side` pixels resized to `size` and back, and reduced."""
    from PIL import Image

    # Resizing an identity matrix along one axis gives the matrix of the resizing. As floats, which Pillow
    # does not round.
    axis = Image.fromarray(np.eye(side, dtype=np.float32))
    there = axis.resize((side, size), Image.Resampling[name])
    back = np.array(there.resize((side, side), Image.Resampling[name]))
    return F.adaptive_avg_pool1d(torch.from_numpy(back).T[None], reduced_side)[0].T.numpy()


# --- compression --------------------------------------------------------------------------------------------


def change_by_jpeg(image: Tensor) -> float:
    """How far, in the reduced size, a JPEG of quality `JPEG_QUALITY` lies from `image` `[C, H, W]`.

    The larger of two: with its blocks where they would be, and moved by half a block, because a picture that
    was such a JPEG before hardly changes in its own blocks.
    """
    half = JPEG_BLOCK // 2
    moved = F.pad(image[None], (half,) * 4, mode="replicate")[0]
    copies = torch.stack([_jpeg(image), _jpeg(moved)[:, half:-half, half:-half]])
    return reduced(copies - image).flatten(1).norm(dim=1).max().item()


def _jpeg(image: Tensor) -> Tensor:
    """`[C, H, W]` written and read: in colour where C is 3, else channel by channel."""
    from PIL import Image

    from ..data.content import formats

    def compressed(pixels: Tensor) -> Tensor:
        file = io.BytesIO()
        Image.fromarray(pixels.contiguous().numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
        return torch.from_numpy(np.array(Image.open(file, formats=formats()))).float()

    pixels = image.round().clamp(0, 255).to(torch.uint8)
    if len(image) == 3:
        return compressed(pixels.movedim(0, -1)).movedim(-1, 0)
    return torch.stack([compressed(channel) for channel in pixels])
