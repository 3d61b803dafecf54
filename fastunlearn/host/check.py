"""Argument checks: every message names the argument, what is expected and what was given."""

from __future__ import annotations

import importlib
import math
import os
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from torch import Tensor

LONGEST = 300  # characters of what a file or a library says, as a message of ours shows it
LONGEST_NAME = 255  # bytes of the name of a file, on Linux


def describe(value) -> str:
    """`value` as an error message shows it: dtype, shape and device of a tensor, the type of other things."""
    if isinstance(value, Tensor):
        dtype = str(value.dtype).removeprefix("torch.")
        return f"{dtype} of shape {tuple(value.shape)} on {value.device}"
    if isinstance(value, (int, float, str, bool, type(None))):
        return in_a_line(repr(value))
    return type(value).__name__


def in_a_line(said: object) -> str:
    """What a library or a file says, such as an exception, as one line that is not too long.

    Characters that would do something to a terminal are escaped.
    """
    words = " ".join(str(said).split())
    if len(words) > LONGEST:
        words = f"{words[:LONGEST]}..."
    return "".join(each if each.isprintable() else repr(each)[1:-1] for each in words)


def tensor(name: str, value, *, ndim: int, floating: bool = True) -> Tensor:
    """A tensor of rank `ndim`, floating-point or (`floating=False`) integer."""
    if not isinstance(value, Tensor):
        raise TypeError(_expected_tensor("a", name, value, ndim, floating))
    if floating and not value.is_floating_point():
        raise TypeError(_expected_tensor("a", name, value, ndim, floating))
    if not floating and (value.is_floating_point() or value.is_complex() or value.dtype == torch.bool):
        raise TypeError(_expected_tensor("an", name, value, ndim, floating))
    if value.ndim != ndim:
        raise ValueError(_expected_tensor("a", name, value, ndim, floating))
    return value


def _expected_tensor(article: str, name: str, value, ndim: int, floating: bool) -> str:
    """The message of `tensor`; made only where it is shown, for `tensor` runs at every call of an op."""
    kind = "floating-point" if floating else "integer"
    dimensions = "1 dimension" if ndim == 1 else f"{ndim} dimensions"
    return f"{name}: expected {article} {kind} tensor of {dimensions}, got {describe(value)}"


def images(name: str, value) -> Tensor:
    """A floating-point `[B, C, H, W]` with at least one row."""
    tensor(name, value, ndim=4)
    if value.numel() == 0:
        raise ValueError(f"{name}: expected at least one image [B, C, H, W], got {describe(value)}")
    return value


def like(name: str, value, other_name: str, other: Tensor) -> Tensor:
    """A floating-point tensor of the shape and device of `other`."""
    tensor(name, value, ndim=other.ndim)
    same_shape(name, value, other_name, other)
    same_device(name, value, other_name, other)
    return value


def same_shape(name: str, value, other_name: str, other) -> None:
    """For anything with a shape: tensors, rows of a store, noise that is not drawn yet."""
    if tuple(value.shape) != tuple(other.shape):
        expected = f"expected the shape of {other_name}, {tuple(other.shape)}"
        raise ValueError(f"{name}: {expected}, got {tuple(value.shape)}")


def same_device(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.device != other.device:
        raise ValueError(f"{name}: expected the device of {other_name}, {other.device}, got {value.device}")


def vector(name: str, value, length: int, device: torch.device, *, floating: bool = True) -> Tensor:
    """A tensor `[length]` on `device`."""
    tensor(name, value, ndim=1, floating=floating)
    if len(value) != length:
        raise ValueError(f"{name}: expected one value a row, [{length}], got {tuple(value.shape)}")
    if value.device != device:
        raise ValueError(f"{name}: expected the device of the images, {device}, got {value.device}")
    return value


def scalar(name: str, value):
    """`value` as Python has it, where numpy or torch made it: `np.float32(0.5)`, a 0-d tensor on the CPU.

    Raises:
        TypeError: a 0-d tensor that is not on the CPU, where reading it would wait for the device, or one
            that requires grad, which a number cannot pass on.
    """
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return value.item()
    if not isinstance(value, Tensor) or value.ndim > 0:
        return value
    if value.device.type != "cpu":
        expected = "expected a number on the host (reading this one waits for the device)"
        raise TypeError(f"{name}: {expected}, got {describe(value)}")
    if value.requires_grad:
        expected = "expected a number (detach() makes one of it)"
        raise TypeError(f"{name}: {expected}, got a tensor that requires grad")
    return value.item()


def number(
    name: str, value, *, low: float = -math.inf, high: float = math.inf, low_open: bool = False
) -> float:
    """A finite number in [low, high], or in (low, high] with `low_open`; numpy's, torch's too (`scalar`)."""
    value = scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name}: expected a number, got {describe(value)}")
    if not math.isfinite(value) or value > high or value < low or (low_open and value == low):
        left = "(" if low_open or low == -math.inf else "["
        right = ")" if high == math.inf else "]"
        bounds = f"{left}{low:g}, {high:g}{right}"
        raise ValueError(f"{name}: expected a finite number in {bounds}, got {value!r}")
    return float(value)


