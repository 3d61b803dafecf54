"""residual: the weighted squared error of every sample and its gradient, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, per_row


def residual(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight ||prediction - target||^2` `[B]`, differentiable in `prediction`, and its gradient `2 weight (prediction - target)`.

    Args:
        prediction: `[B, C, H, W]`, any floating dtype; the gradient comes back in that dtype.
        target: `[B, C, H, W]`.
        weight: `[B]`.
    """
    return _op(prediction, target, weight)


def _eager(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    difference = prediction.to(_accumulation_dtype(prediction)) - target
    loss = weight.to(difference.dtype) * difference.flatten(1).square().sum(1)
    return loss, (per_row(2 * weight, difference) * difference).to(prediction.dtype)


def _fake(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.new_empty(len(prediction), dtype=_accumulation_dtype(prediction)), torch.empty_like(prediction)


def _accumulation_dtype(prediction: Tensor) -> torch.dtype:
    return torch.promote_types(prediction.dtype, torch.float32)


def _setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_loss: Tensor | None, _):
    if grad_loss is None:
        return None, None, None
    (gradient,) = ctx.saved_tensors
    return per_row(grad_loss, gradient) * gradient, None, None


_op = define("residual", "(Tensor prediction, Tensor target, Tensor weight) -> (Tensor, Tensor)", _eager, _fake)
torch.library.register_autograd("fastunlearn::residual", _backward, setup_context=_setup_context)
