"""Schedules from diffusers' schedulers: the noise levels that the network was trained with, or a refusal."""

import math

import pytest
import torch

from fastunlearn import NoiseSchedule

diffusers = pytest.importorskip("diffusers")
from diffusers.configuration_utils import register_to_config  # noqa: E402
from diffusers.training_utils import compute_loss_weighting_for_sd3, compute_snr  # noqa: E402

Euler = diffusers.FlowMatchEulerDiscreteScheduler
Heun = diffusers.FlowMatchHeunDiscreteScheduler
LCM = diffusers.FlowMatchLCMScheduler
T = 1000

# Settings of one axis at a time are combined with every other axis.
LEVELS = {
    "no shift": {},
    "shift": {"shift": 3.0},
    "small shift": {"shift": 0.25},
    "dynamic": {"use_dynamic_shifting": True},
    "dynamic, shift": {"use_dynamic_shifting": True, "shift": 3.0},
    "dynamic, own range": {"use_dynamic_shifting": True, "base_shift": 0.1, "max_shift": 2.5},
    "dynamic, linear": {"use_dynamic_shifting": True, "time_shift_type": "linear", "shift": 3.0},
}
WHEN_SAMPLING = {
    "plain": {},
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "terminal": {"shift_terminal": 0.1},
    "terminal, karras": {"shift_terminal": 0.1, "use_karras_sigmas": True},
}


def assert_levels_of(schedule, fresh):
    """`schedule` trains at the levels of `fresh`, a scheduler that has not sampled: bit for bit."""
    assert schedule.prediction_type == "flow"
    # diffusers counts from noise to image.
    assert torch.equal(schedule.sigma, fresh.sigmas.flip(0).double())
    assert torch.equal(schedule.alpha, 1 - fresh.sigmas.flip(0).double())
    assert schedule.model_timesteps.dtype == fresh.timesteps.dtype == torch.float32
    assert torch.equal(schedule.model_timesteps, fresh.timesteps.flip(0))


