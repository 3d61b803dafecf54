"""The note in a lock's file: who holds it, for those who find it held; whether an owner elsewhere lives."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from dataclasses import asdict, dataclass, fields
from datetime import datetime
from pathlib import Path

LONGEST_NOTE = 4096  # bytes
NOTE_PATIENCE = 2.0  # seconds that a new owner is given to say who it is
HEARTBEAT = 10.0  # seconds between two touches of the file by its owner
SILENCE = 3 * HEARTBEAT  # an owner on another host that does not touch it for so long is none
CERTAIN_SILENCE = 600.0  # the same by the clocks of two hosts, which need not agree to the second

log = logging.getLogger("fastunlearn")


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, as it says itself."""

    pid: int
    host: str
    started: str  # when it took the lock, with the offset of its time zone
    work: str  # "unlearn", "purge", ...
    kernel: str  # whose locks it takes part in: the same in all containers of a host, another after a reboot

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} ({self.work}, since {self.started})"

    @classmethod
    def here(cls, work: str) -> Owner:
        """This process, from now on."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return cls(os.getpid(), socket.gethostname(), now, work, _kernel())

    @property
    def is_foreign(self) -> bool:
        return self.kernel != _kernel()


def _kernel() -> str:
    """What tells the running kernel from all others."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:  # not Linux
        return socket.gethostname()


def write(descriptor: int, owner: Owner) -> None:
    """Writes the note of `owner` into the lock's file."""
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, (json.dumps(asdict(owner)) + "\n").encode(), 0)


def read(descriptor: int) -> Owner | None:
    """The note; None if there is none, or something else."""
    try:
        note = json.loads(os.pread(descriptor, LONGEST_NOTE, 0))
        owner = Owner(**{entry.name: note[entry.name] for entry in fields(Owner)})
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    # The note goes into messages: what is not printable is no note of ours.
    words = owner.host, owner.started, owner.work, owner.kernel
    printable = all(isinstance(word, str) and word.isprintable() for word in words)
    if not printable or type(owner.pid) is not int or owner.pid <= 0:
        return None
    return owner


def wait_for_note(descriptor: int) -> Owner | None:
    """The note of an owner that may just have come: for a moment there is none, or that of one who died."""
    deadline = time.monotonic() + NOTE_PATIENCE
    owner = read(descriptor)
    while (owner is None or _has_ended(owner)) and time.monotonic() < deadline:
        time.sleep(0.01)
        owner = read(descriptor)
    return owner


def _has_ended(owner: Owner) -> bool:
    """Whether it was a process of this host that is no more. It decides about words, not who holds a lock."""
    if owner.is_foreign:
        return False
    try:
        os.kill(owner.pid, 0)
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:
        pass  # it runs, under another user
    return False


def beats(file: Path, owner: Owner) -> bool:
    """Whether `owner`, on another host, whose lock is perhaps not seen from here, still touches `file`."""
    last = _touched(file)
    if last is None or abs(time.time() - last / 1e9) > CERTAIN_SILENCE:
        return False
    log.warning("%s: left by %s; for %g s we look whether it still runs", file, owner, SILENCE)
    deadline = time.monotonic() + SILENCE
    while time.monotonic() < deadline:
        time.sleep(SILENCE / 60)
        touched = _touched(file)
        if touched != last:
            return touched is not None
    return False


def _touched(file: Path) -> int | None:
    """When, in nanoseconds; None: it is gone. The file is opened anew, because NFS asks its server then."""
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        return os.fstat(descriptor).st_mtime_ns
    finally:
        os.close(descriptor)
