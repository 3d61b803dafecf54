"""From which timestep on the text steers a text-to-image model: where a window of its forget loss begins.

arXiv 2510.17917, Algorithm 1, after Jain et al. (arXiv 2411.16738): along a path of the sampler, the distance
between what the network predicts with the text and without it falls to a first local minimum, the transition.
"""

from __future__ import annotations

import copy
import inspect
import logging
import math
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..host import check
from ..host.finite import NotFiniteError

if TYPE_CHECKING:
    from ..objective.schedule import NoiseSchedule

log = logging.getLogger("fastunlearn")

# Where the fixed window begins, as a part of all timesteps: t_spec = 750 of Stable Diffusion's 1000, and the
# noise level of flow matching that has the same ratio of signal to noise.
FIXED, FIXED_FLOW = 0.75, 0.804
# Above 1, so that a pipeline computes both halves, and so little that it follows the conditional one.
GUIDANCE_SCALE = 1 + 1e-6
PLACES = ("after", "minimum")
DPM_SOLVER = "dpmsolver++"
# What a pipeline of text to image must take, and what says that it starts from more than a text.
ARGUMENTS = (
    "prompt",
    "negative_prompt",
    "num_inference_steps",
    "guidance_scale",
    "generator",
    "output_type",
    "callback_on_step_end",
)
OTHER_INPUTS = ("image", "mask_image", "control_image")


@dataclass(frozen=True)
class Transition:
    """What `find_transition` found. The first index of nested tuples is the prompt, the second the seed.

    Timesteps are the network's own: of flow matching, noise levels times the number of timesteps.
    """

    timestep: float  # t*: the median over all prompts and seeds
    prompt_timesteps: tuple[float, ...]  # of each prompt, the median over its seeds
    seed_timesteps: tuple[tuple[float, ...], ...]
    minima: tuple[tuple[int | None, ...], ...]  # index of the minimum in `visited`; None: there is none
    magnitudes: tuple[tuple[tuple[float, ...], ...], ...]  # at the first of the timesteps in `visited`
    visited: tuple[float, ...]  # by the sampler, from noise to image, as far as any prompt went
    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    fallback: float  # the timestep of prompts and seeds without a minimum
    calls: int  # of the network, for all prompts together
    num_train_timesteps: int

    @property
    def fell_back(self) -> tuple[tuple[bool, ...], ...]:
        """For each prompt and seed, whether it has no minimum, so that `fallback` stands for it."""
        return tuple(tuple(minimum is None for minimum in row) for row in self.minima)

    def window(self, schedule: NoiseSchedule | None = None) -> tuple[int, int]:
        """`[t*, T)`: its first timestep and the one after its last, as `TimeWindow(*found.window())` has it.

        Samplers such as Euler's stop between whole timesteps: the first one at or after t* counts.

        Args:
            schedule: the one that the model is trained with; then both are indices into it, which for flow
                matching differ from the network's timesteps, and are what a `TimeWindow` needs.

        Raises:
            ValueError: a schedule of another length, or without a timestep from t* on.
        """
        # Samplers hold their timesteps in float32, which may lie a little above the schedule's own.
        least = self.timestep - 1e-6 * self.num_train_timesteps
        if schedule is None:
            # The last level of flow matching has timestep T.
            return min(math.ceil(least), self.num_train_timesteps - 1), self.num_train_timesteps
        if len(schedule) != self.num_train_timesteps:
            expected = f"the pipeline's {self.num_train_timesteps} timesteps"
            raise ValueError(f"schedule: expected {expected}, got {len(schedule)}")
        inside = (schedule.model_timesteps >= least).nonzero()
        if len(inside) == 0:
            last = float(schedule.model_timesteps[-1])
            raise ValueError(
                f"schedule: expected timesteps from {self.timestep} on, got a last one of {last}"
            )
        return int(inside[0]), len(schedule)


