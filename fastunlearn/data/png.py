"""Whether a PNG file has all of its rows: Pillow leaves those that are missing at zero."""

from __future__ import annotations

import struct
import zlib
from typing import BinaryIO

SIGNATURE_LENGTH = 8
CHANNELS = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}  # by colour type
# Adam7, the interlacing of PNG: first column and row of each pass, and their steps.
PASSES = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
PIECE = 1 << 16  # bytes that are read, or unpacked, at a time


def expected_bytes(header: bytes) -> int:
    """Bytes that the pixels of a PNG unpack to, by the 13 bytes of its chunk IHDR (PNG, section 7.2)."""
    width, height, bits, colour_type, _, _, interlaced = struct.unpack(">2I5B", header)
    bits_of_pixel = bits * CHANNELS[colour_type]
    passes = PASSES if interlaced else ((0, 0, 1, 1),)
    total = 0
    for first_column, first_row, column_step, row_step in passes:
        columns = -(-(width - first_column) // column_step)
        rows = -(-(height - first_row) // row_step)
        # Each row begins with a byte that names its filter. A pass without columns has no rows either.
        if columns > 0 and rows > 0:
            total += rows * (1 + -(-columns * bits_of_pixel // 8))
    return total


def has_all_rows(file: BinaryIO) -> bool:
    """Whether the pixels in a PNG, which has been verified, are as many as its header says.

    Unpacks them piece by piece, and keeps none. The position of `file` is left as it was.
    """
    before = file.tell()
    file.seek(SIGNATURE_LENGTH)
    unpacked, wanted, unpack = 0, 0, zlib.decompressobj()
    while len(head := file.read(8)) == 8:
        length, kind = struct.unpack(">I4s", head)
        if kind == b"IHDR":
            wanted = expected_bytes(file.read(length))
        elif kind == b"IDAT":
            unpacked += _unpacked_bytes(file, length, unpack)
        else:
            file.seek(length, 1)
        file.seek(4, 1)  # the checksum
    file.seek(before)
    return unpacked >= wanted > 0


def _unpacked_bytes(file: BinaryIO, length: int, unpack) -> int:
    """How many bytes the next `length` of `file` unpack to."""
    unpacked = 0
    while length:
        packed = file.read(min(length, PIECE))
        if not packed:
            break
        length -= len(packed)
        while packed:
            unpacked += len(unpack.decompress(packed, PIECE))
            packed = unpack.unconsumed_tail
    return unpacked
