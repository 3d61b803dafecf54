"""The likelihood ODE against Gaussians, whose likelihood is known, for every prediction type."""

from __future__ import annotations

import math

import pytest
import torch

from fastunlearn import NoiseSchedule
from fastunlearn.host.finite import NotFiniteError
from fastunlearn.metrics.nll import Likelihood, bits_per_dim
from fastunlearn.testing.factories import linear_schedule

CENTER, SPREAD = 0.2, 0.3


def schedule(prediction_type="epsilon") -> NoiseSchedule:
    return linear_schedule(prediction_type=prediction_type)


def marginal(t):
    """alpha and sigma of the VP SDE (0.1, 20) at ODE time t (Song et al. 2021, eq. 33)."""
    log_alpha = -0.25 * t**2 * 19.9 - 0.5 * t * 0.1
    return math.exp(log_alpha), math.sqrt(-math.expm1(2 * log_alpha))


def exact_model(prediction_type="epsilon", mix=None):
    """Predicts such that the score, as `bits_per_dim` derives it, is exactly that of data N(CENTER, SPREAD^2)
    (rotated by `mix`: N(CENTER, mix mix^T)).
    """

    def predict(x, position):
        alpha, sigma = marginal(position[0].item() / 999)
        below = int(position[0])
        weight = position[0].item() - below
        table_alpha, table_sigma = (
            torch.lerp(values[below], values[min(below + 1, 999)], weight)
            for values in (schedule().alpha, schedule().sigma)
        )
        flat = (x.double() - alpha * CENTER).flatten(1)
        covariance = SPREAD**2 * torch.eye(flat.shape[1], dtype=torch.float64) if mix is None else mix @ mix.T
        precision = torch.linalg.inv(
            alpha**2 * covariance + sigma**2 * torch.eye(flat.shape[1], dtype=torch.float64)
        )
        eps = table_sigma * (flat @ precision).view(x.shape)
        if prediction_type == "v_prediction":
            return ((eps - table_sigma * x) / table_alpha).float()
        if prediction_type == "sample":
            return ((x - table_sigma * eps) / table_alpha).float()
        return eps.float()

    return predict


def true_bits(images, covariance):
    normal = torch.distributions.MultivariateNormal(
        torch.full((images[0].numel(),), CENTER, dtype=torch.float64), covariance
    )
    return -normal.log_prob(images.double().flatten(1)) / (images[0].numel() * math.log(2)) + 7


@pytest.fixture
def images():
    return (CENTER + SPREAD * torch.randn(3, 1, 4, 4, generator=torch.Generator().manual_seed(0))).clamp(
        -1, 1
    )


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_gaussian_has_its_likelihood(images, prediction_type):
    """The Jacobian is diagonal, so one Rademacher probe is exact.

    What is left: float32 in the network, and the ODE's start at 1e-5.
    """
    result = bits_per_dim(exact_model(prediction_type), schedule(prediction_type), images, interpolate=True)
    expected = true_bits(images, SPREAD**2 * torch.eye(16, dtype=torch.float64))
    torch.testing.assert_close(
        torch.tensor(result.bits_per_dim, dtype=torch.float64), expected, rtol=0, atol=2e-3
    )
    assert result.mean == pytest.approx(expected.mean().item(), abs=2e-3)


@pytest.mark.parametrize("kind", ["one row", "a constant image"])
def test_the_least_of_images_has_its_likelihood(images, kind):
    few = images[:1] if kind == "one row" else torch.full_like(images[:1], 0.25)
    covariance = SPREAD**2 * torch.eye(16, dtype=torch.float64)
    found = bits_per_dim(exact_model(), schedule("epsilon"), few, interpolate=True)
    assert found.bits_per_dim == pytest.approx(true_bits(few, covariance).tolist(), abs=2e-3)


def test_no_image_has_none(images):
    with pytest.raises(ValueError, match="images: expected at least one image"):
        bits_per_dim(exact_model(), schedule("epsilon"), images[:0])


