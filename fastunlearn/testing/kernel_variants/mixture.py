"""The forms of the kernels of mixture that `scripts/aot_check.py` compiles."""

from __future__ import annotations

import torch

from ...kernels.mixture import mixture_kernel, mixture_weights_kernel
from ...kernels.partial_sums import PARTS, TINY, tile_of
from . import Variant, Vectors, pointers


def configurations() -> list[Variant]:
    """What `mixture` can launch."""
    u8, f32, bf16, f64 = torch.uint8, torch.float32, torch.bfloat16, torch.float64
    nhwc = "channels last"
    return [
        _variant("D <= 1024, uint8, Philox -> float32", 784, u8, None, f32),
        _variant("D <= 4096, uint8, Philox -> bfloat16", 3072, u8, None, bf16),
        _variant("D <= 4096, odd, float32, noise -> float32", 3071, f32, f32, f32),
        _variant("D <= 4096, float32, noise, log ratio of times", 3072, f32, f32, f32, ratio=f64),
        _variant("D > 4096, uint8, Philox -> bfloat16", 196608, u8, None, bf16),
        _variant("D > 4096, uint8, noise -> float32", 196608, u8, f32, f32),
        _variant("D > 4096, float32, noise -> float32", 196608, f32, f32, f32),
        _variant(f"D <= 4096, {nhwc}, uint8, Philox -> bfloat16", 3072, u8, None, bf16, order="scatter"),
        _variant(f"D > 4096, {nhwc}, float32, noise -> float32", 196608, f32, f32, f32, order="gather"),
        _weights_variant("no log ratio of times", None),
        _weights_variant("with a log ratio of times", f64),
    ]


def _variant(
    label: str,
    elements: int,
    images: torch.dtype,
    noise: torch.dtype | None,
    x_t: torch.dtype,
    order: str = "same",
    ratio: torch.dtype | None = None,
) -> Variant:
    block, warps = tile_of(elements)
    i64, f32, f64 = torch.int64, torch.float32, torch.float64
    signature, constants = pointers(
        retain=images,
        retain_index=i64,
        forget=images,
        forget_index=i64,
        coefficients=f64,
        from_forget=torch.bool,
        time_log_ratio=ratio,
        noise=noise,
        counter=i64 if noise is None else None,
        x_t=x_t,
        retain_target=f32,
        forget_target=f32,
        retain_weight=f64,
        forget_weight=f64,
        partial=f64 if elements > TINY else None,
    )
    signature |= {"purpose": "i32", "D": "i32", "plane": "i32", "lambd": "fp64", "logit": "fp64"}
    constants |= {"BLOCK": block, "ORDER": order}
    divisible, vectors = (), None
    if elements % 16 == 0:
        divisible = ("D", "plane")
        # In channels-last order a thread's elements lie apart: those that it reads, or those that it writes.
        reads = {} if order == "gather" else {"retain": 1, "forget": 1, "noise": 1}
        vectors = Vectors(4, reads, () if order == "scatter" else ("x_t", "retain_target", "forget_target"))
    return Variant(mixture_kernel, label, signature, constants, warps, divisible=divisible, vectors=vectors)


def _weights_variant(label: str, time_log_ratio: torch.dtype | None) -> Variant:
    f64 = torch.float64
    signature, constants = pointers(
        partial=f64,
        coefficients=f64,
        from_forget=torch.bool,
        time_log_ratio=time_log_ratio,
        retain_weight=f64,
        forget_weight=f64,
    )
    return Variant(
        mixture_weights_kernel,
        label,
        signature | {"splits": "i32", "lambd": "fp64", "logit": "fp64"},
        constants | {"PARTS": PARTS},
        4,
    )
