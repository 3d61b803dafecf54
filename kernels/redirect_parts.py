"""Device functions of redirect: what its kernels load, compute and store, tile by tile."""

from __future__ import annotations

import triton
import triton.language as tl

from .images import row_of, to_float

BYTE = tl.constexpr(2.0 / 255.0)  # one step of a uint8 image on the network's scale
STEP = tl.constexpr(2.0**22 * (2.0 / 255.0))  # one unit of `exact` for bytes
NEGLIGIBLE = tl.constexpr(2.0**-32)  # neighbours of smaller weight are left out of mean and spread


@triton.jit
def load_image(images, index, sample, element, inside, D):
    """Elements of the forget image, as stored."""
    row = row_of(index, sample)
    return tl.load(images + row * D + element, mask=inside, other=0)


@triton.jit
def load_rows(neighbors, neighbor_index, sample, column, wanted, element, inside, K, D):
    """`[BLOCK_K, BLOCK_D]` of the neighbours `column`, as stored; unwanted ones are not read."""
    row = sample * K + column
    if neighbor_index is not None:
        row = tl.load(neighbor_index + row, mask=wanted, other=0)
    present = wanted[:, None] & inside[None, :]
    at = neighbors + (row * D)[:, None] + element[None, :]
    return tl.load(at, mask=present, other=0)


@triton.jit
def exact(values, BYTES: tl.constexpr):
    """float32 numbers whose differences are exact: of a byte `u`, `2^-22 u`, in units of `STEP`.

    The bits of `u` are those of the subnormal number `2^-149 u`, so that conversion and difference are one
    fused multiply-add at full rate.
    """
    if BYTES:
        return values.to(tl.int32).to(tl.float32, bitcast=True) * 2.0**127
    return to_float(values)


@triton.jit
def dot_products(rows, center, eps, BYTES: tl.constexpr):
    """`<eps, x_j - a>`, in units of `STEP` for bytes: float32 `[BLOCK_K]`."""
    return tl.sum((exact(rows, BYTES) - exact(center, BYTES)[None, :]) * eps[None, :], axis=1)


@triton.jit
def squared_distances(rows, center, BYTES: tl.constexpr):
    """`||x_j - a||^2` `[BLOCK_K]` in float64; of bytes, exact but for the last factor."""
    if BYTES:
        difference = rows.to(tl.int32) - center.to(tl.int32)[None, :]
        return tl.sum(difference * difference, axis=1).to(tl.float64) * (BYTE * BYTE)
    difference = to_float(rows).to(tl.float64) - to_float(center).to(tl.float64)[None, :]
    return tl.sum(difference * difference, axis=1)


@triton.jit
def sum_of_parts(parts, sample, splits, column, K, PARTS: tl.constexpr):
    """`[B, splits, K]` summed over the splits of `sample`: float64, as long as `column`."""
    total = tl.zeros(column.shape, tl.float64)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        at = (sample * splits + part)[:, None] * K + column[None, :]
        present = (part < splits)[:, None] & (column < K)[None, :]
        total += tl.sum(tl.load(parts + at, mask=present, other=0).to(tl.float64), axis=0)
    return total


@triton.jit
def reciprocal(x):
    """1 / x of a float64 to 1e-13, by a float32 quotient and a step of Newton.

    The division of float64 is a subroutine whose registers spill.
    """
    r = (1.0 / x.to(tl.float32)).to(tl.float64)
    return r * (2.0 - x * r)


@triton.jit
def softmax(dot, distance, column, coefficients, sample, K, BYTES: tl.constexpr):
    """`p_j` (float32, 0 beyond K), and the heaviest neighbour.

    ReTrack section 3.3, up to a constant in j: the logits are `rho <eps, x_j - a> - rho^2 d_j / 2`, where
    `rho = alpha / sigma` and `d_j = ||x_j - a||^2`. All in float64, for `rho^2 d_j` may be 1e9 and the
    difference of two logits counts.
    """
    rho = tl.load(coefficients + sample * 5) * reciprocal(tl.load(coefficients + sample * 5 + 1))
    nearest = tl.min(tl.where(column < K, distance, float("inf")), axis=0)
    logit = rho * (dot * STEP if BYTES else dot) - 0.5 * rho * rho * (distance - nearest)
    logit = tl.where(column < K, logit, float("-inf"))
    largest = tl.max(logit, axis=0)
    share = tl.exp(logit - largest)
    weight = (share * reciprocal(tl.sum(share, axis=0))).to(tl.float32)
    heaviest = tl.min(tl.where(logit == largest, column, K - 1), axis=0)
    return weight, heaviest


