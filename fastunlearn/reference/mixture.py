"""SISS: importance weights under a mixture of the noised retain and forget images.

arXiv 2503.01034, Eq. 6 and 8. The weights are printed with `exp`; at lambd = 0 or 1 a large gap of the
distances makes `0 * inf = nan` of them. That is the paper's formula, and stays here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..objective.schedule import NoiseSchedule
from .noising import levels, noising, prediction_target


class Mixture(NamedTuple):
    """What `mixture` returns."""

    x_t: Tensor  # [B, ...], drawn from the mixture: noised forget rows where from_forget, else retain rows
    retain_target: Tensor  # [B, ...], what the network should predict, had x_t come from the retain image
    forget_target: Tensor  # [B, ...], the same for the forget image
    retain_weight: Tensor  # [B], w_x, at most 1 / (1 - lambd)
    forget_weight: Tensor  # [B], w_a, at most 1 / lambd


def mixture(
    retain: Tensor,
    forget: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    lambd: float,
    from_forget: Tensor,
    *,
    x_t: Tensor | None = None,
    time_log_ratio: Tensor | None = None,
) -> Mixture:
    """A draw of the mixture `(1 - lambd) q(.|x) + lambd q(.|a)`, with both targets and both weights.

    Args:
        retain, forget: `x` and `a`, `[B, ...]`, floating.
        noise, timesteps: `[B, ...]` and `[B]` int64, shared by the pair. noise is not read when x_t is given.
        lambd: share of the forget branch, in [0, 1].
        from_forget: `[B]` bool, the branch that was drawn.
        time_log_ratio: `[B]`, `log p_forget(t) / p_retain(t)`, where the branches draw timesteps from
            different densities; infinite where one of them never draws `t`.
    """
    if x_t is None:
        chosen = torch.where(from_forget.view(-1, *(1,) * (retain.ndim - 1)), forget, retain)
        x_t = noising(chosen, noise, timesteps, schedule)
    alpha, sigma = levels(timesteps, schedule, x_t)
    # Had x_t come from these images, its noise would have been (x_t - alpha images) / sigma.
    targets = []
    for images in (retain, forget):
        implied_noise = (x_t - alpha * images) / sigma
        targets.append(prediction_target(images, implied_noise, timesteps, schedule))
    dist_x = mixture_distance(x_t, retain, timesteps, schedule)
    dist_a = mixture_distance(x_t, forget, timesteps, schedule)
    return Mixture(x_t, *targets, *mixture_weights(dist_x, dist_a, lambd, time_log_ratio=time_log_ratio))


def mixture_distance(x_t: Tensor, images: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """`||x_t - alpha_t x||^2 / (2 sigma_t^2)`, `[B]`.

    Minus the log-likelihood of `x_t` given the clean image, up to a constant.
    """
    alpha, sigma = levels(timesteps, schedule, images)
    return (x_t - alpha * images).square().flatten(1).sum(dim=1) / (2 * sigma.flatten().square())


def mixture_weights(
    dist_x: Tensor, dist_a: Tensor, lambd: float, *, time_log_ratio: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`w_x = q(m|x) / q_lambd(m|x,a)` and `w_a = q(m|a) / q_lambd(m|x,a)`, each `[B]` (SISS, Eq. 6).

    An infinite `time_log_ratio` says that one branch alone could have made the row: the other's density is 0.
    """
    # log_ratio = log(q(m|a) / q(m|x)). Both ratios are printed with their numerator divided out: w_x = 1 /
    # ((1 - lambd) + lambd q(m|a) / q(m|x)), and w_a the same with the branches exchanged.
    log_ratio = dist_x - dist_a
    if time_log_ratio is not None:
        log_ratio = log_ratio + time_log_ratio
    retain_weight = 1 / ((1 - lambd) + lambd * torch.exp(log_ratio))
    forget_weight = 1 / ((1 - lambd) * torch.exp(-log_ratio) + lambd)
    if time_log_ratio is None:
        return retain_weight, forget_weight
    retain_weight = _decided(retain_weight, -time_log_ratio, 1 - lambd)
    return retain_weight, _decided(forget_weight, time_log_ratio, lambd)


def _decided(weight: Tensor, log_ratio: Tensor, share: float) -> Tensor:
    """`weight`; where one branch alone could have made the row, 1 / `share` for this one, 0 for the other."""
    alone, nothing = torch.ones_like(weight) / share, torch.zeros_like(weight)
    weight = torch.where(log_ratio == -math.inf, nothing, weight)
    return torch.where(log_ratio == math.inf, alone, weight)
