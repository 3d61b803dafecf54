"""Trains the diffusion model that later forgets.

AdamW with a cosine schedule and an average of the weights (EMA), resumable to the same random stream.
"""

from __future__ import annotations

import functools
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TextColumn,
    TimeRemainingColumn,
)

from ..host import atomic, check, disk
from ..host.folder_lock import locked
from ..host.store import ImageStore
from ..recipes.mnist_tshirt import Pretraining
from . import checkpoint
from .identity import check_same, described
from .run_health import WeightsNotFinite, check_finite, remedy
from .state_checks import Entry, check_keys, check_state

LOG_EVERY = 50  # steps; an entry of the log is their mean loss


def run_folder(output_dir: Path) -> Path:
    """Where the checkpoints of a pre-training go whose model goes to `output_dir`."""
    return output_dir.with_name(output_dir.name + ".run")


def _alone(train: Callable[..., Path]) -> Callable[..., Path]:
    """`train`, while no other process writes the checkpoints of the same model."""

    @functools.wraps(train)
    def train_alone(images: ImageStore, recipe: Pretraining, output_dir: Path, **options) -> Path:
        with locked(run_folder(Path(output_dir)), "pretrain"):
            return train(images, recipe, output_dir, **options)

    return train_alone


@dataclass
class _Training:
    """What training changes from step to step, and a checkpoint holds."""

    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    lr_scheduler: torch.optim.lr_scheduler.LRScheduler
    ema: Any  # diffusers' EMAModel
    running: torch.Tensor  # [], sum of the losses since the last entry of the log
    step: int = 0  # how many were taken
    log: list[dict[str, Any]] = field(default_factory=list)
    saved: Path | None = None  # the last checkpoint

    def averages(self) -> dict[str, torch.Tensor]:
        """The averages of the weights, under the names of the parameters."""
        names = (name for name, _ in self.model.named_parameters())
        return dict(zip(names, self.ema.shadow_params, strict=True))

    def states(self) -> dict[str, Any]:
        """What a checkpoint holds beside weights, averages and the state of the optimizer."""
        return {
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "running_loss": self.running,
            "random": torch.get_rng_state(),
        }


@_alone
def pretrain(
    images: ImageStore,
    recipe: Pretraining,
    output_dir: Path,
    *,
    seed: int = 0,
    resume: bool = True,
    checkpointing_steps: int = 500,
    device: torch.device | str = "cpu",
    show_progress: bool = True,
    record: dict[str, Any] | None = None,
) -> Path:
    """Trains `recipe` on `images`; `DDPMPipeline.from_pretrained` opens the folder (EMA weights).

    Every random number of step s comes from a generator seeded with `(seed, s)`, so a run that is stopped and
    resumed takes the same steps as one that is not. `pretraining.json` beside the weights records recipe,
    seed, hours and the loss curve.

    Args:
        images: of the size and channels that the network of `recipe` has.
        recipe: network, schedule, optimizer and number of steps.
        output_dir: written when all steps are taken; checkpoints go to `run_folder(output_dir)`.
        seed: of the first weights and of all random numbers of the steps.
        resume: go on from the last undamaged checkpoint, if there is one.
        checkpointing_steps: a checkpoint every so many steps, and one at the end; the last two are kept.
        device: where the network is trained.
        show_progress: a progress bar on standard output.
        record: more entries for `pretraining.json`, such as how pictures became rows.

    Returns:
        `output_dir`.

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
    output_dir = Path(output_dir)
    run_dir = run_folder(output_dir)
    scheduler = diffusers.DDPMScheduler(**recipe.scheduler)
    training = _begin(recipe, seed, device)
    run = described({"recipe": asdict(recipe), "seed": seed, "data": images.content_hash()})
    if resume:
        _resume(training, checkpoint.latest(run_dir), run, device)
    earlier_seconds = training.log[-1]["seconds"] if training.log else 0.0

    # The averages, two moments and the weights; two checkpoints are kept while the next one is written.
    model_bytes = sum(parameter.nbytes for parameter in training.model.parameters())
    disk.require(run_dir, "3 checkpoints and the model", (3 * 4 + 1) * model_bytes)

    draw = _Draws(images, recipe, scheduler, seed, device)
    started = time.perf_counter()
    training.model.train()
    with Progress(*_columns(), disable=not show_progress) as progress:
        task = progress.add_task(
            "pretraining", total=recipe.total_steps, completed=training.step, loss=float("nan")
        )
        while training.step < recipe.total_steps:
            noisy, timesteps, noise = draw(training.step)
            noisy = noisy.contiguous(memory_format=torch.channels_last)
            _take_step(training, noisy, timesteps, noise, recipe.max_grad_norm)
            last = training.step == recipe.total_steps
            if training.step % LOG_EVERY == 0 or last:
                loss = _log(training, earlier_seconds + time.perf_counter() - started)
                progress.update(task, completed=training.step, loss=loss)
            if training.step % checkpointing_steps == 0 or last:
                _save(training, run_dir, run)

    training.ema.copy_to(training.model.parameters())
    with atomic.atomic_directory(output_dir) as folder:
        diffusers.DDPMPipeline(unet=training.model.eval(), scheduler=scheduler).save_pretrained(folder)
        own = {
            "recipe": asdict(recipe),
            "seed": seed,
            "images": len(images),
            "hours": training.log[-1]["seconds"] / 3600,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "log": training.log,
        }
        (folder / "pretraining.json").write_text(json.dumps((record or {}) | own, indent=1))
    return output_dir


def _begin(recipe: Pretraining, seed: int, device: torch.device | str) -> _Training:
    """A training before its first step."""
    diffusers = check.package("diffusers", "pretrain")
    cosine_with_warmup = check.package("diffusers.optimization", "pretrain").get_cosine_schedule_with_warmup
    training_utils = check.package("diffusers.training_utils", "pretrain")
    # The weights are drawn on the CPU, so they are the same for every device.
    torch.manual_seed(seed)
    # In channels-last, in which convolutions are faster.
    model = diffusers.UNet2DModel(**recipe.unet).to(device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=recipe.lr, betas=recipe.betas, weight_decay=recipe.weight_decay, fused=True
    )
    # The decay is min(ema_decay, 1 - (1 + step)^(-3/4)): a short training is averaged over fewer steps.
    ema = training_utils.EMAModel(
        model.parameters(), decay=recipe.ema_decay, use_ema_warmup=True, inv_gamma=1.0, power=0.75
    )
    return _Training(
        model=model,
        optimizer=optimizer,
        lr_scheduler=cosine_with_warmup(optimizer, recipe.warmup_steps, recipe.total_steps),
        ema=ema,
        running=torch.zeros((), device=device),
    )


class _Draws:
    """The batch of any step: a function of seed and step, so that nothing has to be kept of it."""

    def __init__(self, images: ImageStore, recipe: Pretraining, scheduler, seed: int, device):
        self.images, self.batch_size, self.scheduler = images, recipe.batch_size, scheduler
        self.num_timesteps = len(scheduler.alphas_cumprod)
        self.seed, self.device = seed, device
        self.generator = torch.Generator(device)

    def __call__(self, step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Noisy images `[B, C, H, W]`, their timesteps int64 `[B]`, and the noise in them."""
        # The factor, 2^32 divided by the golden ratio, keeps runs of neighbouring seeds from using each
        # other's numbers a step later. torch's CPU generator reads 32 bits of what it is given.
        generator = self.generator.manual_seed((self.seed * 0x9E3779B1 + step) % 2**32)
        shape = (self.batch_size,)
        rows = torch.randint(len(self.images), shape, generator=generator, device=self.device)
        clean = self.images.rows(rows)
        noise = torch.randn(clean.shape, generator=generator, device=self.device)
        timesteps = torch.randint(self.num_timesteps, shape, generator=generator, device=self.device)
        return self.scheduler.add_noise(clean, noise, timesteps), timesteps, noise


