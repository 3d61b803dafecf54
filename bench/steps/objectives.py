"""The losses as the papers' training code computes them: with autograd, from the predictions of the branches.

Written from the formulas of the papers, in the form that the public code has: the [B, K, C, H, W] tensors of
ReTrack, two `exp` for the weights of SISS. Sums over elements, means over the batch. `alpha`, `sigma` `[B, 1,
1, 1]`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .networks import SISS_LAMBD


def denoising(prediction: Tensor, noise: Tensor) -> Tensor:
    """`E ||eps - e||^2`, 0-d."""
    return torch.nn.functional.mse_loss(prediction, noise, reduction="sum") / len(prediction)


def retrack(prediction: Tensor, x_t: Tensor, neighbors: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """`E sum_j p_j ||e - v_j||^2`, 0-d; neighbors `[B, K, C, H, W]`."""
    v = (x_t[:, None] - alpha[:, None] * neighbors) / sigma[:, None]
    p = torch.softmax(-0.5 * v.square().sum((2, 3, 4)), dim=1)
    return (p * (prediction[:, None] - v).square().sum((2, 3, 4))).sum(1).mean()


def mixture(
    prediction: Tensor, x_t: Tensor, retain: Tensor, forget: Tensor, alpha: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The weighted squared errors of SISS towards the retain and the forget image, `[B]` each, and the two
    weights.
    """
    errors, distances = [], []
    for images in (retain, forget):
        errors.append((prediction - (x_t - alpha * images) / sigma).square().sum((1, 2, 3)))
        distances.append((x_t - alpha * images).square().sum((1, 2, 3)) / (2 * sigma.flatten() ** 2))
    retain_weight = 1 / ((1 - SISS_LAMBD) + SISS_LAMBD * torch.exp(distances[0] - distances[1]))
    forget_weight = 1 / ((1 - SISS_LAMBD) * torch.exp(distances[1] - distances[0]) + SISS_LAMBD)
    return retain_weight * errors[0], forget_weight * errors[1], retain_weight, forget_weight


def picked(from_forget: Tensor, forget: Tensor, retain: Tensor) -> Tensor:
    """Each row of the branch it is made from, gathered by masks into an empty tensor, as both repositories
    do.
    """
    result = torch.empty_like(retain)
    result[~from_forget] = retain[~from_forget]
    result[from_forget] = forget[from_forget]
    return result
