"""Attention of small heads, faster than torch's on a CPU: `with fast_attention(): model(x, t)`.

In the papers' MNIST network (heads of 8 channels) torch's CPU attention takes a quarter of a training step
and more.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from ..ops._backends import extension
from ..ops._library import backend
from ..ops.attention import attention

# Of a head, by torch's name of the instruction set. Measured with bench/bench_attention.py on an EPYC 9005,
# against torch 2.13, forward and backward: 4.5 times faster with D = 8, 1.1 to 1.6 times with 64. Beyond,
# matrix products are nearly all of the time, and how fast torch's are is the processor's affair.
LARGEST_DEPTH = {"AVX512": 64, "AVX2": 16}
# Of a call, B H Sq Sk: below, the way of an op through Python takes longer than the attention.
FEWEST_SCORES = 1 << 14


class fast_attention(TorchFunctionMode):
    """Within this context torch's attention runs as the op `fastunlearn::attention` where that is faster.

    torch's attention is `torch.nn.functional.scaled_dot_product_attention`. The op was measured faster for
    float32 and bfloat16 `[B, H, S, D]` on a CPU with D up to `LARGEST_DEPTH` and as many heads as threads,
    without mask, dropout, causality, grouped heads and `torch.compile`, with the C++ extension, unless
    `FASTUNLEARN_BACKEND` says `eager` or `reference`. All other calls, and all other functions, are torch's
    own. The backward pass may run outside the context. There is no second derivative: asking for one raises
    NotImplementedError.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is scaled_dot_product_attention:
            return _attention(*args, **(kwargs or {}))
        return func(*args, **kwargs) if kwargs else func(*args)


def _attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """With the arguments of torch's function."""
    plain = attn_mask is None and dropout_p == 0 and not is_causal and not enable_gqa
    if plain and _is_faster(query, key, value):
        if scale is None:
            scale = query.shape[-1] ** -0.5
        return attention(query, key, value, scale)[0]
    return scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


def _is_faster(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether the op takes these tensors, and was measured faster than torch for their shapes."""
    if torch.compiler.is_compiling() or _is_transformed():
        return False
    for heads in (query, key, value):
        if type(heads) is not Tensor or heads.device.type != "cpu" or heads.ndim != 4:
            return False
        if heads.dtype != query.dtype:
            return False
    if query.dtype not in (torch.float32, torch.bfloat16):
        return False
    # Autocast would convert the tensors for torch's function, and does not for the op.
    if torch.is_autocast_enabled("cpu") and query.dtype != torch.get_autocast_dtype("cpu"):
        return False
    batch, heads, queries, depth = query.shape
    keys = key.shape[2]
    if key.shape != (batch, heads, keys, depth) or value.shape != key.shape:
        return False
    if depth > LARGEST_DEPTH.get(torch.backends.cpu.get_cpu_capability(), 0):
        return False
    # A head is one thread's work.
    if batch * heads * queries * keys < FEWEST_SCORES or batch * heads < torch.get_num_threads():
        return False
    return backend() in ("auto", "kernels") and extension("_C")


def _is_transformed() -> bool:
    """Whether something looks into the attention: `torch.func`, or hooks on saved tensors.

    Under `torch.func` the op has no rules; under saved-tensor hooks a second forward pass outside the context
    may follow (activation checkpointing), which must save the same tensors as the first.
    """
    # torch has no public way to ask for either.
    return (
        torch._C._are_functorch_transforms_active()
        or torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    )
