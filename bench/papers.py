"""The papers' way: their formulas in eager torch, with autograd, as a training loop writes them.

The baseline of every benchmark.

`alpha, sigma` are `[B, 1, 1, 1]` float32, made before the clock starts, as they are for the kernels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def noised(images: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`x_t` (Ho et al. 2020, Eq. 4)."""
    return alpha * images + sigma * noise


def redirected(
    forget: Tensor, neighbors: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """ReTrack section 3.3: `x_t`, the K targets `v_j` `[B, K, C, H, W]` and their weights `p_j` `[B, K]`."""
    x_t = noised(forget, noise, alpha, sigma)
    v = (x_t.unsqueeze(1) - alpha.unsqueeze(1) * neighbors) / sigma.unsqueeze(1)
    return x_t, v, torch.softmax(-0.5 * (v**2).flatten(2).sum(2), dim=1)


def redirect_losses(prediction: Tensor, v: Tensor, p: Tensor) -> Tensor:
    """`sum_j p_j ||e - v_j||^2`, `[B]` (ReTrack section 3.4)."""
    return (p * ((prediction.unsqueeze(1) - v) ** 2).flatten(2).sum(2)).sum(1)


def mixed(
    retain: Tensor,
    forget: Tensor,
    noise: Tensor,
    alpha: Tensor,
    sigma: Tensor,
    from_forget: Tensor,
    lambd: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """SISS Eq. 6: `x_t`, both targets, both importance weights."""
    x_t = noised(torch.where(from_forget.view(-1, 1, 1, 1), forget, retain), noise, alpha, sigma)
    retain_distance = ((x_t - alpha * retain) ** 2).flatten(1).sum(1) / (2 * sigma.flatten() ** 2)
    forget_distance = ((x_t - alpha * forget) ** 2).flatten(1).sum(1) / (2 * sigma.flatten() ** 2)
    ratio = torch.exp(retain_distance - forget_distance)
    retain_weight = 1 / ((1 - lambd) + lambd * ratio)
    forget_weight = 1 / ((1 - lambd) / ratio + lambd)
    return x_t, (x_t - alpha * retain) / sigma, (x_t - alpha * forget) / sigma, retain_weight, forget_weight


def squared_error(prediction: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """`w ||e - target||^2`, `[B]`."""
    return weight * ((prediction - target) ** 2).flatten(1).sum(1)


def filtered_error(prediction: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """`w ||F^-1 M F (e - target)||^2`, `[B]`; mask `[H, W]` over the frequencies as `fft2` orders them."""
    residual = torch.fft.ifft2(torch.fft.fft2(prediction - target) * mask).real
    return weight * (residual**2).flatten(1).sum(1)


def filtered_error_of_reals(prediction: Tensor, target: Tensor, weight: Tensor, mask: Tensor) -> Tensor:
    """The same with the transforms for real input, which do half the work."""
    residual = prediction - target
    half = torch.fft.rfft2(residual) * mask[:, : residual.shape[-1] // 2 + 1]
    return weight * (torch.fft.irfft2(half, s=residual.shape[-2:]) ** 2).flatten(1).sum(1)


def with_gradient(losses: Tensor, prediction: Tensor) -> tuple[Tensor, Tensor]:
    """The losses and the gradient of their sum, through autograd."""
    return losses, torch.autograd.grad(losses.sum(), prediction)[0]
