"""residual in C++: values against float64, every pair of dtypes, every layout and instruction set, and what
it refuses.
"""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, for_kernels

from fastunlearn import functional as F
from fastunlearn.ops._backends import ISAS
from fastunlearn.ops.residual import residual
from fastunlearn.testing.budgets import assert_within_budget, in_several_orders

pytestmark = for_kernels
LAYOUTS = ("dense", "channels_last", "half", "half_channels_last", "rows")


def laid_out(images, layout):
    """The same numbers: `half` the channels of a network with twice as many, every second of some `rows`."""
    if layout == "rows":
        return images.repeat_interleave(2, dim=0)[::2]
    if layout.startswith("half"):
        images = torch.cat([images, images + 1], dim=1)
    if layout.endswith("channels_last"):
        images = images.contiguous(memory_format=torch.channels_last)
    return images[:, : images.shape[1] // 2] if layout.startswith("half") else images


def operands(shape, prediction_dtype, target_dtype, weight_dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(shape, generator=generator) for _ in range(2))
    return (
        prediction.to(prediction_dtype),
        target.to(target_dtype),
        torch.rand(len(prediction), generator=generator).to(weight_dtype) * 3 - 1,
    )


def closed_form(prediction, target, weight, dtype):
    """The loss and its gradient, computed in `dtype`."""
    difference, weight = prediction.to(dtype) - target.to(dtype), weight.to(dtype)
    return weight * difference.flatten(1).square().sum(1), 2 * weight.view(-1, 1, 1, 1) * difference


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    prediction_dtype=st.sampled_from(FLOATS),
    target_dtype=st.sampled_from(FLOATS),
    weight_dtype=st.sampled_from(FLOATS[2:]),
    layouts=st.tuples(*[st.sampled_from(LAYOUTS)] * 2),
    isa=st.sampled_from(ISAS),
)
@example((1, 1, 1, 1), torch.float16, torch.float32, torch.float32, ("dense", "dense"), "avx512")
@example(
    (2, 3, 41, 67), torch.bfloat16, torch.float32, torch.float64, ("channels_last", "channels_last"), "avx512"
)
@example((2, 3, 41, 67), torch.float32, torch.float64, torch.float32, ("half_channels_last", "dense"), "avx2")
def test_values(shape, prediction_dtype, target_dtype, weight_dtype, layouts, isa):
    prediction, target, weight = operands(shape, prediction_dtype, target_dtype, weight_dtype)
    given_prediction, given_target = laid_out(prediction, layouts[0]), laid_out(target, layouts[1])
    with mock.patch.dict(os.environ, FASTUNLEARN_ISA=isa):
        loss, gradient = residual(given_prediction, given_target, weight)

    assert loss.dtype == torch.promote_types(prediction_dtype, torch.float32)
    assert gradient.dtype == prediction_dtype
    assert gradient.stride() == torch.empty_like(given_prediction).stride()
    exact_loss, exact_gradient = closed_form(prediction, target, weight, torch.float64)
    u = (
        torch.finfo(
            torch.promote_types(prediction_dtype, torch.promote_types(target_dtype, torch.float32))
        ).eps
        / 2
    )
    own = torch.finfo(prediction_dtype)
    rounded = 3 * u * exact_gradient.abs()  # difference, weight, product
    excess = (
        (gradient.double() - exact_gradient).abs()
        - rounded
        - own.eps / 2 * (exact_gradient.abs() + rounded)
        - own.smallest_normal * own.eps
    )
    assert excess.max() <= 0  # false for NaN, too
    terms = min(math.prod(shape[1:]), 1024) / 4 + 4  # a lane of the narrowest vectors adds so many in a block
    assert (
        (loss.double() - exact_loss).abs() <= (terms * u + torch.finfo(loss.dtype).eps) * exact_loss.abs()
    ).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("target_dtype", FLOATS[:3])
