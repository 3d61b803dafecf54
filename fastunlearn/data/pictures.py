"""Encoded images (png, jpg, ...) in files, folders and table cells, decoded by Pillow."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from .options import Options, Part, stack

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MODE = {1: "L", 3: "RGB"}
CHANNELS = {mode: channels for channels, mode in MODE.items()}
EIGHT_BIT_MODES = ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB")


def read_picture(path: Path, options: Options) -> Part:
    """One image file, as one row."""
    if options.labels:
        raise ValueError(f"{path}: expected labels too (labels=True), got a single image, which has none")
    return Part(decode(path, path, options)[None])


def read_folder(path: Path, options: Options) -> Part:
    """Every image file below `path`, sorted by its path; hidden files and folders are left out."""
    found = (file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
    files = sorted(file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
    if not files:
        raise ValueError(f"{path}: expected a folder with images ({', '.join(SUFFIXES)}), got none in it or below it")
    labels = _folder_labels(path, files) if options.labels else None
    return Part(stack(_decode_all(files, options), len(files)), labels)


def decode(source: Path | bytes, name: str | Path, options: Options) -> np.ndarray:
    """One encoded image as uint8 `[C, H, W]`; errors call it `name`.

    Raises:
        ValueError: damaged, more pixels than Pillow allows, several frames, more than 8 bits a channel, or a mode that is neither L nor RGB
            while no `channels` is given.
    """
    if options.channels not in (None, *MODE):
        raise ValueError(f"channels: expected 1 or 3 for encoded images, got {options.channels}")
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as image:
            limit = Image.MAX_IMAGE_PIXELS
            if limit is not None and image.width * image.height > limit:  # Pillow itself only warns up to twice its limit
                raise ValueError(f"{name}: expected at most {limit} pixels (Pillow's limit), got {image.width} x {image.height}")
            if getattr(image, "n_frames", 1) != 1:
                raise ValueError(f"{name}: expected one image, got {image.n_frames} frames")
            if image.mode not in EIGHT_BIT_MODES:
                raise ValueError(f"{name}: expected 8 bits a channel, got mode {image.mode} (use .npy for other numbers)")
            image = ImageOps.exif_transpose(image)
            if options.channels is None and image.mode not in CHANNELS:
                raise ValueError(f"{name}: expected mode L or RGB, got {image.mode} (channels=1 or channels=3 converts it)")
            image = image.convert(image.mode if options.channels is None else MODE[options.channels])
            if options.size is not None:
                height, width = options.size
                image = ImageOps.fit(image, (width, height), Image.Resampling.BILINEAR)
            array = np.array(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ValueError(f"{name}: expected at most {Image.MAX_IMAGE_PIXELS} pixels (Pillow's limit), got more: {error}") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name}: expected an image, got data that Pillow does not recognise") from None
    except (OSError, SyntaxError, EOFError) as error:  # what Pillow's decoders raise for damaged files
        raise ValueError(f"{name}: expected a whole image, got one that is damaged ({error})") from None
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def _decode_all(files: list[Path], options: Options) -> Iterator[tuple[Path, np.ndarray]]:
    """Files decoded by several threads (Pillow releases the GIL), in order; after an error the rest is dropped."""
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    try:
        yield from zip(files, pool.map(lambda file: decode(file, file, options), files), strict=True)
    finally:
        pool.shutdown(cancel_futures=True)


def _folder_labels(root: Path, files: list[Path]) -> np.ndarray:
    loose = next((file for file in files if file.parent == root), None)
    if loose is not None:
        raise ValueError(f"{loose}: expected every image in a sub-folder of {root} that names its class (labels=True), got one outside")
    classes = [file.relative_to(root).parts[0] for file in files]
    number = {name: label for label, name in enumerate(sorted(set(classes)))}
    return np.array([number[name] for name in classes], np.int64)
