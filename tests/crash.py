"""Kills processes at chosen lines: shared by the tests of `unlearn` and `pretrain`.

A child counts the lines of the package that it executes, and ends itself with SIGKILL at the one that it was
told. So a kill strikes the same place on every machine, busy or not, and no run escapes it.

Children are forked from a server that has imported torch but never used it, so that starting one costs
milliseconds and is safe.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

PACKAGE = str(Path(__file__).parents[1] / "fastunlearn")
CONTEXT = multiprocessing.get_context("forkserver")
PATIENCE = 300  # seconds for one child: only a defect reaches it, on any machine

Target = Callable[[str], None]


@dataclass(frozen=True)
class Lines:
    """How many lines of the package a run executes: in all, and while a folder is being written."""

    all: int
    saving: int


@dataclass
class Kills:
    total: int = 0
    while_saving: int = 0  # a temporary checkpoint folder was there


@cache
def start_server() -> None:
    here = Path(__file__).parent
    before = os.environ.get("PYTHONPATH")
    # Python 3.11's server ignores sys.path
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), *filter(None, [before])])
    CONTEXT.set_forkserver_preload(["crash_preload"])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def run_to_end(target: Target, run_dir: Path) -> None:
    """Runs `target(run_dir)` in a child; fails if the child does."""
    process = _start(target, str(run_dir))
    assert process.exitcode == 0, f"the child ended with {process.exitcode}"


def lines_of(target: Target, run_dir: Path) -> Lines:
    """The same, and how many lines that took."""
    ours, theirs = CONTEXT.Pipe()
    process = _start(_counted, target, str(run_dir), theirs)
    assert process.exitcode == 0, f"the child ended with {process.exitcode}"
    return ours.recv()


def kill_at(
    line: int, target: Target, run_dir: Path, checkpoint_dir: Path, kills: Kills, *, saving: bool
) -> None:
    """Runs `target(run_dir)` in a child that dies at line number `line`, of all or of those that save."""
    process = _start(_killed, target, str(run_dir), line, saving)
    assert process.exitcode == -signal.SIGKILL, f"the child ended with {process.exitcode}, not at line {line}"
    kills.total += 1
    kills.while_saving += any(checkpoint_dir.glob(f".checkpoint-*.{process.pid}-*.tmp"))


def run_until_killed(function: Callable[..., None], *arguments) -> None:
    """Runs `function(*arguments)` in a child that ends itself with SIGKILL; fails if it ends otherwise."""
    process = _start(function, *arguments)
    assert process.exitcode == -signal.SIGKILL, f"the child ended with {process.exitcode}, not by the signal"


def _start(function: Callable, *arguments) -> multiprocessing.Process:
    """A child that has done `function(*arguments)`, or has not managed to."""
    start_server()
    process = CONTEXT.Process(target=function, args=arguments)
    process.start()
    process.join(PATIENCE)
    if process.is_alive():
        process.kill()
        process.join()
        raise AssertionError(f"the child was not done after {PATIENCE} s")
    return process


class _Counter:
    """Counts lines of the package, by Python's hook for debuggers, for as long as a `with` block lasts."""

    def __init__(self, reached: Callable[[_Counter], None] = lambda counter: None):
        from fastunlearn.host import atomic

        self.all = self.saving = 0
        self._write = atomic.atomic_directory.__wrapped__.__code__  # a generator: it yields while it writes
        self._in_save = False
        self._reached = reached

    def __enter__(self) -> _Counter:
        sys.settrace(self._call)
        return self

    def __exit__(self, *exception) -> None:
        sys.settrace(None)

    def _call(self, frame, event, argument):
        if not frame.f_code.co_filename.startswith(PACKAGE):
            return None
        return self._inside

    def _inside(self, frame, event, argument):
        if event == "line":
            self.all += 1
            self.saving += self._in_save
            self._reached(self)
        elif event == "return" and frame.f_code is self._write:
            self._in_save = not self._in_save
        return self._inside


def lines_in(function: Callable[[], object]) -> int:
    """How many lines of the package `function()` takes, in this process and thread."""
    with _Counter() as counter:
        function()
    return counter.all


def killed_in(function: Callable[[], object], line: int) -> None:
    """`function()`, in which this process ends itself at line number `line`."""

    def reached(counter: _Counter) -> None:
        if counter.all == line:
            os.kill(os.getpid(), signal.SIGKILL)

    with _Counter(reached):
        function()


def _counted(target: Target, run_dir: str, answer) -> None:
    with _Counter() as counter:
        target(run_dir)
    answer.send(Lines(counter.all, counter.saving))


def _killed(target: Target, run_dir: str, line: int, saving: bool) -> None:
    def reached(counter: _Counter) -> None:
        if (counter.saving if saving else counter.all) == line:
            os.kill(os.getpid(), signal.SIGKILL)

    with _Counter(reached):
        target(run_dir)