@pytest.mark.parametrize("prediction_dtype", FLOATS[:3])
def test_error_is_at_most_twice_that_of_torch(prediction_dtype, target_dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    prediction, target, weight = operands((8, 3, 65, 63), prediction_dtype, target_dtype)
    results = residual(prediction, target, weight)
    # A loss is one sum, which plain torch may hit by luck: hence in several orders.
    exact = closed_form(prediction, target, weight, torch.float64)
    plain = in_several_orders(
        lambda *images: closed_form(*images, weight, torch.float32), (prediction, target)
    )
    for name, actual, truth, torchs in zip(("loss", "gradient"), results, exact, plain, strict=True):
        assert_within_budget(name, actual, [value.to(actual.dtype) for value in torchs], truth)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradient_is_that_of_the_loss(dtype):
    prediction, target, weight = operands((3, 3, 9, 7), dtype, torch.float32)
    prediction.requires_grad_()
    scale = torch.tensor([1.0, -2.0, 0.5])
    (scale * F.denoising_loss(prediction, target, weight)).sum().backward()
    exact = (
        scale.double().view(-1, 1, 1, 1) * closed_form(prediction.detach(), target, weight, torch.float64)[1]
    )
    # two roundings to dtype
    torch.testing.assert_close(prediction.grad.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("prediction_dtype", FLOATS)
def test_numbers_that_are_none_stay_so(prediction_dtype):
    """And a gradient too large for its dtype is infinite."""
    prediction, target, weight = operands((3, 1, 5, 5), prediction_dtype, torch.float32)
    prediction[1, 0, 2, 2] = math.nan
    prediction[2, 0, 0, 0] = math.inf
    loss, gradient = residual(prediction, target, weight.abs())
    assert loss.isfinite().tolist() == [True, False, False]
    assert loss[1].isnan()
    assert loss[2] == math.inf
    assert torch.equal(gradient.isnan(), prediction.isnan())
    assert torch.equal(gradient.isinf(), prediction.isinf())
    overflow = residual(
        torch.full((1, 1, 1, 1), 60000.0, dtype=torch.float16), torch.zeros(1, 1, 1, 1), torch.ones(1)
    )[1]
    assert overflow.item() == math.inf


def test_bad_arguments_are_named():
    """Of the C++ kernel: `functional` and the op check and arrange before."""
    prediction, target, weight = operands((2, 3, 4, 5), torch.float32, torch.float32)
    arguments = dict(
        prediction=prediction,
        target=target,
        weight=weight,
        loss=torch.empty(2),
        gradient=torch.empty_like(prediction),
    )

    def run(**changed):
        torch.ops.fastunlearn_native.residual(*(arguments | changed).values())

    run()
    for name, bad, message in (
        (
            "prediction",
            prediction.contiguous(memory_format=torch.channels_last),
            "prediction: expected stride 20 in dimension 1, as in gradient, got 1",
        ),
        ("target", target[:, :2], "target: expected size 3 in dimension 1, as in gradient, got 2"),
        ("target", target[0], "target: expected 4 dimensions, as in gradient, got 3"),
        ("target", target.int(), "target: expected float16, bfloat16, float32 or float64, got Int"),
        ("weight", weight.half(), "weight: expected float32 or float64, got Half"),
        ("weight", weight[:1], r"weight: expected \[2\], got 1 numbers"),
        (
            "loss",
            torch.empty(2, dtype=torch.float64),
            "loss: expected float32, or float64 where prediction is",
        ),
        ("loss", torch.empty(3), r"loss: expected \[2\] without gaps"),
        (
            "gradient",
            torch.empty(2, 3, 4, 10)[..., ::2],
            "gradient: expected samples without gaps, got stride 2 in place of 1",
        ),
        (
            "gradient",
            torch.empty(1, 3, 4, 5).expand(2, 3, 4, 5),
            "gradient: expected samples that do not overlap, got stride 0",
        ),
        (
            "gradient",
            torch.empty(2, 3, 4, 5, dtype=torch.float64),
            "gradient: expected the type of prediction",
        ),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**{name: bad})
