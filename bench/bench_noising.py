"""noising: x_t (with epsilon prediction the target is the noise, which is there already)."""

from __future__ import annotations

import pytest
import torch

from fastunlearn import reference
from fastunlearn.ops import noising as op

from . import papers
from .cases import JOBS, SCHEDULE, SHAPES, Inputs, Shape, draws
from .comparison import KERNEL, check, expect_equal, from_tensors_and_rows, parametrize_shapes


@pytest.mark.parametrize("job", JOBS)
@parametrize_shapes(SHAPES)
def test_noising(compare, shape: Shape, job: str):
    shape = compare.shape(shape)
    x = Inputs(shape, compare.device)
    alpha, sigma = x.levels()

    def by_papers(clean):
        noise = torch.randn_like(clean) if draws(job) else x.noise
        return (papers.noised(clean, noise, alpha, sigma),)

    arguments = (*x.given_rows(job), x.coefficients, *x.given_noise(job), False, torch.float32, False)
    some = x.some_rows()
    given, exact = (x.at(some, dtype, job) for dtype in (torch.float32, torch.float64))
    plain, truth = (
        {"x_t": reference.noising(y.images, y.noise, y.timesteps, SCHEDULE)} for y in (given, exact)
    )
    expect_equal({"x_t": papers.noised(exact.images, exact.noise, exact.alpha, exact.sigma)}, truth)

    source = 4 * shape.elements if job == "tensors" else shape.row_bytes
    size = shape.batch * (source + (4 if draws(job) else 8) * shape.elements)
    compare(
        *(
            "noising",
            shape,
            job,
            from_tensors_and_rows(by_papers, lambda: (x.images,), job)
            | {KERNEL: lambda: op.noising(*arguments)},
        ),
        kernels=["noising"],
        floor=size,
        moved=size,
        gate=check(["x_t", None], some, plain, truth),
        closed_form=op,
        arguments=arguments,
    )
