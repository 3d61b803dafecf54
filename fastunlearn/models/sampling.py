"""Sampling by diffusers' own schedulers: from noise, or from an image noised to some timestep.

The noise of sample i is a function of `(seed, i)` alone. So two models are compared on the same noise, and
the images do not depend on the batch size (up to the rounding of the network's own batched arithmetic).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from ..host import check
from ..host import finite as _finite
from .sampling_grid import injection_grid, sampling_grid

LEARNED = ("learned", "learned_range")  # variance types whose networks return 2C channels


def sample(
    model: nn.Module | Callable,
    scheduler,
    num_images: int,
    *,
    shape: tuple[int, int, int],
    num_inference_steps: int = 50,
    sampler: str = "ddpm",
    batch_size: int = 64,
    seed: int = 0,
    show_progress: bool = False,
    description: str = "sampling",
) -> Tensor:  # [N, C, H, W]
    """Images drawn from noise.

    Args:
        model: a diffusers model, or any `callable(x_t, t)` (`x_t` `[B, C, H, W]`, `t` int64 `[B]`) that
            returns a tensor, a tuple that begins with one, or an object with `.sample`. A module is put in
            eval mode meanwhile. Of 2C output channels the first C count, unless the scheduler learns the
            variance and the sampler uses one: `"ddim"` does not.
        scheduler: the diffusers scheduler of the checkpoint: its noise levels, prediction type, clipping and
            timestep spacing are used.
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
        TypeError, ValueError: for an argument outside its range, a noise level from which there is no way
            back, or weights that are not finite, before any work; for a network that returns another shape.
        NotFiniteError: a ValueError; the network returned NaN or Inf. No image of such a batch is handed out.
    """
    num_images = check.integer("num_images", num_images, low=1)
    shape = _image_shape(shape)
    scheduler, timesteps = sampling_grid(scheduler, sampler, num_inference_steps)

    def start(rows: range, generators: list[torch.Generator]) -> Tensor:
        return _noise(shape, generators)

    return _denoise(
        model,
        scheduler,
        timesteps,
        timesteps,
        start,
        num_images,
        batch_size,
        seed,
        show_progress,
        description,
    )


def check_sampling(
    model: nn.Module | Callable,
    scheduler,
    *,
    shape: tuple[int, int, int],
    num_inference_steps: int = 50,
    sampler: str = "ddpm",
) -> None:
    """Whether `sample` can finish, by its first step for one image: one network call.

    Raises:
        TypeError, ValueError: what `sample` would raise with these arguments.
    """
    shape = _image_shape(shape)
    scheduler, timesteps = sampling_grid(scheduler, sampler, num_inference_steps)

    def start(rows: range, generators: list[torch.Generator]) -> Tensor:
        return _noise(shape, generators)

    _denoise(model, scheduler, timesteps[:1], timesteps[:1], start, 1, 1, 0, False, "")


def inject_and_denoise(
    model: nn.Module | Callable,
    scheduler,
    images: Tensor,
    timestep: int,
    *,
    chains: int = 1,
    num_inference_steps: int | None = None,
    sampler: str = "ddpm",
    batch_size: int = 64,
    seed: int = 0,
    show_progress: bool = False,
    description: str = "reconstructing",
) -> Tensor:  # [M * chains, C, H, W]
    """Noises `images` to `timestep` and denoises them again: what has the model memorised of them?

    A chain starts at `x_t = alpha_t x + sigma_t eps`. With every timestep `t, t-1, ..., 0`
    (`num_inference_steps=None`) this is the reconstruction of the SISS and ReTrack papers (t = 250).

    Args:
        model, scheduler, sampler, batch_size, seed, show_progress, description: as in `sample`.
        images: `[M, C, H, W]` in [-1, 1].
        timestep: where the noise is injected, in [0, T).
        chains: independent noises an image; chain c of image m is row `m * chains + c` of the result.
        num_inference_steps: network calls a chain, at most `timestep + 1`; None: all of them.

    Returns:
        float32 `[M * chains, C, H, W]` on the CPU, clamped to [-1, 1].

    Raises:
        TypeError, ValueError, NotFiniteError: as `sample`; for images with NaN or Inf.
    """
    images = _clean_images(images)
    chains = check.integer("chains", chains, low=1)
    grid = injection_grid(scheduler, sampler, timestep, num_inference_steps)
    scheduler, timesteps, indices, alpha_squared = grid

    def start(rows: range, generators: list[torch.Generator]) -> Tensor:
        return _noised(images[torch.tensor(rows) // chains], alpha_squared, generators)

    return _denoise(
        model,
        scheduler,
        timesteps,
        indices,
        start,
        len(images) * chains,
        batch_size,
        seed,
        show_progress,
        description,
    )


def check_injection(
    model: nn.Module | Callable,
    scheduler,
    image: Tensor,
    timestep: int,
    *,
    num_inference_steps: int | None = None,
    sampler: str = "ddpm",
) -> None:
    """Whether `inject_and_denoise` can finish for `image` `[1, C, H, W]`: one network call.

    That is the first step of one chain.

    Raises:
        TypeError, ValueError: what `inject_and_denoise` would raise with these arguments.
    """
    image = _clean_images(image)
    grid = injection_grid(scheduler, sampler, timestep, num_inference_steps)
    scheduler, timesteps, indices, alpha_squared = grid

    def start(rows: range, generators: list[torch.Generator]) -> Tensor:
        return _noised(image, alpha_squared, generators)

    _denoise(model, scheduler, timesteps[:1], indices[:1], start, 1, 1, 0, False, "")


def noised(scheduler, images: Tensor, timestep: int, *, seed: int = 0) -> Tensor:  # [M, C, H, W]
    """Where the chains of `inject_and_denoise(chains=1)` start: `x_t`, float32 on the CPU.

    Arguments are as there.
    """
    images = _clean_images(images)
    timestep = check.integer(
        "timestep", timestep, low=0, high=len(scheduler) - 1, of="the scheduler's training timesteps"
    )
    alpha_squared = scheduler.alphas_cumprod[timestep].item()
    return _noised(images, alpha_squared, _generators(seed, range(len(images))))


@contextmanager
def eval_mode(model: nn.Module | Callable) -> Iterator[None]:
    """Puts a module in eval mode; afterwards every submodule is in the mode it had.

    Several threads may be inside with one module: the last to leave puts its mode back.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    # Each module is counted by itself, because two models may share some of theirs.
    with _CHANGING:
        for module in modules:
            inside, training = _EVALUATED.get(module, (0, module.training))
            _EVALUATED[module] = inside + 1, training
            module.training = False
    try:
        yield
    finally:
        with _CHANGING:
            for module in modules:
                inside, training = _EVALUATED.pop(module)
                if inside > 1:
                    _EVALUATED[module] = inside - 1, training
                else:
                    module.training = training


