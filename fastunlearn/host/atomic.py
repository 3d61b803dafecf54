"""Files and folders that are written whole or not at all: aside, fsynced, renamed.

What stands aside is called `.NAME.PID-TOKEN.tmp`. Nobody can foresee the token, so nobody can put a link
there that would be followed. What a writer leaves behind when it is killed is removed by the next one of that
name.

File systems of others' machines (CIFS, sshfs, shared folders of VirtualBox) lack some of what this takes.
Then it goes without: without fsync at the mercy of the power, without file modes at that of the mount. Where
a name that is there cannot be taken over in one step, what has it is moved aside first, to
`.NAME.PID-TOKEN.old`, and removed last: it is never lost, and who takes the folder's lock after a kill in
between puts it back. `lacks` tries out what a folder has.
"""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import glob
import os
import re
import secrets
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from .disk import raise_if_full

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h
# What a file system answers to a call that it does not have. Not EIO: that is a disk which fails.
NOT_SUPPORTED = (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0)  # Windows has no such links


@contextmanager
def atomic_directory(path: str | Path, *, private: bool = False) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, fsynced, when the block ends without an error.

    Nothing changes otherwise.

    Args:
        private: the folder (0700) and its files (0600) are its owner's alone, from the first byte on.

    Raises:
        OSError: the disk does not take it (full, a limit of size).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary, displaced = _aside(path, "tmp"), _aside(path, "old")
    temporary.mkdir(mode=0o700 if private else 0o777)
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            if private:
                close_to_others(file)
            _sync(file)
        _sync(temporary)
        # A folder cannot replace one that is not empty; but two can be exchanged.
        if not path.exists() or not exchange(temporary, path):
            _take_place(temporary, path, displaced)
        _sync(path.parent)
    except SafetensorError as error:  # its word for what the disk says
        raise_if_full(error, path, temporary)
        raise OSError(f"{path}: expected a disk that takes it, got: {error}") from error
    except OSError as error:
        raise_if_full(error, path, temporary)
        raise
    finally:
        _written_aside.difference_update((temporary.name, displaced.name))
        remove_leftovers(path.parent, glob.escape(path.name))


