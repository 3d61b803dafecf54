"""scripts/compare_bits.py sees a difference of one bit, and none where there is none; compare_speed.py, a
slower step.
"""

import importlib
import importlib.util
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

ROOT = Path(__file__).parents[1]
FACTOR = "scale=-self.superfactor"


@pytest.fixture
def compare_bits():
    spec = importlib.util.spec_from_file_location("compare_bits", ROOT / "scripts" / "compare_bits.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def compare(compare_bits, monkeypatch, capsys):
    """Compares this tree with another, in a few cases: what the script ends with, and prints."""
    monkeypatch.setattr(sys, "path", sys.path[:])

    def run(new: Path) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["compare_bits.py", str(ROOT), str(new), "-k", "given draws"])
        return compare_bits.main(), capsys.readouterr().out

    return run


def changed_tree(folder: Path) -> Path:
    """A copy of the package whose NegGrad is off by the last bit of its factor."""
    shutil.copytree(
        ROOT / "fastunlearn", folder / "fastunlearn", ignore=shutil.ignore_patterns("__pycache__")
    )
    (file,) = [file for file in folder.rglob("neggrad.py") if FACTOR in file.read_text()]
    file.write_text(file.read_text().replace(FACTOR, f"{FACTOR} * (1 + 2**-23)"))
    return folder


def test_the_same_tree_is_equal_to_itself(compare):
    code, table = compare(ROOT)
    assert code == 0, table
    assert "steps              9  equal" in table.splitlines()


def test_a_method_that_is_off_by_a_bit_is_seen_and_the_others_are_equal(compare, tmp_path):
    code, table = compare(changed_tree(tmp_path))
    assert code == 1, table
    assert "steps              9  1 differ, first neggrad, given draws: output.0." in table


CASE = SimpleNamespace(refused=False)
REFUSED = SimpleNamespace(refused=True)


@pytest.mark.parametrize(
    ("case", "old", "new", "where"),
    [
        (CASE, {"tensors": {"a": "1"}}, {"tensors": {"a": "1"}}, None),
        (CASE, {"tensors": {"a": "1"}}, {"tensors": {"a": "2"}}, "a"),
        (CASE, {"tensors": {"a": "1"}}, {"tensors": {"a": "1", "b": "1"}}, "b"),
        (CASE, {"tensors": {"a": "1"}}, {"tensors": {}, "error": "E"}, "error"),
        (CASE, {"tensors": {}, "error": "E"}, {"tensors": {}, "error": "E"}, "fails in both trees"),
        (CASE, {"tensors": {}}, {"tensors": {}}, "returned nothing"),
        (REFUSED, {"tensors": {}, "error": "E"}, {"tensors": {}, "error": "E"}, None),
        (REFUSED, {"tensors": {}, "error": "E"}, {"tensors": {}, "error": "F"}, "error"),
        (REFUSED, {"tensors": {"a": "1"}}, {"tensors": {"a": "1"}}, "is refused in neither tree"),
    ],
)
def test_what_counts_as_a_difference(compare_bits, case, old, new, where):
    found = compare_bits.difference(case, old, new)
    assert (None if found is None else found[0]) == where


MODEL, SEED = ["model", "POSITIONAL_OR_KEYWORD", ""], ["seed", "KEYWORD_ONLY", "0"]
OPTIONAL = ["more", "POSITIONAL_OR_KEYWORD", "None"]


@pytest.mark.parametrize(
    ("new", "changed"),
    [
        ([MODEL, SEED], False),
        ([MODEL, OPTIONAL, SEED], False),
        ([MODEL, SEED, ["more", "KEYWORD_ONLY", "1"]], False),
        ([MODEL], True),
        ([OPTIONAL, MODEL, SEED], True),
        ([MODEL, ["seed", "KEYWORD_ONLY", "1"]], True),
        ([MODEL, SEED, ["more", "KEYWORD_ONLY", ""]], True),
    ],
    ids=str,
)
def test_public_parameters_may_be_added_and_nothing_else(compare_bits, new, changed):
    old_api, new_api = (
        {"step": {"parameters": parameters, "fields": ["loss"], "methods": {"run": parameters}}}
        for parameters in ([MODEL, SEED], new)
    )
    assert bool(compare_bits.api_changes(old_api, new_api)) == changed
    assert compare_bits.api_changes(old_api, {}) == ["step is gone"]
    new_api["step"]["fields"] = []
    assert any("fields" in change for change in compare_bits.api_changes(old_api, new_api))


@pytest.mark.parametrize("other", [0.1 + 2**-30, torch.tensor(0.1), torch.tensor([0.1]).double(), None])
def test_hashes_tell_values_shapes_and_types_apart(monkeypatch, other):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    hashed = importlib.import_module("bits.registry").hashed
    assert hashed({"a": [torch.tensor([0.1])]}) == hashed({"a": (torch.tensor([0.1]),)})
    assert hashed({"a": [torch.tensor([0.1])]}) != hashed({"a": [other]})
    assert hashed(torch.tensor([0.0])) != hashed(torch.tensor([-0.0]))


@pytest.mark.parametrize(("ratios", "passes"), [((1.0, 1.02, 9.0), True), ((1.0, 1.03, 1.04), False)])
def test_a_step_whose_median_ratio_is_above_the_limit_fails(monkeypatch, capsys, ratios, passes):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    speed = importlib.import_module("compare_speed")
    pairs = [speed.Pair(1e6, ratio * 1e6, ratio) for ratio in ratios]
    assert speed.report({"a step": pairs, "another": [speed.Pair(1e6, 1e6, 1.0)]}, 1.02) == passes
    assert ("above 1.02" in capsys.readouterr().out) == (not passes)
