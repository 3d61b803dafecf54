"""idx files, MNIST's format, plain or gzipped.

A four-byte magic number (its last byte counts the axes) is followed by big-endian axis lengths and the bytes.
"""

from __future__ import annotations

import gzip
import math
import os
import struct
import zlib
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..host import room

# Deflate, the method of gzip, makes at most so many bytes of one.
MOST_OF_ONE = 1032
# The third byte, 08, says uint8; the fourth one axis (labels), three (grey images) or four.
MAGICS = (b"\x00\x00\x08\x01", b"\x00\x00\x08\x03", b"\x00\x00\x08\x04")


def read_idx(path: str | os.PathLike) -> np.ndarray:
    """The array in an idx file: uint8 `[N]`, `[N, H, W]` or as many axes as the file says.

    A plain file is memory-mapped, read-only.

    Raises:
        ValueError: not an idx file of uint8, fewer or more bytes than its header says, or more than fit into
            memory.
    """
    path = Path(path)
    try:
        with _open(path) as file:
            shape, offset = _read_header(file, path)
            expected = math.prod(shape)
            if _is_gzip(path):
                packed = path.stat().st_size
                if expected > MOST_OF_ONE * packed:
                    got = f"a gzip file of {packed}, which cannot hold them"
                    raise ValueError(f"{path}: expected {expected} bytes for shape {list(shape)}, got {got}")
                room.require_for(path, "an array", expected)
                # One byte more than the header announces tells that there are too many. Reading all there is
                # could fill the memory: a small gzip file may unpack to anything.
                content = file.read(expected + 1)
                found = len(content)
            else:
                found = path.stat().st_size - offset
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: expected a whole gzip file, got one that is damaged ({error})") from None
    if found != expected:
        got = "more" if found > expected else found
        raise ValueError(f"{path}: expected {expected} bytes for shape {list(shape)}, got {got}")
    if expected == 0:
        raise ValueError(f"{path}: expected at least one entry, got shape {list(shape)}")
    if _is_gzip(path):
        return np.frombuffer(content, np.uint8).reshape(shape)
    return np.memmap(path, np.uint8, mode="r", offset=offset, shape=shape)


def idx_header(shape: tuple[int, ...]) -> bytes:
    """The header of an idx file of uint8 with `shape`."""
    return struct.pack(f">4B{len(shape)}I", 0, 0, 8, len(shape), *shape)


def _read_header(file: BinaryIO, path: Path) -> tuple[tuple[int, ...], int]:
    """Shape and place of the bytes; errors call the file `path`."""
    magic = file.read(4)
    if magic not in MAGICS:
        expected = "an idx file of uint8 (magic number 00 00 08 and 01, 03 or 04)"
        raise ValueError(f"{path}: expected {expected}, got {magic.hex(' ') or 'an empty file'}")
    axes = magic[3]
    lengths = file.read(4 * axes)
    if len(lengths) < 4 * axes:
        expected = f"{axes} axis lengths after the magic number"
        raise ValueError(f"{path}: expected {expected}, got {len(lengths)} bytes")
    return struct.unpack(f">{axes}I", lengths), len(magic) + len(lengths)


def _open(path: Path):
    if _is_gzip(path):
        return gzip.open(path)
    return open(path, "rb")


def _is_gzip(path: Path) -> bool:
    return path.suffix == ".gz"
