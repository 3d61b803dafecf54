"""Device functions on stored images: their numbers as the network sees them, where an element lies."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# 1 / 127.5 in two parts, as in fastunlearn/host/store.py. The upper one has 9 bits, so that a byte times it
# is exact, and the sum of both products is the correctly rounded quotient, whether or not the compiler makes
# a fused multiply-add of them.
_UPPER_PART = tl.constexpr(float.fromhex("0x1.01p-7"))
_LOWER_PART = tl.constexpr(float.fromhex("0x1.010102p-23"))


@triton.jit
def to_float(values):
    """Stored values as float32 on the network's scale.

    uint8 `u` becomes exactly `float32(u) / 127.5 - 1`, other types are converted.
    """
    if values.dtype == tl.uint8:
        u = values.to(tl.float32)
        return (u * _UPPER_PART + u * _LOWER_PART) - 1.0
    return values.to(tl.float32)


@triton.jit
def row_of(index, sample):
    """Which row of a store sample `sample` is: by an index `[B]` int64, or, without one, its own number."""
    if index is None:
        row = sample
    else:
        row = tl.load(index + sample)
    return row


@triton.jit
def channels_last_offset(element, plane, D):
    """Where element `(c * H + y) * W + x` of an image lies in channels-last memory: `(y * W + x) * C + c`.

    `plane` is H * W, D is C * H * W.
    """
    channel = element // plane
    return (element - channel * plane) * (D // plane) + channel


@triton.jit
def channels_first_offset(offset, plane, D):
    """The inverse of `channels_last_offset`: which element lies at `offset` of channels-last memory."""
    channels = D // plane
    pixel = offset // channels
    return (offset - pixel * channels) * plane + pixel


@triton.jit
def element_and_place(tile, plane, D, ORDER: tl.constexpr):
    """The elements of a tile of consecutive numbers, and their places in the outputs.

    Elements are counted in NCHW order, that of the inputs and of Philox. ORDER: see `order_of`.
    """
    if ORDER == "gather":
        return channels_first_offset(tile, plane, D), tile
    if ORDER == "scatter":
        return tile, channels_last_offset(tile, plane, D)
    return tile, tile


def order_of(images: Tensor, channels_last: bool, philox: bool) -> str:
    """How a program walks through images `[B, C, H, W]`: contiguous inputs, perhaps channels-last outputs.

    "gather" reads C planes side by side and writes whole sectors. With Philox that would take four times the
    generator, whose quads are consecutive elements of the logical order: "scatter" writes at a stride of C
    elements, and L2 merges what the channels write.
    """
    if not channels_last or images.shape[1] == 1:
        return "same"
    return "scatter" if philox else "gather"
