"""redirect in C++: values against float64, every dtype, layout and instruction set, the papers' precision at
t = 0, and what it refuses.
"""

import math
import os
from unittest import mock

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, SCHEDULES, for_kernels, normal

from fastunlearn.host import philox
from fastunlearn.host.store import DTYPES as ROWS
from fastunlearn.ops._backends import ISAS
from fastunlearn.ops.redirect import redirect
from fastunlearn.reference.redirect import redirect as literal
from fastunlearn.testing.budgets import assert_within_budget, budget, in_several_orders, largest_error
from fastunlearn.testing.factories import served

pytestmark = for_kernels
SKIPPED = 2.0**-32  # lighter neighbours may be left out of the mean


def stores(shape, rows, levels, forget=3, retain=7, seed=0):
    """Images to forget and to keep, uint8 values apart by at most `levels`, as `rows` stores them."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.randint(256, shape, generator=generator)
    pixels = [
        (base + torch.randint(-levels, levels + 1, (n, *shape), generator=generator))
        .clamp(0, 255)
        .to(torch.uint8)
        for n in (forget, retain)
    ]
    return pixels if rows == torch.uint8 else [(served(images)).to(rows) for images in pixels]


def picks(batch, k, forget=3, retain=7):
    generator = torch.Generator().manual_seed(2)
    return torch.randint(forget, (batch,), generator=generator), torch.randint(
        retain, (batch, k), generator=generator
    )


def coefficients(batch, t=None, prediction_type="epsilon"):
    """`[batch, 5]` of timestep t, by default of timesteps from the first to the last."""
    timesteps = torch.linspace(0, 999, batch).long() if t is None else torch.full((batch,), t)
    return SCHEDULES[prediction_type].coefficients(timesteps)


def eager(*arguments):
    """The closed form in plain torch."""
    with mock.patch.dict(os.environ, FASTUNLEARN_BACKEND="eager"):
        return redirect(*arguments)


def exact(images, index, neighbors, neighbor_index, table, sqdist, noise, channels_last):
    doubles = (served(value).double() for value in (images, neighbors))
    return eager(
        next(doubles),
        index,
        next(doubles),
        neighbor_index,
        table,
        sqdist,
        noise.double(),
        None,
        0,
        torch.float64,
        channels_last,
    )


def skipped_spread(neighbors, table, weights):
    """The part of the spread `[B]` that neighbours `[B, K, ...]` below `SKIPPED` have, by exact weights."""
    rows = served(neighbors).double().flatten(2)
    y = rows - rows.gather(1, weights.argmax(1).view(-1, 1, 1).expand(-1, 1, rows.shape[2]))
    light = weights.where(weights < SKIPPED, torch.zeros_like(weights))
    return table[:, 4].square() * (light * y.square().sum(2)).sum(1)


def assert_close(results, truth, images, neighbors, noise, table, precision):
    """Bounds from rounding: `u` to a term, `run` to a sum of a block (a lane of the narrowest vectors adds
    256 terms), the rest follows from the logits.

    images `[B, D]`, neighbors `[B, K, D]`, noise `[B, D]`: float64.
    """
    x_t, target, spread, weights = results
    alpha, sigma, a, b, c = (column.unsqueeze(1) for column in table.unbind(1))
    rho, u = alpha / sigma, torch.finfo(precision).eps / 2
    terms = min(noise.shape[1], 1024) / 4 + 8
    run, sums = terms * u, noise.shape[1] * 2.0**-53
    offsets = neighbors - images.unsqueeze(1)
    squares = offsets.square().sum(2)
    logit = (
        run * rho * (offsets.abs() * noise.abs().unsqueeze(1)).sum(2)
        + sums * rho.square() * squares
        + 2.0**-50
    )
    drift = torch.expm1(2 * logit.amax(1, keepdim=True))  # of a weight, at most
    skipped = neighbors.shape[1] * (SKIPPED if precision == torch.float32 else 2.0**-61)
    widest = offsets.abs().amax(1)

    def check(name, actual, expected, allowed):
        own = torch.finfo(actual.dtype)
        actual = actual.double().reshape(expected.shape)
        excess = (
            (actual - expected).abs()
            - allowed
            - own.eps / 2 * (expected.abs() + allowed)
            - own.smallest_normal * own.eps
        )
        assert excess.max() <= 0, f"{name}: {excess.max():.3g} too far"  # false for NaN, too

    check("x_t", x_t, truth[0].flatten(1), 4 * u * (alpha * images.abs() + sigma * noise.abs()))
    linear = a.abs() * noise.abs() + b.abs() * images.abs() + 2 * c.abs() * widest
    # a neighbour's offset from the heaviest is at most twice the widest from a; each of k sums rounds
    shift = 2 * c.abs() * widest * (drift + skipped + (neighbors.shape[1] + 8) * u)
    check("target", target, truth[1].flatten(1), 8 * u * linear + shift)
    check("weights", weights, truth[3], 2 * drift)
    farthest = 4 * squares.amax(1, keepdim=True)
    check(
        "spread",
        spread.unsqueeze(1),
        truth[2].unsqueeze(1),
        c.square() * farthest * (4 * drift + skipped + 4 * (run + neighbors.shape[1] * u)),
    )


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    shape=st.tuples(st.integers(1, 5), st.integers(1, 24), st.integers(1, 24)),
    batch=st.integers(1, 4),
    k=st.integers(1, 13),
    rows=st.sampled_from(ROWS),
    noise_dtype=st.sampled_from(FLOATS),
    dtype=st.sampled_from(FLOATS),
    channels_last=st.booleans(),
    indexed=st.booleans(),
    given_sqdist=st.booleans(),
    levels=st.sampled_from([0, 1, 12, 255]),
    prediction_type=st.sampled_from(sorted(SCHEDULES)),
    isa=st.sampled_from(ISAS),
)
@example(
    (1, 1, 1), 1, 1, torch.uint8, torch.float32, torch.float32, True, True, True, 12, "epsilon", "avx512"
)
@example(
    (1, 1, 1), 2, 1000, torch.float32, torch.float32, torch.float32, False, True, False, 255, "v", "avx2"
)
@example(
    (3, 33, 35), 2, 10, torch.uint8, torch.float32, torch.bfloat16, True, True, True, 12, "epsilon", "avx512"
)
@example(
    (3, 17, 61), 2, 1000, torch.uint8, torch.bfloat16, torch.float16, True, True, False, 1, "flow", "portable"
)
@example(
    (1030, 2, 1), 2, 3, torch.bfloat16, torch.float16, torch.float64, True, False, False, 12, "v", "avx512"
)
@example(
    (2, 1, 1025), 2, 7, torch.float64, torch.float64, torch.float32, False, False, True, 1, "epsilon", "avx2"
)
def test_values(
    shape,
    batch,
    k,
    rows,
    noise_dtype,
    dtype,
    channels_last,
    indexed,
    given_sqdist,
    levels,
    prediction_type,
    isa,
):
    forget, retain = stores(shape, rows, levels)
    index, neighbor_index = picks(batch, k)
    noise, table = normal((batch, *shape), noise_dtype), coefficients(batch, prediction_type=prediction_type)
    images, neighbors = forget[index], retain[neighbor_index]
    flat = [served(value).double().flatten(value.ndim - 3) for value in (images, neighbors)]
    sqdist = (flat[1] - flat[0].unsqueeze(1)).square().sum(2) if given_sqdist else None
    source = (forget, index, retain, neighbor_index) if indexed else (images, None, neighbors, None)
    with mock.patch.dict(os.environ, FASTUNLEARN_ISA=isa):
        results = redirect(*source, table, sqdist, noise, None, 0, dtype, channels_last)

    precision = torch.float64 if torch.float64 in (rows, noise_dtype) else torch.float32
    for images_out in results[:2]:
        assert images_out.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
    assert [result.dtype for result in results] == [
        dtype,
        torch.promote_types(dtype, torch.float32),
        precision,
        precision,
    ]
    truth = exact(images, None, neighbors, None, table, sqdist, noise, False)
    assert_close(results, truth, *flat, noise.double().flatten(1), table, precision)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("given_sqdist", [True, False])
@pytest.mark.parametrize("levels", [2, 12, 255])
@pytest.mark.parametrize("t", [0, 10, 300, 999])
def test_error_is_at_most_twice_that_of_torch(t, levels, given_sqdist, isa, monkeypatch):
    """From uint8 rows, with torch's closed form in float32 as the yardstick.

    The spread may lack what skipped neighbours have.

    At t = 0 one weight of the batch is neither 0 nor 1, and all the error is that of its one sum: hence in
    several orders.
    """
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    shape, batch, k = (3, 33, 31), 8, 11
    forget, retain = stores(shape, torch.uint8, levels)
    index, neighbor_index = picks(batch, k)
    images, neighbors, noise, table = (
        forget[index],
        retain[neighbor_index],
        normal((batch, *shape)),
        coefficients(batch, t),
    )
    sqdist = (
        (images.unsqueeze(1).long() - neighbors.long()).square().flatten(2).sum(2).double() * (2 / 255) ** 2
        if given_sqdist
        else None
    )
    arguments = (forget, index, retain, neighbor_index, table, sqdist, noise, None, 0, torch.float32, False)

    def closed_form(forget, retain, noise):
        return eager(forget, index, retain, *arguments[3:6], noise, *arguments[7:])

    plain = in_several_orders(closed_form, (forget, retain, noise))
    results, truth = redirect(*arguments), exact(*arguments[:7], False)
    for name, one, two, expected in zip(
        ("x_t", "target", "weights"),
        results[:2] + results[3:],
        plain[:2] + plain[3:],
        truth[:2] + truth[3:],
        strict=True,
    ):
        assert_within_budget(name, one, two, expected)
    allowed = budget(plain[2], truth[2]) + 2 * skipped_spread(neighbors, table, truth[3]).max().item()
    assert largest_error(results[2], truth[2]) <= allowed


@pytest.mark.parametrize("isa", ISAS)
def test_weights_at_the_first_timestep_are_closer_to_float64_than_the_papers_formula(isa, monkeypatch):
    """Neighbours a few grey levels apart: `||v_j||^2` is near 1e5 and decides by differences near 1, of which
    float32 keeps two digits.
    """
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    shape, batch, k = (3, 64, 64), 4, 10
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(1, 255, (batch, *shape), generator=generator).to(torch.uint8)
    few = torch.rand((batch, k, *shape), generator=generator) < 20 / math.prod(shape)
    neighbors = (images.unsqueeze(1).int() + few * torch.randint(-1, 2, few.shape, generator=generator)).to(
        torch.uint8
    )
    noise, t = normal((batch, *shape)), torch.zeros(batch, dtype=torch.long)
    table = SCHEDULES["epsilon"].coefficients(t)
    sqdist = (images.unsqueeze(1).int() - neighbors.int()).square().flatten(2).sum(2).double() * (
        2 / 255
    ) ** 2

    truth = literal(
        served(images).double(), served(neighbors).double(), noise.double(), t, SCHEDULES["epsilon"]
    ).weights
    papers = literal(served(images), served(neighbors), noise, t, SCHEDULES["epsilon"]).weights
    ours = redirect(images, None, neighbors, None, table, sqdist, noise, None, 0, torch.float32, False)[3]
    theirs, own = largest_error(papers, truth), largest_error(ours, truth)
    errors = f"largest error of a weight: papers {theirs:.2g}, kernel {own:.2g}"
    print(errors)  # pytest -rP
    assert truth.amax(1).min() < 0.9, "one-hot weights would show nothing"
    assert largest_error(ours, truth) < 0.05 * largest_error(papers, truth), errors


@pytest.mark.parametrize("prediction_type", sorted(SCHEDULES))
def test_agrees_with_the_literal_formula_in_float64(prediction_type):
    schedule, t, shape = SCHEDULES[prediction_type], torch.tensor([3, 400, 990]), (3, 9, 11)
    forget, retain = stores(shape, torch.float64, 12)
    index, neighbor_index = picks(3, 5)
    noise = normal((3, *shape), torch.float64)
    results = redirect(
        forget,
        index,
        retain,
        neighbor_index,
        schedule.coefficients(t),
        None,
        noise,
        None,
        0,
        torch.float64,
        False,
    )
    for one, two in zip(
        results, literal(forget[index], retain[neighbor_index], noise, t, schedule), strict=True
    ):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("t", [0, 500, 999])
def test_special_neighbours(t):
    """One neighbour: weight 1, no spread.

    Copies of one: equal weights, no spread. Copies of the image itself: the target is the noise.
    """
    shape, noise, table = (3, 5, 7), normal((2, 3, 5, 7)), coefficients(2, t)
    images, other = (part[:2] for part in stores(shape, torch.uint8, 12))

    def run(neighbors):
        return redirect(images, None, neighbors, None, table, None, noise, None, 0, torch.float32, False)

    _, _, spread, weights = run(other.unsqueeze(1))
    assert torch.equal(weights, torch.ones(2, 1))
    assert torch.equal(spread, torch.zeros(2))
    _, target, spread, weights = run(other.unsqueeze(1).repeat(1, 6, 1, 1, 1))
    assert torch.equal(weights, torch.full((2, 6), 1 / 6))
    assert torch.equal(spread, torch.zeros(2))
    torch.testing.assert_close(target, run(other.unsqueeze(1))[1], rtol=0, atol=0)
    _, target, spread, _ = run(images.unsqueeze(1).repeat(1, 3, 1, 1, 1))
    assert torch.equal(target, noise)
    assert torch.equal(spread, torch.zeros(2))


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("rows", [torch.uint8, torch.float64])
@pytest.mark.parametrize("shape", [(3, 7, 9), (3, 33, 35), (1, 1, 5)])
def test_noise_is_made_from_the_counter(shape, rows, channels_last):
    forget, retain = stores(shape, rows, 12)
    index, neighbor_index = picks(3, 4)
    counter = torch.tensor([2**40 + 5, 12, 100])
    source, options = (
        (forget, index, retain, neighbor_index, coefficients(3, 600), None),
        (torch.float32, channels_last),
    )
    made = redirect(*source, None, counter, 5, *options)
    given_noise = redirect(*source, philox.normal((3, *shape), counter, 5), None, 0, *options)
    for one, two in zip(made, given_noise, strict=True):
        # a normal number is right to a few roundings
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_a_sample_without_numbers_spoils_no_other():
    forget, retain = stores((3, 9, 9), torch.float32, 12)
    index, neighbor_index = picks(3, 5)
    noise = normal((3, 3, 9, 9))
    source = (forget, index, retain, neighbor_index, coefficients(3, 700), None)
    clean = redirect(*source, noise, None, 0, torch.float32, False)
    noise[1, 0, 4, 4] = math.nan
    for one, two in zip(clean, redirect(*source, noise, None, 0, torch.float32, False), strict=True):
        assert torch.equal(one[0::2], two[0::2])
        assert two[1].isnan().any()


def test_bad_arguments_are_named():
    """Of the C++ kernel, which checks for itself: the op looks at shapes before."""
    forget, retain = stores((3, 4, 5), torch.uint8, 12)
    index, neighbor_index = picks(2, 3)
    noise, table, sqdist = normal((2, 3, 4, 5)), coefficients(2), torch.ones(2, 3, dtype=torch.float64)
    arguments = dict(
        images=forget,
        index=index,
        neighbors=retain,
        neighbor_index=neighbor_index,
        coefficients=table,
        sqdist=sqdist,
        noise=noise,
    )
    arguments |= dict(counter=None, purpose=0, dtype=torch.float32, channels_last=False)
    arguments |= dict(
        x_t=torch.empty(2, 3, 4, 5),
        target=torch.empty(2, 3, 4, 5),
        spread=torch.empty(2),
        weights=torch.empty(2, 3),
    )

    def run(**changed):
        torch.ops.fastunlearn_native.redirect(*(arguments | changed).values())

    run()
    for name, bad, message in (
        ("index", torch.tensor([0, 3]), r"index: expected rows in \[0, 2\], got 3"),
        ("index", torch.tensor([0, -1]), r"index: expected rows in \[0, 2\], got -1"),
        ("index", torch.tensor([0]), "index: expected 2 samples, got 1"),
        ("neighbor_index", torch.full((2, 3), 7), r"neighbor_index: expected rows in \[0, 6\], got 7"),
        (
            "neighbor_index",
            torch.zeros(3, 3, dtype=torch.long),
            r"neighbor_index: expected \[2, K >= 1\], got \[3, 3\]",
        ),
        (
            "neighbor_index",
            torch.zeros(2, 0, dtype=torch.long),
            r"neighbor_index: expected \[2, K >= 1\], got \[2, 0\]",
        ),
        ("neighbors", retain[:, :2], "neighbors: expected images of"),
        ("neighbors", retain.int(), "neighbors: expected float16, bfloat16, float32 or float64, got Int"),
        ("noise", noise[:1], r"noise: expected shape \[2, 3, 4, 5\]"),
        ("noise", None, "counter: expected one where there is no noise"),
        ("sqdist", sqdist.float(), "sqdist: expected Double, got Float"),
        ("sqdist", sqdist[:, :2], "sqdist: expected 2 rows of 3, got 4 numbers"),
        (
            "x_t",
            torch.empty(2, 3, 4, 5).to(memory_format=torch.channels_last),
            "x_t: expected stride 20 in dimension 1, got 1",
        ),
        ("target", torch.empty(2, 3, 4, 5, dtype=torch.bfloat16), "target: expected Float, got BFloat16"),
        ("spread", torch.empty(3), "spread: expected 2 rows of 1, got 3 numbers"),
        ("weights", torch.empty(2, 3, dtype=torch.float64), "weights: expected Float, got Double"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(**{name: bad})