@triton.jit
def weighted_mean(
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
    BYTES: tl.constexpr,
    WIDTH: tl.constexpr,
    MEAN_K: tl.constexpr,
):
    """The heaviest neighbour x*, the mean of the neighbours about it, and their variance.

    x* and `m = sum_j p_j (x_j - x*)` are in units of `exact`; the variance `sum_j p_j ||x_j - x*||^2 -
    ||m||^2` is float64. It is taken element by element: about x*, where the weights are one-hot, nothing
    cancels.
    """
    row = sample * K + heaviest
    if neighbor_index is not None:
        row = tl.load(neighbor_index + row)
    pivot = exact(tl.load(neighbors + row * D + element, mask=inside, other=0), BYTES)
    mean = tl.zeros_like(pivot)
    energy = tl.zeros_like(pivot)

    # Neighbours that count: all but x* itself and those of negligible weight; a weight that is NaN counts, so
    # that it shows in the results.
    counts = (column < K) & (column != heaviest) & ((weight >= NEGLIGIBLE) | (weight != weight))
    counted = tl.where(counts, column, WIDTH)
    table = tl.reshape(tl.where(counts, weight, 0.0), [WIDTH // MEAN_K, MEAN_K])

    # From one block of MEAN_K neighbours with one that counts to the next such block.
    block = tl.min(counted, axis=0) // MEAN_K
    while block < WIDTH // MEAN_K:
        p = tl.sum(tl.where(tl.arange(0, WIDTH // MEAN_K)[:, None] == block, table, 0.0), axis=0)
        members = block * MEAN_K + tl.arange(0, MEAN_K)
        rows = load_rows(neighbors, neighbor_index, sample, members, p != 0, element, inside, K, D)
        y = exact(rows, BYTES) - pivot[None, :]
        py = p[:, None] * y
        mean += tl.sum(py, axis=0)
        energy += tl.sum(py * y, axis=0)
        block = tl.min(tl.where(column >= (block + 1) * MEAN_K, counted, WIDTH), axis=0) // MEAN_K
    variance = tl.sum(energy - mean * mean, axis=0).to(tl.float64)
    if BYTES:
        variance *= STEP * STEP
    return pivot, mean, variance


@triton.jit
def store_x_t(x_t, place, inside, center, eps, coefficients, sample):
    """`x_t = alpha a + sigma eps`."""
    alpha = tl.load(coefficients + sample * 5).to(tl.float32)
    sigma = tl.load(coefficients + sample * 5 + 1).to(tl.float32)
    tl.store(x_t + place, (alpha * to_float(center) + sigma * eps).to(x_t.dtype.element_ty), mask=inside)


@triton.jit
def store_target(target, place, inside, center, eps, pivot, mean, coefficients, sample, BYTES: tl.constexpr):
    """`a eps + b x + c (x - sum_j p_j x_j)`, for the forget image x: the one target of k neighbours."""
    a = tl.load(coefficients + sample * 5 + 2).to(tl.float32)
    b = tl.load(coefficients + sample * 5 + 3).to(tl.float32)
    c = tl.load(coefficients + sample * 5 + 4).to(tl.float32)
    toward = (exact(center, BYTES) - pivot) - mean
    if BYTES:
        toward *= STEP
    at = target + place
    redirected = a * eps + b * to_float(center) + c * toward
    tl.store(at, redirected.to(target.dtype.element_ty), mask=inside)


@triton.jit
def store_spread(spread, variance, coefficients, sample):
    """`c^2` times the variance of the neighbours.

    The one-target identity: `sum_j p_j ||e - v_j||^2 = ||e - sum_j p_j v_j||^2 + spread`.
    """
    c = tl.load(coefficients + sample * 5 + 4)
    tl.store(spread + sample, (c * c * tl.where(variance < 0, 0, variance)).to(spread.dtype.element_ty))
