"""NaN and Inf are refused where they enter a metric: a comparison with NaN is False, like an answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from . import _check

ROUNDING = 1e-2  # bfloat16 has eight bits: an image in [-1, 1] may come out of it a little larger


class NotFiniteError(ValueError):
    """NaN or Inf where a measurement needs a number."""


def rows(name: str, value: Tensor) -> Tensor:
    """`value` `[N, ...]`, refused with the number of rows that hold NaN or Inf, and the first of them."""
    bad = ~torch.isfinite(value).flatten(1).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        raise NotFiniteError(
            f"{name}: expected finite values, "
            f"got NaN or Inf in {int(bad.sum())} of {len(value)} (first: {first})"
        )
    return value


def pixels(name: str, images: Tensor) -> Tensor:
    """Images `[N, C, H, W]` in [-1, 1]; of others, such as floats up to 255, a number would say nothing."""
    rows(name, _check.images(name, images))
    low, high = (bound.item() for bound in torch.aminmax(images))
    if max(-low, high) > 1 + ROUNDING:
        raise ValueError(f"{name}: expected values in [-1, 1], got values in [{low:.6g}, {high:.6g}]")
    return images


def weights(model: object, name: str = "model") -> None:
    """Refuses a module with NaN or Inf in a parameter or a buffer, and names it; a function has none."""
    if not isinstance(model, nn.Module):
        return
    for kind in (model.named_parameters(), model.named_buffers()):
        for key, value in kind:
            if value.is_floating_point() and not torch.isfinite(value).all():
                raise NotFiniteError(f"{name}: expected finite weights, got NaN or Inf in {key}")


def numbers(name: str, **values: float) -> None:
    """Refuses scores that are no numbers, and names them."""
    bad = [f"{key} = {value}" for key, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NotFiniteError(f"{name}: expected finite numbers, got {', '.join(bad)}")
