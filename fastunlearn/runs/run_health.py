"""When a run has failed though it came to its end: too many steps were skipped, or weights are not finite."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..host import check as _check
from ..host.finite import named_tensors, not_finite


class TooManySkippedSteps(RuntimeError):
    """More steps than allowed had a loss or gradient that is not finite. Earlier checkpoints are kept."""


class WeightsNotFinite(RuntimeError):
    """Weights, or their average, hold NaN or Inf. They are not written; earlier checkpoints are kept."""


@dataclass(frozen=True)
class SkipLimit:
    """How many steps may be skipped: `steps` of them, and a share of at most `share` of the whole run."""

    steps: int
    share: float

    def __post_init__(self):
        _check.integer("max_skipped_steps", self.steps, low=0)
        _check.number("max_skipped_share", self.share, low=0, high=1)

    def check(self, skipped: int, step: int, num_steps: int, saved: Path | None) -> None:
        """Whether the run may go on after `step` of its `num_steps` steps, or has ended well.

        The share is that of the whole run. Once more steps are skipped than it allows, no later one can make
        up for them.

        Raises:
            TooManySkippedSteps: it may not.
        """
        # The share is taken of all steps to come, too: after few steps one that was skipped would be much of
        # those taken.
        if skipped > self.steps:
            limit = f"max_skipped_steps={self.steps}"
        elif skipped > 0 and skipped / num_steps > self.share:
            limit = f"max_skipped_share={self.share:g} of {num_steps} steps"
        else:
            return
        what = f"{skipped} of {step} steps had a loss or gradient that is not finite ({limit})"
        raise TooManySkippedSteps(f"{what}; {remedy(saved)}")


def check_finite(name: str, weights: dict[str, Any], remedy: str, *, but: Collection[str] = ()) -> None:
    """Whether all floating-point tensors in `weights`, nested as state dicts are, are finite.

    One pass over them, and one wait for the device: for checkpoints, not for steps.

    Args:
        but: those that need not be, as `not_finite` names them.

    Raises:
        WeightsNotFinite: naming what they belong to (`name`), some of those that are not, and the `remedy`.
    """
    # Three names show which part of the network it is. All of them would be hundreds.
    bad = [entry for entry in not_finite(weights) if entry not in but]
    if not bad:
        return
    shown = ", ".join(bad[:3])
    if len(bad) > 3:
        shown += f" and {len(bad) - 3} more"
    got = f"NaN or Inf in {shown} (of {len(named_tensors(weights))} tensors)"
    raise WeightsNotFinite(f"{name}: expected finite weights, got {got}; {remedy}")


def remedy(saved: Path | None) -> str:
    """What there still is, and what to change."""
    last = "no checkpoint was written yet"
    if saved is not None:
        last = f"the last good checkpoint is {saved}"
    return f"{last}. A lower learning rate, max_grad_norm, or float32 instead of float16 usually helps."
