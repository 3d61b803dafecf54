"""The verdict of `fastunlearn evaluate`: never a yes without what was kept, nor of what was never there."""

from __future__ import annotations

import pytest

from fastunlearn.measuring import Measurement, decide
from fastunlearn.metrics.frequency import Share
from fastunlearn.metrics.inception import InceptionScores
from fastunlearn.metrics.reconstruction import Reconstruction


def measured(
    restored=(0,), hits: int | None = 0, inception_score: float | None = 9.0, samples: int = 512
) -> dict[str, Measurement]:
    results = tuple(Reconstruction(250, 10.0, Share.of(count, 64), 3.0, 1.0) for count in restored)
    found = {"reconstruction": Measurement("", {}, results)} if restored else {}
    if hits is not None:
        found["frequency"] = Measurement("", {}, Share.of(hits, 512))
    if inception_score is not None:
        found["is"] = Measurement("", {}, InceptionScores(1.0, inception_score, 0.95, samples, 2048))
    return found


BEFORE = measured(restored=(64,), hits=5)
VERDICTS = {
    "gone, the rest kept": (BEFORE, measured(), "yes", "came back from noise before and do not after"),
    "no second checkpoint": (None, measured(), "not decided", "no checkpoint from before"),
    "no quality": (
        BEFORE,
        measured(inception_score=None),
        "not decided",
        "the quality of what is kept was not measured",
    ),
    "no quality before": (
        measured((64,), 5, None),
        measured(),
        "not decided",
        "the quality of what is kept was not measured",
    ),
    "quality that never was": (
        measured((64,), 5, 1.01),
        measured(inception_score=1.01),
        "not decided",
        "the samples all look alike",
    ),
    "few samples": (
        measured((64,), samples=6),
        measured(samples=6),
        "not decided",
        "6 samples judged, fewer than 100",
    ),
    "quality lost": (BEFORE, measured(inception_score=1.13), "no", "other samples kept"),
    "still generated": (BEFORE, measured(hits=1), "no", "still generated: 1 of 512"),
    "still restored": (BEFORE, measured(restored=(60,)), "no", "still restored from noise: forget image 0"),
    "one of two": (
        measured((64, 64)),
        measured(restored=(0, 60)),
        "no",
        "still restored from noise: forget image 1",
    ),
    "restored more than before": (
        measured((40,)),
        measured(restored=(64,)),
        "no",
        "still restored from noise: forget image 0",
    ),
    "never there": (
        measured((64, 3)),
        measured(restored=(0, 0)),
        "not decided",
        "forget image 1 did not come back before either",
    ),
    "samples nobody looked at": (
        BEFORE,
        measured(hits=None),
        "not decided",
        "the samples after were not searched for forget images",
    ),
    "no chains": (measured(()), measured(()), "not decided", "reconstruction was not measured"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_verdicts(name):
    before, after, answer, reason = VERDICTS[name]
    count = len(after["reconstruction"].result) if "reconstruction" in after else 1
    verdict = decide(before, after, looked_at=count, given=count)
    assert (verdict.answer, reason in verdict.reason) == (answer, True), verdict


def test_a_verdict_on_some_of_the_images_is_none():
    verdict = decide(BEFORE, measured(), looked_at=1, given=2)
    assert (verdict.answer, verdict.reason) == (
        "not decided",
        "1 of 2 forget images were reconstructed (--max-forget-images)",
    )


def test_a_yes_is_never_given_without_quality():
    """Whatever is taken away from the evidence of a yes, none is left."""
    assert decide(BEFORE, measured(), looked_at=1, given=1).answer == "yes"
    for missing in ("reconstruction", "is"):
        for side in (0, 1):
            both = [dict(BEFORE), measured()]
            del both[side][missing]
            assert decide(*both, looked_at=1, given=1).answer == "not decided", (missing, side)
