"""residual: the weighted squared error of every sample and its gradient, in one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import at_least_float32, check_shape, define, per_row


def residual(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight ||prediction - target||^2` `[B]`, and its gradient `2 weight (prediction - target)`.

    The first is differentiable in `prediction`.

    Args:
        prediction: `[B, C, H, W]`, any floating dtype; the gradient comes back in that dtype and memory
            layout.
        target: `[B, C, H, W]`.
        weight: `[B]`.
    """
    return _op(prediction, target, weight)


def _eager(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    precision = at_least_float32(prediction.dtype)
    difference = prediction.to(precision) - target
    weight = weight.to(difference.dtype)
    loss = weight * difference.flatten(1).square().sum(1)
    gradient = per_row(2 * weight, difference) * difference
    return loss.to(precision), like_prediction(prediction).copy_(gradient)


def check(prediction: Tensor, target: Tensor, weight: Tensor, *rest) -> None:
    if prediction.ndim != 4 or prediction.numel() == 0:
        expected = "expected at least one image [B, C, H, W]"
        raise ValueError(f"prediction: {expected}, got shape {tuple(prediction.shape)}")
    check_shape("target", target, prediction.shape)
    check_shape("weight", weight, prediction.shape[:1])


def _empty(prediction: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    loss = prediction.new_empty(len(prediction), dtype=at_least_float32(prediction.dtype))
    return loss, like_prediction(prediction)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    prediction, target, weight = args
    return in_layout_of(outputs[1], prediction), in_layout_of(outputs[1], target), weight_for_kernel(weight)


def like_prediction(prediction: Tensor) -> Tensor:
    """An unwritten tensor in the layout of `prediction` if that is one of images', else contiguous.

    The samples lie one after the other.
    """
    empty = torch.empty_like(prediction)
    if empty.is_contiguous() or empty.is_contiguous(memory_format=torch.channels_last):
        return empty
    return prediction.new_empty(prediction.shape)


def in_layout_of(like: Tensor, images: Tensor) -> Tensor:
    """`images` `[B, C, H, W]` with the samples laid out as those of `like`, copied only if they are not.

    There may be gaps between samples.
    """
    if images.stride() == like.stride():
        return images
    # The stride of an axis of one element says nothing; samples may lie farther apart, but must not overlap.
    axes = zip(like.shape[1:], like.stride()[1:], images.stride()[1:], strict=True)
    matches = all(size == 1 or wanted == given for size, wanted, given in axes)
    apart = len(images) == 1 or images.stride(0) >= like[0].numel()
    if matches and apart:
        return images
    return torch.empty_like(like, dtype=images.dtype).copy_(images)


def weight_for_kernel(weight: Tensor) -> Tensor:
    return weight.to(at_least_float32(weight.dtype)).contiguous()


def setup_context(ctx, inputs, output) -> None:
    prediction, target, weight, *ctx.mask = inputs  # the mask is a constant
    ctx.save_for_backward(prediction, target, weight, output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def differentiable(name: str, op, eager) -> None:
    """Gives op `name`, `(prediction, target, weight, *mask) -> (loss, gradient)`, its autograd formula.

    The gradient is that of the forward pass, scaled.
    """

    def backward(ctx, grad_loss: Tensor | None, _):
        rest = (None,) * (len(ctx.needs_input_grad) - 1)
        if grad_loss is None:
            return None, *rest
        prediction, target, weight, gradient = ctx.saved_tensors
        # create_graph=True: a second derivative goes through the formula.
        if torch.is_grad_enabled():
            return eager(prediction, target, weight * grad_loss, *ctx.mask)[1], *rest
        # Rounded to half precision once, after all factors: a loss scale must not overflow on its own.
        if prediction.dtype.itemsize < 4:
            return op(prediction, target, weight * grad_loss, *ctx.mask)[1], *rest
        return per_row(grad_loss, gradient) * gradient, *rest

    torch.library.register_autograd(f"fastunlearn::{name}", backward, setup_context=setup_context)


_op = define(
    "residual",
    "Tensor prediction, Tensor target, Tensor weight",
    ("loss", "gradient"),
    check=check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
)
differentiable("residual", _op, _eager)
