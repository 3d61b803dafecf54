"""The golden vectors themselves: where they are looked for, and what the committed selection may be."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fastunlearn.testing import golden as golden_vectors

SELECTION = Path(__file__).parent / "data"


@pytest.mark.parametrize("missing", ["everything", "losses", "steps", "knn"])
def test_an_empty_or_missing_folder_is_an_error(missing, tmp_path, monkeypatch):
    for part in {"losses", "steps", "knn"} - {missing}:
        (tmp_path / part).mkdir()
        if missing != "everything":
            np.savez(tmp_path / part / "case.npz", value=np.zeros(1))
    monkeypatch.setenv(golden_vectors.VARIABLE, str(tmp_path))
    with pytest.raises(FileNotFoundError, match=golden_vectors.VARIABLE):
        golden_vectors.root(SELECTION)
    monkeypatch.setenv(golden_vectors.VARIABLE, str(tmp_path / "absent"))
    with pytest.raises(FileNotFoundError, match=golden_vectors.VARIABLE):
        golden_vectors.root(SELECTION)


def test_an_announced_case_without_a_file_is_an_error(tmp_path):
    (tmp_path / "manifest.json").write_text(json.dumps({"public/absent": {}}))
    with pytest.raises(FileNotFoundError, match="absent"):
        golden_vectors.case_names(tmp_path)


def test_every_file_is_announced(golden):
    for part in ("losses", "steps"):
        assert golden_vectors.case_names(golden / part) == sorted(
            path.stem for path in (golden / part).glob("*.npz")
        )


def test_an_array_that_nothing_checks_is_an_error():
    with pytest.raises(AssertionError, match=r"no test checks: .*forgotten"):
        golden_vectors.assert_all_checked({"checked", "forgotten"}, {"checked"})
    with pytest.raises(AssertionError, match=r"not in the golden vectors: .*unknown"):
        golden_vectors.assert_all_checked({"checked"}, {"checked", "unknown"})
    golden_vectors.assert_all_checked({"checked", "excused"}, {"checked"}, {"excused"})


def test_selection_is_small_and_data_only():
    files = [path for path in SELECTION.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} == {".npz", ".safetensors", ".json", ".md"}
    assert sum(path.stat().st_size for path in files) <= 4_000_000
