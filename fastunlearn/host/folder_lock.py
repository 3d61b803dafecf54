"""One writer at a time: the lock on a folder or file that a run writes. `lock_owner.py` says who holds it.

What holds, and where:

- The lock is the kernel's (`flock` on an open file). It is gone the moment its owner is, however that
  ended. What a killed run leaves is a file with a note, which stops nobody, in whatever container or under
  whatever process number the next run starts. Threads of one process exclude each other as processes do.
- Among hosts that share a file system it holds where that system's flock does (NFS with its lock service,
  Lustre mounted with `flock`, GPFS, CephFS). Where locks stay on their own host, an owner is known by its
  heartbeat: it touches the file while it holds it, and the note of another host counts for as long as that
  goes on.
- On a file system without any flock the file itself is the lock. One that a killed run left has to be
  removed by hand there; the error says so.
- Who takes it puts back what a killed owner had moved aside (`atomic.py`), and warns once of what the file
  system lacks.
- It does not hold against programs that know nothing of it, nor after somebody has removed the file of a
  running one. On Windows, which has no flock, there is no lock.
"""

from __future__ import annotations

import errno
import glob
import os
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from . import lock_owner, say
from .atomic import NOT_SUPPORTED, lacks, restore_displaced
from .lock_owner import Owner

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

LOCK_FILE = ".fastunlearn.lock"  # in a folder; beside a file NAME it is .NAME.lock
NO_FLOCK = (errno.ENOLCK, *NOT_SUPPORTED)
ATTEMPTS = 1000  # each of them fails because another owner is leaving at this moment


class FolderLocked(RuntimeError):
    """Another run writes there. `owner` says which; None: it has not said."""

    def __init__(self, path: Path, owner: Owner | None, remedy: str = "wait for its end, or write elsewhere"):
        self.path, self.owner = path, owner
        named = "a process that has not said who it is" if owner is None else owner
        expected = "expected a place that no other run writes to"
        super().__init__(f"{path}: {expected}, got one held by {named}: {remedy}")


@contextmanager
def locked(folder: str | Path, work: str) -> Iterator[None]:
    """This thread alone writes to `folder` while the block lasts. Folders below are free.

    For a part of its work, which then has another name, the thread may enter again.

    The folder is made if it is missing, and removed again if nothing but the lock was put into it.

    Args:
        work: what the lock is held for, in a word, for those who find it held.

    Raises:
        FolderLocked: another process, another thread, or the same work of this one holds it.
        OSError: nothing can be written there; naming the folder.
    """
    folder = Path(folder).absolute()  # whatever folder the process works in when it ends
    with _held(folder / LOCK_FILE, folder, work, "*"):
        yield


@contextmanager
def locked_file(path: str | Path, work: str) -> Iterator[None]:
    """The same for one file: others in its folder may be written meanwhile."""
    path = Path(os.path.realpath(path))
    with _held(path.with_name(f".{path.name}.lock"), path, work, glob.escape(path.name)):
        yield


@dataclass
class _Lock:
    file: Path
    descriptor: int
    made: list[Path]  # folders that were missing, the innermost first
    works: list[str]  # what it is held for, the innermost last
    by_file: bool = False  # without flock: the file itself is the lock
    process: int = field(default_factory=os.getpid)
    thread: int = field(default_factory=threading.get_ident)
    leaving: threading.Event = field(default_factory=threading.Event)

    def beat(self) -> None:
        """Touches the file until the lock is given back."""
        while not self.leaving.wait(lock_owner.HEARTBEAT):
            with suppress(OSError, NotImplementedError):
                os.utime(self.file, follow_symlinks=False)


_locks: dict[tuple[int, int], _Lock] = {}  # those of this process, by device and inode of their file


@contextmanager
def _held(file: Path, target: Path, work: str, names: str) -> Iterator[None]:
    """The lock `file` is held for `target`, what is called like `names`, while the block lasts."""
    if fcntl is None:
        yield
        return
    with _naming(target):
        lock = _take(file, target, work)
    try:
        if lock.works == [work]:  # not where it is entered once more
            with _naming(target):
                _look_around(lock, names)
        yield
    finally:
        _give_back(lock)


@contextmanager
def _naming(target: Path) -> Iterator[None]:
    """Names `target` where the disk does not take what the block writes."""
    try:
        yield
    except OSError as error:
        text = f"{target}: expected a place that can be written to, got: {error.strerror}"
        raise OSError(error.errno, text) from error


_known: set[Path] = set()  # folders that were looked at


def _look_around(lock: _Lock, names: str) -> None:
    """Puts back what a killed owner had moved aside; warns of what the file system of the folder lacks."""
    folder = lock.file.parent
    restore_displaced(folder, names)
    if folder in _known:
        return
    _known.add(folder)
    missing = lacks(folder)
    if lock.by_file:
        missing.append(f"no locks (who is killed leaves {lock.file.name}, to be removed by hand)")
    if missing:
        say.log.warning("%s: this file system has %s", folder, "; ".join(missing))


