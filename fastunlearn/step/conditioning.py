"""What a caller's loop hands to its network beside images and timesteps, for a step that splits batches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..host import check, say
from ..objective.conditioning import CONSTANTS

BYTES = "%s: values above %d; networks are trained on images in [-1, 1]: x / 127.5 - 1?"
# Images lie in [-1, 1], latents that are scaled within 10 or so; pictures of bytes do not.
LARGEST_USUAL = 32

# Of a given distance: it may come from images of more bits than these, as uint8 rows are beside half
# precision.
DISTANCE_ROUNDING = {torch.float16: 0.02, torch.bfloat16: 0.1}
LEAST_ROUNDING = 1e-3


def keyword_arguments(name: str, given: dict[str, Any] | None) -> dict[str, Any]:
    """
    Raises:
        TypeError: `given`, the argument `name`, is no dict of keyword arguments and not None.
    """
    if given is None:
        return {}
    if not isinstance(given, dict) or not all(isinstance(key, str) for key in given):
        raise TypeError(f"{name}: expected a dict of keyword arguments or None, got {check.describe(given)}")
    return given


def conditioning_of(
    name: str, given: dict[str, Any], batch: int, trained: Sequence[Tensor]
) -> dict[str, Any]:
    """The keyword arguments of the network for a batch of `batch` rows.

    Args:
        name: of the argument, for errors.
        given: tensors with the batch first, or with 1 in its place (one prompt for all rows); numbers,
            strings, booleans and None; dicts of all these.
        trained: parameters that a tensor may depend on, being one of them.

    Returns:
        The same, every tensor with `batch` rows.

    Raises:
        TypeError, ValueError: naming the entry that is none of these, has another number of rows, or has a
            graph of its own.
    """
    return {key: _entry(name, key, value, batch, trained) for key, value in given.items()}


def _entry(name: str, path: str, value: Any, batch: int, trained: Sequence[Tensor]) -> Any:
    if isinstance(value, dict):
        return {key: _entry(name, f"{path}.{key}", each, batch, trained) for key, each in value.items()}
    if isinstance(value, CONSTANTS):
        return value
    if not isinstance(value, Tensor):
        expected = "expected tensors (batch first), numbers, strings, booleans, None, or dicts of them"
        raise TypeError(f"{name}: {expected}, got {type(value).__name__} for {path!r}")
    if value.requires_grad:
        _refuse_graph(name, path, value, trained)
    if value.ndim == 0 or len(value) not in (1, batch):
        expected = f"expected tensors with the batch of {batch} first"
        raise ValueError(
            f"{name}: {expected}, got shape {tuple(value.shape)} for {path!r} (1 row would stand for all)"
        )
    if len(value) == batch:
        return value
    return value.expand(batch, *value.shape[1:])


def _refuse_graph(name: str, path: str, value: Tensor, trained: Sequence[Tensor]) -> None:
    """
    Raises:
        ValueError: `value` was computed by something that may be trained along, and would get no gradient.
    """
    if value.grad_fn is not None:
        expected = (
            "expected tensors without a graph, which a step of several backward passes cannot go through "
            "(detach() takes it off; to train what made it, put both into one model, for its input)"
        )
        raise ValueError(f"{name}: {expected}, got one of {type(value.grad_fn).__name__} for {path!r}")
    if not any(value is parameter for parameter in trained):
        expected = "expected tensors that require no grad, or trained parameters (of the optimizer)"
        raise ValueError(f"{name}: {expected}, got another that requires grad for {path!r}")


def without_graph(name: str, value: Any) -> None:
    """
    Raises:
        ValueError: `value`, images or numbers of a step, requires grad: only the network gets gradients.
    """
    if isinstance(value, Tensor) and value.requires_grad:
        expected = (
            "expected a tensor without a graph (detach() takes it off; encode images under torch.no_grad())"
        )
        raise ValueError(f"{name}: {expected}, got one that requires grad")


def warn_of_bytes(name: str, images: Tensor) -> None:
    """Says once that `images` look like bytes as floats, where reading them is no wait."""
    if check.readable(images) and images.numel() and float(images.detach().amax()) > LARGEST_USUAL:
        say.once(BYTES, name, LARGEST_USUAL)


def check_distances(forget: Tensor, neighbors: Tensor, sqdist: Tensor | None) -> None:
    """Whether `sqdist` `[B, K]` are the squared distances of these images to these neighbours.

    Those to the first ones are measured, where that costs no wait: it finds another unit (grey levels) and
    another order of rows.

    Raises:
        ValueError: they are not.
    """
    if not isinstance(sqdist, Tensor) or not check.readable(sqdist) or not sqdist.is_floating_point():
        return
    # Where shapes or devices do not fit, `functional.redirect` says so.
    if sqdist.shape != neighbors.shape[:2] or neighbors[:, 0].shape != forget.shape:
        return
    if {sqdist.device, neighbors.device} != {forget.device}:
        return
    if bool((sqdist < 0).any()):
        raise ValueError(f"sqdist: expected squared distances >= 0, got {float(sqdist.min()):.6g}")
    measured = (forget.double() - neighbors[:, 0].double()).flatten(1).square().sum(1)
    rounding = DISTANCE_ROUNDING.get(forget.dtype, LEAST_ROUNDING)
    alike = torch.isclose(sqdist[:, 0].double(), measured, rtol=rounding, atol=rounding)
    if not bool(alike.all()):
        row = int((~alike).long().argmax())
        expected = (
            "squared distances between the images given (for uint8 rows: the integers times (2 / 255)^2)"
        )
        got = (
            f"{sqdist[row, 0].item():.6g} where row {row} is {measured[row].item():.6g} from its first "
            "neighbour"
        )
        raise ValueError(f"sqdist: expected {expected}, got {got}")
