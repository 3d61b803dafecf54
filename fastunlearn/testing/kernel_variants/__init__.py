"""What the launchers of `kernels/` may compile: one record for each form of a kernel.

`scripts/aot_check.py` compiles them all without a GPU, and `tests/jit_calls.py` compares them with what
Triton's JIT makes of real calls. `configurations()` of `<op>.py` here lists what the launcher in
`kernels/<op>.py` can choose: one representative for each class of shapes and types.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from triton.runtime import JITFunction

_TYPES = {
    torch.bool: "u1",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
}

_ITEMSIZES = {"*" + name: dtype.itemsize for dtype, name in _TYPES.items()}


class Vectors(NamedTuple):
    """Which planes (images, noise, results: `D` elements a row) a thread accesses several elements at a time.

    `scripts/aot_check.py` holds the compiler to it: every such access is as wide as `run` elements, at most
    16 bytes. Planes whose layout forbids it (channels last, a length that is no multiple of 16) are left out.
    """

    run: int  # consecutive elements of a thread
    reads: dict[str, int]  # argument -> rows that a program reads of it
    writes: tuple[str, ...]


class Variant(NamedTuple):
    """One compiled form of a kernel: argument types, compile-time constants and launch options.

    The check takes pointers as aligned to 16 bytes, which is what torch allocates, except those named in
    `unaligned`; of the integers, only those named in `divisible` are taken as divisible by 16, as Triton
    finds at a launch. Every argument stands in `signature` or in `constants`.
    """

    kernel: JITFunction
    label: str  # shape class and dtypes, for a row of docs/kernels.md; unique per kernel
    signature: dict[str, str]  # run-time argument -> Triton type: "*u8", "i32", "fp64"
    constants: dict[str, object]  # compile-time argument -> value; None for a pointer that is not given
    num_warps: int
    num_stages: int = 1
    max_registers: int | None = None  # of a thread; None: what the compiler thinks good for occupancy
    divisible: tuple[str, ...] = ()
    unaligned: tuple[str, ...] = ()
    vectors: Vectors | None = None  # None: no plane is accessed in vectors

    def aligned(self) -> list[str]:
        """Arguments that the compiler takes as divisible by 16."""
        divisible = []
        for name, kind in self.signature.items():
            pointer = kind.startswith("*") and name not in self.unaligned
            if pointer or name in self.divisible:
                divisible.append(name)
        return divisible

    def itemsize(self, name: str) -> int:
        """Bytes of an element of the pointer argument `name`."""
        return _ITEMSIZES[self.signature[name]]


def pointers(**dtypes: torch.dtype | None) -> tuple[dict[str, str], dict[str, None]]:
    """Signature and constants of pointer arguments: None is a compile-time constant, as at a launch."""
    given = {name: "*" + _TYPES[dtype] for name, dtype in dtypes.items() if dtype is not None}
    return given, {name: None for name, dtype in dtypes.items() if dtype is None}
