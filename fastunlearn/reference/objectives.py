"""The objectives of the papers, given what the network returned.

Two sources, which differ in what a pair of images shares:

* ReTrack's objectives (arXiv 2509.13007 and its public code): every batch has its own noise and timesteps,
  one forward per batch.
* SISS' objectives (arXiv 2503.01034 and its public code): a retain image and a forget image share noise and
  timestep.

Every loss is a sum over elements divided by a batch size. Functions of two terms return `(main, correction)`;
`reference.combine` says what becomes of them. Outputs, images and noise are `[B, ...]`, timesteps `[B]`;
predictions are of epsilon.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..objective.schedule import NoiseSchedule
from .mixture import mixture
from .redirect import expected_loss, log_kernel, neighbor_noise
from .residual import denoising_loss


def vanilla_loss(output_retain: Tensor, noise_retain: Tensor) -> Tensor:
    """Naive deletion: `E ||eps - e||^2` over the retain set."""
    return denoising_loss(output_retain, noise_retain).sum() / len(output_retain)


def neggrad_loss(output_forget: Tensor, noise_forget: Tensor, superfactor: float = 1.0) -> Tensor:
    """NegGrad: `-superfactor E ||eps - e||^2` over the forget set (factor 1 in ReTrack's comparison)."""
    return -superfactor * denoising_loss(output_forget, noise_forget).sum() / len(output_forget)


def erasediff_losses(
    output_retain: Tensor, noise_retain: Tensor, output_forget: Tensor, uniform: Tensor
) -> tuple[Tensor, Tensor]:
    """EraseDiff as compared by SISS and ReTrack: keep the retain set, map the forget set to uniform noise.

    `uniform` is noise in [0, 1). Both terms are divided by the batch size of the *forget* set (sic: ReTrack's
    code; it matters only if the batches differ in size).
    """
    forget_rows = len(output_forget)
    main = denoising_loss(output_retain, noise_retain).sum() / forget_rows
    correction = denoising_loss(output_forget, uniform).sum() / forget_rows
    return main, correction


def retrack_unlearn_loss(
    output_forget: Tensor, x_t: Tensor, neighbors: Tensor, timesteps: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """ReTrack's `L_unlearn` per sample, `[B]`: `sum_j p_j ||e - v_j||^2`, without a gradient through p.

    The K neighbours are `[B, K, ...]`.
    """
    # v_j is the noise that leads from neighbour j to x_t, and p = softmax_j(-||v_j||^2 / 2).
    v = neighbor_noise(x_t, neighbors, timesteps, schedule)
    return expected_loss(output_forget, v, log_kernel(v).softmax(dim=1))


def retrack_loss(
    output_forget: Tensor,
    x_t: Tensor,
    neighbors: Tensor,
    timesteps: Tensor,
    output_retain: Tensor,
    noise_retain: Tensor,
    schedule: NoiseSchedule,
    lambd: float,
) -> Tensor:
    """ReTrack (section 3.4): `lambd L_unlearn + (1 - lambd) L_retain`, each a mean over its own batch."""
    unlearn = retrack_unlearn_loss(output_forget, x_t, neighbors, timesteps, schedule).mean()
    return lambd * unlearn + (1 - lambd) * vanilla_loss(output_retain, noise_retain)


def siss_two_forward_losses(
    outputs: tuple[Tensor, Tensor],
    images: tuple[Tensor, Tensor],
    noisy_images: tuple[Tensor, Tensor],
    timesteps: tuple[Tensor, Tensor],
    from_forget: Tensor,
    schedule: NoiseSchedule,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """SISS as ReTrack runs it: both branches have their own timesteps, noise and forward.

    `from_forget` `[B]` then picks one of them in every row. Each pair of arguments is `(retain, forget)`.
    Weights and targets use the picked `x_t` and the picked timestep with the images of both branches.
    """
    output = _pick(from_forget, *outputs)
    x_t = _pick(from_forget, *noisy_images)
    picked_timesteps = _pick(from_forget, *timesteps)
    return siss_mixture_losses(output, *images, x_t, picked_timesteps, from_forget, schedule, lambd)


def siss_mixture_losses(
    output: Tensor,
    retain: Tensor,
    forget: Tensor,
    x_t: Tensor,
    timesteps: Tensor,
    from_forget: Tensor,
    schedule: NoiseSchedule,
    lambd: float,
) -> tuple[Tensor, Tensor]:
    """SISS with importance sampling (Eq. 8): one forward on the mixture `x_t`, two weighted terms."""
    # Eq. 8: E [w_x ||e - target_x||^2], and the same with w_a and target_a.
    draw = mixture(retain, forget, x_t, timesteps, schedule, lambd, from_forget, x_t=x_t)
    main = denoising_loss(output, draw.retain_target, draw.retain_weight).sum() / len(output)
    correction = denoising_loss(output, draw.forget_target, draw.forget_weight).sum() / len(output)
    return main, correction


def siss_no_is_losses(output_retain: Tensor, output_forget: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """SISS without importance sampling: two forwards, noise shared by the pair, target eps in both."""
    return vanilla_loss(output_retain, noise), vanilla_loss(output_forget, noise)


def siss_bernoulli_losses(
    output: Tensor, noise: Tensor, from_forget: Tensor, lambd: float
) -> tuple[Tensor, Tensor]:
    """SISS' `subscore_bernoulli`: every row belongs to one branch and counts in one term only.

    The retain term is divided by `1 - lambd`. The factor `1 / lambd` of the forget term is left to the
    rescaling. Where no row is a retain row, *both* terms are zero: the code returns early and loses the
    forget term, which is reproduced here and nowhere else in the package.
    """
    loss = denoising_loss(output, noise)
    main, correction = loss[~from_forget] / (1 - lambd), loss[from_forget]
    if len(main) == 0:
        correction = correction[:0]
    return main.sum() / len(output), correction.sum() / len(output)


def _pick(from_forget: Tensor, retain: Tensor, forget: Tensor) -> Tensor:
    """Rows of `forget` where from_forget, of `retain` elsewhere."""
    return torch.where(from_forget.view(-1, *(1,) * (retain.ndim - 1)), forget, retain)
