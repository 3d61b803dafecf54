"""The sections of an unlearning report: samples, reconstructions and loss curves, before and after.

Pictures that show a forget image, or the model's copy of one, are drawn only on request (`report_images`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..metrics.reconstruction import Reconstruction
from .document import Figure, Section
from .pictures import grid, loss_curves, side_by_side

COLUMNS, SAMPLE_ROWS, CHAIN_ROWS = 8, 8, 3  # of the grids of pictures
HEADS = ("before", "after, same noise")
LOSSES = {"forget_loss": "forget loss", "retain_loss": "retain loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class ReconstructionPair:
    """What `metrics.reconstruction.reconstruct` returned before and after, from the same noise.

    Images are `[chains, C, H, W]`.
    """

    before: Reconstruction
    after: Reconstruction
    images_before: Tensor
    images_after: Tensor


def samples_section(
    before: Tensor,
    after: Tensor,
    hits_before: Tensor,
    hits_after: Tensor,
    *,
    subject: str = "forget image",
    report_images: bool = False,
) -> Section:
    """Samples of both models from the same noise.

    Hits come first and are framed; without `report_images` they are grey tiles.

    Args:
        before, after: `[N, C, H, W]`, row by row from the same noise.
        hits_before, hits_after: bool `[N]`, which of them show the forgotten image.
        subject: what the caption calls that image.
        report_images: whether hits are drawn.
    """
    # The grids show a part of the samples: hits are rare, and would be missing from the first ones.
    hit = hits_before | hits_after
    hits_first = torch.cat([torch.nonzero(hit)[:, 0], torch.nonzero(~hit)[:, 0]])
    order = hits_first[: COLUMNS * SAMPLE_ROWS]
    hits = hits_before[order].tolist(), hits_after[order].tolist()
    hidden = None if report_images else hits
    picture = side_by_side(before[order], after[order], columns=COLUMNS, marked=hits, hidden=hidden)
    caption = (
        f"{len(order)} of {len(before)} samples; the same place in both grids starts from the same noise."
    )
    shown = int(hit[order].sum())
    if shown > 0:
        which = f"in which either model shows the {subject}"
        how = "framed." if report_images else "framed and hidden."
        if shown == 1:
            caption += f" The one {which} comes first, {how}"
        else:
            caption += f" The {shown} {which} come first, {how}"
    return Section("Samples", figures=(Figure("samples.png", picture, caption, HEADS),))


def reconstructions_section(
    image: Tensor,
    noised: Sequence[Tensor],
    pairs: Sequence[ReconstructionPair],
    *,
    subject: str = "forget image",
    report_images: bool = False,
) -> Section:
    """What the models make of an image that is noised to some timestep and denoised.

    Without `report_images` it is a sentence only.

    Args:
        image: `[1, C, H, W]`.
        noised: for each pair one example of where its chains start, `[1, C, H, W]`.
        pairs: one for each timestep.
        subject: what the text calls the image.
        report_images: whether pictures are drawn, all of which show the image or the models' copies of it.
    """
    text = (
        f"The {subject} is noised to a timestep of the diffusion, and the model denoises it again. "
        "A model that has memorised it finds the way back."
    )
    if not report_images:
        text += " The pictures would show it, so they are not drawn (report_images)."
        return Section("Reconstruction from noise", text)
    # First the image itself, then where the chains of each timestep start.
    stages = (f"the {subject}", *(f"noised to t = {pair.before.timestep}" for pair in pairs))
    start = grid(torch.cat([image, *noised]), columns=len(stages), tile=140)
    caption = "Where the chains start, for one noise."
    figures = [Figure("injected.png", start, caption, stages, width=150 * len(stages))]
    for pair in pairs:
        figures.append(_chains(pair))
    return Section("Reconstruction from noise", text, figures=tuple(figures))


def _chains(pair: ReconstructionPair) -> Figure:
    """Where the first chains of one timestep ended, before and after."""
    first = slice(0, COLUMNS * CHAIN_ROWS)
    before, after = pair.before.returned, pair.after.returned
    timestep, shown = pair.before.timestep, len(pair.images_before[first])
    picture = side_by_side(pair.images_before[first], pair.images_after[first], columns=COLUMNS)
    caption = (
        f"Noise injected at t = {timestep}: {before.count} of {before.total} chains came back before, "
        f"{after.count} of {after.total} after; the first {shown} are shown."
    )
    return Figure(f"reconstruction_{timestep}.png", picture, caption, HEADS)


def training_section(log: Sequence[dict], text: str = "") -> Section:
    """Loss curves over the unlearning steps.

    Steps that were `skipped`, or have a number that is not finite, are counted in the text, and leave gaps in
    the curves.

    Args:
        log: one entry a step, with `step` and the names of `StepOutput`.
        text: what the section begins with.
    """
    # Methods differ in what they report: a panel for each number that there is.
    labels = {}
    for key, label in LOSSES.items():
        if any(entry.get(key) is not None for entry in log):
            labels[key] = label
    broken = sum(not _all_finite(entry) for entry in log)
    if broken > 0:
        counted = f"{broken} of {len(log)} steps had a loss or a gradient that is not finite, and changed"
        text = f"{text} {counted} nothing.".strip()
    if not labels:
        return Section("Unlearning", text or "No step was taken.")
    caption = (
        "Squared error summed over pixels, mean over the batch; the gradient norm is that before clipping. "
        "Every step draws its own timesteps, and targets grow towards t = 0: hence the spread from step to "
        "step."
    )
    return Section("Unlearning", text, figures=(Figure("losses.png", loss_curves(log, labels), caption),))


def _all_finite(entry: dict) -> bool:
    values = [entry[key] for key in LOSSES if entry.get(key) is not None]
    return not entry.get("skipped", False) and all(math.isfinite(value) for value in values)