@pytest.mark.parametrize("sampling", WHEN_SAMPLING.values(), ids=WHEN_SAMPLING)
@pytest.mark.parametrize("levels", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("scheduler", [Euler, LCM])
def test_flow_matching_has_the_noise_levels_of_its_scheduler(scheduler, levels, sampling):
    """Before it has sampled, and after: `set_timesteps` and `set_shift` leave the config alone."""
    if "use_beta_sigmas" in sampling:
        pytest.importorskip("scipy")
    settings = levels | sampling
    used = scheduler(**settings)
    assert_levels_of(NoiseSchedule.from_diffusers(used), scheduler(**settings))
    used.set_timesteps(7, mu=0.7 if settings.get("use_dynamic_shifting") else None)
    used.set_shift(5.0)
    assert_levels_of(NoiseSchedule.from_diffusers(used), scheduler(**settings))


@pytest.mark.parametrize("scheduler", [Euler, Heun, LCM])
@pytest.mark.parametrize("timesteps", [10, 1000])
def test_every_class_and_length(scheduler, timesteps):
    made = scheduler(num_train_timesteps=timesteps, shift=3.0)
    schedule = NoiseSchedule.from_diffusers(made)
    assert len(schedule) == timesteps
    assert_levels_of(schedule, scheduler(num_train_timesteps=timesteps, shift=3.0))


def test_the_middle_level_by_hand():
    """A shift of 3 makes .75 of .5; one that is dynamic is left to sampling."""
    for settings, wanted in (({}, 0.75), ({"use_dynamic_shifting": True}, 0.5)):
        schedule = NoiseSchedule.from_diffusers(Euler(shift=3.0, **settings))
        assert schedule.sigma[499].item() == pytest.approx(wanted, rel=1e-7)


@pytest.mark.parametrize("time_shift_type", ["exponential", "linear"])
def test_the_levels_of_one_size_of_image(time_shift_type):
    """As the docs say: `flow` with the shift that a dynamic scheduler makes of mu."""
    scheduler = Euler(use_dynamic_shifting=True, time_shift_type=time_shift_type)
    scheduler.set_timesteps(T, mu=0.9)
    shift = math.exp(0.9) if time_shift_type == "exponential" else 0.9
    theirs = scheduler.sigmas[:-1].flip(0).double()
    torch.testing.assert_close(NoiseSchedule.flow(T, shift).sigma, theirs, rtol=1e-6, atol=0)


def test_a_config_that_was_another_class_s():
    """Heun's levels are shifted whatever a config says of dynamic shifting."""
    scheduler = Heun.from_config(Euler(shift=3.0, use_dynamic_shifting=True).config)
    assert scheduler.config.use_dynamic_shifting
    assert_levels_of(NoiseSchedule.from_diffusers(scheduler), Heun(shift=3.0))


def test_flow_is_the_same_to_rounding():
    schedule = NoiseSchedule.flow(T, 3.0)
    theirs = NoiseSchedule.from_diffusers(Euler(shift=3.0))
    # float32 rounds five times on the way to a level, once more to a timestep, and ours once.
    torch.testing.assert_close(schedule.sigma, theirs.sigma, rtol=5 * 2**-24, atol=0)
    torch.testing.assert_close(schedule.model_timesteps, theirs.model_timesteps, rtol=7 * 2**-24, atol=0)


class Plain(Euler):
    """As a project that changes sampling only has it."""


class Passing(Euler):
    def __init__(self, *args, own=1.0, **kwargs):
        super().__init__(*args, **kwargs)


class Named(Heun):
    @register_to_config
    def __init__(self, num_train_timesteps=1000, shift=1.0, own=2.0):
        super().__init__(num_train_timesteps, shift)


@pytest.mark.parametrize("scheduler", [Plain, Passing, Named])
def test_a_subclass_has_the_levels_of_its_config(scheduler):
    used = scheduler(num_train_timesteps=200, shift=3.0)
    used.set_timesteps(7)
    assert_levels_of(NoiseSchedule.from_diffusers(used), scheduler(num_train_timesteps=200, shift=3.0))
    assert not torch.equal(scheduler(num_train_timesteps=200).sigmas, scheduler(200, shift=3.0).sigmas)


# --- solvers with flow prediction ---------------------------------------------------------------------------

SOLVERS = [
    diffusers.DPMSolverMultistepScheduler,
    diffusers.DPMSolverSinglestepScheduler,
    diffusers.DEISMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
]
FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True}


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_of_flow_matching_samples_at_levels_of_its_schedule(solver, shift):
    """T - 1 steps go through every level but the first or the last, by the solver."""
    scheduler = solver(flow_shift=shift, **FLOW)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    scheduler.set_timesteps(T - 1)
    theirs = scheduler.sigmas[:-1].flip(0).double()
    own = schedule.sigma[1:] if solver is diffusers.UniPCMultistepScheduler else schedule.sigma[:-1]
    # UniPC's first level is 1 - 1e-6 in place of 1; its others, and DPMSolver's, are float32's.
    torch.testing.assert_close(own, theirs, rtol=2e-6, atol=0)
    assert_steps_of_flow_matching(scheduler)
    # What it has done since does not matter.
    assert torch.equal(NoiseSchedule.from_diffusers(scheduler).sigma, schedule.sigma)


