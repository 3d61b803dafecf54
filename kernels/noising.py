"""noising on NVIDIA GPUs: `x_t` and the target of every sample, in one pass and one launch.

Rows are gathered by index; noise is read, or drawn in registers.

Bytes per element: the image's and the noise's (none with Philox) once, `x_t`'s once, 4 for the target. From
uint8 with float32 noise, `x_t` and target that is 13, of which a copy of the same size would take 13; with
Philox and bfloat16 7, and the generator's ~50 instructions an element take about as long as they do.
Channels-last results: see `order_of` in images.py.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import element_and_place, order_of, row_of, to_float
from .launch import COMPILE_OPTIONS, refuse_beyond_int32, refuse_float64
from .philox import load_noise

WARPS = 8


@triton.jit(do_not_specialize=["purpose"])
def noising_kernel(
    images,  # [N, D] uint8, float16, bfloat16 or float32
    index,  # [B] int64; None: row b is sample b
    coefficients,  # [B, 5] float64: alpha, sigma, a, b, c
    noise,  # [B, D] float16, bfloat16 or float32; None: Philox
    counter,  # [3] int64, where noise is None
    x_t,  # [B, D] float16, bfloat16 or float32
    target,  # [B, D] float32; None: not wanted
    purpose,  # last word of the Philox counter
    D,  # elements of an image
    plane,  # H * W
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,  # images.order_of
):
    """Program `sample * splits + split` does `BLOCK` consecutive elements of one sample."""
    splits = tl.cdiv(D, BLOCK)
    sample = tl.program_id(0) // splits
    start = (tl.program_id(0) - sample * splits) * BLOCK
    sample = sample.to(tl.int64)
    row = row_of(index, sample)

    # Four elements a thread, whatever their type: with one layout for uint8 and float32, nothing goes through
    # shared memory.
    tile = tl.max_contiguous(start + tl.arange(0, BLOCK), 4)
    inside = tile < D
    element, place = element_and_place(tile, plane, D, ORDER)
    image = to_float(tl.load(images + row * D + element, mask=inside, other=0))
    eps = load_noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK)

    # x_t = alpha x + sigma eps
    alpha = tl.load(coefficients + sample * 5).to(tl.float32)
    sigma = tl.load(coefficients + sample * 5 + 1).to(tl.float32)
    tl.store(x_t + sample * D + place, (alpha * image + sigma * eps).to(x_t.dtype.element_ty), mask=inside)
    # target = a eps + b x
    if target is not None:
        a = tl.load(coefficients + sample * 5 + 2).to(tl.float32)
        b = tl.load(coefficients + sample * 5 + 3).to(tl.float32)
        tl.store(target + sample * D + place, a * eps + b * image, mask=inside)


def noising(
    images: Tensor,
    index: Tensor | None,
    coefficients: Tensor,
    noise: Tensor | None,
    counter: Tensor | None,
    purpose: int,
    with_target: bool,
    dtype: torch.dtype,
    channels_last: bool,
    x_t: Tensor,
    target: Tensor,
) -> None:
    """Fills `x_t` and `target` of the op `noising` (fastunlearn/ops/noising.py)."""
    refuse_float64("noising", images=images, noise=noise, x_t=x_t)
    elements, plane = math.prod(x_t.shape[1:]), math.prod(x_t.shape[2:])
    refuse_beyond_int32("noising", elements)
    order = order_of(x_t, channels_last, philox=noise is None)
    block = block_of(elements, order, philox=noise is None)
    programs = len(x_t) * triton.cdiv(elements, block)
    noising_kernel[(programs,)](
        images,
        index,
        coefficients,
        noise,
        counter if noise is None else None,
        x_t,
        target if with_target else None,
        purpose,
        elements,
        plane,
        BLOCK=block,
        ORDER=order,
        num_warps=WARPS,
        num_stages=1,
        **COMPILE_OPTIONS,
    )


def block_of(elements: int, order: str, philox: bool) -> int:
    """Elements of a program."""
    # 4 a thread spread a small batch over the device, and keep the registers of channels-last offsets low.
    if elements <= 16384 or order != "same":
        return 1024
    # 16 a thread share Philox's keys; 8 keep more loads in flight.
    return 4096 if philox else 2048
