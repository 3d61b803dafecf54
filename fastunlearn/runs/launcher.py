"""Whether the launcher that started this process lives: torchrun, or accelerate launch, which is built on it.

A launcher that is killed takes no leave of its workers. They would go on, and write beside the run that takes
the place of theirs. So a worker remembers its parent, and ends as on SIGTERM (a run: after the step, with a
checkpoint) once it has another one. Only workers of a launcher look: what a shell started outlives it.

Linux could send a signal by itself (PR_SET_PDEATHSIG), but does so when the *thread* ends that started the
worker, and says nothing.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

LOOK_EVERY = 0.5  # seconds, outside of steps

# Asked as early as possible: that a process has lost its parent before is not noticed.
_parent = os.getppid()
# Taken by who notices first, and never given back: what was said once is not said again.
_noticed = threading.Lock()


def _remember_parent() -> None:
    global _parent, _noticed
    _parent, _noticed = os.getppid(), threading.Lock()


# A launcher may fork its workers after this module was imported: then the launcher itself is their parent.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_remember_parent)


def started() -> bool:
    """Whether a launcher started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_gone() -> bool:
    """Whether a launcher started this process and has ended since. Costs a microsecond."""
    return started() and os.getppid() != _parent


def notice() -> bool:
    """`is_gone()`, said on standard error; True for the first who asks, and for no other."""
    if not is_gone() or not _noticed.acquire(blocking=False):
        return False
    text = f"the launcher (process {_parent}) has ended: process {os.getpid()}, which it started, ends too"
    print(text, file=sys.stderr, flush=True)
    return True


@contextmanager
def watched() -> Iterator[None]:
    """While the block lasts, a launcher that ends ends this process: by SIGTERM, whatever it is doing."""
    if not started():
        yield
        return
    leaving = threading.Event()
    threading.Thread(target=_watch, args=(leaving,), name="fastunlearn launcher", daemon=True).start()
    try:
        yield
    finally:
        leaving.set()


def _watch(leaving: threading.Event) -> None:
    """Looks for the launcher until `leaving` is set, or the launcher has ended."""
    while not leaving.wait(LOOK_EVERY):
        if notice():
            os.kill(os.getpid(), signal.SIGTERM)
        if is_gone():
            return
