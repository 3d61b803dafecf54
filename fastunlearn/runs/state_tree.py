"""A `state_dict()` of anything, taken apart into JSON and tensors, and put together again. No pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# the only keys a JSON object below may have beside plain string keys
TENSOR, TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"


def flatten(state: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """`(skeleton, tensors)`: JSON in which every tensor is a reference, and the tensors, detached, by their
    path.

    Strides are kept for tensors that are not laid out row by row (channels-last optimizer moments): an
    elementwise fused update of a parameter and a moment of different layout would mix up their entries.

    Raises:
        TypeError: naming the path of a value that is no tensor, number, string, boolean, None, dict, list or
            tuple.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            while path in tensors:  # a key may hold dots: `a.b` in `c` and `b` in `c.a` have one path
                path += "'"
            tensors[path] = value.detach()
            return {TENSOR: path, "stride": list(value.stride())} if _permuted(value) else {TENSOR: path}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [visit(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {TUPLE: [visit(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, dict):
            if all(isinstance(key, str) for key in value) and not {TENSOR, TUPLE, ITEMS} & set(value):
                return {key: visit(item, f"{path}.{key}") for key, item in value.items()}
            return {
                ITEMS: [
                    [visit(key, f"{path}.keys"), visit(item, f"{path}.{key}")] for key, item in value.items()
                ]
            }
        raise TypeError(
            f"{path}: expected a tensor, number, string, boolean, None, dict, list or tuple, got {type(value).__name__}"
        )

    return visit(state, name), tensors


def unflatten(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`. Both may come from anywhere.

    Raises:
        ValueError: `skeleton` does not refer to every one of `tensors` once, and to nothing else, or gives a
            layout that its tensor cannot have.
    """
    unused = dict(tensors)

    def visit(value: Any) -> Any:
        if isinstance(value, list):
            return [visit(item) for item in value]
        if not isinstance(value, dict):
            return value
        keys = set(value)
        if keys == {TENSOR} or keys == {TENSOR, "stride"}:
            name = value[TENSOR]
            if not isinstance(name, str) or name not in unused:
                raise ValueError(f"{name!r}: expected the name of a tensor, each of them once, got another")
            tensor = unused.pop(name)
            return _laid_out(name, tensor, value["stride"]) if "stride" in value else tensor
        if keys == {TUPLE}:
            return tuple(visit(item) for item in value[TUPLE])
        if keys == {ITEMS}:
            items = {visit(key): visit(item) for key, item in value[ITEMS]}
            if len(items) != len(value[ITEMS]):
                raise ValueError(f"{ITEMS}: expected every key once, got one twice")
            return items
        if keys & {TENSOR, TUPLE, ITEMS}:
            raise ValueError(
                f"{sorted(keys & {TENSOR, TUPLE, ITEMS})[0]}: expected it alone, got it beside others"
            )
        return {key: visit(item) for key, item in value.items()}

    state = visit(skeleton)
    if unused:
        raise ValueError(
            f"{next(iter(unused))}: expected tensors that belong to the state, got one that does not"
        )
    return state


def _laid_out(name: str, tensor: Tensor, stride: Any) -> Tensor:
    """A copy of the contiguous `tensor` with these strides: those of a dense layout, whatever the order of
    its axes.
    """
    whole = isinstance(stride, list) and all(type(step) is int and 0 <= step < 2**63 for step in stride)
    if not whole or len(stride) != tensor.ndim:
        raise ValueError(f"{name}: expected {tensor.ndim} integers as strides, got {stride!r}")
    order = sorted(range(tensor.ndim), key=lambda axis: stride[axis], reverse=True)
    # From the outermost axis to the innermost one, as `permute` lays them out; it is no view of less memory.
    copied = tensor.permute(order).contiguous().permute([order.index(axis) for axis in range(tensor.ndim)])
    found = [step for step, length in zip(copied.stride(), tensor.shape, strict=True) if length > 1]
    expected = [step for step, length in zip(stride, tensor.shape, strict=True) if length > 1]
    if found != expected:
        raise ValueError(
            f"{name}: expected the strides of a dense layout of {list(tensor.shape)}, got {stride}"
        )
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(copied)


def _permuted(tensor: Tensor) -> bool:
    """Whether `tensor` is dense but not laid out row by row."""
    if tensor.is_contiguous():
        return False
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).is_contiguous()
