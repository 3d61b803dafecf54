"""The literal ReTrack formula: its identities, in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn.objective.schedule import PREDICTION_TYPES
from fastunlearn.reference import noising, redirect
from fastunlearn.reference.redirect import expected_loss, neighbor_targets
from fastunlearn.testing.factories import linear_schedule, redirect_inputs

few = settings(max_examples=25, deadline=None, derandomize=True)


@few
@given(
    k=st.sampled_from([1, 2, 10, 40]),
    t=st.integers(1, 998),
    seed=st.integers(0, 1000),
    kind=st.sampled_from(PREDICTION_TYPES),
)
def test_k_targets_become_one(k, t, seed, kind):
    """`sum_j p_j ||e - target_j||^2 = ||e - target||^2 + spread`."""
    schedule = linear_schedule(prediction_type=kind)
    inputs = redirect_inputs(batch=2, num_neighbors=k, timesteps=t, dtype=torch.float64, seed=seed)
    draw = redirect(*inputs, schedule)
    prediction = torch.randn(
        draw.target.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    direct = expected_loss(
        prediction, neighbor_targets(draw.x_t, inputs.neighbors, inputs.timesteps, schedule), draw.weights
    )
    torch.testing.assert_close(
        (prediction - draw.target).square().flatten(1).sum(1) + draw.spread, direct, rtol=1e-12, atol=0
    )


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_targets_agree_with_the_coefficients_of_the_schedule(kind):
    """`a eps + b x_0 + c (x_0 - x)`, the form the ops use, is the literal target of each prediction type."""
    schedule = linear_schedule(prediction_type=kind)
    inputs = redirect_inputs(timesteps=torch.tensor([3, 400, 990]), dtype=torch.float64)
    x_t = noising(inputs.forget, inputs.noise, inputs.timesteps, schedule)
    a, b, c = (
        column.view(-1, 1, 1, 1, 1) for column in schedule.coefficients(inputs.timesteps)[:, 2:].unbind(1)
    )
    forget, noise = inputs.forget.unsqueeze(1), inputs.noise.unsqueeze(1)
    torch.testing.assert_close(
        neighbor_targets(x_t, inputs.neighbors, inputs.timesteps, schedule),
        a * noise + b * forget + c * (forget - inputs.neighbors),
        rtol=1e-10,
        atol=1e-10,
    )


def test_one_neighbor_has_weight_one_and_no_spread():
    inputs = redirect_inputs(num_neighbors=1, dtype=torch.float64)
    draw = redirect(*inputs, linear_schedule())
    assert torch.equal(draw.weights, torch.ones(3, 1, dtype=torch.float64))
    assert torch.equal(draw.spread, torch.zeros(3, dtype=torch.float64))


def test_neighbors_equal_to_the_forget_image_give_back_the_noise():
    inputs = redirect_inputs(num_neighbors=3, dtype=torch.float64)
    draw = redirect(
        inputs.forget, inputs.forget.unsqueeze(1).repeat(1, 3, 1, 1, 1), *inputs[2:], linear_schedule()
    )
    torch.testing.assert_close(draw.target, inputs.noise, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(draw.weights, torch.full((3, 3), 1 / 3, dtype=torch.float64))


def test_target_is_the_posterior_mean_of_the_noise():
    """With the whole retain set as neighbours the target is `E[eps | x_t]` under the retain set,
    here from densities in one dimension.
    """
    schedule, t = linear_schedule(), torch.tensor([300])
    alpha, sigma = schedule.coefficients(t)[0, :2]
    retain = torch.tensor([-0.9, -0.2, 0.1, 0.8], dtype=torch.float64)
    x_t = torch.tensor(0.37, dtype=torch.float64)
    density = torch.distributions.Normal(alpha * retain, sigma).log_prob(x_t).exp()
    expected = (density / density.sum() * (x_t - alpha * retain) / sigma).sum()
    shape = (1, 1, 1, 1)
    draw = redirect(
        torch.zeros(shape), retain.view(1, 4, 1, 1, 1), torch.zeros(shape), t, schedule, x_t=x_t.view(shape)
    )
    torch.testing.assert_close(draw.target.squeeze(), expected, rtol=1e-12, atol=0)
