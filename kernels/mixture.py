"""mixture (SISS) on NVIDIA GPUs: `x_t`, both targets and both importance weights, in one pass.

Both rows are gathered by index; noise is read, or drawn in registers.

Bytes per element: both images and the noise (none with Philox) read once, `x_t` and two float32 targets
written once: from uint8 with float32 noise and `x_t` 18, with Philox and bfloat16 12. `<eps, x - a>` and `||x
- a||^2` are added in float64, whose rate on data-centre GPUs is half that of float32: at small t they are
multiplied by rho^2 ~ 10^4 and go into an exponent. A sample of more than 4096 elements is split: its programs
leave partial sums for a second, tiny launch.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .images import element_and_place, order_of, row_of, to_float
from .launch import COMPILE_OPTIONS, refuse_beyond_int32, refuse_float64
from .partial_sums import PARTS, tile_of
from .philox import load_noise


@triton.jit(do_not_specialize=["purpose"])
def mixture_kernel(
    retain,  # [N, D] uint8, float16, bfloat16 or float32
    retain_index,  # [B] int64; None: row b is sample b
    forget,  # [M, D]
    forget_index,  # [B] int64 or None
    coefficients,  # [B, 5] float64: alpha, sigma, a, b, c
    from_forget,  # [B] bool
    time_log_ratio,  # [B] floating, or None
    noise,  # [B, D] float16, bfloat16 or float32; None: Philox
    counter,  # [3] int64, where noise is None
    x_t,  # [B, D] float16, bfloat16 or float32
    retain_target,  # [B, D] float32
    forget_target,  # [B, D] float32
    retain_weight,  # [B] float64, where one program does a sample
    forget_weight,  # [B] float64
    partial,  # [B, splits, 2] float64, where several do; else None
    purpose,  # last word of the Philox counter
    D,  # elements of an image
    plane,  # H * W
    lambd: tl.float64,
    logit: tl.float64,  # log(lambd / (1 - lambd))
    BLOCK: tl.constexpr,
    ORDER: tl.constexpr,  # images.order_of
):
    """Program `sample * splits + split` does `BLOCK` consecutive elements of one sample."""
    splits = tl.cdiv(D, BLOCK)
    sample = tl.program_id(0) // splits
    start = (tl.program_id(0) - sample * splits) * BLOCK
    sample = sample.to(tl.int64)
    retain_row = row_of(retain_index, sample)
    forget_row = row_of(forget_index, sample)

    tile = tl.max_contiguous(start + tl.arange(0, BLOCK), 4)  # one layout for all types, see noising.py
    inside = tile < D
    element, place = element_and_place(tile, plane, D, ORDER)
    keep = to_float(tl.load(retain + retain_row * D + element, mask=inside, other=0))
    erase = to_float(tl.load(forget + forget_row * D + element, mask=inside, other=0))
    eps = load_noise(noise, counter, purpose, sample, start, element, inside, D, BLOCK)

    # m is the image that was drawn to make x_t: of x (retain) and a (forget) one.
    # x_t = alpha m + sigma eps; the targets are a eps + b m + c (m - x) and a eps + b m + c (m - a).
    alpha = tl.load(coefficients + sample * 5).to(tl.float32)
    sigma = tl.load(coefficients + sample * 5 + 1).to(tl.float32)
    a = tl.load(coefficients + sample * 5 + 2).to(tl.float32)
    b = tl.load(coefficients + sample * 5 + 3).to(tl.float32)
    c = tl.load(coefficients + sample * 5 + 4).to(tl.float32)
    chosen_forget = tl.load(from_forget + sample) != 0
    chosen = tl.where(chosen_forget, erase, keep)
    base = a * eps + b * chosen
    tl.store(x_t + sample * D + place, (alpha * chosen + sigma * eps).to(x_t.dtype.element_ty), mask=inside)
    tl.store(retain_target + sample * D + place, base + c * (chosen - keep), mask=inside)
    tl.store(forget_target + sample * D + place, base + c * (chosen - erase), mask=inside)

    # What the weights need of the images: <eps, x - a> and ||x - a||^2.
    difference = tl.where(inside, keep - erase, 0.0).to(tl.float64)
    dot = tl.sum(eps.to(tl.float64) * difference)
    square = tl.sum(difference * difference)
    if partial is None:
        _store_weights(
            sample,
            dot,
            square,
            coefficients,
            chosen_forget,
            time_log_ratio,
            lambd,
            logit,
            retain_weight,
            forget_weight,
        )
    else:
        tl.store(partial + tl.program_id(0).to(tl.int64) * 2, dot)
        tl.store(partial + tl.program_id(0).to(tl.int64) * 2 + 1, square)


@triton.jit(do_not_specialize=["splits"])
def mixture_weights_kernel(
    partial,  # [B, splits, 2] float64: <eps, x - a> and ||x - a||^2 of parts of a sample
    coefficients,  # [B, 5] float64
    from_forget,  # [B] bool
    time_log_ratio,  # [B] floating, or None
    retain_weight,  # [B] float64
    forget_weight,  # [B] float64
    splits,
    lambd: tl.float64,
    logit: tl.float64,
    PARTS: tl.constexpr,
):
    """Program b adds the partial sums of sample b in a fixed order and stores its weights."""
    sample = tl.program_id(0).to(tl.int64)
    dot = tl.zeros([PARTS], tl.float64)
    square = tl.zeros([PARTS], tl.float64)
    for start in range(0, splits, PARTS):
        part = start + tl.arange(0, PARTS)
        place = partial + (sample * splits + part) * 2
        dot += tl.load(place, mask=part < splits, other=0)
        square += tl.load(place + 1, mask=part < splits, other=0)
    chosen_forget = tl.load(from_forget + sample) != 0
    _store_weights(
        sample,
        tl.sum(dot),
        tl.sum(square),
        coefficients,
        chosen_forget,
        time_log_ratio,
        lambd,
        logit,
        retain_weight,
        forget_weight,
    )


@triton.jit
def _store_weights(
    sample,
    dot,
    square,
    coefficients,
    chosen_forget,
    time_log_ratio,
    lambd,
    logit,
    retain_weight,
    forget_weight,
):
    """The weights of one sample from `<eps, x - a>` and `||x - a||^2`, in float64.

    At lambd 0 and 1 one of them is 1 and the other the exponential. An infinite log ratio of the branches'
    timestep densities alone decides: one of them could not have made the sample.
    """
    # u = log(q(x_t | a) / q(x_t | x)) = +-rho^2 ||x - a||^2 / 2 - rho <eps, x - a>, rho = alpha / sigma;
    # + where the forget image was drawn.
    rho = tl.load(coefficients + sample * 5) / tl.load(coefficients + sample * 5 + 1)
    quadratic = 0.5 * rho * rho * square
    u = tl.where(chosen_forget, quadratic, -quadratic) - rho * dot
    if time_log_ratio is not None:
        ratio = tl.load(time_log_ratio + sample).to(tl.float64)
        u += ratio
    # SISS Eq. 6: w_x = sigmoid(-(u + L)) / (1 - lambd), L = log(lambd / (1 - lambd)); exp(-u) at lambd 1.
    of_retain = tl.where(lambd == 1, tl.exp(-u), 1.0 / ((1.0 + tl.exp(u + logit)) * (1.0 - lambd)))
    if time_log_ratio is not None:
        of_retain = _decided(of_retain, -ratio, 1.0 - lambd)
    tl.store(retain_weight + sample, of_retain)
    # w_a = sigmoid(u + L) / lambd; exp(u) at lambd 0.
    of_forget = tl.where(lambd == 0, tl.exp(u), 1.0 / ((1.0 + tl.exp(-u - logit)) * lambd))
    if time_log_ratio is not None:
        of_forget = _decided(of_forget, ratio, lambd)
    tl.store(forget_weight + sample, of_forget)


@triton.jit
def _decided(weight, ratio, share):
    """The weight of a branch, or `1 / share` or 0 where its log ratio over the other one is infinite."""
    alone = tl.full([], 1.0, tl.float64) / share
    return tl.where(ratio == float("inf"), alone, tl.where(ratio == -float("inf"), 0.0, weight))


def mixture(
    retain: Tensor,
    retain_index: Tensor | None,
    forget: Tensor,
    forget_index: Tensor | None,
    coefficients: Tensor,
    from_forget: Tensor,
    lambd: float,
    time_log_ratio: Tensor | None,
    noise: Tensor | None,
    counter: Tensor | None,
    purpose: int,
    dtype: torch.dtype,
    channels_last: bool,
    x_t: Tensor,
    retain_target: Tensor,
    forget_target: Tensor,
    retain_weight: Tensor,
    forget_weight: Tensor,
) -> None:
    """Fills the outputs of the op `mixture` (fastunlearn/ops/mixture.py)."""
    refuse_float64("mixture", retain=retain, forget=forget, noise=noise, x_t=x_t)
    elements, plane = math.prod(x_t.shape[1:]), math.prod(x_t.shape[2:])
    refuse_beyond_int32("mixture", elements)
    order = order_of(x_t, channels_last, philox=noise is None)
    block, warps = tile_of(elements)
    splits = triton.cdiv(elements, block)
    partial = retain_weight.new_empty(len(x_t), splits, 2) if splits > 1 else None
    share, logit = float(lambd), _logit(lambd)
    rows = (retain, retain_index, forget, forget_index)
    images = (x_t, retain_target, forget_target)
    weights = (retain_weight, forget_weight)
    mixture_kernel[(len(x_t) * splits,)](
        *rows,
        coefficients,
        from_forget,
        time_log_ratio if partial is None else None,  # read by the launch that stores the weights
        noise,
        counter if noise is None else None,
        *images,
        *weights,
        partial,
        purpose,
        elements,
        plane,
        share,
        logit,
        BLOCK=block,
        ORDER=order,
        num_warps=warps,
        num_stages=1,
        **COMPILE_OPTIONS,
    )
    if partial is not None:
        mixture_weights_kernel[(len(x_t),)](
            partial,
            coefficients,
            from_forget,
            time_log_ratio,
            *weights,
            splits,
            share,
            logit,
            PARTS=PARTS,
            num_warps=4,
            num_stages=1,
            **COMPILE_OPTIONS,
        )


def _logit(share: float) -> float:
    """`log(share / (1 - share))`, infinite at 0 and 1."""
    if share == 0:
        return -math.inf
    if share == 1:
        return math.inf
    return math.log(share) - math.log1p(-share)
