"""ReTrack's redirection of a forget image to its nearest retain neighbours.

arXiv 2509.13007, sections 3.2 and 3.3. The `[B, K, ...]` tensors are materialised on purpose;
`ops/redirect.py` exists so that they need not be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objective.schedule import NoiseSchedule
from .noising import levels, noising, prediction_target


class Redirect(NamedTuple):
    """What `redirect` returns."""

    x_t: Tensor  # [B, ...], the noisy forget images
    target: Tensor  # [B, ...], the weighted mean of the neighbours' targets, in the model's prediction space
    spread: Tensor  # [B], the weighted variance of those targets: what no network can lower of the loss
    weights: Tensor  # [B, K], p_j: rows sum to 1


def redirect(
    forget: Tensor,
    neighbors: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    *,
    x_t: Tensor | None = None,
) -> Redirect:
    """`p_j = softmax_j(-||v_j||^2 / 2)` and the mean `sum_j p_j target_j` of the neighbours' targets.

    ReTrack, Proposition 2 and section 3.4.

    Args:
        forget: `a`, `[B, ...]`, floating.
        neighbors: `x_j`, `[B, K, ...]`, the K nearest retain images of each forget image.
        noise: `[B, ...]`; not read when x_t is given.
        timesteps: `[B]` int64.
        x_t: the noisy forget images, where they were made elsewhere.
    """
    if x_t is None:
        x_t = noising(forget, noise, timesteps, schedule)
    # p_j = softmax_j(-||v_j||^2 / 2)
    weights = log_kernel(neighbor_noise(x_t, neighbors, timesteps, schedule)).softmax(dim=1)
    targets = neighbor_targets(x_t, neighbors, timesteps, schedule)
    p = weights.view(*weights.shape, *(1,) * (x_t.ndim - 1))
    target = (p * targets).sum(dim=1)
    # sum_j p_j ||e - target_j||^2 = ||e - target||^2 + spread, whatever e is.
    distances = (targets - target.unsqueeze(1)).square().flatten(2).sum(dim=2)
    spread = (weights * distances).sum(dim=1)
    return Redirect(x_t, target, spread, weights)


def neighbor_noise(x_t: Tensor, neighbors: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """`v_j = (x_t - alpha_t x_j) / sigma_t`, `[B, K, ...]`: what noise leads from neighbour j to `x_t`."""
    alpha, sigma = levels(timesteps, schedule, neighbors)
    return (x_t.unsqueeze(1) - alpha * neighbors) / sigma


def log_kernel(v: Tensor) -> Tensor:
    """`-||v_j||^2 / 2`, `[B, K]`: the log-likelihood of `x_t` under neighbour j, up to a constant."""
    return -0.5 * v.square().flatten(2).sum(dim=2)


def neighbor_targets(x_t: Tensor, neighbors: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What to predict, had `x_t` come from neighbour j: `[B, K, ...]`, of its image and the noise `v_j`."""
    noise = neighbor_noise(x_t, neighbors, timesteps, schedule)
    return prediction_target(neighbors, noise, timesteps, schedule)


def expected_loss(prediction: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """`sum_j p_j ||prediction - target_j||^2`, `[B]`: the summand of ReTrack's unlearning loss.

    `targets` are `[B, K, ...]`.
    """
    return (weights * squared_norms(prediction, targets)).sum(dim=1)


def squared_norms(prediction: Tensor, targets: Tensor) -> Tensor:
    """`||prediction - target_j||^2`, `[B, K]`."""
    return torch.sum((prediction.unsqueeze(1) - targets).square().flatten(2), dim=2)
