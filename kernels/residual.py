"""residual on NVIDIA GPUs: the weighted squared error of every sample and its gradient in one pass.

Bytes per element: prediction and target read once, the gradient written once (12 in float32). A sample of
more than 4096 elements is split: its programs leave partial sums, and a second launch of a few microseconds
adds them in a fixed order, so that the same inputs give the same bits.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from .images import to_float
from .launch import COMPILE_OPTIONS, refuse_beyond_int32, refuse_float64
from .partial_sums import PARTS, tile_of


@triton.jit
def residual_kernel(
    prediction,  # [B, D] float16, bfloat16 or float32, rows `prediction_stride` apart
    target,  # [B, D] the same types, rows `target_stride` apart, elements in the order of prediction's
    weight,  # [B] floating
    gradient,  # [B, D] in the dtype and the order of prediction
    loss,  # [B] float32, where one program does a sample
    partial,  # [B, splits] float32, where several do; else None
    D,  # elements of a sample
    prediction_stride,
    target_stride,
    gradient_stride,
    BLOCK: tl.constexpr,
):
    """Program `sample * splits + split` does `BLOCK` consecutive elements of one sample."""
    splits = tl.cdiv(D, BLOCK)
    sample = (tl.program_id(0) // splits).to(tl.int64)
    element = tl.max_contiguous((tl.program_id(0) % splits) * BLOCK + tl.arange(0, BLOCK), 4)
    inside = element < D
    predicted = to_float(tl.load(prediction + sample * prediction_stride + element, mask=inside, other=0))
    wanted = to_float(tl.load(target + sample * target_stride + element, mask=inside, other=0))
    difference = predicted - wanted

    # gradient = 2 w (prediction - target)
    scale = tl.load(weight + sample).to(tl.float32)
    at = gradient + sample * gradient_stride + element
    tl.store(at, (2.0 * scale * difference).to(gradient.dtype.element_ty), mask=inside)

    # loss = w ||prediction - target||^2
    energy = tl.sum(difference * difference)
    if partial is None:
        tl.store(loss + sample, scale * energy)
    else:
        tl.store(partial + tl.program_id(0), energy)


@triton.jit(do_not_specialize=["splits"])
def residual_sum_kernel(
    partial,  # [B, splits] float32
    weight,  # [B] floating
    loss,  # [B] float32
    splits,
    PARTS: tl.constexpr,
):
    """Program b adds the partial sums of sample b, in float64."""
    sample = tl.program_id(0).to(tl.int64)
    total = tl.zeros([PARTS], tl.float64)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        total += tl.load(partial + sample * splits + part, mask=part < splits, other=0).to(tl.float64)
    tl.store(loss + sample, (tl.load(weight + sample).to(tl.float64) * tl.sum(total)).to(tl.float32))


def residual(prediction: Tensor, target: Tensor, weight: Tensor, loss: Tensor, gradient: Tensor) -> None:
    """Fills `loss` and `gradient` of the op `residual` (fastunlearn/ops/residual.py).

    Every sample of `prediction`, `target` and `gradient` is dense, its elements in the same order in all
    three; rows may lie farther apart.
    """
    refuse_float64("residual", prediction=prediction, target=target)
    elements = math.prod(prediction.shape[1:])
    refuse_beyond_int32("residual", elements)
    block, warps = tile_of(elements)
    splits = triton.cdiv(elements, block)
    partial = loss.new_empty(len(prediction), splits) if splits > 1 else None
    residual_kernel[(len(prediction) * splits,)](
        prediction,
        target,
        weight,
        gradient,
        loss,
        partial,
        elements,
        prediction.stride(0),
        target.stride(0),
        gradient.stride(0),
        BLOCK=block,
        num_warps=warps,
        num_stages=1,
        **COMPILE_OPTIONS,
    )
    if partial is not None:
        residual_sum_kernel[(len(prediction),)](
            partial, weight, loss, splits, PARTS=PARTS, num_warps=1, num_stages=1, **COMPILE_OPTIONS
        )
