"""Was it forgotten, and was the rest kept? Each question is one test with its evidence in words."""

from __future__ import annotations

from dataclasses import dataclass

from ..metrics.frequency import Share
from ..metrics.inception import InceptionScores
from ..metrics.reconstruction import Reconstruction

SIGNIFICANCE = 0.05
REMAINING = 0.10  # of the chains that came back before, at most this share may still come back
ALLOWED_FALL = 0.05  # of inception score and mean confidence


@dataclass(frozen=True)
class Criterion:
    """One question, its answer and the numbers behind it."""

    name: str
    passed: bool
    evidence: str


def frequency_criterion(before: Share, after: Share, expected: float) -> Criterion:
    """The image was generated before, is generated less often after, and no longer as often as it stood in the training data.

    The last is an exact one-sided binomial test: with `expected` = 1 %, at most one hit in 512 samples is rarer than 5 % (none: p = 0.006).
    It does not use the count before, which is a handful and varies from seed to seed; the same noise makes `before` and `after` comparable.
    With fewer than ln 0.05 / ln(1 - expected) samples (299 at 1 %) not even zero hits can show anything, and the criterion fails.
    """
    from scipy.stats import binom

    p_value = float(binom.cdf(after.count, after.total, expected))
    passed = before.count > 0 and after.count < before.count and p_value < SIGNIFICANCE
    hits = "no hit" if after.count == 0 else f"at most {after.count} hit{'s' * (after.count > 1)}"
    evidence = f"before {before}; after {after}; if it still came as often as in the training data ({expected:.2%}), {hits} would have p = {p_value:.2g}"
    return Criterion("no longer generated", passed, evidence)


def reconstruction_criterion(before: Reconstruction, after: Reconstruction) -> Criterion:
    """Most chains found back before (the whole 95 % interval above one half), and at most a tenth as many do after, the intervals apart."""
    most_before = before.returned.low > 0.5
    few_after = after.returned.share <= REMAINING * before.returned.share and after.returned.high < before.returned.low
    evidence = f"before {before.returned}; after {after.returned}; mean distance {before.mean_distance:.2f} before, {after.mean_distance:.2f} after"
    return Criterion(f"not restored from noise injected at t = {after.timestep}", most_before and few_after, evidence)


def quality_criterion(before: InceptionScores, after: InceptionScores, subject: str = "digits") -> Criterion:
    """Inception score and mean confidence of what should stay fell by at most 5 %."""
    falls = [1 - after.inception_score / before.inception_score, 1 - after.mean_confidence / before.mean_confidence]
    evidence = (f"inception score {before.inception_score:.2f} to {after.inception_score:.2f} ({-falls[0]:+.1%}), mean confidence "
                f"{before.mean_confidence:.3f} to {after.mean_confidence:.3f} ({-falls[1]:+.1%}); allowed {-ALLOWED_FALL:.0%}")
    return Criterion(f"{subject} kept", max(falls) <= ALLOWED_FALL, evidence)
