"""Reconstruction: from how many of the noised copies of an image does the model find its way back to it?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .. import _check
from ..sampling import inject_and_denoise
from .frequency import Share, distances


@dataclass(frozen=True)
class Reconstruction:
    """Chains from one image noised to `timestep`: the share that ends within `threshold` of it, and the distances (L2, [0, 1] pixels)."""

    timestep: int
    threshold: float
    returned: Share
    mean_distance: float
    min_distance: float


def reconstruct(model, scheduler, image: Tensor, timestep: int, *, chains: int = 64, threshold: float = 10.0, **sampling) -> tuple[Reconstruction, Tensor]:
    """Noises `image` to `timestep` with `chains` independent noises, denoises each, and counts those that come back.

    SISS and ReTrack do this at t = 250 and compare by SSCD; pixels suffice where the threshold is known to separate (MNIST T-Shirt: no
    digit is closer than 11.5).

    Args:
        model, scheduler, timestep: as for `sampling.inject_and_denoise`, which also takes the `sampling` arguments (steps, sampler, seed, ...).
        image: `[C, H, W]` or `[1, C, H, W]` in [-1, 1].
        chains: number of noises.
        threshold: L2 distance between images scaled to [0, 1].

    Returns:
        The numbers, and the images float32 `[chains, C, H, W]` in [-1, 1].
    """
    _check.number("threshold", threshold, low=0, low_open=True)
    image = _check.images("image", image if image.ndim == 4 else image[None])
    if len(image) != 1:
        raise ValueError(f"image: expected one image, got {len(image)}")
    images = inject_and_denoise(model, scheduler, image, timestep, chains=chains, **sampling)
    distance = distances(images, image)
    returned = Share.of(int((distance < threshold).sum()), chains)
    return Reconstruction(timestep, threshold, returned, distance.mean().item(), distance.min().item()), images
