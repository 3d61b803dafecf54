"""Whether what a method composed makes sense: asked before the network runs, and without waiting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import check
from ..objective.frequency import BandMask, LowPass, check_mask
from ..objective.protocol import COUPLINGS, ROLES, Method, Pass, Predicted, Term, has_own_objective
from .objective import rows_of

# What an objective of the method's own does not read: fields of a term that have to be as they are made.
UNREAD = {"weight": None, "over": None, "scale": 1.0, "gradient": None}


def check_composed(method: Method, passes: Any, *, with_reference: bool) -> None:
    """Refuses network calls that would fail half-way, or give another step than the one that is meant.

    Args:
        passes: what `method.compose` returned.
        with_reference: whether the step has a reference network.

    Raises:
        TypeError, ValueError: naming the method or the field, what was expected and what was given.
    """
    if not isinstance(passes, (list, tuple)) or not all(isinstance(each, Pass) for each in passes):
        raise TypeError(
            f"{type(method).__name__}.compose: expected a list of Pass, got {check.describe(passes)}"
        )
    if not passes:
        raise ValueError(f"{type(method).__name__}.compose: expected at least one Pass, got none")
    own_objective = has_own_objective(method)
    for each in passes:
        _check_pass(each)
        for term in each.terms:
            _check_term(term, each, with_reference)
        if own_objective:
            _check_for_objective(each)
    if own_objective and any(each.coupled == "pair" for each in passes):
        _check_pairs(passes)


def _check_pass(whole: Pass) -> None:
    if whole.coupled not in COUPLINGS:
        raise ValueError(
            f"Pass.coupled: expected one of {', '.join(COUPLINGS)}, got {check.describe(whole.coupled)}"
        )
    if whole.timesteps.shape != whole.x_t.shape[:1]:
        expected = f"one for each of the {len(whole.x_t)} rows of x_t"
        raise ValueError(f"Pass.timesteps: expected {expected}, got {check.describe(whole.timesteps)}")
    if not whole.terms or not all(isinstance(term, Term) for term in whole.terms):
        raise ValueError(f"Pass.terms: expected at least one Term, got {check.describe(whole.terms)}")


def _check_term(term: Term, whole: Pass, with_reference: bool) -> None:
    if term.role not in ROLES:
        raise ValueError(f"Term.role: expected one of {', '.join(ROLES)}, got {check.describe(term.role)}")
    rows = term.rows
    if not isinstance(rows, range) or rows.step != 1 or not 0 <= rows.start < rows.stop <= len(whole.x_t):
        expected = f"neighbouring rows of the {len(whole.x_t)} of the pass"
        raise ValueError(f"Term.rows: expected {expected}, got {rows!r}")
    _check_target(term, whole, with_reference)
    for name in ("weight", "spread"):
        value = getattr(term, name)
        if value is None:
            continue
        if not isinstance(value, Tensor) or value.shape != (len(rows),):
            expected = f"a tensor of {len(rows)}, one for each row of the term"
            raise ValueError(f"Term.{name}: expected {expected}, got {check.describe(value)}")
    if not isinstance(term.band, (LowPass, BandMask, type(None))):
        raise TypeError(f"Term.band: expected a LowPass or None, got {check.describe(term.band)}")
    if isinstance(term.band, BandMask):
        check_mask("Term.band", term.band, *whole.x_t.shape[-2:])


def _check_target(term: Term, whole: Pass, with_reference: bool) -> None:
    target = term.target
    if isinstance(target, Tensor):
        expected = (len(term.rows), *whole.x_t.shape[1:])
        if target.shape != expected:
            raise ValueError(f"Term.target: expected the shape {expected}, got {check.describe(target)}")
    elif not isinstance(target, Predicted):
        raise TypeError(f"Term.target: expected a tensor or Predicted, got {check.describe(target)}")
    else:
        if target.by == "reference" and not with_reference:
            expected = "'model' where the method does not need a reference"
            raise ValueError(f"Predicted.by: expected {expected}, got 'reference'")
        _check_rows("Predicted.kwargs", target.kwargs or {}, len(term.rows))


def _check_rows(name: str, kwargs: dict[str, Any], rows: int) -> None:
    for key, value in kwargs.items():
        if isinstance(value, dict):
            _check_rows(name, value, rows)
        elif isinstance(value, Tensor) and value.shape[:1] != torch.Size([rows]):
            expected = f"tensors of the {rows} rows of the term"
            raise ValueError(f"{name}: expected {expected}, got {check.describe(value)} for {key!r}")


def _check_for_objective(whole: Pass) -> None:
    for term in whole.terms:
        for name, unset in UNREAD.items():
            value = getattr(term, name)
            if value is not unset and not (name == "scale" and value == unset):
                expected = f"{unset} where the method has an objective of its own, which does not read it"
                raise ValueError(f"Term.{name}: expected {expected}, got {check.describe(value)}")


def _check_pairs(passes: Sequence[Pass]) -> None:
    """The b-th rows of the roles belong together: torch would broadcast one row to many."""
    rows = rows_of(passes)
    if len(set(rows.values())) > 1:
        found = ", ".join(f"{count} for {role}" for role, count in rows.items())
        raise ValueError(f"Pass.terms: expected as many rows of each role in pairs, got {found}")
