"""Schedules from diffusers' schedulers: the noise levels that the network was trained with, or a refusal."""

import pytest
import torch

from fastunlearn import NoiseSchedule

diffusers = pytest.importorskip("diffusers")
FLOW_MATCHING = [
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchHeunDiscreteScheduler(shift=3.0),
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
]


@pytest.mark.parametrize("scheduler", FLOW_MATCHING, ids=["euler", "heun", "dynamic"])
def test_flow_matching_has_the_noise_levels_of_its_scheduler(scheduler):
    schedule = NoiseSchedule.from_diffusers(scheduler)
    theirs = scheduler.sigmas.double().flip(0)  # diffusers counts from noise to image
    assert schedule.prediction_type == "flow"
    assert torch.allclose(schedule.sigma, theirs, rtol=1e-6, atol=0)
    assert torch.allclose(schedule.model_timesteps, theirs * len(theirs), rtol=1e-6, atol=0)


def test_levels_that_rise_are_refused():
    """Betas in place of `alphas_cumprod`, or a table that is turned round: no network saw such levels."""
    scheduler = diffusers.DDPMScheduler()
    assert len(NoiseSchedule.from_alphas_cumprod(scheduler.alphas_cumprod)) == 1000
    for table in (scheduler.betas, scheduler.alphas_cumprod.flip(0)):
        with pytest.raises(
            ValueError, match="alphas_cumprod: expected values that fall with t, got one that rises at t = 1"
        ):
            NoiseSchedule.from_alphas_cumprod(table)


def test_other_noise_levels_are_refused():
    inverted = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    with pytest.raises(
        ValueError, match=r"scheduler: expected noise levels that rise with t, got invert_sigmas=True"
    ):
        NoiseSchedule.from_diffusers(inverted)
    with pytest.raises(
        TypeError, match=r"scheduler: expected .*FlowMatchEulerDiscreteScheduler.*, got EDMEulerScheduler"
    ):
        NoiseSchedule.from_diffusers(diffusers.EDMEulerScheduler())
    flow = diffusers.DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    with pytest.raises(ValueError, match=r"prediction_type: expected one of .*, got 'flow_prediction'"):
        NoiseSchedule.from_diffusers(flow)
