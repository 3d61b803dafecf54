"""Latents on disk: a folder of `mean.npy`, `std.npy` and `labels.npy`, which are memory-mapped when read."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..host import check
from ..host.atomic import atomic_file
from ..host.store import ImageStore
from .arrays import check_labels, map_npy
from .folders import list_known
from .options import Options, Part

MEAN, STD, LABELS = "mean.npy", "std.npy", "labels.npy"


def save_latents(folder: str | os.PathLike, store: ImageStore) -> None:
    """Writes the latents of `store`, with its standard deviations and labels if it has them.

    `load_images(folder, latents=True)` reads them. Rows are written in chunks, to files of mode 0600 (less
    the umask): latents decode to the images they were made from.

    Args:
        folder: made if missing; gets `mean.npy` and, where `store` has them, `std.npy` and `labels.npy`.
        store: latents `[N, C, H, W]` of dtype float16, float32 or float64.

    Raises:
        TypeError: no store, or bfloat16, which .npy files do not know.
        ValueError: a store of images, or a folder that holds latents already.
    """
    if not isinstance(store, ImageStore):
        raise TypeError(f"store: expected an ImageStore, got {check.describe(store)}")
    if not store.latents:
        raise ValueError(f"store: expected latents (latents=True), got {store}")
    for rows in (store.images, store.std):
        if rows is not None and rows.dtype == torch.bfloat16:
            raise TypeError(
                "store: expected float16, float32 or float64 (.npy files do not know bfloat16), got bfloat16"
            )
    folder = Path(folder)
    if any((folder / name).exists() for name in (MEAN, STD, LABELS)):
        raise ValueError(f"{folder}: expected a folder without latents, got one with some")
    folder.mkdir(parents=True, exist_ok=True)
    if store.labels is not None:
        _write(folder / LABELS, store.labels, iter([store.labels]))
    if store.std is not None:
        _write(folder / STD, store.std, (rows for _, rows in store.like(store.std).chunks()))
    # The means go last: without them the folder holds no latents, so an interrupted call leaves none behind
    # that lack their standard deviations.
    _write(folder / MEAN, store.images, (rows for _, rows in store.chunks()))


def is_latents_folder(path: Path) -> bool:
    """Whether `save_latents` has written `path` to the end."""
    return (path / MEAN).is_file()


def read_latents(folder: Path, options: Options) -> Part:
    """The rows of such a folder, `[N, C, H, W]`; `std.npy` may be missing.

    Raises:
        Refused: naming the files that are none of latents.
    """
    listing = list_known(folder, (MEAN, STD, LABELS), f"latents ({MEAN}, {STD}, {LABELS})")
    mean = map_npy(folder / MEAN)
    if mean.ndim != 4:
        raise ValueError(f"{folder / MEAN}: expected an array [N, C, H, W], got shape {list(mean.shape)}")
    _, channels, *size = mean.shape
    if options.channels not in (None, channels):
        raise ValueError(f"{folder / MEAN}: expected channels {options.channels}, got {channels}")
    if options.size not in (None, tuple(size)):
        raise ValueError(f"{folder / MEAN}: expected size {options.size}, got {tuple(size)}")
    std = _map_if_there(folder / STD)
    labels = None
    if options.labels:
        labels = _map_if_there(folder / LABELS)
        check_labels(labels, len(mean), f"{folder}", f"labels in {LABELS}")
    return Part(mean, labels, std, passed_over=listing.passed_over, entered_before=listing.entered_before)


def _map_if_there(path: Path) -> np.ndarray | None:
    if path.is_file():
        return map_npy(path)
    return None


def _write(path: Path, array: Tensor, chunks: Iterator[Tensor]) -> None:
    """An .npy file of the shape and dtype of `array` with the rows of `chunks`."""
    # np.save would want the whole array in memory: its header is written here, and rows follow as they come.
    header = {
        "descr": np.lib.format.dtype_to_descr(array[:0].cpu().numpy().dtype),
        "fortran_order": False,
        "shape": tuple(array.shape),
    }
    with atomic_file(path, mode=0o600) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for rows in chunks:
            file.write(np.ascontiguousarray(rows.cpu().numpy()).data)
