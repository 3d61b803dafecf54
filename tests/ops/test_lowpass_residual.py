"""lowpass_residual in C++ and in closed form, against Fourier transforms in float64: masks, sizes, dtypes,
layouts, instruction sets.
"""

import os
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastunlearn import functional as F
from fastunlearn.objective.frequency import BandMask, LowPass
from fastunlearn.ops._backends import ISAS, build_command, extension
from fastunlearn.ops.lowpass_residual import lowpass_residual
from fastunlearn.reference.lowpass_residual import full_mask
from fastunlearn.reference.lowpass_residual import lowpass_residual as literal
from fastunlearn.testing.budgets import assert_within_budget, in_several_orders, shifts

needs_extension = pytest.mark.skipif(
    not extension("_C"), reason=f"the C++ extension is not built; build it with: {build_command()}"
)
MASKS = {
    "quarter": LowPass(0.25),
    "half": LowPass(0.5),
    "soft": LowPass(0.5, high_frequency_weight=0.3),
    "all": LowPass(0.3, high_frequency_weight=1.0),
    "box": LowPass(0.4, kind="box"),
    "bins": LowPass(3, unit="bins", high_frequency_weight=0.3),
    "mean": LowPass(0.0),
    "full": LowPass(1.5),
    "mid": LowPass(1.0, band="mid", inner=0.4),
    "soft mid": LowPass(1.0, band="mid", inner=0.4, high_frequency_weight=0.3),
    "high": LowPass(0.5, band="high"),
    "soft high": LowPass(0.5, band="high", high_frequency_weight=0.3),
}
# Even and odd sizes, powers of two and primes, narrow and wide, one block of columns and several, planes side
# by side and planes split; odd multiples of a frequency split once (52), twice (96) and not at all (28).
SHAPES = [
    (16, 1, 8, 8),
    (9, 2, 28, 28),
    (16, 1, 7, 9),
    (16, 1, 33, 31),
    (16, 2, 5, 64),
    (16, 1, 64, 6),
    (8, 1, 12, 130),
    (8, 1, 67, 40),
    (3, 3, 64, 64),
    (4, 2, 96, 52),
]


def kernel(isa="avx512"):
    """Environment in which only the C++ kernel may answer, with this instruction set."""
    return mock.patch.dict(os.environ, FASTUNLEARN_BACKEND="kernels", FASTUNLEARN_ISA=isa)


def eager():
    return mock.patch.dict(os.environ, FASTUNLEARN_BACKEND="eager")


def inputs(shape, dtype=torch.float32, seed=0):
    """Prediction and target of `dtype`, and a weight for each sample."""
    generator = torch.Generator().manual_seed(seed)
    prediction, target = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    return prediction, target, torch.rand(shape[0], generator=generator) + 0.5


def exact(prediction, target, weight, *mask):
    return literal(prediction.double(), target.double(), weight.double(), *mask)


def check(actual, images, mask):
    """Energy and gradient err at most twice as much as the worse of Fourier transforms and the closed form in
    float32, and one rounding.

    Energies are few numbers, which either formula may hit by luck: hence several shifts of the images.
    """
    (prediction, target, weight), dtype = images, images[0].dtype
    truth, orders = exact(*images, *mask), shifts(prediction.shape[1:], 8)
    with eager():
        closed = in_several_orders(
            lambda *pair: lowpass_residual(*pair, weight, *mask), (prediction, target), orders
        )
    fourier = in_several_orders(
        lambda *pair: literal(*pair, weight, *mask), (prediction.float(), target.float()), orders
    )
    for name, got, right, one, two, like in zip(
        ("energy", "gradient"), actual, truth, closed, fourier, (torch.float32, dtype), strict=True
    ):
        assert got.dtype == like
        assert_within_budget(name, got, [*one, *(value.to(like) for value in two)], right)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", MASKS)
def test_masks(name, isa):
    for shape in SHAPES:
        mask, images = MASKS[name].mask(*shape[2:]), inputs(shape)
        with kernel(isa):
            check(lowpass_residual(*images, *mask), images, mask)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["half", "soft", "high"])
@pytest.mark.parametrize("shape", [(2, 3, 256, 256), (2, 1, 301, 300), (1, 6, 512, 512)])
def test_planes_larger_than_a_cache(shape, name, isa):
    mask, images = MASKS[name].mask(*shape[2:]), inputs(shape)
    with kernel(isa):
        check(lowpass_residual(*images, *mask), images, mask)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["half", "soft"])
def test_low_precision(name, dtype, isa):
    for shape in ((16, 2, 28, 28), (16, 1, 9, 35), (2, 3, 64, 64)):
        mask, images = MASKS[name].mask(*shape[2:]), inputs(shape, dtype)
        with kernel(isa):
            check(lowpass_residual(*images, *mask), images, mask)


