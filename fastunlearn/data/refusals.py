"""What cannot be read, collected: one error names it all, since a set of images never shrinks silently."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

NAMED = 20  # problems that one error spells out


class Refused(Exception):
    """What of a folder, a file or a table cannot become rows. `load_images` turns it into a ValueError.

    Attributes:
        problems: one sentence each, `NAME: expected ..., got ...`, in the order of the rows.
        where: the folder, file or table.
        count: how many files or rows there are, those that can be read included.
        unit: "files" or "rows".
    """

    def __init__(self, problems: list[str], where: str | Path, count: int = 1, unit: str = "files"):
        super().__init__(problems)
        self.problems, self.where, self.count, self.unit = problems, where, count, unit


def in_words(refusals: list[Refused], fine: int = 0) -> str:
    """One message for all `refusals`: a line for one problem, else a list of the first and their number.

    `fine`: how many files can be read that are in none of the `refusals`.
    """
    problems: list[str] = []
    for refused in refusals:
        problems += refused.problems
    count = fine + sum(refused.count for refused in refusals)
    where = f"{len(refusals)} paths"
    if len(refusals) == 1:
        where = shown(refusals[0].where)
    units = {refused.unit for refused in refusals}
    unit = "files and rows" if len(units) > 1 else refusals[0].unit

    if len(problems) == 1 and count == 1:
        return problems[0]
    if len(problems) == 1:
        # `count` includes files of other paths if there are any: then it is not said where they lie.
        inside = f" in {where}" if fine == 0 else ""
        return f"{problems[0]} (the only one of {count} {unit}{inside} that cannot be read)"

    lines = [f"{where}: expected {unit} that can all be read, got {len(problems)} of {count} that cannot:"]
    lines += [f"  {problem}" for problem in problems[:NAMED]]
    if len(problems) > NAMED:
        lines.append(f"  and {len(problems) - NAMED} more")
    return "\n".join(lines)


def shown(path: str | Path) -> str:
    """`path` as a terminal may show it: control characters, and bytes that are no UTF-8, are escaped."""
    return "".join(_escaped(character) for character in str(path))


def listed(paths: Iterable[str | Path]) -> str:
    """Several paths, as a terminal may show them."""
    return ", ".join(shown(path) for path in paths)


def _escaped(character: str) -> str:
    if character.isprintable():
        return character
    return character.encode("unicode_escape").decode("ascii")
