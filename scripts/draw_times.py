"""The README's chart: `docs/times.svg`, whole steps beside the official repositories, from `bench/results`.

    python scripts/draw_times.py            # draws it anew
    python scripts/draw_times.py --check    # fails if docs has another chart

A bar is our time over that of the repository in the same run, so that runs of seconds and of milliseconds fit
into one chart. The times themselves stand beside it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench/results"
CHART = ROOT / "docs/times.svg"

# in pixels: x of names, bars and times, the length of a bar of ratio 1, the height of a row and of a heading
NAME, BAR, TIME = 12, 268, 612
UNIT = 330
ROW, HEADING = 26, 44
WIDTH = 860
INK, QUIET, THEIRS, OURS = "#20242a", "#565d66", "#dde2e8", "#1f5fa8"


@dataclass(frozen=True)
class Measured:
    """One step: seconds of ours, and how many times as long the repository's way took in the same run."""

    name: str
    ours: float
    ratio: float

    @property
    def theirs(self) -> float:
        return self.ours * self.ratio


def on_cpu() -> Iterator[Measured]:
    """Beside the repositories themselves."""
    steps = _read("against_retrack_cpu.json")["methods"]
    for method, name in (("retrack", "ReTrack"), ("erasediff", "EraseDiff"), ("siss", "SISS")):
        ours, theirs = steps[method]["other"]["median_s"], steps[method]["reference"]["median_s"]
        yield Measured(f"{name}, ReTrack's repository", ours, theirs / ours)
    yield _step(
        "SISS, SISS' own repository", "steps_cpu.json", "siss", "float32", "fastunlearn", "official siss"
    )


def on_gpu() -> Iterator[Measured]:
    """Beside our rendering of the repositories' way."""
    h100, h200 = "gpu/h100/steps_h100_80gb_hbm3.json", "gpu/h200/steps_h200.json"
    replayed, both = "Unlearner, replayed", "Unlearner, compiled, replayed"
    yield _step("ReTrack, H100, float32, compiled", h100, "retrack", "float32", both, "retrack repo")
    yield _step("ReTrack, H100, bfloat16", h100, "retrack", "bfloat16", replayed, "retrack repo")
    yield _step("ReTrack, H200, bfloat16", h200, "retrack", "bfloat16", replayed, "retrack repo")
    yield _step("SISS, H200, bfloat16", h200, "siss", "bfloat16", replayed, "siss repo")


def _step(name: str, file: str, method: str, precision: str, contestant: str, repository: str) -> Measured:
    """The row of `contestant` on the papers' MNIST network."""
    wanted = {"network": "mnist", "method": method, "precision": precision, "contestant": contestant}
    (row,) = (row for row in _read(file)["rows"] if wanted.items() <= row.items())
    return Measured(name, row["seconds"], row["times_faster"][repository])


def _read(file: str) -> dict:
    return json.loads((RESULTS / file).read_text(encoding="utf-8"))


def chart() -> str:
    """The chart as SVG."""
    groups = (
        ("On two CPU threads, float32, batch 16: beside the official repositories", list(on_cpu())),
        ("On GPUs, batch 128, replayed: beside our rendering of their way, eager, float32", list(on_gpu())),
    )
    parts = []
    y = 8
    for heading, rows in groups:
        parts.append(_text(NAME, y + 24, heading, INK, "bold"))
        y += HEADING
        for row in rows:
            middle = y + ROW / 2 + 4
            parts.append(_text(NAME, middle, row.name, INK))
            parts.append(_bar(y, 1, THEIRS))
            parts.append(_bar(y, 1 / row.ratio, OURS))
            times = f"{_seconds(row.theirs)} to {_seconds(row.ours)}"
            parts.append(_text(TIME, middle, f"{row.ratio:.2f}x faster", INK, "bold"))
            parts.append(_text(TIME + 104, middle, times, QUIET))
            y += ROW
    y += 30
    parts.append(_text(NAME, y, "Blue: ours. Grey: theirs. Whole steps on the papers' MNIST network.", QUIET))
    height = y + 14
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="Helvetica, Arial, sans-serif" font-size="14">'
    )
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, ground, *parts, "</svg>", ""])


def _text(x: float, y: float, text: str, colour: str, weight: str = "normal") -> str:
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-weight="{weight}">{escape(text)}</text>'


def _bar(y: float, share: float, colour: str) -> str:
    return f'<rect x="{BAR}" y="{y + 4:g}" width="{UNIT * share:.1f}" height="{ROW - 8}" fill="{colour}"/>'


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.5 else f"{1000 * seconds:.0f} ms"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with docs/times.svg in place of drawing it"
    )
    if not parser.parse_args().check:
        CHART.write_text(chart(), encoding="utf-8")
    elif chart() != CHART.read_text(encoding="utf-8"):
        raise SystemExit("docs/times.svg is not what bench/results say: python scripts/draw_times.py")


if __name__ == "__main__":
    main()
