"""A byte of a store becomes the same 32 bits on every device, however a compiler or a device divides.

That the kernels agree is tested in tests/ops/test_noising.py and tests/triton/test_triton_philox.py.
"""

import numpy as np
import pytest
import torch

from fastunlearn import ImageStore
from fastunlearn.host.store import LOWER_PART, UPPER_PART, Rows, network_input
from fastunlearn.ops.mixture import mixture
from fastunlearn.ops.noising import noising
from fastunlearn.ops.redirect import redirect
from fastunlearn.testing.cuda_division import CudaDivision, by_reciprocal
from fastunlearn.testing.factories import served

EVERY = torch.arange(256).to(torch.uint8).view(4, 1, 8, 8)


def old_definition(rows):
    return rows.float().div_(127.5).sub_(1)


def test_the_parts_add_up_to_the_reciprocal():
    exact = 1 / 127.5
    assert abs(UPPER_PART + LOWER_PART - exact) <= 2.0**-47  # half a unit in the last place of the lower part
    assert np.float32(UPPER_PART) == UPPER_PART
    assert np.float32(LOWER_PART) == np.float32(exact - UPPER_PART) == LOWER_PART


def test_a_fused_multiply_add_changes_nothing():
    """In float64 both products and their sum are exact; only the end is rounded, as in a fused one."""
    u = EVERY.double()
    upper, lower = u * UPPER_PART, u * LOWER_PART
    assert torch.equal(upper.float().double(), upper), "a byte times the upper part is not exact"
    separate = upper.float() + lower.float()
    upper_fused = (upper + lower.float().double()).float()
    lower_fused = (upper + lower).float()
    for quotient in (separate, upper_fused, lower_fused):
        assert torch.equal(quotient - 1, served(EVERY))


def test_network_input_is_the_correctly_rounded_quotient():
    assert torch.equal(network_input(EVERY), served(EVERY))
    with CudaDivision():
        assert torch.equal(network_input(EVERY), served(EVERY))


def test_cuda_division_shows_the_old_definition():
    """By the rounded reciprocal 111 bytes come out otherwise: what the emulation is there to find."""
    assert torch.equal(old_definition(EVERY), served(EVERY))
    with CudaDivision():
        assert (old_definition(EVERY) != served(EVERY)).sum() == 111
        assert (EVERY.float() / 127.5 - 1 != served(EVERY)).sum() == 111


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_cuda_division_is_a_product_with_the_rounded_reciprocal(dtype):
    x, value = torch.arange(1, 200).to(dtype), 0.7
    computed = {torch.float32: np.float32, torch.float64: np.float64}.get(dtype, np.float32)
    reciprocal = computed(1) / computed(value)
    rounded_to = dtype if dtype.is_floating_point else torch.float32
    expected = torch.from_numpy(x.to(torch.float64).numpy().astype(computed) * reciprocal).to(rounded_to)
    with CudaDivision():
        quotient = x / value
    assert quotient.dtype == rounded_to
    assert torch.equal(quotient, expected)
    assert torch.equal(quotient, by_reciprocal(x, value))


def test_cuda_division_leaves_other_divisions_alone():
    x = EVERY.float()
    expected = (x / torch.tensor(127.5), torch.div(x, 127.5, rounding_mode="floor"), 127.5 / x)
    with CudaDivision():
        found = (x / torch.tensor(127.5), torch.div(x, 127.5, rounding_mode="floor"), 127.5 / x)
        written = torch.empty_like(x)
        torch.div(x, 127.5, out=written)
        in_place = x.clone()
        in_place /= 127.5
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)
    assert torch.equal(written, by_reciprocal(x, 127.5))
    assert torch.equal(in_place, by_reciprocal(x, 127.5))


def test_rows_of_a_store():
    store, index = ImageStore(EVERY), torch.tensor([3, 0, 1, 2])
    with CudaDivision():
        found = store.rows(index), store.lazy(index).gather(), Rows(EVERY, index).gather()
    for rows in found:
        assert torch.equal(rows, served(EVERY)[index])


def from_bytes(op):
    """`op` on all bytes, with coefficients and noise that make `x_t` the image itself."""
    table = torch.ones(4, 5).double()
    noise = torch.zeros(4, 1, 8, 8)
    if op == "noising":
        return noising(EVERY, None, table, noise, None, 0, True, torch.float32, False)
    if op == "mixture":
        chosen = torch.ones(4, dtype=torch.bool)
        stores = EVERY, None, EVERY, None
        return mixture(*stores, table, chosen, 0.5, None, noise, None, 0, torch.float32, False)
    neighbors, sqdist = EVERY.unsqueeze(1), torch.zeros(4, 1).double()
    return redirect(EVERY, None, neighbors, None, table, sqdist, noise, None, 0, torch.float32, False)


@pytest.mark.parametrize("op", ["noising", "mixture", "redirect"])
def test_plain_torch_of_the_ops(op, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "eager")
    expected = from_bytes(op)
    assert torch.equal(expected[0], served(EVERY))
    with CudaDivision():
        found = from_bytes(op)
    for one, two in zip(found, expected, strict=True):
        assert torch.equal(one, two)


def test_cuda_division_looks_into_the_ops(monkeypatch):
    """Else the test above could not fail."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "eager")
    monkeypatch.setattr("fastunlearn.ops._library.network_input", old_definition)
    with CudaDivision():
        x_t, *_ = from_bytes("noising")
    assert (x_t != served(EVERY)).sum() == 111


def test_inductor_gives_the_same_bits():
    compiled = torch.compile(network_input, fullgraph=True)
    assert torch.equal(compiled(EVERY), served(EVERY))
