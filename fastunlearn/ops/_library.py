"""The torch.library namespace of the ops, and the choice of backend.

An op is defined once, in `ops/<op>.py`: its schema, its outputs, its eager closed form. A backend's kernel takes the op's arguments and
then its outputs, which it fills: C++ on a CPU (`csrc/<op>.cpp`), Triton or CUDA on a GPU (`kernels/<op>.py`, `csrc/<op>.cu`).

`FASTUNLEARN_BACKEND`, read at every call: unset or `auto`, the kernel where there is one; `kernels`, the kernel or an error; `eager`, the
closed form in plain torch; `reference`, the papers' formulas (`functional.py` sees to that).
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable

import torch
from torch import Tensor

from ._backends import find_kernel

BACKENDS = ("auto", "kernels", "eager", "reference")
LIBRARY = torch.library.Library("fastunlearn", "DEF")
NATIVE = torch.library.Library("fastunlearn_native", "DEF")  # what C++ implements: csrc/<op>.cpp


def define(
    name: str, arguments: str, outputs: tuple[str, ...], *, empty: Callable, eager: Callable, prepare: Callable | None = None, more: str = ""
) -> Callable:
    """Registers `fastunlearn::<name>` for every device.

    Args:
        arguments: of the schema, `"Tensor images, Tensor? index"`.
        outputs: their names.
        empty: the op's arguments to a tuple of its outputs, unwritten: what a kernel fills, and the fake kernel.
        eager: the closed form in plain torch.
        prepare: arguments and outputs to those of the kernel (dense, with tables), where they differ.
        more: arguments of the kernel beyond those of the op, in schema form.
    """

    def run(*args):
        tensor = next(value for value in args if isinstance(value, Tensor))
        kernel = None if backend() == "eager" else find_kernel(name, tensor.device, args, required=backend() == "kernels")
        if kernel is None:
            with torch.autocast(tensor.device.type, enabled=False):  # ops keep their own precision
                return _one_or_all(eager(*args))
        filled = empty(*args)
        with torch.cuda.device_of(tensor):  # where Triton launches
            kernel(*(prepare(args, filled) if prepare else args), *filled)
        return _one_or_all(filled)

    LIBRARY.define(f"{name}({arguments}) -> {'Tensor' if len(outputs) == 1 else '(' + ', '.join(['Tensor'] * len(outputs)) + ')'}")
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunlearn::{name}", lambda *args: _one_or_all(empty(*args)), lib=LIBRARY)
    written = ", ".join(f"Tensor({letter}!) {output}" for letter, output in zip(string.ascii_lowercase, outputs, strict=False))
    define_native(name, f"{arguments}{', ' + more if more else ''}, {written}")
    return getattr(torch.ops.fastunlearn, name).default


def define_native(name: str, arguments: str) -> None:
    """The schema of a C++ kernel: it returns nothing and fills the arguments marked `(a!)`."""
    NATIVE.define(f"{name}({arguments}) -> ()")


def backend() -> str:
    """What `FASTUNLEARN_BACKEND` asks for.

    Raises:
        ValueError: it names no backend.
    """
    name = os.environ.get("FASTUNLEARN_BACKEND") or "auto"
    if name not in BACKENDS:
        raise ValueError(f"FASTUNLEARN_BACKEND: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


def _one_or_all(outputs: tuple[Tensor, ...]):
    return outputs if len(outputs) > 1 else outputs[0]


# --- shared by the closed forms --------------------------------------------------------------------------------------------------


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` `[B]` in the dtype of `like` `[B, ...]`, shaped to broadcast against it."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where one of `tensors` is."""
    return torch.float64 if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def served(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored rows as network input: uint8 `u` as `u / 127.5 - 1`, rounded as in float32 whatever `dtype` is; float rows as they are."""
    return rows.float().div_(127.5).sub_(1).to(dtype) if rows.dtype == torch.uint8 else rows.to(dtype)


def picked(images: Tensor, index: Tensor | None) -> Tensor:
    """`images[index]`, as stored; all rows without an index."""
    return images if index is None else images[index]


def empty_images(images: Tensor, index: Tensor | None, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An unwritten `[B, C, H, W]` for rows `index` of `images`."""
    rows = len(images) if index is None else len(index)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((rows, *images.shape[1:]), dtype=dtype, device=images.device, memory_format=layout)


def laid_out(images: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    return images.to(dtype).contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)


def dense(args: tuple, outputs: tuple) -> tuple:
    """`args` with every tensor contiguous: what a kernel expects unless it says otherwise."""
    return tuple(value.contiguous() if isinstance(value, Tensor) else value for value in args)
