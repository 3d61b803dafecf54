"""The papers' objectives: gradients by finite differences, and the two quirks of the public code that are
reproduced on purpose.
"""

from __future__ import annotations

import pytest
import torch

from fastunlearn.reference import noising, objectives
from fastunlearn.testing.factories import linear_schedule, mixture_inputs, redirect_inputs

SHAPE, SCHEDULE = (2, 3, 3), linear_schedule()


def _outputs(count: int, batch: int = 2) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [
        torch.randn(batch, *SHAPE, dtype=torch.float64, generator=generator).requires_grad_()
        for _ in range(count)
    ]


def _retrack(output_forget, output_retain):
    inputs = redirect_inputs(
        batch=2, num_neighbors=3, shape=SHAPE, timesteps=torch.tensor([40, 700]), dtype=torch.float64
    )
    x_t = noising(inputs.forget, inputs.noise, inputs.timesteps, SCHEDULE)
    return objectives.retrack_loss(
        output_forget, x_t, inputs.neighbors, inputs.timesteps, output_retain, inputs.noise, SCHEDULE, 0.3
    )


def _siss(output_retain, output_forget):
    inputs = mixture_inputs(batch=2, shape=SHAPE, dtype=torch.float64, timesteps=500)
    noisy = [
        noising(images, inputs.noise, inputs.timesteps, SCHEDULE) for images in (inputs.retain, inputs.forget)
    ]
    pair, t = (inputs.retain, inputs.forget), (inputs.timesteps, inputs.timesteps)
    return objectives.siss_two_forward_losses(
        (output_retain, output_forget), pair, tuple(noisy), t, torch.tensor([True, False]), SCHEDULE, 0.4
    )


NOISE = torch.randn(2, *SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
OBJECTIVES = {
    "vanilla": lambda a, b: objectives.vanilla_loss(a, NOISE),
    "neggrad": lambda a, b: objectives.neggrad_loss(a, NOISE, 0.25),
    "erasediff": lambda a, b: objectives.erasediff_losses(a, NOISE, b, NOISE.abs()),
    "retrack": _retrack,
    "siss": _siss,
    "no_is": lambda a, b: objectives.siss_no_is_losses(a, b, NOISE),
    "bernoulli": lambda a, b: objectives.siss_bernoulli_losses(a, NOISE, torch.tensor([False, True]), 0.3),
}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradcheck(name):
    assert torch.autograd.gradcheck(OBJECTIVES[name], _outputs(2))


def test_bernoulli_loses_the_forget_term_without_retain_rows():
    (output,) = _outputs(1)
    main, correction = objectives.siss_bernoulli_losses(output, NOISE, torch.tensor([True, True]), 0.5)
    assert main.item() == 0
    assert correction.item() == 0
    assert objectives.siss_bernoulli_losses(output, NOISE, torch.tensor([True, False]), 0.5)[1].item() > 0


def test_erasediff_divides_both_terms_by_the_forget_batch():
    (retain,), (forget,) = _outputs(1, batch=6), _outputs(1, batch=3)
    zeros = torch.zeros_like(retain)
    main, _ = objectives.erasediff_losses(retain, zeros, forget, zeros[:3])
    assert main.item() == pytest.approx(2 * objectives.vanilla_loss(retain, zeros).item(), rel=1e-12)
