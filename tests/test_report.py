"""Reports: the page stands alone, escapes what it is given, and shows a forget image only on request."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

from fastunlearn.host.finite import NotFiniteError
from fastunlearn.metrics.frequency import Share
from fastunlearn.metrics.inception import InceptionScores
from fastunlearn.metrics.reconstruction import Reconstruction
from fastunlearn.report import (
    Criterion,
    Figure,
    ReconstructionPair,
    Report,
    Section,
    Table,
    all_passed,
    frequency_criterion,
    quality_criterion,
    reconstruction_criterion,
    reconstructions_section,
    samples_section,
    training_section,
)
from fastunlearn.report.pictures import FRAME, HIDDEN, grid

RATE = 0.01


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGBA"))


def reconstruction(count: int, total: int = 64, timestep: int = 250) -> Reconstruction:
    return Reconstruction(timestep, 10.0, Share.of(count, total), 3.0, 1.0)


def scores(inception_score: float, confidence: float) -> InceptionScores:
    return InceptionScores(10.0, inception_score, confidence, 512, 2048)


@pytest.mark.parametrize(
    ("before", "after", "total", "passed"),
    [
        (5, 0, 512, True),  # p = 0.006
        (5, 1, 512, True),  # p = 0.036
        (5, 2, 512, False),  # p = 0.11
        (5, 5, 512, False),
        (1, 1, 512, False),  # rare enough, but not rarer than before: `--steps 0`
        (0, 0, 512, False),  # never seen: nothing to forget
        (3, 0, 200, False),  # too few samples to tell 1 % from none
    ],
)
def test_frequency_criterion(before, after, total, passed):
    assert frequency_criterion(Share.of(before, total), Share.of(after, total), RATE).passed is passed


@pytest.mark.parametrize(
    ("before", "after", "passed"),
    [
        (64, 0, True),
        (64, 6, True),
        (64, 7, False),
        (64, 64, False),
        (40, 0, False),
        (45, 0, True),
        (0, 0, False),
    ],
)
def test_reconstruction_criterion(before, after, passed):
    assert reconstruction_criterion(reconstruction(before), reconstruction(after)).passed is passed


@pytest.mark.parametrize(
    ("after", "passed"),
    [
        ((9.0, 0.95), True),
        ((9.4, 0.99), True),
        ((8.56, 0.91), True),
        ((8.5, 0.95), False),
        ((9.0, 0.9), False),
    ],
)
def test_quality_criterion(after, passed):
    assert quality_criterion(scores(9.0, 0.95), scores(*after)).passed is passed


SOME = Share.of(5, 512)
GOOD = scores(9.0, 0.95)


def test_a_percentage_is_no_share():
    with pytest.raises(ValueError, match=r"expected: expected a share below 1 \(1 % is 0.01\), got 1"):
        frequency_criterion(Share.of(5, 20), Share.of(1, 20), expected=1)


def test_criteria_refuse_what_cannot_be_compared():
    """With NaN both `a <= b` and `b <= a` are False: a criterion would answer, whichever way it is
    written."""
    for expected in (math.nan, 0.0, 1.5):
        with pytest.raises(ValueError, match="expected: expected a finite number"):
            frequency_criterion(SOME, SOME, expected)
    with pytest.raises(ValueError, match="after: expected as many samples as before, 512, got 100"):
        frequency_criterion(SOME, Share.of(0, 100), RATE)
    with pytest.raises(ValueError, match="after: expected the timestep of before, 250, got 500"):
        reconstruction_criterion(reconstruction(64), reconstruction(0, timestep=500))
    with pytest.raises(ValueError, match="after: expected the threshold of before, 10, got 5"):
        reconstruction_criterion(reconstruction(64), replace(reconstruction(0), threshold=5.0))
    with pytest.raises(NotFiniteError, match="scores: expected finite numbers, got mean_confidence = nan"):
        scores(9.0, math.nan)
    with pytest.raises(ValueError, match="mean confidence before: expected a finite number"):
        quality_criterion(scores(9.0, 0.0), scores(9.0, 0.9))
    with pytest.raises(TypeError, match="passed: expected True or False, got nan"):
        Criterion("kept", math.nan, "")


def test_one_sample_decides_nothing():
    one, none = Share.of(1, 1), Share.of(0, 1)
    assert not frequency_criterion(one, none, RATE).passed
    assert not reconstruction_criterion(reconstruction(1, 1), reconstruction(0, 1)).passed


@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (
            scores(1.02, 0.2),
            scores(1.01, 0.2),
            "before: an inception score of 1.02, below 1.5: the samples all look alike",
        ),
        (replace(GOOD, num_samples=6), GOOD, "before: 6 samples judged, fewer than 100"),
        (GOOD, replace(GOOD, num_samples=2), "after: 2 samples judged, fewer than 100"),
    ],
)
def test_quality_that_was_never_there_is_not_kept(before, after, reason):
    """Nothing fell, and yet nothing is shown: noise stays noise, and two samples show no quality."""
    criterion = quality_criterion(before, after)
    assert criterion.kept
    assert not criterion.passed
    assert f"says nothing ({reason}" in criterion.evidence


def test_a_yes_needs_what_was_forgotten_and_what_was_kept():
    forgotten, kept = Criterion("gone", True, ""), Criterion("kept", True, "", kept=True)
    failed = Criterion("gone", False, "")
    assert all_passed([forgotten, kept]) is True
    assert all_passed([forgotten]) is None
    assert all_passed([kept]) is None
    assert all_passed([]) is None
    assert all_passed([failed]) is False
    assert all_passed([failed, kept]) is False


def test_a_grid_refuses_what_it_would_draw_as_black():
    holed = torch.zeros(3, 1, 4, 4)
    holed[1, 0, 0, 0] = math.nan
    message = r"images: expected finite values, got NaN or Inf in 1 of 3 \(first: 1\)"
    with pytest.raises(NotFiniteError, match=message):
        grid(holed, columns=2)
    with pytest.raises(TypeError, match="images: expected a floating-point tensor"):
        grid(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), columns=1)
    with pytest.raises(ValueError, match="columns: expected an integer >= 1, got 0"):
        grid(torch.zeros(1, 1, 4, 4), columns=0)


def test_a_constant_image_and_a_single_row_are_drawn():
    assert pixels(grid(torch.full((1, 1, 1, 56), 0.0), columns=8)).shape == (2 * 4 + 56, 2 * 4 + 56 * 56, 4)
    assert (pixels(grid(torch.ones(1, 1, 4, 4), columns=1))[4:-4, 4:-4] == 255).all()


def test_a_grid_shows_marks_and_hides():
    images = torch.tensor([-1.0, 1.0, 0.0]).view(3, 1, 1, 1).expand(3, 1, 28, 28)
    picture = pixels(grid(images, columns=2, marked=[False, True, False], hidden=[False, False, True]))
    assert picture.shape == (4 + 2 * 60, 4 + 2 * 60, 4)
    assert tuple(picture[30, 30]) == (0, 0, 0, 255)
    assert tuple(picture[30, 90]) == (255, 255, 255, 255)
    assert tuple(picture[90, 30]) == HIDDEN
    assert picture[90, 90, 3] == 0
    assert (picture[..., :3] == FRAME[:3]).all(-1).sum() == 62**2 - 56**2


def test_a_grid_takes_colour_and_refuses_other_shapes():
    red = torch.full((1, 3, 28, 28), -1.0)
    red[:, 0] = 1
    assert tuple(pixels(grid(red, columns=1))[30, 30]) == (255, 0, 0, 255)
    with pytest.raises(
        ValueError, match=r"images: expected \[N, 1 or 3, H, W\] with at least one image, got \(1, 2, 4, 4\)"
    ):
        grid(torch.zeros(1, 2, 4, 4), columns=1)


@pytest.fixture
def samples():
    """Ten black samples; two before and one after are the white forget image."""
    before, after = torch.full((10, 1, 28, 28), -1.0), torch.full((10, 1, 28, 28), -1.0)
    before[[4, 7]], after[7] = 1.0, 1.0
    return before, after, before[:, 0, 0, 0] > 0, after[:, 0, 0, 0] > 0


def white(png: bytes) -> bool:
    return bool((pixels(png) == 255).all(-1).any())


def test_forget_images_are_drawn_only_on_request(samples):
    image = torch.ones(1, 1, 28, 28)
    pair = ReconstructionPair(
        reconstruction(3, 4), reconstruction(0, 4), image.expand(4, -1, -1, -1), -image.expand(4, -1, -1, -1)
    )
    shown = (
        samples_section(*samples, report_images=True),
        reconstructions_section(image, [image], [pair], report_images=True),
    )
    hidden = samples_section(*samples), reconstructions_section(image, [image], [pair])
    assert white(shown[0].figures[0].png)
    assert not white(hidden[0].figures[0].png)
    assert all(white(figure.png) for figure in shown[1].figures)
    assert hidden[1].figures == ()
    assert "hidden" in hidden[0].figures[0].caption


def test_hits_come_first(samples):
    picture = pixels(samples_section(*samples, report_images=True).figures[0].png)
    second = picture.shape[1] // 2 + 14
    assert [tuple(picture[30, x, :3]) for x in (30, 90, 150)] == [(255,) * 3, (255,) * 3, (0,) * 3]
    assert [tuple(picture[30, second + x, :3]) for x in (30, 90, 150)] == [(0,) * 3, (255,) * 3, (0,) * 3]


def test_loss_curves_of_the_losses_that_there_are():
    log = [{"step": step, "loss": 1.0, "retain_loss": 10.0 / step, "grad_norm": 1.0} for step in range(1, 5)]
    (figure,) = training_section(log).figures
    assert pixels(figure.png).shape[2] == 4
    assert training_section([]).figures == ()


@pytest.mark.parametrize("first", [math.nan, None])
def test_steps_that_are_not_finite_leave_a_gap_and_are_counted(first):
    losses = {1: first, 2: 1.0, 3: math.inf}
    log = [{"step": step, "retain_loss": loss, "skipped": step == 1} for step, loss in losses.items()]
    section = training_section(log, "Text.")
    counted = "2 of 3 steps had a loss or a gradient that is not finite, and changed nothing."
    assert section.text == f"Text. {counted}"
    assert len(section.figures) == 1
    nothing = training_section([{"step": 1, "retain_loss": math.nan, "grad_norm": math.nan}])
    assert pixels(nothing.figures[0].png).shape[2] == 4


class _Page(HTMLParser):
    VOID = frozenset({"meta", "img"})

    def __init__(self, text: str):
        super().__init__()
        self.links, self.open, self.text = [], [], ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture
def report(samples):
    kept = Criterion("digits <kept>", True, "5 < 6 & 7", kept=True)
    criteria = kept, Criterion("forgotten", False, "3 of 4")
    sections = [
        Section("Table", "Some text.", Table(("", "before"), [("FID & IS", "1.0")], "A note.")),
        samples_section(*samples),
    ]
    return Report(
        "A <b>title</b>",
        "lead",
        sections,
        {"passed": False, "numbers": [1, 2.5]},
        "Not forgotten.",
        criteria,
        "footer",
    )


def test_the_page_is_well_formed_and_needs_no_network(report, tmp_path):
    path = report.write(tmp_path / "new" / "folder")
    text = path.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.open == []
    assert len(page.links) == 1
    prefix, data = page.links[0].split(",", 1)
    assert prefix == "data:image/png;base64"
    assert base64.b64decode(data) == (path.parent / "samples.png").read_bytes()
    assert "http" not in text
    assert not re.search(r"url\(|@import|<script", text)
    for expected in ("A <b>title</b>", "digits <kept>", "5 < 6 & 7", "FID & IS", "A note.", "footer"):
        assert expected in page.text


def test_files_and_json(report, tmp_path):
    report.write(tmp_path)
    report.write(tmp_path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["report.html", "results.json", "samples.png"]
    assert json.loads((tmp_path / "results.json").read_text()) == {"passed": False, "numbers": [1, 2.5]}


def test_the_answer_is_that_of_all_criteria(report):
    assert report.passed is False
    kept, _ = report.criteria
    gone = Criterion("forgotten", True, "0 of 4")
    assert Report("t", "l", [], {}, criteria=(kept, gone)).passed is True
    for some in ((kept,), (gone,)):
        assert Report("t", "l", [], {}, criteria=some).passed is None
        assert 'class="verdict "' in Report("t", "l", [], {}, "Forgotten?", some).html()
    assert Report("t", "l", [], {}).passed is None


def test_numbers_that_json_has_not_are_refused(tmp_path):
    sections = [Section("s", figures=(Figure("a.png", b"", "c"),))]
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report("t", "l", sections, {"fid": float("nan")}).write(tmp_path / "new")
    assert not (tmp_path / "new").exists()
