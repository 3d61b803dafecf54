"""What a picture becomes in another copy: turned or mirrored, resized there and back, compressed.

Pictures are grey levels 0..255 in float32 on the CPU. They are compared in a reduced size, `[n, C, H, W]` as
`[n, C, h, w]` with `h, w <= LARGEST_SIDE`, by averages over areas, which is the same in every orientation.
"""

from __future__ import annotations

import io

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

LARGEST_SIDE = 32
FILTERS = ("NEAREST", "BOX", "BILINEAR", "HAMMING", "BICUBIC", "LANCZOS")  # Pillow's names
JPEG_QUALITY, JPEG_BLOCK = 50, 8


# --- orientations ----------------------------------------------------------------------------------------------------


def orientations(height: int, width: int) -> tuple[int, ...]:
    """Those that keep the shape. Number o turns by `o % 4` quarters and then, from 4 on, mirrors left and right."""
    return tuple(range(8)) if height == width else (0, 2, 4, 6)


def oriented(images: Tensor, orientation: int) -> Tensor:
    """`images` `[..., H, W]` in another orientation."""
    turned = images.rot90(orientation % 4, (-2, -1))
    return turned.flip(-1) if orientation >= 4 else turned


def upright(images: Tensor, orientation: int) -> Tensor:
    """Undoes `oriented`."""
    unmirrored = images.flip(-1) if orientation >= 4 else images
    return unmirrored.rot90(-(orientation % 4), (-2, -1))


def in_words(orientation: int) -> str:
    """Empty for a copy that stands as the image does."""
    turned = f"turned by {90 * (orientation % 4)} degrees" if orientation % 4 else ""
    mirrored = "mirrored" if orientation >= 4 else ""
    return " and ".join(part for part in (turned, mirrored) if part)


# --- sizes -----------------------------------------------------------------------------------------------------------


def grey_levels(images: Tensor) -> Tensor:
    """Rows of a store, uint8 or float in [-1, 1], as float32 in 0..255 on the CPU."""
    values = images.cpu().float()
    return values if images.dtype == torch.uint8 else (values + 1) * 127.5


def reduced_size(height: int, width: int) -> tuple[int, int]:
    """`(h, w)` in which images of `(H, W)` are compared."""
    factor = max(1.0, max(height, width) / LARGEST_SIDE)
    return max(1, round(height / factor)), max(1, round(width / factor))


def reduced(images: Tensor) -> Tensor:
    """`[n, C, H, W]` to `[n, C, h, w]`; the images themselves where they are small."""
    size = reduced_size(*images.shape[-2:])
    return images if size == tuple(images.shape[-2:]) else F.adaptive_avg_pool2d(images, size)


def all_scales(height: int, width: int) -> list[float]:
    """From half to double. Down: every size in pixels, or sixteen. Up, where sizes differ little: a few."""
    side = min(height, width)
    half = -(-side // 2)
    smaller = (
        np.unique(np.linspace(half, side - 1, min(side - half, LARGEST_SIDE // 2)).round())
        if side > 1
        else []
    )
    return [size / side for size in smaller] + [1.1, 1.25, 1.4, 1.5, 1.6, 1.75, 2.0]


class Resizes:
    """Images as they are, and resized there and back by every filter and scale, in the reduced size.

    Args:
        height, width: of the images.
        scales: sizes in between, of the size of the images.
        filters: Pillow's names.

    Attributes:
        left: `[V, h, H]`, and right `[V, W, w]`: what resizing does is linear, `left[v] @ image @ right[v]`. The
            first pair resizes nothing; pairs that do the same are there once.
    """

    def __init__(self, height: int, width: int, scales: list[float], filters: tuple[str, ...] = FILTERS):
        pairs = [(_there_and_back(height, height, "BOX"), _there_and_back(width, width, "BOX"))]
        for name in filters:
            for scale in scales:
                sizes = max(1, round(height * scale)), max(1, round(width * scale))
                pairs.append(
                    (_there_and_back(height, sizes[0], name), _there_and_back(width, sizes[1], name))
                )
        different = {(left.tobytes(), right.tobytes()): (left, right) for left, right in pairs}
        size = reduced_size(height, width)
        self.left, self.right = (
            F.adaptive_avg_pool1d(torch.from_numpy(np.stack(axes)).mT, length).mT.contiguous()
            for axes, length in zip(zip(*different.values(), strict=True), size, strict=True)
        )
        self.right = self.right.mT.contiguous()

    def __len__(self) -> int:
        return len(self.left)

    def __call__(self, images: Tensor) -> Tensor:
        """`[n, C, H, W]` to `[n, V, C, h, w]`."""
        return (self.left[:, None] @ images[:, None] @ self.right[:, None]).clamp_(0, 255)

    def one(self, number: int, images: Tensor) -> Tensor:
        """The version `number` alone, `[n, C, h, w]`."""
        return (
            reduced(images)
            if number == 0
            else (self.left[number] @ images @ self.right[number]).clamp_(0, 255)
        )


def _there_and_back(side: int, size: int, name: str) -> np.ndarray:
    """float32 `[side, side]`: what resizing to `size` and back makes of an axis of `side` pixels."""
    from PIL import Image

    axis = Image.fromarray(np.eye(side, dtype=np.float32))  # Pillow does not round floats
    there = axis.resize((side, size), Image.Resampling[name])
    return np.array(there.resize((side, side), Image.Resampling[name]))


# --- compression -----------------------------------------------------------------------------------------------------


def change_by_jpeg(image: Tensor) -> float:
    """How far, in the reduced size, a JPEG of quality `JPEG_QUALITY` lies from `image` `[C, H, W]`.

    The larger of two: with its blocks where they would be, and moved by half a block, because a picture that was
    such a JPEG before hardly changes in its own blocks.
    """
    half = JPEG_BLOCK // 2
    moved = F.pad(image[None], (half,) * 4, mode="replicate")[0]
    copies = torch.stack([_jpeg(image), _jpeg(moved)[:, half:-half, half:-half]])
    return reduced(copies - image).flatten(1).norm(dim=1).max().item()


def _jpeg(image: Tensor) -> Tensor:
    """`[C, H, W]` written and read: in colour where C is 3, else channel by channel."""
    from PIL import Image

    pixels = image.round().clamp(0, 255).to(torch.uint8)
    planes = [pixels.movedim(0, -1)] if len(image) == 3 else list(pixels)
    read = []
    for plane in planes:
        file = io.BytesIO()
        Image.fromarray(plane.contiguous().numpy()).save(file, "JPEG", quality=JPEG_QUALITY)
        read.append(torch.from_numpy(np.array(Image.open(file))).float())
    return read[0].movedim(-1, 0) if len(image) == 3 else torch.stack(read)
