"""The figure of a transition shows what was measured."""

from __future__ import annotations

import io

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image

from fastunlearn.models.transition import Transition
from fastunlearn.report import transition_figure
from fastunlearn.report.transition import draw

# Two prompts from three seeds; the last seed of the second prompt has no minimum.
RESULT = Transition(
    timestep=900.0,
    prompt_timesteps=(900.0, 850.0),
    seed_timesteps=((900.0, 850.0, 900.0), (850.0, 900.0, 750.0)),
    minima=((2, 3, 2), (3, 2, None)),
    magnitudes=(
        ((4.0, 3.0, 2.0, 2.5), (5.0, 4.0, 3.0, 2.0), (6.0, 3.0, 1.0, 2.0)),
        ((4.0, 3.0, 2.0, 1.0, 2.0), (5.0, 4.0, 3.0, 3.5, 4.0), (6.0, 5.0, 4.0, 3.0, 2.0)),
    ),
    visited=(1000.0, 950.0, 900.0, 850.0, 800.0),
    prompts=("a cat for $5 and $6", "a  dog " + "with a long tail " * 9),
    seeds=(0, 1, 7),
    fallback=750.0,
    calls=9,
    num_train_timesteps=1000,
)


def lines_of(panel) -> tuple[list, list, list]:
    """The curves, the dots, and the upright lines in it."""
    curves, dots, upright = [], [], []
    for line in panel.get_lines():
        x, y = np.asarray(line.get_xdata()).tolist(), np.asarray(line.get_ydata()).tolist()
        if line.get_marker() == "o":
            dots.append((*x, *y))
        elif len(set(x)) == 1:
            upright.append(x[0])
        else:
            curves.append((tuple(x), tuple(y)))
    return curves, dots, upright


def test_a_line_for_each_seed_with_its_minimum_and_the_median():
    panels = draw(RESULT).axes
    assert len(panels) == 2
    for prompt, panel in enumerate(panels):
        curves, dots, upright = lines_of(panel)
        rows, minima = RESULT.magnitudes[prompt], RESULT.minima[prompt]
        assert curves == [(RESULT.visited[: len(row)], row) for row in rows]
        there = [(place, row) for place, row in zip(minima, rows, strict=True) if place is not None]
        assert dots == [(RESULT.visited[place], row[place]) for place, row in there]
        assert upright == [RESULT.prompt_timesteps[prompt]]
        left, right = panel.get_xlim()
        assert left > right  # from noise to image


def test_its_titles_name_the_prompt_the_median_and_what_fell_back():
    first, second = (panel.get_title(loc="left") for panel in draw(RESULT).axes)
    assert first == "a cat for $5 and $6\nmedian 900"
    assert second.startswith("a dog with a long tail")
    assert second.endswith("…\nmedian 850, 1 of 3 seeds without a minimum count as 750")


def test_it_is_a_png_without_a_screen():
    png = transition_figure(RESULT)
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        pixels = np.asarray(picture.convert("RGB")).reshape(-1, 3)
    # The median stands out in its colour, over the height of a panel at least.
    assert (pixels == (0xE2, 0x54, 0x14)).all(1).sum() > picture.height / 2


def test_titles_fit_in():
    """Also those of long prompts."""
    figure = draw(RESULT)
    figure.draw_without_rendering()
    for panel in figure.axes:
        title = panel.get_title(loc="left")
        [text] = [
            child for child in panel.get_children() if isinstance(child, Text) and child.get_text() == title
        ]
        assert text.get_window_extent().x1 <= figure.bbox.x1


def test_other_things_are_refused():
    with pytest.raises(TypeError, match="result: expected a Transition of find_transition, got dict"):
        transition_figure({})