def assert_steps_of_flow_matching(scheduler):
    """It takes `eps - x_0` for what the network returns, and finds x_0 with it (DEIS: the noise)."""
    image, noise = torch.randn(2, 1, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    sigma = scheduler.sigmas[300]
    x_t = (1 - sigma) * image + sigma * noise
    scheduler._step_index = 300
    found = scheduler.convert_model_output(noise - image, sample=x_t)
    wanted = noise if isinstance(scheduler, diffusers.DEISMultistepScheduler) else image
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_solver_with_dynamic_shifting_trains_without(solver):
    """Like FlowMatchEuler, before and after it has sampled one size of image."""
    scheduler = solver(flow_shift=3.0, use_dynamic_shifting=True, **FLOW)
    unshifted = NoiseSchedule.flow(T)
    assert torch.equal(NoiseSchedule.from_diffusers(scheduler).sigma, unshifted.sigma)
    scheduler.set_timesteps(10, mu=0.7)
    assert torch.equal(NoiseSchedule.from_diffusers(scheduler).sigma, unshifted.sigma)


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_flow_sigmas_without_flow_prediction_are_refused(solver, prediction_type):
    scheduler = solver(prediction_type=prediction_type, use_flow_sigmas=True)
    expected = "scheduler: expected prediction_type='flow_prediction' and use_flow_sigmas=True, or neither"
    with pytest.raises(ValueError, match=f"{expected}, got '{prediction_type}' and True"):
        NoiseSchedule.from_diffusers(scheduler)


@pytest.mark.parametrize("solver", [*SOLVERS, diffusers.SASolverScheduler])
def test_flow_prediction_without_flow_sigmas_is_refused(solver):
    scheduler = solver(prediction_type="flow_prediction")
    expected = "scheduler: expected prediction_type='flow_prediction' and use_flow_sigmas=True, or neither"
    with pytest.raises(ValueError, match=f"{expected}, got 'flow_prediction' and False"):
        NoiseSchedule.from_diffusers(scheduler)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("solver", SOLVERS)
def test_solvers_of_other_networks_have_their_alphas_cumprod(solver, prediction_type):
    scheduler = solver(prediction_type=prediction_type, use_karras_sigmas=True)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert schedule.prediction_type == prediction_type
    assert torch.equal(schedule.alpha, scheduler.alphas_cumprod.double().sqrt())
    assert torch.equal(schedule.model_timesteps, torch.arange(T))


# --- indices and what the network receives ------------------------------------------------------------------


def test_indices_count_the_other_way_round():
    scheduler = Euler(shift=3.0)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert torch.equal(schedule.index_of(scheduler.timesteps), torch.arange(T).flip(0))
    for timestep in scheduler.timesteps[[0, 412, 999]]:
        assert schedule.index_of(timestep) == T - 1 - scheduler.index_for_timestep(timestep)


def test_timesteps_of_sampling_are_indices_of_a_variance_preserving_schedule():
    scheduler = diffusers.DDIMScheduler()
    scheduler.set_timesteps(10)
    schedule = NoiseSchedule.from_diffusers(scheduler)
    assert torch.equal(schedule.index_of(scheduler.timesteps), scheduler.timesteps)


@pytest.mark.parametrize("scheduler", [Euler(shift=3.0), Heun(shift=3.0), Euler(use_dynamic_shifting=True)])
def test_a_network_that_takes_sigma_gets_the_scheduler_s(scheduler):
    """The scripts for Flux give their network `timesteps / 1000`, which is sigma to a rounding or two."""
    schedule = NoiseSchedule.from_diffusers(scheduler, model_input="sigma")
    received = schedule.model_input(torch.arange(T))
    assert torch.equal(received, scheduler.sigmas.flip(0))
    torch.testing.assert_close(received, scheduler.timesteps.flip(0) / 1000, rtol=2**-22, atol=0)


def test_solvers_and_variance_preserving_schedulers_give_sigma_too():
    solver = diffusers.UniPCMultistepScheduler(flow_shift=3.0, **FLOW)
    for scheduler in (solver, diffusers.DDPMScheduler()):
        schedule = NoiseSchedule.from_diffusers(scheduler, model_input="sigma")
        assert torch.equal(schedule.model_timesteps, schedule.sigma.float())


# --- loss weights -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_that_of_diffusers_scripts(gamma):
    """Their float32: `min(SNR, gamma) / SNR`, for v over `SNR + 1`."""
    scheduler = diffusers.DDPMScheduler()
    snr = compute_snr(scheduler, torch.arange(T))
    for prediction_type, divisor in (("epsilon", snr), ("v_prediction", snr + 1)):
        schedule = NoiseSchedule.from_alphas_cumprod(
            scheduler.alphas_cumprod, prediction_type=prediction_type
        )
        theirs = (snr.clamp(max=gamma) / divisor).double()
        # 1 - abar of float32 has three digits less at t = 0, and so has a float32 SNR.
        torch.testing.assert_close(schedule.loss_weight("min_snr", gamma=gamma), theirs, rtol=1e-3, atol=0)
        later = slice(100, None)
        ours = schedule.loss_weight("min_snr", gamma=gamma)[later]
        torch.testing.assert_close(ours, theirs[later], rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("kind", "theirs"), [("sigma_sqrt", "sigma_sqrt"), ("cosmap", "cosmap"), ("none", "mode")]
)
@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_weights_of_sd3_are_those_of_diffusers(kind, theirs, shift):
    schedule = NoiseSchedule.from_diffusers(Euler(shift=shift))
    wanted = compute_loss_weighting_for_sd3(theirs, sigmas=schedule.sigma.float()).double()
    torch.testing.assert_close(schedule.loss_weight(kind), wanted, rtol=1e-6, atol=0)


def test_preconditioned_outputs_are_weighted_by_sigma_squared():
    """diffusers' SD3 script then compares `x_t - sigma v` with the image."""
    schedule = NoiseSchedule.from_diffusers(Euler(shift=3.0))
    image, noise, predicted = torch.randn(
        3, T, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    )
    sigma = schedule.sigma[:, None]
    x_t = (1 - sigma) * image + sigma * noise
    theirs = (predicted * -sigma + x_t - image).square().mean(dim=1)
    own = (predicted - (noise - image)).square().mean(dim=1)
    torch.testing.assert_close(schedule.loss_weight("sigma_squared") * own, theirs, rtol=1e-9, atol=0)


# --- refused ------------------------------------------------------------------------------------------------


def test_levels_that_rise_are_refused():
    """Betas in place of `alphas_cumprod`, or a table that is turned round: no network saw such levels."""
    scheduler = diffusers.DDPMScheduler()
    assert len(NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)) == 1000
    for table in (scheduler.betas, scheduler.alphas_cumprod.flip(0)):
        with pytest.raises(
            ValueError, match="alphas_cumprod: expected values that fall with t, got one that rises at t = 1"
        ):
            NoiseSchedule.from_alphas_cumprod(table)


