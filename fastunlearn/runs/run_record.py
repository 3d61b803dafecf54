"""The files of a run beside its checkpoints: `run.json`, `metrics.jsonl`, and what `purge` removes.

`run.json` says what was run, `metrics.jsonl` has one line a logged step. Neither names an image: what does
lies in the private folder (`private.py`), whose record also lists files with privacy-relevant content that
lie elsewhere (neighbour caches).
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

from ..host import disk
from ..host.atomic import atomic_file, discard, remove_leftovers, sync
from ..host.folder_lock import locked
from ..host.plain_json import read_json
from ..neighbors.nearest import CACHE_FORMAT
from . import checkpoint
from .private import LINEAGE_KEY, PRIVATE_FOLDER, RECORD, is_hash, read_private, update_private
from .selections import in_words

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LONGEST_RUN = 1e10  # seconds, of more than 300 years
FORMAT = "fastunlearn-run"
# Version 1 had seed and plain hashes in it, and the checkpoints of its run lay beside it.
VERSION = 2
COMPLETE = "complete"  # the status of a run that is finished
CACHE_NAME = re.compile(re.escape(CACHE_FORMAT) + r"-[0-9a-f]{40}\.safetensors")
# Entries of a run's record that stay as they are when the run goes on.
KEPT = ("started", "purged", "base_model", "resumed")
# What `purge` leaves of a line of metrics.jsonl: losses and norms are functions of images, weights and draws.
KEPT_METRICS = ("step", "lr", "seconds", "skipped_steps")
# What it takes from run.json, beside hashes and lists of rows.
COMPARABLE = ("seed", "forget_in_retain")
PACKAGES = ("fastunlearn", "torch", "diffusers", "accelerate", "numpy", "safetensors")


# --- run.json -----------------------------------------------------------------------------------------------


def describe_run(unlearner, arguments: dict[str, Any], run: dict[str, Any]) -> dict[str, Any]:
    """The content of a new `run.json`.

    Args:
        arguments: what `unlearn` was called with.
        run: the run's identity, in which the data stand with sizes and HMACs only.
    """
    versions = {"python": platform.python_version()}
    versions |= {name: _version(name) for name in PACKAGES}
    step = ("micro_batch_size", "max_grad_norm", "autocast_dtype")
    return {
        "format": FORMAT,
        "version": VERSION,
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


def earlier_record(run_dir: str | Path) -> dict[str, Any]:
    """What a new run takes over of one in its place that left no checkpoint."""
    try:
        record = read_run(run_dir)
    except ValueError:  # there was none
        return {}
    return {name: record[name] for name in ("purged",) if name in record}


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


def finished_run(run_dir: str | Path) -> dict[str, Any] | None:
    """`run.json` of a run that is complete; None: it is not, or there is none."""
    try:
        record = read_run(run_dir)
    except ValueError:
        return None
    return record if record.get("status") == COMPLETE else None


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
    """Notes files or folders that hold forget data, for `purge`: in the private record, since the name of a
    cache is a hash of both sets.

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
        read_run(run_dir)
        names = [*_listed(run_dir), *added]
        update_private(run_dir, private_files=list(dict.fromkeys(names)))


def _listed(run_dir: Path) -> list[str]:
    """The paths that the private record lists."""
    listed = read_private(run_dir / PRIVATE_FOLDER).get("private_files", [])
    return listed if isinstance(listed, list) else []


def take_over_private(run_dir: Path) -> None:
    """Moves the list of private files from `run.json`, where earlier versions had it, to the private record.

    Otherwise nothing would name those files once the run has another `run.json`.
    """
    try:
        listed = read_run(run_dir)["private_files"]
    except ValueError:  # there was none
        return
    if listed:
        update_private(run_dir, private_files=list(dict.fromkeys([*_listed(run_dir), *map(str, listed)])))


