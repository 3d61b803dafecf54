"""Parquet files and data sets that Hugging Face `datasets` saved on disk. Both packages are optional: `pip install "fastunlearn[hf]"`."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .options import Options, Part, stack, to_nchw
from .pictures import decode

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
BATCH_ROWS = 256


def read_parquet(path: Path, options: Options) -> Part:
    """Column `image` or `img` of a parquet file, read in batches of rows."""
    parquet = _optional("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors derive from these
        raise ValueError(f"{path}: expected a parquet file, got one that pyarrow does not read: {error}") from None
    with file:
        column = _column(file.schema_arrow.names, IMAGE_COLUMNS, path)
        label = _column(file.schema_arrow.names, LABEL_COLUMNS, path) if options.labels else None

        def cells() -> Iterator[object]:
            for batch in file.iter_batches(BATCH_ROWS, columns=[column]):
                yield from batch.column(0).to_pylist()

        images = _images(cells(), file.metadata.num_rows, path, options)
        return Part(images, None if label is None else _labels(file.read([label]).column(0).to_pylist(), path))


def read_saved_dataset(path: Path, options: Options) -> Part:
    """Column `image` or `img` of a folder that `Dataset.save_to_disk` wrote."""
    datasets = _optional("datasets", path)
    dataset = datasets.load_from_disk(str(path))
    column = _column(dataset.column_names, IMAGE_COLUMNS, path)
    label = _column(dataset.column_names, LABEL_COLUMNS, path) if options.labels else None

    def cells(name: str) -> Iterator[object]:
        for batch in dataset.with_format("arrow").iter(BATCH_ROWS):  # arrow rows are not decoded: that is done here, with our checks
            yield from batch.column(name).to_pylist()

    return Part(_images(cells(column), len(dataset), path, options), None if label is None else _labels(list(cells(label)), path))


def _images(cells: Iterable[object], count: int, path: Path, options: Options) -> np.ndarray:
    if count == 0:
        raise ValueError(f"{path}: expected at least one row, got none")
    return stack(((f"{path} row {row}", _image(cell, f"{path} row {row}", options)) for row, cell in enumerate(cells)), count)


def _image(cell, name: str, options: Options) -> np.ndarray:
    """One table cell as `[C, H, W]`: an encoded image, or nested lists of integers 0-255 or of floats."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None:  # its path could name any file of this machine
            raise ValueError(f"{name}: expected an image within the table (struct with bytes), got {'only a path' if cell.get('path') else 'no bytes'}")
        return decode(cell["bytes"], name, options)
    if isinstance(cell, bytes):
        return decode(cell, name, options)
    if not isinstance(cell, (list, np.ndarray)):
        raise ValueError(f"{name}: expected an encoded image or nested lists of numbers, got {type(cell).__name__}")
    try:
        array = np.asarray(cell)
    except ValueError as error:  # ragged
        raise ValueError(f"{name}: expected nested lists of one length an axis, got others ({error})") from None
    if array.dtype.kind in "iu" and array.size:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"{name}: expected integers in [0, 255], got [{array.min()}, {array.max()}]")
        array = array.astype(np.uint8)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    return to_nchw(array[None], name, options)[0]


def _labels(cells: list, path: Path) -> np.ndarray:
    if not all(isinstance(cell, int) for cell in cells):
        wrong = next(row for row, cell in enumerate(cells) if not isinstance(cell, int))
        raise ValueError(f"{path} row {wrong}: expected an integer label, got {cells[wrong]!r}")
    return np.array(cells, np.int64)


def _column(names: list[str], wanted: tuple[str, ...], path: Path) -> str:
    for name in wanted:
        if name in names:
            return name
    raise ValueError(f"{path}: expected a column {' or '.join(wanted)}, got {', '.join(names)}")


def _optional(module: str, path: Path):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(f'{path}: expected the package {module.partition(".")[0]} to read this format (pip install "fastunlearn[hf]"): {error}') from error
