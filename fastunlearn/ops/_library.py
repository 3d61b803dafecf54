"""The torch.library namespace of the ops, and the choice of backend."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable

import torch

BACKENDS = ("eager", "reference")
LIBRARY = torch.library.Library("fastunlearn", "DEF")


def define(name: str, signature: str, eager: Callable, fake: Callable) -> Callable:
    """Registers `fastunlearn::<name>` with its schema, its eager closed form for every device, and its fake kernel.

    Ops keep their own precision: a caller's autocast ends at their door, or weights and targets would lose four digits.
    """

    @functools.wraps(eager)
    def exact(first, *rest):
        with torch.autocast(first.device.type, enabled=False):
            return eager(first, *rest)

    LIBRARY.define(name + signature)
    LIBRARY.impl(name, exact, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunlearn::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.fastunlearn, name).default


def reference_wanted() -> bool:
    """Whether `FASTUNLEARN_BACKEND=reference` asks for the literal formulas in place of the ops.

    Raises:
        ValueError: the variable names no backend.
    """
    backend = os.environ.get("FASTUNLEARN_BACKEND") or "eager"
    if backend not in BACKENDS:
        raise ValueError(f"FASTUNLEARN_BACKEND: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    return backend == "reference"


def per_row(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """`values` `[B]` in the dtype of `like` `[B, ...]`, shaped to broadcast against it."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))
