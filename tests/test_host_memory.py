"""What `keep_freed_memory` does to a process: page faults, counted by the kernel, in processes of their own."""

from __future__ import annotations

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from fastunlearn import host_memory

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")
MEGABYTE = 1 << 20

# Allocates 64 MB as torch's CPU allocator does, fills and frees them, again and again as steps do, and counts what the kernel had to do in the last
# round. Without torch, whose import would take most of the time.
PROGRAM = """
import ctypes, importlib.util, json, resource, sys

how, file = sys.argv[1:]
spec = importlib.util.spec_from_file_location("host_memory", file)
host_memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(host_memory)
libc = ctypes.CDLL(None)
libc.free.argtypes = [ctypes.c_void_p]

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def filled(size):
    block = ctypes.c_void_p()
    assert libc.posix_memalign(ctypes.byref(block), ctypes.c_size_t(64), ctypes.c_size_t(size)) == 0
    ctypes.memset(block, 1, size)
    return block

kept = host_memory.keep_freed_memory() if how == "kept" else None
for _ in range(8):
    before = faults()
    for block in [filled(8 << 20) for _ in range(8)]:
        libc.free(block)
    last = faults() - before
print(json.dumps({"kept": kept, "faults": last, "left": resident()}))
"""


def measure(how: str) -> dict:
    return json.loads(subprocess.run([sys.executable, "-c", PROGRAM, how, host_memory.__file__], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
@pytest.mark.skipif(HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text(), reason="this kernel gives everybody huge pages: few faults to save")
def test_what_is_freed_is_kept_and_costs_no_page_faults():
    default, kept = measure("default"), measure("kept")
    assert default["faults"] > 32 * MEGABYTE / resource.getpagesize()  # most of its pages; malloc keeps a little
    assert kept["kept"] is True
    assert kept["faults"] < default["faults"] / 20
    assert kept["left"] > default["left"] + 32 * MEGABYTE  # its price


@pytest.mark.parametrize(("system", "libc"), [("darwin", None), ("linux", object())])
def test_another_malloc_is_left_alone(monkeypatch, system, libc):
    monkeypatch.setattr(host_memory.sys, "platform", system)
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: libc)
    assert host_memory.keep_freed_memory() is False


@pytest.mark.parametrize("refused", [host_memory._M_TRIM_THRESHOLD, host_memory._M_MMAP_MAX])
def test_a_refusal_is_said(monkeypatch, refused):
    class Library:
        @staticmethod
        def mallopt(option: int, value: int) -> int:
            return int(option != refused)

    monkeypatch.setattr(host_memory.sys, "platform", "linux")
    monkeypatch.setattr(host_memory.ctypes, "CDLL", lambda name: Library())
    assert host_memory.keep_freed_memory() is False
