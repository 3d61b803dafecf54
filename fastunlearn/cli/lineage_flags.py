"""The flags of what earlier runs forgot, and what the command does with it."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from .options import unset

if TYPE_CHECKING:
    from torch import Tensor

    from ..host.store import ImageStore
    from ..runs.lineage import Lineage


@dataclass(kw_only=True)
class LineageFlags:
    """Images that --model was made to forget before are left out of --retain (docs/lineage.md)."""

    lineage_key: Annotated[Path | None, unset("that of the run that left --model", "FILE")] = None
    """The key with which forgotten images are written down, and recognised. A run has it in \
private/lineage.key. A FILE is used where it is, and made if it is not there."""
    ignore_lineage: bool = False
    """Keep what is in --retain, also what --model was made to forget before, and go on where that cannot be \
told."""


REMEDY = "--ignore_lineage goes on, and may teach the network those images again"


class Past:
    """The lineage of the network that the runs of a command begin with.

    Only process 0 opens it, so that no other has the key; it alone may call the other methods.

    Args:
        model: --model.
        output: --output.
        forgets: whether there are images to forget, so that there will be a lineage.
    """

    def __init__(self, flags: LineageFlags, model: Path, output: Path, *, forgets: bool):
        self.flags, self.model, self.output, self.forgets = flags, model, output, forgets
        self.lineage: Lineage | None = None
        self.key: bytes | None = None  # None: there is nothing to write down

    def open(self) -> None:
        """Reads lineage and key: before the images, which may take long.

        Raises:
            ValueError: naming the flag: either cannot be read, or they do not fit each other, and nobody said
                that this is to be ignored.
        """
        self.lineage = self._read()
        if len(self.lineage) and self.flags.ignore_lineage:
            _warn(f"{_images(self.lineage)} may stand among those to keep, and be learnt again")
        if self.lineage.parts or self.forgets:
            self.key = self._found_key()

    def rows_to_keep(
        self, retain: ImageStore | None, images: Mapping[str, Any]
    ) -> tuple[Tensor | None, dict[str, Any]]:
        """Which rows of --retain no earlier run was asked to forget; says how many were.

        Args:
            images: what was read, as `PictureFlags.load` notes it.

        Returns:
            int64 (None: all rows), and the numbers for `run.json`.

        Raises:
            ValueError: naming the flag: rows that were decoded otherwise, or no row left.
        """
        import torch

        from ..runs.lineage import rows_to_leave_out

        if not len(self.lineage):
            return None, {}
        record: dict[str, Any] = {"forgotten_before": len(self.lineage)}
        if self.flags.ignore_lineage:
            return None, record | {"ignored": True}
        if retain is None:
            return None, record
        try:
            found = rows_to_leave_out(retain, self.lineage, self.key, images["retain"]["options"])
        except ValueError as error:
            raise ValueError(f"--{error}: they cannot be compared with --retain; {REMEDY}") from None
        record["left_out"] = len(found)
        if len(found) == len(retain):
            expected = "expected an image that was not forgotten before"
            raise ValueError(f"--retain: {expected}, got {len(retain)} that all were")
        left = len(retain) - len(found)
        print(f"images to keep: {left} ({len(found)} left out, which were to be forgotten before)")
        if len(found) == 0:
            return None, record
        stays = torch.ones(len(retain), dtype=torch.bool)
        stays[found] = False
        return stays.nonzero().flatten(), record

    def keep_key(self, private: Path) -> None:
        """Puts the key into the private folder of a run, but for one that --lineage_key names."""
        from ..runs.lineage import write_key
        from ..runs.private import LINEAGE_KEY, private_folder

        if self.key is None or self.flags.lineage_key is not None:
            return
        if next(_readable([private / LINEAGE_KEY]), None) != self.key:
            write_key(private_folder(private.parent) / LINEAGE_KEY, self.key)

    def files(self, forgotten: ImageStore | None, images: Mapping[str, Any]) -> dict[str, bytes]:
        """`lineage.json`, as a file of the pipeline that a run leaves; nothing where nothing was forgotten.

        Args:
            forgotten: what was forgotten since --model.
            images: see `rows_to_keep`.
        """
        from ..runs.lineage import FILE, with_rows

        lineage = self.lineage
        if forgotten is not None:
            lineage = with_rows(lineage, self.key, forgotten, images["forget"]["options"])
        return {FILE: lineage.content()} if lineage.parts else {}

    def _read(self) -> Lineage:
        from ..runs.lineage import Lineage, read_lineage

        try:
            return read_lineage(self.model)
        except ValueError as error:
            if not self.flags.ignore_lineage:
                raise ValueError(f"--{error}; {REMEDY}") from None
            _warn(f"{error}. None of it is handed on")
            return Lineage()

    def _found_key(self) -> bytes:
        """The key of the lineage, if that is there; otherwise one for a new lineage."""
        from ..runs.lineage import new_key, shared_key

        given = self.flags.lineage_key
        # A run that is resumed has the key already, wherever the run before it may be now.
        own = [] if given is not None else _keys_of_run(self.output)
        if self.lineage.parts:
            places = [*own, self._key_before()] if given is None else [given]
            ignored = self.flags.ignore_lineage
            for key in filter(self.lineage.is_under, _readable(places)):
                if ignored or self.lineage.opened_by(key):
                    return key
            if not ignored:
                raise ValueError(f"{self._wrong_with(places[-1])}; {REMEDY}")
        if given is not None:
            try:
                return shared_key(given)
            except ValueError as error:
                raise ValueError(f"--{error}") from None
        return next(_readable(own), None) or new_key()

    def _key_before(self) -> Path:
        """Where the run that left --model has its key."""
        from ..runs.lineage import file_of
        from ..runs.private import LINEAGE_KEY, PRIVATE_FOLDER

        return file_of(self.model).parent.parent / PRIVATE_FOLDER / LINEAGE_KEY

    def _wrong_with(self, place: Path) -> str:
        """Why what is in `place` is not the key of the lineage."""
        from ..runs.lineage import file_of, read_key

        expected = f"--lineage_key: expected the key of {file_of(self.model)}"
        if len(self.lineage.parts) > 1:
            got = f"a record under {len(self.lineage.parts)} keys (an earlier run ignored it)"
            return f"{expected}, got {got}"
        if not os.path.lexists(place):
            return f"{expected}, got none in {place}"
        try:
            read_key(place)
        except ValueError as error:
            return f"--{error}"
        return f"{expected}, got another in {place}"


def _keys_of_run(output: Path) -> list[Path]:
    """Where a run in `output`, or the requests of a protocol, have their keys."""
    from ..runs.private import LINEAGE_KEY, PRIVATE_FOLDER
    from ..runs.protocols import folders

    return [folder / PRIVATE_FOLDER / LINEAGE_KEY for folder in (output, *folders(output))]


def _readable(places: Iterable[Path]) -> Iterator[bytes]:
    """The keys in those of `places` that hold one."""
    from ..runs.lineage import read_key

    for place in places:
        with suppress(ValueError):
            yield read_key(place)


def _images(lineage: Lineage) -> str:
    count = len(lineage)
    return f"{count} image{'' if count == 1 else 's'} that --model was made to forget before"


def _warn(text: str) -> None:
    print(f"warning: --ignore_lineage: {text}", file=sys.stderr)
