"""What a launcher refuses, and what it may compile: the records that `scripts/aot_check.py` compiles without
a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from triton.runtime import JITFunction

# a * b + c in one rounding; the default depends on the version of Triton
COMPILE_OPTIONS = {"enable_fp_fusion": True}

LARGEST_IMAGE = 2**31 - 2**14  # elements; no tile is larger than 2^14

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
    # a thread may have; None: as many as the compiler thinks good for occupancy
    max_registers: int | None = None
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
    """Signature and constants of pointer arguments: what is None is a compile-time constant, as at a launch."""
    given = {name: "*" + _TYPES[dtype] for name, dtype in dtypes.items() if dtype is not None}
    return given, {name: None for name, dtype in dtypes.items() if dtype is None}


def refuse_beyond_int32(op: str, elements: int) -> None:
    """The kernels number the elements of an image, up to the end of its last tile, with 32 bits."""
    if elements > LARGEST_IMAGE:
        expected = f"images of at most {LARGEST_IMAGE} elements on a GPU"
        raise ValueError(f"{op}: expected {expected}, got {elements}")


def refuse_float64(op: str, **images: Tensor | None) -> None:
    """The kernels compute in float32: float64 images are for plain torch."""
    for name, image in images.items():
        if image is not None and image.dtype == torch.float64:
            raise TypeError(
                f"{op}: {name}: expected float16, bfloat16, float32 or uint8 on a GPU, got torch.float64"
            )
