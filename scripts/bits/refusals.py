"""Cases of what is refused: the error and its message."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from fastunlearn import (
    SISS,
    Draws,
    EraseDiff,
    ImageStore,
    NegGrad,
    NoiseSchedule,
    ReTrack,
    Unlearner,
    Vanilla,
    erasediff_step,
    nearest_neighbors,
    neggrad_step,
    retrack_step,
    siss_step,
    vanilla_step,
)

from . import parts
from .registry import add

IMAGES, NEIGHBORS = parts.images(4, 1), parts.images(8, 2).view(4, 2, *parts.SHAPE)


def step(take: Callable[..., Any], *batches: Any, schedule: Any = None, **options: Any) -> Any:
    model = parts.Denoiser()
    optimizer = parts.make_optimizer("fused", model)
    return take(model, optimizer, parts.schedule() if schedule is None else schedule, *batches, **options)


def standing(place=None) -> Any:
    """A gradient that stands in `.grad`, and nobody said that it is to be kept."""
    model = parts.Denoiser()
    model.enter.weight.grad = torch.zeros_like(model.enter.weight)
    return vanilla_step(model, parts.make_optimizer("fused", model), parts.schedule(), IMAGES)


def frozen(place=None) -> Any:
    model = parts.Denoiser()
    optimizer = parts.make_optimizer("fused", model)
    model.requires_grad_(False)
    return vanilla_step(model, optimizer, parts.schedule(), IMAGES)


def unlearner(method: Any, place=None, *, overlapping: bool = False, **options: Any) -> Any:
    model = parts.Denoiser()
    forget, retain = parts.byte_images(4, 1), parts.byte_images(9, 2)
    stores = {"forget": ImageStore(forget), "retain": ImageStore(torch.cat([retain, forget[:overlapping]]))}
    return Unlearner(
        model,
        parts.make_optimizer("fused", model),
        parts.schedule(),
        method,
        **stores | {"batch_size": 4} | options,
    ).step()


def of(call: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[..., Any]:
    return lambda place: call(*arguments, **options)


DRAWS = Draws(retain_noise=IMAGES[:2])
OUTSIDE = Draws(retain_timesteps=torch.tensor([0, 1, 2, 1000]))
REFUSED = {
    "vanilla, bytes": of(step, vanilla_step, parts.byte_images(4, 1)),
    "vanilla, rank 3": of(step, vanilla_step, IMAGES[0]),
    "vanilla, no images": of(step, vanilla_step, None),
    "vanilla, noise of other rows": of(step, vanilla_step, IMAGES, draws=DRAWS),
    "vanilla, timestep outside": of(step, vanilla_step, IMAGES, draws=OUTSIDE),
    "vanilla, unused draws": of(step, vanilla_step, IMAGES, draws=Draws(forget_noise=IMAGES)),
    "vanilla, draws of a dict": of(step, vanilla_step, IMAGES, draws={}),
    "vanilla, forget_kwargs": of(step, vanilla_step, IMAGES, forget_kwargs={"labels": torch.zeros(4)}),
    "vanilla, schedule": of(step, vanilla_step, IMAGES, schedule="linear"),
    "vanilla, autocast": of(step, vanilla_step, IMAGES, autocast_dtype=torch.float64),
    "vanilla, micro batches of 0": of(step, vanilla_step, IMAGES, micro_batch_size=0),
    "vanilla, norm": of(step, vanilla_step, IMAGES, max_grad_norm=-1.0),
    "vanilla, compile": of(step, vanilla_step, IMAGES, compile="yes"),
    "vanilla, lowpass": of(step, vanilla_step, IMAGES, lowpass=0.3),
    "vanilla, a gradient stands": standing,
    "vanilla, nothing to train": frozen,
    "retrack, no retain": of(step, retrack_step, IMAGES, NEIGHBORS),
    "retrack, neighbours of others": of(step, retrack_step, IMAGES, NEIGHBORS[:3], IMAGES),
    "retrack, distances": of(step, retrack_step, IMAGES, NEIGHBORS, IMAGES, sqdist=torch.ones(4, 3)),
    "retrack, lambd": of(step, retrack_step, IMAGES, NEIGHBORS, IMAGES, lambd=2.0),
    "siss, rows": of(step, siss_step, IMAGES, IMAGES[:3]),
    "siss, variant": of(step, siss_step, IMAGES, IMAGES, variant="both"),
    "siss, lambd": of(step, siss_step, IMAGES, IMAGES, lambd=1.0, variant="bernoulli"),
    "erasediff, dtype": of(step, erasediff_step, IMAGES, IMAGES.double()),
    "erasediff, eta": of(step, erasediff_step, IMAGES, IMAGES, eta=-1),
    "neggrad, factor": of(step, neggrad_step, IMAGES, superfactor=0),
    "neggrad, one row of labels": of(
        step, neggrad_step, IMAGES, forget_kwargs={"labels": torch.zeros(3).long()}
    ),
    "Unlearner, method": partial(unlearner, "retrack"),
    "Unlearner, k": partial(unlearner, ReTrack(k=20)),
    "Unlearner, no retain": partial(unlearner, EraseDiff(), retain=None),
    "Unlearner, no forget": partial(unlearner, NegGrad(), forget=None),
    "Unlearner, batch size": partial(unlearner, SISS(), batch_size=0),
    "Unlearner, seed": partial(unlearner, SISS(), seed=-1),
    "Unlearner, ema": partial(unlearner, SISS(), ema=3),
    "Unlearner, residency": partial(unlearner, SISS(), residency="disk"),
    "Unlearner, replay": partial(unlearner, Vanilla(), replay=True),
    "Unlearner, overlap": partial(unlearner, SISS(), overlapping=True),
    "schedule, alphas": of(NoiseSchedule.from_alphas_cumprod, torch.linspace(0.1, 0.9, 5)),
    "schedule, prediction": of(parts.schedule, "noise"),
    "store, range": of(ImageStore, IMAGES * 3),
    "store, latents of bytes": of(ImageStore, parts.byte_images(2, 1), latents=True),
    "neighbours, k": of(nearest_neighbors, IMAGES, IMAGES, 5),
    "neighbours, kinds": of(nearest_neighbors, IMAGES, parts.byte_images(4, 1), 2),
}

for name, call in REFUSED.items():
    add("refusals", name, call, refused=True)