def remove_caches(run_dir: str | Path) -> None:
    """Removes neighbour caches and estimates from the private folder of a finished run, unless it keeps all.

    Nothing but the same run could use them.
    """
    record = finished_run(run_dir)
    if record is None or keeps_checkpoints(record):
        return
    for path in private_paths(Path(run_dir)):
        if path.suffix == ".safetensors" and path.is_file():
            path.unlink()


def keeps_checkpoints(record: dict[str, Any]) -> bool:
    """Whether the run of this `run.json` was told to keep what others remove at their end."""
    arguments = record.get("arguments")
    return isinstance(arguments, dict) and arguments.get("keep_checkpoints") is True


# --- purge --------------------------------------------------------------------------------------------------


@dataclass
class Purged:
    """What `purge` did; `str()` says it in words."""

    removed: list[Path] = field(default_factory=list)
    missing: list[Path] = field(default_factory=list)
    refused: list[tuple[Path, str]] = field(default_factory=list)  # with the reason
    unfinished: bool = False  # the run was not at its end, and cannot go on any more

    def __str__(self) -> str:
        lines = [f"removed {path}" for path in self.removed]
        lines += [f"already gone {path}" for path in self.missing]
        lines += [f"NOT removed {path}: {reason}" for path, reason in self.refused]
        if self.unfinished:
            lines.append("the run was not finished, and cannot be resumed any more")
        return "\n".join(lines) or "nothing to remove"


