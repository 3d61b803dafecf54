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
    """Chains from one image noised to `timestep`: the share that ends within `threshold` of it, and the
    distances (L2, [0, 1] pixels).
    """

    timestep: int
    threshold: float
    returned: Share
    mean_distance: float
    min_distance: float

    def __post_init__(self):
        distances = {"mean_distance": self.mean_distance, "min_distance": self.min_distance}
        finite.numbers("reconstruction", threshold=self.threshold, **distances)


def reconstruct(
    model, scheduler, image: Tensor, timestep: int, *, chains: int = 64, threshold: float | None = None,
    **sampling,
) -> tuple[Reconstruction, Tensor]:  # fmt: skip
    """Noises `image` to `timestep` with `chains` independent noises, denoises each, and counts those that
    come back.

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
    threshold = resolve(threshold, image)
    images = inject_and_denoise(model, scheduler, image, timestep, chains=chains, **sampling)
    distance = distances(images, image)
    returned = Share.of(int((distance < threshold).sum()), chains)
    return Reconstruction(
        timestep, threshold, returned, distance.mean().item(), distance.min().item()
    ), images
