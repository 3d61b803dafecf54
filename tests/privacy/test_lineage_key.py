"""The list of forgotten images that a model carries from run to run says nothing to who lacks its key."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

import pytest
from attacker import files, told
from one_image import CANDIDATES, RIGHT

from fastunlearn import ImageStore
from fastunlearn.runs import lineage

STORE = ImageStore(CANDIDATES)
GUESSES = [bytes(32), b"\xff" * 32, bytes(range(32)), b"fastunlearn".ljust(32, b"\0")]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a model that was made to forget the right candidate; its key lies elsewhere."""
    key = lineage.new_key()
    lineage.write_key(tmp_path / "lineage.key", key)
    forgotten = lineage.with_rows(lineage.Lineage(), key, STORE.select([RIGHT]))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / lineage.FILE).write_bytes(forgotten.content())
    return tmp_path / "model"


def test_without_the_key_no_candidate_is_confirmed(model: Path):
    found, forgotten = files(model), lineage.read_lineage(model)
    assert len(forgotten) == 1
    for key in GUESSES:
        with pytest.raises(ValueError, match="expected the key that the lineage was written with"):
            lineage.rows_to_leave_out(STORE, forgotten, key)
    for image in CANDIDATES:
        pixels = image.numpy().tobytes()
        plain = [hashlib.sha256(pixels).hexdigest(), ImageStore(image[None]).content_hash()]
        keyed = [hmac.digest(key, pixels, "sha256").hex() for key in (b"", *GUESSES)]
        assert not any(told(text, found) for text in plain + keyed)


def test_with_it_the_right_one_is(model: Path):
    key = lineage.read_key(model.parent / "lineage.key")
    found = lineage.rows_to_leave_out(STORE, lineage.read_lineage(model), key)
    assert found.tolist() == [RIGHT]


def test_two_models_that_forgot_the_same_image_have_nothing_in_common(model: Path):
    """Else whoever has one key could read the other's list."""
    again = lineage.with_rows(lineage.Lineage(), lineage.new_key(), STORE.select([RIGHT]))
    first, second = (rows(each) for each in (lineage.read_lineage(model), again))
    assert not first & second


def rows(found: lineage.Lineage) -> frozenset[str]:
    return frozenset().union(*(group.rows for part in found.parts for group in part.groups))
