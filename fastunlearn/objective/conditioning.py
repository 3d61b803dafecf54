"""Conditioning: what a network is given beside images and timesteps, in nested dicts."""

from __future__ import annotations

from numbers import Number
from typing import Any

import numpy as np
import torch
from torch import Tensor

# What conditioning has beside tensors; bool is a Number.
CONSTANTS = (str, Number, np.bool_, type(None))
NAMES = "forget_kwargs, retain_kwargs"


def map_tensors(function, first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """`function` on corresponding tensors of nested dicts. Everything else stays as it is.

    Raises:
        ValueError: the dicts have different keys, tensors that differ by more than their rows, or something
            else that differs: rows that share a call of the network share all but their tensors.
        TypeError: an entry is none of these, or not the same kind of thing in all dicts.
    """
    return _map_tensors(function, (first, *others), "")


def _map_tensors(function, given: tuple[dict[str, Any], ...], path: str) -> dict[str, Any]:
    """`map_tensors` of the dicts that stand at `path` in those of the caller."""
    for other in given[1:]:
        if given[0].keys() != other.keys():
            within = f" in {path[:-1]!r}" if path else ""
            shown = f"{sorted(given[0])} and {sorted(other)}"
            raise ValueError(f"{NAMES}: expected the same keys{within}, got {shown}")
    result = {}
    for key in given[0]:
        values = tuple(each[key] for each in given)
        if all(isinstance(value, dict) for value in values):
            result[key] = _map_tensors(function, values, f"{path}{key}.")
        elif all(isinstance(value, Tensor) for value in values):
            _check_shapes(values, path + key)
            result[key] = function(*values)
        elif all(isinstance(value, CONSTANTS) for value in values):
            _check_equal(values, path + key)
            result[key] = values[0]
        else:
            kinds = "numbers, strings, booleans, None, or dicts of them"
            expected = f"expected tensors (batch first), {kinds}, the same kind in both"
            kinds = " and ".join(type(value).__name__ for value in values)
            raise TypeError(f"{NAMES}: {expected}, got {kinds} for {path + key!r}")
    return result


def _check_shapes(values: tuple[Tensor, ...], path: str) -> None:
    """
    Raises:
        ValueError: the tensors at `path` differ by more than their rows.
    """
    if len({value.shape[1:] for value in values}) > 1:
        expected = "expected the same shape but for the rows, to share a call of the network"
        shapes = " and ".join(str(tuple(value.shape)) for value in values)
        raise ValueError(f"{NAMES}: {expected}, got {shapes} for {path!r}")


def _check_equal(values: tuple, path: str) -> None:
    """
    Raises:
        ValueError: the constants at `path` differ; True is not 1.
    """
    if any(type(value) is not type(values[0]) or value != values[0] for value in values):
        expected = "expected the same in both, to share a call of the network"
        shown = " and ".join(map(repr, values))
        raise ValueError(f"{NAMES}: {expected}, got {shown} for {path!r}")


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Conditioning of a pass whose rows are the forget rows, then the retain rows."""
    return map_tensors(lambda a, b: torch.cat([a, b]), first, second)
