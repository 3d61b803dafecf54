"""Tables of encoded images: every row is read or named, and nothing is read that the table does not hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from encoded_images import COLOURS, encoded, needs_pyarrow, one_image_saved, put, table
from PIL import ImageFile

from fastunlearn.data import load_images
from fastunlearn.data.options import stack


@needs_pyarrow
def test_all_rows_that_cannot_be_read_are_named_in_one_go(tmp_path):
    fine, cut = encoded(COLOURS), encoded(COLOURS)[:-20]
    cells = [{"bytes": content, "path": None} for content in (fine, cut, fine, b"", b"notes")]
    cells += [
        None,
        {"bytes": None, "path": "/etc/passwd"},
        {"bytes": None, "path": None},
        {"bytes": encoded(COLOURS[1:]), "path": None},
    ]
    with pytest.raises(
        ValueError, match=r"x.parquet: expected rows that can all be read, got 7 of 9 that cannot:"
    ) as caught:
        load_images(table(tmp_path, image=cells))
    _, *lines = str(caught.value).split("\n")
    reasons = [
        "damaged",
        "an empty file",
        "got text",
        "got a null",
        "only a path, which is never followed",
        "got no bytes",
        "[3, 7, 6] uint8",
    ]
    assert [int(line.split(" row ")[1].split(":")[0]) for line in lines] == [1, 3, 4, 5, 6, 7, 8]
    assert all(reason in line for reason, line in zip(reasons, lines, strict=True))


@needs_pyarrow
def test_nulls_in_lists_and_labels_are_named(tmp_path):
    with pytest.raises(
        ValueError, match=r"row 1: expected integers or floats, got nulls.*\(the only one of 2 rows in"
    ):
        load_images(table(tmp_path, image=[[[1, 2]], [[1, None]]]))
    cells = [{"bytes": encoded(COLOURS), "path": None}] * 3
    with pytest.raises(
        ValueError,
        match=r"(?s)got 2 of 3 that cannot:.*row 1: expected an integer label, got None.*row 2: .*None",
    ):
        load_images(table(tmp_path, image=cells, label=[1, None, None]), labels=True)


@needs_pyarrow
def test_labels_of_yes_and_no_are_numbers(tmp_path):
    cells = [{"bytes": encoded(COLOURS), "path": None}] * 2
    assert load_images(table(tmp_path, image=cells, label=[True, False]), labels=True).labels.tolist() == [
        1,
        0,
    ]


@needs_pyarrow
def test_lists_of_numbers_are_no_encoded_images(tmp_path, monkeypatch):
    """What is wrong with encoded images alone is no matter: four channels, and Pillow's settings."""
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    rows = np.random.default_rng(0).integers(0, 256, (2, 4, 8, 6))
    assert np.array_equal(load_images(table(tmp_path, image=rows.tolist()), channels=4).images.numpy(), rows)


@needs_pyarrow
@pytest.mark.parametrize("rows", [0, 1, 3])
def test_a_table_with_another_number_of_rows_than_it_says_is_refused(rows):
    given = [(f"row {row}", np.zeros((1, 8, 8), np.uint8)) for row in range(rows)]
    got = "more" if rows > 2 else rows
    with pytest.raises(ValueError, match=f"x.parquet: expected 2 rows, .*, got {got}"):
        stack(iter(given), 2, "x.parquet", "rows")


@needs_pyarrow
def test_two_columns_of_images_are_refused(tmp_path):
    cells = [{"bytes": encoded(COLOURS), "path": None}]
    with pytest.raises(
        ValueError,
        match=r"x.parquet: expected one column image or img, got both, of which one would not be read",
    ):
        load_images(table(tmp_path, image=cells, img=cells))


@needs_pyarrow
def test_a_table_that_is_damaged_further_on_is_named(tmp_path):
    path = table(tmp_path, image=[{"bytes": encoded(COLOURS), "path": None}] * 3)
    content = bytearray(path.read_bytes())
    content[4:200] = bytes(196)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.parquet: expected a whole table, got one that is damaged"):
        load_images(path)


@pytest.fixture
def saved_set(tmp_path) -> Path:
    return one_image_saved(tmp_path / "set")


def test_a_saved_data_set_holds_nothing_else(saved_set):
    put(saved_set, b"x", "cache-0123.arrow")
    put(saved_set, b"x", ".DS_Store")
    told = []
    assert len(load_images(saved_set, tell=told.append)) == 1
    assert [Path(path).name for path in told[0].passed_over] == [".DS_Store", "cache-0123.arrow"]
    assert told[0].files == 1
    put(saved_set, encoded(COLOURS), "more.png")
    put(saved_set, b"x", "data-00001-of-00002.arrow")
    with pytest.raises(
        ValueError,
        match=r"(?s)got 2 of \d that cannot:.*data-00001.*only files of the saved data set.*more.png",
    ):
        load_images(saved_set)


@pytest.mark.parametrize("name", ["../other.arrow", "/tmp/other.arrow", "sub/other.arrow", ".."])
def test_a_saved_data_set_does_not_lead_elsewhere(name, saved_set):
    state = json.loads((saved_set / "state.json").read_text())
    state["_data_files"] = [{"filename": name}]
    (saved_set / "state.json").write_text(json.dumps(state))
    with pytest.raises(
        ValueError, match=r"state.json: expected names of files beside it, got .*, which leads elsewhere"
    ):
        load_images(saved_set)


SAVED_FILES = ("state.json", "dataset_info.json", "data-00000-of-00001.arrow")
DAMAGE = {"empty": b"", "an object": b"{}", "a list": b"[]", "Arrow": b"ARROW1" + bytes(9)}


@pytest.mark.parametrize("file", SAVED_FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_data_set_is_named(file, damage, saved_set):
    put(saved_set, DAMAGE[damage], file)
    if (file, damage) == ("dataset_info.json", "an object"):  # says nothing about the rows
        assert len(load_images(saved_set)) == 1
        return
    with pytest.raises(ValueError, match=f"^{re.escape(str(saved_set))}.*: expected .*, got "):
        load_images(saved_set)
