"""Conditioning: what a network is given beside images and timesteps, in nested dicts."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

CONSTANTS = (str, Number, np.bool_, type(None))  # what conditioning has beside tensors; bool is a Number


def map_tensors(function, first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """`function` on corresponding tensors of nested dicts. Everything else stays as it is.

    Raises:
        ValueError: the dicts have different keys, tensors that differ by more than their rows, or something
            else that differs: rows that share a call of the network share all but their tensors.
        TypeError: an entry is none of these, or not the same kind of thing in all dicts.
    """
    return _map_tensors(function, (first, *others), "")


def _map_tensors(function, given: tuple[dict[str, Any], ...], path: str) -> dict[str, Any]:
    names = "forget_kwargs, retain_kwargs"
    within = f" in {path[:-1]!r}" if path else ""
    for other in given[1:]:
        if given[0].keys() != other.keys():
            shown = f"{sorted(given[0])} and {sorted(other)}"
            raise ValueError(f"{names}: expected the same keys{within}, got {shown}")
    result = {}
    for key in given[0]:
        values = tuple(each[key] for each in given)
        if all(isinstance(value, dict) for value in values):
            result[key] = _map_tensors(function, values, f"{path}{key}.")
        elif all(isinstance(value, Tensor) for value in values):
            if len({value.shape[1:] for value in values}) > 1:
                expected = "expected the same shape but for the rows, to share a call of the network"
                shapes = " and ".join(str(tuple(value.shape)) for value in values)
                raise ValueError(f"{names}: {expected}, got {shapes} for {path + key!r}")
            result[key] = function(*values)
        elif all(isinstance(value, CONSTANTS) for value in values):
            if any(type(value) is not type(values[0]) or value != values[0] for value in values):
                expected = "expected the same in both, to share a call of the network"
                shown = " and ".join(map(repr, values))
                raise ValueError(f"{names}: {expected}, got {shown} for {path + key!r}")
            result[key] = values[0]
        else:
            kinds = "numbers, strings, booleans, None, or dicts of them"
            expected = f"expected tensors (batch first), {kinds}, the same kind in both"
            kinds = " and ".join(type(value).__name__ for value in values)
            raise TypeError(f"{names}: {expected}, got {kinds} for {path + key!r}")
    return result


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Conditioning of a pass whose rows are the forget rows, then the retain rows."""
    return map_tensors(lambda a, b: torch.cat([a, b]), first, second)
