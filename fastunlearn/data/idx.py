"""idx files, MNIST's format: a four-byte magic number, big-endian axis lengths, then the bytes; plain or
gzipped.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path

import numpy as np

# uint8 in one (labels), three (grey images) or four axes
MAGICS = (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03", b"\x00\x00\x08\x04")


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array in an idx file: uint8 `[N]`, `[N, H, W]` or as many axes as the file says.

    A plain file is memory-mapped, read-only.

    Raises:
        ValueError: not an idx file of uint8, or fewer or more bytes than its header says.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            magic = file.read(4)
            if magic not in MAGICS:
                raise ValueError(
                    f"{path}: expected an idx file of uint8 (magic number 00 00 08 and 01, 03 or 04), got {magic.hex(' ') or 'an empty file'}"
                )
            header = file.read(4 * magic[3])
            if len(header) < 4 * magic[3]:
                raise ValueError(
                    f"{path}: expected {magic[3]} axis lengths after the magic number, got {len(header)} bytes"
                )
            shape = struct.unpack(f">{magic[3]}I", header)
            offset, expected = 4 + len(header), math.prod(shape)
            if not _is_gzip(path):
                found = path.stat().st_size - offset
            else:
                content = file.read(expected + 1)  # never more than the header announces
                found = len(content)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got one that is damaged ({error})") from None
    if found != expected:
        raise ValueError(
            f"{path}: expected {expected} bytes for shape {list(shape)}, got {'more' if found > expected else found}"
        )
    if expected == 0:
        raise ValueError(f"{path}: expected at least one entry, got shape {list(shape)}")
    if _is_gzip(path):
        return np.frombuffer(content, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=shape)


def idx_header(shape: tuple[int, ...]) -> bytes:
    """The header of an idx file of uint8 with `shape`."""
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)


def _open(path: Path):
    return gzip.open(path) if _is_gzip(path) else open(path, "rb")


def _is_gzip(path: Path) -> bool:
    return path.suffix == ".gz"