def integer(name: str, value, *, low: int, high: int | None = None, of: str = "") -> int:
    """An integer within [low, high], numpy's and torch's too (`scalar`).

    `of` says in words where `high` comes from.
    """
    value = scalar(name, value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an integer, got {describe(value)}")
    if value < low or (high is not None and value > high):
        bounds = f">= {low}" if high is None else f"in [{low}, {high}]"
        if of:
            bounds += f" ({of})"
        raise ValueError(f"{name}: expected an integer {bounds}, got {value}")
    return value


def one_of(name: str, value, choices: tuple[str, ...]) -> str:
    if value not in choices:
        raise ValueError(f"{name}: expected one of {', '.join(choices)}, got {describe(value)}")
    return value


def network_output(output):
    """What a network returned, taken out of an object with `.sample`, or of a tuple that begins with it.

    The latter is diffusers' `return_dict=False`. What comes out may still be no tensor.
    """
    output = getattr(output, "sample", output)
    if isinstance(output, (tuple, list)) and output:
        return output[0]
    return output


def package(name: str, needed_by: str) -> ModuleType:
    """The module `name` of a package that not everybody needs; an error says how to install it."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        top = name.partition(".")[0]
        expected = f"expected the package {top} (pip install {top})"
        raise ImportError(f"{needed_by}: {expected}, got: {error}") from error


def values_enabled() -> bool:
    """Whether `FASTUNLEARN_CHECK=1` asks for checks that read values: on a GPU each waits for the device."""
    return switched_on("FASTUNLEARN_CHECK")


def switched_on(variable: str, *, default: bool = False) -> bool:
    """Whether an environment variable is 1; unset or empty is the `default`.

    Raises:
        ValueError: it is something else than 0 or 1.
    """
    value = os.environ.get(variable, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{variable}: expected 0 or 1, got {value!r}")
    return value == "1" or (value == "" and default)


def wide_enough(name: object, value: Tensor) -> Tensor:
    """Refuses floats of 8 bits and fewer, such as a file may hold: torch does not compute with them."""
    if value.is_floating_point() and value.element_size() < 2:
        raise ValueError(f"{name}: expected floats of at least 16 bits, got {describe(value)}")
    return value


def readable(tensor: Tensor) -> bool:
    """Whether a check may read values: on a CPU, where that is no wait; elsewhere with `FASTUNLEARN_CHECK=1`.

    Not those of a trace, which has none: under torch.compile, torch.func, FakeTensorMode or another mode.
    """
    if torch.compiler.is_compiling():
        return False
    # A mode that sees every op (FakeTensorMode, a test's) may have no values; nor has a tensor of torch.func.
    if torch._C._len_torch_dispatch_stack() > 0 or torch._C._are_functorch_transforms_active():
        return False
    if type(tensor) is not Tensor or tensor.device.type == "meta":
        return False
    return tensor.device.type == "cpu" or values_enabled()


def rows_within(name: str, index: Tensor, count: int) -> None:
    """Refuses rows outside [0, count - 1], where they can be read: torch counts from the end."""
    if index.numel() == 0 or not readable(index):
        return
    low, high = (int(bound) for bound in torch.aminmax(index.long()))
    if low < 0 or high >= count:
        raise ValueError(f"{name}: expected rows in [0, {count - 1}], got rows in [{low}, {high}]")


def finite(name: str, value: Tensor) -> Tensor:
    """Refuses NaN and Inf."""
    wide_enough(name, value)
    bad = (~torch.isfinite(value)).sum().item()
    if bad:
        raise ValueError(f"{name}: expected finite values, got {bad} NaN or Inf of {value.numel()}")
    return value


def is_file_name(name: object) -> bool:
    """Whether `name`, which somebody else has written, can only be that of a file directly in a folder, on
    Windows as on Linux.
    """
    # A name that the system stumbles over would be its error, and as long as the name.
    if not isinstance(name, str) or not name.isprintable() or len(name.encode()) > LONGEST_NAME:
        return False
    return name not in ("", ".", "..") and Path(name).name == name and "\\" not in name
