"""From what a method composes to the calls of the network: gradients named, weights final, rows in order."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..objective.combine import Combination
from ..objective.protocol import Pass, Term, without_negligible


class Unit(NamedTuple):
    """What the weights of a correction were divided by (`Rescale.unit`)."""

    everyones: Tensor | float = 1.0  # 0-d, > 0: of all processes
    ratio: Tensor | None = None  # 0-d: from the unit of this process to that of all; None: it is the same


def finish(
    passes: list[Pass], combination: Combination, group: dist.ProcessGroup | None
) -> tuple[list[Pass], Unit]:
    """`passes` whose terms name their gradient and have their final weights.

    Raises:
        ValueError: a term belongs to a gradient that the combination has not.
    """
    named = [
        replace(each, terms=tuple(_with_gradient(term, combination) for term in each.terms))
        for each in passes
    ]
    correction = combination.gradients[0] if len(combination.gradients) == 2 else None
    own = None
    if correction is not None:
        terms = [term for each in named for term in each.terms if term.gradient == correction]
        own = combination.unit([term.weight for term in terms if _is_floating(term.weight)])
    divisor = None if own is None else _positive(own)
    finished = [
        replace(
            each,
            terms=tuple(
                _with_weight(term, divisor if term.gradient == correction else None, each)
                for term in each.terms
            ),
        )
        for each in named
    ]
    if own is None:
        return finished, Unit()
    if group is None:
        return finished, Unit(divisor)
    everyones = own.clone()
    dist.all_reduce(everyones, op=dist.ReduceOp.MAX, group=group)
    everyones = _positive(everyones)
    return finished, Unit(everyones, own / everyones)


def _is_floating(weight: Tensor | None) -> bool:
    return weight is not None and weight.is_floating_point()


def _positive(unit: Tensor) -> Tensor:
    """1 where there is nothing to divide."""
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def _with_gradient(term: Term, combination: Combination) -> Term:
    names = combination.gradients
    gradient = term.gradient
    if gradient is None:
        gradient = names[0] if len(names) == 1 else term.role
    if gradient not in names:
        raise ValueError(
            f"Term.gradient: expected one of {', '.join(names)} ({type(combination).__name__}), got {gradient!r}"
        )
    return replace(term, gradient=gradient)


def _with_weight(term: Term, unit: Tensor | None, whole: Pass) -> Term:
    """`term` with the weights that its losses are summed with, `[B]` in float32 or better."""
    rows = len(term.rows)
    over = rows if term.over is None else term.over
    like = term.target if isinstance(term.target, Tensor) else whole.x_t
    dtype = torch.promote_types(like.dtype, torch.float32)
    if term.weight is None:
        return replace(term, weight=torch.full((rows,), 1 / over, device=like.device, dtype=dtype), over=1.0)
    if not _is_floating(term.weight):
        return replace(term, weight=term.weight.to(dtype) / over, over=1.0)
    weight = term.weight if unit is None else term.weight / unit
    return replace(term, weight=without_negligible(weight) / over, over=1.0)


def in_calls(
    passes: list[Pass],
    combination: Combination,
    micro_batch_size: int | None,
    *,
    by_role: bool,
    alone: bool,
) -> tuple[list[Pass], bool]:
    """The calls of the network in order, and whether the correction is complete before the main gradient
    begins.

    Where the two are kept apart, calls for the correction alone come first and those for the main gradient
    alone last.

    Args:
        by_role: rows are sorted by the terms that need them, which reads weights.
        alone: there is one process.
    """

    def split(some: list[Pass]) -> list[Pass]:
        return [part for each in some for part in each.split(micro_batch_size)]

    calls = split([part for each in passes for part in each.by_role()] if by_role else passes)
    # Several processes reduce their gradients in the same order: what decides it must not depend on the rows
    # that one of them has.
    decisive = calls if alone else split(passes)
    in_place = sum(len(part.gradients) > 1 for part in decisive) <= 1
    if len(combination.gradients) == 2:
        correction, main = combination.gradients
        first = [part for part in calls if part.gradients == {correction}]
        both = [part for part in calls if part.gradients == {correction, main}]
        last = [part for part in calls if part.gradients == {main}]
        calls = [*first, *both, *last]
    return calls, in_place
