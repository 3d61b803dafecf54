"""How much room a disk has, asked before it is written to, and what is said when it is full."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .room import in_words

# A full disk, a quota that is used up, a file that is larger than `ulimit -f` or the file system allows.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def free_bytes(path: str | Path) -> int | None:
    """What the file system takes on which `path` lies, or would lie; None where it does not say.

    A quota of the user or of a project is not in this number: no call tells it on all file systems.
    """
    path = Path(os.path.abspath(path))
    for place in (path, *path.parents):
        try:
            return shutil.disk_usage(place).free
        except FileNotFoundError:  # its parent, then
            continue
        except OSError:
            return None
    return None


def require(path: str | Path, what: str, size: int) -> None:
    """Refuses to begin what the disk would not take to its end.

    Args:
        path: where it is to be written; it need not be there.
        what: in words, such as "a checkpoint".
        size: in bytes.

    Raises:
        OSError: less than `size` is free; with `errno` ENOSPC.
    """
    free = free_bytes(path)
    if free is not None and size > free:
        expected = f"{in_words(size)} of free disk for {what}"
        raise _error(errno.ENOSPC, f"{path}: expected {expected}, got {in_words(free)}")


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """In the block `path` is written to; that its disk is full is then said in one line."""
    try:
        yield
    except OSError as error:
        raise_if_full(error, path, Path(path))
        raise


def raise_if_full(error: Exception, path: str | Path, written: Path) -> None:
    """Says which file a full disk does not take, and how far it came.

    Args:
        error: what writing `path` has raised: an OSError, or safetensors' own word for one.
        written: where it was being written, a file or a folder.

    Raises:
        OSError: it was a full disk, a quota that is used up, or a limit on the size of files.
    """
    # safetensors says `... (os error 28)`.
    code, number = getattr(error, "errno", None), re.search(r"os error (\d+)", str(error))
    if code is None and number is not None:
        code = int(number[1])
    if code not in FULL:
        return
    reason = f"{os.strerror(code)} after {in_words(_size(written))} of it"
    free = free_bytes(path)
    if free is not None:
        reason += f", with {in_words(free)} free"
    raise _error(code, f"{path}: expected a disk that takes it, got: {reason}") from error


def _error(code: int, text: str) -> OSError:
    """With a number, and without `[Errno 28]` before the text."""
    error = OSError(text)
    error.errno = code
    return error


def _size(path: Path) -> int:
    """Of a file, or of all files below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.is_file())
