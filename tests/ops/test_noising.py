"""noising in C++: values against float64, every dtype, layout and instruction set, and what it refuses."""

import os
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, SCHEDULES, assert_rounded, coefficients, for_kernels, normal

from fastunlearn.host.store import DTYPES as ROWS
from fastunlearn.ops._backends import ISAS
from fastunlearn.ops.noising import noising
from fastunlearn.testing.budgets import assert_within_budget
from fastunlearn.testing.factories import served

pytestmark = for_kernels


def stored(count, shape, dtype, seed=0):
    pixels = torch.randint(256, (count, *shape), generator=torch.Generator().manual_seed(seed)).to(
        torch.uint8
    )
    return pixels if dtype == torch.uint8 else served(pixels).to(dtype)


def closed_form(images, noise, table, dtype):
    """`x_t` and target computed in `dtype`."""
    alpha, sigma, a, b, _ = (column.to(dtype).view(-1, 1, 1, 1) for column in table.unbind(1))
    images, noise = images.to(dtype), noise.to(dtype)
    return alpha * images + sigma * noise, a * noise + b * images


def is_laid_out(images, channels_last):
    return images.is_contiguous(
        memory_format=torch.channels_last if channels_last else torch.contiguous_format
    )


@settings(max_examples=400, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 4),
    rows=st.sampled_from(ROWS),
    noise_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    channels_last=st.booleans(),
    with_target=st.booleans(),
    indexed=st.booleans(),
    prediction_type=st.sampled_from(sorted(SCHEDULES)),
    isa=st.sampled_from(ISAS),
)
@example((1, 1, 1), 1, torch.uint8, torch.float32, torch.float32, True, True, True, "epsilon", "avx512")
@example((3, 33, 35), 2, torch.uint8, torch.float32, torch.bfloat16, True, True, True, "flow", "avx512")
@example((2, 1, 1025), 2, torch.float16, torch.bfloat16, torch.float16, False, True, False, "v", "portable")
@example((1030, 2, 1), 2, torch.uint8, torch.float32, torch.float32, True, True, True, "v", "avx512")
@example((67, 2, 1), 3, torch.bfloat16, torch.float16, torch.float32, True, True, True, "v", "avx2")
def test_values(
    shape, batch, rows, noise_dtype, dtype, channels_last, with_target, indexed, prediction_type, isa
):
    images = stored(5 if indexed else batch, shape, rows)
    index = torch.randint(5, (batch,), generator=torch.Generator().manual_seed(2)) if indexed else None
    noise, table = normal((batch, *shape), noise_dtype), coefficients(batch, prediction_type)
    with mock.patch.dict(os.environ, FASTUNLEARN_ISA=isa):
        x_t, target = noising(images, index, table, noise, None, 0, with_target, dtype, channels_last)

    clean = served(images if index is None else images[index])
    precision = torch.float64 if torch.float64 in (rows, noise_dtype) else torch.float32
    exact, terms = (
        closed_form(clean, noise, table, torch.float64),
        closed_form(clean.abs(), noise.abs(), table.abs(), torch.float64),
    )
    assert x_t.dtype == dtype
    assert target.dtype == torch.promote_types(dtype, torch.float32)
    assert is_laid_out(x_t, channels_last)
    # coefficient, product, sum; one more where float64 is the truth
    assert_rounded("x_t", x_t, exact[0], terms[0], 4, precision)
    if with_target:
        assert is_laid_out(target, channels_last)
        assert_rounded("target", target, exact[1], terms[1], 4, precision)
    else:
        assert target.shape == (0,)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("rows", ROWS[:4])
