"""evaluation.json: written anew after every metric, whole, so that a run that dies keeps what it measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..host.atomic import atomic_file
from .measurement import Measurement

FILE = "evaluation.json"


class Record:
    """What was asked, what was found, and what could not be had, in `folder/evaluation.json`.

    Its `status` is `running` until the end; then `complete`, `incomplete` (a metric could not be had) or
    `failed` (an error ended the run). A file that still says `running` belongs to a run that was killed, or
    is not at its end.

    Args:
        folder: made if it is not there.
        head: what the file begins with, JSON-able.
        subjects: names of the checkpoints.
        wanted: the metrics, in the order in which the file lists them.
    """

    def __init__(
        self, folder: Path, head: dict[str, Any], subjects: tuple[str, ...], wanted: tuple[str, ...]
    ):
        self.file, self.wanted = Path(folder) / FILE, wanted
        self.measured: dict[str, dict[str, Measurement]] = {name: {} for name in subjects}
        self.not_measured: dict[str, dict[str, str]] = {name: {} for name in subjects}
        self._content = {"status": "running", **head}
        # Written before anything is measured: a folder that takes no file is told now, not after hours.
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self._write()

    def refuse(self, subject: str, metric: str, reason: str) -> None:
        """Notes why `metric` of `subject` cannot be had."""
        self.not_measured[subject][metric] = reason
        self._write()

    def add(self, subject: str, metric: str, measurement: Measurement) -> None:
        """Notes the numbers of `metric` of `subject`."""
        self.measured[subject][metric] = measurement
        self._write()

    def finish(self, **more: Any) -> None:
        """Notes that nothing more will come, and `more`."""
        self._content.update(more)
        self._content["status"] = "complete" if self.complete else "incomplete"
        self._write()

    def fail(self, error: BaseException) -> None:
        """Notes that `error` ended the run."""
        self._content.update(status="failed", error=f"{type(error).__name__}: {error}")
        self._write()

    @property
    def complete(self) -> bool:
        """Whether every metric of every checkpoint was measured."""
        return not any(self.not_measured.values())

    def _write(self) -> None:
        """The whole file anew, in one step: a reader never finds a part of it."""
        measured = {name: self._row(row) for name, row in self.measured.items()}
        content = {**self._content, "measured": measured, "not_measured": self.not_measured}
        # Without NaN, which other readers of JSON refuse.
        with atomic_file(self.file) as file:
            file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())

    def _row(self, row: dict[str, Measurement]) -> dict[str, dict]:
        """The metrics of one checkpoint, in the order in which they were asked for."""
        found = [metric for metric in self.wanted if metric in row]
        return {metric: {"value": row[metric].value, **row[metric].numbers} for metric in found}
