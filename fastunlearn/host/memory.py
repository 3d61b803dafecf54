"""Memory of the CPU: keep what a step frees for the next step."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h


def keep_freed_memory() -> bool:
    """Makes glibc's malloc keep what the process frees; False where malloc is not glibc's.

    A training step on a CPU frees all its activations and allocates them again. By default malloc returns
    large blocks to the system, which has to find, clear and map every page anew: 51,000 page faults a step
    (the papers' MNIST network, batch 16, forward, backward and AdamW). Kept memory has none, and the step
    takes 0.89 to 0.93 of the time (Zen 5, one and two threads, processes taking turns on a busy machine;
    bench/results/ladder.md).

    The price: the process gives no memory back, so that it holds the most it ever needed. And it concerns the
    whole process, which is why only the commands do it by themselves, on CPUs. A program that uses the
    library calls this once, before its first large tensor.
    """
    if sys.platform != "linux":
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):  # musl
        return False
    # Not M_MMAP_THRESHOLD: glibc takes none above 32 MiB, and an activation may be larger.
    return bool(libc.mallopt(_M_TRIM_THRESHOLD, -1) and libc.mallopt(_M_MMAP_MAX, 0))
