"""Predict and residual: the network on the rows of a pass, and the gradients of the loss with respect to its
output. Eagerly, or compiled as one graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .. import functional as F
from ..host import check
from ..host.profiling import stage
from ..objective.protocol import Pass, Role
from ..objective.schedule import NoiseSchedule
from . import compilation
from .attention import fast_attention
from .compilation import Compile


class Evaluation(NamedTuple):
    prediction: Tensor  # [R, C, H, W], with its graph
    # [B] for each term of the pass: the weighted squared errors of its rows, without its scale
    losses: list[Tensor]
    gradients: dict[Role, Tensor]  # d loss / d prediction, [R, C, H, W] in the dtype of the prediction


def evaluate(
    model: Callable,
    part: Pass,
    schedule: NoiseSchedule,
    *,
    apart: bool,
    factors: dict[Role, Tensor | float],
    autocast_dtype: torch.dtype | None = None,
    compile: Compile = False,
) -> Evaluation:
    """The network's prediction for the rows of `part`, the losses of its terms, and their gradients.

    Args:
        apart: a gradient for each role, instead of one for all terms together.
        factors: what the gradients of a role are multiplied by, beside the scale of its terms.
    """
    inputs = part.x_t, schedule.model_input(part.timesteps), part.kwargs
    spans = tuple(
        (term.role if apart else "retain", term.start, term.stop, term.scale) for term in part.terms
    )
    regression = (
        spans,
        [term.target for term in part.terms],
        [term.weight for term in part.terms],
        [factors[term.role] for term in part.terms],
    )
    if compile and compile != "regional":
        with stage("predict+residual"):
            outputs = compilation.whole(
                model, _forward_and_residual, (inputs, regression, autocast_dtype), required=compile != "try"
            )
        if outputs is not None:
            _check_prediction(outputs[0])
            return Evaluation(*outputs)
    with stage("predict"):
        if compile == "regional":
            prediction = compilation.by_blocks(model, predict, (*inputs, autocast_dtype))
        else:
            prediction = predict(model, *inputs, autocast_dtype)
        _check_prediction(prediction)
    with stage("residual"):
        return Evaluation(prediction, *residuals(prediction.detach(), *regression))


def predict(
    model: Callable, x_t: Tensor, t: Tensor, kwargs: dict, autocast_dtype: torch.dtype | None
) -> Tensor:
    """What the network returns for `x_t`, `[R, C, H, W]`."""
    if autocast_dtype is None:
        output = _call(model, x_t, t, kwargs)
    else:
        # a `with` of its own: TorchDynamo cannot trace one in an ExitStack
        with torch.autocast(x_t.device.type, dtype=autocast_dtype):
            output = _call(model, x_t, t, kwargs)
    prediction = check.network_output(output)
    rows, channels, *plane = x_t.shape
    if not isinstance(prediction, Tensor) or list(prediction.shape) not in (
        [rows, channels, *plane],
        [rows, 2 * channels, *plane],
    ):
        shapes = f"of shape {(rows, channels, *plane)}, or with {2 * channels} channels"
        expected = f"an output (or its .sample, or the first of a tuple) {shapes}"
        raise ValueError(f"model: expected {expected}, got {check.describe(prediction)}")
    return prediction[:, :channels]  # a learned variance, if there is one, is left alone


def _call(model: Callable, x_t: Tensor, t: Tensor, kwargs: dict):
    if x_t.device.type == "cpu" and not torch.compiler.is_compiling():
        with fast_attention():
            return model(x_t, t, **kwargs)
    return model(x_t, t, **kwargs)


def _forward_and_residual(
    model: Callable, inputs: tuple, regression: tuple, autocast_dtype: torch.dtype | None
) -> tuple[Tensor, list[Tensor], dict]:
    """What `compilation.whole` compiles."""
    prediction = predict(model, *inputs, autocast_dtype)
    return prediction, *residuals(prediction.detach(), *regression)


def residuals(
    prediction: Tensor,
    spans: tuple[tuple[Role, int, int, float], ...],
    targets: list[Tensor],
    weights: list[Tensor],
    factors: list[Tensor | float],
) -> tuple[list[Tensor], dict[Role, Tensor]]:
    """Losses of the terms and gradients of the roles.

    In float32 or better: half precision is rounded to once, after all factors.
    """
    dtype, losses, gradients = prediction.dtype, [], {}
    prediction = prediction.to(torch.promote_types(dtype, torch.float32))
    for (role, start, stop, scale), target, weight, factor in zip(
        spans, targets, weights, factors, strict=True
    ):
        loss, gradient = F.weighted_residual(prediction[start:stop], target, weight)
        losses.append(loss)
        for number in (scale, factor):
            gradient = gradient if isinstance(number, float) and number == 1 else gradient * number
        if stop - start == len(prediction) and role not in gradients:
            gradients[role] = gradient
        else:
            gradients.setdefault(role, torch.zeros_like(prediction))[start:stop] += gradient
    return losses, {role: gradient.to(dtype) for role, gradient in gradients.items()}


def _check_prediction(prediction: Tensor) -> None:
    if not prediction.requires_grad:
        why = "is the model frozen, under no_grad, or in an activation checkpoint with use_reentrant=True?"
        expected = "expected an output that depends on trainable parameters"
        raise ValueError(f"model: {expected}, got one without a gradient ({why})")
