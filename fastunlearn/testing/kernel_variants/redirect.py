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
    u8, f16, bf16, f32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
    bytes_in, floats_in = {"rows": u8, "noise": None}, {"rows": f32, "noise": f32, "sqdist": False}
    return [
        *_variants("MNIST, K = 10", 128, 784, 10, **bytes_in),
        *_variants("MNIST, K = 10", 128, 784, 10, **floats_in),
        *_variants("D <= 1024, odd, K = 10", 128, 783, 10, **floats_in),
        *_variants("CIFAR, K = 10", 128, 3072, 10, **bytes_in),
        *_variants("CIFAR, K = 10", 128, 3072, 10, **floats_in),
        *_variants(
            "CIFAR, K = 64, channels last",
            128,
            3072,
            64,
            rows=u8,
            noise=None,
            x_t=bf16,
            scattered=True,
            sqdist=False,
        ),
        *_variants("D <= 4096, odd, K = 64", 128, 3071, 64, rows=f32, noise=None, sqdist=False),
        *_variants("CIFAR, K = 1000", 128, 3072, 1000, **bytes_in),
        *_variants("CIFAR, K = 1000", 128, 3072, 1000, **floats_in),
        *_variants("SD latents, K = 10", 16, 16384, 10, rows=f16, noise=None, x_t=f16),
        *_variants("SD latents, K = 10", 16, 16384, 10, **floats_in),
        *_variants("CelebA, K = 10", 64, 196608, 10, **bytes_in),
        *_variants("CelebA, K = 10", 64, 196608, 10, rows=u8, noise=f32),
        *_variants("CelebA, K = 10", 64, 196608, 10, **floats_in),
        *_variants("CelebA, K = 10", 64, 196608, 10, rows=bf16, noise=bf16, x_t=bf16, sqdist=False),
        *_variants(
            "CelebA, K = 10, channels last", 64, 196608, 10, rows=u8, noise=None, x_t=bf16, scattered=True
        ),
        *_variants("CelebA, K = 64", 64, 196608, 64, rows=f32, noise=None, sqdist=False),
        *_variants("CelebA, K = 1000", 64, 196608, 1000, **bytes_in),
        *_variants("D > 4096, odd, K = 1000", 64, 196607, 1000, **floats_in),
    ]


def _variants(
    label: str, batch: int, elements: int, k: int, *, rows: torch.dtype, noise: torch.dtype | None, x_t: torch.dtype = torch.float32,
    sqdist: bool = True, scattered: bool = False,
) -> list[Variant]:  # fmt: skip
    """The launches of one call: uint8 rows come by index, float rows dense."""
    tiles, split = tiles_of(batch, elements, k, access_of(elements, scattered, rows))
    i32, i64, f32, f64 = torch.int32, torch.int64, torch.float32, torch.float64
    index, distance = i64 if rows == torch.uint8 else None, f64 if sqdist else None
    types = {
        "images": rows,
        "index": index,
        "neighbors": rows,
        "neighbor_index": index,
        "coefficients": f64,
        "sqdist": distance,
        "noise": noise,
    }
    types |= {
        "counter": i64 if noise is None else None,
        "x_t": x_t,
        "target": f32,
        "spread": f32,
        "weights": f32,
    }
    types |= {"dots": f32, "distances": None if sqdist else f64, "arrivals": i32, "variances": f64}
    integers = {"purpose": "i32", "K": "i32", "D": "i32", "plane": "i32", "group": "i32"}
    constants = {
        "CHANNELS_LAST": scattered,
        "BYTES": rows == torch.uint8,
        "BLOCK_D": tiles.block_d,
        "VECTOR": tiles.vector,
    }
    constants |= {
        "BLOCK_K": tiles.block_k,
        "MEAN_K": tiles.mean_k,
        "WIDTH": width_of(k),
        "PARTS": parts_of(k),
    }
    label += (
        f", {str(rows)[6:]}, {'Philox' if noise is None else 'noise'}{'' if sqdist else ', no distances'}"
    )

    def variant(kernel):
        pointer_types, absent = pointers(**{name: types[name] for name in kernel.arg_names if name in types})
        signature = pointer_types | {name: integers[name] for name in kernel.arg_names if name in integers}
        given = absent | {name: constants[name] for name in kernel.arg_names if name in constants}
        registers = register_limit(tiles, split, distances_given=sqdist)
        divisible, vectors = (), None
        if elements % 16 == 0:
            divisible = ("D", "plane")
            vectors = _vectors(kernel, tiles, scattered)
        options = {"max_registers": registers, "divisible": divisible, "vectors": vectors}
        return Variant(kernel, label, signature, given, tiles.num_warps, **options)

    return [
        variant(kernel)
        for kernel in ((redirect_dots_kernel, redirect_mean_kernel) if split else (redirect_kernel,))
    ]


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
