"""A method's own objective: its value, and the weights that it gives to the rows.

The derivative of an objective with respect to the losses of the rows is a weight for each row; with weights
known, a step is a weighted regression like any other. Where no rows are tied together, or those that are fit
one call of the network, the derivative is taken in the call that learns from it. Otherwise the losses of all
rows are found first, without a graph, and the rows go through the network a second time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from ..host import check
from ..objective.protocol import Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from . import arrange
from .losses import everyones as everyones_means
from .predict import unsteady
from .regress import Networks, Regression, losses_without_graph, regress, with_targets

ByRole = dict[str, Tensor]  # For each role a number for each of its rows, [rows].


class Derivative(NamedTuple):
    """Of an objective with respect to the losses of rows."""

    values: dict[str, Tensor]  # For each gradient, 0-d: what these rows add to it.
    weights: dict[str, ByRole]  # For each gradient, for each role: [rows].


def derive(
    method: Method, losses: ByRole, reference: ByRole, rows: dict[str, int], elements: int
) -> Derivative:
    """What the objective of `method` makes of `losses`, and its derivative: the weights of the rows.

    Args:
        losses, reference: of the rows that the objective is asked for.
        rows: of each role in all calls, which its contributions are averaged over.
        elements: of one image.
    """
    leaves = {role: loss.detach().requires_grad_() for role, loss in losses.items()}
    values, weights = {}, {}
    with torch.enable_grad():
        for gradient, contributions in _asked(method, leaves, reference, elements).items():
            if not contributions:  # of these rows none count for it
                continue
            value = sum(_mean(method, role, each, leaves, rows) for role, each in contributions.items())
            values[gradient], weights[gradient] = value.detach(), {}
            if value.requires_grad:  # else it is a constant
                found = torch.autograd.grad(
                    value, list(leaves.values()), retain_graph=True, allow_unused=True
                )
                weights[gradient] = {
                    role: weight for role, weight in zip(leaves, found, strict=True) if weight is not None
                }
    return Derivative(values, weights)


def _asked(method: Method, losses: ByRole, reference: ByRole, elements: int) -> dict[str, ByRole]:
    """What the objective answers, whose gradients are those of the combination."""
    name = f"{type(method).__name__}.objective"
    found = method.objective(losses, reference, elements)
    if not isinstance(found, dict) or not all(isinstance(own, dict) for own in found.values()):
        raise TypeError(
            f"{name}: expected {{gradient: {{role: contributions}}}}, got {check.describe(found)}"
        )
    names = method.combine.gradients
    unknown = [gradient for gradient in found if gradient not in names]
    if unknown:
        expected = f"expected gradients of {type(method.combine).__name__}, {', '.join(names)}"
        raise ValueError(f"{name}: {expected}, got {unknown[0]!r}")
    return found


def _mean(method: Method, role: str, contributions: Tensor, losses: ByRole, rows: dict[str, int]) -> Tensor:
    given = contributions if isinstance(contributions, Tensor) else None
    if role not in losses or given is None or given.shape != losses[role].shape:
        expected = f"one contribution for each row of {', '.join(losses)}"
        shown = check.describe(contributions) if given is None else tuple(given.shape)
        raise ValueError(f"{type(method).__name__}.objective: expected {expected}, got {shown} for {role!r}")
    if torch.promote_types(given.dtype, torch.float32) != given.dtype:
        raise TypeError(
            f"{type(method).__name__}.objective: expected contributions in float32 or better, "
            f"got {given.dtype} for {role!r}"
        )
    return contributions.sum() / rows[role]


def fits_one_call(passes: Sequence[Pass], micro_batch_size: int | None, *, alone: bool) -> bool:
    """Whether all rows that the objective ties together are in one call of the network."""
    if all(each.coupled == "row" for each in passes):
        return True
    if len(passes) > 1:
        return False
    whole = passes[0]
    # A pair has one row of each term. A whole batch has rows of all processes.
    if whole.coupled == "pair":
        return micro_batch_size is None or micro_batch_size >= len(whole.terms)
    return alone and (micro_batch_size is None or micro_batch_size >= len(whole.x_t))


def rows_of(passes: Sequence[Pass]) -> dict[str, int]:
    """How many rows each role has."""
    rows: dict[str, int] = {}
    for each in passes:
        for term in each.terms:
            rows[term.role] = rows.get(term.role, 0) + len(term.rows)
    return rows


def check_roles(passes: Sequence[Pass]) -> None:
    """
    Raises:
        ValueError: two terms of a pass have one role, so that an objective could not tell their losses apart.
    """
    for each in passes:
        roles = [term.role for term in each.terms]
        if len(set(roles)) < len(roles):
            expected = "terms of different roles in a pass, where the method has an objective of its own"
            raise ValueError(f"Pass.terms: expected {expected}, got {', '.join(roles)}")


def split(passes: Sequence[Pass], micro_batch_size: int | None) -> list[Pass]:
    """Calls that hold all that is tied together, where `fits_one_call`."""
    parts = []
    for each in passes:
        if each.coupled == "pair":
            parts += each.split_pairs(micro_batch_size)
        else:
            parts += each.split(micro_batch_size)
    return parts


def regress_by_objective(
    method: Method,
    networks: Networks,
    part: Pass,
    schedule: NoiseSchedule,
    rows: dict[str, int],
    factors: dict[str, Tensor | float],
) -> tuple[Regression, ByRole, Derivative]:
    """A call of the network whose rows are weighted by the derivative of the objective on them.

    The reference runs before: it holds no graph. Nothing is differentiated within compiled code, which
    returns the losses and, for each term, the residual without weights.
    """
    part = with_targets(networks, part, schedule)
    reference = _by_role(part, _reference_losses(method, networks, part, schedule))

    # The regression without weights: each term as a gradient of its own, named by its number.
    plain = replace(part, terms=tuple(_plain(term, number) for number, term in enumerate(part.terms)))
    ones = {str(number): 1.0 for number in range(len(part.terms))}
    found = regress(networks, plain, schedule, ones, rounded=False)
    losses = _by_role(part, [_with_spread(*each) for each in zip(part.terms, found.losses, strict=True)])
    derivative = derive(method, losses, reference, rows, _elements(part))

    # The chain rule: d value / d prediction = sum_b d value / d loss_b * d loss_b / d prediction.
    gradients: dict[str, Tensor] = {}
    for name, weights in derivative.weights.items():
        for number, term in enumerate(part.terms):
            if term.role not in weights:
                continue
            per_row = _per_row(weights[term.role], term, part, factors[name])
            weighted = found.gradients[str(number)] * per_row
            if name in gradients:
                weighted = gradients[name] + weighted
            gradients[name] = weighted
    dtype = found.prediction.dtype
    gradients = {name: gradient.to(dtype) for name, gradient in gradients.items()}
    return Regression(found.prediction, found.losses, gradients), losses, derivative


def weigh_all(
    method: Method,
    networks: Networks,
    passes: Sequence[Pass],
    schedule: NoiseSchedule,
    micro_batch_size: int | None,
    group: dist.ProcessGroup | None,
) -> tuple[list[Pass], ByRole, Derivative]:
    """`passes` with final weights, for an objective that ties rows of several calls together.

    Two phases: the losses of all rows without a graph (of all processes, where the batch is tied together),
    then, in the caller's hands, the calls that learn.

    Raises:
        ValueError: the network has active dropout, and would not repeat its losses, or counts its calls.
    """
    _refuse_unsteady(networks.model)
    parts = [with_targets(networks, part, schedule) for part in arrange.split(passes, micro_batch_size)]
    reference = _joined(parts, [_reference_losses(method, networks, part, schedule) for part in parts])
    found = [losses_without_graph(networks.model, networks, part, schedule) for part in parts]
    losses = _joined(parts, found)

    # Their weights. An objective that ties a batch together is asked for the rows of all processes.
    gathered = group is not None and any(each.coupled == "batch" for each in passes)
    if gathered and passes[0].x_t.device.type == "cpu":
        # gloo ends the process where it is handed other sizes.
        own = {role: len(loss) for role, loss in losses.items()}
        everyones_means({role: loss.mean() for role, loss in losses.items()}, own, group)
    everyones = losses
    if gathered:
        everyones, reference = _gather(losses, group), _gather(reference, group)
    rows = {role: len(loss) for role, loss in everyones.items()}
    derivative = derive(method, everyones, reference, rows, _elements(passes[0]))
    weights = derivative.weights
    if gathered:
        weights = _own_share(weights, group)
    return _with_weights(parts, weights), losses, derivative


def _own_share(weights: dict[str, ByRole], group: dist.ProcessGroup) -> dict[str, ByRole]:
    """The weights of this process's rows, from those of all processes in the order of their ranks.

    Gradients are averaged over the processes afterwards, and these weights are shares of all rows: so they
    are multiplied by the number of processes.
    """
    count, rank = dist.get_world_size(group), dist.get_rank(group)
    return {
        gradient: {role: weight.chunk(count)[rank] * count for role, weight in own.items()}
        for gradient, own in weights.items()
    }


def _with_weights(parts: Sequence[Pass], weights: dict[str, ByRole]) -> list[Pass]:
    """`parts` with a term for each gradient that gives weights to the rows of its role.

    The rows of a role lie in `weights` in the order of the calls.
    """
    weighted, begun = [], {}
    for part in parts:
        terms = []
        for term in part.terms:
            start = begun.get(term.role, 0)
            stop = begun[term.role] = start + len(term.rows)
            for gradient, own in weights.items():
                if term.role in own:
                    weight = own[term.role][start:stop]
                    terms.append(replace(term, gradient=gradient, weight=weight, over=1.0, scale=1.0))
        weighted.append(replace(part, terms=tuple(terms), coupled="row"))
    return weighted


def _reference_losses(
    method: Method, networks: Networks, part: Pass, schedule: NoiseSchedule
) -> list[Tensor] | None:
    compared = any(term.role in method.compared for term in part.terms)
    if "reference" not in method.needs or not compared:
        return None
    return losses_without_graph(networks.reference, networks, part, schedule)


def _elements(part: Pass) -> int:
    """Of one image: C H W."""
    return part.x_t.shape[1:].numel()


def _plain(term: Term, number: int) -> Term:
    """`term` as a gradient of its own, in which each row counts 1."""
    ones = torch.ones(len(term.rows), device=term.target.device)
    return replace(term, gradient=str(number), weight=ones, over=1.0, scale=1.0)


def _with_spread(term: Term, loss: Tensor) -> Tensor:
    if term.spread is None:
        return loss
    return loss + term.spread


def _per_row(weight: Tensor, term: Term, part: Pass, factor: Tensor | float) -> Tensor:
    """`[R, 1, 1, 1]`: the weights of a term's rows, and 0 at the others, where its residual is 0."""
    whole = weight.new_zeros(len(part.x_t))
    whole[term.rows.start : term.rows.stop] = weight
    return (whole * factor).view(-1, *[1] * (part.x_t.ndim - 1))


