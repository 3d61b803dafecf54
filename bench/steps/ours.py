"""This package's step, through its public interface: as functions on given batches, and through `Unlearner`
with its stores and draws.
"""

from __future__ import annotations

import torch
from torch import nn

import fastunlearn as fu

from .job import PRECISIONS, Draw, Images, Job
from .networks import SISS_LAMBD, K, Step

_READS = {"vanilla": ("retain",), "neggrad": ("forget",)}  # the sets that a method reads, if not both


def functional(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    images: Images,
    **options,
) -> Step:
    """The `*_step` of the method; `options` are keyword arguments of it, such as `compile`.

    The functions take a batch as the caller's loop has it, and draw noise and timesteps.
    """
    network, method = job.network, job.method
    hyperparameters = {
        "retrack": {"lambd": network.lambd},
        "siss": {"lambd": SISS_LAMBD, "scaling_norm": network.scaling_norm},
        "erasediff": {"eta": network.eta},
    }.get(method.split()[0], {})
    if method.startswith("siss"):
        hyperparameters["variant"] = method.removeprefix("siss").strip() or "mixture"
    take = getattr(fu, f"{method.split()[0]}_step")
    common = {
        "max_grad_norm": max_grad_norm,
        "autocast_dtype": PRECISIONS[job.precision],
        "micro_batch_size": job.micro,
        **hyperparameters,
        **options,
    }

    def step(draw: Draw | None = None) -> None:
        rows = job.batch if draw is None else len(draw.from_forget)
        part = images if rows == len(images.forget) else images.rows(0, rows)
        batches = {name: getattr(part, name) for name in _READS.get(method, ("forget", "retain"))}
        if method == "retrack":
            batches |= {"neighbors": part.neighbors, "sqdist": part.sqdist}
        conditioning = (
            {f"{name}_kwargs": job.conditioning(rows) for name in ("forget", "retain") if name in batches}
            if job.condition is not None
            else {}
        )
        take(model, optimizer, job.schedule, **batches, draws=given(job, draw), **conditioning, **common)

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
    network = job.network
    method = {
        "retrack": lambda: fu.ReTrack(k=K, lambd=network.lambd),
        "siss": lambda: fu.SISS(
            SISS_LAMBD, network.scaling_norm, job.method.removeprefix("siss").strip() or "mixture"
        ),
        "erasediff": lambda: fu.EraseDiff(network.eta),
        "neggrad": fu.NegGrad,
        "vanilla": fu.Vanilla,
    }[job.method.split()[0]]()
    # Unlearner has no conditioning of its own; one prompt for all rows is part of the network.
    network_call = (
        model if job.condition is None else lambda x_t, t: model(x_t, t, **job.conditioning(len(x_t)))
    )
    engine = fu.Unlearner(
        network_call, optimizer, job.schedule, method,
        forget=job.forget, retain=job.retain, neighbors=job.neighbors if job.method == "retrack" else None, batch_size=job.batch,
        micro_batch_size=job.micro, max_grad_norm=max_grad_norm, autocast_dtype=PRECISIONS[job.precision], **options,
    )  # fmt: skip

    def step(draw: Draw | None = None) -> None:
        if draw is None:
            engine.step()
            return
        rows = {
            f"{name}_rows": getattr(job, f"{name}_rows")[: len(draw.from_forget)]
            for name in _READS.get(job.method, ("forget", "retain"))
        }
        engine.step(given(job, draw, **rows))

    return step


def given(job: Job, draw: Draw | None, **rows) -> fu.Draws | None:
    """The numbers of `draw` that the method uses, as the package takes them."""
    if draw is None:
        return None
    names = [
        f"{branch}_{what}"
        for branch in _READS.get(job.method, ("forget", "retain"))
        for what in ("noise", "timesteps")
    ]
    names += {
        "siss": ["from_forget"],
        "siss bernoulli": ["from_forget"],
        "erasediff": ["uniform_target"],
    }.get(job.method, [])
    return fu.Draws(**{name: getattr(draw, name) for name in names}, **rows)
