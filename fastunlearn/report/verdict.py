"""Was it forgotten, and was the rest kept? Each question is one test with its evidence in words.

A yes needs both answers: a network that draws nothing any more draws no forget image either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..host import check
from ..metrics.frequency import Share
from ..metrics.inception import InceptionScores
from ..metrics.reconstruction import Reconstruction

SIGNIFICANCE = 0.05  # of the test that the image comes less often than it stood in the training data
REMAINING = 0.10  # of the chains that came back before, at most this share may still come back
ALLOWED_FALL = 0.05  # of inception score and mean confidence
LEAST_JUDGED = 100  # samples: with fewer the IS of ten classes is off by more than the fall that is allowed
COLLAPSED = 1.5  # inception score: 1 is that of samples which all look alike to the classifier


@dataclass(frozen=True)
class Criterion:
    """One question, its answer and the numbers behind it."""

    name: str
    passed: bool
    evidence: str
    kept: bool = False  # it is about what was to be kept, not about what was to be forgotten

    def __post_init__(self):
        if not isinstance(self.passed, bool):
            raise TypeError(f"passed: expected True or False, got {check.describe(self.passed)}")


def all_passed(criteria: Sequence[Criterion]) -> bool | None:
    """Whether every question was answered with yes; None: not all was asked.

    None is returned where no question was answered with no, and none asks what was kept, or none what was
    forgotten.
    """
    if not all(criterion.passed for criterion in criteria):
        return False
    asks_both = {criterion.kept for criterion in criteria} == {True, False}
    return True if asks_both else None


def frequency_criterion(before: Share, after: Share, expected: float) -> Criterion:
    """The image was generated before, less often after, and no longer as often as in the training data.

    The last is an exact one-sided binomial test: with `expected` = 1 %, at most one hit in 512 samples is
    rarer than 5 % (none: p = 0.006). It does not use the count before, which is a handful and varies from
    seed to seed; the same noise makes `before` and `after` comparable. With fewer than ln 0.05 / ln(1 -
    expected) samples (299 at 1 %) not even zero hits can show anything, and the criterion fails.

    Args:
        before, after: how many of as many samples show the image.
        expected: the share of the training data that the image was.

    Raises:
        TypeError, ValueError: `expected` is no share in (0, 1), or the two have not as many samples.
    """
    from scipy.stats import binom

    check.number("expected", expected, low=0, high=1, low_open=True)
    if expected == 1:  # one hit less than all would be rarer
        raise ValueError("expected: expected a share below 1 (1 % is 0.01), got 1")
    if after.total != before.total:
        raise ValueError(f"after: expected as many samples as before, {before.total}, got {after.total}")
    # p = P(X <= after.count), X binomial of after.total draws with probability `expected`.
    p_value = float(binom.cdf(after.count, after.total, expected))
    passed = before.count > 0 and after.count < before.count and p_value < SIGNIFICANCE
    hits = f"at most {after.count} hits"
    if after.count == 0:
        hits = "no hit"
    elif after.count == 1:
        hits = "at most 1 hit"
    if_as_often = f"if it still came as often as in the training data ({expected:.2%})"
    evidence = f"before {before}; after {after}; {if_as_often}, {hits} would have p = {p_value:.2g}"
    return Criterion("no longer generated", passed, evidence)


def reconstruction_criterion(before: Reconstruction, after: Reconstruction) -> Criterion:
    """Most chains found back before, and at most a tenth as many do after.

    Most: the whole 95 % interval is above one half. At most a tenth: and the two intervals are apart.

    Raises:
        ValueError: the two have another timestep or threshold.
    """
    for name in ("timestep", "threshold"):
        first, second = getattr(before, name), getattr(after, name)
        if first != second:
            raise ValueError(f"after: expected the {name} of before, {first:g}, got {second:g}")
    most_before = restored(before.returned)
    at_most_a_tenth = after.returned.share <= REMAINING * before.returned.share
    intervals_apart = after.returned.high < before.returned.low
    distances = f"mean distance {before.mean_distance:.2f} before, {after.mean_distance:.2f} after"
    return Criterion(
        f"not restored from noise injected at t = {after.timestep}",
        most_before and at_most_a_tenth and intervals_apart,
        f"before {before.returned}; after {after.returned}; {distances}",
    )


def restored(returned: Share) -> bool:
    """Whether most chains come back: the whole 95 % interval is above one half.

    What was not there before cannot be seen to go.
    """
    return returned.low > 0.5


def quality_criterion(before: InceptionScores, after: InceptionScores, subject: str = "digits") -> Criterion:
    """Inception score and mean confidence of what should stay fell by at most 5 %.

    They have to be scores of samples that show something. They are not if fewer than 100 samples were judged,
    or if the samples before look all alike to the classifier (an inception score below 1.5): what was never
    there has not been kept.

    Raises:
        ValueError: a score that is not positive.
    """
    for when, scores in (("before", before), ("after", after)):
        check.number(f"inception score {when}", scores.inception_score, low=0, low_open=True)
        check.number(f"mean confidence {when}", scores.mean_confidence, low=0, low_open=True)
    score_fell = 1 - after.inception_score / before.inception_score
    confidence_fell = 1 - after.mean_confidence / before.mean_confidence
    score = f"{before.inception_score:.2f} to {after.inception_score:.2f} ({-score_fell:+.1%})"
    confidence = f"{before.mean_confidence:.3f} to {after.mean_confidence:.3f} ({-confidence_fell:+.1%})"
    evidence = f"inception score {score}, mean confidence {confidence}; allowed {-ALLOWED_FALL:.0%}"
    reasons = {"before": why_invalid(before), "after": why_invalid(after)}
    invalid = ", ".join(f"{when}: {reason}" for when, reason in reasons.items() if reason)
    if invalid:
        evidence += f"; says nothing ({invalid})"
    kept = not invalid and max(score_fell, confidence_fell) <= ALLOWED_FALL
    return Criterion(f"{subject} kept", kept, evidence, kept=True)


def why_invalid(scores: InceptionScores) -> str:
    """Why these scores say nothing about quality, in words, or nothing."""
    if scores.num_samples < LEAST_JUDGED:
        return f"{scores.num_samples} samples judged, fewer than {LEAST_JUDGED}"
    if scores.inception_score < COLLAPSED:
        score = f"an inception score of {scores.inception_score:.2f}"
        return f"{score}, below {COLLAPSED:g}: the samples all look alike"
    return ""
