"""mixture in C++: values and weights against float64, the limits of both sigmoids, every dtype, layout and
instruction set.
"""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, SCHEDULES, assert_rounded, coefficients, for_kernels, normal

from fastunlearn.host.store import DTYPES as ROWS
from fastunlearn.ops._backends import ISAS
from fastunlearn.ops.mixture import mixture
from fastunlearn.ops.noising import noising
from fastunlearn.testing.budgets import assert_within_budget
from fastunlearn.testing.factories import served

pytestmark = for_kernels
INFINITY = float("inf")


def pair(count, shape, retain_dtype, forget_dtype, distance, seed=0):
    """Rows at about `distance` per element from one another, as stored."""
    generator = torch.Generator().manual_seed(seed)
    retain = torch.rand(count, *shape, generator=generator) * 2 - 1
    forget = (retain + distance * torch.randn(count, *shape, generator=generator)).clamp(-1, 1)
    return as_stored(retain, retain_dtype), as_stored(forget, forget_dtype)


def as_stored(images, dtype):
    return ((images + 1) * 127.5).round().to(torch.uint8) if dtype == torch.uint8 else images.to(dtype)


def closed_form(retain, forget, noise, table, from_forget, dtype):
    """`x_t` and both targets computed in `dtype`."""
    alpha, sigma, a, b, c = (column.to(dtype).view(-1, 1, 1, 1) for column in table.unbind(1))
    retain, forget, noise = retain.to(dtype), forget.to(dtype), noise.to(dtype)
    chosen = torch.where(from_forget.view(-1, 1, 1, 1), forget, retain)
    return alpha * chosen + sigma * noise, *(
        a * noise + b * chosen + c * (chosen - images) for images in (retain, forget)
    )


def absolute_terms(retain, forget, noise, table, from_forget):
    """The same with the absolute value of every term, in float64."""
    alpha, sigma, a, b, c = (column.abs().view(-1, 1, 1, 1) for column in table.unbind(1))
    retain, forget, noise = retain.double(), forget.double(), noise.double().abs()
    chosen = torch.where(from_forget.view(-1, 1, 1, 1), forget, retain)
    targets = (a * noise + b * chosen.abs() + c * (chosen - images).abs() for images in (retain, forget))
    return alpha * chosen.abs() + sigma * noise, *targets


def exact_exponent(retain, forget, noise, table, from_forget):
    """`u` of every sample, summed without rounding, and a bound of the error of 300 roundings of its sums."""
    u, bound = [], []
    for x, a, eps, row, chosen in zip(
        retain.double(), forget.double(), noise.double(), table, from_forget, strict=True
    ):
        difference, rho = (x - a).flatten(), (row[0] / row[1]).item()
        dots, squares = (eps.flatten() * difference).tolist(), difference.square().tolist()
        u.append((0.5 if chosen else -0.5) * rho**2 * math.fsum(squares) - rho * math.fsum(dots))
        bound.append(300 * 2**-53 * (0.5 * rho**2 * math.fsum(squares) + rho * math.fsum(map(abs, dots))))
    return torch.tensor(u, dtype=torch.float64), torch.tensor(bound, dtype=torch.float64)


def exact_weights(u, lambd):
    """`(w_x, w_a)` from the definition `p_i / ((1 - lambda) p_x + lambda p_a)`, `p_a / p_x = exp(u)`.

    In logarithms, where nothing overflows.
    """
    retain_share, forget_share = (
        torch.tensor(share, dtype=torch.float64).log() for share in (1 - lambd, lambd)
    )
    return torch.exp(-torch.logaddexp(retain_share, forget_share + u)), torch.exp(
        -torch.logaddexp(retain_share - u, forget_share)
    )


def weights_of(u, lambd, time_log_ratio=None):
    """The kernel's weights where the images make `u`: one element, sigma = 1, alpha = 2, retain = 0, eps = 0
    and forget as it takes.
    """
    table = torch.tensor([[2.0, 1.0, 1.0, 0.0, 0.0]]).double().expand(len(u), 5).contiguous()
    forget = (u.abs() / 2).sqrt().view(-1, 1, 1, 1)
    zero = torch.zeros_like(forget)
    *_, retain_weight, forget_weight = mixture(
        zero, None, forget, None, table, u > 0, lambd, time_log_ratio, zero, None, 0, torch.float32, False
    )
    return retain_weight, forget_weight


