"""Predict and residual: the network on the rows of a pass, and the regressions on its output.

Eagerly, or compiled as one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .. import functional as F
from ..host.profiling import stage
from ..objective.frequency import BandMask
from ..objective.protocol import Pass, Predicted, Term
from ..objective.schedule import NoiseSchedule
from . import compilation
from .compilation import Compile
from .predict import check_prediction, predict


class Span(NamedTuple):
    """What a compiled graph holds of a term as a constant."""

    gradient: str
    start: int  # Of its rows in the pass.
    stop: int
    scale: float
    band: tuple[float, float] | None  # BandMask.inside and BandMask.outside; its table is an input.


class Regression(NamedTuple):
    """What a call of the network brings."""

    prediction: Tensor  # [R, C, H, W], with its graph.
    losses: list[Tensor]  # For each term: [B], weighted squared errors, without its scale.
    gradients: dict[str, Tensor]  # For each gradient: d loss / d prediction, [R, C, H, W].


class Networks(NamedTuple):
    """Those that a step calls, and how."""

    model: Callable
    reference: Callable | None
    autocast_dtype: torch.dtype | None
    compile: Compile


def regress(
    networks: Networks,
    part: Pass,
    schedule: NoiseSchedule,
    factors: dict[str, Tensor | float],
    *,
    rounded: bool = True,
) -> Regression:
    """The network's prediction for the rows of `part`, the losses of its terms, and their gradients.

    Args:
        part: its targets are tensors, its weights final, its gradients named, its bands masks.
        factors: what a gradient is multiplied by, beside the scale of its terms.
        rounded: gradients have the dtype of the prediction; else float32 or better, for further factors.
    """
    inputs = part.x_t, schedule.model_input(part.timesteps), part.kwargs
    regression = (
        tuple(_span(term) for term in part.terms),
        [term.target for term in part.terms],
        [term.weight for term in part.terms],
        [factors[term.gradient] for term in part.terms],
        [None if term.band is None else term.band.table for term in part.terms],
        rounded,
    )
    compile, autocast_dtype = networks.compile, networks.autocast_dtype

    # Compiled as a whole, prediction and residual are one graph. There are no outputs where that failed and
    # is not required.
    if compile and compile != "regional":
        with stage("predict+residual"):
            outputs = compilation.whole(
                networks.model,
                _forward_and_residual,
                (inputs, regression, autocast_dtype),
                required=compile != "try",
            )
        if outputs is not None:
            check_prediction(outputs[0])
            return Regression(*outputs)

    with stage("predict"):
        if compile == "regional":
            prediction = compilation.by_blocks(networks.model, predict, (*inputs, autocast_dtype))
        else:
            prediction = predict(networks.model, *inputs, autocast_dtype)
        check_prediction(prediction)
    with stage("residual"):
        return Regression(prediction, *residuals(prediction.detach(), *regression))


def _span(term: Term) -> Span:
    band = None if term.band is None else (term.band.inside, term.band.outside)
    return Span(term.gradient, term.rows.start, term.rows.stop, term.scale, band)


def _forward_and_residual(
    model: Callable, inputs: tuple, regression: tuple, autocast_dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor], dict]:
    """What `compilation.whole` compiles."""
    prediction = predict(model, *inputs, autocast_dtype)
    return prediction, *residuals(prediction.detach(), *regression)


def residuals(
    prediction: Tensor,
    spans: tuple[Span, ...],
    targets: list[Tensor],
    weights: list[Tensor],
    factors: list[Tensor | float],
    tables: list[Tensor | None],
    rounded: bool = True,
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The losses of terms, and the gradients that they belong to.

    In float32 or better: half precision is rounded to once, after all factors.
    """
    dtype, losses, gradients = prediction.dtype, [], {}
    prediction = prediction.to(torch.promote_types(dtype, torch.float32))
    for span, target, weight, factor, table in zip(spans, targets, weights, factors, tables, strict=True):
        rows = slice(span.start, span.stop)
        mask = None if span.band is None else BandMask(table, *span.band)
        loss, gradient = F.weighted_residual(prediction[rows], target, weight, mask)
        losses.append(loss)
        # A tensor is a factor that nobody has read; a 1 is no work.
        for number in (span.scale, factor):
            if not isinstance(number, float) or number != 1:
                gradient = gradient * number
        # A term on all rows is the gradient, unless another came before; else it is added at its rows.
        if span.stop - span.start == len(prediction) and span.gradient not in gradients:
            gradients[span.gradient] = gradient
        else:
            gradients.setdefault(span.gradient, torch.zeros_like(prediction))[rows] += gradient
    if rounded:
        gradients = {name: gradient.to(dtype) for name, gradient in gradients.items()}
    return losses, gradients


def losses_without_graph(
    network: Callable, networks: Networks, part: Pass, schedule: NoiseSchedule, *, weighted: bool = False
) -> list[Tensor]:
    """For each term the losses `[B]` of its rows, `||prediction - target||^2 + spread`, without weights.

    Args:
        weighted: with them, and without spread, as in a `Regression`.
    """
    prediction = _prediction_without_graph(network, networks, part, schedule)
    prediction = prediction.to(torch.promote_types(prediction.dtype, torch.float32))
    losses = []
    for term in part.terms:
        rows = slice(term.rows.start, term.rows.stop)
        weight = term.weight if weighted else None
        loss, _ = F.weighted_residual(prediction[rows], term.target, weight, term.band)
        if term.spread is not None and not weighted:
            loss = loss + term.spread
        losses.append(loss)
    return losses


def with_targets(networks: Networks, part: Pass, schedule: NoiseSchedule) -> Pass:
    """`part` with the targets that a network predicts. Before the step's own call: no graph lives beside."""
    if all(isinstance(term.target, Tensor) for term in part.terms):
        return part
    return replace(part, terms=tuple(_with_target(networks, term, part, schedule) for term in part.terms))


def _with_target(networks: Networks, term: Term, part: Pass, schedule: NoiseSchedule) -> Term:
    if not isinstance(term.target, Predicted):
        return term
    rows = slice(term.rows.start, term.rows.stop)
    kwargs = term.target.kwargs
    if kwargs is None:
        kwargs = part.only(term.rows).kwargs
    own = Pass(part.x_t[rows], part.timesteps[rows], (), kwargs)
    network = networks.model if term.target.by == "model" else networks.reference
    return replace(term, target=_prediction_without_graph(network, networks, own, schedule))


def _prediction_without_graph(
    network: Callable, networks: Networks, part: Pass, schedule: NoiseSchedule
) -> Tensor:
    """By the path that the step's own call takes: equal networks predict equal bits."""
    arguments = part.x_t, schedule.model_input(part.timesteps), part.kwargs, networks.autocast_dtype
    name = "model" if network is networks.model else "reference_model"
    # Any callable may be compared with, and what is compiled is a network.
    compile = networks.compile if isinstance(network, nn.Module) else False
    with torch.no_grad(), stage("predict"):
        if compile == "regional":
            return compilation.by_blocks(network, predict, (*arguments, name))
        if compile:
            required = compile != "try"
            prediction = compilation.whole(network, _forward, arguments, required=required)
            if prediction is not None:
                return prediction
        # A callable of the caller's may have made a graph all the same.
        return predict(network, *arguments, name).detach()


def _forward(
    network: Callable, x_t: Tensor, t: Tensor, kwargs: dict, autocast_dtype: torch.dtype | None
) -> Tensor:
    """What `compilation.whole` compiles of a call without a graph."""
    return predict(network, x_t, t, kwargs, autocast_dtype)
