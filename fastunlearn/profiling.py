"""Names for the profilers: the six stages of a step, as `record_function` spans and, with FASTUNLEARN_NVTX=1, NVTX ranges."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch


def stage(name: str):
    """A context that names its block `name` for the torch profiler and NVTX; nothing at all unless FASTUNLEARN_NVTX=1."""
    return _named(name) if os.environ.get("FASTUNLEARN_NVTX", "0") not in ("", "0") else nullcontext()


@contextmanager
def _named(name: str) -> Iterator[None]:
    import nvtx

    with nvtx.annotate(name, domain="fastunlearn"), torch.profiler.record_function(f"fastunlearn::{name}"):
        yield
