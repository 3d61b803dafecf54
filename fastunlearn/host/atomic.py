"""Files and folders that are written whole or not at all: aside, fsynced, renamed."""

from __future__ import annotations

import ctypes
import errno
import fnmatch
import glob
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

AT_FDCWD, RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def atomic_directory(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place, fsynced, when the block ends without an error.

    Nothing changes otherwise.

    Raises:
        OSError: the disk does not take it (full, a limit of size).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(path.parent, glob.escape(path.name))
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in sorted(temporary.rglob("*")):
            _fsync(file)
        _fsync(temporary)
        # A folder cannot replace one that is not empty. Where the two cannot be exchanged in one step, the
        # old one is moved aside first; `restore_displaced` puts it back if the process dies in between.
        if not path.exists():
            os.replace(temporary, path)
        elif not exchange(temporary, path):
            os.replace(path, path.with_name(f".{path.name}.{os.getpid()}.old"))
            os.replace(temporary, path)
        _fsync(path.parent)
    except SafetensorError as error:  # its word for what the disk says
        raise OSError(f"{path}: expected a disk that takes it, got: {error}") from error
    finally:
        remove_leftovers(path.parent, glob.escape(path.name))


@contextmanager
def atomic_file(path: str | Path, *, mode: int = 0o666) -> Iterator[BinaryIO]:
    """A temporary file beside `path` that takes its place, fsynced, when the block ends without an error.

    It is made with `mode`, less the umask.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.errno is not None and error.filename is None:  # a full disk does not say for what
            error.filename = str(path)
        raise
    finally:
        temporary.unlink(missing_ok=True)


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
            shutil.rmtree(leftover)


def _leftovers(parent: Path, pattern: str, suffix: str) -> list[Path]:
    """`.NAME.PID.suffix` in `parent` with a NAME like `pattern`, and no other process PID that still runs."""
    found = parent.glob(f".*.*.{suffix}")
    named = [path for path in found if fnmatch.fnmatchcase(_target_name(path), pattern)]
    return [path for path in named if not _writer_lives(path)]


def _target_name(leftover: Path) -> str:
    """The NAME of `.NAME.PID.suffix`."""
    return leftover.name[1:].rsplit(".", 2)[0]


def _writer_lives(leftover: Path) -> bool:
    """Whether the process whose number stands in the name is another one that runs."""
    number = leftover.name.rsplit(".", 2)[1]
    if not number.isdigit() or int(number) == os.getpid():
        return False
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
