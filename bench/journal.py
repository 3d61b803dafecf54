"""The measurements of a run on disk: the whole file anew after every comparison, so that nothing is lost."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastunlearn.host.atomic import atomic_file


class Journal:
    """Rows, one dataclass object for each contestant of each comparison.

    Args:
        path: of the JSON file; None: nothing is written.
        machine: processor, GPU, versions, commit.
        options: of the run.
        go_on: the rows that the file has stay, before those of this run.
    """

    def __init__(
        self,
        path: Path | None = None,
        machine: dict[str, Any] | None = None,
        options: dict[str, Any] | None = None,
        *,
        go_on: bool = False,
    ):
        self.path, self.machine, self.options = path, machine or {}, options or {}
        self.rows: list = []
        self._earlier: list[dict] = []
        if go_on and path is not None and path.exists():
            self._earlier = self._read(path)

    @staticmethod
    def _read(path: Path) -> list[dict]:
        """The rows of a file; one that cannot be read is put aside."""
        try:
            return json.loads(path.read_text())["rows"]
        except (ValueError, KeyError):
            path.rename(path.with_suffix(".damaged"))
            return []

    def add(self, rows: Iterable) -> None:
        """Appends the rows of a comparison, and writes all."""
        self.rows.extend(rows)
        self.write()

    def write(self) -> None:
        """Again, where rows have been completed since."""
        if self.path is None:
            return
        rows = self._earlier + [_rounded(asdict(row)) for row in self.rows]
        whole = {"machine_info": self.machine, "options": self.options, "rows": rows}
        with atomic_file(self.path) as file:
            file.write((json.dumps(whole, indent=1) + "\n").encode())


def _rounded(value):
    """Floats to four digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: _rounded(entry) for name, entry in value.items()}
    return value
