"""How two parameter gradients become one: SISS' rescaling, EraseDiff's projection, ReTrack's rule for lambda.

All work on one parameter at a time. The papers of the first two write the update as `g_x - f g_a`, with a
factor f that needs norms over all parameters together. `main` is g_x (keep), `correction` is g_a (forget).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Combined(NamedTuple):
    """What `rescale`, `project` and `balance` return."""

    gradients: list[Tensor]  # g_x - f g_a, one per parameter (`balance`: (1 + f) g_x - f g_a)
    factor: Tensor  # f, 0-d
    correction_norm: Tensor  # ||g_a||_2 over all parameters, 0-d
    inner_product: Tensor  # <g_x, g_a> over all parameters, 0-d


def rescale(
    main: Sequence[Tensor], correction: Sequence[Tensor], scaling_norm: float, scaling: str = "norm"
) -> Combined:
    """`g_x - (scaling_norm / ||g_a||) g_a`: the forget gradient is set to the given norm, up or down.

    SISS, section 4, "gradient norm fixing". A vanishing `g_a` has an infinite factor, which counts as 0, as
    in SISS' training loop on MNIST.

    Args:
        scaling: `"norm"`. With `"ratio"` the norm is `scaling_norm ||g_x||`, which is how the authors choose
            `scaling_norm` (about a tenth of `||g_x||`). With `"clip"` the factor is 1 at most.
    """
    norm = _inner(correction, correction).sqrt()
    if scaling == "ratio":
        # f = scaling_norm ||g_x|| / ||g_a||
        factor = scaling_norm * _inner(main, main).sqrt() / norm
    elif scaling == "clip":
        # f = min(1, scaling_norm / ||g_a||)
        factor = torch.clamp(scaling_norm / norm, max=1)
    else:
        # f = scaling_norm / ||g_a||
        factor = scaling_norm / norm
    factor = torch.where(factor.isinf(), torch.zeros_like(factor), factor)
    return _combine(main, correction, factor, norm)


def project(
    main: Sequence[Tensor],
    correction: Sequence[Tensor],
    eta: float,
    rule: str = "projection",
    multiplier: float | None = None,
) -> Combined:
    """`g_x + max(eta - c, 0) g_a`, or `g_x + multiplier g_a` where one is given (EraseDiff).

    `"projection"`, as used by SISS and ReTrack: `c = <g_x, g_a> / ||g_a||^2`. Afterwards
    `<g, g_a> >= eta ||g_a||^2`. `"norm"` and `"cosine"`, as in EraseDiff's code:
    `c = <g_x, g_a> / (||g_a|| + 1e-8)` and `c = <g_x, g_a> / (||g_x|| ||g_a|| + 1e-8)`.

    The factor is returned with the sign of `rescale`, so it is `-max(...)`.
    """
    norm, product = _inner(correction, correction).sqrt(), _inner(main, correction)
    if rule == "projection":
        c = product / norm**2
    elif rule == "norm":
        c = product / (norm + 1e-8)
    else:
        c = product / (_inner(main, main).sqrt() * norm + 1e-8)
    # f = -max(eta - c, 0)
    factor = -torch.clamp(eta - c, min=0)
    if multiplier is not None:
        factor = torch.full_like(norm, -multiplier)
    return _combine(main, correction, factor, norm)


def balance(main: Sequence[Tensor], correction: Sequence[Tensor]) -> Combined:
    """`lambda g_a + (1 - lambda) g_x`, both summands of one norm: `lambda = ||g_x|| / (||g_a|| + ||g_x||)`.

    ReTrack, section 3.4: lambda is to make both terms of similar size. The factor is returned with the sign
    of `rescale`, so it is `-lambda`.
    """
    norm, main_norm = _inner(correction, correction).sqrt(), _inner(main, main).sqrt()
    # 1 - lambda by a quotient of its own: the difference rounds to nothing where g_a is far smaller.
    weight, rest = main_norm / (norm + main_norm), norm / (norm + main_norm)
    return _combine([rest * m for m in main], correction, -weight, norm)


def _inner(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """`<left, right>` over all parameters together."""
    return torch.stack([(a * b).sum() for a, b in zip(left, right, strict=True)]).sum()


def _combine(main: Sequence[Tensor], correction: Sequence[Tensor], factor: Tensor, norm: Tensor) -> Combined:
    """`g_x - f g_a` for every parameter, with the numbers that were measured."""
    gradients = [m - factor * c for m, c in zip(main, correction, strict=True)]
    return Combined(gradients, factor, norm, _inner(main, correction))
