"""mixture: SISS' x_t, both targets and both importance weights."""

from __future__ import annotations

import pytest
import torch

from fastunlearn import reference
from fastunlearn.ops import mixture as op

from . import papers
from .cases import JOBS, SCHEDULE, SHAPES, Given, Inputs, Shape, draws
from .comparison import KERNEL, check, expect_equal, from_tensors_and_rows, parametrize_shapes

LAMBD = 0.5
NAMES = ("x_t", "retain_target", "forget_target", "retain_weight", "forget_weight")


@pytest.mark.parametrize("job", JOBS)
@parametrize_shapes(SHAPES)
def test_mixture(compare, shape: Shape, job: str):
    shape = compare.shape(shape)
    x = Inputs(shape, compare.device)
    alpha, sigma = x.levels()

    def by_papers(retain, forget):
        noise = torch.randn_like(forget) if draws(job) else x.noise
        return papers.mixed(retain, forget, noise, alpha, sigma, x.from_forget, LAMBD)

    rows = (
        (x.other_images, None, x.images, None)
        if job == "tensors"
        else (x.other_store, x.index, x.store, x.index)
    )
    arguments = (*rows, x.coefficients, x.from_forget, LAMBD, None, *x.given_noise(job), torch.float32, False)
    some = x.some_rows()
    given, exact = (x.at(some, dtype, job) for dtype in (torch.float32, torch.float64))
    plain, truth = (_literal(y) for y in (given, exact))
    results = papers.mixed(
        exact.others, exact.images, exact.noise, exact.alpha, exact.sigma, exact.from_forget, LAMBD
    )
    expect_equal(dict(zip(NAMES, results, strict=True)), truth)

    source = 4 * shape.elements if job == "tensors" else shape.row_bytes
    size = shape.batch * (2 * source + (12 if draws(job) else 16) * shape.elements)
    compare(
        *(
            "mixture",
            shape,
            job,
            from_tensors_and_rows(by_papers, lambda: (x.other_images, x.images), job)
            | {KERNEL: lambda: op.mixture(*arguments)},
        ),
        kernels=["mixture"],
        floor=size,
        moved=size,
        gate=check(NAMES, some, plain, truth),
        closed_form=op,
        arguments=arguments,
    )


def _literal(y: Given) -> dict[str, torch.Tensor]:
    return reference.mixture(
        y.others, y.images, y.noise, y.timesteps, SCHEDULE, LAMBD, y.from_forget
    )._asdict()