def purge(run_dir: str | Path) -> Purged:
    """Removes what a run keeps of its forget data, and what could confirm a candidate for them.

    That is everything in `RUN/private` but the key of the lineage (checkpoints with the optimizer's state,
    the seed, identifiers and their key, caches), checkpoints of earlier versions beside it, of which the
    newest is left with the model alone, and the neighbour caches that are listed. `run.json` may have been
    tampered with, so it only proposes: a file is removed if it really lies in `RUN/private` (symbolic links
    are not followed) or if it is a regular file that carries the name and the content marker of a neighbour
    cache, which can be computed again. Anything else is refused, stays listed, and is reported.

    `run.json` loses seeds, hashes and row numbers, `metrics.jsonl` all but step, lr, seconds and skipped
    steps. The model stays. A run that is not finished cannot be resumed any more. Deleted blocks are not
    overwritten on the disk.

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
    # A writer that was killed may have left some of it under a name that nothing lists.
    remove_leftovers(run_dir, "*")
    found = private_paths(run_dir)
    # A run that died before it wrote `run.json` may have filled its private folder, or made the key there.
    if os.path.lexists(run_dir / PRIVATE_FOLDER) and not (run_dir / RUN_FILE).exists():
        return remove_private(found, run_dir)

    record = read_run(run_dir)
    listed = [*record["private_files"], *_told_of(run_dir)]
    listed = [Path(path) for path in listed if isinstance(path, str)]
    # The record goes last: until then, a call after a kill still knows what it lists.
    paths = sorted(found + listed, key=lambda path: path.name == RECORD)
    result = remove_private(paths, run_dir)
    result.removed += _leave_the_model(run_dir)
    result.unfinished = record.get("status") != COMPLETE
    done = {"time": _now(), "removed": len(result.removed)}
    entries = {
        "private_files": [str(path) for path, _ in result.refused],
        "purged": [*_earlier_purges(record), done],
    }
    write_run(run_dir, without_identifiers(record) | entries)
    if (run_dir / METRICS_FILE).is_file():
        lines = [
            {name: value for name, value in line.items() if name in KEPT_METRICS}
            for line in read_metrics(run_dir)
        ]
        _write_lines(run_dir / METRICS_FILE, lines)
    return result


def private_paths(run_dir: Path) -> list[Path]:
    """What `purge` removes of `run_dir/private`: all but the key of the lineage; of a link itself, to say no.

    The key goes with the model, whose later runs leave out what was forgotten once.
    """
    private = run_dir / PRIVATE_FOLDER
    if private.is_symlink():
        return [private.absolute()]
    if not private.is_dir():
        return []
    return [path.absolute() for path in sorted(private.iterdir()) if path.name != LINEAGE_KEY]


def _told_of(run_dir: Path) -> list[str]:
    """What the private record lists, if it can be read; it is removed in any case."""
    try:
        return _listed(run_dir)
    except ValueError:
        return []


def _earlier_purges(record: dict[str, Any]) -> list[dict[str, Any]]:
    """When `run.json` says it was purged, without the paths that earlier versions noted."""
    purged = record.get("purged")
    if not isinstance(purged, list):
        return []
    return [{"time": entry.get("time")} for entry in purged if isinstance(entry, dict)]


def _leave_the_model(run_dir: Path) -> list[Path]:
    """Of whole checkpoints in the run folder itself, where earlier versions wrote them, the newest is left
    with its model alone; returns those that are gone.
    """
    kept, gone = False, []
    for path in reversed(checkpoint.every(run_dir)):
        kept = kept or _made_model_alone(path)
        if not checkpoint.is_model_alone(path):
            discard(path)
            gone.append(path.absolute())
    return gone


def _made_model_alone(path: Path) -> bool:
    """Whether the checkpoint `path` holds the model alone now; a damaged one cannot."""
    if checkpoint.is_model_alone(path):
        return True
    try:
        found = checkpoint.load(path)
        step = int(path.name.removeprefix(checkpoint.PREFIX))
        checkpoint.save_model(path.parent, step, found.tensors["model"], found.states.get("ema"))
    except (ValueError, KeyError):
        return False
    return True


def without_identifiers(value: Any) -> Any:
    """A value of JSON without what could be compared with a candidate: hashes, seeds and row numbers."""
    if isinstance(value, dict):
        return {
            name: without_identifiers(item)
            for name, item in value.items()
            if name not in COMPARABLE and not is_hash(item) and not _are_rows(name, item)
        }
    if isinstance(value, list):
        return [without_identifiers(item) for item in value if not is_hash(item)]
    return value


def _are_rows(name: str, value: Any) -> bool:
    """Whether they are row numbers; under the same name a number says how many there are."""
    return name == "rows" and isinstance(value, list)


def remove_private(paths: list[Path], run_dir: Path) -> Purged:
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
    if path.is_symlink():
        return "a link outside of the run's private folder: what it leads to stays"
    if not path.is_file():
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
        self.seconds = _seconds(kept[-1]) if kept else 0.0  # what the run had taken by then
        _write_lines(self.path, kept)
        # Open for the whole run: `close` closes it.
        self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115

    def append(self, record: dict[str, Any]) -> None:
        """One line more, which readers of the file see at once."""
        with disk.writing(self.path):
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()

    def sync(self) -> None:
        """To the disk: before a checkpoint is written, so that no checkpoint is ahead of its metrics."""
        sync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def read_metrics(run_dir: str | Path) -> list[dict[str, Any]]:
    """The records of `metrics.jsonl`, one dict a logged step; empty without a file."""
    path = Path(run_dir) / METRICS_FILE
    if not path.is_file():
        return []
    records: list[dict[str, Any]] = []
    for line in path.read_bytes().splitlines(keepends=True):
        # A run that was killed while it wrote leaves a line that is not whole. Nothing follows it.
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            break
        if not line.endswith(b"\n") or not isinstance(record, dict) or type(record.get("step")) is not int:
            break
        records.append(record)
    return records


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    _write_atomically(path, "".join(json.dumps(record) + "\n" for record in records))


def _seconds(record: dict[str, Any]) -> float:
    """What a run had taken by a line of its metrics; 0 where the line says nothing that could be."""
    seconds = record.get("seconds")
    is_number = isinstance(seconds, (int, float)) and 0 <= seconds <= LONGEST_RUN
    return float(seconds) if is_number else 0.0


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
