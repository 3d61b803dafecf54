"""Parquet files and data sets that Hugging Face `datasets` saved on disk.

Both packages are optional: `pip install "fastunlearn[hf]"`.
"""

from __future__ import annotations

import fnmatch
import importlib
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from .folders import Listing, list_known
from .options import Options, Part, stack, to_nchw
from .pictures import check_pillow, decode
from .refusals import Refused, shown

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
BATCH_ROWS = 256
STATE, INFO = "state.json", "dataset_info.json"
CACHES = "cache-*.arrow"  # what `Dataset.map` leaves beside the data


def read_parquet(path: Path, options: Options) -> Part:
    """Column `image` or `img` of a parquet file, read in batches of rows."""
    parquet = _optional("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors derive from these
        raise ValueError(
            f"{path}: expected a parquet file, got one that pyarrow does not read: {error}"
        ) from None
    with file:
        column = _column(file.schema_arrow.names, IMAGE_COLUMNS, path)
        label = _column(file.schema_arrow.names, LABEL_COLUMNS, path) if options.labels else None

        def cells(name: str) -> Iterator[object]:
            for batch in file.iter_batches(BATCH_ROWS, columns=[name]):
                yield from batch.column(0).to_pylist()

        images = _images(_whole(cells(column), path), file.metadata.num_rows, path, options)
        return Part(images, None if label is None else _labels(list(_whole(cells(label), path)), path))


def read_saved_dataset(path: Path, options: Options) -> Part:
    """Column `image` or `img` of a folder that `Dataset.save_to_disk` wrote.

    What `Dataset.map` cached there is passed over, as are the files that are passed over everywhere.
    """
    datasets = _optional("datasets", path)
    names, listing = _check_files(path)
    try:
        dataset = datasets.load_from_disk(str(path))
    except MemoryError:
        raise
    except Exception as error:  # whatever a file that is no JSON or no Arrow leads to
        expected = "a data set saved by datasets.save_to_disk"
        raise ValueError(f"{path}: expected {expected}, got one that cannot be read: {error}") from None
    column = _column(dataset.column_names, IMAGE_COLUMNS, path)
    label = _column(dataset.column_names, LABEL_COLUMNS, path) if options.labels else None

    def cells(name: str) -> Iterator[object]:
        # arrow rows are not decoded: that is done here, with our checks
        for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
            yield from batch.column(name).to_pylist()

    images = _images(_whole(cells(column), path), len(dataset), path, options)
    labels = None if label is None else _labels(list(_whole(cells(label), path)), path)
    passed_over, entered_before = listing.passed_over, listing.entered_before
    return Part(images, labels, files=len(names), passed_over=passed_over, entered_before=entered_before)


def _whole(cells: Iterator[object], path: Path) -> Iterator[object]:
    """`cells`, with the path in the error of a table that is damaged further on."""
    try:
        yield from cells
    except MemoryError:
        raise
    except Exception as error:  # of pyarrow or datasets
        raise ValueError(f"{path}: expected a whole table, got one that is damaged ({error})") from None


def _check_files(path: Path) -> tuple[list[str], Listing]:
    """The files of a saved data set, and what lies in its folder, which is what its `state.json` lists.

    Raises:
        ValueError: a list that leads out of the folder.
        Refused: files that are not in the list.
    """
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE}: expected the state of a saved data set, got {error!r}") from None
    for name in names:
        if not isinstance(name, str) or name in ("", ".", "..") or Path(name).name != name or "\\" in name:
            got = f"{name!r}, which leads elsewhere"
            raise ValueError(f"{path / STATE}: expected names of files beside it, got {got}")
    caches = [entry.name for entry in path.iterdir() if fnmatch.fnmatch(entry.name, CACHES)]
    listing = list_known(path, {*names, *caches, STATE, INFO}, "the saved data set")
    listing.passed_over += [path / name for name in sorted(caches)]
    return names, listing


def _images(cells: Iterable[object], count: int, path: Path, options: Options) -> np.ndarray:
    if count == 0:
        raise ValueError(f"{path}: expected at least one row, got none")

    def rows() -> Iterator[tuple[str, np.ndarray | ValueError]]:
        for row, cell in enumerate(cells):
            name = f"{shown(path)} row {row}"
            if isinstance(cell, (dict, bytes)):
                check_pillow(options)
            try:
                yield name, _image(cell, name, options)
            except ValueError as error:
                yield name, error

    return stack(rows(), count, path, "rows")


def _image(cell, name: str, options: Options) -> np.ndarray:
    """One table cell as `[C, H, W]`: an encoded image, or nested lists of integers 0-255 or of floats."""
    if isinstance(cell, dict):
        if cell.get("bytes") is None:  # its path could name any file of this machine
            got = "only a path, which is never followed" if cell.get("path") else "no bytes"
            raise ValueError(f"{name}: expected an image within the table (struct with bytes), got {got}")
        return decode(cell["bytes"], name, options)
    if isinstance(cell, bytes):
        return decode(cell, name, options)
    if cell is None:
        raise ValueError(f"{name}: expected an image, got a null")
    if not isinstance(cell, (list, np.ndarray)):
        raise ValueError(
            f"{name}: expected an encoded image or nested lists of numbers, got {type(cell).__name__}"
        )
    try:
        array = np.asarray(cell)
    except ValueError as error:  # ragged
        raise ValueError(
            f"{name}: expected nested lists of one length an axis, got others ({error})"
        ) from None
    if array.dtype.kind in "iu" and array.size:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"{name}: expected integers in [0, 255], got [{array.min()}, {array.max()}]")
        array = array.astype(np.uint8)
    elif array.dtype.kind == "f":
        array = array.astype(np.float32)
    else:
        got = "nothing" if array.size == 0 else "nulls, or values that are no numbers"
        raise ValueError(f"{name}: expected integers or floats, got {got}")
    return to_nchw(array[None], name, options)[0]


def _labels(cells: list, path: Path) -> np.ndarray:
    wrong = [row for row, cell in enumerate(cells) if not isinstance(cell, int)]
    if wrong:
        name = shown(path)
        problems = [f"{name} row {row}: expected an integer label, got {cells[row]!r}" for row in wrong]
        raise Refused(problems, path, len(cells), "rows")
    return np.array(cells, np.int64)


def _column(names: list[str], wanted: tuple[str, ...], path: Path) -> str:
    found = [name for name in wanted if name in names]
    if len(found) > 1:
        got = "both, of which one would not be read"
        raise ValueError(f"{path}: expected one column {' or '.join(wanted)}, got {got}")
    if not found:
        raise ValueError(f"{path}: expected a column {' or '.join(wanted)}, got {', '.join(names)}")
    return found[0]


def _optional(module: str, path: Path):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f'{path}: expected the package {module.partition(".")[0]} to read this format (pip install "fastunlearn[hf]"): {error}'
        ) from error
