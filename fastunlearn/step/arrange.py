"""From what a method composes to the calls of the network: gradients named, weights final, rows in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..objective.combine import Combination
from ..objective.protocol import Pass, Term, without_negligible


class Unit(NamedTuple):
    """What the weights of a correction were divided by (`Rescale.unit`)."""

    everyones: Tensor | float = 1.0  # 0-d, > 0, of all processes.
    ratio: Tensor | None = None  # 0-d, from the unit of this process to that of all. None: it is the same.


def finish(
    passes: list[Pass], combination: Combination, group: dist.ProcessGroup | None
) -> tuple[list[Pass], Unit]:
    """`passes` whose terms name their gradient and have their final weights.

    Raises:
        ValueError: a term belongs to a gradient that the combination has not.
    """
    # The correction alone has a unit, and only under a combination that cancels it (`Rescale.unit`).
    correction = own = divisor = None
    if len(combination.gradients) == 2:
        correction = combination.gradients[0]
        own = combination.unit(_weights_of(correction, passes, combination))
    if own is not None:
        divisor = _positive(own)

    finished = []
    for each in passes:
        terms = []
        for term in each.terms:
            gradient = gradient_of(term, combination)
            unit = divisor if gradient == correction else None
            terms.append(_finished(term, gradient, unit, each.x_t))
        finished.append(Pass(each.x_t, each.timesteps, tuple(terms), each.kwargs, each.coupled))
    if own is None:
        return finished, Unit()
    if group is None:
        return finished, Unit(divisor)

    # Several processes have a unit each. Their gradients are averaged in the largest one.
    everyones = own.clone()
    dist.all_reduce(everyones, op=dist.ReduceOp.MAX, group=group)
    everyones = _positive(everyones)
    return finished, Unit(everyones, own / everyones)


def _weights_of(gradient: str, passes: list[Pass], combination: Combination) -> list[Tensor]:
    """The weights, where they are numbers, of all terms that belong to `gradient`."""
    weights = []
    for each in passes:
        for term in each.terms:
            if gradient_of(term, combination) == gradient and _is_floating(term.weight):
                weights.append(term.weight)
    return weights


def _is_floating(weight: Tensor | None) -> bool:
    return weight is not None and weight.is_floating_point()


def _positive(unit: Tensor) -> Tensor:
    """1 where there is nothing to divide."""
    return torch.where(unit > 0, unit, torch.ones_like(unit))


def gradient_of(term: Term, combination: Combination) -> str:
    """The gradient that `term` belongs to.

    Raises:
        ValueError: the combination has no such gradient.
    """
    names, gradient = combination.gradients, term.gradient
    if gradient is None and len(names) == 1:
        gradient = names[0]
    elif gradient is None:
        gradient = term.role
    if gradient not in names:
        expected = f"expected one of {', '.join(names)} ({type(combination).__name__})"
        raise ValueError(f"Term.gradient: {expected}, got {gradient!r}")
    return gradient


def _finished(term: Term, gradient: str, unit: Tensor | None, x_t: Tensor) -> Term:
    """`term` with its gradient and the weights that its losses are summed with, float32 or better."""
    # A term is `sum_b weight_b loss_b / over`: the division moves into the weights.
    rows = len(term.rows)
    over = rows if term.over is None else term.over
    like = term.target if isinstance(term.target, Tensor) else x_t
    dtype = torch.promote_types(like.dtype, torch.float32)
    weight = term.weight
    if weight is None:
        weight = torch.full((rows,), 1 / over, device=like.device, dtype=dtype)
    elif not _is_floating(weight):
        weight = weight.to(dtype) / over
    else:
        if unit is not None:
            weight = weight / unit
        weight = without_negligible(weight) / over
    # Written out: `replace` takes ten times as long, of a step that may take a millisecond.
    return Term(term.role, term.target, weight, 1.0, term.rows, term.spread, term.scale, gradient, term.band)


def in_calls(
    passes: list[Pass],
    combination: Combination,
    micro_batch_size: int | None,
    *,
    by_role: bool,
    alone: bool,
) -> tuple[list[Pass], bool]:
    """The calls of the network in order, and whether a correction can be finished in place.

    In place: it is complete before the main gradient begins. Where the two are kept apart, calls for the
    correction alone come first and those for the main gradient alone last.

    Args:
        by_role: rows are sorted by the terms that need them, which reads weights.
        alone: there is one process.
    """
    whole = passes
    if by_role:
        whole = []
        for each in passes:
            whole += each.by_role()
    calls = split(whole, micro_batch_size)

    # Several processes reduce their gradients in the same order: what decides it must not depend on the rows
    # that one of them has.
    decisive = calls if alone else split(passes, micro_batch_size)
    in_place = sum(len(part.gradients) > 1 for part in decisive) <= 1
    if len(combination.gradients) == 2:
        correction, main = combination.gradients
        first = [part for part in calls if part.gradients == {correction}]
        both = [part for part in calls if part.gradients == {correction, main}]
        last = [part for part in calls if part.gradients == {main}]
        calls = [*first, *both, *last]
    return calls, in_place


def split(passes: Sequence[Pass], micro_batch_size: int | None) -> list[Pass]:
    """Calls of at most `micro_batch_size` rows, wherever those lie."""
    calls = []
    for each in passes:
        calls += each.split(micro_batch_size)
    return calls