def find_transition(
    pipeline,
    prompts: str | Sequence[str],
    seeds: int | Sequence[int] = 8,
    *,
    negative_prompt: str | None = None,
    num_inference_steps: int = 50,
    scheduler=None,
    at: str = "after",
    fallback: float | None = None,
    batch_size: int | None = None,
    stop_early: bool = True,
    height: int | None = None,
    width: int | None = None,
) -> Transition:
    """The timestep at which the text begins to steer `pipeline`, the median over prompts and seeds.

    The pipeline samples by itself, and a hook on its network measures the guidance magnitude
    `d_j = ||e(x_tj, c) - e(x_tj, null)||_2` at each timestep of the sampler, for each prompt and seed, with e
    what the network predicts. The transition is the first j with `d_{j-1} < d_{j-2}` and `d_{j-1} < d_j`. The
    path is that of the conditional model. Where a sampler calls the network at one timestep several times,
    the last call counts.

    Nothing of the pipeline is changed: its scheduler, its progress bar and the training mode of its networks
    are as before, also after an error.

    Args:
        pipeline: a diffusers pipeline from text to image with classifier-free guidance in one batch, as
            `StableDiffusionPipeline` and `StableDiffusion3Pipeline`; its network is `unet` or `transformer`.
        prompts: the captions of the images to forget, one or several.
        seeds: of the initial noise: a number n for 0, ..., n - 1, or the seeds themselves. They mean the same
            noise on every device.
        negative_prompt: the null text; None: the pipeline's own.
        num_inference_steps: of the sampler, at least 3.
        scheduler: None: a copy of the pipeline's own; `"dpmsolver++"`: the multistep solver with which Jain's
            code samples, made of the pipeline's own; or another diffusers scheduler, which is copied.
        at: `"after"`: one timestep of the sampler after the minimum, as Jain's code reports it; `"minimum"`.
        fallback: the timestep of a prompt and seed without a minimum; None: where the fixed window begins,
            750 of 1000 timesteps, or 804 of flow matching, which is the same ratio of signal to noise.
        batch_size: seeds at a time, which makes twice as many rows for the network; None: all of them.
        stop_early: whether to end the sampling of a batch once all its seeds have their minimum.
        height, width: of the images in pixels; None: the pipeline's own.

    Returns:
        A `Transition`; a prompt and seed without a minimum is named in the log.

    Raises:
        TypeError, ValueError: for an argument that is not as above, before any work; a network that is not
            called once a step on both halves.
        NotFiniteError: a ValueError; the network predicts NaN or Inf.
        ImportError: `scheduler="dpmsolver++"` without the package diffusers.
    """
    network = _network(pipeline)
    prompts = _prompts(prompts, negative_prompt)
    seeds = _seeds(seeds)
    sampler = _sampler(pipeline, scheduler)
    total = sampler.config.num_train_timesteps
    check.integer("num_inference_steps", num_inference_steps, low=3, high=total, of="the timesteps")
    check.one_of("at", at, PLACES)
    if fallback is None:
        fallback = round((FIXED_FLOW if _is_flow(sampler) else FIXED) * total)
    else:
        check.number("fallback", fallback, low=0, high=total - 1)
    batch_size = len(seeds) if batch_size is None else check.integer("batch_size", batch_size, low=1)
    batches = [seeds[start : start + batch_size] for start in range(0, len(seeds), batch_size)]
    call = {"num_inference_steps": num_inference_steps}
    for name, pixels in (("height", height), ("width", width)):
        if pixels is not None:
            call[name] = check.integer(name, pixels, low=1)

    runs = []  # [prompt][batch of seeds]
    with _borrowed(pipeline, sampler):
        for prompt in prompts:
            texts = {"prompt": prompt}
            if negative_prompt is not None:
                texts["negative_prompt"] = negative_prompt
            runs.append([_sample(pipeline, network, texts, batch, call, stop_early) for batch in batches])

    magnitudes = tuple(tuple(curve for run in row for curve in run.curves()) for row in runs)
    visited = max((run.visited for row in runs for run in row), key=len)
    minima = tuple(tuple(first_minimum(curve) for curve in rows) for rows in magnitudes)
    after = 1 if at == "after" else 0
    found = tuple(
        tuple(fallback if minimum is None else visited[minimum + after] for minimum in row) for row in minima
    )
    result = Transition(
        timestep=_median([timestep for row in found for timestep in row]),
        prompt_timesteps=tuple(_median(row) for row in found),
        seed_timesteps=found,
        minima=minima,
        magnitudes=magnitudes,
        visited=tuple(visited),
        prompts=prompts,
        seeds=seeds,
        fallback=fallback,
        calls=sum(run.calls for row in runs for run in row),
        num_train_timesteps=total,
    )
    _say_fallbacks(result)
    return result


