"""redirect (ReTrack) on NVIDIA GPUs: softmax over the neighbours, `x_t`, weighted target and spread.

Rows are gathered by index; noise is read, or drawn in registers.

Images of at most 4096 elements with at most 64 neighbours take one launch, a program a sample: first all
logits, then the rows again, out of L1, for the mean about the heaviest neighbour (an online softmax would
have to re-centre that mean in registers). All others take two launches, split over the elements:
`redirect_dots_kernel` writes parts of the dot products; every program of `redirect_mean_kernel` adds them up
to the same softmax and then reads no neighbour with `p_j < 2^-32`. Bytes: (1 + K) D for uint8 rows and 8 D
for results; split, up to (3 + K) D at small t, (1 + 2 K) D where all neighbours count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import channels_last_offset
from .launch import COMPILE_OPTIONS, refuse_beyond_int32, refuse_float64
from .philox import load_noise
from .redirect_parts import (
    dot_products,
    load_image,
    load_rows,
    softmax,
    squared_distances,
    store_spread,
    store_target,
    store_x_t,
    sum_of_parts,
    weighted_mean,
)

_NOT_SPECIALIZED = ["K", "purpose"]  # their value makes no new compilation


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def redirect_kernel(
    images,  # [N, D] uint8, float16, bfloat16 or float32
    index,  # [B] int64, or None: row b is sample b
    neighbors,  # [M, D], types as images
    neighbor_index,  # [B, K] int64, or None: rows b K .. b K + K - 1 are those of sample b
    coefficients,  # [B, 5] float64: alpha, sigma, a, b, c
    sqdist,  # [B, K] float64, or None: summed here
    noise,  # [B, D] floating, or None: Philox
    counter,  # [3] int64, where noise is None
    x_t,  # [B, D]
    target,  # [B, D]
    spread,  # [B] float32
    weights,  # [B, K] float32
    purpose,  # last word of the Philox counter
    K,
    D,  # elements of an image
    plane,  # H * W
    CHANNELS_LAST: tl.constexpr,
    BYTES: tl.constexpr,  # images and neighbours are uint8
    BLOCK_D: tl.constexpr,  # >= D
    BLOCK_K: tl.constexpr,  # neighbours read at once for the dot products
    MEAN_K: tl.constexpr,  # ... for the mean
    WIDTH: tl.constexpr,  # >= K
    VECTOR: tl.constexpr,  # consecutive elements of a thread
):
    """Program `sample` does one sample."""
    sample = tl.program_id(0).to(tl.int64)
    element = tl.max_contiguous(tl.arange(0, BLOCK_D), VECTOR)
    inside = element < D
    center = load_image(images, index, sample, element, inside, D)
    eps = load_noise(noise, counter, purpose, sample, 0, element, inside, D, BLOCK_D)
    place = channels_last_offset(element, plane, D) if CHANNELS_LAST else element
    store_x_t(x_t + sample * D, place, inside, center, eps, coefficients, sample)

    # All logits first. A block's numbers are put into its row of a table, for a loop cannot index registers.
    dots = tl.zeros([WIDTH // BLOCK_K, BLOCK_K], tl.float64)
    distances = tl.zeros([WIDTH // BLOCK_K, BLOCK_K], tl.float64)
    for block in range(WIDTH // BLOCK_K):
        column = block * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = load_rows(neighbors, neighbor_index, sample, column, column < K, element, inside, K, D)
        here = tl.arange(0, WIDTH // BLOCK_K)[:, None] == block
        dots = tl.where(here, dot_products(rows, center, eps, BYTES).to(tl.float64)[None, :], dots)
        if sqdist is None:
            distances = tl.where(here, squared_distances(rows, center, BYTES)[None, :], distances)

    column = tl.arange(0, WIDTH)
    if sqdist is None:
        distance = tl.reshape(distances, [WIDTH])
    else:
        distance = tl.load(sqdist + sample * K + column, mask=column < K, other=0)
    weight, heaviest = softmax(tl.reshape(dots, [WIDTH]), distance, column, coefficients, sample, K, BYTES)
    tl.store(weights + sample * K + column, weight, mask=column < K)

    pivot, mean, variance = weighted_mean(
        neighbors,
        neighbor_index,
        weight,
        heaviest,
        column,
        sample,
        element,
        inside,
        K,
        D,
        BYTES,
        WIDTH,
        MEAN_K,
    )
    store_target(target + sample * D, place, inside, center, eps, pivot, mean, coefficients, sample, BYTES)
    store_spread(spread, variance, coefficients, sample)


@triton.jit(do_not_specialize=[*_NOT_SPECIALIZED, "group"])
def redirect_dots_kernel(
    images,  # up to `plane` as above
    index,
    neighbors,
    neighbor_index,
    coefficients,
    noise,
    counter,
    x_t,
    purpose,
    K,
    D,
    plane,
    dots,  # [B, splits, K] float32: parts of <eps, x_j - a>
    distances,  # [B, splits, K] float64: parts of ||x_j - a||^2, or None
    arrivals,  # [B] int32: set to 0 for the second launch
    group,  # neighbours of a program, a multiple of BLOCK_K
    CHANNELS_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Program `(sample * groups + g) * splits + part` does `BLOCK_D` elements of `group` neighbours.

    The programs of the first group write `x_t`, too.
    """
    splits = tl.cdiv(D, BLOCK_D)
    groups = tl.cdiv(K, group)
    part = tl.program_id(0) % splits
    first = (tl.program_id(0) // splits % groups) * group
    sample = (tl.program_id(0) // splits // groups).to(tl.int64)
    start = part * BLOCK_D
    element = tl.max_contiguous(start + tl.arange(0, BLOCK_D), VECTOR)
    inside = element < D
    center = load_image(images, index, sample, element, inside, D)
    eps = load_noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK_D)
    if first == 0:
        place = channels_last_offset(element, plane, D) if CHANNELS_LAST else element
        store_x_t(x_t + sample * D, place, inside, center, eps, coefficients, sample)
        tl.store(arrivals + sample, 0)

    for start_k in range(first, tl.minimum(first + group, K), BLOCK_K):
        column = start_k + tl.arange(0, BLOCK_K)
        rows = load_rows(neighbors, neighbor_index, sample, column, column < K, element, inside, K, D)
        to = (sample * splits + part) * K + column
        tl.store(dots + to, dot_products(rows, center, eps, BYTES), mask=column < K)
        if distances is not None:
            tl.store(distances + to, squared_distances(rows, center, BYTES), mask=column < K)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def redirect_mean_kernel(
    images,  # up to `plane` as above
    index,
    neighbors,
    neighbor_index,
    coefficients,
    sqdist,
    noise,
    counter,
    target,
    spread,
    weights,
    purpose,
    K,
    D,
    plane,
    dots,  # these three: what the first launch left
    distances,
    arrivals,
    variances,  # [B, splits] float64: parts of the spread
    CHANNELS_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN_K: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,  # parts of sums over elements that are read at once
):
    """Program `sample * splits + part` does `BLOCK_D` elements of one sample.

    The last program of a sample to finish adds up its spread, always in the order of the parts: as repeatable
    as a third launch would be.
    """
    splits = tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) % splits
    sample = (tl.program_id(0) // splits).to(tl.int64)
    start = part * BLOCK_D
    element = tl.max_contiguous(start + tl.arange(0, BLOCK_D), VECTOR)
    inside = element < D

    column = tl.arange(0, WIDTH)
    dot = sum_of_parts(dots, sample, splits, column, K, PARTS)
    if sqdist is None:
        distance = sum_of_parts(distances, sample, splits, column, K, PARTS)
    else:
        distance = tl.load(sqdist + sample * K + column, mask=column < K, other=0)
    weight, heaviest = softmax(dot, distance, column, coefficients, sample, K, BYTES)
    if part == 0:
        tl.store(weights + sample * K + column, weight, mask=column < K)

    pivot, mean, variance = weighted_mean(
        neighbors,
        neighbor_index,
        weight,
        heaviest,
        column,
        sample,
        element,
        inside,
        K,
        D,
        BYTES,
        WIDTH,
        MEAN_K,
    )
    # Image and noise are read only now: registers are scarce in the loop over neighbours.
    center = load_image(images, index, sample, element, inside, D)
    eps = load_noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK_D)
    place = channels_last_offset(element, plane, D) if CHANNELS_LAST else element
    store_target(target + sample * D, place, inside, center, eps, pivot, mean, coefficients, sample, BYTES)

    # The barrier: all threads have stored before one of them says so.
    tl.store(variances + sample * splits + part, variance)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + sample, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros([PARTS], tl.float64)
        for start_part in range(0, splits, PARTS):
            other = start_part + tl.arange(0, PARTS)
            present = other < splits
            at = variances + sample * splits + other
            # `.cg` reads from L2, where the other programs' parts are.
            total += tl.load(at, mask=present, other=0, cache_modifier=".cg")
        store_spread(spread, tl.sum(total, 0), coefficients, sample)


