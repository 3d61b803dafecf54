"""What a checkpoint of an unlearning run holds, and how a new `Unlearner` takes it over."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import torch

from . import checkpoint
from .processes import Processes
from .run_record import identity
from .step import unwrapped


def save_checkpoint(unlearner, output_dir: Path, processes: Processes, *, keep: int | None = None) -> Path:
    """Everything that the next step depends on: model, optimizer, and what else the unlearner has, with torch's random state (dropout).

    Process 0 writes. All have the same state but for torch's random state, of which each one's is kept.
    """
    random = processes.gather(_random_state(unlearner))

    def write() -> Path:
        states = {name: state.state_dict() for name, state in _stateful(unlearner).items()} | {"random": random}
        metadata = {"unlearner": unlearner.state_dict(), "identity": identity(unlearner)}
        model = {"model": unwrapped(unlearner.model).state_dict()}
        return checkpoint.save(output_dir, unlearner.step_index, model, metadata, optimizer=unlearner.optimizer, states=states, keep=keep)

    return processes.by_first(write)


def load_checkpoint(unlearner, path: Path, processes: Processes) -> None:
    """Puts the state of `path` into an unlearner that was built like the one that wrote it; each process reads the file.

    The number of processes may be another: rows, timesteps and noise do not depend on it. Dropout does, which a warning says.

    Raises:
        ValueError: the checkpoint is damaged, or of a run with another method, batch size, data, optimizer settings, length of a learning-rate
            schedule, or other parts (EMA, scheduler), or the unlearner is not new.
    """
    if unlearner.step_index != 0:
        raise ValueError(f"unlearner: expected a new one to resume into, got one that has taken {unlearner.step_index} steps")
    state = checkpoint.load(path)
    present = identity(unlearner)
    for name, value in state.metadata["identity"].items():
        if value != present[name]:
            raise ValueError(f"resume_from_checkpoint: expected a checkpoint of a run with {name} {present[name]}, got {value} in {path}")
    parts, saved = _stateful(unlearner), set(state.states) - {"random", "optimizer"}
    if set(parts) != saved:
        raise ValueError(f"resume_from_checkpoint: expected the state of {sorted(parts)} beside model and optimizer, got that of {sorted(saved)} in {path}")
    unlearner.load_state_dict(state.metadata["unlearner"])
    unwrapped(unlearner.model).load_state_dict(state.tensors["model"])
    checkpoint.load_optimizer(unlearner.optimizer, state)
    for name, part in parts.items():
        part.load_state_dict(state.states[name])
        if hasattr(part, "to"):  # diffusers' EMAModel takes the loaded tensors where they are
            part.to(device=_device(unlearner))
    random = state.states["random"]
    if len(random) != processes.count and processes.rank == 0:
        text = f"{path} was written by {len(random)} processes, and {processes.count} resume it: a network with dropout will not drop the same activations"
        warnings.warn(text, stacklevel=2)
    if processes.rank < len(random):
        _set_random_state(unlearner, random[processes.rank])


def _random_state(unlearner) -> dict[str, torch.Tensor]:
    """Of torch's generators on the CPU and on the model's GPU."""
    device = _device(unlearner)
    return {"cpu": torch.get_rng_state()} | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def _set_random_state(unlearner, state: dict[str, torch.Tensor]) -> None:
    device = _device(unlearner)
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _device(unlearner) -> torch.device:
    return next(unlearner.model.parameters()).device


def _stateful(unlearner) -> dict[str, Any]:
    parts = {name: getattr(unlearner, name, None) for name in ("lr_scheduler", "ema", "grad_scaler")}
    return {name: part for name, part in parts.items() if part is not None}


def find_checkpoint(resume: str | Path | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None: start anew.

    Raises:
        ValueError: a new run in a folder that holds checkpoints, a path that is none, or `"latest"` where all are damaged.
    """
    existing = sorted(output_dir.glob(f"{checkpoint.PREFIX}*")) if output_dir.is_dir() else []
    if resume is None:
        if existing:
            raise ValueError(f"output_dir: expected a folder without checkpoints for a new run, got {existing[0]} (resume_from_checkpoint='latest' goes on)")
        return None
    if resume == "latest":
        found = checkpoint.latest(output_dir)
        if found is None and existing:
            raise ValueError(f"resume_from_checkpoint: expected an undamaged checkpoint in {output_dir}, got {len(existing)} that are not")
        return found
    if not Path(resume).is_dir():
        raise ValueError(f"resume_from_checkpoint: expected 'latest' or the folder of a checkpoint, got {str(resume)!r}")
    return Path(resume)
