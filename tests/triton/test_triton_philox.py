"""The shared device functions: Philox words bit for bit, normals against float64, bytes bit for bit."""

import math

import pytest
import torch
import triton
import triton.language as tl

from fastunlearn.host import philox
from fastunlearn.kernels.images import channels_last_offset, to_float
from fastunlearn.kernels.philox import normals, philox_words
from fastunlearn.testing.budgets import assert_within_budget
from fastunlearn.testing.factories import served

QUADS = 256


@triton.jit
def words_kernel(counter, purpose, words, QUADS: tl.constexpr):
    quads = tl.arange(0, QUADS)
    w0, w1, w2, w3 = philox_words(counter, tl.program_id(0), purpose, quads)
    place = words + (tl.program_id(0) * QUADS + quads) * 4
    tl.store(place, w0.to(tl.int64))
    tl.store(place + 1, w1.to(tl.int64))
    tl.store(place + 2, w2.to(tl.int64))
    tl.store(place + 3, w3.to(tl.int64))


@triton.jit
def normals_kernel(counter, purpose, numbers, QUADS: tl.constexpr):
    numbers += tl.program_id(0) * QUADS * 4
    tl.store(
        numbers + tl.arange(0, QUADS * 4), normals(counter, tl.program_id(0), purpose, tl.arange(0, QUADS))
    )


@triton.jit
def to_float_kernel(values, result, COUNT: tl.constexpr):
    tl.store(result + tl.arange(0, COUNT), to_float(tl.load(values + tl.arange(0, COUNT))))


@triton.jit
def channels_last_kernel(result, plane, D, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    tl.store(result + element, channels_last_offset(element, plane, D), mask=element < D)


@pytest.mark.parametrize("purpose", [0, 1, 6])
@pytest.mark.parametrize(
    "counter",
    [
        (0, 0, 0),
        (1, 1, 1),
        (-7, 2**32 + 5, 2**33 + 3),
        (2**63 - 1, 10**6, 2**31 - 1),
        (0x123456789ABCDEF, 3, 128),
    ],
)
def test_words_are_those_of_torch(counter, purpose, device):
    counter = torch.tensor(counter, device=device)
    words = torch.full((2, QUADS, 4), -1, dtype=torch.int64, device=device)
    words_kernel[(2,)](counter, purpose, words, QUADS=QUADS)
    assert torch.equal(words, philox.words((2, 4 * QUADS), counter, purpose))


def test_normals_err_no_more_than_torch(noise, output):
    expected, numbers = noise((8, 16 * QUADS), None, 5), output(8, 16 * QUADS)
    normals_kernel[(8,)](expected.counter, 5, numbers, QUADS=4 * QUADS)
    assert_within_budget("normals", numbers, expected.plain, expected.truth)


def test_every_byte_is_served_as_torch_serves_it(device, output):
    values, result = torch.arange(256, device=device).to(torch.uint8), output(256)
    to_float_kernel[(1,)](values, result, COUNT=256)
    assert torch.equal(result.cpu(), served(values))


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (4, 1, 2), (1, 9, 9)])
def test_channels_last_offset(shape, device):
    elements = math.prod(shape)
    offsets = torch.full((elements,), -1, device=device)
    channels_last_kernel[(1,)](offsets, shape[1] * shape[2], elements, BLOCK=128)
    expected = (
        torch.arange(elements, device=device).view(shape[1], shape[2], shape[0]).permute(2, 0, 1).flatten()
    )
    assert torch.equal(offsets, expected)
