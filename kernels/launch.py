"""What every launcher shares: options of the compiler, and what it refuses."""

from __future__ import annotations

import torch
from torch import Tensor

# a * b + c in one rounding; the default depends on the version of Triton
COMPILE_OPTIONS = {"enable_fp_fusion": True}

LARGEST_IMAGE = 2**31 - 2**14  # elements; no tile is larger than 2^14


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
