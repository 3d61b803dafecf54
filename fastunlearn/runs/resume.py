"""What a checkpoint of an unlearning run holds, and how a new `Unlearner` takes it over."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

from ..host.atomic import discard
from ..host.plain_names import plain_state
from ..methods import Method
from ..methods.registry import methods
from . import checkpoint, optimizer_state
from .identity import check_same, described
from .private import (
    PRIVATE_FOLDER,
    RECORD,
    key_check,
    key_in,
    keyed,
    private_folder,
    read_private,
    update_private,
)
from .processes import Processes
from .run_record import finished_run, keeps_checkpoints, read_run
from .run_state import part_state, parts_of, random_state, restore
from .state_checks import Entry, check_keys

NOTHING_LEFT = "is complete, nothing is left to do (its settings were not compared)"


def save_checkpoint(
    unlearner, output_dir: Path, processes: Processes, run: dict[str, Any], *, keep: int | None = None
) -> Path:
    """Writes everything that the next step depends on into the private folder, and returns its folder there.

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
        folder = private_folder(output_dir)
        key = key_in(folder) or update_private(output_dir)["identifiers_key"]
        metadata = {"unlearner": unlearner.state_dict(), "identity": keyed(run, key), "key": key_check(key)}
        states = {name: part_state(part, unlearner.model) for name, part in parts_of(unlearner).items()}
        states |= {"optimizer": optimizer_state.named(unlearner.optimizer, unlearner.model), "random": random}
        return checkpoint.save(folder, unlearner.step_index, model, metadata, states=states, keep=keep)

    return processes.by_first(write)


