"""Shared by tests of locks: one that another thread holds, and processes that start at one instant."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import crash
import pytest

from fastunlearn.host import lock_owner
from fastunlearn.host.folder_lock import FolderLocked


@contextmanager
def held_elsewhere(lock: Callable[..., Any], path: Path, work: str = "unlearn") -> Iterator[None]:
    """Another thread is inside `lock(path, work)` while the block lasts."""
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(path, work):
            entered.set()
            leave.wait(crash.PATIENCE)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert entered.wait(crash.PATIENCE)
        yield
    finally:
        leave.set()
        thread.join()


def refused(lock: Callable[..., Any], path: str | Path) -> FolderLocked:
    """What `lock(path)` raises here and now; without an error the test fails."""
    with pytest.raises(FolderLocked) as caught, lock(path, "test"):
        pytest.fail("two owners")
    return caught.value


def at_one_instant(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """`function(*arguments, start, done)`, in processes: what each returned. `start`, `done`: barriers."""
    crash.start_server()
    start, done = crash.CONTEXT.Barrier(count), crash.CONTEXT.Barrier(count)
    pipes, processes = [], []
    for _ in range(count):
        ours, theirs = crash.CONTEXT.Pipe()
        given = theirs, function, arguments, start, done
        process = crash.CONTEXT.Process(target=_answer, args=given, daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        for pipe in pipes:
            assert pipe.poll(crash.PATIENCE)
        return [pipe.recv() for pipe in pipes]
    finally:
        for process in processes:
            process.kill()
            process.join()


def _answer(pipe, function: Callable[..., Any], arguments: tuple, start, done) -> None:
    lock_owner.NOTE_PATIENCE = crash.PATIENCE  # however busy the machine is
    pipe.send(function(*arguments, start, done))