@needs_extension
def test_prediction_and_target_may_differ_in_dtype():
    shape, mask = (4, 2, 16, 16), LowPass(0.5, high_frequency_weight=0.3).mask(16, 16)
    prediction, target, weight = inputs(shape, torch.bfloat16)[0], inputs(shape)[1], inputs(shape)[2]
    with kernel():
        for one, two in ((prediction, target), (target, prediction)):
            check(lowpass_residual(one, two, weight, *mask), (one, two, weight), mask)


@pytest.mark.parametrize("how", [*(pytest.param(isa, marks=needs_extension) for isa in ISAS), "eager"])
@pytest.mark.parametrize("name", MASKS)
def test_float64_is_computed_in_float64(name, how):
    for shape in SHAPES[:5]:
        mask, images = MASKS[name].mask(*shape[2:]), inputs(shape, torch.float64)
        with eager() if how == "eager" else kernel(how):
            actual = lowpass_residual(*images, *mask)
        for got, right in zip(actual, exact(*images, *mask), strict=True):
            torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-13)


def table_of(kind, height, width, generator):
    """A table of the op's shape limits: empty, full, or any zeros and ones, over some or all frequencies."""
    rows, columns = (
        int(torch.randint(1, size // 2 + 2, (), generator=generator)) for size in (height, width)
    )
    if kind == "all":
        return torch.ones(height // 2 + 1, width // 2 + 1)
    return (
        torch.zeros(rows, columns)
        if kind == "empty"
        else (torch.rand(rows, columns, generator=generator) < 0.5).float()
    )


@needs_extension
@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70)),
    kind=st.sampled_from(("empty", "all", "any")),
    outside=st.sampled_from((0.0, 0.5, 1.0)),
    inside=st.sampled_from((0.0, 0.7, 1.0)),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 1000),
)
@example(shape=(1, 1, 1, 1), kind="all", outside=0.0, inside=1.0, isa="avx512", seed=0)
@example(shape=(2, 1, 2, 1), kind="any", outside=1.0, inside=0.0, isa="avx512", seed=0)
@example(shape=(5, 3, 1, 65), kind="any", outside=0.5, inside=1.0, isa="avx2", seed=0)
def test_any_table(shape, kind, outside, inside, isa, seed):
    """In float64, where a wrong row or column cannot hide behind roundings."""
    table = table_of(kind, *shape[2:], torch.Generator().manual_seed(seed))
    images = inputs(shape, torch.float64, seed)
    with kernel(isa):
        actual = lowpass_residual(*images, table, inside, outside)
    for got, right in zip(actual, exact(*images, table, inside, outside), strict=True):
        torch.testing.assert_close(got, right, rtol=1e-11, atol=1e-12)


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", ["half", "soft high"])
def test_a_sample_does_not_depend_on_its_neighbours(name, isa):
    """Bitwise; and a NaN stays in its sample."""
    mask, (prediction, target, weight) = MASKS[name].mask(28, 28), inputs((37, 1, 28, 28))
    with kernel(isa):
        energy, gradient = lowpass_residual(prediction, target, weight, *mask)
        for start, stop in ((0, 1), (5, 30), (20, 37)):
            part = lowpass_residual(prediction[start:stop], target[start:stop], weight[start:stop], *mask)
            assert torch.equal(part[0], energy[start:stop])
            assert torch.equal(part[1], gradient[start:stop])
        prediction[11, 0, 3, 4] = float("nan")
        spoilt = lowpass_residual(prediction, target, weight, *mask)
    others = [row for row in range(37) if row != 11]
    assert spoilt[0][11].isnan()
    assert spoilt[1][11].isnan().all()
    assert torch.equal(spoilt[0][others], energy[others])
    assert torch.equal(spoilt[1][others], gradient[others])


