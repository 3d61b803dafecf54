"""What a checkpoint of an unlearning run holds, and how a new `Unlearner` takes it over."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..host.plain_names import plain_state
from ..methods import Method
from ..methods.registry import methods
from . import checkpoint, optimizer_state
from .identity import check_same, described
from .processes import Processes
from .run_state import part_state, parts_of, random_state, restore
from .state_checks import Entry, check_keys


def save_checkpoint(
    unlearner, output_dir: Path, processes: Processes, run: dict[str, Any], *, keep: int | None = None
) -> Path:
    """Writes everything that the next step depends on, and returns the folder.

    That is model, optimizer, what else the unlearner has (scheduler, EMA, scaler), and torch's random state,
    on which dropout depends. Process 0 writes. All have the same state but for torch's random state, of which
    each one's is kept.

    Args:
        run: the run's identity, as it was before its first step.
        keep: as in `checkpoint.save`.

    Raises:
        OtherProcessFailed: process 0 could not write.
    """
    random = processes.gather(random_state(unlearner))

    # Plain names: the network that resumes may be compiled, or wrapped, where this one is not.
    def write() -> Path:
        model = {"model": plain_state(unlearner.model)}
        metadata = {"unlearner": unlearner.state_dict(), "identity": run}
        states = {name: part_state(part, unlearner.model) for name, part in parts_of(unlearner).items()}
        states |= {"optimizer": optimizer_state.named(unlearner.optimizer, unlearner.model), "random": random}
        return checkpoint.save(output_dir, unlearner.step_index, model, metadata, states=states, keep=keep)

    return processes.by_first(write)


def load_checkpoint(unlearner, path: Path, processes: Processes, run: dict[str, Any]) -> None:
    """Puts the state of `path` into an unlearner that was built like the one that wrote it.

    Each process reads the file. The number of processes may be another: rows, timesteps and noise do not
    depend on it. Dropout does, which a warning says.

    Args:
        unlearner: one that has taken no step.
        path: the folder of a checkpoint.
        run: the identity of the run that goes on.

    Raises:
        ValueError: the checkpoint is damaged, of a run with another identity (docs/resume.md), or with other
            parts (EMA, scheduler), its state is not one that the unlearner can take, or the unlearner is not
            new. Nothing is changed then.
    """
    if unlearner.step_index != 0:
        got = f"one that has taken {unlearner.step_index} steps"
        raise ValueError(f"unlearner: expected a new one to resume into, got {got}")
    state = checkpoint.load(path)
    metadata = Entry(path, "metadata")
    check_keys(metadata, state.metadata, {"unlearner": None, "identity": None})
    saved = state.metadata["identity"]
    if not isinstance(saved, dict):
        raise metadata["identity"].error("what the run is", saved)
    saved = saved | {"method": _with_later_hyperparameters(unlearner.method, saved.get("method"))}
    # The average is compared last: one that is missing is told more plainly by the names of the parts.
    names = [name for name in dict.fromkeys([*run, *saved]) if name != "ema"]
    check_same(run, saved, names, str(path))
    parts, found = set(parts_of(unlearner)), set(state.states) - {"random", "optimizer"}
    if parts != found:
        expected = f"the state of {sorted(parts)} beside model and optimizer"
        raise ValueError(
            f"resume_from_checkpoint: expected {expected}, got that of {sorted(found)} in {path}"
        )
    check_same(run, saved, ["ema"], str(path))
    for name in ("random", "optimizer"):
        if name not in state.states:
            raise metadata["states"].error(f"a state of the name {name}", list(state.states))
    restore(unlearner, state, processes.rank)
    count = len(state.states["random"])
    if count != processes.count and processes.rank == 0:
        what = f"{path} was written by {count} processes, and {processes.count} resume it"
        warnings.warn(f"{what}: a network with dropout will not drop the same activations", stacklevel=2)


def _with_later_hyperparameters(method: Method, saved: Any) -> Any:
    """What a checkpoint says of its method, with the hyperparameters that there were not yet.

    Their defaults are what the method did before: it goes on as it was.
    """
    if not isinstance(saved, dict) or saved.get("name") != type(method).__name__:
        return saved
    record = next((each for each in methods().values() if each.method is type(method)), None)
    if record is None:
        return saved
    later = {each.name: each.default for each in record.hyperparameters() if each.name in record.later}
    return described(later) | saved


def find_checkpoint(resume: str | Path | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None: start anew.

    Raises:
        ValueError: a new run in a folder that holds checkpoints, a path that is none, or `"latest"` where all
            are damaged.
    """
    # A new run among old checkpoints would one day go on from one of theirs.
    existing = sorted(output_dir.glob(f"{checkpoint.PREFIX}*")) if output_dir.is_dir() else []
    if resume is None:
        if existing:
            got = f"{existing[0]} (resume_from_checkpoint='latest' goes on)"
            raise ValueError(f"output_dir: expected a folder without checkpoints for a new run, got {got}")
        return None
    if resume == "latest":
        found = checkpoint.latest(output_dir)
        # To start anew beside damaged checkpoints would take for lost what may be saved by hand.
        if found is None and existing:
            expected = f"an undamaged checkpoint in {output_dir}"
            raise ValueError(f"resume_from_checkpoint: expected {expected}, got {len(existing)} that are not")
        return found
    if not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: expected 'latest' or the folder of a checkpoint, got {str(resume)!r}"
        )
    return Path(resume)
