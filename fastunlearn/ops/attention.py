"""attention: softmax attention, and its gradient, for the small heads of small networks.

torch's CPU kernels are made for large ones. The gradient makes the weights again from `logsumexp` (Dao et al.
2022): nothing of the size `[Sq, Sk]` is kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`softmax(scale query key') value` `[B, H, Sq, D]`, once differentiable, and `logsumexp`.

    The latter, `[B, H, Sq]` float32, are the logarithms of the softmax's sums. The result, and every
    gradient, lies in memory as `[B, S, H, D]`: what comes before and after works on `[B, S, H D]`.

    Args:
        query: `[B, H, Sq, D]` float16, bfloat16 or float32; sums are float32.
        key, value: `[B, H, Sk, D]` in the dtype of `query`.
        scale: of the scores, mostly `D ** -0.5`.
    """
    return _op(query, key, value, scale)


def _eager(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    weights, logsumexp = _weights(query, key, scale, None)
    return _empty_heads(query).copy_(weights @ value.float()), logsumexp


def _weights(query: Tensor, key: Tensor, scale: float, logsumexp: Tensor | None) -> tuple[Tensor, Tensor]:
    """The softmax `[B, H, Sq, Sk]`, and logsumexp, in float32."""
    scores = scale * (query.float() @ key.float().mT)
    if logsumexp is None:
        logsumexp = scores.logsumexp(-1)
    return (scores - logsumexp.unsqueeze(-1)).exp(), logsumexp


def _empty(query: Tensor, key: Tensor, value: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    return _empty_heads(query), query.new_empty(query.shape[:3], dtype=torch.float32)


def _empty_heads(like: Tensor) -> Tensor:
    """An unwritten `[B, H, S, D]` that lies in memory as `[B, S, H, D]`."""
    batch, heads, rows, depth = like.shape
    return like.new_empty(batch, rows, heads, depth).transpose(1, 2)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    return tuple(map(_rows_without_gaps, args))


def _rows_without_gaps(value):
    """Heads `[B, H, S, D]` with D side by side, copied only if it is not; other arguments as they are."""
    if not isinstance(value, Tensor) or value.ndim != 4:
        return value
    if value.shape[-1] == 1 or value.stride(-1) == 1:
        return value
    return value.contiguous()


def _check(query: Tensor, key: Tensor, value: Tensor, scale: float) -> None:
    if query.dtype not in _DTYPES:
        raise TypeError(f"query: expected float16, bfloat16 or float32, got {query.dtype}")
    if query.ndim != 4 or query.numel() == 0:
        raise ValueError(f"query: expected at least one row [B, H, S, D], got shape {tuple(query.shape)}")
    if key.ndim != 4 or key.shape[2] == 0:
        raise ValueError(f"key: expected at least one row [B, H, S, D], got shape {tuple(key.shape)}")
    wanted = (*query.shape[:2], key.shape[2], query.shape[3])
    for name, heads in (("key", key), ("value", value)):
        _check_like(name, heads, query.dtype, wanted)


def _check_like(name: str, heads: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    if heads.dtype != dtype:
        raise TypeError(f"{name}: expected the dtype of query, {dtype}, got {heads.dtype}")
    if tuple(heads.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {tuple(shape)}, got {tuple(heads.shape)}")


# --- gradient


def _eager_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    weights, _ = _weights(query, key, scale, logsumexp)
    grad = grad_out.float()
    # The softmax's derivative: dS = P o (dO V' - rowsum(dO o O)); then dQ = scale dS K, dK = scale dS' Q,
    # dV = P' dO.
    grad_scores = weights * (grad @ value.float().mT - (grad * out.float()).sum(-1, keepdim=True))
    grad_query = scale * (grad_scores @ key.float())
    grad_key = scale * (grad_scores.mT @ query.float())
    grad_value = weights.mT @ grad
    pairs = (query, grad_query), (key, grad_key), (value, grad_value)
    return tuple(_empty_heads(of).copy_(gradient) for of, gradient in pairs)


def _empty_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _empty_heads(query), _empty_heads(key), _empty_heads(value)


def _prepare_backward(args: tuple, outputs: tuple) -> tuple:
    *heads, logsumexp, scale = _prepare(args, outputs)
    return *heads, logsumexp.contiguous(), scale


def _check_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, logsumexp: Tensor, scale: float
) -> None:
    _check(query, key, value, scale)
    for name, heads in (("grad_out", grad_out), ("out", out)):
        _check_like(name, heads, query.dtype, query.shape)
    if logsumexp.dtype != torch.float32 or logsumexp.shape != query.shape[:3]:
        found = f"{logsumexp.dtype} of shape {tuple(logsumexp.shape)}"
        raise ValueError(f"logsumexp: expected float32 of shape {tuple(query.shape[:3])}, got {found}")


_op = define(
    "attention",
    "Tensor query, Tensor key, Tensor value, float scale",
    ("out", "logsumexp"),
    check=_check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
)
_backward_op = define(
    "attention_backward",
    "Tensor grad_out, Tensor query, Tensor key, Tensor value, Tensor out, Tensor logsumexp, float scale",
    ("grad_query", "grad_key", "grad_value"),
    check=_check_backward,
    empty=_empty_backward,
    eager=_eager_backward,
    prepare=_prepare_backward,
)


def _setup_context(ctx, inputs, output) -> None:
    *heads, ctx.scale = inputs
    ctx.save_for_backward(*heads, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_out: Tensor | None, _):
    if grad_out is None:
        return None, None, None, None
    return *_backward_op(grad_out, *ctx.saved_tensors, ctx.scale), None


def _no_second_derivative(ctx, *grads):
    elsewhere = "torch's scaled_dot_product_attention has it"
    raise NotImplementedError(f"attention: expected a first derivative, got a second one ({elsewhere})")


torch.library.register_autograd("fastunlearn::attention", _backward, setup_context=_setup_context)
torch.library.register_autograd("fastunlearn::attention_backward", _no_second_derivative)
