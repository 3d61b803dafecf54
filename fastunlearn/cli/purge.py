"""`fastunlearn purge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional


@dataclass(kw_only=True)
class Purge:
    """Remove what a run keeps of the images to forget: caches and stores that its manifest lists.

    The unlearned model stays.

    The exit code is 1 if the manifest lists files that are not safe to remove; they are named.

    Try: fastunlearn purge runs/forget-7
    """

    run_dir: Positional[Path]
    """The --output of `fastunlearn unlearn`."""

    def run(self) -> int:
        from ..runs.training import purge

        purged = purge(self.run_dir)
        print(purged)
        print(f"{len(purged.removed)} files removed: {self.run_dir}")
        return 1 if purged.refused else 0
