"""Reconstruction: from how many of the noised copies of an image does the model find its way back to it?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..host import check, finite
from ..models.sampling import inject_and_denoise
from .distance import distances
from .frequency import Share
from .threshold import resolve


@dataclass(frozen=True)
class Reconstruction:
    """Where the chains from one image, noised to `timestep`, end. Distances are L2 of [0, 1] pixels."""

    timestep: int
    threshold: float
    returned: Share  # of the chains, those that end within `threshold` of the image
    mean_distance: float
    min_distance: float

    def __post_init__(self):
        distances = {"mean_distance": self.mean_distance, "min_distance": self.min_distance}
        finite.numbers("reconstruction", threshold=self.threshold, **distances)


def reconstruct(
    model,
    scheduler,
    image: Tensor,
    timestep: int,
    *,
    chains: int = 64,
    threshold: float | None = None,
    **sampling,
) -> tuple[Reconstruction, Tensor]:
    """Noises `image` to `timestep`, denoises it, and counts how often it comes back.

    SISS and ReTrack do this at t = 250 and compare by SSCD; pixels suffice where the threshold is known to
    separate (MNIST T-Shirt: no digit is closer than 11.5).

    Args:
        model, scheduler, timestep: as for `sampling.inject_and_denoise`, which also takes the `sampling`
            arguments (steps, sampler, seed, ...).
        image: `[C, H, W]` or `[1, C, H, W]` in [-1, 1].
        chains: number of noises.
        threshold: L2 distance between images scaled to [0, 1]; None: the papers' 10, for images of 1x28x28
            alone.

    Returns:
        The numbers, and the images float32 `[chains, C, H, W]` in [-1, 1].

    Raises:
        TypeError, ValueError: for an argument outside its range, before any work; a threshold as `frequency`
            refuses it.
        NotFiniteError: a ValueError; the image, the weights or what the network returned is not finite.
    """
    image = check.images("image", image if image.ndim == 4 else image[None])
    if len(image) != 1:
        raise ValueError(f"image: expected one image, got {len(image)}")
    finite.rows("image", image)
    # Before the chains, which may take hours: a threshold may be refused.
    threshold = resolve(threshold, image)
    images = inject_and_denoise(model, scheduler, image, timestep, chains=chains, **sampling)
    distance = distances(images, image)
    result = Reconstruction(
        timestep=timestep,
        threshold=threshold,
        returned=Share.of(int((distance < threshold).sum()), chains),
        mean_distance=distance.mean().item(),
        min_distance=distance.min().item(),
    )
    return result, images
