"""redirect: ReTrack's importance-weighted target over the k nearest neighbours (ReTrack section 3.3), in closed form.

With `v_j = (x_t - alpha x_j) / sigma`, up to a constant in j: `-||v_j||^2 / 2 = rho <eps, x_j> - rho^2 d_j / 2`, and
`sum_j p_j ||e - v_j||^2 = ||e - sum_j p_j v_j||^2 + spread`. So k targets become one, and the network is asked once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, per_row

_CHUNK_ELEMENTS = 1 << 22  # temporaries over neighbours stay below this many elements


def redirect(forget: Tensor, neighbors: Tensor, noise: Tensor, coefficients: Tensor, sqdist: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`x_t`, target (both `[B, C, H, W]`), spread `[B]` and weights `[B, K]`.

    Args:
        forget: `[B, C, H, W]`, the images to forget.
        neighbors: `[B, K, C, H, W]`, their neighbours among the images to keep.
        noise: `[B, C, H, W]`.
        coefficients: `[B, 5]` float64, `NoiseSchedule.coefficients`.
        sqdist: `[B, K]` float64, `||a - x_j||^2`; None: accumulated here in float64.
    """
    return _op(forget, neighbors, noise, coefficients, squared_distances(forget, neighbors) if sqdist is None else sqdist)


def squared_distances(forget: Tensor, neighbors: Tensor) -> Tensor:
    """`||a - x_j||^2` `[B, K]`, differences and sums in float64 (float32 loses the softmax at small t)."""
    center = forget.flatten(1).double().unsqueeze(1)
    return torch.cat([(center - part.double()).square().sum(-1) for part in _parts(neighbors.flatten(2))], dim=1)


def _eager(forget: Tensor, neighbors: Tensor, noise: Tensor, coefficients: Tensor, sqdist: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    alpha, sigma, a, b, c = coefficients.unbind(1)
    rho = (alpha / sigma).unsqueeze(1)
    rows = neighbors.flatten(2)  # [B, K, D]
    eps = noise.flatten(1).to(rows.dtype)

    # <eps, x_j - a>, of differences: against images at a distance of 0.003 per element, <eps, x_j> alone would lose 30 times the precision at t = 0.
    center = forget.flatten(1).unsqueeze(1)
    dots = torch.cat([torch.bmm(part - center, eps.unsqueeze(2)) for part in _parts(rows)], dim=1).squeeze(2).double()
    farther = sqdist.double() - sqdist.double().amin(1, keepdim=True)
    weights = torch.softmax(rho * dots - 0.5 * rho.square() * farther, dim=1).to(rows.dtype)

    # Mean and spread about the heaviest neighbour: where the weights are one-hot, nothing cancels.
    heaviest = rows.gather(1, weights.argmax(1).view(-1, 1, 1).expand(-1, 1, rows.shape[2]))
    offset, energy = torch.zeros_like(heaviest), torch.zeros_like(weights[:, :1])
    for part, p in zip(_parts(rows), weights.split(_neighbors_per_part(rows), dim=1), strict=True):
        y = part - heaviest
        offset = offset + torch.bmm(p.unsqueeze(1), y)
        energy = energy + (p * y.square().sum(-1)).sum(1, keepdim=True)
    spread = c.square() * (energy.double() - offset.double().square().sum(-1)).squeeze(1).clamp_min(0)

    toward = ((center - heaviest) - offset).view_as(forget)  # a - sum_j p_j x_j
    x_t = per_row(alpha, forget) * forget + per_row(sigma, forget) * noise
    target = per_row(a, forget) * noise + per_row(b, forget) * forget + per_row(c, forget) * toward
    return x_t, target, spread.to(weights.dtype), weights


def _fake(forget: Tensor, neighbors: Tensor, noise: Tensor, coefficients: Tensor, sqdist: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, k = neighbors.shape[:2]
    return torch.empty_like(forget), torch.empty_like(forget), neighbors.new_empty(batch), neighbors.new_empty(batch, k)


def _neighbors_per_part(rows: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // (rows.shape[0] * rows.shape[2]))


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(_neighbors_per_part(rows), dim=1)


_op = define(
    "redirect", "(Tensor forget, Tensor neighbors, Tensor noise, Tensor coefficients, Tensor sqdist) -> (Tensor, Tensor, Tensor, Tensor)", _eager, _fake
)
