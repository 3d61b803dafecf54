"""redirect, ReTrack's target, alone and with the loss and its gradient (`redirect+residual`, the whole of
L_unlearn but the network).

The papers' way materialises `v` `[B, K, C, H, W]` and needs it again in the loss. The job `tensors` knows no
distances; with a store they come from the neighbour search.
"""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from fastunlearn import reference
from fastunlearn.ops import redirect as op
from fastunlearn.ops import residual
from fastunlearn.testing.budgets import in_several_orders, shuffles

from . import papers
from .cases import JOBS, ORDERS, SCHEDULE, SHAPES, Given, Inputs, Shape, draws
from .comparison import KERNEL, check, expect_equal, from_tensors_and_rows, parametrize_shapes

ONE_PASS = 4096  # elements up to which a kernel sees every neighbour once
NEGLIGIBLE = 2.0**-32  # weight below which the second pass leaves a neighbour out
NAMES, LOSS = ("x_t", "target", "spread", "weights"), ("loss", "gradient")


@pytest.mark.parametrize("job", JOBS)
@parametrize_shapes(SHAPES)
def test_redirect(compare, shape: Shape, job: str):
    _redirect(compare, shape, 10, job)


@pytest.mark.parametrize("job", ["tensors", "rows"])
@pytest.mark.parametrize("neighbors", [1, 100, 1000])
def test_redirect_by_neighbors(compare, neighbors: int, job: str):
    compare.only_in_full()
    _redirect(compare, SHAPES["cifar"], neighbors, job)


@pytest.mark.parametrize("job", JOBS)
@parametrize_shapes(SHAPES)
def test_redirect_with_residual(compare, shape: Shape, job: str):
    _redirect_with_residual(compare, shape, 10, job)


@pytest.mark.parametrize("job", ["tensors", "rows"])
@pytest.mark.parametrize("neighbors", [1, 100, 1000])
def test_redirect_with_residual_by_neighbors(compare, neighbors: int, job: str):
    compare.only_in_full()
    _redirect_with_residual(compare, SHAPES["cifar"], neighbors, job)


def _redirect(compare, shape: Shape, neighbors: int, job: str) -> None:
    shape = compare.shape(shape, neighbors)
    x = Inputs(shape, compare.device, neighbors)
    alpha, sigma = x.levels()

    def by_papers(forget, near):
        return papers.redirected(
            forget, near, torch.randn_like(forget) if draws(job) else x.noise, alpha, sigma
        )

    arguments, some = _arguments(x, job), x.some_rows()
    given, exact = (x.at(some, dtype, job) for dtype in (torch.float32, torch.float64))
    plain, truth = (_literal(y) for y in (given, exact))
    x_t, _, weights = papers.redirected(exact.images, exact.neighbors, exact.noise, exact.alpha, exact.sigma)
    expect_equal({"x_t": x_t, "weights": weights}, truth)
    floor, moved = _bytes(x, arguments, job)
    compare(
        *(
            "redirect",
            f"{shape} K{neighbors}",
            job,
            from_tensors_and_rows(by_papers, _images(x), job) | {KERNEL: lambda: op.redirect(*arguments)},
        ),
        kernels=["redirect"],
        floor=floor,
        moved=moved,
        gate=check(NAMES, some, plain, truth),
        closed_form=op,
        arguments=arguments,
    )


def _redirect_with_residual(compare, shape: Shape, neighbors: int, job: str) -> None:
    """Per-sample losses (of a mean over the batch, spread included) and the gradient of the prediction."""
    shape = compare.shape(shape, neighbors)
    x = Inputs(shape, compare.device, neighbors)
    (alpha, sigma), arguments, some = x.levels(), _arguments(x, job), x.some_rows()
    prediction = x.prediction.clone().requires_grad_()
    weight = torch.full((shape.batch,), 1 / shape.batch, device=compare.device)

    def by_papers(forget, near):
        _, v, p = papers.redirected(
            forget, near, torch.randn_like(forget) if draws(job) else x.noise, alpha, sigma
        )
        return papers.with_gradient(papers.redirect_losses(prediction, v, p) / shape.batch, prediction)

    def closed_form(prediction, weight, *arguments):
        _, target, spread, _ = op._eager(*arguments)
        loss, gradient = residual._eager(prediction, target, weight)
        return loss + weight * spread, gradient

    def by_kernels():
        _, target, spread, _ = op.redirect(*arguments)
        loss, gradient = residual.residual(x.prediction, target, weight)
        return loss + weight * spread, gradient

    given, exact = (x.at(some, dtype, job) for dtype in (torch.float32, torch.float64))
    truth = dict(zip(LOSS, _literal_loss(exact, shape.batch, *_images_of(exact)), strict=True))
    several = in_several_orders(
        partial(_literal_loss, given, shape.batch), _images_of(given), shuffles(shape.elements, ORDERS)
    )
    plain = dict(zip(LOSS, several, strict=True))
    floor, moved = _bytes(x, arguments, job)
    both = 3 * 4 * shape.batch * shape.elements
    compare(
        *(
            "redirect+residual",
            f"{shape} K{neighbors}",
            job,
            from_tensors_and_rows(by_papers, _images(x), job) | {KERNEL: by_kernels},
        ),
        kernels=["redirect", "residual"],
        floor=floor + both,
        moved=moved + both,
        gate=check(LOSS, some, plain, truth),
        closed_form=closed_form,
        arguments=(x.prediction, weight, *arguments),
    )


def _images(x: Inputs):
    return lambda: (x.images, x.neighbor_images())


def _arguments(x: Inputs, job: str) -> tuple:
    rows = (
        (x.neighbor_images(), None, x.coefficients, None)
        if job == "tensors"
        else (x.neighbor_store, x.neighbor_index, x.coefficients, x.sqdist)
    )
    return (*x.given_rows(job), *rows, *x.given_noise(job), torch.float32, False)


def _literal(y: Given) -> dict[str, Tensor]:
    return reference.redirect(y.images, y.neighbors, y.noise, y.timesteps, SCHEDULE)._asdict()


def _images_of(y: Given) -> tuple[Tensor, ...]:
    return y.images, y.neighbors, y.noise, y.prediction


def _literal_loss(
    y: Given, batch: int, images: Tensor, neighbors: Tensor, noise: Tensor, prediction: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss and gradient at the noise levels of `y`."""
    prediction = prediction.detach().requires_grad_()
    _, v, p = papers.redirected(images, neighbors, noise, y.alpha, y.sigma)
    loss, gradient = papers.with_gradient(papers.redirect_losses(prediction, v, p) / batch, prediction)
    return loss.detach(), gradient


def _bytes(x: Inputs, arguments: tuple, job: str) -> tuple[int, int]:
    """The floor, and what is moved: with D > `ONE_PASS` a second pass reads the image, the noise and the
    neighbours that weigh anything.
    """
    elements, neighbors = x.shape.elements, x.neighbor_index.shape[1]
    row = 4 * elements if job == "tensors" else x.shape.row_bytes
    noise = 0 if draws(job) else 4 * elements
    floor = (1 + neighbors) * row + 8 * elements + noise
    if elements <= ONE_PASS:
        return x.shape.batch * floor, x.shape.batch * floor
    weighty = (op._eager(*arguments)[3] >= NEGLIGIBLE).sum().item()
    return x.shape.batch * (floor + 2 * row), x.shape.batch * (floor + row + noise) + weighty * row
