"""noising: `x_t = alpha_t x_0 + sigma_t eps`, and the target of the network, from rows of a store or given images."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import philox
from ._library import compute_dtype, define, dense, empty_images, laid_out, per_row, picked, served


def noising(
    images: Tensor, index: Tensor | None, coefficients: Tensor, noise: Tensor | None, counter: Tensor | None, purpose: int,
    with_target: bool, dtype: torch.dtype, channels_last: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`x_t` `[B, C, H, W]` in `dtype`, and the target `a eps + b x_0` in float32 or better (`with_target=False`: an empty tensor).

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
    noise = philox.normal(clean.shape, counter, purpose) if noise is None else noise.to(precision)
    alpha, sigma, a, b, _ = (per_row(column, clean) for column in coefficients.unbind(1))
    x_t = laid_out(torch.addcmul(alpha * clean, sigma, noise), dtype, channels_last)
    target = laid_out(a * noise + b * clean, _target_dtype(dtype), channels_last) if with_target else x_t.new_empty(0, dtype=_target_dtype(dtype))
    return x_t, target


def _empty(images, index, coefficients, noise, counter, purpose, with_target, dtype, channels_last):
    x_t = empty_images(images, index, dtype, channels_last)
    return x_t, torch.empty_like(x_t, dtype=_target_dtype(dtype)) if with_target else x_t.new_empty(0, dtype=_target_dtype(dtype))


def _target_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


_op = define(
    "noising",
    "Tensor images, Tensor? index, Tensor coefficients, Tensor? noise, Tensor? counter, int purpose, bool with_target, ScalarType dtype, bool channels_last",
    ("x_t", "target"),
    empty=_empty,
    eager=_eager,
    prepare=dense,
)
