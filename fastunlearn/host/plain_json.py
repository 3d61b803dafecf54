"""JSON, and short texts, that somebody else may have written.

Regular files alone are opened, and errors are of one kind.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

LONGEST = 1 << 28  # bytes; a manifest of a large checkpoint has some thousand


def read_json(path: str | Path) -> Any:
    """What `path` holds.

    Raises:
        ValueError: as `read_bytes`, or it holds no JSON, or JSON that is nested too deeply.
    """
    content = read_bytes(path, LONGEST)
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise ValueError(f"text that is no JSON: {error}") from None


def read_bytes(path: str | Path, longest: int) -> bytes:
    """What `path` holds.

    Raises:
        ValueError: there is no such file, it is none that can be read (a pipe would wait for a writer), or it
            has more than `longest` bytes. The message does not name the file.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError as error:
        raise ValueError(error.strerror) from None
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise ValueError("no regular file")
    with open(descriptor, "rb") as file:
        if status.st_size > longest:
            raise ValueError(f"{status.st_size} bytes, which is no text of ours")
        return file.read()