@contextmanager
def atomic_file(path: str | Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place, fsynced, when the block ends without an error.

    Until then nobody else may read it. Then it has `mode`, less the umask.
    """
    path = Path(path)
    other = in_the_way(path)
    if other is not None:
        raise OSError(errno.EINVAL, f"expected a file, or nothing yet, got {other}", str(path))
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary, displaced = _aside(path, "tmp"), _aside(path, "old")
    try:
        with open(os.open(temporary, NEW_FILE, 0o600), "wb") as file:
            yield file
            file.flush()
            _set_mode(file.fileno(), mode & ~_umask())
            sync(file.fileno())
        _take_place(temporary, path, displaced)
    except OSError as error:
        raise_if_full(error, path, temporary)
        if error.errno is not None and error.filename is None:  # a failed write does not say of what
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _written_aside.difference_update((temporary.name, displaced.name))
        restore_displaced(path.parent, glob.escape(path.name))


def in_the_way(path: Path) -> str | None:
    """What there is, in words, where no file could take its place; None: a file, or nothing."""
    if path.is_file() or not path.exists():
        return None
    return "a folder" if path.is_dir() else "a pipe, a socket or a device"


# What this process writes at this moment, by names that are its own.
_written_aside: set[str] = set()
_umask_is_asked = threading.Lock()


def _aside(path: Path, kind: str) -> Path:
    """`.NAME.PID-TOKEN.kind` beside `path`; the process counts as its writer from now on."""
    aside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(8)}.{kind}")
    _written_aside.add(aside.name)
    return aside


def _umask() -> int:
    """The bits that new files of this process do not get."""
    # No call asks without setting. What another thread makes meanwhile is its own alone.
    with _umask_is_asked:
        umask = os.umask(0o077)
        os.umask(umask)
    return umask


def discard(path: Path) -> None:
    """Removes a file, a link or a folder; under its own name it is whole until it is gone."""
    aside = _aside(path, "tmp")
    os.replace(path, aside)
    _remove(aside)
    _written_aside.discard(aside.name)


def _remove(path: Path) -> None:
    """A link goes, and what it leads to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _take_place(temporary: Path, path: Path, displaced: Path) -> None:
    """Renames `temporary` to `path`. Where that cannot take over a name, what has it is moved aside first.

    `restore_displaced` puts it back where this ends in between.
    """
    try:
        os.replace(temporary, path)
    except OSError:
        if not os.path.lexists(path):
            raise
        os.replace(path, displaced)
        os.replace(temporary, path)
        _remove(displaced)


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux' `renameat2`); False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library older than the call
        return False
    # Whatever the reason: where there is one that counts, renaming gives it, too.
    return rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0


def restore_displaced(parent: Path, pattern: str) -> None:
    """Puts back a folder that its writer had moved aside when it died, with nothing in its place yet."""
    for displaced in _leftovers(parent, pattern, "old"):
        target = parent / _target_name(displaced)
        if not target.exists():
            os.replace(displaced, target)


def remove_leftovers(parent: Path, pattern: str) -> None:
    """Removes what an earlier write of the folders named like `pattern` left behind."""
    restore_displaced(parent, pattern)
    for suffix in ("tmp", "old"):
        for leftover in _leftovers(parent, pattern, suffix):
            _remove(leftover)


def _leftovers(parent: Path, pattern: str, suffix: str) -> list[Path]:
    """`.NAME.PID-TOKEN.suffix` in `parent` with a NAME like `pattern`, which nobody writes any more."""
    found = parent.glob(f".*.*.{suffix}")
    named = [path for path in found if fnmatch.fnmatchcase(_target_name(path), pattern)]
    ours = [path for path in named if re.fullmatch("[0-9]{1,10}(-[0-9a-f]+)?", _writer(path))]
    return [path for path in ours if not _writer_lives(path)]


def _target_name(leftover: Path) -> str:
    """The NAME of `.NAME.PID-TOKEN.suffix`, or of `.NAME.PID.suffix`, as earlier versions called it."""
    return leftover.name[1:].rsplit(".", 2)[0]


def _writer(leftover: Path) -> str:
    """The PID-TOKEN of the name, or its PID."""
    return leftover.name.rsplit(".", 2)[1]


def _writer_lives(leftover: Path) -> bool:
    """Whether it is being written: by this process, or by another one whose number stands in the name."""
    number, _, _ = _writer(leftover).partition("-")
    # In a container, processes often have the number that a dead one had.
    if int(number) == os.getpid():
        return leftover.name in _written_aside
    try:
        os.kill(int(number), 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # runs, under another user
        return True
    return True


# --- file systems that have less ----------------------------------------------------------------------------


def sync(descriptor: int) -> bool:
    """What is written to `descriptor` is on the disk when this returns; False: the file system cannot say so.

    Raises:
        OSError: the disk fails, or is full.
    """
    return _supported(os.fsync, descriptor)


def _sync(path: Path) -> bool:
    """The same for a file or folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        return sync(descriptor)
    finally:
        os.close(descriptor)


def _set_mode(descriptor: int, mode: int) -> None:
    # Mounts that give all files one mode say that it is not permitted to change it.
    _supported(os.fchmod, descriptor, mode, but=(errno.EPERM,))


def close_to_others(path: Path) -> None:
    """Leaves a folder (0700), or a file (0600), to its owner alone, where the file system has such modes."""
    _supported(os.chmod, path, 0o700 if path.is_dir() else 0o600, but=(errno.EPERM,))


def _supported(call: Callable[..., None], *arguments: int | Path, but: tuple[int, ...] = ()) -> bool:
    """Calls it; False where the file system does not have it, or answers with an error in `but`."""
    try:
        call(*arguments)
    except OSError as error:
        if error.errno not in (*NOT_SUPPORTED, *but):
            raise
        return False
    return True


def lacks(folder: Path) -> list[str]:
    """What the file system of `folder` does not do, each with what that costs: tried out with small files.

    Raises:
        OSError: nothing can be written there.
    """
    remove_leftovers(folder, "probe")  # of one that was killed while it tried
    first, second = _aside(folder / "probe", "tmp"), _aside(folder / "probe", "tmp")
    missing = []
    try:
        synced = [_written_and_synced(file) for file in (first, second)]
        if not all(synced) or not _sync(folder):
            missing.append("no fsync (what was written last may be lost when the power fails)")
        if stat.S_IMODE(second.stat().st_mode) & 0o077:
            missing.append("no file modes (private files are readable by whoever may read the folder)")
        try:
            os.replace(first, second)
        except OSError:
            missing.append("no renaming over a file (a kill in the wrong instant leaves the old one aside)")
    finally:
        for file in (first, second):
            file.unlink(missing_ok=True)
            _written_aside.discard(file.name)
    return missing


def _written_and_synced(file: Path) -> bool:
    with open(os.open(file, NEW_FILE, 0o600), "wb") as opened:
        opened.write(b"probe")
        opened.flush()
        return sync(opened.fileno())
