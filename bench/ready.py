"""What was compiled beforehand: a run with little time leaves out what it would have to compile first.

`pytest bench --compile-only --ready FILE` compiles each contestant, times nothing, and writes a line into
FILE as each is done, or has failed; several such runs share a file, and inductor's cache
(`TORCHINDUCTOR_CACHE_DIR`). `--ready FILE` alone reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_DONE = "done"


class Ready:
    """
    Args:
        path: the file; None: everything counts as ready.
        recording: this run writes it.
    """

    def __init__(self, path: Path | None = None, *, recording: bool = False):
        self.path, self.recording = path, recording
        self._found: dict[str, str] = {}  # label -> how its compilation went
        if path is not None and path.exists() and not recording:
            lines = path.read_text(errors="replace").splitlines()
            # a writer may have been ended
            self._found = dict(line.split("\t", 1) for line in lines if "\t" in line)

    def missing(self, label: str) -> str | None:
        """Why `label` must not be compiled now; None where it is ready."""
        if self.path is None or self.recording:
            return None
        outcome = self._found.get(label, "left out, its compilation was not ready in time")
        return None if outcome == _DONE else outcome

    @contextmanager
    def compiling(self, label: str) -> Iterator[None]:
        """The block compiles `label`; what hinders it is noted, and ends there."""
        outcome = _DONE
        try:
            yield
        except Exception as error:
            outcome = f"its compilation failed: {' '.join(str(error).split())[:300]}"
        if self.path is not None and self.recording:
            with self.path.open("a") as file:
                file.write(f"{label}\t{outcome}\n")


EVERYTHING = Ready()
