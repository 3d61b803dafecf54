"""This package's step, through its public interface: as functions on given batches, and through `Unlearner`
with its stores and draws.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

import fastunlearn as fu

from .job import PRECISIONS, Draw, Images, Job
from .networks import Step, reference_of
from .rules import rules_of


def functional(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    images: Images,
    **options,
) -> Step:
    """The step on given batches; `options` are keyword arguments of it, such as `compile`.

    It takes a batch as the caller's loop has it, and draws noise and timesteps.
    """
    method = job.instance
    common = {
        "max_grad_norm": max_grad_norm,
        "autocast_dtype": PRECISIONS[job.precision],
        "micro_batch_size": job.micro,
        "reference_model": reference_of(model) if "reference" in method.needs else None,
        "rules": rules_of(job, model),
        "sizes": job.sizes if "sizes" in method.needs else None,
        **options,
    }

    def step(draw: Draw | None = None) -> None:
        rows = job.batch if draw is None else len(draw.from_forget)
        part = images if rows == len(images.forget) else images.rows(0, rows)
        batches = {name: getattr(part, name) for name in ("forget", "retain") if name in method.needs}
        conditioning = {}
        if job.condition is not None:
            conditioning = {f"{name}_kwargs": job.conditioning(rows) for name in batches}
        if "neighbors" in method.needs:
            batches |= {"neighbors": part.neighbors, "sqdist": part.sqdist}
        draws = None if draw is None else job.given(draw)
        fu.method_step(
            method, model, optimizer, job.schedule, **batches, draws=draws, **conditioning, **common
        )

    return step


def unlearner(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    images: Images,
    **options,
) -> Step:
    """`Unlearner.step`; `options` are keyword arguments of `Unlearner`.

    It draws rows, too, and gathers them from its stores.
    """
    # Unlearner has no conditioning of its own; one prompt for all rows is part of the network.
    engine = fu.Unlearner(
        _in_call(job, model),
        optimizer,
        job.schedule,
        job.instance,
        forget=job.forget,
        retain=job.retain,
        neighbors=job.neighbors if "neighbors" in job.instance.needs else None,
        batch_size=job.batch,
        micro_batch_size=job.micro,
        max_grad_norm=max_grad_norm,
        autocast_dtype=PRECISIONS[job.precision],
        reference_model=_in_call(job, reference_of(model)) if "reference" in job.instance.needs else None,
        rules=rules_of(job, model),
        **options,
    )

    def step(draw: Draw | None = None) -> None:
        if draw is None:
            engine.step()
            return
        rows = {
            f"{name}_rows": getattr(job, f"{name}_rows")[: len(draw.from_forget)]
            for name in ("forget", "retain")
            if name in job.instance.needs
        }
        engine.step(job.given(draw, **rows))

    return step


def _in_call(job: Job, model: nn.Module) -> Callable:
    """`model` as it is called with images and timesteps alone."""
    if job.condition is None:
        return model
    return lambda x_t, t: model(x_t, t, **job.conditioning(len(x_t)))