class Tiles(NamedTuple):
    """What a program takes at once."""

    block_d: int
    block_k: int  # neighbours, for the dot products
    mean_k: int  # neighbours, for the mean
    vector: int  # block_d / threads: 16 makes 16-byte reads of uint8 rows
    num_warps: int


# Three of each: for rows of 1 or 2 bytes an element; for 4 bytes, or results in channels-last order; for rows
# that cannot be read in vectors (D not a multiple of 16). More neighbours at once keep more reads under way,
# until registers spill.
_SMALL = Tiles(1024, 16, 8, 4, 8), Tiles(1024, 8, 4, 8, 4), Tiles(1024, 8, 4, 8, 4)
_IMAGE = Tiles(4096, 8, 4, 8, 16), Tiles(4096, 4, 2, 8, 16), Tiles(4096, 1, 1, 8, 16)
_LARGE = Tiles(4096, 4, 2, 16, 8), Tiles(2048, 2, 2, 16, 4), Tiles(2048, 2, 2, 16, 4)
_ONE_LAUNCH_K = 64
# Large tiles that fill an H200 (or an A100); with fewer, latency rules, and small tiles spread the work.
_PROGRAMS = 4 * 132
_WIDTHS = (16, 64, 1024)  # K, rounded up
_REGISTERS = 168  # a thread may have, see `register_limit`
_REGISTERS_IN_ONE_LAUNCH = {4: 168, 8: 128, 16: 128}  # by warps; 3, 2 and 1 programs share a multiprocessor


