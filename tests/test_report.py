"""Reports: the page stands alone, escapes what it is given, and shows a forget image only on request."""

from __future__ import annotations

import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image

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
    [(64, 0, True), (64, 6, True), (64, 7, False), (64, 64, False), (40, 0, False), (45, 0, True), (0, 0, False)],
)
def test_reconstruction_criterion(before, after, passed):
    assert reconstruction_criterion(reconstruction(before), reconstruction(after)).passed is passed


@pytest.mark.parametrize(
    ("after", "passed"),
    [((9.0, 0.95), True), ((9.4, 0.99), True), ((8.56, 0.91), True), ((8.5, 0.95), False), ((9.0, 0.9), False)],
)
def test_quality_criterion(after, passed):
    assert quality_criterion(scores(9.0, 0.95), scores(*after)).passed is passed


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
    with pytest.raises(ValueError, match=r"images: expected \[N, 1 or 3, H, W\] with at least one image, got \(1, 2, 4, 4\)"):
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
    pair = ReconstructionPair(reconstruction(3, 4), reconstruction(0, 4), image.expand(4, -1, -1, -1), -image.expand(4, -1, -1, -1))
    shown = samples_section(*samples, report_images=True), reconstructions_section(image, [image], [pair], report_images=True)
    hidden = samples_section(*samples), reconstructions_section(image, [image], [pair])
    assert white(shown[0].figures[0].png)
    assert not white(hidden[0].figures[0].png)
    assert all(white(figure.png) for figure in shown[1].figures)
    assert hidden[1].figures == ()
    assert "hidden" in hidden[0].figures[0].caption


def test_hits_come_first(samples):
    picture = pixels(samples_section(*samples, report_images=True, columns=3, rows=2).figures[0].png)
    second = picture.shape[1] // 2 + 14
    assert [tuple(picture[30, x, :3]) for x in (30, 90, 150)] == [(255,) * 3, (255,) * 3, (0,) * 3]
    assert [tuple(picture[30, second + x, :3]) for x in (30, 90, 150)] == [(0,) * 3, (255,) * 3, (0,) * 3]


def test_loss_curves_of_the_losses_that_there_are():
    log = [{"step": step, "loss": 1.0, "retain_loss": 10.0 / step, "grad_norm": 1.0} for step in range(1, 5)]
    (figure,) = training_section(log).figures
    assert pixels(figure.png).shape[2] == 4
    assert training_section([]).figures == ()


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
    criteria = Criterion("digits <kept>", True, "5 < 6 & 7"), Criterion("forgotten", False, "3 of 4")
    sections = [Section("Table", "Some text.", Table(("", "before"), [("FID & IS", "1.0")], "A note.")), samples_section(*samples)]
    return Report("A <b>title</b>", "lead", sections, {"passed": False, "numbers": [1, 2.5]}, "Not forgotten.", criteria, "footer")


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
    assert Report("t", "l", [], {}, criteria=report.criteria[:1]).passed is True
    assert Report("t", "l", [], {}).passed is None


def test_numbers_that_json_has_not_are_refused(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        Report("t", "l", [Section("s", figures=(Figure("a.png", b"", "c"),))], {"fid": float("nan")}).write(tmp_path)
