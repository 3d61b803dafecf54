"""residual: the weighted squared error of every sample and its gradient, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, per_row


def residual(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight ||prediction - target||^2` `[B]`, differentiable in `prediction`, and its gradient `2 weight (prediction - target)`.

    Args:
        prediction: `[B, C, H, W]`, any floating dtype; the gradient comes back in that dtype and memory layout.
        target: `[B, C, H, W]`.
        weight: `[B]`.
    """
    return _op(prediction, target, weight)


def _eager(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    difference = prediction.to(_accumulation_dtype(prediction)) - target
    loss = weight.to(difference.dtype) * difference.flatten(1).square().sum(1)
    gradient = torch.empty_like(prediction).copy_(per_row(2 * weight, difference) * difference)
    return loss.to(_accumulation_dtype(prediction)), gradient


def _empty(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    return prediction.new_empty(len(prediction), dtype=_accumulation_dtype(prediction)), torch.empty_like(prediction)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    prediction, target, weight = args
    return in_layout_of(outputs[1], prediction), in_layout_of(outputs[1], target), weight.contiguous()


def in_layout_of(like: Tensor, images: Tensor) -> Tensor:
    """`images` `[B, C, H, W]` with the samples laid out as those of `like`, copied only if they are not (the batch stride may be larger)."""
    matches = all(size == 1 or one == two for size, one, two in zip(like.shape[1:], like.stride()[1:], images.stride()[1:], strict=True))
    return images if matches else torch.empty_like(like, dtype=images.dtype).copy_(images)


def _accumulation_dtype(prediction: Tensor) -> torch.dtype:
    return torch.promote_types(prediction.dtype, torch.float32)


def setup_context(ctx, inputs, output) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def backward(ctx, grad_loss: Tensor | None, _):
    """The forward pass has made the gradient of every sample; each is scaled by that of its loss."""
    rest = (None,) * (len(ctx.needs_input_grad) - 1)
    if grad_loss is None:
        return None, *rest
    (gradient,) = ctx.saved_tensors
    return per_row(grad_loss, gradient) * gradient, *rest


_op = define("residual", "Tensor prediction, Tensor target, Tensor weight", ("loss", "gradient"), empty=_empty, eager=_eager, prepare=_prepare)
torch.library.register_autograd("fastunlearn::residual", backward, setup_context=setup_context)
