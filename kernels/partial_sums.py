"""How the kernels that add up a sample split it: one program for a small sample, else parts that a second
launch adds in a fixed order.
"""

from __future__ import annotations

TINY = 4096  # elements of a sample that one program does alone
PARTS = 128  # partial sums read at a time


def tile_of(elements: int) -> tuple[int, int]:
    """Elements and warps of a program: one program for a tiny sample (one launch), else 8 elements a thread,
    which share the reductions of a program.
    """
    if elements <= 1024:
        return 1024, 8
    return (4096, 16) if elements <= TINY else (2048, 8)
