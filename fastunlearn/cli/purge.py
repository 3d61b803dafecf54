"""`fastunlearn purge`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from tyro.conf import Positional

if TYPE_CHECKING:
    from ..runs.run_record import Purged

LINEAGE_KEPT = (
    "lineage.json and its key together tell of any image whether it was forgotten; later runs need \
both to leave it out of what they learn. --forget_lineage removes them"
)
LINEAGE_GONE = "later runs from this model may learn the images again; a key of --lineage_key is where it was"


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
    forget_lineage: bool = False
    """Remove also what says which images were forgotten: model/lineage.json and its key. Later runs from \
this model may then learn them again."""

    def run(self) -> int:
        from ..runs.protocols import FILE, folders, purge_protocol
        from ..runs.training import purge

        requests = folders(self.run_dir)
        if not requests and not (self.run_dir / FILE).exists():
            return self._say(self.run_dir, purge(self.run_dir))
        done = zip([*requests, self.run_dir], purge_protocol(self.run_dir), strict=True)
        return max(self._say(folder, purged) for folder, purged in done)

    def _say(self, run_dir: Path, purged: Purged) -> int:
        from ..runs.lineage import forget_lineage, what_tells

        if self.forget_lineage:
            purged.removed += forget_lineage(run_dir)
        print(purged)
        if self.forget_lineage:
            print(LINEAGE_GONE)
        kept = what_tells(run_dir)
        for file in kept:
            print(f"kept {file}")
        if kept:
            print(LINEAGE_KEPT)
        print(f"{len(purged.removed)} files removed: {run_dir}")
        return 1 if purged.refused else 0
