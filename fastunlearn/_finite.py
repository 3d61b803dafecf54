"""NaN and Inf are refused where they enter a metric: a comparison with NaN is False, like an answer."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


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
