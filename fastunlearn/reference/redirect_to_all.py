"""ReTrack before it is truncated: a forget image redirected to all images to keep, each with its weight.

arXiv 2509.13007, section 3.2. The `[B, M, ...]` tensors are materialised on purpose; `ops/redirect_to_all.py`
exists so that they need not be.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..objective.schedule import NoiseSchedule
from .redirect import log_kernel, neighbor_noise, redirect


class RedirectToAll(NamedTuple):
    """What `redirect_to_all` returns."""

    x_t: Tensor  # [B, ...], the noisy forget images
    target: Tensor  # [B, ...], the weighted mean of the targets of all images to keep
    spread: Tensor  # [B], the weighted variance of those targets
    weight: Tensor | None  # [B], p_retain(x_t) / p_forget(x_t); None without a forget set


def redirect_to_all(
    forget: Tensor,
    retain_set: Tensor,
    noise: Tensor,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    *,
    forget_set: Tensor | None = None,
) -> RedirectToAll:
    """`sum_x w(x|x_t) ||e - v_x||^2` over all images x to keep, `v_x = (x_t - alpha x) / sigma`.

    With `q(x_t|x) = N(alpha x, sigma^2 I)` the exact importance weight of an image to keep is
    `w = (q(x_t|x) / M) / (sum_a' q(x_t|a') / N)`: `p_x weight`, where `p = softmax_x(-||v_x||^2 / 2)` is the
    self-normalised one, and `weight` the ratio of the two sets' densities at x_t.

    Args:
        forget: `a`, `[B, ...]`, floating.
        retain_set: all M images to keep, `[M, ...]`.
        noise: `[B, ...]`.
        timesteps: `[B]` int64.
        forget_set: all N images to forget, `[N, ...]`.
    """
    everything = retain_set.unsqueeze(0).expand(len(forget), *retain_set.shape)
    redirected = redirect(forget, everything, noise, timesteps, schedule)
    x_t, weight = redirected.x_t, None
    if forget_set is not None:
        densities = [log_density(x_t, images, timesteps, schedule) for images in (retain_set, forget_set)]
        weight = (densities[0] - densities[1]).exp()
    return RedirectToAll(x_t, redirected.target, redirected.spread, weight)


def log_density(x_t: Tensor, images: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """`log mean_x q(x_t|x)` over `images` `[M, ...]`, `[B]`, up to a constant of the timestep."""
    everything = images.unsqueeze(0).expand(len(x_t), *images.shape)
    kernels = log_kernel(neighbor_noise(x_t, everything, timesteps, schedule))
    return torch.logsumexp(kernels, dim=1) - torch.tensor(len(images), dtype=x_t.dtype).log()