_CHANGING = threading.Lock()
_EVALUATED: dict[nn.Module, tuple[int, bool]] = {}  # how many are inside, and the mode that the first found


def sample_seed(seed: int, index: int) -> int:
    """Seed of sample `index`: another one for every sample."""
    # torch's CPU generator reads 32 bits of it: `seed` picks a place on that circle, and the samples follow
    # one another.
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return (start + index) % 2**32


def _denoise(
    model,
    scheduler,
    timesteps: Sequence[int],
    indices: Sequence[int],
    start: Callable[[range, list[torch.Generator]], Tensor],
    num_images: int,
    batch_size: int,
    seed: int,
    show_progress: bool,
    description: str,
) -> Tensor:
    """Runs the chains in batches.

    Args:
        timesteps: what the network is told.
        indices: what the scheduler is told, entry by entry the same noise levels.
        start: where the chains of some rows begin, `[B, C, H, W]`, by a generator of noise for each.
    """
    from rich.progress import Progress

    batch_size = check.integer("batch_size", batch_size, low=1)
    seed = check.integer("seed", seed, low=0)
    _finite.weights(model)
    device, dtype, memory_format = _home(model)
    # Only diffusers' DDPM scheduler has a variance; another one may still carry the setting in its config.
    learned_variance = vars(scheduler).get("variance_type") in LEARNED
    done = []
    firsts = range(0, num_images, batch_size)
    batches = [range(first, min(first + batch_size, num_images)) for first in firsts]
    with torch.inference_mode(), eval_mode(model), Progress(disable=not show_progress) as progress:
        task = progress.add_task(description, total=len(batches) * len(timesteps))
        for rows in batches:
            generators = _generators(seed, rows)
            x = start(rows, generators).to(device)
            finite = torch.ones(len(rows), dtype=torch.bool, device=device)
            for timestep, index in zip(timesteps, indices, strict=True):
                output = model(
                    x.to(dtype, memory_format=memory_format),
                    torch.full((len(rows),), timestep, device=device),
                )
                prediction = _prediction(output, x, learned_variance)
                # An Inf would not be seen in the end: the scheduler clips it to a plausible picture.
                finite &= _finite_rows(prediction)
                # A step back, from t to s. "ddpm" draws from the posterior q(x_s | x_t, x_0) at the predicted
                # x_0 (Ho et al. 2020, eq. 7); "ddim" goes to alpha_s x_0 + sigma_s eps (Song et al. 2021,
                # eq. 12, without noise).
                x = scheduler.step(prediction, index, x, generator=generators, return_dict=False)[0]
                progress.advance(task)
            _refuse_not_finite(finite & _finite_rows(x), rows)
            done.append(x.clamp(-1, 1).cpu().contiguous())
    # Outside of inference mode this makes an ordinary tensor, which autograd may save.
    return torch.cat(done)


