"""Which timesteps a chain visits, and diffusers' own scheduler for them.

What cannot be sampled is refused here.
"""

from __future__ import annotations

import numpy as np
import torch

from ..host import check

SAMPLERS = ("ddpm", "ddim")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


def sampling_grid(scheduler, sampler: str, num_inference_steps: int) -> tuple:
    """The grid of a chain that starts from noise.

    Returns:
        The scheduler of `sampler`, and the timesteps that it visits, descending.

    Raises:
        TypeError, ValueError: for an argument outside its range, or a noise level from which there is no way
            back.
    """
    scheduler = _sampling_scheduler(scheduler, sampler)
    high = {"high": len(scheduler), "of": "the scheduler's training timesteps"}
    num_inference_steps = check.integer("num_inference_steps", num_inference_steps, low=1, **high)
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.tolist()
    _check_levels(scheduler, timesteps)
    return scheduler, timesteps


def injection_grid(scheduler, sampler: str, timestep: int, num_inference_steps: int | None) -> tuple:
    """The grid of a chain that starts at `timestep`.

    Returns:
        The scheduler, the timesteps from `timestep` down to 0, what the scheduler calls them, and `alpha_t^2`
        at the first.

    Raises:
        TypeError, ValueError: as `sampling_grid`.
    """
    scheduler = _sampling_scheduler(scheduler, sampler)
    high = {"high": len(scheduler) - 1, "of": "the scheduler's training timesteps"}
    timestep = check.integer("timestep", timestep, low=0, **high)
    if num_inference_steps is None:
        num_inference_steps = timestep + 1
    num_inference_steps = check.integer(
        "num_inference_steps", num_inference_steps, low=1, high=timestep + 1, of="timestep + 1"
    )
    # A single step goes from `timestep` to the clean image at once.
    timesteps = [timestep]
    if num_inference_steps > 1:
        timesteps = np.linspace(timestep, 0, num_inference_steps).round().astype(int).tolist()
    _check_levels(scheduler, timesteps)
    alpha_squared = scheduler.alphas_cumprod[timestep].item()
    if sampler == "ddpm":
        scheduler.set_timesteps(timesteps=timesteps)
        return scheduler, timesteps, timesteps, alpha_squared
    indices = range(len(timesteps) - 1, -1, -1)
    return _restricted_to(scheduler, timesteps), timesteps, indices, alpha_squared


def _check_levels(scheduler, timesteps: list[int]) -> None:
    """Refuses a grid with a timestep that the schedule has not, or at which a step back divides by zero."""
    # A steps_offset is added to the timesteps: with as many steps as there are, the first is too large.
    if timesteps[0] >= len(scheduler):
        raise ValueError(
            f"num_inference_steps: expected timesteps in [0, {len(scheduler) - 1}], got {timesteps[0]} "
            "(by the scheduler's steps_offset)"
        )
    levels = scheduler.alphas_cumprod[torch.tensor(timesteps)]
    # From a predicted eps follows x_0 = (x_t - sigma_t eps) / alpha_t.
    if scheduler.config.prediction_type == "epsilon" and (levels == 0).any():
        first = timesteps[int((levels == 0).nonzero()[0])]
        raise ValueError(
            "scheduler: expected alpha_t > 0 for a network that predicts epsilon, "
            f"got alpha = 0 at t = {first} (zero terminal SNR)"
        )
    # A step of "ddpm" divides by sigma_t^2, and one of "ddim" takes eps = (x_t - alpha_t x_0) / sigma_t.
    if (levels >= 1).any():
        first = timesteps[int((levels >= 1).nonzero()[0])]
        raise ValueError(f"scheduler: expected sigma_t > 0 at every timestep, got sigma = 0 at t = {first}")


def _sampling_scheduler(scheduler, sampler: str):
    """diffusers' scheduler of `sampler` with the noise levels of `scheduler`, which may be of another class.

    Raises:
        TypeError, ValueError: no such sampler, or a scheduler that it cannot stand in for.
    """
    check.one_of("sampler", sampler, SAMPLERS)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(
            f"scheduler: expected a diffusers scheduler with alphas_cumprod, got {type(scheduler).__name__}"
        )
    diffusers = check.package("diffusers", f"sampler={sampler!r}")
    levels = len(scheduler.alphas_cumprod)
    if levels != scheduler.config.num_train_timesteps:  # trained_betas of another length
        raise ValueError(
            "scheduler: expected as many noise levels as num_train_timesteps, "
            f"{scheduler.config.num_train_timesteps}, got {levels}"
        )
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    check.one_of("prediction_type of the scheduler", prediction_type, PREDICTION_TYPES)
    kind = diffusers.DDPMScheduler if sampler == "ddpm" else diffusers.DDIMScheduler
    try:
        made = kind.from_config(scheduler.config)
    except NotImplementedError:
        # DDIMScheduler knows fewer beta schedules; what it makes of one is replaced below.
        made = kind.from_config(scheduler.config, beta_schedule="linear")
    # The levels themselves, not what `kind` makes of the same betas: they may have been changed since.
    made.alphas_cumprod = scheduler.alphas_cumprod.clone().cpu()
    if sampler == "ddim" and not made.config.set_alpha_to_one:
        made.final_alpha_cumprod = made.alphas_cumprod[0]
    return made


def _restricted_to(scheduler, timesteps: list[int]):
    """A DDIM scheduler whose whole training grid is `timesteps` (descending), numbered from 0.

    DDIMScheduler has no custom timesteps: its `step` goes back by `T // num_inference_steps`, always. On the
    restricted grid that stride is 1 and visits exactly the wanted noise levels (the respacing of Nichol &
    Dhariwal 2021).
    """
    restricted = type(scheduler).from_config(
        scheduler.config, num_train_timesteps=len(timesteps), timestep_spacing="leading", steps_offset=0
    )
    restricted.alphas_cumprod = scheduler.alphas_cumprod[torch.tensor(timesteps[::-1])]
    restricted.final_alpha_cumprod = scheduler.final_alpha_cumprod
    restricted.set_timesteps(len(timesteps))
    return restricted