def _by_role(part: Pass, losses: list[Tensor] | None) -> ByRole:
    if losses is None:
        return {}
    return {term.role: loss for term, loss in zip(part.terms, losses, strict=True)}


def _joined(parts: list[Pass], losses: list[list[Tensor] | None]) -> ByRole:
    """The losses of all rows of a role in the order of the calls."""
    found: dict[str, list[Tensor]] = {}
    for part, own in zip(parts, losses, strict=True):
        for role, loss in _by_role(part, own).items():
            found.setdefault(role, []).append(loss)
    return {role: torch.cat(own) for role, own in found.items()}


def _gather(losses: ByRole, group: dist.ProcessGroup) -> ByRole:
    """Those of all processes, in the order of their ranks; each has as many rows."""
    gathered = {}
    for role, loss in losses.items():
        own = [torch.empty_like(loss) for _ in range(dist.get_world_size(group))]
        dist.all_gather(own, loss.contiguous(), group=group)
        gathered[role] = torch.cat(own)
    return gathered


def _refuse_unsteady(network: Callable) -> None:
    found = unsteady(network)
    if found is not None:
        expected = (
            f"a network without {found.what}, since rows that an objective ties together go through it twice"
        )
        fitting = "eval() stops it, and a micro_batch_size that holds all of them needs one pass"
        raise ValueError(f"model: expected {expected} ({fitting}), got {found.where}")
