"""residual: the weighted squared error of every sample and its gradient."""

from __future__ import annotations

import pytest
import torch

from fastunlearn.ops import residual as op
from fastunlearn.testing.budgets import in_several_orders, shuffles

from . import papers
from .cases import ORDERS, SHAPES, Inputs, Shape
from .comparison import KERNEL, KERNEL_BY_AUTOGRAD, PAPERS, check, parametrize_shapes

NAMES = ("loss", "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@parametrize_shapes(SHAPES)
def test_residual(compare, shape: Shape, dtype: torch.dtype):
    compare.only_in_full(unless=dtype == torch.float32)
    shape = compare.shape(shape)
    x = Inputs(shape, compare.device)
    prediction, target = x.prediction.to(dtype), x.noise
    weight = torch.linspace(0.5, 1.5, shape.batch, device=compare.device)
    leaf = prediction.clone().requires_grad_()

    def by_papers():
        return papers.with_gradient(papers.squared_error(leaf, target, weight), leaf)

    def literal(rows: torch.Tensor, goal: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        rows = rows.requires_grad_()
        loss, gradient = papers.with_gradient(
            papers.squared_error(rows, goal, weight[some].to(rows.dtype)), rows
        )
        return loss.detach(), gradient

    def by_autograd():
        """What `functional.denoising_loss(...).backward()` takes; the step calls
        `prediction.backward(gradient)` and saves a pass.
        """
        return papers.with_gradient(op.residual(leaf, target, weight)[0], leaf)

    calls = {
        PAPERS: by_papers,
        KERNEL: lambda: op.residual(prediction, target, weight),
        KERNEL_BY_AUTOGRAD: by_autograd,
    }
    some = x.some_rows()
    exact, single = (
        (prediction[some].to(precision), target[some].to(precision))
        for precision in (torch.float64, torch.float32)
    )
    truth = dict(zip(NAMES, literal(*exact), strict=True))
    plain = dict(
        zip(NAMES, in_several_orders(literal, single, shuffles(shape.elements, ORDERS)), strict=True)
    )
    plain["gradient"] = [gradient.to(dtype) for gradient in plain["gradient"]]
    size = shape.batch * shape.elements * (2 * dtype.itemsize + 4)
    compare(
        *("residual", shape, str(dtype).removeprefix("torch."), calls),
        kernels=["residual"],
        floor=size,
        moved=size,
        gate=check(NAMES, some, plain, truth),
        closed_form=op,
        arguments=(prediction, target, weight),
    )