def test_the_papers_rounding_is_close_to_the_continuous_ode(images):
    """With `floor(999 t)` the schedule is a staircase; the likelihood moves by less than 0.01 bit."""
    result = bits_per_dim(exact_model(), schedule(), images[:1])
    expected = true_bits(images[:1], SPREAD**2 * torch.eye(16, dtype=torch.float64)).item()
    assert result.mean == pytest.approx(expected, abs=0.01)
    assert result.evaluations > 20


def test_the_probe_estimates_a_full_covariance_without_bias(images):
    mix = 0.3 * torch.eye(16, dtype=torch.float64) + 0.1 * torch.randn(
        16, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    model = exact_model(mix=mix)
    repeated = images[:1].expand(200, -1, -1, -1)
    estimates = torch.tensor(
        bits_per_dim(model, schedule(), repeated, interpolate=True, rtol=1e-4, atol=1e-4).bits_per_dim
    )
    assert len(set(estimates.tolist())) == 200
    error = estimates.std() / math.sqrt(200)
    assert abs(estimates.mean() - true_bits(images[:1], mix @ mix.T).item()) < 4 * error
    assert error < 0.1


def test_a_loose_tolerance_costs_less_and_stays_close(images):
    tight = bits_per_dim(exact_model(), schedule(), images, interpolate=True)
    loose = bits_per_dim(exact_model(), schedule(), images, interpolate=True, rtol=1e-3, atol=1e-3)
    assert loose.evaluations < tight.evaluations
    assert loose.mean == pytest.approx(tight.mean, abs=0.02)


def test_seeds_and_modes(images):
    model = torch.nn.Conv2d(1, 1, 3, padding=1)
    model.train()
    predictor = type("Net", (torch.nn.Module,), {"forward": lambda self, x, t: self.conv(x)})()
    predictor.conv = model
    arguments = {"rtol": 1e-2, "atol": 1e-2}
    first = bits_per_dim(predictor, schedule(), images, **arguments)
    again = bits_per_dim(predictor, schedule(), images, **arguments)
    # Not bit for bit: how a convolution sums depends on where in memory its input lies.
    assert first.bits_per_dim == pytest.approx(again.bits_per_dim, rel=1e-6)
    other = bits_per_dim(predictor, schedule(), images, seed=1, **arguments)
    assert first.bits_per_dim != pytest.approx(other.bits_per_dim, rel=1e-4)
    assert predictor.training
    assert model.weight.grad is None


def diffusers_schedule(**config) -> NoiseSchedule:
    diffusers = pytest.importorskip("diffusers")
    return NoiseSchedule.from_diffusers(diffusers.DDPMScheduler(**config))


SCHEDULES = {
    "linear": {},
    "scaled linear": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero terminal SNR": {"rescale_betas_zero_snr": True},
}


def exact_model_of(levels: NoiseSchedule):
    """The perfect network for data N(CENTER, SPREAD^2) at any fraction of a timestep, whose angle lies
    between those around it."""
    angles = torch.atan2(levels.sigma, levels.alpha)

    def predict(x, position):
        below = int(position[0])
        above = min(below + 1, len(levels) - 1)
        angle = torch.lerp(angles[below], angles[above], position[0].double() - below)
        alpha, sigma = angle.cos(), angle.sin()
        eps = sigma * (x.double() - alpha * CENTER) / (alpha**2 * SPREAD**2 + sigma**2)
        clean = CENTER + alpha * SPREAD**2 * (x.double() - alpha * CENTER) / (alpha**2 * SPREAD**2 + sigma**2)
        v = alpha * eps - sigma * clean
        return {"epsilon": eps, "v_prediction": v, "sample": clean}[levels.prediction_type].float()

    return predict


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_a_gaussian_has_its_likelihood_under_every_schedule(images, name, prediction_type):
    """The density is that of the image under the noise of the first timestep, sigma_0 / alpha_0."""
    levels = diffusers_schedule(prediction_type=prediction_type, **SCHEDULES[name])
    result = bits_per_dim(exact_model_of(levels), levels, images, ode="angle")
    first_noise = (levels.sigma[0] / levels.alpha[0]) ** 2
    expected = true_bits(images, (SPREAD**2 + first_noise) * torch.eye(16, dtype=torch.float64))
    # What is left is the last timestep, taken for pure noise: at most 0.0047 of the signal (scaled linear).
    found = torch.tensor(result.bits_per_dim, dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert result.ode == "angle"


def test_other_schedules_than_linear_take_the_angle(images):
    levels = diffusers_schedule(**SCHEDULES["cosine"])
    assert bits_per_dim(exact_model_of(levels), levels, images).ode == "angle"
    assert bits_per_dim(exact_model(), schedule(), images, rtol=1e-2, atol=1e-2).ode == "papers"
    message = r"schedule: expected linear betas .*, got noise levels off that form by"
    with pytest.raises(ValueError, match=message):
        bits_per_dim(exact_model_of(levels), levels, images, ode="papers")


def test_schedules_without_a_likelihood_are_refused(images):
    with pytest.raises(
        ValueError, match="schedule: expected a variance-preserving schedule, got flow matching"
    ):
        bits_per_dim(exact_model(), NoiseSchedule.flow(), images)
    short = diffusers_schedule(num_train_timesteps=20)
    with pytest.raises(ValueError, match=r"schedule: expected one that ends in noise .*, got 0\.817"):
        bits_per_dim(exact_model(), short, images)
    constant = NoiseSchedule.from_alphas_cumprod(torch.full((10,), 1e-3, dtype=torch.float64))
    message = "schedule: expected at least two noise levels, each above the one before"
    with pytest.raises(ValueError, match=message):
        bits_per_dim(exact_model(), constant, images)
    with pytest.raises(ValueError, match="rtol: expected a finite number"):
        bits_per_dim(exact_model(), schedule(), images, rtol=0)
    with pytest.raises(ValueError, match="ode: expected one of papers, angle, got 'euler'"):
        bits_per_dim(exact_model(), schedule(), images, ode="euler")


def test_nothing_that_is_not_finite_gets_a_likelihood(images):
    holed = images.clone()
    holed[1, 0, 2, 2] = math.nan
    message = r"images: expected finite values, got NaN or Inf in 1 of 3 \(first: 1\)"
    with pytest.raises(NotFiniteError, match=message):
        bits_per_dim(exact_model(), schedule(), holed)
    with pytest.raises(NotFiniteError, match="predictions: expected finite values, got NaN or Inf in 3 of 3"):
        bits_per_dim(lambda x, t: x * math.nan, schedule(), images)
    network = torch.nn.Conv2d(1, 1, 1)
    torch.nn.init.constant_(network.weight, math.inf)
    with pytest.raises(NotFiniteError, match="model: expected finite weights, got NaN or Inf in weight"):
        bits_per_dim(network, schedule(), images)
    with pytest.raises(NotFiniteError, match="likelihood: expected finite numbers, got mean = nan"):
        Likelihood((1.0,), math.nan, 7)


def test_a_prediction_of_another_shape_is_refused(images):
    expected = r"model: expected a prediction of shape \[3, 1, 4, 4\] or \[3, 2, 4, 4\], got .*\(3, 3, 4, 4\)"
    with pytest.raises(ValueError, match=expected):
        bits_per_dim(lambda x, t: x.expand(-1, 3, -1, -1), schedule(), images)


def test_the_first_of_a_tuple_is_the_prediction(images):
    """diffusers' return_dict=False."""
    model = exact_model()
    options = {"rtol": 1e-2, "atol": 1e-2}
    expected = bits_per_dim(model, schedule(), images, **options)
    found = bits_per_dim(lambda x, t: (model(x, t),), schedule(), images, **options)
    assert (found.evaluations, found.ode) == (expected.evaluations, expected.ode)
    # Two equal calls differ in the last bits: how a float64 sum is ordered depends on where its memory
    # begins.
    assert found.bits_per_dim == pytest.approx(expected.bits_per_dim, rel=1e-12)
    with pytest.raises(ValueError, match=r"model: expected a prediction of shape .*, got dict"):
        bits_per_dim(lambda x, t: {"sample": model(x, t)}, schedule(), images)
