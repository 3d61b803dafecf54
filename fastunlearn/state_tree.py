"""A `state_dict()` of anything, taken apart into JSON and tensors, and put together again. No pickle."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

TENSOR, TUPLE, ITEMS = "__tensor__", "__tuple__", "__items__"  # the only keys a JSON object below may have beside plain string keys


def flatten(state: Any, name: str = "state") -> tuple[Any, dict[str, Tensor]]:
    """`(skeleton, tensors)`: JSON in which every tensor is a reference, and the tensors, detached, by their path.

    Strides are kept for tensors that are not laid out row by row (channels-last optimizer moments): an elementwise fused update of a
    parameter and a moment of different layout would mix up their entries.

    Raises:
        TypeError: naming the path of a value that is no tensor, number, string, boolean, None, dict, list or tuple.
    """
    tensors: dict[str, Tensor] = {}

    def visit(value: Any, path: str) -> Any:
        if isinstance(value, Tensor):
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
            return {ITEMS: [[visit(key, f"{path}.keys"), visit(item, f"{path}.{key}")] for key, item in value.items()]}
        raise TypeError(f"{path}: expected a tensor, number, string, boolean, None, dict, list or tuple, got {type(value).__name__}")

    return visit(state, name), tensors


def unflatten(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `flatten`."""
    if isinstance(skeleton, list):
        return [unflatten(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    if TENSOR in skeleton:
        tensor = tensors[skeleton[TENSOR]]
        return torch.empty_strided(tensor.shape, skeleton["stride"], dtype=tensor.dtype).copy_(tensor) if "stride" in skeleton else tensor
    if TUPLE in skeleton:
        return tuple(unflatten(item, tensors) for item in skeleton[TUPLE])
    if ITEMS in skeleton:
        return {unflatten(key, tensors): unflatten(item, tensors) for key, item in skeleton[ITEMS]}
    return {key: unflatten(item, tensors) for key, item in skeleton.items()}


def _permuted(tensor: Tensor) -> bool:
    """Whether `tensor` is dense but not laid out row by row."""
    if tensor.is_contiguous():
        return False
    return tensor.permute(sorted(range(tensor.ndim), key=tensor.stride, reverse=True)).is_contiguous()