@pytest.mark.parametrize("scheduler", [Euler(invert_sigmas=True), LCM(invert_sigmas=True)])
def test_inverted_noise_levels_are_refused(scheduler):
    with pytest.raises(
        ValueError, match=r"scheduler: expected noise levels that rise with t, got invert_sigmas=True"
    ):
        NoiseSchedule.from_diffusers(scheduler)


def test_a_network_that_takes_the_logarithm_of_sigma_is_refused():
    settings = {"prediction_type": "v_prediction", "timestep_type": "continuous"}
    with pytest.raises(
        ValueError, match=r"scheduler: expected timestep_type='discrete' .*, got 'continuous'"
    ):
        NoiseSchedule.from_diffusers(diffusers.EulerDiscreteScheduler(**settings))
    discrete = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    assert NoiseSchedule.from_diffusers(discrete).prediction_type == "v_prediction"


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"])
def test_other_families_are_refused(name):
    expected = rf"scheduler: expected .*FlowMatchEulerDiscreteScheduler.*, got {name}"
    with pytest.raises(TypeError, match=expected):
        NoiseSchedule.from_diffusers(getattr(diffusers, name)())


WITH_A_LITTLE_SIGNAL = [
    diffusers.EulerDiscreteScheduler,
    diffusers.EulerAncestralDiscreteScheduler,
    diffusers.DPMSolverMultistepScheduler,
    diffusers.UniPCMultistepScheduler,
]
ZERO_SNR = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}


@pytest.mark.parametrize("scheduler", WITH_A_LITTLE_SIGNAL)
@pytest.mark.parametrize("betas", [{}, {"beta_schedule": "scaled_linear"}])
def test_zero_terminal_snr_is_what_the_scheduler_writes(scheduler, betas):
    """With default betas its last value lies above the one before."""
    made = scheduler(**ZERO_SNR, **betas)
    assert made.alphas_cumprod[-1] == 2**-24
    schedule = NoiseSchedule.from_diffusers(made)
    assert torch.equal(schedule.alpha, made.alphas_cumprod.double().sqrt())
    assert torch.equal(schedule.sigma, (1 - made.alphas_cumprod.double()).sqrt())
    schedule.check_usable()


def test_a_last_value_that_rises_is_accepted_of_such_a_scheduler_only():
    def refused(made, at):
        with pytest.raises(ValueError, match=rf"alphas_cumprod: .*, got one that rises at t = {at}$"):
            NoiseSchedule.from_diffusers(made)

    made = diffusers.EulerDiscreteScheduler(**ZERO_SNR)
    assert made.alphas_cumprod[-1] > made.alphas_cumprod[-2]
    with pytest.raises(ValueError, match=r"got one that rises at t = 999$"):
        NoiseSchedule.from_alphas_cumprod(made.alphas_cumprod)
    # Nor are another last value, one that rises before it, and betas before it.
    table = made.alphas_cumprod
    made.alphas_cumprod = torch.cat([table[:-1], table.new_tensor([2**-23])])
    refused(made, 999)
    made.alphas_cumprod = torch.cat([table[:500], table[499:-1]])
    made.alphas_cumprod[-1] = 2**-24
    made.alphas_cumprod[500] *= 1.01
    refused(made, 500)
    made.alphas_cumprod = torch.cat([made.betas[:-1], table[-1:]])
    refused(made, 1)
    plain = diffusers.EulerDiscreteScheduler(prediction_type="v_prediction")
    plain.alphas_cumprod = table
    refused(plain, 999)


def test_zero_terminal_snr_is_refused_of_epsilon_only():
    settings = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    of_epsilon = NoiseSchedule.from_diffusers(diffusers.DDIMScheduler(prediction_type="epsilon", **settings))
    with pytest.raises(ValueError, match=r"got alpha = 0 at t = 999 \(zero terminal SNR\)"):
        of_epsilon.check_usable()
    of_v = NoiseSchedule.from_diffusers(diffusers.DDIMScheduler(prediction_type="v_prediction", **settings))
    of_v.check_usable()
