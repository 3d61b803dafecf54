"""lowpass_residual: the squared error of a band of spatial frequencies and its gradient, in one pass.

arXiv 2510.17917, Eq. 8. In the orthonormal real cosine/sine basis U of an axis a mask of `|u|, |v|` is
diagonal, so the projection of `r = prediction - target` is `P r = U_H [band o (U_H' r U_W)] U_W'`: four small
matrix products in place of four Fourier transforms. With M = `inside` on the band and `outside` elsewhere the
energy is `sum M^2 |R|^2 = inside^2 ||P r||^2 + outside^2 ||r - P r||^2` (Parseval), its gradient
`2 (outside^2 r + (inside^2 - outside^2) P r)`.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ._library import at_least_float32, define, per_row
from .residual import check as check_residual
from .residual import differentiable, in_layout_of, weight_for_kernel


def lowpass_residual(
    prediction: Tensor, target: Tensor, weight: Tensor, band: Tensor, inside: float, outside: float
) -> tuple[Tensor, Tensor]:
    """`weight sum M^2 |R|^2` `[B]`, differentiable in `prediction`, and its gradient.

    Args:
        prediction: `[B, C, H, W]`, any floating dtype; the gradient comes back in that dtype, contiguous.
        target: `[B, C, H, W]`.
        weight: `[B]`.
        band: float32 `[U, V]` of 0 and 1 over the frequencies `0 <= u < U <= H // 2 + 1`, `0 <= v < V <= W //
            2 + 1` (`LowPass.mask`).
        inside, outside: M on the band, and elsewhere.
    """
    return _op(prediction, target, weight, band, inside, outside)


@functools.lru_cache(maxsize=64)
def basis(size: int, frequencies: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Orthonormal real basis of the lowest frequencies of an axis, `[size, columns]`.

    Its columns: a constant, cosine and sine of u = 1, 2, ..., and `(-1)^n` at size / 2. Column i belongs to
    frequency `(i + 1) // 2`.
    """
    # Cosine and sine of every frequency but 0, and but size / 2 where that is one.
    columns = min(2 * frequencies - 1, size)
    n = torch.arange(size, dtype=torch.int64)
    u = (torch.arange(columns) + 1) // 2
    # Whole turns are taken off in integers: sin and cos of large multiples of 2 pi lose digits.
    turns = (n[:, None] * u) % size
    angle = turns.double() * (2 * math.pi / size)
    table = torch.where(torch.arange(columns) % 2 == 1, angle.cos(), angle.sin())
    table[:, 0] = 1
    # Squares of a cosine add up to size / 2; of the two that have no sine (constant, alternating) to size.
    alone = (u == 0) | (2 * u == size)
    norm = torch.where(alone, size, size / 2).double().sqrt()
    return (table / norm).to(dtype).to(device)


def _eager(
    prediction: Tensor, target: Tensor, weight: Tensor, band: Tensor, inside: float, outside: float
) -> tuple[Tensor, Tensor]:
    precision = at_least_float32(prediction.dtype)
    r = prediction.to(precision) - target

    # P r = U_H [band o (U_H' r U_W)] U_W'
    rows, columns = _bases(r, band)
    row_frequency = (torch.arange(rows.shape[1], device=r.device) + 1) // 2
    column_frequency = (torch.arange(columns.shape[1], device=r.device) + 1) // 2
    mask = band.to(r.dtype)[row_frequency][:, column_frequency]
    coefficients = mask * (rows.T @ r @ columns)
    projected = rows @ coefficients @ columns.T

    # energy = inside^2 ||P r||^2 + outside^2 ||r - P r||^2, the first from the coefficients (Parseval);
    # half of its gradient is P_{M^2} r = outside^2 r + (inside^2 - outside^2) P r.
    squared, squared_outside = inside * inside, outside * outside
    energy = squared * coefficients.flatten(1).square().sum(1)
    gradient = (squared - squared_outside) * projected
    if outside != 0:
        energy = energy + squared_outside * (r - projected).flatten(1).square().sum(1)
        gradient = gradient + squared_outside * r

    weight = weight.to(r.dtype)
    gradient = (per_row(2 * weight, r) * gradient).to(prediction.dtype)
    return (weight * energy).to(precision), gradient.contiguous()


def _empty(
    prediction: Tensor, target: Tensor, weight: Tensor, band: Tensor, inside: float, outside: float
) -> tuple[Tensor, Tensor]:
    energy = prediction.new_empty(len(prediction), dtype=at_least_float32(prediction.dtype))
    return energy, prediction.new_empty(prediction.shape)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    prediction, target, weight, band, inside, outside = args
    gradient = outputs[1]
    images = in_layout_of(gradient, prediction), in_layout_of(gradient, target)
    mask = band.float().contiguous(), inside, outside
    return *images, weight_for_kernel(weight), *mask, *_bases(images[0], band)


def _bases(like: Tensor, band: Tensor) -> tuple[Tensor, Tensor]:
    """U_H and U_W for images like `like`, up to the highest frequencies of `band`."""
    (height, width), dtype = like.shape[-2:], at_least_float32(like.dtype)
    return basis(height, band.shape[0], like.device, dtype), basis(width, band.shape[1], like.device, dtype)


def _check(
    prediction: Tensor, target: Tensor, weight: Tensor, band: Tensor, inside: float, outside: float
) -> None:
    check_residual(prediction, target, weight)
    height, width = prediction.shape[-2:]
    largest = height // 2 + 1, width // 2 + 1
    if band.ndim != 2 or not 0 < band.shape[0] <= largest[0] or not 0 < band.shape[1] <= largest[1]:
        expected = f"[U, V] with U in [1, {largest[0]}] and V in [1, {largest[1]}]"
        raise ValueError(f"band: expected {expected}, got shape {tuple(band.shape)}")


_op = define(
    "lowpass_residual",
    "Tensor prediction, Tensor target, Tensor weight, Tensor band, float inside, float outside",
    ("energy", "gradient"),
    check=_check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
    more="Tensor row_basis, Tensor column_basis",
)
differentiable("lowpass_residual", _op, _eager)
