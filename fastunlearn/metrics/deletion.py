"""What can be said of every image after every deletion: how well a network denoises it, and finds back to it.

All numbers are cheap enough to be taken many times, need no other network, and come from the same noise for
every network: two of them are compared, not judged.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .. import functional as F
from ..host import check, philox
from ..host.finite import NotFiniteError
from ..host.store import ImageStore
from ..models.sampling import eval_mode, inject_and_denoise
from ..objective.schedule import NoiseSchedule
from ..step.predict import predict
from .distance import distances

PURPOSE = 0xFFFE  # the last word of the counters of its noise: no draw of a step has it


def denoising_losses(
    model: nn.Module,
    schedule: NoiseSchedule,
    images: ImageStore,
    *,
    draws: int = 64,
    batch_size: int = 64,
    seed: int = 0,
) -> Tensor:
    """`||eps - eps_theta(x_t, t)||^2` of each image, mean over elements, timesteps and noises: float64 `[N]`.

    Of a network with another prediction type it is the loss of what that predicts. The timesteps are the
    middles of `draws` equally long parts of the schedule, each with a noise of its own. Both are the same for
    all images, so that the number of an image does not depend on which others are measured with it.

    Args:
        model: a diffusers network; it is called in eval mode.
        images: N rows; of latents with standard deviations, the means.
        draws: network calls an image.
        batch_size: rows in one network call; changes speed and, by rounding, the last digits.
        seed: of the noise.

    Raises:
        TypeError, ValueError: for a number outside its range, before any work.
    """
    draws = check.integer("draws", draws, low=1)
    batch_size = check.integer("batch_size", batch_size, low=1)
    seed = check.integer("seed", seed, low=0, high=2**63 - 1)
    parameter = next(model.parameters())
    device, dtype = parameter.device, parameter.dtype
    images = images.freeze()
    timesteps = ((torch.arange(draws, device=device) + 0.5) * len(schedule) / draws).long()
    noise = philox.normal((draws, *images.shape), torch.tensor([seed, 0, 0], device=device), PURPOSE)

    sums = torch.zeros(len(images), dtype=torch.float64, device=device)
    with torch.no_grad(), eval_mode(model):
        for first in range(0, len(images) * draws, batch_size):
            row = torch.arange(first, min(first + batch_size, len(images) * draws), device=device)
            image, draw = row // draws, row % draws
            clean = images.rows(image.to(images.device)).to(device)
            x_t, target = F.noised(clean, noise[draw], timesteps[draw], schedule)
            told = schedule.model_input(timesteps[draw])
            prediction = predict(model, x_t.to(dtype), told, {}, None)
            sums.index_add_(0, image, F.denoising_loss(prediction, target).double())
    return (sums / (draws * math.prod(images.shape))).cpu()


class Measures:
    """The numbers of a deletion protocol: of each image to forget, and of the images to keep.

    Args:
        schedule: of the network.
        retain: images to keep, of which `retain_images` evenly chosen ones are measured; None: none are.
        scheduler: diffusers' of the network; None: images are not reconstructed.
        timestep: where the noise of reconstructions is injected: the papers' 250, or the last there is.
        chains: reconstructions of each image.
        num_inference_steps: network calls of one, at most `timestep + 1`.
        draws, retain_draws: timesteps, with a noise each, of an image to forget and of one to keep.
        retain_images: see `retain`.
        batch_size: rows in one network call.
        seed: of all noise.

    Raises:
        TypeError, ValueError: for a number outside its range.
    """

    def __init__(
        self,
        schedule: NoiseSchedule,
        retain: ImageStore | None = None,
        scheduler: Any = None,
        *,
        timestep: int = 250,
        chains: int = 4,
        num_inference_steps: int = 50,
        draws: int = 64,
        retain_draws: int = 8,
        retain_images: int = 512,
        batch_size: int = 64,
        seed: int = 0,
    ):
        self.schedule, self.scheduler, self.retain = schedule, scheduler, None
        retain_images = check.integer("retain_images", retain_images, low=1)
        if retain is not None:
            count = min(retain_images, len(retain))
            # In integers: the last row of a large set is none that float32 holds.
            rows = torch.arange(count) * (len(retain) - 1) // max(1, count - 1)
            self.retain = retain.select(rows)
        self.settings = {
            "timestep": min(check.integer("timestep", timestep, low=0), len(schedule) - 1),
            "chains": check.integer("chains", chains, low=1),
            "num_inference_steps": check.integer("num_inference_steps", num_inference_steps, low=1),
            "draws": check.integer("draws", draws, low=1),
            "retain_draws": check.integer("retain_draws", retain_draws, low=1),
            "retain_images": 0 if self.retain is None else len(self.retain),
            "batch_size": check.integer("batch_size", batch_size, low=1),
            "seed": check.integer("seed", seed, low=0, high=2**63 - 1),
        }

    def of_images(self, model: nn.Module, images: ImageStore) -> list[dict[str, float | None]]:
        """Of each image `loss` and, with a scheduler, `distance`; None for what is not a finite number.

        `loss` is its `denoising_losses`, `distance` how far from it its reconstructions end (L2 of pixels in
        [0, 1], mean over the chains). Both grow when it is forgotten.
        """
        found = [{"loss": _finite(loss)} for loss in self._losses(model, images, "draws")]
        if self.scheduler is None:
            return found
        for row, numbers in enumerate(found):
            numbers["distance"] = self._distance(model, images.rows(torch.tensor([row])).cpu())
        return found

    def of_retain(self, model: nn.Module) -> dict[str, float | None]:
        """`loss`, the mean over images to keep; nothing where there are none."""
        if self.retain is None:
            return {}
        return {"loss": _finite(sum(self._losses(model, self.retain, "retain_draws")) / len(self.retain))}

    def _losses(self, model: nn.Module, images: ImageStore, draws: str) -> list[float]:
        how = {name: self.settings[name] for name in ("batch_size", "seed")}
        return denoising_losses(model, self.schedule, images, draws=self.settings[draws], **how).tolist()

    def _distance(self, model: nn.Module, image: Tensor) -> float | None:
        """Of the reconstructions of `image` `[1, C, H, W]`; None where the network does not answer."""
        how = {name: self.settings[name] for name in ("chains", "batch_size", "seed")}
        timestep = self.settings["timestep"]
        steps = min(self.settings["num_inference_steps"], timestep + 1)
        try:
            ends = inject_and_denoise(
                model, self.scheduler, image, timestep, num_inference_steps=steps, **how
            )
        except NotFiniteError:
            return None
        return _finite(distances(ends, image).mean().item())


def _finite(value: float) -> float | None:
    """`value`, or None: JSON has no NaN."""
    return value if math.isfinite(value) else None
