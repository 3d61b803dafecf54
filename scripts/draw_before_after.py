"""The README's picture: `docs/before_after.png`, drawn from what `fastunlearn demo` wrote with seed 0.

    python scripts/draw_before_after.py

The demo's own pictures and numbers are kept in `bench/results/demo`: `samples.png` and
`reconstruction_250.png` as the demo wrote them, `results.json` without times and log. In `samples.png` the
samples that show the T-shirt come first. Here they stand in a row of their own, which says how many samples
there were, so that nobody takes the share in the picture for the share among the samples.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from fastunlearn.report.pictures import GAP, TILE

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results/demo"
PICTURE = ROOT / "docs/before_after.png"

COLUMNS = 8
STEP = TILE + GAP  # from one tile to the next
HALF = COLUMNS * STEP + GAP  # the width of a grid of the demo's pictures
GUTTER = TILE // 2  # between the grid before and the grid after
OTHER_ROWS = 3
WHITE, INK = (255, 255, 255), (32, 36, 42)
TITLE, LABEL = 19, 15  # sizes of letters, in pixels
TITLE_HEIGHT, LABEL_HEIGHT = 30, 28


class Part(NamedTuple):
    """A line of letters and the tiles below it."""

    label: str
    source: str  # the demo's picture
    places: range  # of the tiles in it
    top: int  # y of the tiles in the README's picture

    @property
    def rows(self) -> int:
        return -(-len(self.places) // COLUMNS)


def parts() -> list[Part]:
    """Samples with the T-shirt, other samples, and chains that start from the noised T-shirt."""
    results = _results()
    frequency = results["before"]["frequency"]
    hits, total = frequency["count"], frequency["total"]
    before, after = (results[when]["reconstructions"][0]["returned"] for when in ("before", "after"))
    timestep = results["before"]["reconstructions"][0]["timestep"]
    restored = f"{before['count']} of {before['total']} restored before, {after['count']} after"
    contents = (
        (f"First all {hits} of {total} samples that show the T-shirt, framed", "samples.png", range(hits)),
        (
            f"Then {OTHER_ROWS * COLUMNS} of the other {total - hits} samples",
            "samples.png",
            # from the third row on: the frames of the hits reach into the gap above the second
            range(2 * COLUMNS, (2 + OTHER_ROWS) * COLUMNS),
        ),
        (
            f"The T-shirt, noised to t = {timestep} and denoised again: {restored}",
            "reconstruction_250.png",
            range(COLUMNS),
        ),
    )
    found, top = [], TITLE_HEIGHT
    for label, source, places in contents:
        part = Part(label, source, places, top + LABEL_HEIGHT)
        found.append(part)
        top = part.top + part.rows * STEP + GAP
    return found


def draw() -> Image.Image:
    """The picture; the tiles are those of the demo, to the pixel."""
    found = parts()
    height = found[-1].top + found[-1].rows * STEP + GAP
    picture = Image.new("RGB", (2 * HALF + GUTTER, height), WHITE)
    pen = ImageDraw.Draw(picture)
    pen.text((GAP, 4), "before", fill=INK, font=_font(TITLE))
    after = f"after {_results()['run']['steps']} steps, same noise"
    pen.text((HALF + GUTTER + GAP, 4), after, fill=INK, font=_font(TITLE))
    for part in found:
        pen.text((GAP, part.top - LABEL_HEIGHT + 5), part.label, fill=INK, font=_font(LABEL))
        source = _on_white(RESULTS / part.source)
        for number, place in enumerate(part.places):
            for left in (0, HALF + GUTTER):
                x, y, _, _ = _box(left, number)
                picture.paste(source.crop(_box(left, place)), (x, part.top + y))
    return picture


def _results() -> dict:
    return json.loads((RESULTS / "results.json").read_text(encoding="utf-8"))


def _on_white(path: Path) -> Image.Image:
    """The gaps between the tiles are transparent in the demo's pictures."""
    picture = Image.open(path).convert("RGBA")
    ground = Image.new("RGBA", picture.size, WHITE)
    return Image.alpha_composite(ground, picture).convert("RGB")


def _box(left: int, place: int) -> tuple[int, int, int, int]:
    """Where tile number `place` of the grid that begins at `left` lies, with the frame around it."""
    column, row = place % COLUMNS, place // COLUMNS
    return left + column * STEP, row * STEP, left + (column + 1) * STEP + GAP, (row + 1) * STEP + GAP


def _font(size: int) -> ImageFont.ImageFont:
    return ImageFont.load_default(size)


if __name__ == "__main__":
    draw().save(PICTURE, optimize=True)
    print(PICTURE)