def first_minimum(magnitudes: Sequence[float]) -> int | None:
    """The first index whose value is below both its neighbours'; None: there is none."""
    for index in range(1, len(magnitudes) - 1):
        if magnitudes[index - 1] > magnitudes[index] < magnitudes[index + 1]:
            return index
    return None


def _sample(
    pipeline, network: nn.Module, texts: dict[str, str], seeds: Sequence[int], call: dict, stop_early: bool
) -> _Run:
    """Lets the pipeline sample one prompt from some seeds, with the hook on its network while it does."""
    run = _Run(len(seeds), stop_early)
    # A generator for each seed, on the CPU: a seed's noise depends on neither the batch nor the device.
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    hook = network.register_forward_hook(run.measure)
    try:
        pipeline(
            **{name: [text] * len(seeds) for name, text in texts.items()},
            **call,
            guidance_scale=GUIDANCE_SCALE,
            generator=generators,
            output_type="latent",
            callback_on_step_end=run.end_of_step,
        )
    finally:
        hook.remove()
    return run


class _Run:
    """What is measured while the pipeline samples one prompt from some seeds."""

    def __init__(self, rows: int, stop_early: bool):
        self.rows, self.stop_early = rows, stop_early
        self.visited: list[float] = []
        self.magnitudes: list[list[float]] = []  # [timestep][seed]
        self.calls = 0
        self._calls_before_step = 0
        self._latest: Tensor | None = None

    def curves(self) -> list[tuple[float, ...]]:
        """The magnitudes of each seed, at the timesteps in `visited`."""
        return list(zip(*self.magnitudes, strict=True))

    def measure(self, network: nn.Module, inputs, output) -> None:
        """The hook: the norms of the differences between the halves, `[rows]`, kept on the device."""
        self.calls += 1
        prediction = check.network_output(output)
        if len(prediction) != 2 * self.rows:
            expected = f"one call of the network on both halves of {self.rows} seeds, {2 * self.rows} rows"
            raise ValueError(f"pipeline: expected {expected}, got {len(prediction)} rows")
        null, text = prediction.detach().chunk(2)
        # Half precision cannot hold the squares of many pixels.
        dtype = torch.promote_types(prediction.dtype, torch.float32)
        self._latest = torch.linalg.vector_norm((text.to(dtype) - null.to(dtype)).flatten(1), dim=1)

    def end_of_step(self, pipeline, step: int, timestep: Tensor, tensors: dict) -> dict:
        """The pipeline's callback: keeps what was measured, and ends the sampling once it is enough."""
        if self.calls != self._calls_before_step + 1:
            got = f"{self.calls - self._calls_before_step} that its hooks see"
            raise ValueError(f"pipeline: expected one call of its network a step, got {got}")
        self._calls_before_step = self.calls

        # Solvers of second order come to a timestep twice, the second time with the better latents.
        timesteps = pipeline.scheduler.timesteps
        if step + 1 < len(timesteps) and timesteps[step + 1] == timestep:
            return tensors
        magnitudes = self._latest.tolist()
        if not all(map(math.isfinite, magnitudes)):
            raise NotFiniteError(
                f"pipeline: expected finite predictions, got NaN or Inf at timestep {timestep.item()}"
            )
        self.visited.append(timestep.item())
        self.magnitudes.append(magnitudes)
        # diffusers' own way to end a loop: what is left of it is passed over.
        if self.stop_early and all(first_minimum(curve) is not None for curve in self.curves()):
            pipeline._interrupt = True
        return tensors


