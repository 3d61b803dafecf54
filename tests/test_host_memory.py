"""What `keep_freed_memory` does to a process, by malloc's own books, in processes of their own.

malloc knows to the byte how much memory it holds of the system. The kernel's own counters are rough: they are
collected in batches, and pages come and go with huge pages and with what other processes need.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys

import pytest

from fastunlearn.host import memory

MEGABYTE = 1 << 20

# Allocates 64 MB and frees them, again and again as steps do.
# Reports what malloc holds of the system at the start, and in the last round: before the allocations, with
# them, after them. Not aligned, as torch's are: glibc before 2.38 may not fit an aligned block into one just
# like it that was freed, by where small blocks happen to lie in between. Without torch, whose import would
# take most of the time.
PROGRAM = """
import ctypes, importlib.util, json, sys

how, file = sys.argv[1:]
spec = importlib.util.spec_from_file_location("memory", file)
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
libc = ctypes.CDLL(None)
libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
libc.free.argtypes = [ctypes.c_void_p]

FIELDS = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"  # malloc.h

class Books(ctypes.Structure):
    _fields_ = [(name, ctypes.c_size_t) for name in FIELDS.split()]

libc.mallinfo2.restype = Books

def held():
    books = libc.mallinfo2()
    return books.arena + books.hblkhd

start = held()
kept = memory.keep_freed_memory() if how == "kept" else None
for _ in range(8):
    before = held()
    blocks = [libc.malloc(8 << 20) for _ in range(8)]
    assert all(blocks)
    full = held()
    for block in blocks:
        libc.free(block)
print(json.dumps({"kept": kept, "start": start, "before": before, "full": full, "after": held()}))
"""


def measure(how: str) -> dict:
    # Without what sets malloc up, or puts another one in its place.
    others = "MALLOC_", "GLIBC_TUNABLES", "LD_PRELOAD"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(others)}
    command = [sys.executable, "-c", PROGRAM, how, memory.__file__]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


has_books = sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallinfo2")


@pytest.mark.skipif(not has_books, reason="needs mallinfo2 of glibc 2.33")
def test_what_is_freed_is_kept_and_the_system_is_asked_for_no_more():
    default, kept = measure("default"), measure("kept")
    assert default["full"] - default["before"] > 32 * MEGABYTE  # of 64: malloc keeps a little
    assert default["full"] - default["after"] > 32 * MEGABYTE
    assert kept["kept"] is True
    assert kept["before"] == kept["full"] == kept["after"]
    assert kept["after"] - kept["start"] > 32 * MEGABYTE  # its price


@pytest.mark.parametrize(("system", "libc"), [("darwin", None), ("linux", object())])
def test_another_malloc_is_left_alone(monkeypatch, system, libc):
    monkeypatch.setattr(memory.sys, "platform", system)
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: libc)
    assert memory.keep_freed_memory() is False


@pytest.mark.parametrize("refused", [memory._M_TRIM_THRESHOLD, memory._M_MMAP_MAX])
def test_a_refusal_is_said(monkeypatch, refused):
    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            return int(option != refused)

    monkeypatch.setattr(memory.sys, "platform", "linux")
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library())
    assert memory.keep_freed_memory() is False
