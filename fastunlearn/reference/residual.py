"""The weighted denoising regression that every method is made of."""

from __future__ import annotations

from torch import Tensor


def denoising_loss(prediction: Tensor, target: Tensor, weight: Tensor | None = None) -> Tensor:
    """`w ||prediction - target||^2` per sample, `[B]`, summed over all other axes.

    Args:
        prediction, target: `[B, ...]`.
        weight: `[B]`, or None for 1.
    """
    loss = (prediction - target).square().flatten(1).sum(dim=1)
    return loss if weight is None else weight * loss
