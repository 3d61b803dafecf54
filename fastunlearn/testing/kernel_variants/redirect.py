"""The forms of the kernels of redirect that `scripts/aot_check.py` compiles."""

from __future__ import annotations

import torch
from triton.runtime import JITFunction

from ...kernels.redirect import (
    Tiles,
    access_of,
    parts_of,
    redirect_dots_kernel,
    redirect_kernel,
    redirect_mean_kernel,
    register_limit,
    tiles_of,
    width_of,
)
from . import Variant, Vectors, pointers


def configurations() -> list[Variant]:
    """What `redirect` can launch: one or two kernels for each of these calls."""
    u8, f16, bf16, f32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
    stored_bytes = {"rows": u8, "noise": None}
    dense_floats = {"rows": f32, "noise": f32, "sqdist": False}
    half = {"rows": bf16, "noise": bf16, "x_t": bf16, "sqdist": False}
    drawn = {"noise": None, "sqdist": False}
    nhwc = {"rows": u8, "noise": None, "x_t": bf16, "scattered": True}
    calls = [
        _launches("MNIST, K = 10", 128, 784, 10, **stored_bytes),
        _launches("MNIST, K = 10", 128, 784, 10, **dense_floats),
        _launches("D <= 1024, odd, K = 10", 128, 783, 10, **dense_floats),
        _launches("CIFAR, K = 10", 128, 3072, 10, **stored_bytes),
        _launches("CIFAR, K = 10", 128, 3072, 10, **dense_floats),
        _launches("CIFAR, K = 64, channels last", 128, 3072, 64, **nhwc, sqdist=False),
        _launches("D <= 4096, odd, K = 64", 128, 3071, 64, rows=f32, **drawn),
        _launches("CIFAR, K = 1000", 128, 3072, 1000, **stored_bytes),
        _launches("CIFAR, K = 1000", 128, 3072, 1000, **dense_floats),
        _launches("SD latents, K = 10", 16, 16384, 10, rows=f16, noise=None, x_t=f16),
        _launches("SD latents, K = 10", 16, 16384, 10, **dense_floats),
        _launches("CelebA, K = 10", 64, 196608, 10, **stored_bytes),
        _launches("CelebA, K = 10", 64, 196608, 10, rows=u8, noise=f32),
        _launches("CelebA, K = 10", 64, 196608, 10, **dense_floats),
        _launches("CelebA, K = 10", 64, 196608, 10, **half),
        _launches("CelebA, K = 10, channels last", 64, 196608, 10, **nhwc),
        _launches("CelebA, K = 64", 64, 196608, 64, rows=f32, **drawn),
        _launches("CelebA, K = 1000", 64, 196608, 1000, **stored_bytes),
        _launches("D > 4096, odd, K = 1000", 64, 196607, 1000, **dense_floats),
    ]
    return [variant for launches in calls for variant in launches]


def _launches(
    label: str,
    batch: int,
    elements: int,
    k: int,
    *,
    rows: torch.dtype,
    noise: torch.dtype | None,
    x_t: torch.dtype = torch.float32,
    sqdist: bool = True,
    scattered: bool = False,
) -> list[Variant]:
    """The launches of one call: uint8 rows come by index, float rows dense."""
    tiles, split = tiles_of(batch, elements, k, access_of(elements, scattered, rows))
    types = _pointer_types(rows, noise, x_t, distances_given=sqdist)
    integers = {"purpose": "i32", "K": "i32", "D": "i32", "plane": "i32", "group": "i32"}
    constants = {
        "CHANNELS_LAST": scattered,
        "BYTES": rows == torch.uint8,
        "BLOCK_D": tiles.block_d,
        "VECTOR": tiles.vector,
        "BLOCK_K": tiles.block_k,
        "MEAN_K": tiles.mean_k,
        "WIDTH": width_of(k),
        "PARTS": parts_of(k),
    }
    label += f", {str(rows).removeprefix('torch.')}, {'Philox' if noise is None else 'noise'}"
    if not sqdist:
        label += ", no distances"

    variants = []
    for kernel in (redirect_dots_kernel, redirect_mean_kernel) if split else (redirect_kernel,):
        # Each kernel takes some of all these arguments.
        pointer_types, absent = pointers(**_only(types, kernel))
        whole = elements % 16 == 0
        variant = Variant(
            kernel,
            label,
            pointer_types | _only(integers, kernel),
            absent | _only(constants, kernel),
            tiles.num_warps,
            max_registers=register_limit(tiles, split, distances_given=sqdist),
            divisible=("D", "plane") if whole else (),
            vectors=_vectors(kernel, tiles, scattered) if whole else None,
        )
        variants.append(variant)
    return variants


def _pointer_types(
    rows: torch.dtype, noise: torch.dtype | None, x_t: torch.dtype, *, distances_given: bool
) -> dict[str, torch.dtype | None]:
    """What all pointer arguments of the three kernels point to; None: not given."""
    i32, i64, f32, f64 = torch.int32, torch.int64, torch.float32, torch.float64
    index = i64 if rows == torch.uint8 else None
    return {
        "images": rows,
        "index": index,
        "neighbors": rows,
        "neighbor_index": index,
        "coefficients": f64,
        "sqdist": f64 if distances_given else None,
        "noise": noise,
        "counter": i64 if noise is None else None,
        "x_t": x_t,
        "target": f32,
        "spread": f32,
        "weights": f32,
        "dots": f32,
        "distances": None if distances_given else f64,
        "arrivals": i32,
        "variances": f64,
    }


def _only(arguments: dict, kernel: JITFunction) -> dict:
    """Those of `arguments` that `kernel` takes, in its order."""
    return {name: arguments[name] for name in kernel.arg_names if name in arguments}


def _vectors(kernel: JITFunction, tiles: Tiles, scattered: bool) -> Vectors:
    """What `kernel` accesses in vectors: rows always, for they are consecutive; results where they are."""
    rows_for_mean = 1 + tiles.mean_k  # the heaviest neighbour and a block
    rows = {
        redirect_kernel: tiles.block_k + rows_for_mean,
        redirect_dots_kernel: tiles.block_k,
        redirect_mean_kernel: rows_for_mean,
    }
    results = () if scattered else ("x_t", "target")
    return Vectors(tiles.vector, {"images": 1, "noise": 1, "neighbors": rows[kernel]}, results)
