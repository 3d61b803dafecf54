"""What every reader is told and returns, and the one place that decides which axis of an array is which."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

CHANNEL_COUNTS = (1, 3, 4)  # an axis of such a length in the second or last place holds channels


@dataclass(frozen=True)
class Options:
    """The wishes of the caller of `load_images`."""

    size: tuple[int, int] | None = None  # (height, width)
    channels: int | None = None
    labels: bool = False
    latents: bool = False


@dataclass(frozen=True)
class Part:
    """The rows of one path: `images` `[N, C, H, W]`, `labels` `[N]` or None, and of latents `std`, of the shape of `images`, or None."""

    images: np.ndarray
    labels: np.ndarray | None = None
    std: np.ndarray | None = None


def to_nchw(array: np.ndarray, name: str | Path, options: Options) -> np.ndarray:
    """A view of `array` as `[N, C, H, W]`; the rule is in `load_images`.

    Raises:
        ValueError: the layout is ambiguous, or channels and size are not those asked for.
    """
    shape, channels = list(array.shape), options.channels
    if array.ndim not in (3, 4):
        raise ValueError(f"{name}: expected an array [N, C, H, W], [N, H, W, C] or [N, H, W], got shape {shape}")
    if array.ndim == 3:
        one_image = channels not in (None, 1)  # [C, H, W] or [H, W, C]
        if not one_image and (shape[2] == 1 or (channels is None and {shape[0], shape[2]} & {3, 4})):
            raise ValueError(f"{name}: expected grey images [N, H, W], got shape {shape}, which may be a single image: give channels=..., or add an axis")
        array = array[None] if one_image else array[:, None]
    counts = CHANNEL_COUNTS if channels is None else (channels,)
    first, last = array.shape[1] in counts, array.shape[3] in counts
    if first == last:
        wanted = "channels" if channels is None else f"{channels} channel{'s' * (channels > 1)}"
        which = "both" if first else "neither"
        hint = "give channels=..., or reshape it to [N, C, H, W]" if channels is None else "reshape it to [N, C, H, W]"
        raise ValueError(f"{name}: expected {wanted} in the second or the last axis, got shape {shape}, where {which} could be meant: {hint}")
    images = array if first else array.transpose(0, 3, 1, 2)
    if options.size is not None and images.shape[2:] != options.size:
        raise ValueError(f"{name}: expected images of {options.size[0]} x {options.size[1]} (arrays are not resized), got shape {shape}")
    return images


def stack(rows: Iterable[tuple[str | Path, np.ndarray]], count: int) -> np.ndarray:
    """`count` named arrays of one shape and dtype as one array, filled row by row.

    Raises:
        ValueError: naming the first that differs.
    """
    images = first_name = None
    for row, (name, array) in enumerate(rows):
        if images is None:
            images, first_name = np.empty((count, *array.shape), array.dtype), name
        elif (array.shape, array.dtype) != (images.shape[1:], images.dtype):
            wanted, got = (f"[C, H, W] = {list(shape)} {dtype}" for shape, dtype in ((images.shape[1:], images.dtype), (array.shape, array.dtype)))
            raise ValueError(f"{name}: expected {wanted}, as {first_name} (size=... and channels=... make images alike), got {got}")
        images[row] = array
    return images
