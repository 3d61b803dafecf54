"""redirect_to_all: a forget image redirected to all images to keep, which are streamed in blocks.

The weights of ReTrack (arXiv 2509.13007, section 3.2) before they are truncated: with `rho = alpha / sigma`,
`log q(x_t|x) - log q(x_t|a) = rho <eps, x - a> - rho^2 ||x - a||^2 / 2`. That is `l(x) - l(a)` with
`l(x) = <rho eps + rho^2 a, x> - rho^2 ||x||^2 / 2`: one product of a row's vector with a block of images, and
the norms of the images. A second product with the same block sums the weighted images, and the norms, summed
with the weights, give the spread.

All of it is float64: `rho^2 ||x||^2` reaches 1e9, of which the softmax needs the ones. Of uint8 images the
products are those of the bytes, so that nothing is rounded before them.

A step reads the set once, M D bytes or floats, and takes 4 B M D operations in float64: 60,000 MNIST images
are 47 MB, and 3.0 G operations for 16 rows. What it holds beside the set is one block as float64. Nearly all
of it are two matrix products of torch, which a kernel of our own would not do faster.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Values of a block, which is held in float64: what stays in a core's cache, and what keeps a GPU busy.
CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 23
GREY_LEVEL = 2 / 255  # of uint8 images, in the scale of network input


class Units(NamedTuple):
    """How stored values `u` are network input: `scale u + shift`."""

    scale: float
    shift: float

    @classmethod
    def of(cls, images: Tensor) -> Units:
        return cls(GREY_LEVEL, -1.0) if images.dtype == torch.uint8 else cls(1.0, 0.0)


class Posterior(NamedTuple):
    """What x_t says of a set of images, one of which, each as likely as the others, it was made from."""

    log_ratio: Tensor  # [B] float64, log of the mean of q(x_t|x) / q(x_t|a) over the set
    mean: Tensor | None  # [B, D] float64, of the images, as network input
    variance: Tensor | None  # [B] float64, summed over the D elements


def posterior(
    images: Tensor, forget: Tensor, noise: Tensor, rho: Tensor, *, moments: bool = True
) -> Posterior:
    """The posterior of the set `images` given `x_t = alpha a + sigma eps`; `rho` is `alpha / sigma`.

    Args:
        images: `[M, ...]` as stored, uint8 or floating.
        forget: `a`, `[B, D]` float64, as network input.
        noise: `eps`, `[B, D]` float64.
        rho: `[B]` float64.
        moments: mean and variance are wanted, which take one of two products with the set; else None.
    """
    # In units of the stored values, u: a difference of network input is scale times one of these.
    units = Units.of(images)
    own = (forget - units.shift) / units.scale
    slope = (rho * units.scale).unsqueeze(1)
    # l(u) = <query, u> + curvature ||u||^2; own_logit is that of a itself.
    query, curvature = slope * noise + slope.square() * own, -0.5 * slope.square()
    own_logit = (query * own).sum(1, keepdim=True) + curvature * own.square().sum(1, keepdim=True)

    # The softmax of everything so far, relative to the largest logit so far: its sum, and the sums of the
    # images and of their squared norms.
    largest = torch.full_like(slope, -torch.inf)
    total, energy, mean = torch.zeros_like(slope), torch.zeros_like(slope), torch.zeros_like(query)
    for block in _blocks(images):
        norms = block.square().sum(1)
        logits = (query @ block.T).addcmul_(curvature, norms)
        before, largest = largest, torch.maximum(largest, logits.amax(1, keepdim=True))
        weights = logits.sub_(largest).exp_()
        # The sums so far were relative to the largest logit before.
        shrink = (before - largest).exp()
        total = total * shrink + weights.sum(1, keepdim=True)
        if not moments:
            continue
        energy = energy * shrink + (weights @ norms).unsqueeze(1)
        mean = (mean * shrink).addmm_(weights, block)

    log_ratio = largest + total.log() - math.log(len(images)) - own_logit
    if not moments:
        return Posterior(log_ratio.squeeze(1), None, None)
    mean = mean / total
    variance = (energy / total - mean.square().sum(1, keepdim=True)).clamp_min(0)
    return Posterior(
        log_ratio.squeeze(1), mean * units.scale + units.shift, variance.squeeze(1) * units.scale**2
    )


def _blocks(images: Tensor) -> Iterator[Tensor]:
    """All rows in order, as float64 `[n, D]`."""
    values = CPU_BLOCK if images.device.type == "cpu" else GPU_BLOCK
    for rows in images.split(max(1, values // images[0].numel())):
        yield rows.flatten(1).double()


def redirect_to_all(
    forget: Tensor,
    retain_set: Tensor,
    noise: Tensor,
    coefficients: Tensor,
    forget_set: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The target `[B, C, H, W]`, its spread `[B]` and, with a forget set, the weight `[B]`, all float64.

    Args:
        forget: `[B, C, H, W]` float64, as network input.
        retain_set, forget_set: `[M, C, H, W]` as stored, uint8 or floating.
        noise: `[B, C, H, W]` float64.
        coefficients: `[B, 5]` float64, `NoiseSchedule.coefficients`.
    """
    alpha, sigma, a, b, c = coefficients.unbind(1)
    image, eps, rho = forget.flatten(1), noise.flatten(1), alpha / sigma
    kept = posterior(retain_set, image, eps, rho)

    # The target of an image x seen through x_t is a eps + b a + c (a - x): linear in x.
    of_noise, of_image, of_step = (each.unsqueeze(1) for each in (a, b, c))
    target = of_noise * eps + of_image * image + of_step * (image - kept.mean)
    spread = c.square() * kept.variance
    weight = None
    if forget_set is not None:
        # Both ratios are to q(x_t|a): it cancels. The exact weight of section 3.2, summed over the set.
        forgotten = posterior(forget_set, image, eps, rho, moments=False)
        weight = (kept.log_ratio - forgotten.log_ratio).exp()
    return target.view_as(forget), spread, weight
