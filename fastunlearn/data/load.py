"""load_images: lets the reader of its format read each path, and puts the parts into one store."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from ..host import check, room
from ..host.store import ImageStore
from .arrays import read_idx_images, read_npy, read_npz
from .folders import read_folder
from .latents import is_latents_folder, read_latents
from .options import Options, Part, Reading
from .pictures import SUFFIXES, content_in_words, may_be_picture, read_picture
from .refusals import Refused, in_words, shown
from .tables import read_parquet, read_saved_dataset

# Endings of pickles, which are not even opened.
REFUSED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".joblib")
# What messages say is expected of a path.
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
    npz_key: str | None = None,
    show_progress: bool = False,
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
    | folder of `save_latents`, with `latents=True` | `mean.npy`, `std.npy` if any, `[N, C, H, W]`; on disk |

    No row is left out silently. A file below a folder is read or named in an error, whatever its name: hidden
    ones, and those behind links to folders, too; a folder that several paths lead to is read once. Only
    `.DS_Store`, `Thumbs.db`, `desktop.ini`, `metadata.jsonl` and `metadata.csv` are passed over, which a
    warning says, or `tell`. One error names all files, or rows of a table, that cannot be read: the first 20,
    and how many there are.

    Formats are PNG, JPEG, WebP, BMP, TIFF, GIF and, where Pillow has it, AVIF, of one frame and at most 8
    bits a channel; of the pictures in an MPO, a JPEG of many cameras, the first is read. Palettes become the
    colours they stand for; CMYK is converted as Pillow does it, without profiles.

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
        npz_key: the array that holds the images of .npz files with several.
        show_progress: a line and a progress bar for each folder of images.
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
    paths = _paths(paths)
    _check_apart(paths)
    if tell is not None and not callable(tell):
        raise TypeError(f"tell: expected a function of a Reading, or None, got {check.describe(tell)}")
    if channels is not None:
        channels = check.integer("channels", channels, low=1)
    options = Options(
        size=_height_and_width(size),
        channels=channels,
        labels=bool(labels),
        latents=bool(latents),
        exif=exif,
        crop=crop,
        resample=resample,
        alpha=alpha,
        npz_key=npz_key,
        show_progress=bool(show_progress),
    )
    if npz_key is not None and all(path.suffix.lower() != ".npz" for path in paths):
        raise ValueError(f"npz_key: expected None without a path that ends in .npz, got {npz_key!r}")

    parts = _read_all(paths, options)
    _check_alike(paths, parts)
    # The store looks at the values. Its errors name no file, so they get the paths here.
    try:
        store = _store_of(parts, options, paths)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{', '.join(map(str, paths))}: {error}") from None

    reading = _reading(parts, options)
    if tell is not None:
        tell(reading)
    elif reading.passed_over or reading.entered_before:
        warnings.warn(f"{', '.join(map(str, paths))}: {reading}", stacklevel=2)
    return store


def _paths(paths) -> list[Path]:
    """The argument `paths` of `load_images` as a list.

    Raises:
        TypeError: neither a path nor several.
        ValueError: none.
    """
    # A string is iterable, too, but it is one path.
    if isinstance(paths, (str, os.PathLike)) or not isinstance(paths, Iterable):
        paths = [paths]
    paths = list(paths)
    for path in paths:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"paths: expected a path or several, got {check.describe(path)}")
    if not paths:
        raise ValueError("paths: expected at least one path, got none")
    return [Path(path) for path in paths]


def _check_apart(paths: list[Path]) -> None:
    """That no row would count twice.

    Raises:
        ValueError: a path is given twice, or beside a folder that it lies in.
    """
    real = [path.resolve() for path in paths]
    for place, path in enumerate(paths):
        others = {*real[:place], *real[place + 1 :]}
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


def _store_of(parts: list[Part], options: Options, paths: list[Path]) -> ImageStore:
    """One store of the rows of all `parts`, which are alike."""
    images = _joined([part.images for part in parts])
    std = labels = None
    if parts[0].std is not None:
        std = _joined([part.std for part in parts])
    if options.labels:
        labels = _joined([part.labels for part in parts])
    return ImageStore(images, std=std, labels=labels, latents=options.latents, sources=paths)


def _reading(parts: list[Part], options: Options) -> Reading:
    """What the caller is told, or warned of."""
    passed_over: list[str] = []
    entered_before: list[str] = []
    for part in parts:
        passed_over += map(str, part.passed_over)
        entered_before += map(str, part.entered_before)
    return Reading(
        rows=sum(len(part.images) for part in parts),
        files=sum(part.files for part in parts),
        passed_over=tuple(passed_over),
        entered_before=tuple(entered_before),
        options=options.of_pictures(),
    )


def _read(path: Path, options: Options) -> Part:
    """The rows of one path, by the reader of its format."""
    if path.is_dir():
        return _read_directory(path, options)
    if not path.is_file():
        got = "a path that does not exist"
        if path.exists():
            got = "a pipe, a socket or a device, which is never opened"
        raise Refused([f"{shown(path)}: expected {FORMATS}, got {got}"], path)

    # Arrays and tables are told by their endings, images by their content, whatever their names say. What
    # remains is taken for idx if it is named as MNIST's files are, which have no ending of their own.
    suffix = path.suffix.lower()
    readers = {".npy": read_npy, ".npz": read_npz, ".parquet": read_parquet}
    if suffix in readers:
        return readers[suffix](path, options)
    if suffix in SUFFIXES or may_be_picture(path):
        return read_picture(path, options)
    named_like_idx = "idx" in path.name or suffix == ".gz" or path.name.endswith("ubyte")
    if named_like_idx and suffix not in REFUSED:
        return read_idx_images(path, options)

    if suffix in REFUSED:
        got = f"{suffix}: such files are pickles, and unpickling runs whatever code they hold"
    elif suffix:
        got = f"a file that ends in {suffix}: {content_in_words(path)}"
    else:
        got = f"a file without an ending: {content_in_words(path)}"
    raise Refused([f"{shown(path)}: expected {FORMATS}, got {got}"], path)


def _read_directory(path: Path, options: Options) -> Part:
    """The rows of one folder, told by the files that `datasets` and `save_latents` put into theirs."""
    if (path / "dataset_dict.json").is_file():
        splits = sorted(entry.name for entry in path.iterdir() if (entry / "state.json").is_file())
        example = path / (splits[0] if splits else "train")
        expected = f"one split of the saved data set, such as {example}"
        raise ValueError(f"{path}: expected {expected}, got the folder of all splits")
    if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
        return read_saved_dataset(path, options)
    if options.latents and is_latents_folder(path):
        return read_latents(path, options)
    return read_folder(path, options)


def _check_alike(paths: list[Path], parts: list[Part]) -> None:
    """That the rows of all paths can stand in one array.

    Raises:
        ValueError: naming the first path that differs from the first one, and in what.
    """
    shape, dtype, std_dtype = _kind(parts[0])
    for path, part in zip(paths, parts, strict=True):
        found_shape, found_dtype, found_std_dtype = _kind(part)
        if found_shape != shape:
            expected = f"rows of shape {shape}, as in {paths[0]}"
            raise ValueError(f"{path}: expected {expected}, got {found_shape}")
        if found_dtype != dtype:
            raise ValueError(f"{path}: expected dtype {dtype}, as in {paths[0]}, got {found_dtype}")
        if found_std_dtype != std_dtype:
            expected = f"standard deviations of dtype {std_dtype}, as in {paths[0]} (None: without)"
            raise ValueError(f"{path}: expected {expected}, got {found_std_dtype}")


def _kind(part: Part) -> tuple[list[int], np.dtype, np.dtype | None]:
    """Shape of a row, dtype of the rows, and that of their standard deviations, if there are any."""
    std_dtype = None if part.std is None else part.std.dtype
    return list(part.images.shape[1:]), part.images.dtype, std_dtype


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    # A single array is not copied: one that is memory-mapped stays on disk.
    if len(arrays) == 1:
        return arrays[0]
    room.require_for("paths", "a set of images", sum(array.nbytes for array in arrays))
    return np.concatenate(arrays)


def _height_and_width(size) -> tuple[int, int] | None:
    """The argument `size` as a pair."""
    if size is None:
        return None
    if isinstance(size, int):
        size = (size, size)
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size: expected an integer or (height, width), got {size!r}")
    height, width = size
    return check.integer("size", height, low=1), check.integer("size", width, low=1)
