"""noising: `x_t = alpha_t x_0 + sigma_t eps`, and the target of the network.

Clean images are rows of a store, or given.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..host import philox
from ._library import (
    at_least_float32,
    check_noise,
    check_rows,
    check_shape,
    compute_dtype,
    define,
    empty_images,
    laid_out,
    noise_for_kernel,
    per_row,
    picked,
    rows_for_kernel,
    served,
)


def noising(
    images: Tensor,
    index: Tensor | None,
    coefficients: Tensor,
    noise: Tensor | None,
    counter: Tensor | None,
    purpose: int,
    with_target: bool,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor]:
    """`x_t` `[B, C, H, W]` in `dtype`, and the target `a eps + b x_0` in float32 or better.

    With `with_target=False` the target is an empty tensor.

    Args:
        images: `[N, C, H, W]` uint8 or floating.
        index: `[B]` int64, rows of `images`; None: all, in order.
        coefficients: `[B, 5]` float64, `NoiseSchedule.coefficients`.
        noise: `[B, C, H, W]`; None: made from `counter` (int64 `[3]`) and `purpose`, see `philox.Noise`.
        channels_last: the memory layout of the results.
    """
    return _op(images, index, coefficients, noise, counter, purpose, with_target, dtype, channels_last)


def _eager(images, index, coefficients, noise, counter, purpose, with_target, dtype, channels_last):
    precision = compute_dtype(images, noise)
    clean = served(picked(images, index), precision)
    if noise is None:
        noise = philox.normal(clean.shape, counter, purpose)
    noise = noise.to(precision)
    alpha, sigma, a, b, _ = (per_row(column, clean) for column in coefficients.unbind(1))
    x_t = laid_out(torch.addcmul(alpha * clean, sigma, noise), dtype, channels_last)
    if not with_target:
        return x_t, x_t.new_empty(0, dtype=at_least_float32(dtype))
    return x_t, laid_out(a * noise + b * clean, at_least_float32(dtype), channels_last)


def _empty(images, index, coefficients, noise, counter, purpose, with_target, dtype, channels_last):
    x_t = empty_images(images, index, dtype, channels_last)
    if not with_target:
        return x_t, x_t.new_empty(0, dtype=at_least_float32(dtype))
    return x_t, torch.empty_like(x_t, dtype=at_least_float32(dtype))


def _check(images, index, coefficients, noise, counter, purpose, with_target, dtype, channels_last):
    shape = check_rows("images", images, index)
    check_shape("coefficients", coefficients, (shape[0], 5))
    check_noise(noise, counter, purpose, shape)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    images, index, coefficients, noise, counter, *rest = args
    rows = rows_for_kernel(images, index)
    return *rows, coefficients.contiguous(), *noise_for_kernel(noise, counter), *rest


def _setup_context(ctx, inputs, output) -> None:
    images, index, coefficients, noise, *_ = inputs
    ctx.save_for_backward(index, coefficients)
    ctx.images_shape, ctx.dtypes = images.shape, (images.dtype, None if noise is None else noise.dtype)


def _backward(ctx, grad_x_t: Tensor, grad_target: Tensor):
    """Both results are linear in images and noise: `x_t = alpha x + sigma eps`, `target = a eps + b x`."""
    index, coefficients = ctx.saved_tensors
    like = grad_x_t.to(at_least_float32(grad_x_t.dtype))
    alpha, sigma, a, b, _ = (per_row(column, like) for column in coefficients.unbind(1))
    with_target = grad_target is not None and grad_target.numel() > 0
    grad_images = grad_noise = None
    if ctx.needs_input_grad[0]:
        grad_images = alpha * grad_x_t + (b * grad_target if with_target else 0)
        # A row that was drawn twice gets both gradients.
        if index is not None:
            grad_images = grad_images.new_zeros(ctx.images_shape).index_add(0, index, grad_images)
        grad_images = grad_images.to(ctx.dtypes[0])
    if ctx.needs_input_grad[3]:
        grad_noise = (sigma * grad_x_t + (a * grad_target if with_target else 0)).to(ctx.dtypes[1])
    return grad_images, None, None, grad_noise, *[None] * 5


_op = define(
    "noising",
    "Tensor images, Tensor? index, Tensor coefficients, Tensor? noise, Tensor? counter, int purpose,"
    " bool with_target, ScalarType dtype, bool channels_last",
    ("x_t", "target"),
    check=_check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
)
torch.library.register_autograd("fastunlearn::noising", _backward, setup_context=_setup_context)
