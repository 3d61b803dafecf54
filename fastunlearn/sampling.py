"""Sampling for evaluation by diffusers' own schedulers: from noise, and from a given image noised to some timestep.

The noise of sample i is a function of `(seed, i)` alone. So two models are compared on the same noise, and the images do not depend on
the batch size (up to the rounding of the network's own batched arithmetic).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from . import _check

SAMPLERS = ("ddpm", "ddim")


def sample(model: nn.Module | Callable, scheduler, num_images: int, *, shape: tuple[int, int, int], num_inference_steps: int = 50, sampler: str = "ddpm",
           batch_size: int = 64, seed: int = 0, show_progress: bool = False, description: str = "sampling") -> Tensor:  # [N, C, H, W]
    """Images drawn from noise.

    Args:
        model: a diffusers model, or any `callable(x_t, t)` (`x_t` `[B, C, H, W]`, `t` int64 `[B]`) that returns a tensor or an object with
            `.sample`. A module is put in eval mode meanwhile; of 2C output channels the first C count unless the scheduler learns the variance.
        scheduler: the diffusers scheduler of the checkpoint: its noise levels, prediction type, clipping and timestep spacing are used.
        num_images: N.
        shape: `(C, H, W)` of one sample.
        num_inference_steps: network calls a sample.
        sampler: `"ddpm"` (ancestral, Ho et al. 2020) or `"ddim"` (deterministic, Song et al. 2021).
        batch_size: rows a network call; changes speed only.
        seed: selects the noise.
        show_progress: a progress bar, counting network calls.
        description: what the progress bar says.

    Returns:
        float32 `[N, C, H, W]` on the CPU, clamped to [-1, 1].

    Raises:
        TypeError, ValueError: for an argument outside its range, before any work.
    """
    num_images = _check.integer("num_images", num_images, low=1)
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape: expected (channels, height, width), got {tuple(shape)!r}")
    scheduler = _sampling_scheduler(scheduler, sampler)
    _check.integer("num_inference_steps", num_inference_steps, low=1, high=len(scheduler), of="the scheduler's training timesteps")
    scheduler.set_timesteps(num_inference_steps)
    timesteps = scheduler.timesteps.tolist()

    def start(rows: range, generators: list[torch.Generator]) -> Tensor:
        return _noise(shape, generators)

    return _denoise(model, scheduler, timesteps, timesteps, start, num_images, batch_size, seed, show_progress, description)


def inject_and_denoise(model: nn.Module | Callable, scheduler, images: Tensor, timestep: int, *, chains: int = 1, num_inference_steps: int | None = None,
                       sampler: str = "ddpm", batch_size: int = 64, seed: int = 0, show_progress: bool = False,
                       description: str = "reconstructing") -> Tensor:  # [M * chains, C, H, W]
    """Noises `images` to `timestep`, `x_t = alpha_t x + sigma_t eps`, and denoises them again: what has the model memorised of them?

    With every timestep `t, t-1, ..., 0` (`num_inference_steps=None`) this is the reconstruction of the SISS and ReTrack papers (t = 250).

    Args:
        model, scheduler, sampler, batch_size, seed, show_progress, description: as in `sample`.
        images: `[M, C, H, W]` in [-1, 1].
        timestep: where the noise is injected, in [0, T).
        chains: independent noises an image; chain c of image m is row `m * chains + c` of the result.
        num_inference_steps: network calls a chain, at most `timestep + 1`; None: all of them.

    Returns:
        float32 `[M * chains, C, H, W]` on the CPU, clamped to [-1, 1].

    Raises:
        TypeError, ValueError: for an argument outside its range, before any work.
    """
    images = _check.images("images", images).detach().to("cpu", torch.float32)
    _check.integer("chains", chains, low=1)
    scheduler = _sampling_scheduler(scheduler, sampler)
    timestep = _check.integer("timestep", timestep, low=0, high=len(scheduler) - 1, of="the scheduler's training timesteps")
    if num_inference_steps is None:
        num_inference_steps = timestep + 1
    _check.integer("num_inference_steps", num_inference_steps, low=1, high=timestep + 1, of="timestep + 1")
    timesteps = np.linspace(timestep, 0, num_inference_steps).round().astype(int).tolist() if num_inference_steps > 1 else [timestep]
    alpha_squared = scheduler.alphas_cumprod[timestep].item()
    if sampler == "ddpm":
        scheduler.set_timesteps(timesteps=timesteps)
        indices = timesteps
    else:
        scheduler, indices = _restricted_to(scheduler, timesteps), range(len(timesteps) - 1, -1, -1)

    def start(rows: range, generators: list[torch.Generator]) -> Tensor:
        return _noised(images[torch.tensor(rows) // chains], alpha_squared, generators)

    return _denoise(model, scheduler, timesteps, indices, start, len(images) * chains, batch_size, seed, show_progress, description)


def noised(scheduler, images: Tensor, timestep: int, *, seed: int = 0) -> Tensor:  # [M, C, H, W]
    """Where the chains of `inject_and_denoise(chains=1)` start: `x_t`, float32 on the CPU; arguments as there."""
    images = _check.images("images", images).detach().to("cpu", torch.float32)
    timestep = _check.integer("timestep", timestep, low=0, high=len(scheduler) - 1, of="the scheduler's training timesteps")
    return _noised(images, scheduler.alphas_cumprod[timestep].item(), [torch.Generator().manual_seed(sample_seed(seed, row)) for row in range(len(images))])


@contextmanager
def evaluation_mode(model: nn.Module | Callable) -> Iterator[None]:
    """Puts a module in eval mode; afterwards every submodule is in the mode it had."""
    modes = [(module, module.training) for module in model.modules()] if isinstance(model, nn.Module) else []
    for module, _ in modes:
        module.training = False
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index`. torch's CPU generator reads 32 bits of it: `seed` picks a place on that circle, and the samples follow one another."""
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return (start + index) % 2**32


