"""The forms of the kernels of residual that `scripts/aot_check.py` compiles."""

from __future__ import annotations

import torch

from ...kernels.partial_sums import PARTS, TINY, tile_of
from ...kernels.residual import residual_kernel, residual_sum_kernel
from . import Variant, Vectors, pointers


def configurations() -> list[Variant]:
    """What `residual` can launch."""
    f32, bf16 = torch.float32, torch.bfloat16
    signature, constants = pointers(partial=f32, weight=f32, loss=f32)
    return [
        _variant("D <= 1024, float32", 784, f32, f32),
        _variant("D <= 4096, float32", 3072, f32, f32),
        _variant("D <= 4096, odd, bfloat16, float32 target", 3071, bf16, f32),
        _variant("D > 4096, float32", 196608, f32, f32),
        _variant("D > 4096, bfloat16, float32 target", 196608, bf16, f32),
        Variant(
            residual_sum_kernel,
            "any D > 4096",
            signature | {"splits": "i32"},
            constants | {"PARTS": PARTS},
            1,
        ),
    ]


def _variant(label: str, elements: int, prediction: torch.dtype, target: torch.dtype) -> Variant:
    block, warps = tile_of(elements)
    signature, constants = pointers(
        prediction=prediction,
        target=target,
        weight=torch.float32,
        gradient=prediction,
        loss=torch.float32,
        partial=torch.float32 if elements > TINY else None,
    )
    integers = ("D", "prediction_stride", "target_stride", "gradient_stride")
    divisible, vectors = (), None
    if elements % 16 == 0:
        divisible = integers
        vectors = Vectors(4, {"prediction": 1, "target": 1}, ("gradient",))
    return Variant(
        residual_kernel,
        label,
        signature | dict.fromkeys(integers, "i32"),
        constants | {"BLOCK": block},
        warps,
        divisible=divisible,
        vectors=vectors,
    )
