"""SISS' Bernoulli loss on batches with rows of one branch only: the vectors, and the package."""

from __future__ import annotations

import json
from pathlib import Path

import bernoulli
import numpy as np
import pytest
import torch
from literal_losses import siss_losses
from test_losses_functional import LOSSES, bernoulli_terms

from fastunlearn.testing import golden
from fastunlearn.testing.budgets import relative_error

BOTH, FORGET = {"x", "a"}, {"a"}
CASES = [
    name
    for name in golden.case_names(LOSSES, "siss_")
    if 0 < golden.Case(LOSSES / f"{name}.npz").meta["case"]["lambd"] < 1
]


def _one_sided(name: str, folder: Path, *, from_forget: bool, stand_in: int) -> golden.Case:
    """A stored case as the official code stores it if all rows are picked from one branch.

    All from the retain image: it is the official naive deletion divided by `1 - lambd`, whose numbers are in
    the case. All from the forget image: zeros. A term that is replaced has `stand_in` samples and no
    gradient.
    """
    stored = golden.Case(LOSSES / f"{name}.npz")
    arrays = {key: stored(key).numpy() for key in stored.keys("")}
    lambd, rows = stored.meta["case"]["lambd"], len(stored("in.mask_uniform"))
    arrays["in.mask_uniform"] = np.full(rows, lambd / 2 if from_forget else (1 + lambd) / 2, np.float32)
    for precision in ("f32", "f64"):
        prefix, naive = f"{precision}.{bernoulli.PREFIX}", f"{precision}.naive_del"
        zero = np.zeros((), arrays[f"{naive}.loss"].dtype)
        for side in ("x", "a"):
            arrays[f"{prefix}.loss_{side}"] = zero
            arrays[f"{prefix}.per_sample_{side}"] = np.tile(zero, stand_in)
            arrays.pop(f"{prefix}.grad_{side}.first", None)
        arrays[f"{prefix}.n_remain_n_deletion"] = np.array([0, rows] if from_forget else [rows, 0])
        if not from_forget:
            for key, source in (
                ("loss_x", "loss"),
                ("per_sample_x", "per_sample"),
                ("grad_x.first", "grad.first"),
            ):
                arrays[f"{prefix}.{key}"] = arrays[f"{naive}.{source}"] / (1 - lambd)
    path = folder / "one_sided.npz"
    np.savez(path, meta=np.array(json.dumps(stored.meta)), **arrays)
    return golden.Case(path)


@pytest.mark.parametrize("stand_in", [0, 1])
@pytest.mark.parametrize("from_forget", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_vectors_of_a_one_sided_batch(name, from_forget, stand_in, tmp_path):
    case = _one_sided(name, tmp_path, from_forget=from_forget, stand_in=stand_in)
    literal = siss_losses(case)
    public = bernoulli_terms(case)
    for computed, tolerance in ((literal, 1e-10), (public, 1e-5)):
        terms = {key: value for key, value in computed.items() if key.startswith(bernoulli.PREFIX)}
        counted = {key for key in terms if ".n_" in key}
        names = {f"{bernoulli.PREFIX}.{key}" for key in case.keys(f"f64.{bernoulli.PREFIX}.")}
        golden.assert_all_checked({key for key in names if ".n_" not in key}, terms.keys() - counted)
        for key in terms.keys() - counted:
            assert relative_error(terms[key], case(f"f64.{key}")) <= tolerance, key
    assert (
        literal[f"{bernoulli.PREFIX}.n_remain_n_deletion"]
        == case(f"f64.{bernoulli.PREFIX}.n_remain_n_deletion").tolist()
    )


@pytest.mark.parametrize(
    ("picked", "replaced"),
    [([True, True], BOTH), ([False, False], FORGET), ([True, False], set()), ([False, True], set())],
)
def test_terms_that_the_official_code_replaces(picked, replaced):
    assert bernoulli.replaced_terms(torch.tensor(picked)) == replaced


def test_a_stored_term_that_should_have_been_replaced_is_an_error(tmp_path):
    case = _one_sided(CASES[0], tmp_path, from_forget=True, stand_in=1)
    case._arrays[f"f64.{bernoulli.PREFIX}.loss_a"] = np.ones(())
    key = f"{bernoulli.PREFIX}.loss_a"
    assert relative_error(siss_losses(case)[key], case(f"f64.{key}")) == 1
