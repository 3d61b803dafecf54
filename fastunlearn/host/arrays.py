"""Arrays of any library as tensors that share their memory, and what can be said of that memory."""

from __future__ import annotations

import mmap
import warnings

import numpy as np
import torch
from torch import Tensor


def as_tensor(argument: str, array) -> Tensor:
    """`array` as a tensor that shares its memory; errors call it `argument`.

    Raises:
        TypeError: no dense tensor, no numpy array of plain numbers in native byte order, no object with
            `__dlpack__`.
        ValueError: an array with negative strides.
    """
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise TypeError(f"{argument}: expected a dense tensor, got layout {name(array.layout)}")
        return array.detach()
    if isinstance(array, np.ndarray):
        # kinds: bool, signed and unsigned integers, floats; itemsize 16 is a float128
        if array.dtype.kind not in "buif" or array.dtype.itemsize > 8 or not array.dtype.isnative:
            expected = "an array of uint8 or of floats in native byte order"
            raise TypeError(f"{argument}: expected {expected}, got dtype {array.dtype}")
        if any(stride < 0 for stride in array.strides):
            expected = "an array without negative strides (numpy.ascontiguousarray copies one)"
            raise ValueError(f"{argument}: expected {expected}, got strides {array.strides}")
        with warnings.catch_warnings():  # a read-only array is fine: rows are only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array).detach()
    expected = "a tensor, a numpy array or an object with __dlpack__"
    raise TypeError(f"{argument}: expected {expected}, got {type(array).__name__}")


def as_labels(labels, count: int) -> Tensor:
    """`labels` as int64 `[count]` on the CPU.

    Raises:
        TypeError, ValueError: they are no integers, or not `count` of them.
    """
    try:
        # Of an array a copy: it may be read-only, or have negative strides.
        labels = torch.as_tensor(labels.copy() if isinstance(labels, np.ndarray) else labels)
    except (TypeError, ValueError, RuntimeError) as error:
        found = f"{type(labels).__name__} that is no such array ({error})"
        raise TypeError(f"labels: expected integers of shape [{count}], got {found}") from None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {name(labels.dtype)}")
    if labels.shape != (count,):
        expected = f"expected shape [{count}], one for each row of images"
        raise ValueError(f"labels: {expected}, got {list(labels.shape)}")
    return labels.to("cpu", torch.int64)


def is_memory_mapped(array) -> bool:
    """Whether `array` is a view of a file that is mapped into memory.

    numpy does that with `np.memmap`, torch with `torch.from_file(..., shared=True)`.
    """
    if isinstance(array, Tensor):
        return array.device.type == "cpu" and array.untyped_storage().filename is not None
    while isinstance(array, np.ndarray):
        array = array.base
    return isinstance(array, mmap.mmap)


def tensor_bytes(rows: Tensor) -> np.ndarray:
    """The bytes of `rows` in C order, uint8 of the same leading axes."""
    return rows.cpu().contiguous().view(torch.uint8).numpy()


def name(dtype) -> str:
    """`float32` for `torch.float32`."""
    return str(dtype).removeprefix("torch.")
