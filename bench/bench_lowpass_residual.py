"""lowpass_residual: the energy of a band of frequencies and its gradient, against Fourier transforms with
autograd (four of them; half size with rfft2).

Radii are shares of Nyquist per axis. With `outside` = 0 nothing but the band counts; otherwise the residual
is needed a second time.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastunlearn.ops import lowpass_residual as op
from fastunlearn.reference.lowpass_residual import full_mask
from fastunlearn.reference.lowpass_residual import lowpass_residual as literal
from fastunlearn.testing.budgets import in_several_orders, shifts

from . import papers
from .cases import ORDERS, SHAPES, Inputs, Shape
from .comparison import KERNEL, KERNEL_BY_AUTOGRAD, PAPERS, check, expect_equal, parametrize_shapes

MASKS = {  # radius / Nyquist, inside, outside
    "low 1/4": (1 / 4, 1.0, 0.0),
    "low 1/2": (1 / 2, 1.0, 0.0),
    "low 1/4 s=0.1": (1 / 4, 1.0, 0.1),
    "high 1/4": (1 / 4, 0.0, 1.0),
}
BY_DEFAULT = "low 1/4"
BLOCK_MEMORY = 227 << 10  # what a block of an H200 can hold
NAMES = ("energy", "gradient")


@pytest.mark.parametrize("mask", MASKS)
@parametrize_shapes(SHAPES)
def test_lowpass_residual(compare, shape: Shape, mask: str):
    # where goals are set
    compare.only_in_full(
        unless=mask == BY_DEFAULT or (shape.name == "celeba" and compare.device.type == "cuda")
    )
    shape = compare.shape(shape)
    radius, inside, outside = MASKS[mask]
    x = Inputs(shape, compare.device)
    prediction, target, some = x.prediction, x.noise, x.some_rows()
    weight = torch.linspace(0.5, 1.5, shape.batch, device=compare.device)
    band = disc(shape, radius).to(compare.device)
    table = full_mask(band.cpu(), shape.height, shape.width, inside, outside).to(compare.device)
    leaf, table32 = prediction.clone().requires_grad_(), table.float()
    arguments = (prediction, target, weight, band, inside, outside)

    def by_autograd(transforms):
        return lambda: papers.with_gradient(transforms(leaf, target, weight, table32), leaf)

    calls = {
        PAPERS: by_autograd(papers.filtered_error),
        "rfft2": by_autograd(papers.filtered_error_of_reals),
        KERNEL: lambda: op.lowpass_residual(*arguments),
    }
    calls[KERNEL_BY_AUTOGRAD] = lambda: papers.with_gradient(
        op.lowpass_residual(leaf, *arguments[1:])[0], leaf
    )

    def at(dtype: torch.dtype) -> tuple:
        return (
            prediction[some].to(dtype),
            target[some].to(dtype),
            weight[some].to(dtype),
            band.cpu() if compare.device.type == "cpu" else band,
            inside,
            outside,
        )

    truth = dict(zip(NAMES, literal(*at(torch.float64)), strict=True))
    images, others = at(torch.float32)[:2], at(torch.float32)[2:]
    orders = shifts(shape.image, ORDERS)
    transforms, products = (
        in_several_orders(partial(_on_images, call, others), images, orders) for call in (literal, op._eager)
    )
    plain = {name: [*one, *two] for name, one, two in zip(NAMES, transforms, products, strict=True)}
    _expect_papers_to_be_right(at(torch.float64), table, truth)

    plane = 4 * shape.height * shape.width
    passes = 5 if outside != 0 and compare.device.type == "cuda" and plane > BLOCK_MEMORY else 3
    size = passes * 4 * shape.batch * shape.elements
    compare(
        *("lowpass_residual", shape, mask, calls),
        kernels=["lowpass_residual"],
        floor=size,
        moved=size,
        gate=check(NAMES, some, plain, truth),
        flops=shape.batch * shape.channels * products_flops(shape, band),
        closed_form=op,
        arguments=arguments,
    )


def _on_images(formula, others: tuple, prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return formula(prediction, target, *others)


def disc(shape: Shape, radius: float) -> Tensor:
    """The frequencies with `(u / U)^2 + (v / V)^2 <= 1` for U and V at `radius` of Nyquist, float32
    `[floor(U) + 1, floor(V) + 1]`.
    """
    limits = [radius * size / 2 for size in (shape.height, shape.width)]
    u, v = (torch.arange(int(limit) + 1, dtype=torch.float64) / limit for limit in limits)
    return (u[:, None] ** 2 + v**2 <= 1).float()


def products_flops(shape: Shape, band: Tensor) -> int:
    """Of the four matrix products of one plane, with even/odd folding, which halves them."""
    rows, columns = (
        min(2 * count - 1, size) for count, size in zip(band.shape, (shape.height, shape.width), strict=True)
    )
    once = 2 * shape.height * shape.width * columns + 2 * shape.height * rows * columns
    return once  # analysis and synthesis, each halved


def _expect_papers_to_be_right(exact: tuple, mask: Tensor, truth: dict[str, Tensor]) -> None:
    leaf, target, weight = exact[0].requires_grad_(), *exact[1:3]
    for transforms in (papers.filtered_error, papers.filtered_error_of_reals):
        energy, gradient = papers.with_gradient(transforms(leaf, target, weight, mask), leaf)
        expect_equal({"energy": energy.detach(), "gradient": gradient}, truth)
