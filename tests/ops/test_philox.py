"""The normal numbers of the C++ kernels: those of the words of `philox.py`, as precise as float32 allows, on
every instruction set.

A kernel shows its noise where `alpha = 0` and `sigma = 1`: then `x_t` is the noise itself.
"""

import math

import pytest
import torch

from fastunlearn.host import philox
from fastunlearn.ops._backends import build_command, extension
from fastunlearn.ops.noising import noising
from fastunlearn.testing.budgets import assert_within_budget

pytestmark = pytest.mark.skipif(
    not extension("_C"), reason=f"the C++ extension is not built; build it with: {build_command()}"
)
# seed, step, first row
COUNTERS = [
    (0, 0, 0),
    (7, 1, 2),
    (-1, 2**32 - 1, 2**32 - 2),
    (2**63 - 1, 2**31, 640),
    (-(2**63), 2**40 + 3, 2**33 + 5),
]


@pytest.fixture(params=["portable", "avx2", "avx512"], autouse=True)
def isa(request, monkeypatch):
    """An instruction set; a processor without it runs the best that it has."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "kernels")
    monkeypatch.setenv("FASTUNLEARN_ISA", request.param)


def numbers(shape, counter=(7, 1, 2), purpose=5, channels_last=False):
    shape = (*shape, *(1,) * (4 - len(shape)))
    coefficients = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0]]).double().expand(shape[0], 5)
    x_t, _ = noising(
        torch.zeros(shape),
        None,
        coefficients,
        None,
        torch.tensor(counter),
        purpose,
        False,
        torch.float32,
        channels_last,
    )
    return x_t


def exact_numbers(shape, counter, purpose):
    """Box-Muller in float64, and the radius of every number."""
    words = philox.unit(philox.words(shape, torch.tensor(counter), purpose)).double()
    radius, angle = torch.sqrt(-2 * torch.log(words[..., 0::2] + 2**-24)), 2 * math.pi * words[..., 1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return (
        values[:, : math.prod(shape[1:])].reshape(shape)
        for values in (pairs, radius.repeat_interleave(2, dim=-1).flatten(1))
    )


@pytest.mark.parametrize("purpose", [0, 6])
@pytest.mark.parametrize("counter", COUNTERS)
def test_numbers_are_box_muller_of_the_words_to_four_roundings(counter, purpose):
    shape = (3, 2, 40, 50)
    made, (exact, radius) = numbers(shape, counter, purpose), exact_numbers(shape, counter, purpose)
    # radius, cosine or sine, their product
    assert ((made.double() - exact).abs() <= 4 * 2**-24 * radius).all()
    assert_within_budget("normals", made, philox.normal(shape, torch.tensor(counter), purpose), exact)


@pytest.mark.parametrize("elements", [1, 2, 3, 4, 5, 31, 63, 64, 65, 255, 256, 257, 1023, 1025, 1027, 2051])
def test_every_length_of_a_row(elements):
    made, (exact, radius) = numbers((2, elements)).flatten(1), exact_numbers((2, elements), (7, 1, 2), 5)
    assert ((made.double() - exact).abs() <= 4 * 2**-24 * radius).all()


@pytest.mark.parametrize(
    "shape", [(2, 3, 5, 7), (2, 4, 33, 31), (1, 2, 37, 29), (2, 300, 2, 1), (1, 1030, 3, 1), (3, 5, 1, 1)]
)
def test_the_memory_layout_does_not_change_the_numbers(shape):
    """Channels last, a channel may begin amid the four elements of a counter."""
    assert torch.equal(numbers(shape, channels_last=True), numbers(shape))


def test_rows_are_those_of_the_global_batch():
    whole = numbers((6, 3, 9, 11), counter=(7, 1, 2**32 - 3))
    assert torch.equal(whole[2:], numbers((4, 3, 9, 11), counter=(7, 1, 2**32 - 1)))
    assert torch.equal(whole[3:], numbers((3, 3, 9, 11), counter=(7, 1, 0)))  # the row is a 32-bit word


@pytest.mark.parametrize(
    ("counter", "purpose"),
    [((8, 1, 2), 5), ((7 + 2**32, 1, 2), 5), ((7, 2, 2), 5), ((7, 1, 66), 5), ((7, 1, 2), 6)],
)
def test_seed_step_row_and_purpose_change_every_number(counter, purpose):
    one, two = numbers((64, 16, 16)), numbers((64, 16, 16), counter, purpose)
    assert (one == two).float().mean() < 1e-3
    assert abs((one * two).mean()) < 5 / one.numel() ** 0.5


def test_numbers_are_standard_normal():
    made = numbers((64, 3, 64, 64)).double().flatten()
    deviation = made.numel() ** -0.5
    # E x^n, Var x^n
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(made.pow(power).mean() - moment) < 5 * variance**0.5 * deviation
    for lag in (1, 2, 3, 4, 64, 64 * 64):
        assert abs((made[lag:] * made[:-lag]).mean()) < 5 * deviation
        assert abs(((made[lag:] ** 2 - 1) * (made[:-lag] ** 2 - 1)).mean()) < 10 * deviation
    edges = torch.linspace(-4, 4, 33, dtype=torch.float64)
    expected = torch.special.ndtr(edges)
    below = torch.searchsorted(made.sort().values, edges) / made.numel()
    assert ((below - expected).abs() < 5 * (expected * (1 - expected)).sqrt() * deviation).all()


@pytest.mark.parametrize("threads", [1, 2])
def test_threads_do_not_change_the_numbers(threads):
    expected, before = numbers((8, 1, 64, 64)), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(numbers((8, 1, 64, 64)), expected)
    finally:
        torch.set_num_threads(before)
