"""Checkpoints that survive a kill at any moment: written aside, fsynced, renamed.

A run folder holds `checkpoint-<step>/`, each with `manifest.json` (file name -> SHA-256), `metadata.json` and
some `.safetensors`; nothing is pickled. What holds:

- `checkpoint-<step>` is absent or complete, whatever moment the writing process dies at (power loss included,
  as far as the disk honours fsync).
- Replacing an existing folder exchanges the two names in one system call where the system can (Linux, on all
  its usual file systems): a reader finds the old folder or the new one, never neither. Elsewhere two renames
  follow each other: a reader may miss the folder for the instant between them and finds it on a retry; if the
  writer dies in that instant, the next `latest` or write puts the old folder back.
- A run folder has one writer at a time. Its leftovers (`.NAME.PID-TOKEN.tmp`) are removed by the next write
  after it has died.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..host import check, disk
from ..host.atomic import atomic_directory, discard, remove_leftovers, restore_displaced
from ..host.plain_json import read_json
from . import optimizer_state
from .state_checks import Entry
from .state_tree import flatten, unflatten

MANIFEST = "manifest.json"
METADATA = "metadata.json"
PREFIX = "checkpoint-"
# Format 1 had no number. It kept the optimizer's state by position, weights by wrapped names, and nothing
# about model, schedule and precision.
FORMAT_VERSION = 2


@dataclass
class Checkpoint:
    """What `load` has read."""

    tensors: dict[str, dict[str, Tensor]]  # file stem -> name -> tensor, on the CPU
    metadata: dict[str, Any]
    states: dict[str, Any]  # name -> state_dict(), as it was given to `save`
    path: Path = Path()  # where it was read


def save(
    run_dir: str | Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    metadata: dict[str, Any],
    *,
    optimizer: torch.optim.Optimizer | None = None,
    model: nn.Module | None = None,
    states: dict[str, Any] | None = None,
    keep: int | None = None,
    private: bool = True,
) -> Path:
    """Writes `run_dir/checkpoint-<step>` and returns its path; an existing one is replaced.

    Args:
        tensors: for each file stem (`"model"` gives `model.safetensors`) a state dict of tensors, on any
            device.
        metadata: anything JSON can hold.
        optimizer: any `torch.optim` optimizer; `load_optimizer` reads it back.
        model: the network whose parameters `optimizer` trains. Its state is then kept under their plain names
            (without wrappers such as `torch.compile`'s); without `model`, under their positions.
        states: for each name a `state_dict()` of anything else (learning-rate scheduler, EMA, gradient
            scaler, ...): nested dicts, lists and tuples of tensors, numbers, strings, booleans and None.
        keep: afterwards, remove the oldest checkpoints beyond this many (diffusers'
            `checkpoints_total_limit`); at least 1.
        private: nobody but its owner may read it (0700, its files 0600). An optimizer's moments are gradients
            on the images of the last steps.

    Raises:
        TypeError: a state or `tensors` hold something else; nothing is written.
        ValueError: `optimizer` trains a parameter that is none of `model`.
        OSError: the disk does not take it; nothing is changed.
    """
    step = check.integer("step", step, low=0)
    if keep is not None:
        keep = check.integer("keep", keep, low=1)
    run_dir = Path(run_dir)
    states = dict(states or {})
    if optimizer is not None:
        states["optimizer"] = optimizer_state.named(optimizer, model)
    # Everything that can be refused is refused before the first byte is written.
    files, skeletons = dict(tensors), {}
    for name, state in states.items():
        if name in files:
            raise ValueError(f"states: expected names other than those of tensors, got {name!r} in both")
        skeletons[name], found = flatten(state, name)
        if found:
            files[name] = found
    content = {"version": FORMAT_VERSION, "metadata": metadata, "states": skeletons}
    text = json.dumps(content, indent=1)

    clean(run_dir)
    found = (tensor for named in files.values() for tensor in named.values())
    size = len(text) + sum(tensor.nbytes for tensor in found if isinstance(tensor, Tensor))
    disk.require(run_dir / f"{PREFIX}{step}", "a checkpoint", size)
    with atomic_directory(run_dir / f"{PREFIX}{step}", private=private) as folder:
        for stem, named in files.items():
            save_file(_owned(named), folder / f"{stem}.safetensors")
        (folder / METADATA).write_text(text)
        # The manifest goes last, over all other files.
        manifest = {file.name: _sha256(file) for file in sorted(folder.iterdir())}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1))
    if keep is not None:
        _discard_all_but(keep, step, run_dir)
    return run_dir / f"{PREFIX}{step}"


def load(path: str | Path) -> Checkpoint:
    """Reads a checkpoint after every file has been compared with the manifest.

    Raises:
        ValueError: naming the file: it is not a checkpoint, or one of another version of the format, or a
            file is missing or does not have the hash that the manifest gives.
    """
    path = Path(path)
    names = verify(path)
    with _readable(path / METADATA):
        content = read_json(path / METADATA)
        _check_version(content)
        metadata, skeletons = content["metadata"], dict(content["states"])
    tensors = {}
    for name in names:
        if name.endswith(".safetensors"):
            with _readable(path / name):
                tensors[Path(name).stem] = _aligned(load_file(path / name))
    # Tensors of a state lie in the file of its name; what is left are the tensors that `save` was given.
    states = {}
    for name, skeleton in skeletons.items():
        with _readable(path / METADATA):
            states[name] = unflatten(skeleton, tensors.pop(name, {}))
    return Checkpoint(tensors, metadata, states, path)


@contextmanager
def _readable(file: Path) -> Iterator[None]:
    """Names `file` in the error of a block that reads it."""
    try:
        yield
    except Exception as error:  # whatever a file of another kind makes json, safetensors and torch raise
        said = check.in_a_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{file}: not a checkpoint of this version of fastunlearn ({said})") from error


def _check_version(content: dict[str, Any]) -> None:
    """That this version of the package can go on with a checkpoint of that format."""
    version = content.get("version", 1)
    if version == 1:
        raise ValueError(
            f"expected format {FORMAT_VERSION}, got format 1, which lacks the names of the optimizer's "
            "parameters and the start weights, schedule and precision of the run; the fastunlearn that wrote "
            "it can go on with it"
        )
    if version != FORMAT_VERSION or isinstance(version, bool):
        raise ValueError(f"expected format {FORMAT_VERSION}, got format {version!r}")


def verify(path: str | Path) -> list[str]:
    """The names of a checkpoint's files, once each has the SHA-256 that the manifest gives.

    Raises:
        ValueError: naming the file that is missing, damaged or out of place.
    """
    path = Path(path)
    try:
        manifest = read_json(path / MANIFEST)
    except ValueError as error:
        expected = f"expected a checkpoint folder with a readable {MANIFEST}"
        raise ValueError(f"{path}: {expected}, got {error}") from None
    if not isinstance(manifest, dict) or METADATA not in manifest:
        raise ValueError(f"{path / MANIFEST}: expected file names and hashes, {METADATA} among them")
    # A manifest that was tampered with must not lead out of the folder.
    for name, expected in manifest.items():
        if not check.is_file_name(name):
            got = check.in_a_line(repr(name))
            raise ValueError(f"{path / MANIFEST}: expected plain file names, got {got}")
        if not (path / name).is_file() or _sha256(path / name) != expected:
            raise ValueError(f"{path / name}: missing or damaged (its SHA-256 is not the manifest's)")
    # Whole, and still nothing that could be read: an older checkpoint serves better.
    try:
        read_json(path / METADATA)
    except ValueError as error:
        raise ValueError(
            f"{path / METADATA}: expected what a checkpoint says of itself, got {error}"
        ) from None
    return list(manifest)


def latest(run_dir: str | Path) -> Path | None:
    """The newest undamaged checkpoint below `run_dir`, or None; a warning names damaged newer ones."""
    run_dir = Path(run_dir)
    restore_displaced(run_dir, f"{PREFIX}*")
    # What lies beyond the newest whole one is lost: the run takes those steps again, and writes over it.
    for step in reversed(_steps(run_dir, whole=False)):
        path = run_dir / f"{PREFIX}{step}"
        try:
            verify(path)
        except ValueError as error:
            warnings.warn(f"damaged checkpoint passed over: {error}", stacklevel=2)
        else:
            return path
    return None


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: Checkpoint, model: nn.Module | None = None
) -> None:
    """Puts the optimizer state of `state` into `optimizer`: each parameter gets what was kept under its name.

    Args:
        model: as in `save`.

    Raises:
        ValueError: naming file and entry: the state is not that of these parameters. `optimizer` is as it
            was.
    """
    place = Entry(state.path, "optimizer")
    if "optimizer" not in state.states:
        raise place.error("the state of an optimizer", None)
    optimizer_state.load(
        optimizer, optimizer_state.checked(optimizer, model, state.states["optimizer"], place)
    )


def every(run_dir: str | Path) -> list[Path]:
    """What has the name of a checkpoint below `run_dir`, the oldest first."""
    run_dir = Path(run_dir)
    return [run_dir / f"{PREFIX}{step}" for step in _steps(run_dir, whole=False)]


def save_model(
    run_dir: str | Path, step: int, model: dict[str, Tensor], average: dict[str, Any] | None
) -> Path:
    """Writes `run_dir/checkpoint-<step>` as a finished run leaves it: for everybody, and with nothing but the
    network and, where there is one, the state of its average. No run goes on from it.
    """
    states = {} if average is None else {"ema": average}
    return save(run_dir, step, {"model": model}, {"step": step}, states=states, private=False)


def is_model_alone(path: str | Path) -> bool:
    """Whether the folder `path` is what `save_model` writes."""
    files = {file.name for file in Path(path).iterdir()} if Path(path).is_dir() else set()
    if not files <= {"model.safetensors", "ema.safetensors", METADATA, MANIFEST}:
        return False
    try:
        content = read_json(Path(path) / METADATA)
    except ValueError:
        return False
    about = content.get("metadata") if isinstance(content, dict) else None
    return isinstance(about, dict) and set(about) == {"step"}


def clean(run_dir: str | Path) -> None:
    """Removes what a killed writer of `run_dir` left beside its checkpoints; every `save` begins with it."""
    remove_leftovers(Path(run_dir), f"{PREFIX}*")


def _discard_all_but(keep: int, step: int, run_dir: Path) -> None:
    """Removes checkpoints until `keep` are left, that of `step` among them."""
    others = [other for other in _steps(run_dir) if other != step]
    # Those beyond `step` go first: the run was taken up before them, so they are given up or damaged. Then
    # the oldest.
    beyond = [other for other in others if other > step]
    before = [other for other in others if other < step]
    too_many = max(0, len(others) - (keep - 1))
    for stale in (beyond + before)[:too_many]:
        discard(run_dir / f"{PREFIX}{stale}")


def _owned(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no memory, as safetensors wants them."""
    # Tied weights share memory; so does a view with the larger tensor it was cut out of.
    seen: set[int] = set()
    result = {}
    for name, tensor in named.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name}: expected a tensor in a state dict, got {check.describe(tensor)}")
        tensor = tensor.detach().cpu().contiguous()
        storage = tensor.untyped_storage()
        if storage.data_ptr() in seen or storage.nbytes() != tensor.nbytes:
            tensor = tensor.clone()
        seen.add(tensor.untyped_storage().data_ptr())
        result[name] = tensor
    return result


def _aligned(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies with the alignment of fresh tensors; floats that torch does not compute with are refused."""
    # In a file tensors start anywhere, and BLAS sums in another order there: LBFGS, resumed, would not end
    # with the bits of a run that was never stopped.
    return {name: check.wide_enough(name, tensor).clone() for name, tensor in named.items()}


def _steps(run_dir: Path, *, whole: bool = True) -> list[int]:
    """The steps of the checkpoints below `run_dir`, the oldest first; without `whole` also of what only has
    the name of one.
    """
    found = run_dir.glob(f"{PREFIX}*")
    if whole:
        found = [folder for folder in found if (folder / MANIFEST).is_file()]
    names = [folder.name.removeprefix(PREFIX) for folder in found]
    # As `save` writes them: neither `checkpoint-007` nor `checkpoint-²`, which is a digit to Python.
    return sorted(int(name) for name in names if re.fullmatch("0|[1-9][0-9]{0,17}", name))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
