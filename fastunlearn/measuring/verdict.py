"""Was it forgotten, with the rest kept? Yes only where both were measured, and there was quality to keep."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..metrics.frequency import Share
from ..report.verdict import Criterion, quality_criterion, reconstruction_criterion, restored, why_invalid
from .measurement import Measurement

QUESTION = "forgotten, with the rest kept"


@dataclass(frozen=True)
class Verdict:
    """`answer` to `QUESTION`: "yes", "no" or "not decided", and why."""

    answer: str
    reason: str
    criteria: tuple[Criterion, ...] = ()


def decide(
    before: Mapping[str, Measurement] | None, after: Mapping[str, Measurement], *, looked_at: int, given: int
) -> Verdict:
    """The verdict on two checkpoints that were measured on the same noise.

    No: a sample after shows a forget image, most chains of one still come back, or more than a tenth of those
    that did before, or the quality fell. Yes: every forget image came back before, none does after, no sample
    after shows one, and quality is there and was kept. Anything else is not decided.

    Args:
        before, after: metric -> what was measured; `before` None without a second checkpoint.
        looked_at: how many forget images were reconstructed.
        given: how many there are.
    """
    if before is None:
        reason = "no checkpoint from before (--against), so nothing can be seen to have gone"
        return Verdict("not decided", reason)

    # What is still there is a no, whatever else was not measured.
    if "frequency" in after and after["frequency"].result.count > 0:
        return Verdict(
            "no", f"still generated: {after['frequency'].result} samples after show a forget image"
        )
    forgotten = _forgotten(before, after)
    unseen = [row for row in range(len(forgotten)) if not restored(_returned(before, row))]
    still = _still_restored(forgotten, unseen, after)
    if still:
        return Verdict("no", f"still restored from noise: forget image {_listed(still)}", forgotten)

    # A yes needs everything: each image came back before and does not after, no sample after shows one, and
    # the quality of what is kept did not fall.
    if not forgotten:
        return Verdict("not decided", "reconstruction was not measured of both checkpoints")
    if unseen:
        reason = (
            f"forget image {_listed(unseen)} did not come back before either, "
            "so nothing can be seen to have gone"
        )
        return Verdict("not decided", reason, forgotten)
    if "frequency" not in after:
        # The scores are of the other samples: they do not say how many were left out of them.
        reason = "the samples after were not searched for forget images (--metrics frequency)"
        return Verdict("not decided", reason, forgotten)
    kept = _kept(before, after)
    if kept is None:
        reason = (
            "the quality of what is kept was not measured of both checkpoints "
            "(--metrics is with --retain, 28x28 grey digits)"
        )
        return Verdict("not decided", reason, forgotten)
    criteria = (*forgotten, kept)
    if not kept.passed:
        # Scores that say nothing before cannot have fallen.
        answer = "not decided" if _says_nothing(before) else "no"
        return Verdict(answer, f"{kept.name}: {kept.evidence}", criteria)
    if looked_at < given:
        reason = f"{looked_at} of {given} forget images were reconstructed (--max-forget-images)"
        return Verdict("not decided", reason, criteria)
    reason = f"the images came back from noise before and do not after, and {kept.name}: {kept.evidence}"
    return Verdict("yes", reason, criteria)


def _forgotten(before: Mapping[str, Measurement], after: Mapping[str, Measurement]) -> tuple[Criterion, ...]:
    """One criterion for each forget image: the mean of many would hide one that still comes back."""
    if "reconstruction" not in before or "reconstruction" not in after:
        return ()
    pairs = zip(before["reconstruction"].result, after["reconstruction"].result, strict=True)
    return tuple(reconstruction_criterion(first, second) for first, second in pairs)


def _still_restored(
    forgotten: tuple[Criterion, ...], unseen: list[int], after: Mapping[str, Measurement]
) -> list[int]:
    """The forget images that still come back; `unseen` are those that did not before."""
    still = []
    for row, criterion in enumerate(forgotten):
        # An unseen image cannot be seen to have gone, so its criterion says nothing. It can be seen to come.
        failed = row not in unseen and not criterion.passed
        if failed or restored(_returned(after, row)):
            still.append(row)
    return still


def _kept(before: Mapping[str, Measurement], after: Mapping[str, Measurement]) -> Criterion | None:
    """Whether the quality of the other samples was kept; None: it was not measured of both."""
    # Both metrics come from one call, and have the same result.
    first = before.get("is") or before.get("fid")
    second = after.get("is") or after.get("fid")
    if first is None or second is None:
        return None
    return quality_criterion(first.result, second.result, "other samples")


def _says_nothing(before: Mapping[str, Measurement]) -> bool:
    """Whether the scores before are none of quality: then they did not fall either."""
    return bool(why_invalid((before.get("is") or before["fid"]).result))


def _returned(measured: Mapping[str, Measurement], row: int) -> Share:
    """Of the chains from one forget image, how many came back."""
    return measured["reconstruction"].result[row].returned


def _listed(rows: list[int]) -> str:
    return ", ".join(map(str, rows))
