"""mixture: the SISS mixture sample, both of its targets, and the two importance weights (SISS Eq. 6).

The weights go through one sigmoid: with `u = dist_x - dist_a` and `L = log(lambda / (1 - lambda))` they are
`w_x = sigmoid(-(u + L)) / (1 - lambda)` and `w_a = sigmoid(u + L) / lambda`, which cannot overflow, and `u`
needs only `<eps, x - a>` and `||x - a||^2`. The log ratio of what else the branches draw from is added to
`u`; where it is infinite, one branch alone could have made the row, and the weights are 0 and `1 / lambda` or
`1 / (1 - lambda)`, whatever `u` is.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Arguments(NamedTuple):
    """What the op takes, in this order."""

    retain: Tensor  # [N, C, H, W] uint8 or floating, images to keep, `x`
    retain_index: Tensor | None  # [B] int64, rows of `retain`; None: all, in order
    forget: Tensor  # the same for the images to forget, `a`
    forget_index: Tensor | None
    coefficients: Tensor  # [B, 5] float64, `NoiseSchedule.coefficients`
    from_forget: Tensor  # [B] bool, True where `x_t` is made from the forget image
    lambd: float  # the share of forget images in the mixture
    # [B], `log p_forget(t) / p_retain(t)` where the branches draw timesteps from different densities;
    # infinite where one of them never draws `t` (or never has the row's condition)
    time_log_ratio: Tensor | None
    noise: Tensor | None  # [B, C, H, W]; None: made from the two that follow, see `philox.Noise`
    counter: Tensor | None  # [3] int64
    purpose: int
    dtype: torch.dtype  # of `x_t`
    channels_last: bool  # the memory layout of the results


def _eager(*args):
    given = Arguments(*args)
    from_forget, lambd, time_log_ratio = given.from_forget, given.lambd, given.time_log_ratio
    precision = compute_dtype(given.retain, given.forget, given.noise)
    retain = served(picked(given.retain, given.retain_index), precision)
    forget = served(picked(given.forget, given.forget_index), precision)
    noise = given.noise
    if noise is None:
        noise = philox.normal(retain.shape, given.counter, given.purpose)
    noise = noise.to(precision)
    alpha, sigma, a, b, c = given.coefficients.unbind(1)

    # u = dist_x - dist_a = +-rho^2 ||x - a||^2 / 2 - rho <eps, x - a>, with rho = alpha / sigma, + where the
    # forget image was drawn. In float64: at small t rho^2 is about 1e4, and u goes into an exponent.
    rho = alpha / sigma
    difference = (retain - forget).flatten(1).double()
    quadratic = 0.5 * rho.square() * difference.square().sum(1)
    dot = (noise.flatten(1).double() * difference).sum(1)
    u = torch.where(from_forget, quadratic, -quadratic) - rho * dot
    if time_log_ratio is not None:
        u = u + time_log_ratio.double()
    retain_weight, forget_weight = _weights(u, lambd)
    if time_log_ratio is not None:
        retain_weight = _decided(retain_weight, -time_log_ratio, 1 - lambd)
        forget_weight = _decided(forget_weight, time_log_ratio, lambd)

    # m is the image that was drawn: x_t = alpha m + sigma eps. Its noise about another image x is
    # eps + rho (m - x), so the target had x_t come from x is a eps + b m + c (m - x).
    chosen = torch.where(from_forget.view(-1, *[1] * (retain.ndim - 1)), forget, retain)
    x_t = per_row(alpha, chosen) * chosen + per_row(sigma, chosen) * noise
    base = per_row(a, chosen) * noise + per_row(b, chosen) * chosen
    targets = (
        laid_out(
            base + per_row(c, chosen) * (chosen - images), at_least_float32(given.dtype), given.channels_last
        )
        for images in (retain, forget)
    )
    return laid_out(x_t, given.dtype, given.channels_last), *targets, retain_weight, forget_weight


def _weights(u: Tensor, lambd: float) -> tuple[Tensor, Tensor]:
    """The importance weights `[B]` float64.

    SISS Eq. 6: `w_x = 1 / ((1 - lambd) + lambd e^u)`, `w_a = 1 / ((1 - lambd) e^-u + lambd)`.
    """
    # Without the other branch in the mixture a weight is 1, or a ratio of densities.
    if lambd == 0:
        return torch.ones_like(u), u.exp()
    if lambd == 1:
        return (-u).exp(), torch.ones_like(u)
    # L = log(lambd / (1 - lambd)): w_x = sigmoid(-(u + L)) / (1 - lambd), w_a = sigmoid(u + L) / lambd.
    logit = math.log(lambd) - math.log1p(-lambd)
    return torch.sigmoid(-(u + logit)) / (1 - lambd), torch.sigmoid(u + logit) / lambd


def _decided(weight: Tensor, log_ratio: Tensor, share: float) -> Tensor:
    """`weight` `[B]` of a branch, or `1 / share` or 0 where its log ratio over the other one is infinite."""
    alone = 1 / share if share > 0 else math.inf
    weight = torch.where(log_ratio == -math.inf, 0.0, weight)
    return torch.where(log_ratio == math.inf, alone, weight)


def _empty(*args):
    """`x_t`, the retain and the forget target, the retain and the forget weight.

    `x_t` is in `dtype`, the targets in float32 or better (all `[B, C, H, W]`), the weights `[B]` float64.
    """
    given = Arguments(*args)
    x_t = empty_images(given.retain, given.retain_index, given.dtype, given.channels_last)
    target = torch.empty_like(x_t, dtype=at_least_float32(given.dtype))
    weight = given.coefficients.new_empty(len(given.coefficients))
    return x_t, target, torch.empty_like(target), weight, torch.empty_like(weight)


def _check(*args):
    given = Arguments(*args)
    shape = check_rows("retain", given.retain, given.retain_index)
    forget_shape = check_rows("forget", given.forget, given.forget_index)
    if forget_shape != shape:
        raise ValueError(f"forget: expected pairs with retain {shape}, got {forget_shape}")
    check_shape("coefficients", given.coefficients, (shape[0], 5))
    check_shape("from_forget", given.from_forget, shape[:1])
    check_shape("time_log_ratio", given.time_log_ratio, shape[:1])
    check_noise(given.noise, given.counter, given.purpose, shape)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    retain, retain_index, forget, forget_index, *rest = args
    coefficients, from_forget, lambd, time_log_ratio, noise, counter, *rest = rest
    if time_log_ratio is not None:
        time_log_ratio = time_log_ratio.double().contiguous()
    rows = *rows_for_kernel(retain, retain_index), *rows_for_kernel(forget, forget_index)
    weighting = coefficients.contiguous(), from_forget.contiguous(), lambd, time_log_ratio
    return *rows, *weighting, *noise_for_kernel(noise, counter), *rest


mixture = define(
    "mixture",
    "Tensor retain, Tensor? retain_index, Tensor forget, Tensor? forget_index, Tensor coefficients,"
    " Tensor from_forget, float lambd, Tensor? time_log_ratio, Tensor? noise, Tensor? counter, int purpose,"
    " ScalarType dtype, bool channels_last",
    ("x_t", "retain_target", "forget_target", "retain_weight", "forget_weight"),
    check=_check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
)
