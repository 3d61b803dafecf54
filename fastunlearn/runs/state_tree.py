"""A `state_dict()` of anything, taken apart into JSON and tensors, and put together again. No pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# What JSON does not know stands in an object under one of these keys: a reference to a tensor, the items of a
# tuple, and the pairs of a dict whose keys are not all texts, or are one of these.
TENSOR, TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"
MARKS = {TENSOR, TUPLE, ITEMS}


def flatten(state: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """Takes a state apart.

    Args:
        state: nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        name: the first word of every tensor's path.

    Returns:
        `(skeleton, tensors)`: JSON in which every tensor is a reference, and the tensors, detached, by their
        path.

    Raises:
        TypeError: naming the path of a value that is no tensor, number, string, boolean, None, dict, list or
            tuple.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
            # A key may hold dots: `a.b` in `c` and `b` in `c.a` have one path.
            while path in tensors:
                path += "'"
            tensors[path] = value.detach()
            reference: dict[str, Any] = {TENSOR: path}
            # A file holds tensors row by row. Others (channels-last moments of an optimizer) get their layout
            # back: a fused update walks through parameter and moment in the order of memory, and would mix up
            # their entries if the layouts differed.
            if _permuted(value):
                reference["stride"] = list(value.stride())
            return reference
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        if isinstance(value, list):
            return [visit(item, f"{path}.{index}") for index, item in enumerate(value)]
        if isinstance(value, tuple):
            return {TUPLE: [visit(item, f"{path}.{index}") for index, item in enumerate(value)]}
        if isinstance(value, dict):
            plain = all(isinstance(key, str) for key in value) and not MARKS & set(value)
            if plain:
                return {key: visit(item, f"{path}.{key}") for key, item in value.items()}
            pairs = []
            for key, item in value.items():
                pairs.append([visit(key, f"{path}.keys"), visit(item, f"{path}.{key}")])
            return {ITEMS: pairs}
        expected = "a tensor, number, string, boolean, None, dict, list or tuple"
        raise TypeError(f"{path}: expected {expected}, got {type(value).__name__}")

    return visit(state, name), tensors


def unflatten(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`. Both arguments may come from anywhere.

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
            if "stride" in value:
                return _laid_out(name, tensor, value["stride"])
            return tensor
        if keys == {TUPLE}:
            return tuple(visit(item) for item in value[TUPLE])
        if keys == {ITEMS}:
            items = {visit(key): visit(item) for key, item in value[ITEMS]}
            if len(items) != len(value[ITEMS]):
                raise ValueError(f"{ITEMS}: expected every key once, got one twice")
            return items
        if keys & MARKS:
            raise ValueError(f"{min(keys & MARKS)}: expected it alone, got it beside others")
        return {key: visit(item) for key, item in value.items()}

    state = visit(skeleton)
    if unused:
        raise ValueError(
            f"{next(iter(unused))}: expected tensors that belong to the state, got one that does not"
        )
    return state


def _laid_out(name: str, tensor: Tensor, stride: Any) -> Tensor:
    """A copy of the contiguous `tensor` with these strides.

    Raises:
        ValueError: they are not those of a dense layout, whatever the order of its axes.
    """
    # An exact type: True is an int, too, and would pass for a stride of 1.
    whole = isinstance(stride, list) and all(type(step) is int and 0 <= step < 2**63 for step in stride)
    if not whole or len(stride) != tensor.ndim:
        raise ValueError(f"{name}: expected {tensor.ndim} integers as strides, got {stride!r}")
    # Strides from a file could overlap, or ask for any amount of memory. So a dense copy is made with its
    # axes in the order of the strides, from the outermost to the innermost one, and has to have them. The
    # stride of an axis of length 1 means nothing.
    order = sorted(range(tensor.ndim), key=lambda axis: stride[axis], reverse=True)
    back = [order.index(axis) for axis in range(tensor.ndim)]
    copied = tensor.permute(order).contiguous().permute(back)
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
    outermost_first = sorted(range(tensor.ndim), key=tensor.stride, reverse=True)
    return tensor.permute(outermost_first).is_contiguous()
