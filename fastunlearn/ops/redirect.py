"""redirect: ReTrack's importance-weighted target over the k nearest neighbours, in closed form.

ReTrack section 3.3. With `v_j = (x_t - alpha x_j) / sigma`, `rho = alpha / sigma` and `d_j = ||a - x_j||^2`
the weights are `p = softmax_j(-||v_j||^2 / 2)`, where `-||v_j||^2 / 2 = rho <eps, x_j> - rho^2 d_j / 2` up to
a constant in j. And for what the network says, e: `sum_j p_j ||e - v_j||^2 = ||e - sum_j p_j v_j||^2 +
spread`. So k targets become one, and the network is asked once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..host import philox
from ._library import (
    at_least_float32,
    check_noise,
    check_rows,
    check_shape,
    compute_dtype,
    define,
    empty_images,
    laid_out,
    noise_for_kernel,
    per_row,
    picked,
    rows_for_kernel,
    served,
)

_CHUNK_ELEMENTS = 1 << 22  # temporaries over neighbours stay below this many elements


class Arguments(NamedTuple):
    """What the op takes, in this order."""

    images: Tensor  # [N, C, H, W] uint8 or floating, the images to forget
    index: Tensor | None  # [B] int64, rows of `images`; None: all, in order
    # [B, K, C, H, W], their neighbours among the images to keep; with an index [M, C, H, W], the rows to keep
    neighbors: Tensor
    neighbor_index: Tensor | None  # [B, K] int64, rows of `neighbors`
    coefficients: Tensor  # [B, 5] float64, `NoiseSchedule.coefficients`
    # [B, K] float64, `||a - x_j||^2` in the scale of network input; None: accumulated in float64
    sqdist: Tensor | None
    noise: Tensor | None  # [B, C, H, W]; None: made from the two that follow, see `philox.Noise`
    counter: Tensor | None  # [3] int64
    purpose: int
    dtype: torch.dtype  # of `x_t`
    channels_last: bool  # the memory layout of the results


def _eager(*args):
    given = Arguments(*args)
    sqdist, dtype, channels_last = given.sqdist, given.dtype, given.channels_last
    precision = compute_dtype(given.images, given.neighbors, given.noise)
    forget = served(picked(given.images, given.index), precision)
    noise = given.noise
    if noise is None:
        noise = philox.normal(forget.shape, given.counter, given.purpose)
    noise = noise.to(precision)
    rows = picked(given.neighbors, given.neighbor_index).flatten(2)  # [B, K, D], as stored
    center, eps = forget.flatten(1).unsqueeze(1), noise.flatten(1)
    alpha, sigma, a, b, c = given.coefficients.unbind(1)

    # p_j from the logits rho <eps, x_j - a> - rho^2 (d_j - min d) / 2.
    if sqdist is None:
        sqdist = _squared_distances(rows, center)
    rho = (alpha / sigma).unsqueeze(1)
    farther = sqdist.double() - sqdist.double().amin(1, keepdim=True)
    logits = rho * _dot_products(rows, center, eps) - 0.5 * rho.square() * farther
    weights = torch.softmax(logits, dim=1).to(precision)

    # x being the forget image, the target of neighbour j is a eps + b x + c (x - x_j): only the last term
    # differs among them, so the spread is c^2 times the variance of the neighbours.
    heaviest, offset, variance = _mean_and_variance(rows, weights)
    spread = c.square() * variance

    # The one target is their mean, a eps + b x + c (x - sum_j p_j x_j).
    toward = ((center - heaviest) - offset).view_as(forget)
    x_t = per_row(alpha, forget) * forget + per_row(sigma, forget) * noise
    target = per_row(a, forget) * noise + per_row(b, forget) * forget + per_row(c, forget) * toward
    return (
        laid_out(x_t, dtype, channels_last),
        laid_out(target, at_least_float32(dtype), channels_last),
        spread.to(precision),
        weights,
    )


def _dot_products(rows: Tensor, center: Tensor, eps: Tensor) -> Tensor:
    """`<eps, x_j - a>`, `[B, K]` float64, from stored rows `[B, K, D]`, a `[B, 1, D]` and eps `[B, D]`.

    Of differences: against images at a distance of 0.003 per element, `<eps, x_j>` alone would lose 30 times
    the precision at t = 0.
    """
    column = eps.unsqueeze(2)
    dots = [torch.bmm(part - center, column) for part in _parts(rows, center.dtype)]
    return torch.cat(dots, dim=1).squeeze(2).double()


def _squared_distances(rows: Tensor, center: Tensor) -> Tensor:
    """`||x_j - a||^2`, `[B, K]` float64.

    Differences and sums are float64, too: float32 loses the softmax at small t.
    """
    parts = _parts(rows, center.dtype)
    return torch.cat([(center.double() - part.double()).square().sum(-1) for part in parts], dim=1)


def _mean_and_variance(rows: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The heaviest neighbour x* and `sum_j p_j (x_j - x*)`, both `[B, 1, D]`, and the variance `[B]` float64.

    The variance is `sum_j p_j ||x_j - x*||^2 - ||sum_j p_j (x_j - x*)||^2`. About x*, where the weights are
    one-hot, nothing cancels; about zero it would in float32.
    """
    dtype, columns = weights.dtype, rows.shape[2]
    at = weights.argmax(1).view(-1, 1, 1).expand(-1, 1, columns)
    heaviest = served(rows.gather(1, at), dtype)
    offset, energy = torch.zeros_like(heaviest), torch.zeros_like(weights[:, :1])
    for part, p in zip(_parts(rows, dtype), weights.split(_neighbors_per_part(rows), dim=1), strict=True):
        y = part - heaviest
        offset = offset + torch.bmm(p.unsqueeze(1), y)
        energy = energy + (p * y.square().sum(-1)).sum(1, keepdim=True)
    variance = energy.double() - offset.double().square().sum(-1)
    return heaviest, offset, variance.squeeze(1).clamp_min(0)