def _take_step(
    training: _Training,
    noisy: torch.Tensor,  # [B, C, H, W]
    timesteps: torch.Tensor,  # [B]
    noise: torch.Tensor,  # [B, C, H, W]
    max_grad_norm: float,
) -> None:
    """One update by the loss of DDPM, the mean of `||eps(x_t, t) - noise||^2`; nothing is read back."""
    model = training.model
    loss = (model(noisy, timesteps).sample - noise).square().mean()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)
    training.optimizer.step()
    training.optimizer.zero_grad()
    training.lr_scheduler.step()
    training.ema.step(model.parameters())
    training.running += loss.detach()
    training.step += 1


def _log(training: _Training, seconds: float) -> float:
    """Adds an entry to the log: the mean loss since the last one, which is returned.

    Raises:
        WeightsNotFinite: it is NaN or Inf.
    """
    # As many steps as have passed since the last multiple of LOG_EVERY, before the present step.
    steps = (training.step - 1) % LOG_EVERY + 1
    mean = training.running.item() / steps
    if not math.isfinite(mean):
        text = f"step {training.step}: expected a finite mean loss, got {mean}; {remedy(training.saved)}"
        raise WeightsNotFinite(text)
    training.running.zero_()
    lr = training.lr_scheduler.get_last_lr()[0]
    training.log.append({"step": training.step, "loss": mean, "lr": lr, "seconds": seconds})
    return mean


def _columns() -> tuple[ProgressColumn, ...]:
    """What the progress bar shows."""
    return (
        TextColumn("pretraining"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.4f}"),
        TimeRemainingColumn(),
    )


def _save(training: _Training, run_dir: Path, run: dict) -> None:
    """Writes the checkpoint of the present step.

    Raises:
        WeightsNotFinite: weights or averages are NaN or Inf; nothing is written.
    """
    tensors = {"model": training.model.state_dict(), "ema": training.averages()}
    check_finite(f"step {training.step}", tensors, remedy(training.saved))
    training.saved = checkpoint.save(
        run_dir,
        training.step,
        tensors,
        {"step": training.step, "log": training.log, "run": run},
        optimizer=training.optimizer,
        model=training.model,
        states=training.states(),
        keep=2,
    )


def _resume(training: _Training, found: Path | None, run: dict, device: torch.device | str) -> None:
    """Takes over the state in the checkpoint `found`, if there is one.

    Raises:
        ValueError: it is of another run, or damaged; nothing is changed.
    """
    if found is None:
        return
    state = checkpoint.load(found)
    _check_checkpoint(state, run, training)
    model, averages = training.model, state.tensors["ema"]
    checkpoint.load_optimizer(training.optimizer, state, model)
    model.load_state_dict(state.tensors["model"])
    training.ema.shadow_params = [averages[name].to(device) for name, _ in model.named_parameters()]
    training.ema.optimization_step = training.step = state.metadata["step"]
    training.lr_scheduler.load_state_dict(state.states["lr_scheduler"])
    training.running.copy_(state.states["running_loss"])
    torch.set_rng_state(state.states["random"])
    training.log = state.metadata["log"]
    training.saved = found


def _check_checkpoint(state: checkpoint.Checkpoint, run: dict, training: _Training) -> None:
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
    # The averages have the names, shapes and dtypes of the parameters.
    model = training.model
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, own in (("model", model.state_dict()), ("ema", parameters)):
        check_state(Entry(state.path, name), state.tensors.get(name), own)
    for name, own in training.states().items():
        check_state(Entry(state.path, name), state.states.get(name), own)
