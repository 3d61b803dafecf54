"""Noise schedules against formulas in float64: what is predicted, loss weights, indices, what is refused."""

import math
import re
from pathlib import Path

import pytest
import torch

from fastunlearn import NoiseSchedule, retrack_step
from fastunlearn.objective.schedule import LOSS_WEIGHTS, PREDICTION_TYPES
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

PAGE = Path(__file__).parents[2] / "docs/selection.md"
T = 1000
LINEAR = torch.linspace(1e-4, 0.02, T, dtype=torch.float64)
STABLE_DIFFUSION = torch.linspace(0.00085**0.5, 0.012**0.5, T, dtype=torch.float64).square()


def schedule_of(prediction_type, betas=LINEAR):
    """Flow matching for a network that predicts the flow, else variance preserving."""
    if prediction_type == "flow":
        return NoiseSchedule.flow(T)
    return NoiseSchedule.from_alphas_cumprod((1 - betas).cumprod(0), prediction_type=prediction_type)


def in_space_of(prediction_type, image, x_t, alpha, sigma):
    """What a network returns that takes `image` for the clean one behind `x_t`."""
    noise = (x_t - alpha * image) / sigma
    return {
        "epsilon": noise,
        "v_prediction": alpha * noise - sigma * image,
        "sample": image,
        "flow": noise - image,
    }[prediction_type]