def test_error_is_at_most_twice_that_of_torch(rows, dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    images, noise, table = stored(4, (3, 33, 35), rows), normal((4, 3, 33, 35)), coefficients(4, "v")
    results = noising(images, None, table, noise, None, 0, True, dtype, False)
    exact, plain = (
        closed_form(served(images), noise, table, precision) for precision in (torch.float64, torch.float32)
    )
    for name, actual, truth, torchs in zip(("x_t", "target"), results, exact, plain, strict=True):
        assert_within_budget(name, actual, torchs.to(actual.dtype), truth)


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 3),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from(FLOATS),
    channels_last=st.booleans(),
    isa=st.sampled_from(ISAS),
)
@example((3, 33, 35), 2, torch.uint8, torch.float32, True, "avx512")
@example((3, 33, 35), 2, torch.float64, torch.float64, True, "avx512")
def test_noise_made_is_noise_given(shape, batch, rows, dtype, channels_last, isa):
    images, counter, table = stored(batch, shape, rows), torch.tensor([7, 1, 2]), coefficients(batch, "v")
    only_noise = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]).double().expand(batch, 5)
    with mock.patch.dict(os.environ, FASTUNLEARN_ISA=isa):
        noise, _ = noising(
            torch.zeros(batch, *shape), None, only_noise, None, counter, 5, False, torch.float32, False
        )
        made = noising(images, None, table, None, counter, 5, True, dtype, channels_last)
        given_ = noising(images, None, table, noise, None, 0, True, dtype, channels_last)
    for one, two in zip(made, given_, strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()


@pytest.mark.parametrize("isa", ISAS)
def test_every_byte_is_served_as_torch_serves_it(isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    every = torch.arange(256).to(torch.uint8).view(1, 1, 16, 16)
    identity = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]]).double()
    for result in noising(
        every, None, identity, torch.zeros(1, 1, 16, 16), None, 0, True, torch.float32, False
    ):
        assert torch.equal(result, served(every))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_results_round_to_nearest_even(dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (1, 1, 256, 256), generator=generator, dtype=torch.int64).to(
        torch.int32
    )
    near_ties = (
        torch.randint(-(2**15), 2**15, (1, 1, 64, 256), generator=generator).to(torch.int32) * 2**13
        + torch.randint(-1, 2, (1, 1, 64, 256)).int()
    )
    values = torch.cat([bits, near_ties], dim=2).view(torch.float32)
    values[0, 0, 0, :5] = torch.tensor([float("inf"), -float("inf"), float("nan"), 65520.0, -0.0])
    identity = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]]).double()
    x_t, _ = noising(values, None, identity, torch.zeros_like(values), None, 0, False, dtype, False)
    torch.testing.assert_close(x_t, values.to(dtype), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_outside_the_outputs_is_written(dtype, channels_last):
    batch, shape, guard = 2, (3, 37, 29), 64
    count = batch * 3 * 37 * 29
    buffers = [
        torch.full((count + 2 * guard,), torch.nan, dtype=kind)
        for kind in (dtype, torch.promote_types(dtype, torch.float32))
    ]
    inner = [buffer[guard : guard + count] for buffer in buffers]
    outputs = [
        part.view(batch, 37, 29, 3).permute(0, 3, 1, 2) if channels_last else part.view(batch, *shape)
        for part in inner
    ]
    args = (
        stored(batch, shape, torch.uint8),
        None,
        coefficients(batch),
        normal((batch, *shape)),
        None,
        0,
        True,
        dtype,
        channels_last,
    )
    torch.ops.fastunlearn_native.noising(*args, *outputs)
    for buffer, part in zip(buffers, inner, strict=True):
        assert part.isfinite().all()
        assert buffer.isfinite().sum() == count


def test_threads_do_not_change_the_result():
    batch, shape = 7, (3, 64, 64)
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(
                noising(
                    stored(batch, shape, torch.uint8),
                    None,
                    coefficients(batch),
                    normal((batch, *shape)),
                    None,
                    0,
                    True,
                    torch.float32,
                    False,
                )
            )
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


@pytest.mark.parametrize("backend", ["kernels", "eager"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(index=torch.zeros(0).long()),
            "images: expected an integer index of 1 axes with at least one row",
        ),
        (dict(index=torch.tensor([0.0, 1.0])), "images: expected an integer index"),
        (dict(index=torch.tensor([0])), r"coefficients: expected shape \(1, 5\), got \(2, 5\)"),
        (
            dict(images=torch.zeros(4, 3, 35)),
            r"images: expected rows \[..., C, H, W\], got shape \(4, 3, 35\)",
        ),
        (dict(images=torch.zeros(4, 0, 5, 7)), "images: expected at least one image"),
        (dict(noise=normal((1, 3, 5, 7))), r"noise: expected shape \(2, 3, 5, 7\), got \(1, 3, 5, 7\)"),
        (dict(noise=None), "noise, counter: expected one of the two"),
        (dict(noise=None, counter=torch.zeros(2).long()), r"counter: expected shape \(3,\), got \(2,\)"),
    ],
)
def test_wrong_shapes_are_refused_on_every_backend(changes, message, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    with pytest.raises(ValueError, match=message):
        noising(*_arguments(**changes))


def _arguments(**changes):
    given_ = dict(
        images=stored(4, (3, 5, 7), torch.uint8),
        index=torch.tensor([3, 0]),
        coefficients=coefficients(2),
        noise=normal((2, 3, 5, 7)),
        counter=None,
        purpose=0,
        with_target=True,
        dtype=torch.float32,
        channels_last=False,
    )
    return (given_ | changes).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(index=torch.tensor([0, 4])), r"index: expected rows in \[0, 3\], got 4"),
        (dict(index=torch.tensor([-1, 0])), r"index: expected rows in \[0, 3\], got -1"),
        (dict(index=torch.tensor([0, 1], dtype=torch.int32)), "index: expected contiguous int64"),
        (dict(index=torch.tensor([0])), "index: expected 2 samples, got 1"),
        (dict(index=None), "images: expected 2 samples, got 4"),
        (
            dict(images=torch.zeros(4, 3, 5, 7, dtype=torch.int32)),
            "images: expected float16, bfloat16, float32 or float64, got Int",
        ),
        (dict(images=torch.zeros(4, 3, 35)), r"images: expected \[N, C, H, W\], got 3 dimensions"),
        (dict(coefficients=coefficients(2).float()), r"coefficients: expected float64 \[B, 5\]"),
        (dict(noise=normal((2, 3, 7, 5))), r"noise: expected shape \[2, 3, 5, 7\]"),
        (
            dict(noise=torch.zeros(2, 3, 5, 7, dtype=torch.uint8)),
            "noise: expected float16, bfloat16, float32 or float64, got Byte",
        ),
        (dict(noise=None), "counter: expected one where there is no noise, got None"),
        (dict(noise=None, counter=torch.zeros(2).long()), r"counter: expected int64 \[3\]"),
        (dict(dtype=torch.int32), "x_t: expected float16, bfloat16, float32 or float64, got Int"),
    ],
)
def test_the_binding_refuses_wrong_input(changes, message):
    outputs = [torch.empty(2, 3, 5, 7, dtype=changes.get("dtype", torch.float32)) for _ in range(2)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastunlearn_native.noising(*_arguments(**changes), *outputs)


@pytest.mark.parametrize("wrong", ["layout", "dtype", "shape", "target dtype"])
def test_wrong_outputs_are_refused(wrong):
    x_t, target = torch.empty(2, 3, 5, 7), torch.empty(2, 3, 5, 7)
    if wrong == "layout":
        x_t = x_t.contiguous(memory_format=torch.channels_last)
    elif wrong == "dtype":
        x_t = x_t.bfloat16()
    elif wrong == "shape":
        x_t = x_t[:1]
    else:
        target = target.double()
    with pytest.raises(RuntimeError, match="target" if wrong == "target dtype" else "x_t"):
        torch.ops.fastunlearn_native.noising(*_arguments(), x_t, target)