@settings(max_examples=300, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 4),
    retain_dtype=st.sampled_from(ROWS),
    forget_dtype=st.sampled_from(ROWS),
    noise_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    channels_last=st.booleans(),
    indexed=st.tuples(st.booleans(), st.booleans()),
    lambd=st.sampled_from([0.0, 1e-12, 0.1, 0.5, 0.999, 1.0]),
    distance=st.sampled_from([0.0, 1e-3, 0.03, 1.0]),
    prediction_type=st.sampled_from(sorted(SCHEDULES)),
    isa=st.sampled_from(ISAS),
)
@example(
    (1, 1, 1),
    1,
    torch.uint8,
    torch.uint8,
    torch.float32,
    torch.float32,
    True,
    (True, True),
    0.5,
    0.03,
    "epsilon",
    "avx512",
)
@example(
    (3, 33, 35),
    4,
    torch.uint8,
    torch.uint8,
    torch.float32,
    torch.bfloat16,
    True,
    (True, False),
    0.5,
    1e-3,
    "flow",
    "avx512",
)
@example(
    (2, 1, 1025),
    3,
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.float16,
    False,
    (False, True),
    0.1,
    0.03,
    "v",
    "portable",
)
@example(
    (1, 32, 32),
    4,
    torch.float32,
    torch.float32,
    torch.float32,
    torch.float32,
    False,
    (False, False),
    0.5,
    0.0,
    "epsilon",
    "avx2",
)
def test_values(
    shape,
    batch,
    retain_dtype,
    forget_dtype,
    noise_dtype,
    dtype,
    channels_last,
    indexed,
    lambd,
    distance,
    prediction_type,
    isa,
):
    count, generator = 5 if any(indexed) else batch, torch.Generator().manual_seed(2)
    retain, forget = pair(count, shape, retain_dtype, forget_dtype, distance)
    index = [torch.randint(count, (batch,), generator=generator) if wanted else None for wanted in indexed]
    if index[0] is None:
        retain = retain[:batch]
    if index[1] is None:
        forget = forget[:batch]
    noise, table = normal((batch, *shape), noise_dtype), coefficients(batch, prediction_type)
    from_forget = torch.rand(batch, generator=generator) < 0.5
    rows = retain, index[0], forget, index[1]
    with mock.patch.dict(os.environ, FASTUNLEARN_ISA=isa):
        *images, retain_weight, forget_weight = mixture(
            *rows, table, from_forget, lambd, None, noise, None, 0, dtype, channels_last
        )

    x = served(retain if index[0] is None else retain[index[0]])
    a = served(forget if index[1] is None else forget[index[1]])
    in_double = torch.float64 in (retain_dtype, forget_dtype, noise_dtype)
    precision = torch.float64 if in_double else torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    exact = closed_form(x, a, noise, table, from_forget, torch.float64)
    terms = absolute_terms(x, a, noise, table, from_forget)
    names = ("x_t", "retain_target", "forget_target")
    for name, actual, expected, scale in zip(names, images, exact, terms, strict=True):
        assert actual.dtype == (dtype if name == "x_t" else torch.promote_types(dtype, torch.float32))
        assert actual.is_contiguous(memory_format=layout)
        # coefficient, difference, product, two sums; one more where float64 is the truth
        assert_rounded(name, actual, expected, scale, 6, precision)

    u, error = exact_exponent(x, a, noise, table, from_forget)
    log_odds = math.log(lambd / (1 - lambd)) if 0 < lambd < 1 else 0.0
    # exp(v) errs relatively by what v errs by
    relative = torch.expm1(error) + 4 * 2**-53 * (1 + u.abs() + abs(log_odds))
    for actual, expected in zip((retain_weight, forget_weight), exact_weights(u, lambd), strict=True):
        assert actual.dtype == torch.float64
        representable = expected < torch.finfo(torch.float64).max
        assert (actual[~representable] > 1e300).all()
        assert (
            (actual - expected).abs()[representable] <= (relative * expected + 1e-300)[representable]
        ).all()


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS[:3])
@pytest.mark.parametrize("rows", ROWS[:4])
def test_error_is_at_most_twice_that_of_torch(rows, dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    retain, forget = pair(4, (3, 33, 35), rows, rows, 0.03)
    noise, table, from_forget = normal((4, 3, 33, 35)), coefficients(4, "v"), torch.arange(4) % 2 == 0
    results = mixture(retain, None, forget, None, table, from_forget, 0.5, None, noise, None, 0, dtype, False)
    both = served(retain), served(forget), noise, table, from_forget
    exact, plain = closed_form(*both, torch.float64), closed_form(*both, torch.float32)
    for name, actual, truth, torchs in zip(
        ("x_t", "retain_target", "forget_target"), results[:3], exact, plain, strict=True
    ):
        assert_within_budget(name, actual, torchs.to(actual.dtype), truth)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 40)),
    batch=st.integers(1, 3),
    rows=st.sampled_from(ROWS),
    dtype=st.sampled_from(FLOATS),
    channels_last=st.booleans(),
    isa=st.sampled_from(ISAS),
)
@example((3, 33, 35), 2, torch.uint8, torch.float32, True, "avx512")
def test_noise_made_is_noise_given(shape, batch, rows, dtype, channels_last, isa):
    retain, forget = pair(batch, shape, rows, rows, 0.03)
    counter, table, from_forget = (
        torch.tensor([7, 1, 2]),
        coefficients(batch, "v"),
        torch.arange(batch) % 2 == 0,
    )
    only_noise = torch.tensor([[0.0, 1.0, 0.0, 0.0, 0.0]]).double().expand(batch, 5)
    rest = (table, from_forget, 0.5, None)
    with mock.patch.dict(os.environ, FASTUNLEARN_ISA=isa):
        noise, _ = noising(
            torch.zeros(batch, *shape), None, only_noise, None, counter, 5, False, torch.float32, False
        )
        made = mixture(retain, None, forget, None, *rest, None, counter, 5, dtype, channels_last)
        given_ = mixture(retain, None, forget, None, *rest, noise, None, 0, dtype, channels_last)
    for one, two in zip(made, given_, strict=True):
        assert torch.equal(one, two)
        assert one.isfinite().all()


