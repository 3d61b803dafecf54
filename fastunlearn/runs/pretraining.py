"""Trains the diffusion model that later forgets: AdamW, cosine schedule, EMA, resumable to the same random
stream.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..host import atomic, check
from ..host.folder_lock import locked
from ..host.store import ImageStore
from ..recipes.mnist_tshirt import Pretraining
from . import checkpoint
from .identity import check_same, described
from .run_health import WeightsNotFinite, check_finite, remedy
from .state_checks import Entry, check_keys, check_state

LOG_EVERY = 50


def run_folder(output_dir: Path) -> Path:
    """Where the checkpoints of a pre-training go whose model goes to `output_dir`."""
    return output_dir.with_name(output_dir.name + ".run")


def _alone(train: Callable[..., Path]) -> Callable[..., Path]:
    @functools.wraps(train)
    def train_alone(images: ImageStore, recipe: Pretraining, output_dir: Path, **options) -> Path:
        with locked(run_folder(Path(output_dir)), "pretrain"):
            return train(images, recipe, output_dir, **options)

    return train_alone


@_alone
def pretrain(
    images: ImageStore,
    recipe: Pretraining,
    output_dir: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    checkpointing_steps: int = 500,
    channels_last: bool = True,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
    record: dict[str, Any] | None = None,
) -> Path:
    """Trains `recipe` on `images` and writes `output_dir` as a folder that `DDPMPipeline.from_pretrained`
    opens (EMA weights).

    Every random number of step s comes from a generator seeded with `(seed, s)`, so a run that is stopped and
    resumed takes the same steps as one that is not. `pretraining.json` beside the weights records recipe,
    seed, hours and the loss curve.

    Args:
        record: more entries for `pretraining.json`, such as how pictures became rows.

    Raises:
        FolderLocked: another process, or another thread, trains the model of `output_dir`.
        WeightsNotFinite: a loss, the weights or their average are NaN or Inf; nothing of it is written.
        ImportError: the package diffusers is not installed.
        TypeError, ValueError: `seed` is no integer in [0, 2^32 - 1]: torch's CPU generator reads 32 bits.
        ValueError: the checkpoint to go on from is of a run with another recipe, seed or other images, or
            damaged.
    """
    check.integer("seed", seed, low=0, high=2**32 - 1)
    diffusers = check.package("diffusers", "pretrain")
    cosine_with_warmup = check.package("diffusers.optimization", "pretrain").get_cosine_schedule_with_warmup
    training_utils = check.package("diffusers.training_utils", "pretrain")
    output_dir = Path(output_dir)
    run_dir = run_folder(output_dir)
    torch.manual_seed(seed)
    model = diffusers.UNet2DModel(**recipe.unet).to(device)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    scheduler = diffusers.DDPMScheduler(**recipe.scheduler)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    lr_scheduler = cosine_with_warmup(optimizer, recipe.warmup_steps, recipe.total_steps)
    ema = training_utils.EMAModel(
        model.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )

    run = described({"recipe": asdict(recipe), "seed": seed, "data": images.content_hash()})
    first_step, log = 0, []
    running = torch.zeros((), device=device)  # sum of the losses since the last entry of the log
    found = saved = checkpoint.latest(run_dir) if resume else None
    if found is not None:
        state = checkpoint.load(found)
        _check_checkpoint(state, run, model, lr_scheduler, running)
        checkpoint.load_optimizer(optimizer, state, model)
        model.load_state_dict(state.tensors["model"])
        ema.shadow_params = [state.tensors["ema"][name].to(device) for name, _ in model.named_parameters()]
        ema.optimization_step = first_step = state.metadata["step"]
        lr_scheduler.load_state_dict(state.states["lr_scheduler"])
        running.copy_(state.states["running_loss"])
        torch.set_rng_state(state.states["random"])
        log = state.metadata["log"]
    earlier_seconds = log[-1]["seconds"] if log else 0.0

    def save(step: int) -> None:
        tensors = {
            "model": model.state_dict(),
            "ema": dict(zip((name for name, _ in model.named_parameters()), ema.shadow_params, strict=True)),
        }
        nonlocal saved
        check_finite(f"step {step}", tensors, remedy(saved))
        states = {
            "lr_scheduler": lr_scheduler.state_dict(),
            "running_loss": running,
            "random": torch.get_rng_state(),
        }
        metadata = {"step": step, "log": log, "run": run}
        saved = checkpoint.save(
            run_dir, step, tensors, metadata, optimizer=optimizer, model=model, states=states, keep=2
        )

    alphas_cumprod = scheduler.alphas_cumprod.to(device)
    generator = torch.Generator(device)
    started = time.perf_counter()
    model.train()
    columns = (
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, disable=not show_progress) as progress:
        task = progress.add_task(
            "pretraining", total=recipe.total_steps, completed=first_step, loss=float("nan")
        )
        for step in range(first_step, recipe.total_steps):
            # torch's CPU generator reads 32 bits of it
            generator.manual_seed((seed * 0x9E3779B1 + step) % 2**32)
            rows = torch.randint(len(images), (recipe.batch_size,), generator=generator, device=device)
            clean = images.rows(rows)
            noise = torch.randn(clean.shape, generator=generator, device=device)
            timesteps = torch.randint(
                len(alphas_cumprod), (recipe.batch_size,), generator=generator, device=device
            )
            noisy = scheduler.add_noise(clean, noise, timesteps)
            if channels_last:
                noisy = noisy.contiguous(memory_format=torch.channels_last)
            loss = (model(noisy, timesteps).sample - noise).square().mean()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            lr_scheduler.step()
            ema.step(model.parameters())
            running += loss.detach()
            done = step + 1
            if done % LOG_EVERY == 0 or done == recipe.total_steps:
                mean = running.item() / ((done - 1) % LOG_EVERY + 1)
                if not math.isfinite(mean):
                    text = f"step {done}: expected a finite mean loss, got {mean}; {remedy(saved)}"
                    raise WeightsNotFinite(text)
                running.zero_()
                log.append(
                    {
                        "step": done,
                        "loss": mean,
                        "lr": lr_scheduler.get_last_lr()[0],
                        "seconds": earlier_seconds + time.perf_counter() - started,
                    }
                )
                progress.update(task, completed=done, loss=mean)
            if done % checkpointing_steps == 0 or done == recipe.total_steps:
                save(done)

    ema.copy_to(model.parameters())
    with atomic.atomic_directory(output_dir) as folder:
        diffusers.DDPMPipeline(unet=model.eval(), scheduler=scheduler).save_pretrained(folder)
        own = {
            "recipe": asdict(recipe),
            "seed": seed,
            "images": len(images),
            "hours": log[-1]["seconds"] / 3600,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "log": log,
        }
        (folder / "pretraining.json").write_text(json.dumps((record or {}) | own, indent=1))
    return output_dir


def _check_checkpoint(
    state: checkpoint.Checkpoint, run: dict, model: torch.nn.Module, lr_scheduler, running: torch.Tensor
) -> None:
    """Whether all of `state` is of this run and fits it; nothing is changed.

    Raises:
        ValueError: naming file and entry.
    """
    metadata = Entry(state.path, "metadata")
    check_keys(metadata, state.metadata, dict.fromkeys(("step", "log", "run")))
    check_keys(metadata["run"], state.metadata["run"], run)
    check_same(run, state.metadata["run"], list(run), str(state.path))
    check_state(metadata["step_index"], state.metadata["step"], 0)
    if not isinstance(state.metadata["log"], list):
        raise metadata["log"].error("a list", state.metadata["log"])
    for index, entry in enumerate(state.metadata["log"]):
        check_state(metadata["log"][index], entry, {"step": 0, "loss": 0.0, "lr": 0.0, "seconds": 0.0})
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, own in (("model", model.state_dict()), ("ema", parameters)):
        check_state(Entry(state.path, name), state.tensors.get(name), own)
    states = {
        "lr_scheduler": lr_scheduler.state_dict(),
        "running_loss": running,
        "random": torch.get_rng_state(),
    }
    for name, own in states.items():
        check_state(Entry(state.path, name), state.states.get(name), own)
