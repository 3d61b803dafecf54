"""The files of a run beside its checkpoints: `run.json`, `metrics.jsonl`, and what `purge` removes.

`run.json` says what was run, `metrics.jsonl` has one line a logged step. Files with privacy-relevant content
(neighbour caches, stores with forget rows) are listed in `run.json` under `private_files`.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..host.atomic import atomic_file
from ..host.folder_lock import locked
from ..host.plain_json import read_json
from ..neighbors.nearest import CACHE_FORMAT
from .selections import in_words

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PRIVATE_FOLDER = "private"  # inside a run folder: everything in it may be removed by `purge`
FORMAT = "fastunlearn-run"
CACHE_NAME = re.compile(re.escape(CACHE_FORMAT) + r"-[0-9a-f]{40}\.safetensors")
# Entries of a run's record that stay as they are when the run goes on.
KEPT = ("started", "private_files", "purged", "base_model", "resumed")
PACKAGES = ("fastunlearn", "torch", "diffusers", "accelerate", "numpy", "safetensors")


# --- run.json -----------------------------------------------------------------------------------------------


def describe_run(unlearner, arguments: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The content of a new `run.json`.

    Args:
        arguments: what `unlearn` was called with.
        run: the run's identity, in which the data stand with sizes and hashes only.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    step = ("micro_batch_size", "max_grad_norm", "autocast_dtype")
    return {
        "format": FORMAT,
        "version": 1,
        "status": "running",
        "started": _now(),
        "versions": versions,
        "platform": platform.platform(),
        "arguments": {name: _plain(value) for name, value in arguments.items()},
        **run,
        "selection": in_words(unlearner),
        "num_processes": unlearner.num_processes,
        "step": {name: _plain(getattr(unlearner, name, None)) for name in step},
        "private_files": [],
    }


def _plain(value: Any) -> int | float | str | bool | None:
    """`value`, or, where JSON does not know it (a path, a dtype, a function), how Python shows it."""
    if isinstance(value, (int, float, str, bool, type(None))):
        return value
    return repr(value)


def resumed_record(run_dir: str | Path, record: dict[str, Any], step: int) -> dict[str, Any]:
    """`record` for a run that goes on at `step`, with what `run.json` says of its beginning, if anything."""
    if not (Path(run_dir) / RUN_FILE).exists():
        return record
    kept = {name: value for name, value in read_run(run_dir).items() if name in KEPT}
    named = {name: record[name] for name in ("versions", "base_model") if name in record}
    resumed = {"time": _now(), "step": step} | named
    earlier = kept.get("resumed")
    if not isinstance(earlier, list):
        earlier = []
    return record | kept | {"resumed": [*earlier, resumed]}


def private_record(run_dir: str | Path) -> dict[str, Any]:
    """What a run that left no checkpoint said of its private files.

    A new run in its place takes this over: otherwise nothing would name those files any more.
    """
    try:
        record = read_run(run_dir)
    except ValueError:  # there was none
        return {}
    return {name: record[name] for name in ("private_files", "purged") if name in record}


def read_run(run_dir: str | Path) -> dict[str, Any]:
    """`run.json` of a run folder.

    Raises:
        ValueError: there is none, or it is no run record.
    """
    path = Path(run_dir) / RUN_FILE
    try:
        record = read_json(path)
    except ValueError as error:
        expected = f"expected a run folder with a readable {RUN_FILE}"
        raise ValueError(f"run_dir: {expected}, got {path}: {error}") from None
    is_record = isinstance(record, dict) and record.get("format") == FORMAT
    if not is_record or not isinstance(record.get("private_files"), list):
        raise ValueError(f"run_dir: expected {path} to be a {FORMAT} record with a list of private_files")
    return record


def update_run(run_dir: str | Path, **entries: Any) -> None:
    """Replaces entries of `run.json`.

    Raises:
        FolderLocked: another process, or another thread, writes to `run_dir`.
    """
    with locked(run_dir, "run.json"):
        write_run(run_dir, read_run(run_dir) | entries)


def write_run(run_dir: str | Path, record: dict[str, Any]) -> None:
    """Replaces `run.json` as a whole."""
    _write_atomically(Path(run_dir) / RUN_FILE, json.dumps(record, indent=1) + "\n")


def list_private(run_dir: str | Path, *paths: str | Path) -> None:
    """Notes files or folders that hold forget data, for `purge`.

    Args:
        paths: below `RUN/private`, or neighbour caches anywhere.

    Raises:
        ValueError: a path that `purge` would refuse to remove.
        FolderLocked: another process, or another thread, writes to `run_dir`.
    """
    run_dir = Path(run_dir)
    for path in map(Path, paths):
        reason = _refusal(path, run_dir)
        if reason is not None:
            expected = f"files in {run_dir / PRIVATE_FOLDER} or neighbour caches"
            raise ValueError(f"paths: expected {expected}, got {path} ({reason})")
    added = [str(Path(path).absolute()) for path in paths]
    with locked(run_dir, "run.json"):
        record = read_run(run_dir)
        names = [*record["private_files"], *added]
        write_run(run_dir, record | {"private_files": list(dict.fromkeys(names))})


# --- purge --------------------------------------------------------------------------------------------------


@dataclass
class Purged:
    """What `purge` did; `str()` says it in words."""

    removed: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)  # with the reason

    def __str__(self) -> str:
        lines = [f"removed {path}" for path in self.removed]
        lines += [f"already gone {path}" for path in self.missing]
        lines += [f"NOT removed {path}: {reason}" for path, reason in self.refused]
        return "\n".join(lines) or "nothing to remove"


def purge(run_dir: str | Path) -> Purged:
    """Removes what a run keeps of its forget data.

    That is everything in `RUN/private`, and the neighbour caches that `run.json` lists. `run.json` may have
    been tampered with, so it only proposes: a file is removed if it really lies in `RUN/private` (symbolic
    links are not followed) or if it is a regular file that carries the name and the content marker of a
    neighbour cache, which can be computed again. Anything else is refused, stays listed, and is reported.
    Checkpoints and metrics stay. Deleted blocks are not overwritten on the disk.

    Raises:
        ValueError: `run_dir` has no readable `run.json`, nor a private folder of a run that died before it
            wrote one.
        FolderLocked: the run goes on, or another one does in its place: it would bring back what is removed.
    """
    if not Path(run_dir).is_dir():
        read_run(run_dir)  # says so
    with locked(run_dir, "purge"):
        return _purge(Path(run_dir))


def _purge(run_dir: Path) -> Purged:
    private = run_dir / PRIVATE_FOLDER
    has_private = private.is_dir() and not private.is_symlink()
    found = sorted(private.iterdir()) if has_private else []
    # A run that died before it wrote `run.json` may have filled its private folder.
    if has_private and not (run_dir / RUN_FILE).exists():
        return _removed([path.absolute() for path in found], run_dir)

    record = read_run(run_dir)
    listed = [Path(path) for path in record["private_files"] if isinstance(path, str)]
    result = _removed([path.absolute() for path in found] + listed, run_dir)
    done = {"time": _now(), "removed": [str(path) for path in result.removed]}
    entries = {
        "private_files": [str(path) for path, _ in result.refused],
        "purged": [*record.get("purged", []), done],
    }
    write_run(run_dir, record | entries)
    return result


def _removed(paths: list[Path], run_dir: Path) -> Purged:
    """What has become of `paths`, each of which is removed if `purge` may."""
    result = Purged()
    for path in dict.fromkeys(paths):
        # What lies in a folder that was removed is gone with it.
        if path in result.removed or any(parent in result.removed for parent in path.parents):
            continue
        if not os.path.lexists(path):
            result.missing.append(path)
            continue
        reason = _refusal(path, run_dir)
        if reason is not None:
            result.refused.append((path, reason))
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)  # does not follow links inside
        else:
            path.unlink()
        result.removed.append(path)
    return result


def _refusal(path: Path, run_dir: Path) -> str | None:
    """Why `purge` does not remove `path`; None if it may."""
    private = run_dir / PRIVATE_FOLDER
    # Where the entry itself lies: links on the way to it are followed, one that it is itself is not.
    real = path.parent.resolve() / path.name
    is_entry = path.name not in ("", "..")
    if is_entry and not private.is_symlink() and private.resolve() in real.parents:
        return None
    # Outside of the private folder only what is certainly a neighbour cache, by name and by content.
    if path.is_symlink() or not path.is_file():
        return "neither in the run's private folder nor a regular file"
    if not CACHE_NAME.fullmatch(path.name):
        return "neither in the run's private folder nor named like a neighbour cache"
    try:
        with safe_open(path, framework="pt") as file:
            marked = (file.metadata() or {}).get("format") == CACHE_FORMAT
    except (SafetensorError, OSError):
        marked = False
    if not marked:
        return "does not carry the marker of a neighbour cache"
    return None


# --- metrics.jsonl ------------------------------------------------------------------------------------------


class Metrics:
    """Appends to `metrics.jsonl`.

    Opening it for a run that stands at `step` drops the lines beyond, and a line that was cut off.
    """

    def __init__(self, run_dir: str | Path, step: int):
        self.path = Path(run_dir) / METRICS_FILE
        kept = []
        if step > 0:
            kept = [record for record in read_metrics(run_dir) if record["step"] <= step]
        self.seconds: float = kept[-1]["seconds"] if kept else 0.0  # what the run had taken by then
        _write_atomically(self.path, "".join(json.dumps(record) + "\n" for record in kept))
        # Open for the whole run: `close` closes it.
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, record: dict[str, Any]) -> None:
        """One line more, which readers of the file see at once."""
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def sync(self) -> None:
        """To the disk: before a checkpoint is written, so that no checkpoint is ahead of its metrics."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, one dict a logged step; empty without a file."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        # A run that was killed while it wrote leaves a line that is not whole. Nothing follows it.
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith("\n") or not isinstance(record, dict) or "step" not in record:
            break
        records.append(record)
    return records


def _write_atomically(path: Path, text: str) -> None:
    with atomic_file(path) as file:
        file.write(text.encode())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:  # run from a source tree
        return None


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")
