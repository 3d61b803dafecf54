"""What was compiled beforehand: a run with little time leaves out what it would have to compile first.

`pytest bench --compile-only --ready FILE` compiles each contestant, times nothing, and writes a line a contestant into FILE as
it is done; several such runs share a file, and inductor's cache (`TORCHINDUCTOR_CACHE_DIR`). `--ready FILE` alone reads it.
"""

from __future__ import annotations

from pathlib import Path


class Ready:
    """
    Args:
        path: the file; None: everything counts as ready.
        recording: this run writes it.
    """

    def __init__(self, path: Path | None = None, *, recording: bool = False):
        self.path, self.recording = path, recording
        self._found = set()
        if path is not None and path.exists() and not recording:
            self._found = set(path.read_text().splitlines())

    def __contains__(self, label: str) -> bool:
        return self.path is None or self.recording or label in self._found

    def add(self, label: str) -> None:
        """Says that `label` is compiled."""
        if self.path is not None and self.recording:
            with self.path.open("a") as file:
                file.write(f"{label}\n")


EVERYTHING = Ready()
