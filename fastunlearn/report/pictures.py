"""Grids of samples (Pillow) and loss curves (matplotlib) as PNG bytes."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from ..host import check, finite

# Colours, red, green, blue and alpha: the gaps are transparent, so that the page may be light or dark.
BACKGROUND, FRAME, HIDDEN = (0, 0, 0, 0), (226, 84, 20, 255), (150, 156, 164, 255)
TILE = 56  # least side of a tile, in pixels of the picture
GAP, BORDER = 4, 3  # between tiles, and of a frame: it fits into the gap


def grid(
    images: Tensor,
    *,
    columns: int,
    marked: Sequence[bool] | None = None,
    hidden: Sequence[bool] | None = None,
    tile: int = TILE,
) -> bytes:
    """Images in a grid, row by row, as PNG bytes.

    Args:
        images: `[N, C, H, W]` in [-1, 1], C 1 or 3.
        columns: of the grid.
        marked: which ones get a frame.
        hidden: which ones are replaced by a grey tile.
        tile: least side of an image, in pixels of the picture.

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
    """Two grids of the same layout beside each other: the same place shows the same noise.

    `marked` and `hidden` have an entry for each grid; all else is as in `grid`.
    """
    marked_left, marked_right = marked or (None, None)
    hidden_left, hidden_right = hidden or (None, None)
    first = _grid(left, columns, marked_left, hidden_left)
    second = _grid(right, columns, marked_right, hidden_right)
    gutter = TILE // 2
    size = first.width + gutter + second.width, max(first.height, second.height)
    canvas = Image.new("RGBA", size, BACKGROUND)
    canvas.paste(first, (0, 0))
    canvas.paste(second, (first.width + gutter, 0))
    return _png(canvas)


def loss_curves(log: Sequence[dict], labels: dict[str, str]) -> bytes:
    """Curves over the steps of a run, as PNG bytes.

    Values that are not finite, or None, leave a gap in their curve.

    Args:
        log: entries with a `step`.
        labels: key of the entries -> what stands above its panel.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    # Not by pyplot, which would keep the figure and look for a screen.
    figure = Figure(figsize=(3.6 * len(labels), 2.7), dpi=200, layout="constrained")
    FigureCanvasAgg(figure)
    steps = [entry["step"] for entry in log]
    panels = np.atleast_1d(figure.subplots(1, len(labels)))
    for panel, (key, label) in zip(panels, labels.items(), strict=True):
        _draw_curve(panel, steps, [entry.get(key) for entry in log], label)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_curve(panel, steps: list[int], values: list[float | None], label: str) -> None:
    """One curve in matplotlib's axes `panel`."""
    from matplotlib.ticker import MaxNLocator

    # matplotlib draws no line to NaN.
    values = [math.nan if value is None or not math.isfinite(value) else value for value in values]
    seen = [value for value in values if not math.isnan(value)]
    # A single point makes no line, so it is drawn as a dot.
    marker = "o" if len(values) == 1 else None
    panel.plot(steps, values, color="#1f5fa8", linewidth=1.4, marker=marker)
    panel.set_title(label, fontsize=9.5, loc="left", color="#20242a")
    panel.set_xlabel("step", fontsize=8.5, color="#565d66")
    # What ranges over more than a factor of 20 would be a line along the bottom.
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


def _grid(
    images: Tensor,
    columns: int,
    marked: Sequence[bool] | None,
    hidden: Sequence[bool] | None,
    tile: int = TILE,
) -> Image.Image:
    """The picture of `grid`."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or len(images) == 0:
        raise ValueError(
            f"images: expected [N, 1 or 3, H, W] with at least one image, got {tuple(images.shape)}"
        )
    check.images("images", images)
    check.integer("columns", columns, low=1)
    finite.rows("images", images)
    pixels = _bytes(images)
    # Small images are enlarged by a whole number, so that every pixel of theirs is a square.
    height, width = pixels.shape[1:3]
    scale = -(-tile // min(height, width))
    height, width = height * scale, width * scale
    step_x, step_y = width + GAP, height + GAP
    rows = -(-len(pixels) // columns)
    canvas = Image.new("RGBA", (min(columns, len(pixels)) * step_x + GAP, rows * step_y + GAP), BACKGROUND)
    draw = ImageDraw.Draw(canvas)
    for number, values in enumerate(pixels):
        row, column = divmod(number, columns)
        left, top = GAP + column * step_x, GAP + row * step_y
        right, bottom = left + width - 1, top + height - 1
        if hidden is not None and hidden[number]:
            draw.rectangle((left, top, right, bottom), fill=HIDDEN)
        else:
            picture = Image.fromarray(values).convert("RGB")
            canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (left, top))
        # The frame lies in the gap around the image, and covers none of it.
        if marked is not None and marked[number]:
            frame = (left - BORDER, top - BORDER, right + BORDER, bottom + BORDER)
            draw.rectangle(frame, outline=FRAME, width=BORDER)
    return canvas


def _bytes(images: Tensor) -> np.ndarray:
    """`[N, C, H, W]` in [-1, 1] as Pillow takes them: uint8 `[N, H, W]` for grey, `[N, H, W, 3]` for RGB."""
    grey_levels = (images.detach().cpu().float().clamp(-1, 1) + 1) * 127.5
    pixels = grey_levels.round().byte()
    if pixels.shape[1] == 1:
        return pixels[:, 0].numpy()
    return pixels.permute(0, 2, 3, 1).numpy()


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()
