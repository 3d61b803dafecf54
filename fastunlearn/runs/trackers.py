"""Where a run shows its numbers: a progress bar, accelerate's trackers, or the caller's own function."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from ..host import check

Report = Callable[[int, dict[str, float]], None]  # step, metrics
TRACKERS = ("tensorboard", "wandb")


class ProgressBar:
    """A rich progress bar; entering it gives `advance(step, metrics)`."""

    def __init__(self, total: int, completed: int, show: bool, label: str = "unlearning"):
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (
            TextColumn(label),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[shown]}"),
            TimeRemainingColumn(),
        )
        self.bar = Progress(*columns, disable=not show)
        self.task = self.bar.add_task(label, total=total, completed=completed, shown="")

    def __enter__(self) -> Callable[[int, dict[str, float]], None]:
        self.bar.__enter__()
        return self._advance

    def _advance(self, step: int, values: dict[str, float]) -> None:
        """Shows `step`, and of its numbers loss, norm and, where there are any, skipped steps."""
        shown = " ".join(f"{name} {values[name]:.4g}" for name in ("loss", "grad_norm") if name in values)
        if values["skipped_steps"]:
            shown += f" skipped {values['skipped_steps']}"
        self.bar.update(self.task, completed=step, shown=shown)

    def __exit__(self, *exception) -> None:
        self.bar.__exit__(*exception)


class Reporter:
    """Passes metrics to a callable, an accelerate tracker, or nobody."""

    def __init__(self, log: Report | None = None, finish: Callable[[], None] | None = None):
        self._log, self._finish = log, finish

    def __call__(self, step: int, values: dict[str, float]) -> None:
        if self._log is not None:
            self._log(step, values)

    def finish(self) -> None:
        if self._finish is not None:
            self._finish()


def check_installed(report_to: str) -> None:
    """
    Raises:
        ValueError: no tracker, or one that is not installed.
    """
    check.one_of("report_to", report_to, TRACKERS)
    from accelerate.tracking import get_available_trackers

    # Names are texts in some versions of accelerate, and members of an enumeration in others.
    available = [str(getattr(name, "value", name)) for name in get_available_trackers()]
    if report_to not in available:
        raise ValueError(
            f"report_to: expected an installed tracker, got {report_to!r} (pip install {report_to})"
        )


def make_reporter(report_to: str | Report | None, output_dir: Path) -> Reporter:
    """What the argument `report_to` of `unlearn` means.

    Raises:
        TypeError, ValueError: no tracker, or one that is not installed.
    """
    if report_to is None or callable(report_to):
        return Reporter(report_to)
    check_installed(report_to)
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    output_dir.mkdir(parents=True, exist_ok=True)
    # wandb has a folder of its own.
    where = {"logging_dir": output_dir} if report_to == "tensorboard" else {}
    tracker = LOGGER_TYPE_TO_CLASS[report_to]("fastunlearn", **where)
    tracker.start()
    return Reporter(lambda step, values: tracker.log(values, step=step), tracker.finish)