def save_model(unlearner, output_dir: Path) -> Path:
    """Writes what a finished run leaves, `output_dir/checkpoint-<step>`: the network alone, and its average
    if there is one. No run goes on from it.
    """
    average = parts_of(unlearner).get("ema")
    if average is not None:
        average = part_state(average, unlearner.model)
    return checkpoint.save_model(output_dir, unlearner.step_index, plain_state(unlearner.model), average)


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
            parts (EMA, scheduler), it holds the model alone, the key of its identifiers is not beside it, its
            state is not one that the unlearner can take, or the unlearner is not
            new. Nothing is changed then.
    """
    if unlearner.step_index != 0:
        got = f"one that has taken {unlearner.step_index} steps"
        raise ValueError(f"unlearner: expected a new one to resume into, got {got}")
    state = checkpoint.load(path)
    metadata = Entry(path, "metadata")
    if checkpoint.is_model_alone(path):
        expected = "expected a checkpoint of a run that is not finished"
        raise ValueError(f"resume_from_checkpoint: {expected}, got {path}, which holds the model alone")
    # Earlier versions had plain hashes in it, and no key.
    has_key = isinstance(state.metadata, dict) and "key" in state.metadata
    check_keys(metadata, state.metadata, dict.fromkeys(("unlearner", "identity", *["key"] * has_key)))
    saved = state.metadata["identity"]
    if not isinstance(saved, dict):
        raise metadata["identity"].error("what the run is", saved)
    if has_key:
        run = keyed(run, _key_of(path, state.metadata["key"]))
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


def _key_of(path: Path, told: Any) -> str:
    """The key of the identifiers in a checkpoint, which lies in the record beside it.

    Raises:
        ValueError: it does not: nobody can tell whether the checkpoint is of the run that goes on.
    """
    key = key_in(path.parent)
    if key is None or key_check(key) != told:
        expected = f"the key of the identifiers in {path}, which is kept in {RECORD} beside it"
        got = "no such file" if key is None else "another key there"
        raise ValueError(f"resume_from_checkpoint: expected {expected}, got {got}")
    return key


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


def is_finished(resume: str | Path | None, output_dir: Path, num_steps: int) -> bool:
    """Whether the run in `output_dir` is complete, so that nothing is left to do.

    Raises:
        ValueError: it is, and a new run was asked for, or one of another length.
    """
    record = finished_run(output_dir)
    if record is None:
        return False
    if resume is None or not _lies_in(resume, output_dir):
        expected = "a folder without a finished run for a new one"
        raise ValueError(f"output_dir: expected {expected}, got {output_dir}, whose run.json says complete")
    # Earlier versions noted the end before the model was written: such a run ends once more.
    saved = [*checkpoint.every(output_dir), *checkpoint.every(output_dir / PRIVATE_FOLDER)]
    whole = [path for path in saved if not checkpoint.is_model_alone(path)]
    if record.get("version") == 1 and whole:
        return False
    if record.get("steps") != num_steps:
        expected = f"the {record.get('steps')} steps of the finished run in {output_dir}"
        raise ValueError(f"num_steps: expected {expected}, which cannot go on, got {num_steps}")
    return True


def _lies_in(resume: str | Path, output_dir: Path) -> bool:
    """Whether what is to be resumed is the run in `output_dir` itself, and no other one."""
    own = [place.resolve() for place in (output_dir, output_dir / PRIVATE_FOLDER)]
    return resume == "latest" or Path(resume).resolve().parent in own


def kept_seed(resume: str | Path | None, output_dir: Path) -> int | None:
    """The seed of the run that `resume_from_checkpoint` goes on with; None: it begins anew."""
    if resume is None:
        return None
    folder = output_dir / PRIVATE_FOLDER if resume == "latest" else Path(resume).parent
    seed = read_private(folder).get("seed")
    if seed is not None:
        return seed
    # Earlier versions had it in `run.json`, beside the checkpoints.
    try:
        return read_run(output_dir if resume == "latest" else folder).get("seed")
    except ValueError:
        return None


def find_checkpoint(resume: str | Path | None, output_dir: Path) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` means; None: start anew.

    Raises:
        ValueError: a new run in a folder that holds checkpoints, a path that is none, or `"latest"` where all
            are damaged.
    """
    private = output_dir / PRIVATE_FOLDER
    # A new run among old checkpoints would one day go on from one of theirs.
    places = [place for place in (private, output_dir) if place.is_dir()]
    existing = [path for place in places for path in sorted(place.glob(f"{checkpoint.PREFIX}*"))]
    if resume is None:
        if existing:
            got = f"{existing[0]} (resume_from_checkpoint='latest' goes on)"
            raise ValueError(f"output_dir: expected a folder without checkpoints for a new run, got {got}")
        return None
    if resume == "latest":
        found = checkpoint.latest(private)
        if found is None:
            found = _of_earlier_versions(output_dir, private)
        # To start anew beside damaged checkpoints would take for lost what may be saved by hand.
        if found is None and existing:
            expected = f"an undamaged checkpoint in {private}"
            raise ValueError(f"resume_from_checkpoint: expected {expected}, got {len(existing)} that are not")
        return found
    if not Path(resume).is_dir():
        raise ValueError(
            f"resume_from_checkpoint: expected 'latest' or the folder of a checkpoint, got {str(resume)!r}"
        )
    return Path(resume)


def _of_earlier_versions(output_dir: Path, private: Path) -> Path | None:
    """The newest checkpoint of a run that has them beside `run.json`, where they lay once.

    They are moved into the private folder, all of them: optimizer states among them.
    """
    found = checkpoint.latest(output_dir)
    if found is None:
        return None
    private_folder(output_dir)
    # The newest first: a kill in between must not make an older one the newest that is found.
    for path in reversed(checkpoint.every(output_dir)):
        os.replace(path, private / path.name)
    print(f"going on from {found.name}; checkpoints of this version lie in {private}", file=sys.stderr)
    return private / found.name


def tidy(output_dir: Path) -> Path | None:
    """Removes the checkpoints of a finished run, unless it keeps them; those of earlier versions, too.

    Returns:
        That which stays, by what `run.json` says.
    """
    record = finished_run(output_dir)
    if record is None:
        return None
    name = record.get("checkpoint")
    left = output_dir / name if isinstance(name, str) else None
    if keeps_checkpoints(record):
        return left
    for place in (output_dir / PRIVATE_FOLDER, output_dir):
        if place.is_dir() and not place.is_symlink():
            for path in checkpoint.every(place):
                if path != left:
                    discard(path)
            checkpoint.clean(place)
    return left