@contextmanager
def _borrowed(pipeline, sampler) -> Iterator[None]:
    """The pipeline with another scheduler, silent and in eval mode, and as it was when the block ends."""
    missing = object()
    before = {name: vars(pipeline).get(name, missing) for name in ("_interrupt", "_progress_bar_config")}
    own = pipeline.scheduler
    parts = [part for part in vars(pipeline).values() if isinstance(part, nn.Module)]
    training = [(module, module.training) for part in parts for module in part.modules()]
    try:
        for part in parts:
            part.eval()
        pipeline.scheduler = sampler
        pipeline._progress_bar_config = {"disable": True}
        yield
    finally:
        pipeline.scheduler = own
        for module, mode in training:
            module.training = mode
        for name, value in before.items():
            if value is not missing:
                setattr(pipeline, name, value)
            elif name in vars(pipeline):
                delattr(pipeline, name)


def _network(pipeline) -> nn.Module:
    """The network that predicts.

    Raises:
        TypeError, ValueError: what is no pipeline from text to image with classifier-free guidance.
    """
    expected = "expected a diffusers pipeline from text to image with classifier-free guidance"
    networks = [getattr(pipeline, name, None) for name in ("unet", "transformer")]
    networks = [network for network in networks if isinstance(network, nn.Module)]
    if len(networks) != 1 or not callable(pipeline) or not hasattr(pipeline, "scheduler"):
        raise TypeError(f"pipeline: {expected}, its unet or transformer, got {check.describe(pipeline)}")
    name = type(pipeline).__name__
    arguments = inspect.signature(pipeline.__call__).parameters
    missing = [argument for argument in ARGUMENTS if argument not in arguments]
    # Pipelines whose guidance is distilled into the network do not have this property.
    if missing or not hasattr(type(pipeline), "do_classifier_free_guidance"):
        lacks = ", ".join(missing) or "do_classifier_free_guidance"
        raise ValueError(f"pipeline: {expected}, got {name}, which has no {lacks}")
    others = [argument for argument in OTHER_INPUTS if argument in arguments]
    if others:
        raise ValueError(f"pipeline: {expected}, got {name}, which starts from {others[0]}")
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    if all(getattr(pipeline, encoder, None) is None for encoder in encoders):
        raise ValueError(f"pipeline: expected one with a text encoder, got {name} with text_encoder=None")
    if getattr(getattr(networks[0], "config", None), "time_cond_proj_dim", None) is not None:
        got = "one with guidance distilled into it (time_cond_proj_dim)"
        raise ValueError(f"pipeline: expected a network without guidance of its own, got {got}")
    return networks[0]


def _prompts(prompts, negative_prompt) -> tuple[str, ...]:
    """One or several texts, each of them another than the null text."""
    if negative_prompt is not None and not isinstance(negative_prompt, str):
        raise TypeError(f"negative_prompt: expected a text or None, got {check.describe(negative_prompt)}")
    if isinstance(prompts, str):
        prompts = [prompts]
    if not isinstance(prompts, Sequence) or not all(isinstance(prompt, str) for prompt in prompts):
        raise TypeError(f"prompts: expected a text or a list of texts, got {check.describe(prompts)}")
    if not prompts:
        raise ValueError("prompts: expected at least one text, got none")
    # The difference of a text from itself is zero everywhere, and has no minimum.
    for number, prompt in enumerate(prompts):
        if not prompt.strip() or prompt == negative_prompt:
            got = f"{prompt!r} in place {number}"
            raise ValueError(f"prompts: expected texts that differ from the null text, got {got}")
    return tuple(prompts)


