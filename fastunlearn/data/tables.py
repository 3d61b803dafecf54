"""Parquet files and data sets that Hugging Face `datasets` saved on disk.

Both packages are optional: `pip install "fastunlearn[hf]"`.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from ..host import check, room
from ..host.plain_json import read_json
from .folders import Listing, list_known
from .options import Options, Part, stack, to_nchw
from .pictures import check_pillow, decode
from .refusals import Refused, shown

IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels")
BATCH_ROWS = 256  # as Python objects at a time: a whole table of images would take many times its size
STATE, INFO = "state.json", "dataset_info.json"
CACHES = "cache-*.arrow"  # what `Dataset.map` leaves beside the data


def read_parquet(path: Path, options: Options) -> Part:
    """Column `image` or `img` of a parquet file, read in batches of rows.

    Raises:
        ValueError: pyarrow cannot read the file, or it has no such column, or two.
        Refused: naming the rows that hold no image, or no label.
        ImportError: pyarrow is missing.
    """
    parquet = _optional("pyarrow.parquet", path)
    try:
        file = parquet.ParquetFile(path)
    except (ValueError, OSError) as error:  # pyarrow's errors derive from these
        raise ValueError(
            f"{path}: expected a parquet file, got one that pyarrow does not read: {error}"
        ) from None
    with file:
        names = file.schema_arrow.names
        image_column = _column(names, IMAGE_COLUMNS, path)
        label_column = _column(names, LABEL_COLUMNS, path) if options.labels else None
        room.require_for(path, "a column of a row group", _largest_column(file.metadata, image_column))

        def cells(name: str) -> Iterator[object]:
            for batch in file.iter_batches(BATCH_ROWS, columns=[name]):
                yield from batch.column(0).to_pylist()

        images = _images(_whole(cells(image_column), path), file.metadata.num_rows, path, options)
        labels = None
        if label_column is not None:
            labels = _labels(list(_whole(cells(label_column), path)), path)
        return Part(images, labels)


def read_saved_dataset(path: Path, options: Options) -> Part:
    """Column `image` or `img` of a folder that `Dataset.save_to_disk` wrote.

    What `Dataset.map` cached there is passed over, as are the files that are passed over everywhere.

    Raises:
        ValueError: `datasets` cannot read the folder, or it has no such column, or two.
        Refused: naming files that are none of the data set, or rows that hold no image, or no label.
        ImportError: `datasets` is missing.
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
    image_column = _column(dataset.column_names, IMAGE_COLUMNS, path)
    label_column = _column(dataset.column_names, LABEL_COLUMNS, path) if options.labels else None

    # Rows in the format "arrow" are not decoded by `datasets`: that is done here, with our checks.
    def cells(name: str) -> Iterator[object]:
        for batch in dataset.with_format("arrow").iter(BATCH_ROWS):
            yield from batch.column(name).to_pylist()

    images = _images(_whole(cells(image_column), path), len(dataset), path, options)
    labels = None
    if label_column is not None:
        labels = _labels(list(_whole(cells(label_column), path)), path)
    return Part(
        images,
        labels,
        files=len(names),
        passed_over=listing.passed_over,
        entered_before=listing.entered_before,
    )


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
        state = read_json(path / STATE)
        names = [entry["filename"] for entry in state["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path / STATE}: expected the state of a saved data set, got {error!r}") from None
    # The state comes from somebody else, with the data set: a name in it could lead to any file.
    for name in names:
        if not check.is_file_name(name):
            got = f"{name!r}, which leads elsewhere"
            raise ValueError(f"{path / STATE}: expected names of files beside it, got {got}")
    caches = [entry.name for entry in path.iterdir() if fnmatch.fnmatch(entry.name, CACHES)]
    listing = list_known(path, {*names, *caches, STATE, INFO}, "the saved data set")
    listing.passed_over += [path / name for name in sorted(caches)]
    return names, listing


def _largest_column(metadata, name: str) -> int:
    """Bytes that the column `name` of a parquet file unpacks to, in the row group where it is largest."""
    largest = 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        columns = (group.column(place) for place in range(group.num_columns))
        # A struct is kept as a column for each of its entries: `image.bytes`, `image.path`.
        sizes = (
            each.total_uncompressed_size for each in columns if each.path_in_schema.split(".")[0] == name
        )
        largest = max(largest, sum(sizes))
    return largest


def _images(cells: Iterable[object], count: int, path: Path, options: Options) -> np.ndarray:
    """The cells of a column of images as `[count, C, H, W]`."""
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
        # A path alone could name any file of this machine.
        if cell.get("bytes") is None:
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
    return to_nchw(_numbers(cell, name)[None], name, options)[0]


def _numbers(cell: list | np.ndarray, name: str) -> np.ndarray:
    """Nested lists as an array: integers from 0 to 255 as uint8, floats as float32.

    Raises:
        ValueError: lists of different lengths, other integers, or values that are no numbers.
    """
    try:
        array = np.asarray(cell)
    except ValueError as error:  # lists of different lengths
        raise ValueError(
            f"{name}: expected nested lists of one length an axis, got others ({error})"
        ) from None
    if array.dtype.kind in "iu" and array.size:
        if array.min() < 0 or array.max() > 255:
            raise ValueError(f"{name}: expected integers in [0, 255], got [{array.min()}, {array.max()}]")
        return array.astype(np.uint8)
    if array.dtype.kind == "f":
        return array.astype(np.float32)
    got = "nothing" if array.size == 0 else "nulls, or values that are no numbers"
    raise ValueError(f"{name}: expected integers or floats, got {got}")


def _labels(cells: list, path: Path) -> np.ndarray:
    """The cells of a column of labels as int64 `[N]`.

    Raises:
        Refused: naming the rows whose label is no integer.
    """
    wrong = [row for row, cell in enumerate(cells) if not isinstance(cell, int)]
    if wrong:
        name = shown(path)
        problems = [f"{name} row {row}: expected an integer label, got {cells[row]!r}" for row in wrong]
        raise Refused(problems, path, len(cells), "rows")
    return np.array(cells, np.int64)


def _column(names: list[str], wanted: tuple[str, ...], path: Path) -> str:
    """The one column among `names` that is called as one of `wanted`.

    Raises:
        ValueError: there is none, or there are several.
    """
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
        package = module.partition(".")[0]
        expected = f'the package {package} to read this format (pip install "fastunlearn[hf]")'
        raise ImportError(f"{path}: expected {expected}: {error}") from error
