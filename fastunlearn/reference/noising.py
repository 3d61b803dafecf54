"""The forward process `x_t = alpha_t x_0 + sigma_t eps`, and what a network should predict for it."""

from __future__ import annotations

from torch import Tensor

from ..objective.schedule import NoiseSchedule


def noising(images: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """Noise clean images: `x_t = alpha_t x_0 + sigma_t eps` (Ho et al. 2020, Eq. 4, for DDPM schedules).

    Args:
        images: `x_0`, `[B, ...]`, floating.
        noise: `eps`, the shape and dtype of images.
        timesteps: `[B]` int64, indices into the schedule.

    Returns:
        `x_t`, the shape and dtype of images.
    """
    alpha, sigma = levels(timesteps, schedule, images)
    return alpha * images + sigma * noise


def prediction_target(images: Tensor, noise: Tensor, timesteps: Tensor, schedule: NoiseSchedule) -> Tensor:
    """What the network should predict for a clean image `x_0` and its noise `eps`, both `[B, ...]`.

    `eps` itself (epsilon), `alpha eps - sigma x_0` (v_prediction; Salimans & Ho 2022), `x_0` (sample) or `eps
    - x_0` (flow matching).
    """
    alpha, sigma = levels(timesteps, schedule, images)
    if schedule.prediction_type == "epsilon":
        return noise
    if schedule.prediction_type == "v_prediction":
        return alpha * noise - sigma * images
    if schedule.prediction_type == "sample":
        return images
    return noise - images  # flow


def levels(timesteps: Tensor, schedule: NoiseSchedule, like: Tensor) -> tuple[Tensor, Tensor]:
    """`alpha_t, sigma_t` of timesteps `[B]`, each `[B, 1, ..., 1]` in dtype and number of axes of `like`."""
    shape = (-1,) + (1,) * (like.ndim - 1)
    alpha, sigma = schedule.coefficients(timesteps)[:, :2].to(like.dtype).unbind(1)
    return alpha.view(shape), sigma.view(shape)
