"""Arrays in .npy, .npz and idx files."""

from __future__ import annotations

import zipfile
import zlib
from pathlib import Path

import numpy as np

from .idx import read_idx
from .options import Options, Part, to_nchw

NO_PICKLE = "pickled objects are refused, since unpickling runs whatever code a file holds"


def read_npy(path: Path, options: Options) -> Part:
    """The one array of an .npy file, memory-mapped."""
    if options.labels:
        raise ValueError(f"{path}: expected labels too (labels=True), got .npy, which holds one array only")
    return Part(to_nchw(map_npy(path), path, options))


def map_npy(path: Path) -> np.ndarray:
    """A memory-mapped .npy, read-only: a private writable mapping of a file larger than memory would be
    refused by Linux.

    An array in foreign byte order is copied.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        beyond = path.stat().st_size - array.offset - array.nbytes
    except (ValueError, OSError, EOFError) as error:
        raise ValueError(
            f"{path}: expected a .npy file of plain numbers ({NO_PICKLE}), got one that numpy does not read: {error}"
        ) from None
    if beyond > 0:
        got = f"{beyond} bytes after it, which would not be read (was np.save called twice on one file?)"
        raise ValueError(f"{path}: expected one array, got {got}")
    return _native(array)


def read_npz(path: Path, options: Options) -> Part:
    """Array `images`, or `mean` with `std`, or the only one beside `labels`; and `labels` if asked for."""
    if not zipfile.is_zipfile(path):  # numpy would go on to try .npy and pickle
        raise ValueError(
            f"{path}: expected an .npz file, which is a zip archive of .npy files, got something else"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = [key for key in archive.files if key != "labels"]
            posterior = {"mean", "std"} <= set(keys) and "images" not in keys
            key = (
                "images" if "images" in keys else "mean" if posterior else keys[0] if len(keys) == 1 else None
            )
            images = archive[key] if key is not None else None
            std = archive["std"] if posterior else None
            labels = archive["labels"] if options.labels and "labels" in archive.files else None
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise ValueError(
            f"{path}: expected an .npz file of plain numbers ({NO_PICKLE}), got one that numpy does not read: {error}"
        ) from None
    if images is None:
        raise ValueError(
            f"{path}: expected an array named images, or mean and std, or only one array beside labels, got {', '.join(keys) or 'none'}"
        )
    if options.labels:
        check_labels(labels, len(images) if images.ndim else 0, f"{path}", "an array named labels")
    if std is not None and std.shape != images.shape:
        raise ValueError(
            f"{path}: expected std of the shape of mean, {list(images.shape)}, got {list(std.shape)}"
        )
    return Part(
        to_nchw(_native(images), path, options),
        labels,
        None if std is None else to_nchw(_native(std), path, options),
    )


def read_idx_images(path: Path, options: Options) -> Part:
    """idx images, and the labels of the file beside them that is named alike."""
    images = read_idx(path)
    if images.ndim == 1:
        raise ValueError(f"{path}: expected images [N, H, W], got shape {list(images.shape)}, as of labels")
    labels = None
    if options.labels:
        beside = path.with_name(path.name.replace("images", "labels").replace(f"idx{images.ndim}", "idx1"))
        if beside == path or not beside.is_file():
            raise ValueError(
                f"{path}: expected labels (labels=True) in a file beside it named like {beside.name}, got none"
            )
        labels = read_idx(beside)
        check_labels(labels, len(images), f"{beside}", "an idx file of labels")
    return Part(to_nchw(images, path, options), labels)


def check_labels(labels: np.ndarray | None, count: int, where: str, what: str) -> None:
    """Refuses labels that are missing, no integers, or not `count` of them."""
    if labels is None:
        raise ValueError(f"{where}: expected {what} (labels=True), got none")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: expected {what}, integers of shape [{count}], got {labels.dtype} of shape {list(labels.shape)}"
        )


def _native(array: np.ndarray) -> np.ndarray:
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))