def _empty(*args):
    """`x_t`, target, spread `[B]` and weights `[B, K]`.

    `x_t` is in `dtype`, the target in float32 or better (both `[B, C, H, W]`).
    """
    given = Arguments(*args)
    precision = compute_dtype(given.images, given.neighbors, given.noise)
    x_t = empty_images(given.images, given.index, given.dtype, given.channels_last)
    batch, k = (given.neighbors if given.neighbor_index is None else given.neighbor_index).shape[:2]
    return (
        x_t,
        torch.empty_like(x_t, dtype=at_least_float32(given.dtype)),
        x_t.new_empty(batch, dtype=precision),
        x_t.new_empty((batch, k), dtype=precision),
    )


def _check(*args):
    given = Arguments(*args)
    shape = check_rows("images", given.images, given.index)
    neighbor_shape = check_rows("neighbors", given.neighbors, given.neighbor_index, ndim=2)
    if (neighbor_shape[0], *neighbor_shape[2:]) != shape:
        raise ValueError(f"neighbors: expected [B, K, C, H, W] for images {shape}, got {neighbor_shape}")
    check_shape("coefficients", given.coefficients, (shape[0], 5))
    check_shape("sqdist", given.sqdist, neighbor_shape[:2])
    check_noise(given.noise, given.counter, given.purpose, shape)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    images, index, neighbors, neighbor_index, coefficients, sqdist, noise, counter, *rest = args
    if sqdist is not None:
        sqdist = sqdist.double().contiguous()
    rows = *rows_for_kernel(images, index), *rows_for_kernel(neighbors, neighbor_index)
    return *rows, coefficients.contiguous(), sqdist, *noise_for_kernel(noise, counter), *rest


def _neighbors_per_part(rows: Tensor) -> int:
    """How many neighbours of each row are looked at together: what keeps temporaries small."""
    return max(1, _CHUNK_ELEMENTS // (rows.shape[0] * rows.shape[2]))


def _parts(rows: Tensor, dtype: torch.dtype):
    """Stored rows `[B, K, D]` as network input, some neighbours after the others."""
    return (served(part, dtype) for part in rows.split(_neighbors_per_part(rows), dim=1))


redirect = define(
    "redirect",
    "Tensor images, Tensor? index, Tensor neighbors, Tensor? neighbor_index, Tensor coefficients,"
    " Tensor? sqdist, Tensor? noise, Tensor? counter, int purpose, ScalarType dtype, bool channels_last",
    ("x_t", "target", "spread", "weights"),
    check=_check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
)
