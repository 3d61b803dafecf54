"""Arrays in .npy, .npz and idx files."""

from __future__ import annotations

import math
import zipfile
from pathlib import Path

import numpy as np

from ..host import check, room
from .idx import read_idx
from .options import Options, Part, to_nchw

NO_PICKLE = "pickled objects are refused, since unpickling runs whatever code a file holds"


def read_npy(path: Path, options: Options) -> Part:
    """The one array of an .npy file, memory-mapped.

    Raises:
        ValueError: labels were asked for, or the file or its layout cannot be read.
    """
    if options.labels:
        raise ValueError(f"{path}: expected labels too (labels=True), got .npy, which holds one array only")
    return Part(to_nchw(map_npy(path), path, options))


def map_npy(path: Path) -> np.ndarray:
    """The array of an .npy file, memory-mapped; one in foreign byte order is copied.

    Raises:
        ValueError: numpy does not read the file, it holds more than one array, or the copy would not fit into
            memory.
    """
    try:
        # Read-only: Linux refuses a private writable mapping of a file larger than memory.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        beyond = path.stat().st_size - array.offset - array.nbytes
    except Exception as error:  # a header is a text that numpy takes for Python: it may be anything
        raise ValueError(_unread(path, "a .npy file", error)) from None
    # Several calls of np.save on one open file append arrays, of which np.load returns only the first.
    if beyond > 0:
        got = f"{beyond} bytes after it, which would not be read (was np.save called twice on one file?)"
        raise ValueError(f"{path}: expected one array, got {got}")
    if not array.dtype.isnative:
        room.require_for(path, "an array", array.nbytes)
    return _native(array)


def read_npz(path: Path, options: Options) -> Part:
    """Array `images`, or `mean` with `std`, or the only one beside `labels`, or the one that
    `options.npz_key` names; and `labels` if asked for.

    Raises:
        ValueError: no such file, no such arrays, arrays that do not fit together, or into memory.
    """
    # np.load goes by content: given anything but a zip archive it would go on to try .npy and pickle.
    if not zipfile.is_zipfile(path):
        raise ValueError(
            f"{path}: expected an .npz file, which is a zip archive of .npy files, got something else"
        )
    try:
        with np.load(path, allow_pickle=False) as archive:
            keys = [key for key in archive.files if key != "labels"]
            key = _key_of_images(keys, options.npz_key)
            with_std = key == "mean" and "std" in keys
            with_labels = options.labels and "labels" in archive.files
            wanted = [key] * (key is not None) + ["std"] * with_std + ["labels"] * with_labels
            room.require("an archive of arrays", sum(_unpacked_bytes(archive, name) for name in wanted))
            images = None if key is None else archive[key]
            std = archive["std"] if with_std else None
            labels = archive["labels"] if with_labels else None
    except room.NoRoom as refused:
        raise ValueError(f"{path}: {refused}") from None
    except MemoryError:
        raise
    except Exception as error:  # of an archive that is damaged or encrypted, or of a header as in map_npy
        raise ValueError(_unread(path, "an .npz file", error)) from None
    if images is None:
        expected = (
            "an array named images, or mean and std, or only one array beside labels (npz_key names another)"
        )
        if options.npz_key is not None:
            expected = f"an array named {options.npz_key} (npz_key)"
        got = check.in_a_line(", ".join(keys)) or "none"
        raise ValueError(f"{path}: expected {expected}, got {got}")
    if options.labels:
        count = len(images) if images.ndim else 0
        check_labels(labels, count, f"{path}", "an array named labels")
    if std is not None and std.shape != images.shape:
        raise ValueError(
            f"{path}: expected std of the shape of mean, {list(images.shape)}, got {list(std.shape)}"
        )
    images = to_nchw(_native(images), path, options)
    if std is not None:
        std = to_nchw(_native(std), path, options)
    return Part(images, labels, std)


def _unpacked_bytes(archive: np.lib.npyio.NpzFile, key: str) -> int:
    """How much memory the array `key` takes, by what its file in the archive begins with.

    Raises:
        ValueError: that is not what the archive says of the file. numpy would take memory for all of it
            before it finds less.
    """
    names = archive.zip.namelist()
    name = f"{key}.npy" if f"{key}.npy" in names else key
    with archive.zip.open(name) as file:
        version = np.lib.format.read_magic(file)
        read_header = np.lib.format.read_array_header_1_0
        if version != (1, 0):
            read_header = np.lib.format.read_array_header_2_0
        shape, _, dtype = read_header(file)
        there = archive.zip.getinfo(name).file_size - file.tell()
    size = math.prod(shape) * dtype.itemsize
    if size > there and not dtype.hasobject:  # pickles are refused in words of their own
        raise ValueError(f"{key}: {size} bytes, of which the archive has {there}")
    return size


def _key_of_images(keys: list[str], wanted: str | None) -> str | None:
    """Which array of an archive holds the rows, given the names of all but `labels`; None: not clear."""
    if wanted is not None:
        return wanted if wanted in keys else None
    if "images" in keys:
        return "images"
    # The posterior of a VAE's encoder: the means are the rows, the standard deviations go with them.
    if "mean" in keys and "std" in keys:
        return "mean"
    if len(keys) == 1:
        return keys[0]
    return None


def read_idx_images(path: Path, options: Options) -> Part:
    """The images of an idx file, and the labels of the file beside it that is named alike.

    Raises:
        ValueError: the file is none of images, or labels were asked for and are not there.
    """
    images = read_idx(path)
    if images.ndim == 1:
        raise ValueError(f"{path}: expected images [N, H, W], got shape {list(images.shape)}, as of labels")
    labels = None
    if options.labels:
        # MNIST's names: train-images-idx3-ubyte and train-labels-idx1-ubyte, the number being that of axes.
        beside = path.with_name(path.name.replace("images", "labels").replace(f"idx{images.ndim}", "idx1"))
        if beside == path or not beside.is_file():
            expected = f"labels (labels=True) in a file beside it named like {beside.name}"
            raise ValueError(f"{path}: expected {expected}, got none")
        labels = read_idx(beside)
        check_labels(labels, len(images), f"{beside}", "an idx file of labels")
    return Part(to_nchw(images, path, options), labels)


def check_labels(labels: np.ndarray | None, count: int, where: str, what: str) -> None:
    """Refuses labels that are missing, no integers, or not `count` of them."""
    if labels is None:
        raise ValueError(f"{where}: expected {what} (labels=True), got none")
    if labels.shape != (count,) or labels.dtype.kind not in "iu":
        got = f"{labels.dtype} of shape {list(labels.shape)}"
        raise ValueError(f"{where}: expected {what}, integers of shape [{count}], got {got}")


def _unread(path: Path, what: str, error: Exception) -> str:
    got = f"one that numpy does not read: {check.in_a_line(error)}"
    return f"{path}: expected {what} of plain numbers ({NO_PICKLE}), got {got}"


def _native(array: np.ndarray) -> np.ndarray:
    """`array` in the byte order of this machine, the only one that torch knows."""
    if array.dtype.isnative:
        return array
    return array.astype(array.dtype.newbyteorder("="))
