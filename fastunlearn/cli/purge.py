"""`fastunlearn purge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from ..runs.run_record import Purged


@dataclass(kw_only=True)
class Purge:
    """Remove what a run keeps of the images to forget: caches and stores that its manifest lists.

    The unlearned model stays.

    The exit code is 1 if the manifest lists files that are not safe to remove; they are named.

    Try: fastunlearn purge runs/forget-7
    """

    run_dir: Positional[Path]
    """The --output of `fastunlearn unlearn`; of a protocol, with all its requests."""

    def run(self) -> int:
        from ..host.folder_lock import locked
        from ..runs.protocols import folders
        from ..runs.training import purge

        requests = folders(self.run_dir)
        if not requests:
            return self._say(self.run_dir, purge(self.run_dir))
        with locked(self.run_dir, "purge"):
            return max([self._say(folder, purge(folder)) for folder in requests])

    def _say(self, run_dir: Path, purged: Purged) -> int:
        print(purged)
        print(f"{len(purged.removed)} files removed: {run_dir}")
        return 1 if purged.refused else 0
