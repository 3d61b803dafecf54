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

HEADS = ("before", "after, same noise")
LOSSES = {"forget_loss": "forget loss", "retain_loss": "retain loss", "grad_norm": "gradient norm"}


@dataclass(frozen=True)
class ReconstructionPair:
    """Results and images `[chains, C, H, W]` of `metrics.reconstruction.reconstruct` before and after, from
    the same noise.
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
    columns: int = 8,
    rows: int = 8,
) -> Section:
    """Samples `[N, C, H, W]` of both models from the same noise; `hits_*` bool `[N]`: which of them show the
    forgotten image.

    Hits come first and are framed; without `report_images` they are grey tiles.
    """
    order = torch.cat(
        [torch.nonzero(hits_before | hits_after)[:, 0], torch.nonzero(~(hits_before | hits_after))[:, 0]]
    )[: columns * rows]
    hits = hits_before[order].tolist(), hits_after[order].tolist()
    picture = side_by_side(
        before[order], after[order], columns=columns, marked=hits, hidden=None if report_images else hits
    )
    shown = sum(map(bool, (first or second for first, second in zip(*hits, strict=True))))
    caption = (
        f"{len(order)} of {len(before)} samples; the same place in both grids starts from the same noise."
    )
    if shown:
        caption += f" The {'one' if shown == 1 else shown} in which either model shows the {subject} come{'s' if shown == 1 else ''} first, framed"
        caption += "." if report_images else " and hidden."
    return Section("Samples", figures=(Figure("samples.png", picture, caption, HEADS),))


def reconstructions_section(
    image: Tensor, noised: Sequence[Tensor], pairs: Sequence[ReconstructionPair], *,
    subject: str = "forget image", report_images: bool = False, columns: int = 8, rows: int = 3,
) -> Section:  # fmt: skip
    """What the models make of `image` `[1, C, H, W]` when it is noised to some timestep and denoised; a
    sentence only without `report_images`.

    `noised` has, for each pair, one example of where its chains start, `[1, C, H, W]`.
    """
    text = f"The {subject} is noised to a timestep of the diffusion, and the model denoises it again. A model that has memorised it finds the way back."
    if not report_images:
        return Section(
            "Reconstruction from noise",
            text + " The pictures would show it, so they are not drawn (report_images).",
        )
    stages = (f"the {subject}", *(f"noised to t = {pair.before.timestep}" for pair in pairs))
    start = grid(torch.cat([image, *noised]), columns=len(stages), tile=140)
    figures = [
        Figure(
            "injected.png", start, "Where the chains start, for one noise.", stages, width=150 * len(stages)
        )
    ]
    for pair in pairs:
        first = slice(0, columns * rows)
        picture = side_by_side(pair.images_before[first], pair.images_after[first], columns=columns)
        caption = (
            f"Noise injected at t = {pair.before.timestep}: {pair.before.returned.count} of {pair.before.returned.total} chains came back before, "
            f"{pair.after.returned.count} of {pair.after.returned.total} after; the first {len(pair.images_before[first])} are shown."
        )
        figures.append(Figure(f"reconstruction_{pair.before.timestep}.png", picture, caption, HEADS))
    return Section("Reconstruction from noise", text, figures=tuple(figures))


def training_section(log: Sequence[dict], text: str = "") -> Section:
    """Loss curves over the unlearning steps; `log` has one entry a step, with `step` and the names of
    `StepOutput`.

    Steps that were `skipped`, or have a number that is not finite, are counted in the text, and leave gaps in
    the curves.
    """
    labels = {key: label for key, label in LOSSES.items() if any(entry.get(key) is not None for entry in log)}
    broken = sum(not _all_finite(entry) for entry in log)
    if broken:
        counted = f"{broken} of {len(log)} steps had a loss or a gradient that is not finite, and changed"
        text = f"{text} {counted} nothing.".strip()
    if not labels:
        return Section("Unlearning", text or "No step was taken.")
    caption = (
        "Squared error summed over pixels, mean over the batch; the gradient norm is that before clipping. Every step draws its own timesteps, and "
        "targets grow towards t = 0: hence the spread from step to step."
    )
    return Section("Unlearning", text, figures=(Figure("losses.png", loss_curves(log, labels), caption),))


def _all_finite(entry: dict) -> bool:
    values = [entry[key] for key in LOSSES if entry.get(key) is not None]
    return not entry.get("skipped", False) and all(math.isfinite(value) for value in values)
