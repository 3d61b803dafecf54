"""The picture of docs/methods.md: `docs/which_method.svg`, from what you have to a method and its flags.

    python scripts/draw_which_method.py            # draws it anew
    python scripts/draw_which_method.py --check    # fails if docs has another picture

Questions stand on the left, one below the other. The answer beside an arrow leads to a method on the right,
the other one to the next question. docs/methods.md has what the proposals rest on.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

ROOT = Path(__file__).parents[1]
PICTURE = ROOT / "docs/which_method.svg"

# in pixels: the left edges of both columns, their widths, and what is between boxes and in them
LEFT, RIGHT = 12, 372
LEFT_WIDTH, RIGHT_WIDTH = 290, 536
LINE, PADDING, GAP = 19, 10, 20
WIDTH = RIGHT + RIGHT_WIDTH + 12
SIZE, CODE_SIZE = 14, 13
INK, QUIET, LINES = "#20242a", "#565d66", "#8b939c"
QUESTION, METHOD, FIRST = "#eef1f5", "#ffffff", "#dbe8f7"
SANS, MONO = "Helvetica, Arial, sans-serif", "ui-monospace, Menlo, Consolas, monospace"


@dataclass(frozen=True)
class Leaf:
    """What is proposed: flags of `fastunlearn unlearn` or Python, with lines that say why."""

    flags: tuple[str, ...] = ()
    python: tuple[str, ...] = ()
    why: tuple[str, ...] = ()

    @property
    def lines(self) -> list[tuple[str, bool]]:
        """Its text, and whether a line is code."""
        code = [(each, True) for each in (*self.flags, *self.python)]
        return code + [(each, False) for each in self.why]


@dataclass(frozen=True)
class Row:
    """A question, and the answer that leads to its leaf; the other one leads down. Without an answer all do
    as the leaf says.
    """

    question: tuple[str, ...]
    answer: str
    leaf: Leaf

    @property
    def height(self) -> int:
        return 2 * PADDING + LINE * max(len(self.question), len(self.leaf.lines))


ROWS = (
    Row(
        ("Do you have images to keep?",),
        "no",
        Leaf(
            flags=(
                "--method npo --retain_weight 0",
                "--method neggrad --anchor vdu_l2 --anchor_gamma 1e3",
            ),
            why=(
                "Each holds a second copy of the weights. Ascent ruins the rest:",
                "few steps, and look at samples. beta and gamma have to be found.",
            ),
        ),
    ),
    Row(
        ("Must the step descend on a", "printed objective, unbiased?"),
        "yes",
        Leaf(
            flags=("--method siss --superfactor 3000", "--method retrack --weights importance"),
            why=(
                "SISS: keep - s k / (n - k) forget; 3000 is a tenth for 1 of 30,000.",
                "ReTrack: the loss of the images to keep, in few dimensions alone.",
            ),
        ),
    ),
    Row(
        ("Has each image a label or a", "prompt that counts?"),
        "yes",
        Leaf(
            python=("ReTrack(within_condition=True)", 'EraseDiffBome(target="other_condition")'),
            why=(
                "Toward neighbours of its label, or toward what is predicted for",
                "another one. From Python; not measured.",
            ),
        ),
    ),
    Row(
        ("May some of the image stay,", "if the rest changes less?"),
        "yes",
        Leaf(
            flags=("--method kto", "--method npo"),
            python=("KTO(), reference_model=without_adapters(model)",),
            why=(
                "Demo: retain loss +2 % and +1 % (ReTrack +6 %). From t = 250 all",
                "come back, from 500 a third and two thirds. A copy; with LoRA none.",
            ),
        ),
    ),
    Row(
        ("Are two batches a step too many?",),
        "yes",
        Leaf(
            flags=("--method siss --scaling ratio",),
            why=(
                "One batch forward: on a CPU 0.86 s, where ReTrack takes 1.06 s.",
                "It forgets more slowly: in as many steps all chains still came back.",
            ),
        ),
    ),
    Row(
        ("All others, for one image or", "many: start here"),
        "",
        Leaf(
            flags=("--method retrack --lambda auto --drop_overlap --drop_within auto",),
            why=(
                "Demo, --lr 1.5e-4: no chain from the noised image comes back, the",
                "digits stay. k makes no difference. Then evaluate:",
            ),
        ),
    ),
    Row(
        ("Does the image still come back?",),
        "yes",
        Leaf(
            flags=("--method retrack --lambda auto --steps 200",),
            why=("More steps, or a fixed --lambda, which weighs the forget term more.",),
        ),
    ),
    Row(
        ("Has the rest become worse?",),
        "yes",
        Leaf(
            flags=("--method retrack --lambda 0.05 --forget_timesteps middle",),
            why=(
                "Demo, --lr 1.5e-4: retain loss 19.0, not 21.3 (18.7 before), but",
                "from t = 250 most chains end just within the threshold again.",
            ),
        ),
    ),
    Row(
        ("In any case: what does going", "on with training reach?"),
        "",
        Leaf(
            flags=("--method vanilla",),
            why=("A method that forgets no more than this one has not forgotten.",),
        ),
    ),
)


def picture() -> str:
    """The picture as SVG."""
    parts = list(_parts())
    height = _top(len(ROWS)) - GAP + 12
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" '
        f'height="{height}" font-family="{SANS}" font-size="{SIZE}" role="img">'
    )
    title = "<title>Which method to take, from what you have</title>"
    # Its own ground: the letters are legible on a dark page, too.
    ground = f'<rect width="{WIDTH}" height="{height}" fill="#ffffff"/>'
    return "\n".join([head, title, ground, *parts, "</svg>", ""])


def _parts() -> Iterator[str]:
    for index, row in enumerate(ROWS):
        top, middle = _top(index), _top(index) + row.height / 2
        yield _box(LEFT, top, LEFT_WIDTH, row.height, QUESTION if row.answer else FIRST)
        first = middle - LINE * len(row.question) / 2
        for line, text in enumerate(row.question):
            yield _text(LEFT + PADDING, first + LINE * (line + 0.75), text, INK, weight="bold")

        yield _box(RIGHT, top, RIGHT_WIDTH, row.height, METHOD if row.answer else FIRST)
        first = middle - LINE * len(row.leaf.lines) / 2
        for line, (text, code) in enumerate(row.leaf.lines):
            yield _text(
                RIGHT + PADDING, first + LINE * (line + 0.75), text, INK if code else QUIET, mono=code
            )

        yield from _arrow(LEFT + LEFT_WIDTH, middle, RIGHT, middle)
        if row.answer:
            yield _text(LEFT + LEFT_WIDTH + 14, middle - 6, row.answer, INK)
        if index + 1 < len(ROWS):
            yield from _arrow(LEFT + 40, top + row.height, LEFT + 40, top + row.height + GAP)
        if row.answer and index + 1 < len(ROWS):
            other = {"yes": "no", "no": "yes"}[row.answer]
            yield _text(LEFT + 50, top + row.height + GAP - 5, other, INK)


def _top(index: int) -> int:
    """Where a row begins."""
    return 12 + sum(row.height + GAP for row in ROWS[:index])


def _text(x: float, y: float, text: str, colour: str, *, weight: str = "normal", mono: bool = False) -> str:
    font = f' font-family="{MONO}" font-size="{CODE_SIZE}"' if mono else ""
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}" font-weight="{weight}"{font}>{escape(text)}</text>'


def _box(x: float, y: float, width: float, height: float, colour: str) -> str:
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{colour}" '
        f'stroke="{LINES}"/>'
    )


def _arrow(x: float, y: float, to_x: float, to_y: float) -> Iterator[str]:
    """To the right or down."""
    yield f'<path d="M{x:g} {y:g}L{to_x:g} {to_y:g}" stroke="{LINES}" fill="none"/>'
    tip = f"L{to_x - 7:g} {to_y - 4:g}L{to_x - 7:g} {to_y + 4:g}"
    if x == to_x:
        tip = f"L{to_x - 4:g} {to_y - 7:g}L{to_x + 4:g} {to_y - 7:g}"
    yield f'<path d="M{to_x:g} {to_y:g}{tip}Z" fill="{LINES}"/>'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with docs/which_method.svg in place of drawing it"
    )
    if not parser.parse_args().check:
        PICTURE.write_text(picture(), encoding="utf-8")
    elif picture() != PICTURE.read_text(encoding="utf-8"):
        raise SystemExit("docs/which_method.svg is another picture: python scripts/draw_which_method.py")


if __name__ == "__main__":
    main()
