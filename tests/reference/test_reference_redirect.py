"""The literal ReTrack formula: its identities, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn import ImageStore, nearest_neighbors
from fastunlearn.objective.schedule import PREDICTION_TYPES
from fastunlearn.reference import noising, redirect
from fastunlearn.reference.redirect import expected_loss, log_kernel, neighbor_noise, neighbor_targets
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


def expected_kernel(forget, images, t, schedule):
    """Proposition 2 in closed form: `E exp(-||v||^2 / 2)` for each of `images` `[K, ...]`, `[K]`, over
    `x_t = alpha a + sigma eps`.

    The product of two Gaussians in x_t of variance sigma^2, integrated: a Gaussian in `alpha ||x - a||` of
    variance `2 sigma^2`. The constants of both densities leave `2^(-D / 2)`, in D elements.
    """
    alpha, sigma = schedule.alpha[t], schedule.sigma[t]
    sqdist = (images - forget).square().flatten(1).sum(1)
    return 2 ** (-forget.numel() / 2) * (-(alpha**2) * sqdist / (2 * 2 * sigma**2)).exp()


def kernels(forget, images, noise, t, schedule):
    """`exp(-||v_j||^2 / 2)`, `[N, K]`: how likely `images` `[K, ...]` make x_t, for N draws of it."""
    timesteps = torch.full((len(noise),), t)
    x_t = noising(forget.expand_as(noise), noise, timesteps, schedule)
    shared = images.unsqueeze(0).expand(len(noise), *images.shape)
    return log_kernel(neighbor_noise(x_t, shared, timesteps, schedule)).exp()


def images_at(distances, shape, seed):
    """A forget image, and images at these distances from it, in random directions; float64."""
    generator = torch.Generator().manual_seed(seed)
    forget = torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5
    steps = torch.randn(len(distances), *shape, generator=generator, dtype=torch.float64)
    norms = steps.flatten(1).norm(dim=1).view(-1, *[1] * len(shape))
    return forget, forget + steps / norms * distances.view_as(norms)


# Both kinds of schedule, where `rho = alpha / sigma` is 2.2, 0.3, 3 and 0.3.
LEVELS = [("epsilon", 130), ("epsilon", 500), ("flow", 250), ("flow", 750)]


@pytest.mark.parametrize(("kind", "t"), LEVELS)
def test_the_expected_likelihood_is_gaussian_in_the_distance(kind, t):
    """Proposition 2 of ReTrack, by Gauss-Hermite quadrature over the noise.

    The integrand is smooth: up to the largest `rho ||x - a||` here, 4, 40 nodes an axis leave nothing but
    roundings.
    """
    schedule = linear_schedule(prediction_type=kind)
    rho = schedule.alpha[t] / schedule.sigma[t]
    forget, images = images_at(torch.linspace(0, 4, 9, dtype=torch.float64) / rho, (2, 1, 1), seed=t)

    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(40))
    noise = torch.cartesian_prod(nodes, nodes).view(-1, 2, 1, 1)
    weight = torch.cartesian_prod(weights, weights).prod(1) / (2 * math.pi)
    mean = weight @ kernels(forget, images, noise, t, schedule)

    torch.testing.assert_close(mean, expected_kernel(forget, images, t, schedule), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("kind", "t"), LEVELS)
def test_the_k_likeliest_images_are_the_k_nearest(kind, t):
    """The consequence of Proposition 2 that ReTrack truncates by, on images of 16 elements by Monte Carlo.

    Means are compared with the closed form in their own standard errors, and means of two images with each
    other in that of their difference over the same noise.
    """
    schedule = linear_schedule(prediction_type=kind)
    rho = schedule.alpha[t] / schedule.sigma[t]
    order = torch.tensor([5, 2, 7, 0, 3, 6, 1, 4])
    distances = (torch.arange(8, dtype=torch.float64) + 1) / 4 / rho
    forget, images = images_at(distances[order], (1, 4, 4), seed=t)

    generator = torch.Generator().manual_seed(t)
    noise = torch.randn(50_000, 1, 4, 4, generator=generator, dtype=torch.float64)
    likelihood = kernels(forget, images, noise, t, schedule)
    mean, expected = likelihood.mean(0), expected_kernel(forget, images, t, schedule)

    # Standard errors have to be small enough to tell a variance of 2 sigma^2 from one of sigma^2.
    error = likelihood.std(0) / len(noise) ** 0.5
    assert (error < 0.05 * expected).all()
    assert ((mean - expected).abs() < 5 * error).all()

    nearer, farther = likelihood[:, order.argsort()[:-1]], likelihood[:, order.argsort()[1:]]
    lead = nearer - farther
    assert (lead.mean(0) > 5 * lead.std(0) / len(noise) ** 0.5).all()
    stores = ImageStore(forget[None], latents=True), ImageStore(images, latents=True)
    nearest, _ = nearest_neighbors(*stores, k=3)
    assert torch.equal(mean.topk(3).indices, nearest[0])


def test_of_one_noisy_image_another_may_be_likeliest():
    """Proposition 2 is about the mean over the noise: a draw that points away from the nearest image, toward
    a farther one, has the farther one on top.
    """
    schedule, t = linear_schedule(), 300
    forget, images = images_at(torch.tensor([0.2, 0.4], dtype=torch.float64), (1, 4, 4), seed=0)
    toward = (images[1] - images[0]).unsqueeze(0)
    likelihood = kernels(forget, images, 2 * toward / toward.norm(), t, schedule)[0]
    assert likelihood[1] > likelihood[0]
    expected = expected_kernel(forget, images, t, schedule)
    assert expected[0] > expected[1]