def _seeds(seeds) -> tuple[int, ...]:
    """The seeds themselves, where their number may have been given."""
    if isinstance(seeds, Sequence) and not isinstance(seeds, str):
        if not seeds:
            raise ValueError("seeds: expected at least one, got none")
        seeds = tuple(check.integer("seeds", seed, low=0, high=2**63 - 1) for seed in seeds)
        if len(set(seeds)) < len(seeds):
            raise ValueError(f"seeds: expected different ones, got {list(seeds)}")
        return seeds
    return tuple(range(check.integer("seeds", seeds, low=1)))


def _sampler(pipeline, scheduler):
    """The scheduler to sample with: a copy, since a scheduler keeps the state of its last run.

    Raises:
        TypeError, ValueError: what is no scheduler, or one that does not fit the pipeline's network.
        ImportError: the package diffusers is not installed.
    """
    own = pipeline.scheduler
    if scheduler is None:
        sampler = copy.deepcopy(own)
    elif isinstance(scheduler, str):
        sampler = _dpm_solver(own, check.one_of("scheduler", scheduler, (DPM_SOLVER,)))
    else:
        sampler = copy.deepcopy(scheduler)
    if not all(hasattr(sampler, name) for name in ("config", "set_timesteps", "step")):
        expected = f"a diffusers scheduler, {DPM_SOLVER!r} or None"
        raise TypeError(f"scheduler: expected {expected}, got {check.describe(scheduler)}")
    # One made for another prediction type or number of timesteps would sample nonsense without an error.
    for what, of in (("predictions", _prediction_type), ("timesteps", _num_train_timesteps)):
        if of(sampler) != of(own):
            raise ValueError(f"scheduler: expected the pipeline's {what}, {of(own)}, got {of(sampler)}")
    # Pipelines of flow matching pass no generator to the scheduler.
    random = sampler.config.get("stochastic_sampling") or "sde" in sampler.config.get("algorithm_type", "")
    if random and _is_flow(sampler):
        raise ValueError("scheduler: expected one of flow matching that draws no noise, got a stochastic one")
    return sampler


def _dpm_solver(own, algorithm: str):
    """DPM-Solver++ multistep with the noise levels of a scheduler."""
    diffusers = check.package("diffusers", f"find_transition(scheduler={algorithm!r})")
    config = dict(own.config, algorithm_type=algorithm)
    if _is_flow(own):
        shift = own.config.get("shift", 1.0)
        config |= {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": shift}
    return diffusers.DPMSolverMultistepScheduler.from_config(config)


def _is_flow(scheduler) -> bool:
    """Whether a scheduler is of flow matching, whose network predicts the noise less the image."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return True
    return scheduler.config.get("prediction_type") == "flow_prediction"


def _prediction_type(scheduler) -> str:
    return "flow" if _is_flow(scheduler) else scheduler.config.get("prediction_type", "epsilon")


def _num_train_timesteps(scheduler) -> int:
    return scheduler.config.num_train_timesteps


def _median(timesteps: Sequence[float]) -> float:
    """The median; where all timesteps are integers, so is it."""
    median = statistics.median(timesteps)
    return round(median) if all(isinstance(timestep, int) for timestep in timesteps) else median


def _say_fallbacks(result: Transition) -> None:
    """Names the prompts and seeds without a minimum in the log."""
    for prompt, flags in zip(result.prompts, result.fell_back, strict=True):
        seeds = [seed for seed, fell_back in zip(result.seeds, flags, strict=True) if fell_back]
        if seeds:
            log.warning(
                "find_transition: the prompt %r has no minimum with seeds %s, which count as the fixed %s",
                prompt,
                seeds,
                result.fallback,
            )
