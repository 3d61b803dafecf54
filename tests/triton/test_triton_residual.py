"""residual in Triton: loss and gradient against float64, dtypes, memory layouts, rows that lie apart."""

import pytest
import torch

from fastunlearn import reference
from fastunlearn.kernels.residual import residual
from fastunlearn.testing.budgets import assert_within_budget, in_several_orders

F16, BF16, F32 = torch.float16, torch.bfloat16, torch.float32
SHAPES = {
    "one element": (1, 1, 1),
    "mnist": (1, 28, 28),
    "odd": (3, 5, 7),
    "cifar": (3, 32, 32),
    "just more than one program": (1, 17, 241),
    "large and odd": (3, 83, 83),
}


def draw(shape, dtype, device, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def apart(tensor):
    """The same values as a view whose rows lie farther apart: the first half of the channels of a model with
    twice as many.
    """
    return torch.cat([tensor, torch.full_like(tensor, torch.nan)], dim=1)[:, : tensor.shape[1]]


def check(prediction, target, weight, loss, gradient):
    residual(prediction, target, weight, loss, gradient)
    exact, plain = prediction.double() - target.double(), prediction.float() - target.float()
    truth = reference.denoising_loss(prediction.double(), target.double(), weight.double())
    # A loss is one sum, which plain torch may hit by luck: hence in several orders.
    (losses,) = in_several_orders(
        lambda *images: (reference.denoising_loss(*images, weight.float()),),
        (prediction.float(), target.float()),
    )
    assert_within_budget("loss", loss, losses, truth)
    scale, exact_scale = (2 * weight.to(dtype).view(-1, 1, 1, 1) for dtype in (F32, torch.float64))
    assert_within_budget("gradient", gradient, (scale * plain).to(prediction.dtype), exact_scale * exact)


@pytest.mark.parametrize("weight_dtype", [F32, torch.float64])
@pytest.mark.parametrize(
    ("prediction_dtype", "target_dtype"), [(F32, F32), (BF16, F32), (F16, F32), (BF16, BF16), (F32, BF16)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_values(shape, prediction_dtype, target_dtype, weight_dtype, device, output):
    shape = (2, *SHAPES[shape])
    prediction, target = draw(shape, prediction_dtype, device, 0), draw(shape, target_dtype, device, 1)
    weight = torch.tensor([0.7, 3e-3], dtype=weight_dtype, device=device)
    check(prediction, target, weight, output(2), output(*shape, dtype=prediction_dtype))


@pytest.mark.parametrize("shape", ["odd", "just more than one program"])
@pytest.mark.parametrize(
    "layout", ["prediction apart", "target apart", "channels last", "channels last and apart"]
)
def test_layouts(layout, shape, device, output):
    shape = (3, *SHAPES[shape])
    prediction, target = draw(shape, BF16, device, 0), draw(shape, F32, device, 1)
    gradient = output(*shape, dtype=BF16, channels_last="channels last" in layout)
    if "channels last" in layout:
        prediction, target = (
            tensor.contiguous(memory_format=torch.channels_last) for tensor in (prediction, target)
        )
        if "apart" in layout:
            prediction = torch.stack([prediction.permute(0, 2, 3, 1)] * 2, dim=1)[:, 0].permute(0, 3, 1, 2)
    elif layout == "prediction apart":
        prediction = apart(prediction)
    else:
        target = apart(target)
    check(prediction, target, torch.tensor([1.0, -2.0, 0.0], device=device), output(3), gradient)


def test_one_sample(device, output):
    check(
        draw((1, 3, 8, 8), F32, device, 0),
        draw((1, 3, 8, 8), F32, device, 1),
        torch.ones(1, device=device),
        output(1),
        output(1, 3, 8, 8),
    )


def test_same_bits_every_time(device):
    prediction, target = draw((2, 3, 83, 83), F32, device, 0), draw((2, 3, 83, 83), F32, device, 1)
    weight, losses = torch.ones(2, device=device), []
    for _ in range(2):
        loss, gradient = torch.full((2,), torch.nan, device=device), torch.full_like(prediction, torch.nan)
        residual(prediction, target, weight, loss, gradient)
        losses.append(loss)
    assert torch.equal(*losses)


@pytest.mark.parametrize("name", ["prediction", "target"])
def test_float64_is_refused(name, device):
    prediction, target = (
        torch.zeros(1, 1, 2, 2, device=device, dtype=torch.float64 if key == name else F32)
        for key in ("prediction", "target")
    )
    with pytest.raises(
        TypeError,
        match=f"residual: {name}: expected float16, bfloat16, float32 or uint8 on a GPU, got torch.float64",
    ):
        residual(
            prediction,
            target,
            torch.ones(1, device=device),
            torch.empty(1, device=device),
            torch.empty_like(prediction),
        )
