"""redirect on NVIDIA GPUs: rows gathered by index, softmax over the neighbours, weighted target and spread; noise read, or drawn in registers.

Images of at most 4096 elements with at most 64 neighbours take one launch, a program a sample: first all logits, then the rows again, out of L1, for the mean
about the heaviest neighbour (an online softmax would have to re-centre that mean in registers). All others take two launches, split over the elements:
`redirect_dots_kernel` writes parts of the dot products; every program of `redirect_mean_kernel` adds them up to the same softmax and then reads no neighbour
with `p_j < 2^-32`. Bytes: (1 + K) D for uint8 rows and 8 D for results; split, up to (3 + K) D at small t, (1 + 2 K) D where all neighbours count.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import channels_last_offset, to_float
from .philox import normals
from .variant import COMPILE_OPTIONS, Variant, pointers, refuse_float64

_BYTE = tl.constexpr(2.0 / 255.0)  # one step of a uint8 image on the network's scale
_STEP = tl.constexpr(2.0**22 * (2.0 / 255.0))  # one unit of `_exact` for bytes
_NEGLIGIBLE = tl.constexpr(2.0**-32)  # neighbours of smaller weight are left out of mean and spread
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
    center = _image(images, index, sample, element, inside, D)
    eps = _noise(noise, counter, purpose, sample, 0, element, inside, D, BLOCK_D)
    place = channels_last_offset(element, plane, D) if CHANNELS_LAST else element
    _store_x_t(x_t + sample * D, place, inside, center, eps, coefficients, sample)

    dots = tl.zeros([WIDTH // BLOCK_K, BLOCK_K], tl.float64)
    distances = tl.zeros([WIDTH // BLOCK_K, BLOCK_K], tl.float64)
    for block in range(WIDTH // BLOCK_K):
        column = block * BLOCK_K + tl.arange(0, BLOCK_K)
        rows = _rows(neighbors, neighbor_index, sample, column, column < K, element, inside, K, D)
        here = tl.arange(0, WIDTH // BLOCK_K)[:, None] == block
        dots = tl.where(here, _dots(rows, center, eps, BYTES).to(tl.float64)[None, :], dots)
        if sqdist is None:
            distances = tl.where(here, _distances(rows, center, BYTES)[None, :], distances)

    column = tl.arange(0, WIDTH)
    if sqdist is None:
        distance = tl.reshape(distances, [WIDTH])
    else:
        distance = tl.load(sqdist + sample * K + column, mask=column < K, other=0)
    weight, heaviest = _softmax(tl.reshape(dots, [WIDTH]), distance, column, coefficients, sample, K, BYTES)
    tl.store(weights + sample * K + column, weight, mask=column < K)

    pivot, mean, variance = _mean(neighbors, neighbor_index, weight, heaviest, column, sample, element, inside, K, D, BYTES, WIDTH, MEAN_K)
    _store_target(target + sample * D, place, inside, center, eps, pivot, mean, coefficients, sample, BYTES)
    _store_spread(spread, variance, coefficients, sample)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def redirect_dots_kernel(
    images, index, neighbors, neighbor_index, coefficients, noise, counter, x_t, purpose, K, D, plane,  # as above
    dots,  # [B, splits, K] float32: parts of <eps, x_j - a>
    distances,  # [B, splits, K] float64: parts of ||x_j - a||^2, or None
    arrivals,  # [B] int32: set to 0 for the second launch
    group,  # neighbours of a program, a multiple of BLOCK_K
    CHANNELS_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_K: tl.constexpr,
    VECTOR: tl.constexpr,
):  # fmt: skip
    """Program `(sample * groups + g) * splits + part` does `BLOCK_D` elements of `group` neighbours; those of the first group write `x_t`."""
    splits = tl.cdiv(D, BLOCK_D)
    groups = tl.cdiv(K, group)
    part = tl.program_id(0) % splits
    first = (tl.program_id(0) // splits % groups) * group
    sample = (tl.program_id(0) // splits // groups).to(tl.int64)
    start = part * BLOCK_D
    element = tl.max_contiguous(start + tl.arange(0, BLOCK_D), VECTOR)
    inside = element < D
    center = _image(images, index, sample, element, inside, D)
    eps = _noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK_D)
    if first == 0:
        place = channels_last_offset(element, plane, D) if CHANNELS_LAST else element
        _store_x_t(x_t + sample * D, place, inside, center, eps, coefficients, sample)
        tl.store(arrivals + sample, 0)

    for start_k in range(first, tl.minimum(first + group, K), BLOCK_K):
        column = start_k + tl.arange(0, BLOCK_K)
        rows = _rows(neighbors, neighbor_index, sample, column, column < K, element, inside, K, D)
        to = (sample * splits + part) * K + column
        tl.store(dots + to, _dots(rows, center, eps, BYTES), mask=column < K)
        if distances is not None:
            tl.store(distances + to, _distances(rows, center, BYTES), mask=column < K)


@triton.jit(do_not_specialize=_NOT_SPECIALIZED)
def redirect_mean_kernel(
    images, index, neighbors, neighbor_index, coefficients, sqdist, noise, counter, target, spread, weights, purpose, K, D, plane,  # as above
    dots, distances, arrivals,  # what the first launch left
    variances,  # [B, splits] float64: parts of the spread
    CHANNELS_LAST: tl.constexpr,
    BYTES: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MEAN_K: tl.constexpr,
    WIDTH: tl.constexpr,
    VECTOR: tl.constexpr,
    PARTS: tl.constexpr,  # parts of sums over elements that are read at once
):  # fmt: skip
    """Program `sample * splits + part` does `BLOCK_D` elements of one sample.

    The last program of a sample to finish adds up its spread, always in the order of the parts: as repeatable as a third launch would be.
    """
    splits = tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) % splits
    sample = (tl.program_id(0) // splits).to(tl.int64)
    start = part * BLOCK_D
    element = tl.max_contiguous(start + tl.arange(0, BLOCK_D), VECTOR)
    inside = element < D

    column = tl.arange(0, WIDTH)
    dot = _sum_of_parts(dots, sample, splits, column, K, PARTS)
    if sqdist is None:
        distance = _sum_of_parts(distances, sample, splits, column, K, PARTS)
    else:
        distance = tl.load(sqdist + sample * K + column, mask=column < K, other=0)
    weight, heaviest = _softmax(dot, distance, column, coefficients, sample, K, BYTES)
    if part == 0:
        tl.store(weights + sample * K + column, weight, mask=column < K)

    pivot, mean, variance = _mean(neighbors, neighbor_index, weight, heaviest, column, sample, element, inside, K, D, BYTES, WIDTH, MEAN_K)
    center = _image(images, index, sample, element, inside, D)  # only now: registers are scarce in the loop over neighbours
    eps = _noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK_D)
    place = channels_last_offset(element, plane, D) if CHANNELS_LAST else element
    _store_target(target + sample * D, place, inside, center, eps, pivot, mean, coefficients, sample, BYTES)

    tl.store(variances + sample * splits + part, variance)
    tl.debug_barrier()
    if tl.atomic_add(arrivals + sample, 1, sem="acq_rel") == splits - 1:
        total = tl.zeros([PARTS], tl.float64)
        for start_part in range(0, splits, PARTS):
            other = start_part + tl.arange(0, PARTS)
            total += tl.load(variances + sample * splits + other, mask=other < splits, other=0, cache_modifier=".cg")
        _store_spread(spread, tl.sum(total, 0), coefficients, sample)


@triton.jit
def _image(images, index, sample, element, inside, D):
    """Elements of the forget image, as stored."""
    row = sample if index is None else tl.load(index + sample)
    return tl.load(images + row * D + element, mask=inside, other=0)


@triton.jit
def _noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK_D: tl.constexpr):
    """The elements `start .. start + BLOCK_D - 1` of the noise, float32."""
    if noise is None:
        eps = normals(counter, sample, purpose, start // 4 + tl.arange(0, BLOCK_D // 4))
    else:
        eps = to_float(tl.load(noise + sample * D + element, mask=inside, other=0))
    return eps


@triton.jit
def _rows(neighbors, neighbor_index, sample, column, wanted, element, inside, K, D):
    """`[BLOCK_K, BLOCK_D]` of the neighbours `column`, as stored; unwanted ones are not read."""
    row = sample * K + column
    if neighbor_index is not None:
        row = tl.load(neighbor_index + row, mask=wanted, other=0)
    return tl.load(neighbors + (row * D)[:, None] + element[None, :], mask=wanted[:, None] & inside[None, :], other=0)


@triton.jit
def _exact(values, BYTES: tl.constexpr):
    """float32 numbers whose differences are exact: of a byte `u`, `2^-22 u`, in units of `_STEP`.

    The bits of `u` are those of the subnormal number `2^-149 u`, so that conversion and difference are one fused multiply-add at full rate.
    """
    if BYTES:
        return values.to(tl.int32).to(tl.float32, bitcast=True) * 2.0**127
    return to_float(values)


@triton.jit
def _dots(rows, center, eps, BYTES: tl.constexpr):
    """`<eps, x_j - a>`, in units of `_STEP` for bytes: float32 `[BLOCK_K]`."""
    return tl.sum((_exact(rows, BYTES) - _exact(center, BYTES)[None, :]) * eps[None, :], axis=1)


@triton.jit
def _distances(rows, center, BYTES: tl.constexpr):
    """`||x_j - a||^2` `[BLOCK_K]` in float64; of bytes, exact but for the last factor."""
    if BYTES:
        difference = rows.to(tl.int32) - center.to(tl.int32)[None, :]
        return tl.sum(difference * difference, axis=1).to(tl.float64) * (_BYTE * _BYTE)
    difference = to_float(rows).to(tl.float64) - to_float(center).to(tl.float64)[None, :]
    return tl.sum(difference * difference, axis=1)


@triton.jit
def _sum_of_parts(parts, sample, splits, column, K, PARTS: tl.constexpr):
    """`[B, splits, K]` summed over the splits of `sample`: float64, as long as `column`."""
    total = tl.zeros(column.shape, tl.float64)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (sample * splits + part)[:, None] * K + column[None, :]
        total += tl.sum(tl.load(parts + at, mask=(part < splits)[:, None] & (column < K)[None, :], other=0).to(tl.float64), axis=0)
    return total


@triton.jit
def _reciprocal(x):
    """1 / x of a float64 to 1e-13, by a float32 quotient and a step of Newton: the division of float64 is a subroutine whose registers spill."""
    r = (1.0 / x.to(tl.float32)).to(tl.float64)
    return r * (2.0 - x * r)


@triton.jit
def _softmax(dot, distance, column, coefficients, sample, K, BYTES: tl.constexpr):
    """`p_j` (float32, 0 beyond K) from the logits `rho <eps, x_j - a> - rho^2 d_j / 2`, and the heaviest neighbour.

    All in float64, for `rho^2 d_j` may be 1e9 and the difference of two logits counts.
    """
    rho = tl.load(coefficients + sample * 5) * _reciprocal(tl.load(coefficients + sample * 5 + 1))
    nearest = tl.min(tl.where(column < K, distance, float("inf")), axis=0)
    logit = rho * (dot * _STEP if BYTES else dot) - 0.5 * rho * rho * (distance - nearest)
    logit = tl.where(column < K, logit, float("-inf"))
    largest = tl.max(logit, axis=0)
    share = tl.exp(logit - largest)
    return (share * _reciprocal(tl.sum(share, axis=0))).to(tl.float32), tl.min(tl.where(logit == largest, column, K - 1), axis=0)


@triton.jit
def _mean(
    neighbors, neighbor_index, weight, heaviest, column, sample, element, inside, K, D,
    BYTES: tl.constexpr, WIDTH: tl.constexpr, MEAN_K: tl.constexpr,
):  # fmt: skip
    """The heaviest neighbour x* and `sum_j p_j (x_j - x*)`, in units of `_exact`, and in float64 `sum_j p_j ||x_j - x*||^2 - ||sum_j p_j (x_j - x*)||^2`.

    The latter is taken element by element: about x*, where the weights are one-hot, nothing cancels.
    """
    row = sample * K + heaviest
    if neighbor_index is not None:
        row = tl.load(neighbor_index + row)
    pivot = _exact(tl.load(neighbors + row * D + element, mask=inside, other=0), BYTES)
    mean = tl.zeros_like(pivot)
    energy = tl.zeros_like(pivot)
    counts = (column < K) & (column != heaviest) & ((weight >= _NEGLIGIBLE) | (weight != weight))  # NaN goes through
    counted = tl.where(counts, column, WIDTH)
    table = tl.reshape(tl.where(counts, weight, 0.0), [WIDTH // MEAN_K, MEAN_K])
    block = tl.min(counted, axis=0) // MEAN_K
    while block < WIDTH // MEAN_K:
        p = tl.sum(tl.where(tl.arange(0, WIDTH // MEAN_K)[:, None] == block, table, 0.0), axis=0)
        rows = _rows(neighbors, neighbor_index, sample, block * MEAN_K + tl.arange(0, MEAN_K), p != 0, element, inside, K, D)
        y = _exact(rows, BYTES) - pivot[None, :]
        py = p[:, None] * y
        mean += tl.sum(py, axis=0)
        energy += tl.sum(py * y, axis=0)
        block = tl.min(tl.where(column >= (block + 1) * MEAN_K, counted, WIDTH), axis=0) // MEAN_K
    variance = tl.sum(energy - mean * mean, axis=0).to(tl.float64)
    return pivot, mean, variance * (_STEP * _STEP) if BYTES else variance


@triton.jit
def _store_x_t(x_t, place, inside, center, eps, coefficients, sample):
    alpha = tl.load(coefficients + sample * 5).to(tl.float32)
    sigma = tl.load(coefficients + sample * 5 + 1).to(tl.float32)
    tl.store(x_t + place, (alpha * to_float(center) + sigma * eps).to(x_t.dtype.element_ty), mask=inside)


@triton.jit
def _store_target(target, place, inside, center, eps, pivot, mean, coefficients, sample, BYTES: tl.constexpr):
    a = tl.load(coefficients + sample * 5 + 2).to(tl.float32)
    b = tl.load(coefficients + sample * 5 + 3).to(tl.float32)
    c = tl.load(coefficients + sample * 5 + 4).to(tl.float32)
    toward = (_exact(center, BYTES) - pivot) - mean
    if BYTES:
        toward *= _STEP
    tl.store(target + place, (a * eps + b * to_float(center) + c * toward).to(target.dtype.element_ty), mask=inside)


@triton.jit
def _store_spread(spread, variance, coefficients, sample):
    c = tl.load(coefficients + sample * 5 + 4)
    tl.store(spread + sample, (c * c * tl.where(variance < 0, 0, variance)).to(spread.dtype.element_ty))


class Tiles(NamedTuple):
    """What a program takes at once."""

    block_d: int
    block_k: int  # neighbours, for the dot products
    mean_k: int  # neighbours, for the mean
    vector: int  # block_d / threads: 16 makes 16-byte reads of uint8 rows
    num_warps: int


# Three of each: for rows of 1 or 2 bytes an element; for 4 bytes, or results in channels-last order; for rows that cannot be read in vectors (D not a multiple
# of 16). More neighbours at once keep more reads under way, until registers spill.
_SMALL = Tiles(1024, 16, 8, 4, 8), Tiles(1024, 8, 4, 8, 4), Tiles(1024, 8, 4, 8, 4)
_IMAGE = Tiles(4096, 8, 4, 8, 16), Tiles(4096, 4, 2, 8, 16), Tiles(4096, 1, 1, 8, 16)
_LARGE = Tiles(4096, 4, 2, 16, 8), Tiles(2048, 2, 2, 16, 4), Tiles(2048, 2, 2, 16, 4)
_ONE_LAUNCH_K = 64
_PROGRAMS = 4 * 132  # large tiles that fill an H200 (or an A100); with fewer, latency rules, and small tiles spread the work
_WIDTHS = (16, 64, 1024)  # K, rounded up
_REGISTERS_WITH_SQUARES = 168  # without given distances; left alone, ptxas spills a few bytes for the sake of occupancy


def redirect(
    images: Tensor, index: Tensor | None, neighbors: Tensor, neighbor_index: Tensor | None, coefficients: Tensor, sqdist: Tensor | None,
    noise: Tensor | None, counter: Tensor | None, purpose: int, dtype: torch.dtype, channels_last: bool,
    x_t: Tensor, target: Tensor, spread: Tensor, weights: Tensor,
) -> None:  # fmt: skip
    """Fills `x_t`, `target`, `spread` and `weights` of the op `redirect` (fastunlearn/ops/redirect.py)."""
    refuse_float64("redirect", images=images, neighbors=neighbors, noise=noise, x_t=x_t)
    batch, k = weights.shape
    if k > _WIDTHS[-1]:
        raise ValueError(f"neighbors: expected at most {_WIDTHS[-1]} a row on a GPU, got {k}; FASTUNLEARN_BACKEND=eager takes any number")
    elements, plane = math.prod(x_t.shape[1:]), math.prod(x_t.shape[2:])
    scattered = channels_last and plane != elements
    tiles, split = _tiles(batch, elements, k, _access(elements, scattered, neighbors.dtype))
    rows = (images, index, neighbors, neighbor_index, coefficients)
    draw = (noise, counter if noise is None else None)
    sizes = (purpose, k, elements, plane)
    shared = {"CHANNELS_LAST": scattered, "BYTES": images.dtype == neighbors.dtype == torch.uint8, "BLOCK_D": tiles.block_d, "VECTOR": tiles.vector}
    shared |= {"num_warps": tiles.num_warps, "num_stages": 1, **COMPILE_OPTIONS}
    if not split:
        redirect_kernel[(batch,)](
            *rows, sqdist, *draw, x_t, target, spread, weights, *sizes, BLOCK_K=tiles.block_k, MEAN_K=tiles.mean_k, WIDTH=_width(k), **shared
        )
        return

    squares = {"maxnreg": _REGISTERS_WITH_SQUARES} if sqdist is None else {}
    splits = triton.cdiv(elements, tiles.block_d)
    group = _width(k) if batch * splits >= _PROGRAMS else min(_width(k), 64)
    dots = x_t.new_empty((batch, splits, k), dtype=torch.float32)
    distances = x_t.new_empty((batch, splits, k), dtype=torch.float64) if sqdist is None else None
    arrivals = x_t.new_empty(batch, dtype=torch.int32)
    variances = x_t.new_empty((batch, splits), dtype=torch.float64)
    redirect_dots_kernel[(batch * triton.cdiv(k, group) * splits,)](
        *rows, *draw, x_t, *sizes, dots, distances, arrivals, group, BLOCK_K=tiles.block_k, **shared, **squares
    )
    redirect_mean_kernel[(batch * splits,)](
        *rows, sqdist, *draw, target, spread, weights, *sizes, dots, distances, arrivals, variances,
        MEAN_K=tiles.mean_k, WIDTH=_width(k), PARTS=_parts(k), **shared, **squares,
    )  # fmt: skip


def _access(elements: int, scattered: bool, rows: torch.dtype) -> int:
    """Which of the three tiles of a size."""
    return 2 if elements % 16 != 0 else int(scattered or rows.itemsize == 4)


def _tiles(batch: int, elements: int, k: int, access: int) -> tuple[Tiles, bool]:
    """Tiles, and whether several programs share a sample."""
    if elements <= _IMAGE[access].block_d and k <= _ONE_LAUNCH_K:
        return (_SMALL if elements <= _SMALL[access].block_d else _IMAGE)[access], False
    return (_LARGE if batch * triton.cdiv(elements, _LARGE[access].block_d) >= _PROGRAMS else _SMALL)[access], True


def _width(k: int) -> int:
    return next(width for width in _WIDTHS if width >= k)


def _parts(k: int) -> int:
    """How many parts of K sums are read at once: at most 4096 numbers."""
    return min(64, 4096 // _width(k))


def configurations() -> list[Variant]:
    u8, f16, bf16, f32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
    bytes_in, floats_in = {"rows": u8, "noise": None}, {"rows": f32, "noise": f32, "sqdist": False}
    return [
        *_variants("MNIST, K = 10", 128, 784, 10, **bytes_in),
        *_variants("MNIST, K = 10", 128, 784, 10, **floats_in),
        *_variants("D <= 1024, odd, K = 10", 128, 783, 10, **floats_in),
        *_variants("CIFAR, K = 10", 128, 3072, 10, **bytes_in),
        *_variants("CIFAR, K = 10", 128, 3072, 10, **floats_in),
        *_variants("CIFAR, K = 64, channels last", 128, 3072, 64, rows=u8, noise=None, x_t=bf16, scattered=True, sqdist=False),
        *_variants("D <= 4096, odd, K = 64", 128, 3071, 64, rows=f32, noise=None, sqdist=False),
        *_variants("CIFAR, K = 1000", 128, 3072, 1000, **bytes_in),
        *_variants("CIFAR, K = 1000", 128, 3072, 1000, **floats_in),
        *_variants("SD latents, K = 10", 16, 16384, 10, rows=f16, noise=None, x_t=f16),
        *_variants("SD latents, K = 10", 16, 16384, 10, **floats_in),
        *_variants("CelebA, K = 10", 64, 196608, 10, **bytes_in),
        *_variants("CelebA, K = 10", 64, 196608, 10, rows=u8, noise=f32),
        *_variants("CelebA, K = 10", 64, 196608, 10, **floats_in),
        *_variants("CelebA, K = 10", 64, 196608, 10, rows=bf16, noise=bf16, x_t=bf16, sqdist=False),
        *_variants("CelebA, K = 10, channels last", 64, 196608, 10, rows=u8, noise=None, x_t=bf16, scattered=True),
        *_variants("CelebA, K = 64", 64, 196608, 64, rows=f32, noise=None, sqdist=False),
        *_variants("CelebA, K = 1000", 64, 196608, 1000, **bytes_in),
        *_variants("D > 4096, odd, K = 1000", 64, 196607, 1000, **floats_in),
    ]


def _variants(
    label: str, batch: int, elements: int, k: int, *, rows: torch.dtype, noise: torch.dtype | None, x_t: torch.dtype = torch.float32,
    sqdist: bool = True, scattered: bool = False,
) -> list[Variant]:  # fmt: skip
    """The launches of one call: uint8 rows come by index, float rows dense."""
    tiles, split = _tiles(batch, elements, k, _access(elements, scattered, rows))
    i32, i64, f32, f64 = torch.int32, torch.int64, torch.float32, torch.float64
    index, distance = i64 if rows == torch.uint8 else None, f64 if sqdist else None
    types = {"images": rows, "index": index, "neighbors": rows, "neighbor_index": index, "coefficients": f64, "sqdist": distance, "noise": noise}
    types |= {"counter": i64 if noise is None else None, "x_t": x_t, "target": f32, "spread": f32, "weights": f32}
    types |= {"dots": f32, "distances": None if sqdist else f64, "arrivals": i32, "variances": f64}
    integers = {"purpose": "i32", "K": "i32", "D": "i32", "plane": "i32", "group": "i32"}
    constants = {"CHANNELS_LAST": scattered, "BYTES": rows == torch.uint8, "BLOCK_D": tiles.block_d, "VECTOR": tiles.vector}
    constants |= {"BLOCK_K": tiles.block_k, "MEAN_K": tiles.mean_k, "WIDTH": _width(k), "PARTS": _parts(k)}
    label += f", {str(rows)[6:]}, {'Philox' if noise is None else 'noise'}{'' if sqdist else ', no distances'}"

    def variant(kernel):
        pointer_types, absent = pointers(**{name: types[name] for name in kernel.arg_names if name in types})
        signature = pointer_types | {name: integers[name] for name in kernel.arg_names if name in integers}
        given = absent | {name: constants[name] for name in kernel.arg_names if name in constants}
        registers = _REGISTERS_WITH_SQUARES if split and not sqdist else None
        return Variant(kernel, label, signature, given, tiles.num_warps, max_registers=registers, divisible=() if elements % 16 else ("D", "plane"))

    return [variant(kernel) for kernel in ((redirect_dots_kernel, redirect_mean_kernel) if split else (redirect_kernel,))]
