"""Where there is NaN or Inf.

Both are refused where they enter a metric: `NaN < x` is False, like an answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import check

ROUNDING = 1e-2  # bfloat16 has eight bits: an image in [-1, 1] may come out of it a little larger


class NotFiniteError(ValueError):
    """NaN or Inf where a measurement needs a number."""


def rows(name: str, value: Tensor) -> Tensor:
    """`value` `[N, ...]`, refused with the number of rows that hold NaN or Inf, and the first of them."""
    bad = ~torch.isfinite(value).flatten(1).all(1)
    if bad.any():
        first = int(bad.nonzero()[0])
        found = f"NaN or Inf in {int(bad.sum())} of {len(value)} (first: {first})"
        raise NotFiniteError(f"{name}: expected finite values, got {found}")
    return value


def pixels(name: str, images: Tensor) -> Tensor:
    """Images `[N, C, H, W]` in [-1, 1]; of others, such as floats up to 255, a number would say nothing."""
    rows(name, check.images(name, images))
    low, high = (bound.item() for bound in torch.aminmax(images))
    if max(-low, high) > 1 + ROUNDING:
        raise ValueError(f"{name}: expected values in [-1, 1], got values in [{low:.6g}, {high:.6g}]")
    return images


def weights(model: object, name: str = "model") -> None:
    """Refuses a module with NaN or Inf in a parameter or a buffer, and names it; a function has none."""
    if not isinstance(model, nn.Module):
        return
    bad = not_finite({**dict(model.named_parameters()), **dict(model.named_buffers())})
    if bad:
        raise NotFiniteError(f"{name}: expected finite weights, got NaN or Inf in {bad[0]}")


def not_finite(weights: dict[str, Any]) -> list[str]:
    """The tensors in `weights` that hold NaN or Inf, by the keys that lead to them, joined by dots."""
    named = named_tensors(weights)
    good = _are_finite(list(named.values()))
    return [entry for entry, is_good in zip(named, good, strict=True) if not is_good]


def named_tensors(weights: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors in `weights`, nested as state dicts are, that could hold NaN, by the keys to them."""
    return dict(_tensors("", weights))


def numbers(name: str, **values: float) -> None:
    """Refuses scores that are no numbers, and names them."""
    bad = [f"{key} = {value}" for key, value in values.items() if not math.isfinite(value)]
    if bad:
        raise NotFiniteError(f"{name}: expected finite numbers, got {', '.join(bad)}")


def _are_finite(tensors: list[Tensor]) -> list[bool]:
    """Of each tensor, whether it has neither NaN nor Inf; one wait for the device, seldom two."""
    if not tensors:
        return []
    # The fast way, without a buffer of their size. For the largest numbers the sum of squares overflows, too.
    finite = _read(torch._foreach_norm(tensors))
    suspects = [tensor for tensor, good in zip(tensors, finite, strict=True) if not good]
    if not suspects:
        return finite
    # The largest absolute value cannot overflow.
    exact = iter(_read(torch._foreach_norm(suspects, torch.inf)))
    return [good or next(exact) for good in finite]


def _read(norms: Sequence[Tensor]) -> list[bool]:
    return torch.stack([norm.isfinite().to(norms[0].device) for norm in norms]).tolist()


def _tensors(name: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors below `state` that could hold NaN, with where they are."""
    if isinstance(state, Tensor):
        if state.numel() and (state.is_floating_point() or state.is_complex()):
            yield name, state.detach()
        return
    parts: Iterable = ()
    if isinstance(state, dict):
        parts = state.items()
    elif isinstance(state, (list, tuple)):
        parts = enumerate(state)
    for key, value in parts:
        yield from _tensors(f"{name}.{key}" if name else str(key), value)
