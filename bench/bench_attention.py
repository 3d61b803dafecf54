"""attention: softmax attention alone, and with its gradient, against torch's `scaled_dot_product_attention`,
which diffusers calls.

The first two shapes are those of the papers' MNIST network (heads of 8 channels at 14 x 14 and 7 x 7 pixels,
16 images); with the others the size of a head grows at the same arithmetic. `fastunlearn.step.attention`
leaves heads beyond its limits to torch.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastunlearn.ops import attention as op
from fastunlearn.reference.attention import attention as literal

from .comparison import KERNEL, PAPERS, check

NAMES = ("out", "grad_query", "grad_key", "grad_value")


@dataclass(frozen=True)
class Heads:
    batch: int
    heads: int
    rows: int
    depth: int

    @property
    def elements(self) -> int:
        return self.batch * self.heads * self.rows * self.depth

    def __str__(self) -> str:
        return f"B{self.batch} H{self.heads} S{self.rows} D{self.depth}"


SMOKE = Heads(3, 2, 19, 8)
BY_DEFAULT = (Heads(16, 16, 196, 8), Heads(16, 32, 49, 8), Heads(16, 1, 256, 256))
IN_FULL = (
    *(Heads(16, 128 // depth, 196, depth) for depth in (16, 32, 64)),
    *(Heads(16, 256 // depth, 49, depth) for depth in (16, 32, 64)),
)


def laid_out(heads: Heads, device: torch.device) -> tuple[Tensor, ...]:
    """query, key, value and the gradient of the result, as views of `[B, S, H D]`."""
    generator = torch.Generator(device).manual_seed(0)
    shape = heads.batch, heads.rows, heads.heads, heads.depth
    return tuple(torch.randn(shape, generator=generator, device=device).transpose(1, 2) for _ in range(4))


@pytest.mark.parametrize("gradient", [False, True], ids=["forward", "with-gradient"])
@pytest.mark.parametrize("heads", BY_DEFAULT + IN_FULL, ids=str)
def test_attention(compare, heads: Heads, gradient: bool):
    compare.only_in_full(unless=heads in BY_DEFAULT)
    if compare.options.smoke:
        heads = SMOKE if heads == BY_DEFAULT[0] else pytest.skip("a smoke run needs one shape")
    *given, grad_out = laid_out(heads, compare.device)
    scale, some = (
        1 / math.sqrt(heads.depth),
        torch.linspace(0, heads.batch - 1, min(heads.batch, 4), device=compare.device).long(),
    )
    leaves = [tensor.requires_grad_(gradient) for tensor in given]

    def with_gradient(out: Tensor, inputs: list[Tensor], grad: Tensor) -> tuple[Tensor, ...]:
        return out.detach(), *(torch.autograd.grad(out, inputs, grad) if gradient else ())

    def exact(dtype: torch.dtype) -> dict[str, Tensor]:
        rows = [tensor.detach()[some].to(dtype).requires_grad_(gradient) for tensor in given]
        return dict(
            zip(NAMES, with_gradient(literal(*rows, scale), rows, grad_out[some].to(dtype)), strict=False)
        )

    def closed_form(query: Tensor, key: Tensor, value: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
        out, logsumexp = op._eager(query, key, value, scale)
        return out, *(op._eager_backward(grad, query, key, value, out, logsumexp, scale) if gradient else ())

    calls = {
        PAPERS: lambda: with_gradient(
            torch.nn.functional.scaled_dot_product_attention(*leaves, scale=scale), leaves, grad_out
        ),
        KERNEL: lambda: with_gradient(op.attention(*leaves, scale)[0], leaves, grad_out),
    }
    passes = 12 if gradient else 4  # query, key, value, out; those, the gradient of out and three more
    compare(
        *("attention", heads, "with gradient" if gradient else "forward", calls),
        kernels=["attention", "attention_backward"] if gradient else ["attention"],
        floor=passes * heads.elements * 4,
        moved=passes * heads.elements * 4,
        gate=check(NAMES if gradient else NAMES[:1], some, exact(torch.float32), exact(torch.float64)),
        flops=(14 if gradient else 4) * heads.elements * heads.rows,
        closed_form=closed_form,
        arguments=tuple(tensor.detach() for tensor in (*given, grad_out)),
    )
