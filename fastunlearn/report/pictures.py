"""Grids of samples (Pillow) and loss curves (matplotlib) as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..host import check, finite

BACKGROUND, FRAME, HIDDEN = (0, 0, 0, 0), (226, 84, 20, 255), (150, 156, 164, 255)  # the gaps are transparent
TILE = 56  # least side of a tile, in pixels of the picture
GAP, BORDER = 4, 3


def grid(
    images: Tensor,
    *,
    columns: int,
    marked: Sequence[bool] | None = None,
    hidden: Sequence[bool] | None = None,
    tile: int = TILE,
) -> bytes:
    """`images` `[N, C, H, W]` in [-1, 1], C 1 or 3, row by row; `marked` ones framed, `hidden` ones replaced
    by a grey tile. PNG bytes.

    Raises:
        TypeError, ValueError: no images, of another shape, or not floating; no column.
        NotFiniteError: a ValueError; NaN would be drawn as black.
    """
    return _png(_grid(images, columns, marked, hidden, tile))


def side_by_side(
    left: Tensor,
    right: Tensor,
    *,
    columns: int,
    marked: tuple[Sequence[bool], Sequence[bool]] | None = None,
    hidden: tuple[Sequence[bool], Sequence[bool]] | None = None,
) -> bytes:
    """Two grids of the same layout beside each other: the same place shows the same noise."""
    pictures = [
        _grid(images, columns, marked and marked[i], hidden and hidden[i])
        for i, images in enumerate((left, right))
    ]
    gutter = TILE // 2
    canvas = Image.new(
        "RGBA",
        (pictures[0].width + gutter + pictures[1].width, max(picture.height for picture in pictures)),
        BACKGROUND,
    )
    canvas.paste(pictures[0], (0, 0))
    canvas.paste(pictures[1], (pictures[0].width + gutter, 0))
    return _png(canvas)


def loss_curves(log: Sequence[dict], labels: dict[str, str]) -> bytes:
    """One panel a key of `labels` (key of the log's entries -> what the axis says), over the entries' `step`.
    PNG bytes.

    Values that are not finite, or None, leave a gap in their curve.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(3.6 * len(labels), 2.7), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    for panel, (key, label) in zip(
        np.atleast_1d(figure.subplots(1, len(labels))), labels.items(), strict=True
    ):
        values = [entry.get(key) for entry in log]
        values = [math.nan if value is None or not math.isfinite(value) else value for value in values]
        seen = [value for value in values if not math.isnan(value)]
        panel.plot(
            [entry["step"] for entry in log],
            values,
            color="#1f5fa8",
            linewidth=1.4,
            marker="o" if len(log) == 1 else None,
        )
        panel.set_title(label, fontsize=9.5, loc="left", color="#20242a")
        panel.set_xlabel("step", fontsize=8.5, color="#565d66")
        if seen and min(seen) > 0 and max(seen) > 20 * min(seen):
            panel.set_yscale("log")
        else:
            panel.set_ylim(bottom=0)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        panel.tick_params(which="both", labelsize=8, colors="#565d66", length=3)
        panel.grid(color="#e3e6ea", linewidth=0.6)
        panel.set_axisbelow(True)
        for side, spine in panel.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color("#b6bcc4")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _grid(
    images: Tensor,
    columns: int,
    marked: Sequence[bool] | None,
    hidden: Sequence[bool] | None,
    tile: int = TILE,
) -> Image.Image:
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(
            f"images: expected [N, 1 or 3, H, W] with at least one image, got {tuple(images.shape)}"
        )
    check.images("images", images)
    check.integer("columns", columns, low=1)
    finite.rows("images", images)
    pixels = (
        ((images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    )
    height, width = pixels.shape[1:3]
    scale = -(-tile // min(height, width))
    step_x, step_y = width * scale + GAP, height * scale + GAP
    rows = -(-len(pixels) // columns)
    canvas = Image.new("RGBA", (min(columns, len(pixels)) * step_x + GAP, rows * step_y + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for i, values in enumerate(pixels):
        left, top = GAP + i % columns * step_x, GAP + i // columns * step_y
        box = (left, top, left + width * scale - 1, top + height * scale - 1)
        if hidden is not None and hidden[i]:
            draw.rectangle(box, fill=HIDDEN)
        else:
            picture = Image.fromarray(values[..., 0] if values.shape[2] == 1 else values).convert("RGB")
            canvas.paste(
                picture.resize((width * scale, height * scale), Image.Resampling.NEAREST), (left, top)
            )
        if marked is not None and marked[i]:
            draw.rectangle(
                (box[0] - BORDER, box[1] - BORDER, box[2] + BORDER, box[3] + BORDER),
                outline=FRAME,
                width=BORDER,
            )
    return canvas


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