def redirect(
    images: Tensor,
    index: Tensor | None,
    neighbors: Tensor,
    neighbor_index: Tensor | None,
    coefficients: Tensor,
    sqdist: Tensor | None,
    noise: Tensor | None,
    counter: Tensor | None,
    purpose: int,
    dtype: torch.dtype,
    channels_last: bool,
    x_t: Tensor,
    target: Tensor,
    spread: Tensor,
    weights: Tensor,
) -> None:
    """Fills `x_t`, `target`, `spread` and `weights` of the op `redirect` (fastunlearn/ops/redirect.py)."""
    refuse_float64("redirect", images=images, neighbors=neighbors, noise=noise, x_t=x_t)
    batch, k = weights.shape
    if k > _WIDTHS[-1]:
        limit = f"expected at most {_WIDTHS[-1]} a row on a GPU, got {k}"
        raise ValueError(f"neighbors: {limit}; FASTUNLEARN_BACKEND=eager takes any number")
    elements, plane = math.prod(x_t.shape[1:]), math.prod(x_t.shape[2:])
    refuse_beyond_int32("redirect", elements)
    scattered = channels_last and plane != elements
    tiles, split = tiles_of(batch, elements, k, access_of(elements, scattered, neighbors.dtype))
    rows = (images, index, neighbors, neighbor_index, coefficients)
    draw = (noise, counter if noise is None else None)
    sizes = (purpose, k, elements, plane)
    options = {
        "CHANNELS_LAST": scattered,
        "BYTES": images.dtype == neighbors.dtype == torch.uint8,
        "BLOCK_D": tiles.block_d,
        "VECTOR": tiles.vector,
        "num_warps": tiles.num_warps,
        "num_stages": 1,
        **COMPILE_OPTIONS,
    }
    registers = register_limit(tiles, split, distances_given=sqdist is not None)
    if registers is not None:
        options["maxnreg"] = registers

    if not split:
        results = (x_t, target, spread, weights)
        options |= {"BLOCK_K": tiles.block_k, "MEAN_K": tiles.mean_k, "WIDTH": width_of(k)}
        redirect_kernel[(batch,)](*rows, sqdist, *draw, *results, *sizes, **options)
        return

    # Two launches: parts of the dot products (and distances), then the softmax and what is made of it.
    splits = triton.cdiv(elements, tiles.block_d)
    group = _group_of(k, programs=batch * splits)
    dots = x_t.new_empty((batch, splits, k), dtype=torch.float32)
    distances = None
    if sqdist is None:
        distances = x_t.new_empty((batch, splits, k), dtype=torch.float64)
    arrivals = x_t.new_empty(batch, dtype=torch.int32)
    variances = x_t.new_empty((batch, splits), dtype=torch.float64)
    between = (dots, distances, arrivals)
    redirect_dots_kernel[(batch * triton.cdiv(k, group) * splits,)](
        *rows, *draw, x_t, *sizes, *between, group, BLOCK_K=tiles.block_k, **options
    )
    options |= {"MEAN_K": tiles.mean_k, "WIDTH": width_of(k), "PARTS": parts_of(k)}
    redirect_mean_kernel[(batch * splits,)](
        *rows, sqdist, *draw, target, spread, weights, *sizes, *between, variances, **options
    )