def _home(model: nn.Module | Callable) -> tuple[torch.device, torch.dtype, torch.memory_format]:
    """Where a model computes, in which dtype and in which layout of its inputs, as its parameters say."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    if not parameters:
        return torch.device("cpu"), torch.float32, torch.contiguous_format
    memory_format = torch.channels_last if _is_channels_last(parameters) else torch.contiguous_format
    return parameters[0].device, parameters[0].dtype, memory_format


def _generators(seed: int, rows: Iterable[int]) -> list[torch.Generator]:
    """A generator of its own for each sample."""
    return [torch.Generator().manual_seed(sample_seed(seed, row)) for row in rows]


def _prediction(output, x: Tensor, learned_variance: bool) -> Tensor:
    """What the network returned for `x` `[B, C, H, W]`, float32, in the channels that the sampler reads.

    Those are 2C where it reads the variance, else the first C.
    """
    prediction = check.network_output(output)
    batch, channels, height, width = x.shape
    wanted = (2 * channels,) if learned_variance else (channels, 2 * channels)
    shapes = [(batch, count, height, width) for count in wanted]
    if not isinstance(prediction, Tensor) or tuple(prediction.shape) not in shapes:
        reason = " (the scheduler learns the variance)" if learned_variance else ""
        expected = " or ".join(str(list(shape)) for shape in shapes)
        raise ValueError(
            f"model: expected a prediction of shape {expected}{reason}, got {check.describe(prediction)}"
        )
    if not learned_variance:
        prediction = prediction[:, :channels]
    return prediction.float()


def _finite_rows(value: Tensor) -> Tensor:
    """bool `[B]`: which samples of `[B, ...]` are finite."""
    return torch.isfinite(value).flatten(1).all(1)


def _refuse_not_finite(finite: Tensor, rows: range) -> None:
    """Refuses the batch of samples `rows` if one of them is not `finite` `[B]`; those before it were."""
    bad = (~finite).nonzero().flatten().tolist()
    if bad:
        raise _finite.NotFiniteError(
            "samples: expected finite values from the model, "
            f"got NaN or Inf in {len(bad)} of the first {rows.stop} (first: sample {rows.start + bad[0]})"
        )


def _image_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    if len(shape) != 3 or not all(isinstance(size, int) and size > 0 for size in shape):
        raise ValueError(f"shape: expected (channels, height, width), got {tuple(shape)!r}")
    return tuple(shape)


def _clean_images(images: Tensor) -> Tensor:
    """`images` `[M, C, H, W]`, finite, in [-1, 1], float32 on the CPU."""
    return _finite.pixels("images", images).detach().to("cpu", torch.float32)


def _noised(images: Tensor, alpha_squared: float, generators: list[torch.Generator]) -> Tensor:
    """`x_t = alpha_t x + sigma_t eps`, `[B, C, H, W]`."""
    # The schedule is variance-preserving: sigma_t^2 = 1 - alpha_t^2.
    alpha, sigma = math.sqrt(alpha_squared), math.sqrt(1 - alpha_squared)
    return alpha * images + sigma * _noise(images.shape[1:], generators)


def _noise(shape: tuple[int, ...], generators: list[torch.Generator]) -> Tensor:
    """`[B, C, H, W]` from N(0, 1), a generator a row."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])


def _is_channels_last(parameters: list[nn.Parameter]) -> bool:
    """Whether the kernels of the convolutions are laid out so."""
    # Kernels of one input channel, or of one pixel, are the same in both layouts, and say nothing.
    kernels = [p for p in parameters if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] * p.shape[3] > 1]
    return bool(kernels) and all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