U = torch.tensor(
    [0.0, 1e-9, -1e-9, 0.5, -0.5, 30.0, -30.0, 700.0, -700.0, 1e4, -1e4, 1e12, -1e12, 1e30, -1e30]
)


@pytest.mark.parametrize("lambd", [1e-15, 0.01, 0.5, 0.9, 1 - 1e-15])
def test_weights_never_overflow(lambd):
    retain_weight, forget_weight = weights_of(U, lambd)
    u = torch.where(U > 0, 2.0, -2.0) * (U.abs() / 2).sqrt().double().square()  # forget is rounded to float32
    for actual, expected in zip((retain_weight, forget_weight), exact_weights(u, lambd), strict=True):
        assert actual.isfinite().all()
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(
        (1 - lambd) * retain_weight + lambd * forget_weight, torch.ones_like(u), rtol=1e-14, atol=0
    )


def test_weights_of_one_branch_only():
    u = torch.tensor([0.0, 3.0, -3.0, 600.0, -600.0])
    exact = torch.where(u > 0, 2.0, -2.0) * (u.abs() / 2).sqrt().double().square()
    retain_weight, forget_weight = weights_of(u, 0.0)
    assert (retain_weight == 1).all()
    torch.testing.assert_close(forget_weight, exact.exp(), rtol=1e-12, atol=0)
    retain_weight, forget_weight = weights_of(u, 1.0)
    torch.testing.assert_close(retain_weight, (-exact).exp(), rtol=1e-12, atol=0)
    assert (forget_weight == 1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_time_log_ratio_adds_to_the_exponent(dtype):
    ratio = torch.tensor([0.0, 2.0, -2.0, INFINITY, -INFINITY, 800.0, -800.0]).to(dtype)
    u, lambd = torch.full((len(ratio),), 0.5), 0.25
    actual, expected = weights_of(u, lambd, ratio), exact_weights((u + ratio).double(), lambd)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-12, atol=1e-300)
    assert (actual[0][3].item(), actual[1][3].item()) == (0, 1 / lambd)
    assert (actual[0][4].item(), actual[1][4].item()) == (1 / (1 - lambd), 0)  # outside the forget window


