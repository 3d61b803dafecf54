"""Files and folders that are written whole or not at all: aside, fsynced, renamed.

What stands aside is called `.NAME.PID-TOKEN.tmp`. Nobody can foresee the token, so nobody can put a link
there that would be followed. What a writer leaves behind when it is killed is removed by the next one of that
name.
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
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


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
                file.chmod(0o700 if file.is_dir() else 0o600)
            _fsync(file)
        _fsync(temporary)
        # A folder cannot replace one that is not empty. Where the two cannot be exchanged in one step, the
        # old one is moved aside first; `restore_displaced` puts it back if the process dies in between.
        if not path.exists():
            os.replace(temporary, path)
        elif not exchange(temporary, path):
            os.replace(path, displaced)
            os.replace(temporary, path)
        _fsync(path.parent)
    except SafetensorError as error:  # its word for what the disk says
        raise OSError(f"{path}: expected a disk that takes it, got: {error}") from error
    finally:
        _written_aside.difference_update((temporary.name, displaced.name))
        remove_leftovers(path.parent, glob.escape(path.name))


@contextmanager
def atomic_file(path: str | Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place, fsynced, when the block ends without an error.

    Until then nobody else may read it. Then it has `mode`, less the umask.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        what = "a folder" if path.is_dir() else "a pipe, a socket or a device"
        raise OSError(errno.EINVAL, f"expected a file, or nothing yet, got {what}", str(path))
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = _aside(path, "tmp")
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        with open(os.open(temporary, flags, 0o600), "wb") as file:
            yield file
            file.flush()
            os.fchmod(file.fileno(), mode & ~_umask())
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say for what
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)
        _written_aside.discard(temporary.name)


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


def exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step (Linux' `renameat2`); False where the system or the file system cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:  # a C library older than the call
        return False
    if rename(AT_FDCWD, os.fsencode(first), AT_FDCWD, os.fsencode(second), RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(second))


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
    return [path for path in named if not _writer_lives(path)]


def _target_name(leftover: Path) -> str:
    """The NAME of `.NAME.PID-TOKEN.suffix`, or of `.NAME.PID.suffix`, as earlier versions called it."""
    return leftover.name[1:].rsplit(".", 2)[0]


def _writer_lives(leftover: Path) -> bool:
    """Whether it is being written: by this process, or by another one whose number stands in the name."""
    number, _, _ = leftover.name.rsplit(".", 2)[1].partition("-")
    if not re.fullmatch("[0-9]{1,10}", number):
        return False
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


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
