"""How the kernels that add up a sample split it.

A small sample is one program's work. A larger one is added up in parts, which a second launch adds in a fixed
order, so that the same inputs give the same bits.
"""

from __future__ import annotations

TINY = 4096  # elements of a sample that one program does alone
PARTS = 128  # partial sums read at a time


def tile_of(elements: int) -> tuple[int, int]:
    """Elements and warps of a program, for samples of `elements`."""
    # One program for a tiny sample: no second launch.
    if elements <= 1024:
        return 1024, 8
    if elements <= TINY:
        return 4096, 16
    # 8 elements a thread, which share the reductions of a program.
    return 2048, 8
