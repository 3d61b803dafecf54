"""Cases of the functional ops, of the search for neighbours and of schedules, by backend."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import torch

from fastunlearn import ImageStore, LowPass, near_copies, nearest_neighbors
from fastunlearn import functional as F

from . import parts
from .registry import add

BACKENDS = ("reference", "eager", "kernels", "auto")
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow")
DTYPES = {"float32": torch.float32, "float64": torch.float64, "bfloat16": torch.bfloat16}
TIMESTEPS = torch.tensor([0, 20, 400, 90, 999])


def _inputs(dtype: torch.dtype, channels_last: bool = False) -> tuple[torch.Tensor, ...]:
    """Forget and retain images and noise `[5, 1, 8, 8]`, neighbours `[5, 3, 1, 8, 8]`."""
    forget, other = parts.images(5, 1), parts.images(5, 2)
    retain = (forget + 0.1 * other).clamp(-1, 1)
    neighbors = (forget[:, None] + 0.1 * torch.randn(5, 3, *parts.SHAPE, generator=parts.seeded(3))).clamp(
        -1, 1
    )
    noise = torch.randn(5, *parts.SHAPE, generator=parts.seeded(4))
    forget, retain, neighbors, noise = (each.to(dtype) for each in (forget, retain, neighbors, noise))
    if channels_last:
        forget, retain, noise = (
            each.to(memory_format=torch.channels_last) for each in (forget, retain, noise)
        )
    return forget, retain, neighbors, noise


def noised(backend: str, prediction: str, dtype: torch.dtype, place=None) -> Any:
    forget, _, _, noise = _inputs(dtype)
    with parts.environment(FASTUNLEARN_BACKEND=backend):
        return F.noised(forget, noise, TIMESTEPS, parts.schedule(prediction))


def redirect(backend: str, prediction: str, dtype: torch.dtype, place=None) -> Any:
    forget, retain, neighbors, noise = _inputs(dtype)
    schedule, last = parts.schedule(prediction), _inputs(dtype, channels_last=True)
    sqdist = (neighbors.double() - forget[:, None].double()).square().flatten(2).sum(2)
    with parts.environment(FASTUNLEARN_BACKEND=backend):
        return {
            "plain": F.redirect(forget, neighbors, noise, TIMESTEPS, schedule),
            "with distances": F.redirect(forget, neighbors, noise, TIMESTEPS, schedule, sqdist=sqdist),
            "with x_t": F.redirect(forget, neighbors, None, TIMESTEPS, schedule, x_t=retain),
            "channels last": F.redirect(last[0], neighbors, last[3], TIMESTEPS, schedule),
        }


def mixture(backend: str, prediction: str, dtype: torch.dtype, place=None) -> Any:
    forget, retain, _, noise = _inputs(dtype)
    images, last = (retain, forget), _inputs(dtype, channels_last=True)
    schedule, chosen = parts.schedule(prediction), torch.tensor([True, False, True, False, False])
    rest = schedule, 0.4, chosen
    ratio = torch.tensor([0.0, 0.5, torch.inf, -torch.inf, -2.0], dtype=torch.float64)
    with parts.environment(FASTUNLEARN_BACKEND=backend):
        return {
            "plain": F.mixture(*images, noise, TIMESTEPS, *rest),
            "lambd 0": F.mixture(*images, noise, TIMESTEPS, schedule, 0, torch.zeros_like(chosen)),
            "with ratios": F.mixture(*images, noise, TIMESTEPS, *rest, time_log_ratio=ratio),
            "with x_t": F.mixture(*images, None, TIMESTEPS, *rest, x_t=noise),
            "channels last": F.mixture(last[1], last[0], last[3], TIMESTEPS, *rest),
        }


def loss(backend: str, band: LowPass | None, dtype: torch.dtype, place=None) -> Any:
    forget, retain, _, _ = _inputs(dtype)
    weight = torch.linspace(0.1, 2, 5)
    prediction = forget.clone().requires_grad_(True)
    with parts.environment(FASTUNLEARN_BACKEND=backend):
        losses = F.denoising_loss(prediction, retain, weight, band)
        losses.sum().backward()
        return {
            "loss": losses,
            "gradient": prediction.grad,
            "unweighted": F.denoising_loss(forget, retain),
            "both": F.weighted_residual(forget, retain, weight, band),
        }


def neighbours(rows: str, backend: str, place=None) -> Any:
    make = parts.byte_images if rows == "bytes" else parts.images
    stores = ImageStore(make(9, 1)), ImageStore(make(300, 2))
    return {
        "plain": nearest_neighbors(*stores, 7, backend=backend),
        "in small chunks": nearest_neighbors(*stores, 7, backend=backend, chunk_bytes=1),
    }


def cached_neighbours(place) -> Any:
    """What one tree has cached the other one reads: the file has the same name."""
    stores = ImageStore(parts.byte_images(9, 1)), ImageStore(parts.byte_images(300, 2))
    found = nearest_neighbors(*stores, 7, cache_dir=place.handed / "neighbours")
    return {"found": found, "files": sorted(file.name for file in (place.handed / "neighbours").iterdir())}


def copies(place=None) -> Any:
    retain = torch.randint(0, 256, (60, 1, 16, 16), generator=parts.seeded(5), dtype=torch.uint8)
    forget = torch.stack([retain[3].flip(-1), retain[10].rot90(1, (-2, -1)), 255 - retain[20]])
    found = near_copies(ImageStore(forget), ImageStore(retain))
    return {
        name: getattr(found, name) for name in ("forget_rows", "retain_rows", "orientations", "distances")
    } | {"text": str(found)}


def schedules(prediction: str, place=None) -> Any:
    schedule = parts.schedule(prediction)
    return {
        "tables": [schedule.alpha, schedule.sigma, schedule.model_timesteps],
        "coefficients": schedule.coefficients(TIMESTEPS),
        "input": schedule.model_input(TIMESTEPS),
        "text": repr(schedule),
    }


OPS = {"noised": noised, "redirect": redirect, "mixture": mixture}
BANDS = {"all": None, "low": LowPass(0.3), "mid, box": LowPass(0.6, kind="box", band="mid", inner=0.2)}

for backend, dtype_name in itertools.product(BACKENDS, DTYPES):
    dtype, title = DTYPES[dtype_name], f"{backend}, {dtype_name}"
    quick = dtype_name == "float32"
    for prediction, op_name in itertools.product(PREDICTIONS, OPS):
        run = partial(OPS[op_name], backend, prediction, dtype)
        add("ops", f"{op_name}, {title}, {prediction}", run, quick=quick)
    for band_name, band in BANDS.items():
        if title == "reference, bfloat16" and band is not None:
            continue  # torch has no FFT of bfloat16
        add("ops", f"denoising_loss, {title}, {band_name}", partial(loss, backend, band, dtype), quick=quick)
for prediction in PREDICTIONS:
    add("ops", f"schedule, {prediction}", partial(schedules, prediction))
for rows, backend in itertools.product(("bytes", "floats"), ("exact", "auto")):
    add("neighbours", f"{rows}, {backend}", partial(neighbours, rows, backend))
add("neighbours", "cached by the old tree", cached_neighbours)
add("neighbours", "near copies", copies)
