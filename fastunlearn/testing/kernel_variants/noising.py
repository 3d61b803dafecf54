"""The forms of the kernels of noising that `scripts/aot_check.py` compiles."""

from __future__ import annotations

import torch

from ...kernels.noising import WARPS, block_of, noising_kernel
from . import Variant, Vectors, pointers


def configurations() -> list[Variant]:
    """What `noising` can launch."""
    u8, f32, bf16 = torch.uint8, torch.float32, torch.bfloat16
    alone = "D > 16384, bfloat16, noise -> bfloat16, no target"
    return [
        _variant("D <= 16384, uint8, Philox -> float32", 3072, u8, None, f32),
        _variant("D <= 16384, float32, noise -> float32", 3072, f32, f32, f32),
        _variant("D <= 16384, odd, uint8, noise -> float32", 3071, u8, f32, f32),
        _variant("D > 16384, uint8, Philox -> bfloat16", 196608, u8, None, bf16),
        _variant("D > 16384, uint8, noise -> float32", 196608, u8, f32, f32),
        _variant(alone, 196608, bf16, bf16, bf16, with_target=False),
        _variant("channels last, uint8, Philox -> bfloat16", 196608, u8, None, bf16, order="scatter"),
        _variant("channels last, float32, noise -> float32", 196608, f32, f32, f32, order="gather"),
    ]


def _variant(
    label: str,
    elements: int,
    images: torch.dtype,
    noise: torch.dtype | None,
    x_t: torch.dtype,
    with_target: bool = True,
    order: str = "same",
) -> Variant:
    signature, constants = pointers(
        images=images,
        index=torch.int64,
        coefficients=torch.float64,
        noise=noise,
        counter=torch.int64 if noise is None else None,
        x_t=x_t,
        target=torch.float32 if with_target else None,
    )
    signature |= {"purpose": "i32", "D": "i32", "plane": "i32"}
    constants |= {"BLOCK": block_of(elements, order, philox=noise is None), "ORDER": order}
    divisible, vectors = (), None
    if elements % 16 == 0:
        divisible = ("D", "plane")
        # In channels-last order a thread's elements lie apart: those that it reads, or those that it writes.
        reads = {} if order == "gather" else {"images": 1, "noise": 1}
        vectors = Vectors(4, reads, () if order == "scatter" else ("x_t", "target"))
    return Variant(noising_kernel, label, signature, constants, WARPS, divisible=divisible, vectors=vectors)
