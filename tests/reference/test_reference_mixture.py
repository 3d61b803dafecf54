"""The literal SISS weights: their identities in float64, and what the objective is in expectation."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn.reference import denoising_loss, mixture
from fastunlearn.reference.mixture import mixture_weights
from fastunlearn.testing.factories import linear_schedule, mixture_inputs


@settings(max_examples=50, deadline=None, derandomize=True)
@given(gap=st.floats(-600, 600), base=st.floats(0, 1000), lambd=st.floats(0.01, 0.99))
def test_weights_are_two_halves_of_one_sigmoid(gap, base, lambd):
    """`w_x = sigmoid(-(u+L)) / (1-lambd)`, `w_a = sigmoid(u+L) / lambd`, hence `(1-lambd) w_x
    + lambd w_a = 1`, and no weight is above 1 over its share.
    """
    dist_a = torch.tensor([base], dtype=torch.float64)
    w_x, w_a = mixture_weights(dist_a + gap, dist_a, lambd)
    argument = (dist_a + gap) - dist_a + math.log(lambd / (1 - lambd))
    torch.testing.assert_close(w_x, torch.sigmoid(-argument) / (1 - lambd), rtol=1e-12, atol=1e-250)
    torch.testing.assert_close(w_a, torch.sigmoid(argument) / lambd, rtol=1e-12, atol=1e-250)
    assert ((1 - lambd) * w_x + lambd * w_a).item() == pytest.approx(1, abs=1e-12)
    assert 0 <= w_x.item() <= (1 + 1e-12) / (1 - lambd)
    assert 0 <= w_a.item() <= (1 + 1e-12) / lambd


def test_printed_weights_are_nan_at_lambda_zero_and_one_for_a_large_gap():
    """The defect of the printed form that `functional.mixture` does not share: `0 * exp(large)`."""
    far, near = torch.tensor([2000.0], dtype=torch.float64), torch.tensor([0.0], dtype=torch.float64)
    assert mixture_weights(far, near, 0.0)[0].isnan()
    assert mixture_weights(near, far, 1.0)[1].isnan()


def test_time_log_ratio_is_the_ratio_of_two_timestep_densities():
    """Weights of the joint densities `q(m|x) p_r(t)` and `q(m|a) p_f(t)`, written out."""
    inputs = mixture_inputs(distance=0.02, timesteps=600, dtype=torch.float64)
    schedule, lambd, density_retain, density_forget = linear_schedule(), 0.3, 1 / 1000, 1 / 200
    plain = mixture(*inputs[:4], schedule, lambd, inputs.from_forget)
    ratio = torch.full((4,), math.log(density_forget / density_retain), dtype=torch.float64)
    draw = mixture(*inputs[:4], schedule, lambd, inputs.from_forget, time_log_ratio=ratio)
    likelihood_ratio = plain.forget_weight / plain.retain_weight  # q(m|a) / q(m|x)
    both = (1 - lambd) * density_retain + lambd * density_forget * likelihood_ratio
    torch.testing.assert_close(draw.retain_weight, density_retain / both, rtol=1e-12, atol=0)
    torch.testing.assert_close(
        draw.forget_weight, density_forget * likelihood_ratio / both, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("lambd", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("gap", [0.0, 700.0, -1e300, math.inf])
def test_an_infinite_time_log_ratio_decides_alone(gap, lambd):
    zero = torch.zeros(2, dtype=torch.float64)
    ratio = torch.tensor([math.inf, -math.inf], dtype=torch.float64)
    w_x, w_a = mixture_weights(zero + gap, zero, lambd, time_log_ratio=ratio)
    of_retain, of_forget = (1 / share if share else math.inf for share in (1 - lambd, lambd))
    assert w_x.tolist() == [0.0, of_retain]
    assert w_a.tolist() == [of_forget, 0.0]


@pytest.mark.parametrize("lambd", [0.2, 0.5, 0.8])
def test_siss_is_naive_deletion_in_expectation(lambd):
    """Eq. 6 on a data set of two points, one of them forgotten (n = 2, k = 1): the same value as the
    denoising loss of the point that stays.
    """
    draws, kept, forgotten, t = 200_000, 0.6, -0.3, 250
    generator = torch.Generator().manual_seed(int(10 * lambd))

    def scalars(value: float | Tensor) -> Tensor:
        return (
            value if isinstance(value, Tensor) else torch.full((draws,), value, dtype=torch.float64)
        ).view(draws, 1, 1, 1)

    def network(x_t: Tensor) -> Tensor:
        return torch.sin(3 * x_t) + 0.5

    # x ~ p_X, which holds both points
    retain = scalars(torch.where(torch.rand(draws, generator=generator) < 0.5, kept, forgotten).double())
    noise = scalars(torch.randn(draws, generator=generator, dtype=torch.float64))
    from_forget = torch.rand(draws, generator=generator) <= lambd
    timesteps, schedule = torch.full((draws,), t), linear_schedule()
    draw = mixture(retain, scalars(forgotten), noise, timesteps, schedule, lambd, from_forget)
    output = network(draw.x_t)
    terms = 2 * denoising_loss(output, draw.retain_target, draw.retain_weight) - denoising_loss(
        output, draw.forget_target, draw.forget_weight
    )

    naive = mixture(
        scalars(kept), scalars(kept), noise, timesteps, schedule, 0.0, torch.zeros(draws, dtype=torch.bool)
    )
    truth = denoising_loss(network(naive.x_t), noise)
    error = (terms.var() / draws + truth.var() / draws).sqrt()
    assert error < 0.03 * truth.mean()  # sharp enough to fail
    assert abs(terms.mean() - truth.mean()) < 4 * error
