"""mixture: the SISS mixture sample, both of its targets, and the two importance weights (SISS Eq. 6).

The weights go through one sigmoid: with `u = dist_x - dist_a` and `L = log(lambda / (1 - lambda))` they are
`w_x = sigmoid(-(u + L)) / (1 - lambda)` and `w_a = sigmoid(u + L) / lambda`, which cannot overflow, and `u`
needs only `<eps, x - a>` and `||x - a||^2`. The log ratio of what else the branches draw from is added to
`u`; where it is infinite, one branch alone could have made the row, and the weights are 0 and `1 / lambda` or
`1 / (1 - lambda)`, whatever `u` is.
"""

from __future__ import annotations

import math

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


def mixture(
    retain: Tensor,
    retain_index: Tensor | None,
    forget: Tensor,
    forget_index: Tensor | None,
    coefficients: Tensor,
    from_forget: Tensor,
    lambd: float,
    time_log_ratio: Tensor | None,
    noise: Tensor | None,
    counter: Tensor | None,
    purpose: int,
    dtype: torch.dtype,
    channels_last: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x_t`, the retain and the forget target, the retain and the forget weight.

    `x_t` is in `dtype`, the targets in float32 or better (all `[B, C, H, W]`), the weights `[B]` float64.

    Args:
        retain: `[N, C, H, W]` uint8 or floating, images to keep, `x`.
        retain_index: `[B]` int64, rows of `retain`; None: all, in order.
        forget, forget_index: the same for the images to forget, `a`.
        coefficients: `[B, 5]` float64, `NoiseSchedule.coefficients`.
        from_forget: `[B]` bool, True where `x_t` is made from the forget image.
        lambd: the share of forget images in the mixture.
        time_log_ratio: `[B]`, `log p_forget(t) / p_retain(t)` where the branches draw timesteps from
            different densities; infinite where one of them never draws `t` (or never has the row's
            condition).
        noise: `[B, C, H, W]`; None: made from `counter` (int64 `[3]`) and `purpose`, see `philox.Noise`.
        channels_last: the memory layout of the results.
    """
    return _op(
        retain,
        retain_index,
        forget,
        forget_index,
        coefficients,
        from_forget,
        lambd,
        time_log_ratio,
        noise,
        counter,
        purpose,
        dtype,
        channels_last,
    )


def _eager(
    retain,
    retain_index,
    forget,
    forget_index,
    coefficients,
    from_forget,
    lambd,
    time_log_ratio,
    noise,
    counter,
    purpose,
    dtype,
    channels_last,
):
    precision = compute_dtype(retain, forget, noise)
    retain = served(picked(retain, retain_index), precision)
    forget = served(picked(forget, forget_index), precision)
    if noise is None:
        noise = philox.normal(retain.shape, counter, purpose)
    noise = noise.to(precision)
    alpha, sigma, a, b, c = coefficients.unbind(1)

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
        laid_out(base + per_row(c, chosen) * (chosen - images), at_least_float32(dtype), channels_last)
        for images in (retain, forget)
    )
    return laid_out(x_t, dtype, channels_last), *targets, retain_weight, forget_weight


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


def _empty(
    retain,
    retain_index,
    forget,
    forget_index,
    coefficients,
    from_forget,
    lambd,
    time_log_ratio,
    noise,
    counter,
    purpose,
    dtype,
    channels_last,
):
    x_t = empty_images(retain, retain_index, dtype, channels_last)
    target = torch.empty_like(x_t, dtype=at_least_float32(dtype))
    weight = coefficients.new_empty(len(coefficients))
    return x_t, target, torch.empty_like(target), weight, torch.empty_like(weight)


def _check(
    retain,
    retain_index,
    forget,
    forget_index,
    coefficients,
    from_forget,
    lambd,
    time_log_ratio,
    noise,
    counter,
    purpose,
    dtype,
    channels_last,
):
    shape = check_rows("retain", retain, retain_index)
    forget_shape = check_rows("forget", forget, forget_index)
    if forget_shape != shape:
        raise ValueError(f"forget: expected pairs with retain {shape}, got {forget_shape}")
    check_shape("coefficients", coefficients, (shape[0], 5))
    check_shape("from_forget", from_forget, shape[:1])
    check_shape("time_log_ratio", time_log_ratio, shape[:1])
    check_noise(noise, counter, shape)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    retain, retain_index, forget, forget_index, coefficients, from_forget, lambd, time_log_ratio, *rest = args
    noise, counter, *rest = rest
    if time_log_ratio is not None:
        time_log_ratio = time_log_ratio.double().contiguous()
    rows = *rows_for_kernel(retain, retain_index), *rows_for_kernel(forget, forget_index)
    branches = coefficients.contiguous(), from_forget.contiguous(), lambd, time_log_ratio
    return *rows, *branches, *noise_for_kernel(noise, counter), *rest


_op = define(
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
