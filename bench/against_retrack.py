"""This package's step, in the form that the comparison with the official ReTrack code asks for.

    RETRACK_REF=/path/to/ReTrack python ../shared/ref_harness.py --other bench.against_retrack:build_step
    --methods retrack,siss --model mnist --batch 16

Both run a whole step: noise, timesteps, forward, loss, backward, rescaling, clipping, optimizer,
learning-rate schedule. ReTrack's code makes two forwards for SISS where the method needs one; that difference
is part of the ratio.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

import fastunlearn as fu


def build_step(
    method: str, model, noise_scheduler, optimizer, lr_scheduler, options: dict
) -> Callable[[dict[str, Tensor | tuple[Tensor, Tensor]]], None]:
    """`step(batches)` for one of the five methods.

    Args:
        method: `"retrack"`, `"siss"`, `"erasediff"`, `"neggrad"` or `"vanilla"`.
        model, noise_scheduler, optimizer, lr_scheduler: a diffusers UNet, DDPMScheduler and what trains it.
        options: `clip_max_norm`, `retrack_lambda`, `siss_lambda`, `rescale_factor`, `eta`.

    Returns:
        A function of `{"remain": [B, C, H, W], "deletion": [B, C, H, W], "knn": ([B, C, H, W], [B, K, C, H,
        W])}`, of which it reads what its method needs.
    """
    common = (model, optimizer, fu.NoiseSchedule.from_diffusers(noise_scheduler))
    clip = {"max_grad_norm": options["clip_max_norm"]}

    def retrack(batches):
        forget, neighbors = batches["knn"]
        fu.retrack_step(
            *common, forget, neighbors, batches["remain"], lambd=options["retrack_lambda"], **clip
        )

    def siss(batches):
        fu.siss_step(
            *common,
            batches["deletion"],
            batches["remain"],
            lambd=options["siss_lambda"],
            scaling_norm=options["rescale_factor"],
            **clip,
        )

    def erasediff(batches):
        fu.erasediff_step(*common, batches["deletion"], batches["remain"], eta=options["eta"], **clip)

    def neggrad(batches):
        fu.neggrad_step(*common, batches["deletion"], **clip)

    def vanilla(batches):
        fu.vanilla_step(*common, batches["remain"], **clip)

    take = {"retrack": retrack, "siss": siss, "erasediff": erasediff, "neggrad": neggrad, "vanilla": vanilla}[
        method
    ]

    def step(batches) -> None:
        take(batches)
        lr_scheduler.step()

    return step
