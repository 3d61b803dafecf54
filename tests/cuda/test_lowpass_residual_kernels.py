"""The GPU kernels of lowpass_residual against float64: shapes, masks, dtypes, memory layouts, order of
threads.
"""

from __future__ import annotations

import emulated
import pytest
import torch

from fastunlearn.ops import lowpass_residual as op
from fastunlearn.reference.lowpass_residual import lowpass_residual as by_fourier_transforms
from fastunlearn.testing.budgets import assert_within_budget, in_several_orders, shifts


def disc(height: int, width: int, radius: float, hole: float = 0.0) -> torch.Tensor:
    """Frequencies between two fractions of Nyquist, in the smallest table that holds them."""
    u, v = (torch.arange(int(radius * (size // 2)) + 1) for size in (height, width))
    square = (2 * u / height)[:, None] ** 2 + (2 * v / width)[None] ** 2
    return ((square <= radius**2 + 1e-6) & (square >= hole**2)).float()


def box(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(rows, columns)


def images(
    batch: int, channels: int, height: int, width: int, dtype=torch.float32, seed: int = 0
) -> torch.Tensor:
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)).to(
        dtype
    )


def arguments(
    shape, band, inside=1.0, outside=0.0, dtype=torch.float32, target_dtype=None, weight_dtype=torch.float32
) -> tuple:
    weight = torch.rand(shape[0], generator=torch.Generator().manual_seed(7)).to(weight_dtype) + 0.5
    return (
        images(*shape, dtype, seed=1),
        images(*shape, target_dtype or dtype, seed=2),
        weight,
        band,
        inside,
        outside,
    )


def check(actual, prediction, target, weight, band, inside, outside) -> None:
    """Both outputs err at most twice the larger error of two plain formulas in float32: Fourier transforms,
    and the closed form in eager torch.

    The energy of a single sample is one number, which either formula may hit by luck: hence several shifts of
    the image.
    """
    numbers, orders = (weight, band, inside, outside), shifts(prediction.shape[1:])
    truths = by_fourier_transforms(prediction.double(), target.double(), weight.double(), *numbers[1:])
    fourier = in_several_orders(
        lambda *images: by_fourier_transforms(*images, weight.float(), *numbers[1:]),
        (prediction.float(), target.float()),
        orders,
    )
    closed = in_several_orders(lambda *images: op._eager(*images, *numbers), (prediction, target), orders)
    for name, value, truth, *plain in zip(
        ("energy", "gradient"), actual, truths, fourier, closed, strict=True
    ):
        assert value.dtype == (prediction.dtype if name == "gradient" else torch.float32)
        assert_within_budget(
            name, value, [result.to(value.dtype) for results in plain for result in results], truth
        )


SHAPES = [
    pytest.param((3, 1, 28, 28), disc(28, 28, 0.5), id="28x28 in one block"),
    pytest.param((2, 3, 32, 32), disc(32, 32, 0.25), id="32x32, a block a plane"),
    pytest.param((64, 3, 8, 8), disc(8, 8, 0.75), id="8x8, a block a sample"),
    pytest.param((2, 2, 9, 13), disc(9, 13, 1.0), id="odd sizes, every frequency of the disc"),
    pytest.param((2, 1, 8, 21), box(5, 11), id="all frequencies: the projection is the identity"),
    pytest.param((2, 1, 31, 10), box(1, 1), id="the mean alone"),
    pytest.param((2, 4, 64, 64), disc(64, 64, 0.5), id="64x64"),
    pytest.param((1, 2, 256, 256), disc(256, 256, 0.25), id="256x256, narrow band"),
    pytest.param((1, 1, 256, 256), disc(256, 256, 0.5, hole=0.2), id="256x256, annulus to half of Nyquist"),
    pytest.param((1, 1, 256, 256), box(129, 129), id="256x256, all frequencies"),
    pytest.param((2, 1, 300, 200), disc(300, 200, 0.3), id="300x200"),
    pytest.param((1, 2, 129, 130), disc(129, 130, 0.9), id="129x130"),
    pytest.param((1, 1, 70, 282), box(9, 142), id="more frequencies than a block takes"),
    pytest.param((1, 1, 65, 257), disc(65, 257, 0.4), id="one row and one column too many"),
]


@pytest.mark.parametrize(("shape", "band"), SHAPES)
@pytest.mark.parametrize(
    ("inside", "outside"), [(1.0, 0.0), (0.3, 1.0)], ids=["low or mid pass", "high pass"]
)
def test_matches_float64(kernel, shape, band, inside, outside):
    args = arguments(shape, band, inside, outside)
    check(kernel(*args), *args)


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 17, 19), (1, 2, 96, 128), (1, 1, 131, 75)], ids=str)
@pytest.mark.parametrize("target_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(kernel, shape, dtype, target_dtype):
    args = arguments(shape, disc(*shape[2:], 0.4), 1.0, 0.25, dtype, target_dtype, torch.float64)
    check(kernel(*args), *args)


@pytest.mark.parametrize("shape", [(3, 2, 32, 32), (2, 1, 128, 128)], ids=str)
@pytest.mark.parametrize("gap", [4, 3])
def test_samples_apart_and_off_alignment(kernel, shape, gap):
    """The first half of the channels of a wider prediction, and rows that no longer start at a multiple of 16
    bytes.
    """
    batch, *rest = shape
    count = torch.tensor(rest).prod().item() + gap
    args = arguments(shape, disc(*shape[2:], 0.3), 1.0, 0.5)
    apart = torch.full((batch, count), float("nan"))
    apart[:, : count - gap] = args[0].flatten(1)
    view = apart[:, : count - gap].unflatten(1, rest)
    assert view.stride(0) == count
    check(kernel(view, *args[1:]), *args)


def test_samples_are_independent(kernel):
    """A sample that overflows leaves the others alone."""
    args = arguments((3, 2, 128, 96), disc(128, 96, 0.3), 1.0, 0.5)
    clean = kernel(*args)
    args[0][1] = float("inf")
    energy, gradient = kernel(*args)
    assert not energy[1].isfinite()
    for keep in (0, 2):
        assert torch.equal(energy[keep], clean[0][keep])
        assert torch.equal(gradient[keep], clean[1][keep])


def test_no_samples(kernel):
    energy, gradient = kernel(*arguments((0, 3, 32, 32), box(4, 4)))
    assert energy.shape == (0,)
    assert gradient.shape == (0, 3, 32, 32)


@pytest.mark.parametrize(
    ("shape", "band"),
    [
        ((2, 3, 20, 24), disc(20, 24, 0.5)),
        ((1, 1, 130, 100), disc(130, 100, 0.8)),
        ((1, 1, 68, 276), box(5, 139)),
    ],
    ids=["one block", "streamed", "streamed in two panels"],
)
@pytest.mark.parametrize("outside", [0.0, 0.5])
def test_no_missing_barrier(emulator, shape, band, outside):
    """Threads may run in any order between barriers: same bits.

    Tensors may end, or begin, where memory does.
    """
    args = arguments(shape, band, 1.0, outside)
    expected = emulated.lowpass_residual(emulator, *args)
    for order, place in (("backward", "start"), ("shuffled", "end")):
        actual = emulated.lowpass_residual(emulator, *args, order=order, place=place)
        assert torch.equal(actual[0], expected[0])
        assert torch.equal(actual[1], expected[1])