@pytest.mark.parametrize("lambd", [0.0, 1e-15, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("scale", [0.0, 1.0, 1e30, INFINITY, math.nan], ids=lambda scale: f"u of {scale:g}")
@pytest.mark.parametrize("backend", ["eager", "kernels"])
@pytest.mark.parametrize("isa", ISAS)
def test_an_infinite_time_log_ratio_decides_alone(isa, backend, scale, lambd, monkeypatch):
    """One branch could not have made the row: weights are 0 and 1 / share, beside any exponent."""
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    ratio = torch.tensor([INFINITY, -INFINITY, INFINITY, -INFINITY, 0.0])
    u = scale * torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0]) if scale else torch.zeros(5)
    actual = weights_of(u.nan_to_num(scale if math.isnan(scale) else 0.0, INFINITY, -INFINITY), lambd, ratio)
    of_retain, of_forget = (1 / share if share else INFINITY for share in (1 - lambd, lambd))
    assert actual[0][:4].tolist() == [0.0, of_retain, 0.0, of_retain]
    assert actual[1][:4].tolist() == [of_forget, 0.0, of_forget, 0.0]
    if scale in (0.0, 1.0, 1e30):
        ones = torch.ones(2, dtype=torch.float64)
        torch.testing.assert_close(torch.stack(actual)[:, 4], ones, rtol=1e-12, atol=0)


