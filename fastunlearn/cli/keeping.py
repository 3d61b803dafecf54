"""Which images of --retain `fastunlearn unlearn` keeps: those that show no image to forget, if asked for."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..host.store import ImageStore
    from ..neighbors.copies import NearCopies


@dataclass(frozen=True)
class Dropping:
    """What --drop_overlap and --drop_within ask for.

    Attributes:
        overlap: leave out images that equal an image to forget; asked for along with `within`.
        within: leave out near copies: "auto" or a radius in grey levels; None: warn of them; "off": look for
            none.

    Raises:
        ValueError: `within` is none of these.
    """

    overlap: bool
    within: str | float | None

    @property
    def flag(self) -> str:
        """The one that asks for dropping."""
        return "--drop_overlap" if self.within in (None, "off") else "--drop_within"

    @classmethod
    def from_flags(cls, drop_overlap: bool, drop_within: str | None) -> Dropping:
        if drop_within in (None, "off"):
            return cls(drop_overlap, drop_within)
        if drop_within == "auto":
            return cls(True, drop_within)
        try:
            radius = float(drop_within)
        except ValueError:
            radius = -1.0
        if not 0 <= radius < float("inf"):
            expected = "auto, off or a radius in grey levels, a number >= 0"
            raise ValueError(f"--drop_within: expected {expected}, got {drop_within!r}")
        return cls(True, radius)

    def check_sets(self, forget: ImageStore | None, retain: ImageStore | None) -> None:
        """Refuses to drop nothing because there is nothing to compare.

        Raises:
            ValueError: naming the flag and the set that is missing.
        """
        if not self.overlap or (forget is not None and retain is not None):
            return
        missing = "--forget" if forget is None else "--retain"
        raise ValueError(f"{self.flag}: expected --forget and --retain, got no {missing}")


@dataclass(frozen=True)
class Kept:
    """What stays of the images to keep.

    Attributes:
        rows: int64, of --retain; None: all.
        record: the rows of --retain that were dropped, and those that were found and kept; they say which
            images were to be forgotten.
    """

    rows: Tensor | None
    record: dict[str, Any]

    @property
    def counts(self) -> dict[str, Any]:
        """`record` with the number of rows in place of the rows, for `run.json`."""
        return {name: len(each) if isinstance(each, list) else each for name, each in self.record.items()}

    def of(self, retain: ImageStore) -> ImageStore:
        """The store of these rows."""
        from ..host.kept import keep

        return retain if self.rows is None else keep(retain, self.rows)


def rows_to_keep(
    forget: ImageStore,
    retain: ImageStore,
    dropping: Dropping,
    *,
    among: Tensor | None = None,
    allow_overlap: bool,
) -> Kept:
    """Compares the sets, and prints what was found: numbers, and rows of --retain.

    Near copies that a radius leaves, or that nobody asked to drop, are warned of.

    Args:
        among: int64, the rows of `retain` that may stay; None: all.

    Raises:
        ValueError: no image to keep would be left.
    """
    import torch

    from ..engine.checks import check_same_kind
    from ..host.store import overlap, rows_also_in

    check_same_kind(forget, retain)
    record: dict[str, Any] = {}
    rows = torch.arange(len(retain)) if among is None else among
    compared = Kept(among, {}).of(retain)
    if dropping.overlap:
        equal = rows[rows_also_in(forget, compared)]
        rows = _without(rows, equal, dropping.flag)
        record["dropped_equal"] = equal.tolist()
        print(_of_equal(len(rows), len(equal)))
    elif not allow_overlap and len(overlap(forget, compared)[0]):
        return Kept(among, record)  # will be refused, in words of its own: no search before that

    if dropping.within not in (None, "off"):
        found = _near_copies(forget, retain, rows, dropping.within)
        rows = _without(rows, found.retain_rows, dropping.flag)
        copies = found.retain_rows.unique().tolist()
        record |= {"drop_within": dropping.within, "dropped_near_copies": copies}
        dropped = f"{len(copies) or 'none'} dropped by --drop_within {dropping.within}"
        print(f"images to keep: {len(rows)} ({dropped}: {found})")
    if dropping.within not in ("auto", "off"):
        found = _near_copies(forget, retain, rows, "auto")
        found = found.unequal() if allow_overlap else found
        record["kept_near_copies"] = found.retain_rows.unique().tolist()
        if len(found):
            hint = "--drop_within auto leaves them out"
            print(f"warning: among the images to keep are {found}. {hint}", file=sys.stderr)
    return Kept(None if len(rows) == len(retain) else rows, record)


def _near_copies(forget: ImageStore, retain: ImageStore, rows: Tensor, within: str | float) -> NearCopies:
    """Among the `rows` of `retain`; with row numbers of `retain`."""
    from ..host.kept import keep
    from ..neighbors.copies import near_copies

    compared = retain if len(rows) == len(retain) else keep(retain, rows)
    found = near_copies(forget, compared, within=within)
    return replace(found, retain_rows=rows[found.retain_rows])


def _without(rows: Tensor, dropped: Tensor, flag: str) -> Tensor:
    """`rows` that are not in `dropped`; at least one."""
    import torch

    left = rows[~torch.isin(rows, dropped)]
    if len(left) == 0:
        expected = "images to keep that show no image to forget"
        raise ValueError(f"{flag}: expected {expected}, got {len(rows)} that all do")
    return left


def _of_equal(kept: int, dropped: int) -> str:
    if dropped == 0:
        return f"images to keep: {kept} (none dropped: none is equal to an image to forget)"
    return f"images to keep: {kept} ({dropped} dropped, which are to be forgotten)"