def access_of(elements: int, scattered: bool, rows: torch.dtype) -> int:
    """Which of the three tiles of a size."""
    if elements % 16 != 0:
        return 2
    return 1 if scattered or rows.itemsize == 4 else 0


def tiles_of(batch: int, elements: int, k: int, access: int) -> tuple[Tiles, bool]:
    """Tiles, and whether several programs share a sample."""
    if elements <= _IMAGE[access].block_d and k <= _ONE_LAUNCH_K:
        tiles = _SMALL if elements <= _SMALL[access].block_d else _IMAGE
        return tiles[access], False
    programs = batch * triton.cdiv(elements, _LARGE[access].block_d)
    tiles = _LARGE if programs >= _PROGRAMS else _SMALL
    return tiles[access], True


def _group_of(k: int, programs: int) -> int:
    """How many neighbours a program of the first launch does: all, unless that leaves a GPU without work."""
    return width_of(k) if programs >= _PROGRAMS else min(width_of(k), 64)


def register_limit(tiles: Tiles, split: bool, distances_given: bool) -> int | None:
    """Registers that a thread may have; None: as many as ptxas thinks good.

    Left alone, it spills a few bytes for the sake of occupancy, on one version of Triton or another: where
    distances are summed, and in the one-launch kernel, whose programs are no more than the samples of a
    batch.
    """
    if not split:
        return _REGISTERS_IN_ONE_LAUNCH[tiles.num_warps]
    return None if distances_given else _REGISTERS


def width_of(k: int) -> int:
    return next(width for width in _WIDTHS if width >= k)


def parts_of(k: int) -> int:
    """How many parts of K sums are read at once: at most 4096 numbers."""
    return min(64, 4096 // width_of(k))
