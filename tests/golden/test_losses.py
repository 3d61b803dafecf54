"""Every array of golden/losses from the literal float64 formulas, to 1e-10 of its largest entry."""

from __future__ import annotations

from pathlib import Path

import pytest
from literal_losses import retrack_losses, siss_losses
from torch import Tensor

from fastunlearn.testing import golden
from fastunlearn.testing.budgets import relative_error

LOSSES = golden.root(Path(__file__).parent / "data") / "losses"
TOLERANCE = 1e-10


@pytest.mark.parametrize("name", golden.case_names(LOSSES, "retrack_"))
def test_float64_reference_matches_retrack(name):
    case = golden.Case(LOSSES / f"{name}.npz")
    _assert_matches(case, retrack_losses(case))


@pytest.mark.parametrize("name", golden.case_names(LOSSES, "siss_"))
def test_float64_reference_matches_siss(name):
    case = golden.Case(LOSSES / f"{name}.npz")
    _assert_matches(case, siss_losses(case))


@pytest.mark.parametrize("name", golden.case_names(LOSSES))
def test_every_array_is_an_input_or_an_output(name):
    case = golden.Case(LOSSES / f"{name}.npz")
    outputs = {f"{precision}.{key}" for precision in ("f32", "f64") for key in case.keys(f"{precision}.")}
    assert case.keys("") == outputs | {f"in.{key}" for key in case.keys("in.")}


def _assert_matches(case: golden.Case, computed: dict[str, Tensor | int]) -> None:
    golden.assert_all_checked(case.keys("f64."), computed)
    for key, value in computed.items():
        truth = case(f"f64.{key}")
        if not truth.is_floating_point():
            assert truth.tolist() == value, key
            continue
        error = relative_error(value, truth)
        assert error <= TOLERANCE, f"{case.name} {key}: relative error {error:.3g}"