def _denoise(model, scheduler, timesteps: list[int], indices, start: Callable[[range, list[torch.Generator]], Tensor], num_images: int,
             batch_size: int, seed: int, show_progress: bool, description: str) -> Tensor:
    """Runs the chain in batches; the network is told `timesteps`, the scheduler `indices`, entry by entry the same noise levels."""
    from rich.progress import Progress

    batch_size = _check.integer("batch_size", batch_size, low=1)
    _check.integer("seed", seed, low=0)
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    device, dtype = (parameters[0].device, parameters[0].dtype) if parameters else (torch.device("cpu"), torch.float32)
    memory_format = torch.channels_last if _is_channels_last(parameters) else torch.contiguous_format
    learned_variance = getattr(scheduler, "variance_type", None) in ("learned", "learned_range")
    done = []
    batches = [range(first, min(first + batch_size, num_images)) for first in range(0, num_images, batch_size)]
    with torch.inference_mode(), evaluation_mode(model), Progress(disable=not show_progress) as progress:
        task = progress.add_task(description, total=len(batches) * len(timesteps))
        for rows in batches:
            generators = [torch.Generator().manual_seed(sample_seed(seed, row)) for row in rows]
            x = start(rows, generators).to(device)
            for timestep, index in zip(timesteps, indices, strict=True):
                output = model(x.to(dtype, memory_format=memory_format), torch.full((len(rows),), timestep, device=device))
                prediction = getattr(output, "sample", output).float()
                if not learned_variance:
                    prediction = prediction[:, : x.shape[1]]
                x = scheduler.step(prediction, index, x, generator=generators, return_dict=False)[0]
                progress.advance(task)
            done.append(x.clamp(-1, 1).cpu().contiguous())
    return torch.cat(done)  # outside: an ordinary tensor, that autograd may save


def _sampling_scheduler(scheduler, sampler: str):
    _check.one_of("sampler", sampler, SAMPLERS)
    if not hasattr(scheduler, "alphas_cumprod"):
        raise TypeError(f"scheduler: expected a diffusers scheduler with alphas_cumprod, got {type(scheduler).__name__}")
    diffusers = _check.package("diffusers", f"sampler={sampler!r}")
    kind = diffusers.DDPMScheduler if sampler == "ddpm" else diffusers.DDIMScheduler
    made = kind.from_config(scheduler.config)
    made.alphas_cumprod = scheduler.alphas_cumprod.clone().cpu()
    return made


def _restricted_to(scheduler, timesteps: list[int]):
    """A DDIM scheduler whose whole training grid is `timesteps` (descending), numbered from 0.

    DDIMScheduler has no custom timesteps: its `step` goes back by `T // num_inference_steps`, always. On the restricted grid that stride
    is 1 and visits exactly the wanted noise levels (the respacing of Nichol & Dhariwal 2021).
    """
    restricted = type(scheduler).from_config(scheduler.config, num_train_timesteps=len(timesteps), timestep_spacing="leading", steps_offset=0)
    restricted.alphas_cumprod = scheduler.alphas_cumprod[torch.tensor(timesteps[::-1])]
    restricted.final_alpha_cumprod = scheduler.final_alpha_cumprod
    restricted.set_timesteps(len(timesteps))
    return restricted


def _noised(images: Tensor, alpha_squared: float, generators: list[torch.Generator]) -> Tensor:
    return math.sqrt(alpha_squared) * images + math.sqrt(1 - alpha_squared) * _noise(images.shape[1:], generators)


def _noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _is_channels_last(parameters: list[nn.Parameter]) -> bool:
    kernels = [p for p in parameters if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1]
    return bool(kernels) and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
