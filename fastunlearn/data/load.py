"""load_images: looks at each path, lets the reader of its format read it, and puts the parts into one store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..host import check
from ..host.store import ImageStore
from .arrays import read_idx_images, read_npy, read_npz
from .folders import read_folder
from .latents import is_latents_folder, read_latents
from .options import Options, Part, Reading
from .pictures import SUFFIXES, content_in_words, may_be_picture, read_picture
from .refusals import Refused, in_words, shown
from .tables import read_parquet, read_saved_dataset

REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
FORMATS = "a folder of images, an image, .npy, .npz, idx (also .gz), .parquet or a data set saved by datasets"


def load_images(
    paths: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    labels: bool = False,
    latents: bool = False,
    exif: str = "apply",
    crop: str = "center",
    resample: str = "bilinear",
    alpha: str = "refuse",
    tell: Callable[[Reading], None] | None = None,
) -> ImageStore:
    """Reads images (or latents) from one or more paths; several are joined in the given order, in memory.

    | path | rows |
    |---|---|
    | folder, image file | every file below it, sorted by path: 8-bit images, told by their content; uint8 |
    | `.npy` | the array; stays on disk (memory-mapped) |
    | `.npz` | its array `images`, or the only one beside `labels`; of latents, also `mean` with `std` |
    | idx, plain or `.gz` | uint8 in three or four axes; a plain one stays on disk |
    | `.parquet` | column `image` or `img`: encoded images as `struct{bytes, path}`, or nested lists |
    | folder of `datasets.save_to_disk` | the same columns |
    | with `latents=True`, folder of `save_latents` | `mean.npy` and, where there is one, `std.npy`, `[N, C, H, W]`; stay on disk |

    No row is left out silently. A file below a folder is read or named in an error, whatever its name: hidden
    ones, and those behind links to folders, too; a folder that several paths lead to is read once. Only
    `.DS_Store`, `Thumbs.db`, `desktop.ini`, `metadata.jsonl` and `metadata.csv` are passed over, which a
    warning says, or `tell`. One error names all files, or rows of a table, that cannot be read: the first 20,
    and how many there are.

    Formats are PNG, JPEG, WebP, BMP, TIFF, GIF and, where Pillow has it, AVIF, of one frame and at most 8
    bits a channel. Palettes become the colours they stand for; CMYK is converted as Pillow does it, without
    profiles.

    uint8 stays uint8. Arrays may be `[N, C, H, W]`, `[N, H, W, C]` or `[N, H, W]` (grey): an axis of length
    1, 3 or 4 in the second or last place is C. Where both or neither fit, or three axes may be one image,
    `channels` decides; what stays ambiguous is refused. Parquet and `datasets` need `pip install
    "fastunlearn[hf]"`.

    Args:
        paths: a path, or several.
        size: height and width, or one number for both, which encoded images are made to fit (`crop`,
            `resample`); arrays must have it. Without it all images must have one size.
        channels: 1 or 3 converts encoded images to grey or RGB; without it all must be of one of these modes.
            Arrays must have this many channels.
        labels: read class labels too: `labels` of an npz, the labels file beside idx images, column `label`
            or `labels` of a table, or, for a folder, the names of its sub-folders, numbered in sorted order.
        latents: the rows are latents: float arrays of any finite value, multiplied by the VAE's scaling
            factor, as are their standard deviations.
        exif: `"apply"`: encoded images are turned upright as their EXIF orientation says. `"ignore"`: pixels
            as stored.
        crop: with `size`: `"center"` cuts an encoded image about its centre to the aspect ratio of `size`,
            `"stretch"` distorts it, `"none"` refuses one of another aspect ratio. Then it is resized.
        resample: with `size`, Pillow's filter: nearest, box, bilinear, hamming, bicubic or lanczos.
        alpha: what becomes of encoded images with pixels that are not opaque. `"refuse"`: an error. `"drop"`:
            the colours behind the transparency, as `convert("RGB")` leaves them in most training scripts. A
            colour, `"white"` or `"#rrggbb"`: it is put under them.
        tell: called with a `Reading` once all is read: rows, files, what was passed over, options. None: a
            warning if anything was passed over.

    Raises:
        ValueError: naming the files: missing, damaged, pickled or of unknown format; images of different size
            or mode; float images outside [-1, 1]; NaN or Inf; an image of more pixels than Pillow allows;
            labels asked for and not there; an option outside its choices.
        TypeError: `paths`, `size`, `channels`, `alpha` or `tell` of another type; an array whose dtype is
            neither uint8 nor a float.
        ImportError: an optional package is missing; the text names the command that installs it.
    """
    paths = (
        [paths] if isinstance(paths, (str, os.PathLike)) or not isinstance(paths, Iterable) else list(paths)
    )
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"paths: expected a path or several, got {check.describe(path)}")
    paths = [Path(path) for path in paths]
    if not paths:
        raise ValueError("paths: expected at least one path, got none")
    _check_apart(paths)
    if tell is not None and not callable(tell):
        raise TypeError(f"tell: expected a function of a Reading, or None, got {check.describe(tell)}")
    channels = None if channels is None else check.integer("channels", channels, low=1)
    pictures = {"exif": exif, "crop": crop, "resample": resample, "alpha": alpha}
    options = Options(_height_and_width(size), channels, bool(labels), bool(latents), **pictures)
    parts = _read_all(paths, options)
    _check_alike(paths, parts)
    try:
        images, std = (
            _joined([part.images for part in parts]),
            None if parts[0].std is None else _joined([part.std for part in parts]),
        )
        store = ImageStore(
            images,
            std=std,
            labels=_joined([part.labels for part in parts]) if labels else None,
            latents=latents,
            sources=paths,
        )
    except (TypeError, ValueError) as error:
        raise type(error)(f"{', '.join(map(str, paths))}: {error}") from None
    reading = _reading(parts, options)
    if tell is not None:
        tell(reading)
    elif reading.passed_over or reading.entered_before:
        warnings.warn(f"{', '.join(map(str, paths))}: {reading}", stacklevel=2)
    return store


def _check_apart(paths: list[Path]) -> None:
    """
    Raises:
        ValueError: a path is given twice, or beside a folder that it lies in: its rows would count twice.
    """
    real = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        others = {other for index, other in enumerate(real) if index != place}
        if real[place] in real[:place]:
            raise ValueError(f"paths: expected every path once, got {path} a second time")
        if others & set(real[place].parents):
            raise ValueError(f"paths: expected every path once, got {path} and a folder that it lies in")


def _read_all(paths: list[Path], options: Options) -> list[Part]:
    """The parts of all paths, or one error about what of any of them cannot be read."""
    parts, refusals = [], []
    for path in paths:
        try:
            parts.append(_read(path, options))
        except Refused as refused:
            refusals.append(refused)
    if refusals:
        raise ValueError(in_words(refusals, fine=sum(part.files for part in parts)))
    return parts


def _reading(parts: list[Part], options: Options) -> Reading:
    rows, files = sum(len(part.images) for part in parts), sum(part.files for part in parts)
    passed_over = tuple(str(path) for part in parts for path in part.passed_over)
    entered_before = tuple(str(path) for part in parts for path in part.entered_before)
    return Reading(rows, files, passed_over, entered_before, options.of_pictures())


def _read(path: Path, options: Options) -> Part:
    suffix = path.suffix.lower()
    if path.is_dir():
        return _read_directory(path, options)
    if not path.is_file():
        special = "a pipe, a socket or a device, which is never opened"
        got = special if path.exists() else "a path that does not exist"
        raise Refused([f"{shown(path)}: expected {FORMATS}, got {got}"], path)
    readers = {".npy": read_npy, ".npz": read_npz, ".parquet": read_parquet}
    if suffix in readers:
        return readers[suffix](path, options)
    if suffix in SUFFIXES or may_be_picture(path):
        return read_picture(path, options)
    if suffix not in REFUSED and ("idx" in path.name or suffix == ".gz" or path.name.endswith("ubyte")):
        return read_idx_images(path, options)
    got = f"a file that ends in {suffix}: " if suffix else "a file without an ending: "
    got += content_in_words(path)
    if suffix in REFUSED:
        got = f"{suffix}: such files are pickles, and unpickling runs whatever code they hold"
    raise Refused([f"{shown(path)}: expected {FORMATS}, got {got}"], path)


def _read_directory(path: Path, options: Options) -> Part:
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        raise ValueError(
            f"{path}: expected one split of the saved data set, such as {path / (splits or ['train'])[0]}, got the folder of all splits"
        )
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return read_saved_dataset(path, options)
    if options.latents and is_latents_folder(path):
        return read_latents(path, options)
    return read_folder(path, options)


def _check_alike(paths: list[Path], parts: list[Part]) -> None:
    first = parts[0].images
    for path, part in zip(paths, parts, strict=True):
        if part.images.shape[1:] != first.shape[1:]:
            raise ValueError(
                f"{path}: expected rows of shape {list(first.shape[1:])}, as in {paths[0]}, got {list(part.images.shape[1:])}"
            )
        if part.images.dtype != first.dtype:
            raise ValueError(
                f"{path}: expected dtype {first.dtype}, as in {paths[0]}, got {part.images.dtype}"
            )
        dtype, expected = (None if std is None else std.dtype for std in (part.std, parts[0].std))
        if dtype != expected:
            raise ValueError(
                f"{path}: expected standard deviations of dtype {expected}, as in {paths[0]} (None: without), got {dtype}"
            )


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    # one array, if it is a file, stays on disk
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _height_and_width(size) -> tuple[int, int] | None:
    if size is None:
        return None
    pair = (size, size) if isinstance(size, int) else size
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise TypeError(f"size: expected an integer or (height, width), got {size!r}")
    return tuple(check.integer("size", length, low=1) for length in pair)
