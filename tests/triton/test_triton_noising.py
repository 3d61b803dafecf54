"""noising in Triton: values against float64, rows by index, layouts, Philox noise."""

import pytest
import torch

from fastunlearn import reference
from fastunlearn.kernels.noising import noising
from fastunlearn.testing.budgets import assert_within_budget
from fastunlearn.testing.factories import linear_schedule

U8, F16, BF16, F32 = torch.uint8, torch.float16, torch.bfloat16, torch.float32
PURPOSE = 5
CASES = {
    # shape of an image, dtypes of images, noise (None: Philox) and x_t, memory layout
    "one element": ((1, 1, 1), F32, F32, F32, False),
    "one element, Philox": ((1, 1, 1), U8, None, F32, False),
    "mnist": ((1, 28, 28), U8, F32, F32, False),
    "mnist, Philox, bfloat16": ((1, 28, 28), U8, None, BF16, False),
    "odd": ((3, 5, 7), BF16, F16, F16, False),
    "odd, Philox": ((3, 37, 37), F16, None, F32, False),
    "cifar, channels last": ((3, 32, 32), U8, F32, F32, True),
    "odd, Philox, channels last": ((5, 17, 19), F32, None, BF16, True),
    "one channel, channels last": ((1, 9, 9), F32, BF16, BF16, True),
    "large": ((3, 104, 104), U8, F32, F32, False),
    "large and odd, Philox": ((3, 83, 83), BF16, None, BF16, False),
    "large, channels last": ((3, 80, 80), U8, None, F32, True),
}


def launch(images, index, coefficients, noise, x_t, target, channels_last=False):
    with_target = target is not None
    target = x_t.new_empty(0, dtype=F32) if target is None else target
    noising(
        images,
        index,
        coefficients,
        noise.given,
        noise.counter,
        PURPOSE,
        with_target,
        x_t.dtype,
        channels_last,
        x_t,
        target,
    )


def formula(clean, eps, timesteps, schedule):
    """`x_t` and target, literally, in the dtype of `clean`."""
    return reference.noising(clean, eps, timesteps, schedule), reference.prediction_target(
        clean, eps, timesteps, schedule
    )


@pytest.mark.parametrize(
    ("case", "prediction_type"),
    [(case, "v_prediction") for case in CASES] + [("mnist", "epsilon"), ("odd", "sample"), ("odd", "flow")],
)
def test_values(case, prediction_type, device, output, rows, noise):
    shape, images_dtype, noise_dtype, dtype, channels_last = CASES[case]
    schedule = linear_schedule(prediction_type=prediction_type)
    timesteps = torch.tensor([len(schedule) - 1, 10, 0], device=device)
    images, clean = rows(5, shape, images_dtype)
    index = torch.tensor([4, 0, 4], device=device)
    eps = noise((3, *shape), noise_dtype, PURPOSE)
    x_t, target = (
        output(3, *shape, dtype=dtype, channels_last=channels_last),
        output(3, *shape, channels_last=channels_last),
    )
    launch(images, index, schedule.coefficients(timesteps), eps, x_t, target, channels_last)

    true_x_t, true_target = formula(clean[index], eps.truth, timesteps, schedule)
    plain_x_t, plain_target = formula(clean[index].float(), eps.plain, timesteps, schedule)
    assert_within_budget("x_t", x_t, plain_x_t.to(dtype), true_x_t)
    assert_within_budget("target", target, plain_target, true_target)


@pytest.mark.parametrize("batch", [1, 4])
def test_without_index_and_target(batch, device, output, rows, noise):
    schedule, timesteps = linear_schedule(), torch.zeros(batch, dtype=torch.int64, device=device)
    images, clean = rows(batch, (3, 11, 13), U8)
    eps, x_t = noise((batch, 3, 11, 13), F32, PURPOSE), output(batch, 3, 11, 13)
    launch(images, None, schedule.coefficients(timesteps), eps, x_t, None)
    plain, truth = (
        reference.noising(*pair, timesteps, schedule)
        for pair in ((clean.float(), eps.plain), (clean, eps.truth))
    )
    assert_within_budget("x_t", x_t, plain, truth)


@pytest.mark.parametrize("name", ["images", "noise", "x_t"])
def test_float64_is_refused(name, device):
    tensors = {
        key: torch.zeros(1, 1, 2, 2, device=device, dtype=torch.float64 if key == name else F32)
        for key in ("images", "noise", "x_t")
    }
    coefficients = torch.zeros(1, 5, dtype=torch.float64, device=device)
    with pytest.raises(
        TypeError,
        match=f"noising: {name}: expected float16, bfloat16, float32 or uint8 on a GPU, got torch.float64",
    ):
        noising(
            tensors["images"],
            None,
            coefficients,
            tensors["noise"],
            None,
            PURPOSE,
            False,
            F32,
            False,
            tensors["x_t"],
            torch.empty(0),
        )
