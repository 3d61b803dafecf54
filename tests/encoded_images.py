"""Encoded images and tables of them, shared by the tests of what is read."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from fastunlearn.data import load_images

needs_avif = pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
needs_pyarrow = pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="no pyarrow")
needs_datasets = pytest.mark.skipif(importlib.util.find_spec("datasets") is None, reason="no datasets")
COLOURS = np.random.default_rng(0).integers(0, 256, (8, 6, 3)).astype(np.uint8)
GREY = COLOURS[..., 0]


def encoded(image: np.ndarray | Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def one_image_saved(folder: Path) -> Path:
    """A data set as Hugging Face's `save_to_disk` leaves it."""
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"image": [Image.fromarray(COLOURS)]}).save_to_disk(folder)
    return folder


def put(folder: Path, content: bytes, name: str = "x.png") -> Path:
    (folder / name).write_bytes(content)
    return folder / name


def read(folder: Path, content: bytes, **options) -> np.ndarray:
    """The one row, `[H, W, C]`."""
    return load_images(put(folder, content), **options).images[0].permute(1, 2, 0).numpy()


def table(folder: Path, **columns) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), folder / "x.parquet")
    return folder / "x.parquet"
