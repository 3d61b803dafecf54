"""mixture: the SISS mixture sample, both of its targets, and the two importance weights through one sigmoid (SISS Eq. 6).

With `u = dist_x - dist_a` and `L = log(lambda / (1 - lambda))`: `w_x = sigmoid(-(u + L)) / (1 - lambda)`, `w_a = sigmoid(u + L) / lambda`,
which cannot overflow, and `u` needs only `<eps, x - a>` and `||x - a||^2`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._library import define, per_row


def mixture(
    retain: Tensor, forget: Tensor, noise: Tensor, coefficients: Tensor, from_forget: Tensor, lambd: float, time_log_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`x_t`, retain target, forget target (all `[B, C, H, W]`), retain weight and forget weight (both `[B]` float64).

    Args:
        retain: `[B, C, H, W]`, images to keep, `x`.
        forget: `[B, C, H, W]`, images to forget, `a`.
        noise: `[B, C, H, W]`.
        coefficients: `[B, 5]` float64, `NoiseSchedule.coefficients`.
        from_forget: `[B]` bool, True where `x_t` is made from the forget image.
        lambd: the share of forget images in the mixture.
        time_log_ratio: `[B]`, `log p_forget(t) / p_retain(t)` where the two branches draw timesteps from different densities.
    """
    return _op(retain, forget, noise, coefficients, from_forget, lambd, time_log_ratio)


def _eager(
    retain: Tensor, forget: Tensor, noise: Tensor, coefficients: Tensor, from_forget: Tensor, lambd: float, time_log_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    alpha, sigma, a, b, c = coefficients.unbind(1)
    rho = alpha / sigma
    difference = (retain - forget).flatten(1).double()
    quadratic = 0.5 * rho.square() * difference.square().sum(1)
    u = torch.where(from_forget, quadratic, -quadratic) - rho * (noise.flatten(1).double() * difference).sum(1)
    if time_log_ratio is not None:
        u = u + time_log_ratio.double()
    if lambd == 0:
        retain_weight, forget_weight = torch.ones_like(u), u.exp()
    elif lambd == 1:
        retain_weight, forget_weight = (-u).exp(), torch.ones_like(u)
    else:
        logit = math.log(lambd) - math.log1p(-lambd)
        retain_weight, forget_weight = torch.sigmoid(-(u + logit)) / (1 - lambd), torch.sigmoid(u + logit) / lambd

    picked = torch.where(from_forget.view(-1, *[1] * (retain.ndim - 1)), forget, retain)
    x_t = per_row(alpha, picked) * picked + per_row(sigma, picked) * noise
    base = per_row(a, picked) * noise + per_row(b, picked) * picked
    retain_target = base + per_row(c, picked) * (picked - retain)
    forget_target = base + per_row(c, picked) * (picked - forget)
    return x_t, retain_target, forget_target, retain_weight, forget_weight


def _fake(
    retain: Tensor, forget: Tensor, noise: Tensor, coefficients: Tensor, from_forget: Tensor, lambd: float, time_log_ratio: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    weight = coefficients.new_empty(len(coefficients))
    return torch.empty_like(retain), torch.empty_like(retain), torch.empty_like(retain), weight, torch.empty_like(weight)


_op = define(
    "mixture",
    "(Tensor retain, Tensor forget, Tensor noise, Tensor coefficients, Tensor from_forget, float lambd, Tensor? time_log_ratio)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _eager,
    _fake,
)