def _take(file: Path, target: Path, work: str) -> _Lock:
    """Takes the lock, or enters it once more where this thread holds it for other work."""
    made: list[Path] = []
    for attempt in range(ATTEMPTS):
        try:
            made += _make_folders(file.parent)
            descriptor, created = _open(file)
        except (FileNotFoundError, FileExistsError):
            # Who left has just removed its file, or its empty folder: before `mkdir`, or between the two
            # halves of `exist_ok` (the folder was there, and then no longer is).
            if attempt == ATTEMPTS - 1:
                raise
            continue
        except OSError:
            _remove_empty(made)
            raise

        # This thread may hold it already. Then a second lock, on a descriptor of its own, would be refused.
        own = _locks.get(_identity(os.fstat(descriptor)))
        if own is not None and own.thread == threading.get_ident() and work not in own.works:
            os.close(descriptor)
            own.works.append(work)
            return own

        try:
            if _lock(descriptor, created, file, target):
                return _own(_Lock(file, descriptor, made, [work]))
        except BaseException:
            os.close(descriptor)
            _remove_empty(made)
            raise
        os.close(descriptor)
    raise OSError(errno.EBUSY, "the lock changes hands all the time")


def _open(file: Path) -> tuple[int, bool]:
    """A descriptor, which programs started from here do not inherit, and whether the file is new."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
    try:
        return os.open(file, flags | os.O_CREAT | os.O_EXCL, 0o666), True
    except FileExistsError:
        descriptor = os.open(file, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, f"{file.name} is not a regular file")
    return descriptor, False


def _lock(descriptor: int, created: bool, file: Path, target: Path) -> bool:
    """Whether the lock is ours now; False: its owner removed the file when it left, and another counts."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise FolderLocked(target, lock_owner.wait_for_note(descriptor)) from None
    except OSError as error:
        if error.errno not in NO_FLOCK:
            raise
        # No flock on this file system: who made the file has the lock.
        if created:
            return True
        remedy = f"wait for its end, or remove {file} if it was killed (without flock nothing tells)"
        raise FolderLocked(target, lock_owner.wait_for_note(descriptor), remedy) from None

    # Ours, as far as this host sees. An owner on another one may still be there, if locks stay on their host.
    left_by = lock_owner.read(descriptor)
    if left_by is not None and left_by.is_foreign and lock_owner.beats(file, left_by):
        raise FolderLocked(target, left_by)
    return _is_at(descriptor, file)


def _has_flock(descriptor: int) -> bool:
    """Of a file that this process has locked, which it may do again."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def _own(lock: _Lock) -> _Lock:
    """Says who holds it."""
    lock.by_file = not _has_flock(lock.descriptor)
    try:
        lock_owner.write(lock.descriptor, Owner.here(lock.works[0]))
        threading.Thread(target=lock.beat, name="fastunlearn lock", daemon=True).start()
    except BaseException:
        lock.file.unlink(missing_ok=True)
        raise
    _locks[_identity(os.fstat(lock.descriptor))] = lock
    return lock


def _give_back(lock: _Lock) -> None:
    if lock.process != os.getpid():  # a child that was forked inside the block, and has never held it
        return
    lock.works.pop()
    if lock.works:
        return
    del _locks[_identity(os.fstat(lock.descriptor))]
    lock.leaving.set()
    # The file goes while it is still locked. Who opened it before finds that out, and opens another.
    still_there = False
    with suppress(OSError):
        still_there = _is_at(lock.descriptor, lock.file)
        if still_there:
            lock.file.unlink()
            still_there = False
    _remove_empty(lock.made)
    with suppress(OSError):
        fcntl.flock(lock.descriptor, fcntl.LOCK_UN)
    os.close(lock.descriptor)
    # Some file systems remove no open file. One that is itself the lock nobody else has taken meanwhile.
    if still_there and lock.by_file:
        with suppress(OSError):
            lock.file.unlink()
        _remove_empty(lock.made)


def _forget_in_child() -> None:
    """A forked child shares the open file, and would go on holding the lock of a parent that was killed."""
    for lock in _locks.values():
        os.close(lock.descriptor)
    _locks.clear()


if fcntl is not None:
    os.register_at_fork(after_in_child=_forget_in_child)


def _identity(status: os.stat_result) -> tuple[int, int]:
    """Which file it is, whatever its name."""
    return status.st_dev, status.st_ino


def _is_at(descriptor: int, file: Path) -> bool:
    """Whether `file` is still the one that was opened."""
    try:
        return _identity(os.fstat(descriptor)) == _identity(os.lstat(file))
    except FileNotFoundError:
        return False


def _make_folders(folder: Path) -> list[Path]:
    """Makes `folder`; those that were missing, the innermost first."""
    missing = []
    for each in (folder, *folder.parents):
        if each.exists():
            break
        missing.append(each)
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Removes `folders`, the innermost first, as far as nothing is in them."""
    for folder in folders:
        with suppress(OSError):
            folder.rmdir()
