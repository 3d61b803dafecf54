"""What every reader is told and returns, and the one place that decides which axis of an array is which."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ImageColor

from ..host import check, room
from .refusals import Refused, listed

EXIF = ("apply", "ignore")
CROPS = ("center", "stretch", "none")
FILTERS = ("nearest", "box", "bilinear", "hamming", "bicubic", "lanczos")
ALPHA_WORDS = ("refuse", "drop")
NOT_OF_PICTURES = ("labels", "latents", "npz_key", "show_progress")
# An axis of such a length in the second or last place holds channels: grey, RGB, and latents of four.
CHANNEL_COUNTS = (1, 3, 4)


@dataclass(frozen=True)
class Options:
    """The wishes of the caller of `load_images`."""

    size: tuple[int, int] | None = None  # (height, width)
    channels: int | None = None
    labels: bool = False
    latents: bool = False
    npz_key: str | None = None
    show_progress: bool = False
    # Of encoded images:
    exif: str = "apply"
    crop: str = "center"
    resample: str = "bilinear"
    alpha: str = "refuse"  # or "drop", or a colour

    def __post_init__(self) -> None:
        check.one_of("exif", self.exif, EXIF)
        check.one_of("crop", self.crop, CROPS)
        check.one_of("resample", self.resample, FILTERS)
        _check_alpha(self.alpha)
        if self.npz_key is not None and not isinstance(self.npz_key, str):
            raise TypeError(f"npz_key: expected a name, or None, got {check.describe(self.npz_key)}")

    def of_pictures(self) -> dict[str, Any]:
        """What decides which rows encoded images become, for the record of a run."""
        return {name: value for name, value in asdict(self).items() if name not in NOT_OF_PICTURES}


@dataclass(frozen=True)
class Part:
    """The rows of one path: `images` and, of latents, `std` or None, `[N, C, H, W]`; `labels` `[N]` or None.

    `files` is how many files they came from; the rest of a folder is in `passed_over` and `entered_before`.
    """

    images: np.ndarray
    labels: np.ndarray | None = None
    std: np.ndarray | None = None
    files: int = 1
    passed_over: Sequence[Path] = ()
    entered_before: Sequence[Path] = ()


@dataclass(frozen=True)
class Reading:
    """What `load_images` has read, and what it has passed over. `str()` says it in a line."""

    rows: int
    files: int  # that the rows came from
    passed_over: tuple[str, ...]  # files that are no images and known to lie beside them
    entered_before: tuple[str, ...]  # further paths to folders whose files were read by another path, once
    options: dict[str, Any]  # size, channels, exif, crop, resample, alpha

    def __str__(self) -> str:
        parts = [f"{_number(self.rows, 'row')} from {_number(self.files, 'file')}"]
        if self.passed_over:
            parts.append(f"passed over {_number(len(self.passed_over), 'file')}: {listed(self.passed_over)}")
        if self.entered_before:
            parts.append(f"read once, though other paths lead there, too: {listed(self.entered_before)}")
        return "; ".join(parts)

    def record(self) -> dict[str, Any]:
        """Numbers and options, for the record of a run. No names: that of a file may be that of a person."""
        return {
            "rows": self.rows,
            "files": self.files,
            "passed_over": len(self.passed_over),
            "folders_entered_before": len(self.entered_before),
            "options": self.options,
        }


def to_nchw(array: np.ndarray, name: str | Path, options: Options) -> np.ndarray:
    """A view of `array` as `[N, C, H, W]`; the rule is in `load_images`.

    Args:
        array: `[N, C, H, W]`, `[N, H, W, C]`, `[N, H, W]` (grey), or one image if `options.channels` says so.
        name: what errors call it.
        options: whose `channels` decide what is ambiguous, and whose `size` the images must have.

    Raises:
        ValueError: the layout is ambiguous, or channels and size are not those asked for.
    """
    shape = list(array.shape)
    if array.ndim not in (3, 4):
        raise ValueError(
            f"{name}: expected an array [N, C, H, W], [N, H, W, C] or [N, H, W], got shape {shape}"
        )
    if array.ndim == 3:
        array = _with_fourth_axis(array, name, options.channels)
    images = _channels_second(array, name, options.channels, shape)
    if options.size is not None and images.shape[2:] != options.size:
        height, width = options.size
        expected = f"images of {height} x {width} (arrays are not resized)"
        raise ValueError(f"{name}: expected {expected}, got shape {shape}")
    return images


def _with_fourth_axis(array: np.ndarray, name: str | Path, channels: int | None) -> np.ndarray:
    """Grey images `[N, H, W]` as `[N, 1, H, W]`, or one image as the only row.

    Raises:
        ValueError: they may be either.
    """
    shape = list(array.shape)
    # Who asks for more than one channel has one image, [C, H, W] or [H, W, C]: grey images have one channel.
    if channels not in (None, 1):
        return array[None]
    # An axis of 1 in the last place, or of 3 or 4 in the first or last, may be that of channels.
    may_be_channels = shape[2] == 1 or (channels is None and {shape[0], shape[2]} & {3, 4})
    if may_be_channels:
        got = f"shape {shape}, which may be a single image: give channels=..., or add an axis"
        raise ValueError(f"{name}: expected grey images [N, H, W], got {got}")
    return array[:, None]


def _channels_second(
    array: np.ndarray, name: str | Path, channels: int | None, shape: list[int]
) -> np.ndarray:
    """`[N, C, H, W]` or `[N, H, W, C]` as a view `[N, C, H, W]`; errors show `shape`.

    Raises:
        ValueError: both or neither of the two places could be that of the channels.
    """
    if channels is None:
        counts, wanted = CHANNEL_COUNTS, "channels"
        hint = "give channels=..., or reshape it to [N, C, H, W]"
    else:
        counts = (channels,)
        wanted = "1 channel" if channels == 1 else f"{channels} channels"
        hint = "reshape it to [N, C, H, W]"
    second, last = array.shape[1] in counts, array.shape[3] in counts
    if second == last:
        which = "both" if second else "neither"
        expected = f"{wanted} in the second or the last axis"
        raise ValueError(
            f"{name}: expected {expected}, got shape {shape}, where {which} could be meant: {hint}"
        )
    if second:
        return array
    return array.transpose(0, 3, 1, 2)


def stack(
    rows: Iterable[tuple[str, np.ndarray | ValueError]],
    count: int,
    where: str | Path = "",
    unit: str = "files",
) -> np.ndarray:
    """`count` named arrays of one shape and dtype as one array, filled row by row.

    Args:
        rows: names and arrays `[C, H, W]`; an error in place of an array says why there is none.
        count: how many rows there should be.
        where, unit: for `Refused`.

    Returns:
        `[count, C, H, W]`, of the dtype of the first array.

    Raises:
        Refused: naming all without an array, and all that differ from the first.
        ValueError: there are more rows or fewer, or so many that they do not fit into memory.
    """
    images = first_name = None
    problems = []
    seen = 0
    for row, (name, array) in enumerate(rows):
        seen = row + 1
        if seen > count:
            break
        if isinstance(array, ValueError):
            problems.append(str(array))
            continue
        # Memory for all rows is taken once, when the first array tells shape and dtype, so that the rows are
        # never held twice.
        if images is None:
            room.require_for(where, "a set of images", count * array.nbytes)
            images, first_name = np.empty((count, *array.shape), array.dtype), name
        elif (array.shape, array.dtype) != (images.shape[1:], images.dtype):
            expected = f"{_layout(images[0])}, as {first_name} (size=... and channels=... make images alike)"
            problems.append(f"{name}: expected {expected}, got {_layout(array)}")
            continue
        images[row] = array
    if problems:
        raise Refused(problems, where, count, unit)
    # A table may hold fewer rows than it says. The rest of `images` would be whatever the memory held.
    if seen != count:
        got = "more" if seen > count else seen
        raise ValueError(f"{where}: expected {count} {unit}, as it says itself, got {got}")
    return images


def _layout(image: np.ndarray) -> str:
    return f"[C, H, W] = {list(image.shape)} {image.dtype}"


def _number(count: int, noun: str) -> str:
    if count == 1:
        return f"{count} {noun}"
    return f"{count} {noun}s"


def _check_alpha(alpha: str) -> None:
    """That `alpha` is one of the two words, or a colour that Pillow knows and that hides what is under it."""
    expected = "alpha: expected 'refuse', 'drop' or an opaque colour such as 'white' or '#ffffff'"
    if not isinstance(alpha, str):
        raise TypeError(f"{expected}, got {check.describe(alpha)}")
    if alpha in ALPHA_WORDS:
        return
    try:
        colour = ImageColor.getrgb(alpha)
    except ValueError:
        raise ValueError(f"{expected}, got {alpha!r}") from None
    if len(colour) != 3:
        raise ValueError(f"{expected}, got {alpha!r}, which is transparent itself")