@pytest.mark.parametrize("lambd", [0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("rows", ROWS)
def test_two_equal_images_have_weight_one_and_one_target(rows, lambd):
    images, _ = pair(4, (3, 9, 7), rows, rows, 0.0)
    table, noise = coefficients(4), normal((4, 3, 9, 7))
    rest = (table, torch.arange(4) < 2, lambd, None, noise, None, 0, torch.float32, False)
    _, retain_target, forget_target, *weights = mixture(images, None, images, None, *rest)
    assert torch.equal(retain_target, forget_target)
    for weight in weights:
        torch.testing.assert_close(weight, torch.ones_like(weight), rtol=4 * 2**-53, atol=0)


def test_weights_are_closer_to_the_truth_than_float32_sums_are():
    """At t = 0 and close images, `u` is a small difference of large terms: float32 sums lose it."""
    retain, forget = pair(4, (3, 64, 64), torch.float32, torch.float32, 3e-4)
    table, noise, from_forget = (
        coefficients(1).expand(4, 5).contiguous(),
        normal((4, 3, 64, 64)),
        torch.arange(4) % 2 == 0,
    )
    u, _ = exact_exponent(retain, forget, noise, table, from_forget)
    exact, _ = exact_weights(u, 0.5)
    *_, weight, _ = mixture(
        retain, None, forget, None, table, from_forget, 0.5, None, noise, None, 0, torch.float32, False
    )

    x_t, *_ = closed_form(retain, forget, noise, table, from_forget, torch.float32)
    alpha, sigma = table[:, 0].float().view(-1, 1, 1, 1), table[:, 1].float().view(-1, 1)
    to_retain, to_forget = (
        -0.5 * ((x_t - alpha * images).flatten(1) / sigma).square().sum(1) for images in (retain, forget)
    )
    papers, _ = exact_weights((to_forget - to_retain).double(), 0.5)
    error, error_of_papers = ((values - exact).abs().max().item() for values in (weight, papers))
    assert error < 1e-9 < 1e-5 < error_of_papers, (error, error_of_papers)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_layout_and_threads_do_not_change_the_values(dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    retain, forget = pair(5, (3, 33, 35), torch.uint8, torch.uint8, 0.03)
    results, before = [], torch.get_num_threads()
    try:
        for threads, channels_last in ((1, False), (2, False), (1, True)):
            torch.set_num_threads(threads)
            rest = (
                coefficients(5),
                torch.arange(5) < 2,
                0.5,
                None,
                normal((5, 3, 33, 35)),
                None,
                0,
                dtype,
                channels_last,
            )
            results.append(mixture(retain, None, forget, None, *rest))
    finally:
        torch.set_num_threads(before)
    for one, threaded, interleaved in zip(*results, strict=True):
        assert torch.equal(one, threaded)
        torch.testing.assert_close(
            interleaved,
            one,
            rtol=2 * torch.finfo(one.dtype).eps,
            atol=1e-9 if one.ndim == 1 else 2 * torch.finfo(one.dtype).eps,
        )


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
def test_nothing_outside_the_outputs_is_written(dtype, channels_last):
    batch, shape, guard = 2, (3, 37, 29), 64
    count, target = batch * 3 * 37 * 29, torch.promote_types(dtype, torch.float32)
    buffers = [torch.full((count + 2 * guard,), torch.nan, dtype=kind) for kind in (dtype, target, target)]
    inner = [buffer[guard : guard + count] for buffer in buffers]
    outputs = [
        part.view(batch, 37, 29, 3).permute(0, 3, 1, 2) if channels_last else part.view(batch, *shape)
        for part in inner
    ]
    weights = torch.full((4, batch), torch.nan, dtype=torch.float64)
    torch.ops.fastunlearn_native.mixture(
        *_arguments(shape=shape, dtype=dtype, channels_last=channels_last), *outputs, weights[1], weights[2]
    )
    for buffer, part in zip(buffers, inner, strict=True):
        assert part.isfinite().all()
        assert buffer.isfinite().sum() == count
    assert weights.isfinite().all(1).tolist() == [False, True, True, False]


def _arguments(shape=(3, 5, 7), **changes):
    retain, forget = pair(4, shape, torch.uint8, torch.uint8, 0.03)
    given_ = dict(
        retain=retain,
        retain_index=torch.tensor([3, 0]),
        forget=forget,
        forget_index=torch.tensor([1, 1]),
        coefficients=coefficients(2),
        from_forget=torch.tensor([True, False]),
        lambd=0.5,
        time_log_ratio=None,
        noise=normal((2, *shape)),
        counter=None,
        purpose=0,
        dtype=torch.float32,
        channels_last=False,
    )
    return (given_ | changes).values()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(retain_index=torch.tensor([0, 4])), r"retain_index: expected rows in \[0, 3\], got 4"),
        (dict(forget_index=torch.tensor([-1, 0])), r"forget_index: expected rows in \[0, 3\], got -1"),
        (dict(forget_index=torch.tensor([0])), "forget_index: expected 2 samples, got 1"),
        (dict(retain_index=None), "retain: expected 2 samples, got 4"),
        (dict(forget=torch.zeros(4, 3, 7, 5)), r"forget: expected shape \[4, 3, 5, 7\]"),
        (
            dict(forget=torch.zeros(4, 3, 5, 7).int()),
            "forget: expected float16, bfloat16, float32 or float64, got Int",
        ),
        (dict(coefficients=coefficients(2)[:, :4].contiguous()), r"coefficients: expected float64 \[B, 5\]"),
        (dict(from_forget=torch.zeros(2).long()), r"from_forget: expected bool \[2\]"),
        (dict(from_forget=torch.zeros(3).bool()), r"from_forget: expected bool \[2\]"),
        (dict(lambd=1.5), r"lambd: expected a number in \[0, 1\], got 1.5"),
        (dict(lambd=float("nan")), r"lambd: expected a number in \[0, 1\], got nan"),
        (dict(time_log_ratio=torch.zeros(3)), r"time_log_ratio: expected \[2\]"),
        (dict(noise=normal((2, 3, 7, 5))), r"noise: expected shape \[2, 3, 5, 7\]"),
        (dict(noise=None), "counter: expected one where there is no noise, got None"),
    ],
)
def test_the_binding_refuses_wrong_input(changes, message):
    outputs = [torch.empty(2, 3, 5, 7) for _ in range(3)] + [torch.empty(2).double() for _ in range(2)]
    with pytest.raises(RuntimeError, match=message):
        torch.ops.fastunlearn_native.mixture(*_arguments(**changes), *outputs)


@pytest.mark.parametrize("backend", ["kernels", "eager"])
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            dict(forget_index=torch.tensor([0])),
            r"forget: expected pairs with retain \(2, 3, 5, 7\), got \(1, 3, 5, 7\)",
        ),
        (dict(from_forget=torch.zeros(3).bool()), r"from_forget: expected shape \(2,\), got \(3,\)"),
        (dict(time_log_ratio=torch.zeros(1)), r"time_log_ratio: expected shape \(2,\), got \(1,\)"),
    ],
)
def test_wrong_shapes_are_refused_on_every_backend(changes, message, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    with pytest.raises(ValueError, match=message):
        mixture(*_arguments(**changes))


@pytest.mark.parametrize("output", range(5))
def test_wrong_outputs_are_refused(output):
    outputs = [torch.empty(2, 3, 5, 7) for _ in range(3)] + [torch.empty(2).double() for _ in range(2)]
    outputs[output] = outputs[output].half()
    name = ("x_t", "retain_target", "forget_target", "retain_weight", "forget_weight")[output]
    with pytest.raises(RuntimeError, match=f"{name}: expected"):
        torch.ops.fastunlearn_native.mixture(*_arguments(), *outputs)