@needs_extension
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", [(9, 2, 28, 28), (3, 3, 64, 64), (4, 2, 96, 52)])
def test_a_table_may_be_larger_than_its_band(shape, isa):
    """As a scheduled band's is: zeros beyond the last 1 change no bit."""
    (small, *values), images = MASKS["soft"].mask(*shape[2:]), inputs(shape)
    large = torch.zeros(shape[2] // 2 + 1, shape[3] // 2 + 1)
    large[: small.shape[0], : small.shape[1]] = small
    with kernel(isa):
        expected = lowpass_residual(*images, small, *values)
        actual = lowpass_residual(*images, large, *values)
    assert all(torch.equal(one, two) for one, two in zip(expected, actual, strict=True))


@needs_extension
def test_threads_do_not_change_the_result():
    mask, images = MASKS["soft"].mask(32, 32), inputs((21, 3, 32, 32))
    with kernel():
        one = lowpass_residual(*images, *mask)
        torch.set_num_threads(2)
        try:
            two = lowpass_residual(*images, *mask)
        finally:
            torch.set_num_threads(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@needs_extension
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_batch_strides_and_layouts(dtype):
    """Rows cut out of a larger tensor (the first channels of a prediction with twice as many), a repeated
    row, and permuted memory.
    """
    mask, (prediction, target, weight) = MASKS["soft"].mask(16, 12), inputs((4, 3, 16, 12), dtype)
    wide = torch.full((4, 6, 16, 12), float("nan"), dtype=dtype)
    wide[:, :3] = prediction
    with kernel():
        expected = lowpass_residual(prediction, target, weight, *mask)
        for view in (
            wide[:, :3],
            prediction.contiguous(memory_format=torch.channels_last),
            prediction.mT.contiguous().mT,
        ):
            for got, right in zip(lowpass_residual(view, target, weight, *mask), expected, strict=True):
                assert torch.equal(got, right)
        repeated = lowpass_residual(prediction[:1].expand(4, -1, -1, -1), target, weight, *mask)
        for got, right in zip(
            repeated, lowpass_residual(prediction[:1].repeat(4, 1, 1, 1), target, weight, *mask), strict=True
        ):
            assert torch.equal(got, right)


@needs_extension
@pytest.mark.parametrize("name", ["half", "soft", "mid", "high"])
def test_gradient_is_that_of_the_energy(name):
    mask, (prediction, target, weight) = MASKS[name].mask(9, 12), inputs((3, 2, 9, 12), torch.float64)
    prediction.requires_grad_()
    scale = torch.rand(3, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with kernel():
        energy, gradient = lowpass_residual(prediction, target, weight, *mask)
        (chained,) = torch.autograd.grad((scale * energy).sum(), prediction)
    (expected,) = torch.autograd.grad(
        (scale * literal(prediction, target, weight.double(), *mask)[0]).sum(), prediction
    )
    torch.testing.assert_close(chained, expected, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(gradient * scale.view(-1, 1, 1, 1), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", ["half", "soft", "soft mid", "high"])
@pytest.mark.parametrize("size", [(4, 4), (5, 3)])
def test_reference_passes_gradcheck(name, size):
    mask, (prediction, target, weight) = MASKS[name].mask(*size), inputs((2, 1, *size), torch.float64)
    weight = weight.double()
    assert torch.autograd.gradcheck(
        lambda p: literal(p, target, weight, *mask)[0], prediction.requires_grad_()
    )
    energy, gradient = literal(prediction, target, weight, *mask)
    torch.testing.assert_close(
        gradient, torch.autograd.grad(energy.sum(), prediction)[0], rtol=1e-11, atol=1e-12
    )


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (6, 7), (8, 8)])
def test_reference_mask_counts_frequencies_in_both_directions(size):
    table = torch.rand(size[0] // 2 + 1, size[1] // 2 + 1, generator=torch.Generator().manual_seed(0)).round()
    mask = full_mask(table, *size, 1.0, 0.25)
    for row, u in enumerate(torch.fft.fftfreq(size[0], 1 / size[0]).abs().round().int().tolist()):
        for column, v in enumerate(torch.fft.fftfreq(size[1], 1 / size[1]).abs().round().int().tolist()):
            assert mask[row, column] == (1.0 if table[u, v] else 0.25)


@pytest.mark.parametrize("backend", ["reference", "eager", pytest.param("kernels", marks=needs_extension)])
def test_a_table_of_nan_gives_nan(backend):
    """As that of a step below zero: no band may be made of it."""
    table, (prediction, target, _) = torch.full((5, 5), torch.nan), inputs((2, 1, 8, 8))
    with mock.patch.dict(os.environ, FASTUNLEARN_BACKEND=backend):
        results = F.weighted_residual(prediction, target, None, BandMask(table, 1.0, 0.0))
    assert all(result.isnan().all() for result in results)


def test_reference_mask_is_nan_where_its_table_is():
    """At the frequencies of that entry, in both directions, and not beyond the table."""
    table = torch.ones(2, 3)
    table[1, 2] = torch.nan
    found = full_mask(table, 6, 7, 1.0, 0.25).isnan().nonzero().tolist()
    assert found == [[1, 2], [1, 5], [5, 2], [5, 5]]


@needs_extension
def test_kernel_refuses_what_it_would_misread():
    native = torch.ops.fastunlearn_native.lowpass_residual
    shape, basis = (2, 1, 8, 8), torch.eye(8)[:, :5].contiguous()
    good = dict(
        prediction=torch.zeros(shape),
        target=torch.zeros(shape),
        weight=torch.ones(2),
        band=torch.ones(3, 3),
        inside=1.0,
        outside=0.0,
    )
    good |= dict(row_basis=basis, column_basis=basis, energy=torch.zeros(2), gradient=torch.zeros(shape))
    native(*good.values())
    for name, value in {
        "prediction": torch.zeros(2, 1, 8, 16)[..., ::2],
        "target": torch.zeros(2, 1, 8, 9),
        "weight": torch.ones(3),
        "band": torch.ones(3, 3, dtype=torch.float64),
        "row_basis": torch.eye(8),
        "column_basis": basis.double(),
        "energy": torch.zeros(2, dtype=torch.float64),
        "gradient": torch.zeros(shape, dtype=torch.bfloat16),
    }.items():
        with pytest.raises(RuntimeError, match=rf"{name}: expected"):
            native(*(good | {name: value}).values())
