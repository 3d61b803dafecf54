"""Arithmetic on lists of tensors as if each list were one vector.

Norm, inner product, multiplication in place.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

MULTIPLIED_AT_ONCE = 64 << 20  # bytes of products that an inner product holds


def total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The L2 norm over all `gradients` together, 0-d; 0 if there are none."""
    if not gradients:
        return torch.zeros((), device=device)
    # Squares of bfloat16 numbers are added up in float32.
    low = [gradient for gradient in gradients if gradient.dtype == torch.bfloat16]
    norms = []
    if len(low) < len(gradients):
        others = [gradient for gradient in gradients if gradient.dtype != torch.bfloat16]
        norms.append(nn.utils.get_total_norm(others))
    if low:
        norms.extend(torch._foreach_norm(low, 2, dtype=torch.float32))
    return torch.linalg.vector_norm(torch.stack(norms))


def inner_product(left: list[Tensor], right: list[Tensor], device: torch.device) -> Tensor:
    """`<left, right>` over all tensors together, 0-d."""
    if not left:
        return torch.zeros((), device=device)
    # foreach on a CPU is a loop over the tensors, too, and writes the products.
    if device.type == "cpu":
        dots = []
        for one, other in zip(left, right, strict=True):
            dots.append(torch.dot(_at_least_float32(one).flatten(), _at_least_float32(other).flatten()))
        return torch.stack(dots).sum()

    sums = []
    for some in portions(list(zip(left, right, strict=True)), MULTIPLIED_AT_ONCE):
        ones, others = zip(*some, strict=True)
        products = torch._foreach_mul(
            [_at_least_float32(gradient) for gradient in ones],
            [_at_least_float32(gradient) for gradient in others],
        )
        # foreach has norms but no sums: the sum is the L1 norm of the positive products less that of the
        # negative ones.
        sums += torch._foreach_norm(torch._foreach_clamp_min(products, 0.0), 1)
        torch._foreach_clamp_max_(products, 0.0)
        sums += torch._foreach_neg(torch._foreach_norm(products, 1))
    return torch.stack(sums).sum()


def _at_least_float32(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype == torch.bfloat16 else gradient


def multiply(gradients: list[Tensor], factor: Tensor) -> None:
    """In place. bfloat16 gradients are multiplied by the float32 factor and rounded once."""
    for some in portions(gradients, sys.maxsize):
        # float32 to bfloat16, or the dtype of the gradients: each product is rounded once.
        dtype = some[0].dtype
        torch._foreach_mul_(some, factor if dtype == torch.bfloat16 else factor.to(dtype))


def portions(items: list, limit: int) -> Iterator[list]:
    """`items`, tensors or tuples of them, in order: runs of one dtype and of at most `limit` bytes.

    A run may be one item that is larger.
    """
    run, size, dtype = [], 0, None
    for item in items:
        tensor = item[0] if isinstance(item, tuple) else item
        if run and (size + tensor.nbytes > limit or tensor.dtype != dtype):
            yield run
            run, size = [], 0
        run.append(item)
        size, dtype = size + tensor.nbytes, tensor.dtype
    if run:
        yield run


def divide(gradients: list[Tensor], divisor: Tensor | None) -> None:
    """`gradients /= divisor`, in place."""
    if divisor is not None:
        multiply(gradients, divisor.reciprocal())