def squared_errors(schedule):
    """Three of `[T]`, for one wrong image: in the network's own space, in epsilon's, and of the image."""
    image, noise, wrong = torch.randn(
        3, T, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    alpha, sigma = schedule.alpha[:, None], schedule.sigma[:, None]
    x_t = alpha * image + sigma * noise

    def error(space):
        right, found = (in_space_of(space, each, x_t, alpha, sigma) for each in (image, wrong))
        return (found - right).square().sum(dim=1)

    return error(schedule.prediction_type), error("epsilon"), error("sample")


# --- prediction types ---------------------------------------------------------------------------------------

FACTORS = {  # of the loss in the network's space over that in epsilon's
    "epsilon": lambda alpha, sigma: torch.ones_like(alpha),
    "v_prediction": lambda alpha, sigma: alpha**-2,
    "sample": lambda alpha, sigma: sigma**2 / alpha**2,
    "flow": lambda alpha, sigma: (1 - sigma) ** -2,
}


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_losses_of_two_prediction_types_differ_by_a_factor_of_the_timestep(prediction_type):
    schedule = schedule_of(prediction_type)
    own, of_epsilon, _ = squared_errors(schedule)
    seen = schedule.alpha > 0  # pure noise says nothing of the image in epsilon's space
    factor = FACTORS[prediction_type](schedule.alpha, schedule.sigma)
    torch.testing.assert_close((own / of_epsilon)[seen], factor[seen], rtol=1e-9, atol=0)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_c_squared_is_the_loss_over_the_squared_error_of_the_image(prediction_type):
    schedule = schedule_of(prediction_type)
    own, _, of_image = squared_errors(schedule)
    c = schedule.coefficients(torch.arange(T))[:, 4]
    torch.testing.assert_close(own / of_image, c.square(), rtol=1e-9, atol=0)


def logit_normal():
    """The probability of each index where diffusers' SD3 script draws `u = sigmoid(N(0, 1))`."""
    below = torch.special.ndtr(torch.special.logit(torch.arange(T + 1, dtype=torch.float64) / T))
    return below.diff().flip(0)  # that script counts from noise to image


def mean_squared_c(schedule, probabilities=None):
    square = schedule.coefficients(torch.arange(T))[:, 4].square()
    return float(square.mean() if probabilities is None else probabilities @ square)


def test_the_table_of_the_docs():
    """The mean of c^2 as it stands there, to the digits that stand there."""
    uniform = {
        name: [mean_squared_c(schedule_of(name, betas)) for betas in (LINEAR, STABLE_DIFFUSION)]
        for name in ("epsilon", "v_prediction", "sample")
    }
    flows = NoiseSchedule.flow(T), NoiseSchedule.flow(T, shift=3.0)
    rows = {
        "`epsilon`": "{:.1f} (linear DDPM), {:.1f} (Stable Diffusion)".format(*uniform["epsilon"]),
        "`v_prediction`": "{:.1f} (linear DDPM), {:.1f} (Stable Diffusion)".format(*uniform["v_prediction"]),
        "`sample`": "{:.0f}".format(*uniform["sample"]),
        "`flow`": "{:.0f}; {:.0f} (shift 3)".format(*map(mean_squared_c, flows)),
        "`flow`, logit-normal t": "{:.1f}; {:.1f} (shift 3)".format(
            *(mean_squared_c(flow, logit_normal()) for flow in flows)
        ),
    }
    lines = re.findall(r"^\| ([^|]+) \| .* \| ([^|]+) \|$", PAGE.read_text(), re.MULTILINE)
    assert {name: mean for name, mean in lines if name in rows} == rows


def test_the_docs_say_how_much_of_flow_matching_s_mean_comes_from_ten_indices():
    square = NoiseSchedule.flow(T).coefficients(torch.arange(T))[:, 4].square()
    share = float(square[:10].sum() / square.sum())
    assert f"{share:.0%}".replace("%", " %") + " of it from ten indices of 1000" in PAGE.read_text()


@pytest.mark.parametrize("ratio", [0.5, 1.0])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_lambd_by_the_ratio_of_two_losses(prediction_type, ratio):
    """The docs' rule: the forget term is then `ratio` times the retain term, whatever is predicted."""
    images = torch.rand(12, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    forget, neighbors, retain = images[:4], images[4:8, None], images[8:]

    def losses_with(lambd):
        generator = torch.Generator().manual_seed(1)
        arguments = TinyDenoiser(), None, linear_schedule(prediction_type=prediction_type), forget, neighbors
        out = retrack_step(*arguments, retain, lambd=lambd, generator=generator)
        return out.forget_loss.item(), out.retain_loss.item(), out.loss.item()

    of_forget, of_retain, _ = losses_with(0.3)
    lambd = ratio * of_retain / (of_forget + ratio * of_retain)
    *_, loss = losses_with(lambd)
    assert loss == pytest.approx((1 + ratio) * (1 - lambd) * of_retain, rel=1e-5)


# --- loss weights -------------------------------------------------------------------------------------------


def weights_of_the_image(schedule, kind):
    """The weight on `||x_0 - x||^2`, written out."""
    alpha, sigma = schedule.alpha, schedule.sigma
    level = sigma / (alpha + sigma)
    return {
        "min_snr": torch.minimum(alpha**2 / sigma**2, torch.tensor(5.0, dtype=torch.float64)),
        "sigma_squared": torch.ones_like(sigma),
        "sigma_sqrt": 1 / level**4,
        "cosmap": 2 / (math.pi * (1 - 2 * level + 2 * level**2) * level**2),
    }[kind]


@pytest.mark.parametrize("kind", [kind for kind in LOSS_WEIGHTS if kind != "none"])
@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_one_kind_weights_the_same_errors_alike_whatever_is_predicted(prediction_type, kind):
    schedule = schedule_of(prediction_type)
    own, _, of_image = squared_errors(schedule)
    wanted = weights_of_the_image(schedule, kind) * of_image
    torch.testing.assert_close(schedule.loss_weight(kind) * own, wanted, rtol=1e-9, atol=0)


def test_weights_by_prediction_type():
    """As papers and training scripts write them."""
    alpha, sigma = schedule_of("epsilon").alpha, schedule_of("epsilon").sigma
    snr = alpha**2 / sigma**2
    level = NoiseSchedule.flow(T).sigma
    cases = [
        ("epsilon", "min_snr", 3.0, snr.clamp(max=3) / snr),
        ("v_prediction", "min_snr", 3.0, snr.clamp(max=3) / (snr + 1)),
        ("sample", "min_snr", 3.0, snr.clamp(max=3)),
        ("flow", "min_snr", 3.0, torch.minimum(3 * level**2, (1 - level) ** 2)),
        ("flow", "sigma_squared", None, level**2),
        ("flow", "sigma_sqrt", None, level**-2),
        ("flow", "cosmap", None, 2 / (math.pi * ((1 - level) ** 2 + level**2))),
        ("epsilon", "none", None, torch.ones(T, dtype=torch.float64)),
        ("flow", "none", None, torch.ones(T, dtype=torch.float64)),
    ]
    for prediction_type, kind, gamma, wanted in cases:
        weight = schedule_of(prediction_type).loss_weight(kind, gamma=gamma)
        torch.testing.assert_close(weight, wanted, rtol=1e-9, atol=1e-15)
    paper = schedule_of("epsilon").loss_weight("min_snr", gamma=5.0)
    assert torch.equal(schedule_of("epsilon").loss_weight("min_snr"), paper)


def test_a_weight_that_does_not_exist_is_refused():
    schedule = schedule_of("epsilon")
    with pytest.raises(ValueError, match=r"kind: expected one of none, min_snr, .*, got 'mode'"):
        schedule.loss_weight("mode")
    with pytest.raises(ValueError, match=r"gamma: expected None with kind 'cosmap' .*, got 5.0"):
        schedule.loss_weight("cosmap", gamma=5.0)
    with pytest.raises(ValueError, match=r"gamma: expected a finite number in \(0, inf\), got 0"):
        schedule.loss_weight("min_snr", gamma=0)


# --- where the loss is not defined --------------------------------------------------------------------------


def ends(prediction_type):
    """The clean end, one timestep between, and pure noise."""
    alpha, sigma = torch.tensor([1.0, 0.6, 0.0]), torch.tensor([0.0, 0.8, 1.0])
    return NoiseSchedule(alpha, sigma, prediction_type=prediction_type)


def without_clean_end(prediction_type):
    alpha, sigma = torch.tensor([0.6, 0.0]), torch.tensor([0.8, 1.0])
    return NoiseSchedule(alpha, sigma, prediction_type=prediction_type)


@pytest.mark.parametrize("prediction_type", PREDICTION_TYPES)
def test_no_noise_is_refused_where_drawn_and_where_given(prediction_type):
    """rho = alpha / sigma is infinite there."""
    schedule = ends(prediction_type)
    with pytest.raises(ValueError, match=r"schedule: expected sigma_t > 0 .*, got sigma = 0 at t = 0"):
        schedule.check_usable()
    with pytest.raises(
        ValueError, match="forget: expected timesteps with sigma_t > 0, got t = 0, where sigma"
    ):
        schedule.check_timesteps("forget", torch.tensor([1, 0]))
    with pytest.raises(ValueError, match="timesteps: expected timesteps with sigma_t > 0, got t = 0"):
        schedule.coefficients(torch.tensor([1, 0]))


def test_no_signal_is_refused_of_a_network_that_predicts_the_noise():
    schedule = without_clean_end("epsilon")
    with pytest.raises(
        ValueError, match=r"schedule: expected alpha_t > 0 .* epsilon, got alpha = 0 at t = 1"
    ):
        schedule.check_usable()
    with pytest.raises(ValueError, match=r"retain: expected timesteps with alpha_t > 0 .*, got t = 1"):
        schedule.check_timesteps("retain", torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"timesteps: expected timesteps with alpha_t > 0 .*, got t = 1"):
        schedule.coefficients(torch.tensor([0, 1]))


@pytest.mark.parametrize("prediction_type", [name for name in PREDICTION_TYPES if name != "epsilon"])
def test_no_signal_is_a_timestep_like_others_of_other_networks(prediction_type):
    schedule = without_clean_end(prediction_type)
    schedule.check_usable()
    schedule.check_timesteps("timesteps", torch.tensor([0, 1]))
    assert schedule.coefficients(torch.tensor([0, 1])).isfinite().all()


@pytest.mark.parametrize("t", [0, 2])
def test_what_is_never_drawn_may_be_undefined(t):
    schedule = ends("epsilon")
    schedule.check_usable(torch.tensor([0.0, 1.0, 0.0]))
    drawn = torch.tensor([0.0, 0.5, 0.0])
    drawn[t] = 0.5
    with pytest.raises(ValueError, match=f"schedule: expected .* at t = {t}"):
        schedule.check_usable(drawn)


@pytest.mark.parametrize("kind", LOSS_WEIGHTS)
def test_no_weight_is_a_number_where_the_loss_is_not_defined(kind):
    assert ends("epsilon").loss_weight(kind).isnan().tolist() == [True, False, True]
    for prediction_type in ("v_prediction", "sample", "flow"):
        assert ends(prediction_type).loss_weight(kind).isnan().tolist() == [True, False, False]


# --- what the network receives ------------------------------------------------------------------------------


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_the_timesteps_of_flow_matching_are_float32_and_not_rounded(shift):
    schedule = NoiseSchedule.flow(T, shift)
    levels = torch.arange(1, T + 1, dtype=torch.float64) / T
    levels = shift * levels / (1 + (shift - 1) * levels)
    assert schedule.model_timesteps.dtype == torch.float32
    torch.testing.assert_close(schedule.model_timesteps.double(), T * levels, rtol=2**-24, atol=0)
    if shift == 3.0:
        assert (schedule.model_timesteps != schedule.model_timesteps.round()).float().mean() > 0.9


SIGMA_INPUTS = {
    "flow": NoiseSchedule.flow(T, 3.0, model_input="sigma"),
    "variance preserving": NoiseSchedule.from_alphas_cumprod((1 - LINEAR).cumprod(0), model_input="sigma"),
    "of its own": NoiseSchedule(torch.tensor([0.8, 0.6]), torch.tensor([0.6, 0.8]), model_input="sigma"),
}


@pytest.mark.parametrize("schedule", SIGMA_INPUTS.values(), ids=SIGMA_INPUTS)
def test_a_network_that_takes_sigma_gets_it(schedule):
    timesteps = torch.tensor([1, 0])
    received = schedule.model_input(timesteps)
    assert received.dtype == torch.float32
    assert torch.equal(received, schedule.sigma[timesteps].float())


def test_what_a_network_takes_is_said_once():
    table = torch.tensor([0.8, 0.6])
    with pytest.raises(ValueError, match="model_input: expected one of timestep, sigma, got 'log_sigma'"):
        NoiseSchedule.flow(T, model_input="log_sigma")
    with pytest.raises(
        ValueError, match="model_timesteps: expected None with model_input='sigma', got int64"
    ):
        NoiseSchedule(table, table.flip(0), torch.arange(2), model_input="sigma")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 1.0), "num_timesteps: expected an integer >= 1, got 0"),
        ((T, 0.0), r"shift: expected a finite number in \(0, inf\), got 0"),
        ((T, -3.0), r"shift: expected a finite number in \(0, inf\), got -3"),
        ((T, math.nan), r"shift: expected a finite number in \(0, inf\), got nan"),
    ],
)
def test_no_flow_of_no_levels(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        NoiseSchedule.flow(*arguments)


# --- indices ------------------------------------------------------------------------------------------------

EVERY_KIND = {
    "integers": schedule_of("epsilon"),
    "flow": NoiseSchedule.flow(T, 3.0),
    "sigma": NoiseSchedule.flow(T, 3.0, model_input="sigma"),
    "downward": NoiseSchedule(torch.tensor([0.9, 0.1]), torch.tensor([0.1, 0.9]), torch.tensor([7, 3])),
}


@pytest.mark.parametrize("schedule", EVERY_KIND.values(), ids=EVERY_KIND)
def test_every_timestep_has_its_index(schedule):
    everything = torch.arange(len(schedule))
    assert torch.equal(schedule.index_of(schedule.model_timesteps), everything)
    assert torch.equal(schedule.index_of(schedule.model_timesteps.double()), everything)
    square = schedule.model_timesteps[:2].reshape(1, 2, 1)
    assert torch.equal(schedule.index_of(square), torch.tensor([[[0], [1]]]))
    for index in (0, len(schedule) - 1):
        found = schedule.index_of(schedule.model_timesteps[index].item())
        assert (found, type(found)) == (index, int)
    assert schedule.index_of(torch.empty(0)).shape == (0,)


@pytest.mark.parametrize(
    ("name", "timestep", "expected"),
    [
        ("integers", 3.5, r"\(the nearest: 3, index 3\), got 3.5"),
        ("integers", -1, r"\(the nearest: 0, index 0\), got -1.0"),
        ("integers", T, r"\(the nearest: 999, index 999\), got 1000.0"),
        ("flow", 500.2, r"\(the nearest: 500.0, index 249\), got 500.2"),
        ("flow", torch.tensor([1000.0, 500.2], dtype=torch.float64), r"index 249\), got 500.2"),
        ("flow", torch.tensor(math.nan), "that the network was trained at, got nan"),
        ("flow", math.inf, "finite number in .*, got inf"),
    ],
)
def test_another_timestep_is_refused(name, timestep, expected):
    with pytest.raises(ValueError, match=f"^timestep: expected .*{expected}"):
        EVERY_KIND[name].index_of(timestep)


def test_a_timestep_of_two_indices_is_refused():
    schedule = NoiseSchedule(
        torch.tensor([0.9, 0.5, 0.1]), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([4, 4, 9])
    )
    assert schedule.index_of(9) == 2
    with pytest.raises(
        ValueError, match=r"timestep: expected a timestep of one index, got 4.0, which .* 0, 1 sh"
    ):
        schedule.index_of(4)


NO_TIMESTEPS = ["500", None, True, torch.tensor([True]), torch.tensor([500.0]).bfloat16()]


@pytest.mark.parametrize("timestep", NO_TIMESTEPS, ids=str)
def test_what_is_no_timestep_is_refused(timestep):
    with pytest.raises(TypeError, match="timestep: expected"):
        EVERY_KIND["integers"].index_of(timestep)
