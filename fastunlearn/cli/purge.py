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
    """Remove what a run keeps of the images to forget, and what could confirm one: checkpoints, seed,
    identifiers and their key, caches, losses.

    The unlearned model stays, and the key of its lineage. A run that is not finished cannot be resumed any
    more.

    The exit code is 1 if the manifest lists files that are not safe to remove; they are named.

    Try: fastunlearn purge runs/forget-7
    """

    run_dir: Positional[Path]
    """The --output of `fastunlearn unlearn`; of a protocol, with all its requests."""

    def run(self) -> int:
        from ..runs.protocols import folders, purge_protocol
        from ..runs.training import purge

        requests = folders(self.run_dir)
        if not requests:
            return self._say(self.run_dir, purge(self.run_dir))
        done = zip([*requests, self.run_dir], purge_protocol(self.run_dir), strict=True)
        return max(self._say(folder, purged) for folder, purged in done)

    def _say(self, run_dir: Path, purged: Purged) -> int:
        print(purged)
        print(f"{len(purged.removed)} files removed: {run_dir}")
        return 1 if purged.refused else 0
