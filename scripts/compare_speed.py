"""Whether the steps of one tree of this repository take longer than those of another, on this machine.

    python scripts/compare_speed.py OLD_TREE NEW_TREE [--rounds 8] [--limit 1.02] [-k WORD]

Every method as `*_step` and as `Unlearner.step`, on a small UNet and on a network of two parameters, where
all is what the host does. A round starts a process of each tree; both are pinned to one core, and take a few
steps in turn, so that what slows the machine down slows both. CPU time is measured: while another process has
the core, it stands still. A round's ratio is the median over the turns, of which each compares two medians;
what counts is the median over the rounds.

Ends with 1 if the ratio new/old of a step is above the limit. One that is above it is measured again, with as
many rounds more, before it counts.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import NamedTuple

from compare_bits import HERE, environment_of, extension

BLOCKS = 16  # in each of which first one process takes some steps, then the other
BLOCK_SECONDS = 0.015
WARM_UP = 5  # steps


class Pair(NamedTuple):
    """What a round found of a case."""

    old: float  # nanoseconds of a step
    new: float
    ratio: float  # new/old


Found = dict[str, list[Pair]]  # title of a case -> one pair a round


class Process:
    """A process of `tree` that takes steps when it is asked to."""

    def __init__(self, tree: Path, core: int):
        command = [sys.executable, "-P", "-m", "bits.timing", str(tree)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, env=environment_of(tree, "plain"), cwd=HERE, **pipes)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self._process.pid, {core})
        self.titles: list[str] = self._answer()

    def _answer(self):
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"a process of the timing ended with {self._process.wait()}")
        return json.loads(line)

    def take(self, title: str, count: int) -> list[int]:
        """Nanoseconds of each of `count` steps."""
        self._process.stdin.write(json.dumps([title, count]) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *exception) -> None:
        self._process.stdin.close()
        self._process.wait()


def time_round(trees: list[Path], wanted: Callable[[str], bool], core: int, first: int) -> dict[str, Pair]:
    """Each wanted case in a new process of each tree; `trees[first]` starts, and begins every block."""
    order = (first, 1 - first)
    with ExitStack() as stack:
        started = {index: stack.enter_context(Process(trees[index], core)) for index in order}
        return {title: time_case(title, started, order) for title in started[0].titles if wanted(title)}


def time_case(title: str, processes: dict[int, Process], order: tuple[int, int]) -> Pair:
    warm = {index: median(processes[index].take(title, WARM_UP)) for index in order}
    count = max(1, round(BLOCK_SECONDS * 1e9 / warm[0]))
    blocks: dict[int, list[float]] = {0: [], 1: []}
    for _ in range(BLOCKS):
        for index in order:
            blocks[index].append(median(processes[index].take(title, count)))
    ratios = [new / old for old, new in zip(blocks[0], blocks[1], strict=True)]
    return Pair(median(blocks[0]), median(blocks[1]), median(ratios))


def measure(trees: list[Path], rounds: int, wanted: Callable[[str], bool], core: int, found: Found) -> None:
    """Adds one pair a round to what was `found` of each wanted case."""
    for number in range(rounds):
        for title, pair in time_round(trees, wanted, core, first=number % 2).items():
            found.setdefault(title, []).append(pair)
        print(f"round {number + 1} of {rounds}", file=sys.stderr)


def ratio(pairs: list[Pair]) -> float:
    return median(pair.ratio for pair in pairs)


def report(found: Found, limit: float) -> bool:
    """Prints the table; whether every ratio is within the limit."""
    print(f"{'step':<44} {'old ms':>8} {'new ms':>8} {'new/old':>8}  of single rounds")
    for title, pairs in found.items():
        old, new = median(pair.old for pair in pairs) / 1e6, median(pair.new for pair in pairs) / 1e6
        single = sorted(pair.ratio for pair in pairs)
        spread = f"{single[0]:.3f} to {single[-1]:.3f}"
        mark = f"  above {limit}" if ratio(pairs) > limit else ""
        print(f"{title:<44} {old:8.3f} {new:8.3f} {ratio(pairs):8.3f}  {spread}{mark}")
    return all(ratio(pairs) <= limit for pairs in found.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--rounds", type=int, default=8, help="even, so that each tree starts as often")
    parser.add_argument("--limit", type=float, default=1.02, help="the largest ratio new/old that passes")
    parser.add_argument("-k", dest="word", default="", help="only cases with this in their title")
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    parser.add_argument("--core", type=int, default=cores[-1], help="that both trees run on")
    options = parser.parse_args()
    trees = [options.old.resolve(), options.new.resolve()]
    if extension(trees[0]) != extension(trees[1]):
        print("the extension is built in one tree only", file=sys.stderr)

    found: Found = {}
    measure(trees, options.rounds, lambda title: options.word in title, options.core, found)
    if not found:
        parser.error(f"-k: no case has {options.word!r} in its title")
    slow = {title for title, pairs in found.items() if ratio(pairs) > options.limit}
    if slow:
        print(f"measured again: {', '.join(sorted(slow))}", file=sys.stderr)
        measure(trees, options.rounds, slow.__contains__, options.core, found)
    return 0 if report(found, options.limit) else 1


if __name__ == "__main__":
    sys.exit(main())
