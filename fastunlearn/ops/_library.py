"""The torch.library namespace of the ops, and the choice of backend.

An op is defined once, in `ops/<op>.py`: its schema, its outputs, its eager closed form. A backend's kernel
takes the op's arguments and then its outputs, which it fills: C++ on a CPU (`csrc/<op>.cpp`), Triton or CUDA
on a GPU (`kernels/<op>.py`, `csrc/<op>.cu`).

`FASTUNLEARN_BACKEND`, read at every call: unset or `auto`, the kernel where there is one; `kernels`, the
kernel or an error; `eager`, the closed form in plain torch; `reference`, the papers' formulas
(`functional.py` sees to that).
"""

from __future__ import annotations

import os
import string
from collections.abc import Callable

import torch
from torch import Tensor

from ..host import forks  # noqa: F401 (kernels run on torch's threads, which no forked child has)
from ..host.store import network_input
from . import _backends

BACKENDS = ("auto", "kernels", "eager", "reference")
LIBRARY = torch.library.Library("fastunlearn", "DEF")
NATIVE = torch.library.Library("fastunlearn_native", "DEF")  # what C++ implements: csrc/<op>.cpp


def define(
    name: str,
    arguments: str,
    outputs: tuple[str, ...],
    *,
    check: Callable,
    empty: Callable,
    eager: Callable,
    prepare: Callable,
    more: str = "",
) -> Callable:
    """Registers `fastunlearn::<name>` for every device.

    Args:
        arguments: of the schema, `"Tensor images, Tensor? index"`.
        outputs: their names.
        check: raises for arguments whose shapes do not fit together, before any backend reads past an end; it
            looks at no values.
        empty: the op's arguments to a tuple of its outputs, unwritten: what a kernel fills, and the fake
            kernel.
        eager: the closed form in plain torch.
        prepare: arguments and outputs to the arguments of the kernel (dense, with tables), where they differ.
        more: arguments of the kernel beyond those of the op, in schema form.
    """

    def on_one_device(args: tuple) -> Tensor:
        """The first tensor of `args`, once the others are where it is."""
        tensor, *others = [value for value in args if isinstance(value, Tensor)]
        for other in others:  # a kernel would take an address on one device for one on another
            if other.device != tensor.device:
                found = f"{tensor.device} and {other.device}"
                raise ValueError(f"{name}: expected all tensors on one device, got {found}")
        return tensor

    def run(*args):
        check(*args)
        tensor = on_one_device(args)

        # The backend is asked for at every call: tests and a user's debugging switch it within a process.
        kernel, wanted = None, backend()
        if wanted != "eager":
            kernel = _backends.find_kernel(name, tensor.device, args, required=wanted == "kernels")
        if kernel is None:
            with torch.autocast(tensor.device.type, enabled=False):  # ops keep their own precision
                return _one_or_all(eager(*args))
        # Ops allocate, kernels fill: layout and dtype are those of the fake kernel, whatever the backend is.
        filled = empty(*args)
        with torch.cuda.device_of(tensor):  # where Triton launches
            kernel(*prepare(args, filled), *filled)
        return _one_or_all(filled)

    def fake(*args):
        check(*args)
        # One meta tensor among others brings a call here: what it returned would be memory that nobody wrote.
        on_one_device(args)
        return _one_or_all(empty(*args))

    returned = ", ".join(["Tensor"] * len(outputs))
    if len(outputs) > 1:
        returned = f"({returned})"
    LIBRARY.define(f"{name}({arguments}) -> {returned}")
    # One implementation for all devices, and none that autograd looks into: gradients have formulas.
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastunlearn::{name}", fake, lib=LIBRARY)

    # The kernel takes the same, then `more`, then the outputs: each marked by a letter of its own as written.
    given = f"{arguments}, {more}" if more else arguments
    letters = zip(string.ascii_lowercase, outputs, strict=False)
    written = ", ".join(f"Tensor({letter}!) {output}" for letter, output in letters)
    define_native(name, f"{given}, {written}")
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


# --- shared by the closed forms


def per_row(values: Tensor, like: Tensor) -> Tensor:
    """`values` `[B]` in the dtype of `like` `[B, ...]`, shaped to broadcast against it."""
    return values.to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    """float32, or float64 where one of `tensors` is."""
    if any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors):
        return torch.float64
    return torch.float32


def served(rows: Tensor, dtype: torch.dtype) -> Tensor:
    """Stored rows as network input: uint8 `u` as `u / 127.5 - 1`, float rows as they are.

    The quotient is rounded as in float32 whatever `dtype` is.
    """
    if rows.dtype == torch.uint8:
        rows = network_input(rows)
    return rows.to(dtype)


def picked(images: Tensor, index: Tensor | None) -> Tensor:
    """`images[index]`, as stored; all rows without an index."""
    return images if index is None else images[index.long()]  # torch takes an index of uint8 for a mask


def empty_images(images: Tensor, index: Tensor | None, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """An unwritten `[B, C, H, W]` for rows `index` of `images`."""
    rows = len(images) if index is None else len(index)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return torch.empty((rows, *images.shape[1:]), dtype=dtype, device=images.device, memory_format=layout)


def laid_out(images: Tensor, dtype: torch.dtype, channels_last: bool) -> Tensor:
    """`images` in `dtype` and in the memory layout asked for."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return images.to(dtype).contiguous(memory_format=layout)


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """Of losses and targets: rounding a target to bfloat16 would put 2^-9 of it on every residual."""
    return torch.promote_types(dtype, torch.float32)


# --- arguments of the kernels


def rows_for_kernel(images: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Contiguous `images` and int64 `index`.

    Of a store that is a permuted view (an NHWC file, perhaps memory-mapped) only the rows are copied.
    """
    if index is None:
        return images.contiguous(), None
    if images.is_contiguous():
        return images, index.long().contiguous()
    return images[index.long()].contiguous(), None


def noise_for_kernel(noise: Tensor | None, counter: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Contiguous `noise`, or its counter as int64."""
    if noise is not None:
        noise = noise.contiguous()
    if counter is not None:
        counter = counter.long().contiguous()
    return noise, counter


# --- checks of shapes


def check_rows(name: str, images: Tensor, index: Tensor | None, *, ndim: int = 1) -> tuple[int, ...]:
    """The shape of `images[index]`; `images` alone has `ndim` axes before C, H, W."""
    if images.numel() == 0:
        raise ValueError(f"{name}: expected at least one image, got shape {tuple(images.shape)}")
    if index is None:
        if images.ndim != ndim + 3:
            raise ValueError(f"{name}: expected [..., C, H, W], got shape {tuple(images.shape)}")
        return tuple(images.shape)

    if images.ndim != 4:
        raise ValueError(f"{name}: expected rows [..., C, H, W], got shape {tuple(images.shape)}")
    if index.ndim != ndim or index.numel() == 0 or index.is_floating_point() or index.dtype == torch.bool:
        expected = f"an integer index of {ndim} axes with at least one row"
        raise ValueError(f"{name}: expected {expected}, got {index.dtype} of shape {tuple(index.shape)}")
    return (*index.shape, *images.shape[1:])


def check_shape(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(tensor.shape)}")


def check_noise(noise: Tensor | None, counter: Tensor | None, purpose: int, shape: tuple[int, ...]) -> None:
    if (noise is None) == (counter is None):
        raise ValueError("noise, counter: expected one of the two")
    check_shape("noise", noise, shape)
    check_shape("counter", counter, (3,))
    if not 0 <= purpose < 2**32:  # a word of the counter that numbers are drawn by
        raise ValueError(f"purpose: expected an integer in [0, 2^32), got {purpose}")
