"""What golden vectors hold of SISS' Bernoulli loss where a batch has rows of one branch only.

The official code then puts a single zero in place of a term: of the forget term `a` without a forget row, but
of *both* terms without a retain row, so that a forget term that exists is lost. Such a term has no gradient,
and none is stored. The package computes the term that exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastunlearn.testing import golden

PREFIX = "subscore_bernoulli"


def replaced_terms(from_forget: Tensor) -> set[str]:
    """The terms (`x` retain, `a` forget) that the official code replaces by a zero."""
    if from_forget.all():
        return {"x", "a"}
    return set() if from_forget.any() else {"a"}


def without_replaced(values: dict[str, Tensor], from_forget: Tensor, case: golden.Case) -> dict[str, Tensor]:
    """`values` (`loss_x`, `per_sample_a`, `grad_x.first`, ...) with zeros for replaced terms, if stored."""
    replaced = replaced_terms(from_forget)
    kept = {}
    for key, value in values.items():
        if key.partition(".")[0].rpartition("_")[2] not in replaced:
            kept[key] = value
            continue
        for precision in ("f32", "f64"):
            stored = f"{precision}.{PREFIX}.{key}"
            if stored in case:
                kept[key] = torch.zeros(case(stored).shape, dtype=value.dtype)
    return kept


def counts(from_forget: Tensor) -> list[int]:
    """Rows from the retain image, rows from the forget image."""
    return [int((~from_forget).sum()), int(from_forget.sum())]
