"""Forgetting request by request, as the papers' tables do: each from the original, or one after another.

`separate`: every request begins with the original network, and numbers are averaged over the requests.
`continual`: every request begins with the network that the last one left, and whatever was forgotten before
is measured again after each. A request is a run of its own (`training.unlearn`) in a folder of its own, with
an optimizer, a scheduler and an average that begin anew.

`protocol.json` says what was asked, and has the numbers of each network as soon as they are there. A request
is done when its numbers stand in it: a protocol that was killed goes on after those, and with the last
checkpoint of the one that it was in. It names no image; its private folder has the seeds, and the key of its
identifiers.
"""

from __future__ import annotations

import gc
import json
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..host import check
from ..host.atomic import atomic_file
from ..host.folder_lock import locked
from ..host.plain_json import read_json
from ..host.store import ImageStore, overlap
from ..metrics.deletion import Measures
from ..step.trained import unwrapped
from . import training
from .identity import check_same, described, start_weights, weights_of
from .identity import identity as describe_identity
from .private import PRIVATE_FOLDER, keyed, read_private, update_private
from .processes import Processes
from .resume import NOTHING_LEFT, tidy
from .run_record import (
    COMPLETE,
    Purged,
    finished_run,
    private_paths,
    purge,
    read_run,
    remove_private,
    update_run,
    without_identifiers,
)
from .signals import OutOfTime, RunInterrupted, raised_at_once
from .time_limit import TimeLimit, parse_time

PROTOCOLS = ("separate", "continual")
FILE = "protocol.json"
FORMAT = "fastunlearn-protocol"
FOLDER = "request-"
# What of the identity of a run is each request's own affair; of the data only the images to keep are shared.
OF_ONE_REQUEST = ("seed", "data", "neighbors", "reference_model", "rules")
# What makes two protocols the same, of what `protocol.json` begins with.
DECISIVE = ("protocol", "num_steps", "images_per_request", "forget", "measured")
# Version 1 had seeds and plain hashes in it.
VERSION = 2


@dataclass(frozen=True)
class Request:
    """One deletion.

    Attributes:
        number: from 1.
        rows: of the forget set.
        forget: the store of these rows.
        seed: of the run. Separate ones share the protocol's; continual ones count up from it, since the
            second would otherwise be taught by the same rows and noises as the first.
        folder: of the run.
        start: the folder of the request whose network this one begins with; None: with the original.
    """

    number: int
    rows: tuple[int, ...]
    forget: ImageStore
    seed: int
    folder: Path
    start: Path | None


def requests(
    forget: ImageStore, protocol: str, output_dir: str | Path, *, images_per_request: int = 1, seed: int = 0
) -> list[Request]:
    """The requests of a protocol: the rows of `forget` in their order, so many at a time.

    Raises:
        TypeError, ValueError: for an argument outside its range, or an image that stands in two requests.
    """
    if not isinstance(forget, ImageStore):
        raise TypeError(f"forget: expected an ImageStore, got {check.describe(forget)}")
    check.one_of("protocol", protocol, PROTOCOLS)
    size = check.integer("images_per_request", images_per_request, low=1, high=len(forget), of="all images")
    count = -(-len(forget) // size)
    last_seed = 2**63 - 1 if protocol == "separate" else 2**63 - count
    seed = check.integer("seed", seed, low=0, high=last_seed, of="so that every request has one")
    _check_distinct(forget, size)
    made: list[Request] = []
    for number in range(1, count + 1):
        rows = range(size * (number - 1), min(size * number, len(forget)))
        continual = protocol == "continual"
        made.append(
            Request(
                number=number,
                rows=tuple(rows),
                forget=forget.select(torch.tensor(rows)),
                seed=seed + number - 1 if continual else seed,
                folder=Path(output_dir) / f"{FOLDER}{number}",
                start=made[-1].folder if continual and made else None,
            )
        )
    return made


def _check_distinct(forget: ImageStore, size: int) -> None:
    """An image of two requests would be forgotten twice, and in between count as one that is not asked for.

    Raises:
        ValueError: naming the rows.
    """
    rows, firsts = overlap(forget, forget)
    twice = (rows // size != firsts // size).nonzero().flatten()
    if len(twice):
        row, first = int(rows[twice[0]]), int(firsts[twice[0]])
        expected = "expected every image in one request only"
        raise ValueError(f"forget: {expected}, got {len(twice)} again (row {row} equals row {first})")


def unlearn_each(
    forget: ImageStore,
    make: Callable[[Request], Any],
    leave: Callable[[Request, Any], nn.Module],
    *,
    protocol: str,
    num_steps: int,
    output_dir: str | Path,
    measures: Measures,
    images_per_request: int = 1,
    seed: int = 0,
    resume_from_checkpoint: str | None = None,
    process_group: dist.ProcessGroup | None = None,
    record: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Forgets the rows of `forget` by a protocol, one run a request, and measures after each.

    Several processes all call it, with the same arguments; process 0 measures and writes, and all read what
    it has left, so `output_dir` is to be the same folder for all of them.

    Args:
        forget: all images to forget.
        make: builds the `Unlearner` of a request as for a run of its own, with everything new: a network with
            the weights of the original, or those that `leave` wrote for the request whose folder is
            `request.start`; its optimizer; `forget=request.forget`; `seed=request.seed`. No image of
            `forget` should be among the images to keep: a later request would learn it again.
        leave: writes below `request.folder` the network that a finished run leaves, such as the average of
            its weights, and returns it. Process 0 calls it; it may be called again.
        protocol: `"separate"` or `"continual"`.
        num_steps: of every request.
        output_dir: takes `protocol.json`, and a run folder `request-<number>` for each request.
        measures: what is measured of the original, and after every request.
        images_per_request: rows of `forget` that are forgotten together.
        seed: see `Request.seed`.
        resume_from_checkpoint: `"latest"` goes on with the protocol in `output_dir`; None: a new one.
        process_group: that of the `Unlearner`s.
        record, identity, options: as `training.unlearn` takes them, for every request; but not `leave`.

    Returns:
        The content of `protocol.json` (docs/protocols.md).

    Raises:
        TypeError, ValueError: before any step, naming the argument: also for a protocol that is resumed with
            other settings, or a request whose network has other weights than the one that it begins with.
        FolderLocked, TooManySkippedSteps, WeightsNotFinite, OutOfTime: as `training.unlearn`.
        RunInterrupted: the same; where no steps are taken, such as amid measuring, it comes at once.
    """
    plan = requests(forget, protocol, output_dir, images_per_request=images_per_request, seed=seed)
    num_steps = check.integer("num_steps", num_steps, low=1)
    if resume_from_checkpoint not in (None, "latest"):
        expected = "expected 'latest' or None (every request has checkpoints of its own)"
        raise ValueError(f"resume_from_checkpoint: {expected}, got {str(resume_from_checkpoint)!r}")
    time_limit = TimeLimit(parse_time("max_time", options.get("max_time")))
    for name, function in (("make", make), ("leave", leave)):
        if not callable(function):
            raise TypeError(f"{name}: expected a function, got {check.describe(function)}")
    if not isinstance(measures, Measures):
        raise TypeError(f"measures: expected a Measures, got {check.describe(measures)}")
    head = {
        "format": FORMAT,
        "version": VERSION,
        "status": "running",
        "protocol": protocol,
        "num_steps": num_steps,
        "images_per_request": images_per_request,
        "forget": {"rows": len(forget), "sha256": forget.content_hash()},
        "measured": measures.settings | {"distance": measures.scheduler is not None},
    }
    # The noise that images are measured with is as good as the numbers' key.
    seeds = {"seed": seed, "measured_seed": head["measured"].pop("seed")}
    output_dir = Path(output_dir)
    run_options = options | {"num_steps": num_steps, "resume_from_checkpoint": resume_from_checkpoint}
    with Processes(process_group) as processes, processes.alone_in(output_dir, "unlearn_each"):
        if processes.by_first(lambda: is_finished(resume_from_checkpoint, output_dir, num_steps)):
            if processes.rank == 0:
                print(
                    f"{output_dir}: the protocol {NOTHING_LEFT}",
                    file=sys.stderr,
                )
            return processes.by_first(lambda: read_json(output_dir / FILE))
        resumed = resume_from_checkpoint is not None
        opened = processes.by_first(lambda: _opened(output_dir, head, seeds, resumed))
        says = options.get("show_progress", True)
        book = _Book(output_dir / FILE, *opened, forget, plan, measures, processes, says)
        ahead = plan[len(book.content["after"]) :]
        with _telling_where_it_stops(book):
            for request in ahead:
                # That a first request has no time left is an error of its run: no other try would have more.
                if request is not ahead[0] and any(processes.gather(time_limit.is_over())):
                    raise OutOfTime(time_limit.seconds, None)
                _take(request, book, make, leave, record or {}, identity, run_options)
        book.note(status=COMPLETE)
    return book.content


def is_finished(resume: str | None, output_dir: str | Path, num_steps: int) -> bool:
    """Whether the protocol in `output_dir` is complete, so that nothing is left to do.

    Raises:
        ValueError: it is, and a new one was asked for, or one of another length.
    """
    try:
        content = read_json(Path(output_dir) / FILE)
    except ValueError:
        return False
    if not isinstance(content, dict) or content.get("status") != COMPLETE:
        return False
    if resume is None:
        expected = "expected a folder without a finished protocol for a new one"
        raise ValueError(f"output_dir: {expected}, got {output_dir}")
    if content.get("num_steps") != num_steps:
        expected = f"the {content.get('num_steps')} steps of the finished protocol in {output_dir}"
        raise ValueError(f"num_steps: expected {expected}, which cannot go on, got {num_steps}")
    return True


def kept_seed(resume: str | None, output_dir: str | Path) -> int | None:
    """The seed of the protocol that `resume_from_checkpoint` goes on with; None: it begins anew."""
    if resume is None:
        return None
    record = read_private(Path(output_dir) / PRIVATE_FOLDER)
    if "seed" in record:
        return record["seed"]
    try:
        return read_protocol(output_dir).get("seed")  # of earlier versions
    except ValueError:
        return None


def purge_protocol(output_dir: str | Path) -> list[Purged]:
    """`purge` of every request, and last of what the folder itself keeps.

    `protocol.json` loses hashes and the numbers of single images, and keeps those of the images to keep.

    Raises:
        ValueError: a request has no readable `run.json`.
        FolderLocked: the protocol goes on, or one of its runs.
    """
    output_dir = Path(output_dir)
    with locked(output_dir, "purge"):
        # One that was killed before its first file leaves a folder with nothing in it.
        done = [purge(folder) if any(folder.iterdir()) else Purged() for folder in folders(output_dir)]
        own = remove_private(private_paths(output_dir), output_dir)
        path = output_dir / FILE
        if path.exists():
            content = _read(path)
            own.unfinished = content.get("status") != COMPLETE
            _write(path, _without_images(content))
        return [*done, own]


def _without_images(content: dict[str, Any]) -> dict[str, Any]:
    """That of `protocol.json` without what could be compared with a candidate."""
    kept = without_identifiers(content)
    for name in ("before", "summary"):
        kept.pop(name, None)
    done = kept.get("after")
    if isinstance(done, list):
        names = ("request", "retain")
        kept["after"] = [{name: entry[name] for name in names if name in entry} for entry in done]
    return kept


def folders(output_dir: str | Path) -> list[Path]:
    """The run folders of the requests in `output_dir`, in their order; none where it is of no protocol."""
    found = Path(output_dir).glob(f"{FOLDER}*")
    numbered = [
        folder for folder in found if re.fullmatch("[1-9][0-9]{0,17}", folder.name.removeprefix(FOLDER))
    ]
    return sorted(numbered, key=lambda folder: int(folder.name.removeprefix(FOLDER)))


def read_protocol(output_dir: str | Path) -> dict[str, Any]:
    """`protocol.json` of a folder.

    Raises:
        ValueError: there is none, or it is no record of a protocol.
    """
    path = Path(output_dir) / FILE
    content = _read(path)
    if not _is_whole(content) or not _has_numbers(content):
        raise ValueError(f"output_dir: expected {path} to be a {FORMAT} record")
    return content


def _read(path: Path) -> dict[str, Any]:
    """The content of `protocol.json`, as far as it is of a protocol at all.

    Raises:
        ValueError: it is not.
    """
    try:
        content = read_json(path)
    except ValueError as error:
        raise ValueError(
            f"output_dir: expected a folder with a readable {FILE}, got {path}: {error}"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"output_dir: expected {path} to be a {FORMAT} record")
    return content


def _is_whole(content: dict[str, Any]) -> bool:
    """Whether `content` has all that a protocol which goes on reads of it."""
    if not {*DECISIVE, "requests", "after"} <= content.keys():
        return False
    done, asked = content["after"], content["requests"]
    if not isinstance(done, list) or not isinstance(asked, list) or len(done) != len(asked):
        return False
    if done and not {"before", "settings", "start_weights"} <= content.keys():
        return False
    whole = {"request", "weights", "images", "retain"}
    return all(
        isinstance(entry, dict) and whole <= entry.keys() and entry["request"] == number
        for number, entry in enumerate(done, start=1)
    )


def _has_numbers(content: dict[str, Any]) -> bool:
    """Whether the numbers of what is done are such as a summary can be made of."""
    try:
        summary(content)
    except Exception:  # whatever other values than numbers lead to, at any place
        return False
    return True


def _opened(
    output_dir: Path, head: dict[str, Any], seeds: dict[str, int], resume: bool
) -> tuple[dict[str, Any], str]:
    """The record to go on with, that in `output_dir` or a new one; and the key of its identifiers.

    Raises:
        ValueError: a new protocol among the folders of another, or one that is resumed with other settings.
    """
    path = output_dir / FILE
    if not resume:
        there = [path] if path.exists() else folders(output_dir)
        if there:
            got = f"{there[0]} (resume_from_checkpoint='latest' goes on)"
            raise ValueError(f"output_dir: expected a folder without requests for a new protocol, got {got}")
    if not path.exists():
        key = update_private(output_dir, **seeds)["identifiers_key"]
        return keyed(described(head), key) | {"requests": [], "after": []}, key
    content = read_protocol(output_dir)
    if content.get("version") == 1:
        content = _of_this_version(content, output_dir)
    kept = read_private(output_dir / PRIVATE_FOLDER)
    if not kept:
        expected = f"the key of its identifiers in {output_dir / PRIVATE_FOLDER}"
        raise ValueError(
            f"output_dir: expected {expected}, got none (a protocol that was purged cannot go on)"
        )
    _check_seeds(seeds, kept, output_dir)
    check_same(keyed(described(head), kept["identifiers_key"]), content, list(DECISIVE), str(path))
    _end_runs(content, output_dir)
    return content, kept["identifiers_key"]


def _of_this_version(content: dict[str, Any], output_dir: Path) -> dict[str, Any]:
    """The content of a `protocol.json` of version 1; its seeds and a key are in the private record now."""
    seeds = {"seed": content["seed"], "measured_seed": content["measured"]["seed"]}
    key = update_private(output_dir, **seeds)["identifiers_key"]
    requests = [{name: entry[name] for name in entry if name != "seed"} for entry in content["requests"]]
    measured = {name: value for name, value in content["measured"].items() if name != "seed"}
    kept = {name: value for name, value in content.items() if name != "seed"}
    return keyed(kept | {"version": VERSION, "requests": requests, "measured": measured}, key)


def _check_seeds(seeds: dict[str, int], kept: dict[str, Any], output_dir: Path) -> None:
    """That they are those which the protocol began with; they are not said.

    Raises:
        ValueError: naming what is another.
    """
    for name, argument in (("seed", "seed"), ("measured_seed", "measures.seed")):
        if kept.get(name) != seeds[name]:
            expected = f"that which the protocol in {output_dir} began with"
            raise ValueError(f"{argument}: expected {expected}, got another")


def _end_runs(content: dict[str, Any], output_dir: Path) -> None:
    """Ends the runs whose numbers are there: a kill may have come between the two."""
    for entry in content["after"]:
        folder = output_dir / f"{FOLDER}{entry['request']}"
        if finished_run(folder) is None:
            steps = read_run(folder)["arguments"]["num_steps"]
            update_run(folder, status=COMPLETE, steps=steps)
        tidy(folder)


@contextmanager
def _telling_where_it_stops(book: _Book) -> Iterator[None]:
    """A signal between the steps ends the block at once, and a line says how to go on.

    What is lost then is measured again. Process 0, which measures, takes it, and tells the others.
    """
    if book.processes.rank != 0:
        yield
        return
    try:
        with raised_at_once():
            yield
    except RunInterrupted as interrupted:
        if interrupted.checkpoint is None:  # else its run has said so
            done = f"{interrupted.reason}: stopped with {len(book.content['after'])} of {len(book.plan)}"
            go_on = "run again with resume_from_checkpoint='latest' (--resume_from_checkpoint latest)"
            print(f"{done} requests trained and measured. To go on, {go_on}", file=sys.stderr)
        raise


@dataclass
class _Book:
    """`protocol.json`, and what fills it. All processes have the content; process 0 writes."""

    path: Path
    content: dict[str, Any]
    key: str  # of its identifiers
    forget: ImageStore  # of all requests
    plan: Sequence[Request]
    measures: Measures
    processes: Processes
    says: bool  # when it measures, which may take longer than the steps
    looked_at: bool = False  # whether the images to keep were compared with those to forget

    def note(self, **entries: Any) -> None:
        """Replaces entries, and the file as a whole."""
        self.content |= entries
        self.content["summary"] = summary(self.content)
        if self.processes.rank == 0:
            _write(self.path, self.content)

    def measured(self, network: nn.Module, requests: Sequence[Request]) -> dict[str, Any]:
        """The numbers of `network`, of the images of `requests` and of those to keep; process 0 measures.

        No random number of a run is used up.
        """
        if self.says and self.processes.rank == 0:
            rows = [row for request in requests for row in request.rows]
            print(f"measuring images to forget (rows {', '.join(map(str, rows))}) and to keep", flush=True)
        device = next(network.parameters()).device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            images = []
            for request in requests:
                numbers = self.measures.of_images(network, request.forget)
                for row, found in zip(request.rows, numbers, strict=True):
                    images.append({"request": request.number, "row": row, **found})
            return {"images": images, "retain": self.measures.of_retain(network)}

    def deleted_by(self, request: Request) -> Sequence[Request]:
        """The requests whose images the network that `request` leaves was asked to forget."""
        return self.plan[: request.number] if self.content["protocol"] == "continual" else [request]


def _write(path: Path, content: dict[str, Any]) -> None:
    with atomic_file(path) as file:
        file.write((json.dumps(content, indent=1, allow_nan=False) + "\n").encode())


def _take(
    request: Request,
    book: _Book,
    make: Callable[[Request], Any],
    leave: Callable[[Request, Any], nn.Module],
    record: dict[str, Any],
    identity: dict[str, Any] | None,
    options: dict[str, Any],
) -> None:
    """One request from its beginning, or from its last checkpoint, to its numbers in `protocol.json`."""
    processes = book.processes
    # As in a process of its own: dropout depends on no request before it, nor does the memory. What torch's
    # first imports leave in cycles holds the frames that they were made in, and the network of those.
    gc.collect()
    torch.manual_seed(torch.initial_seed())
    unlearner = _made(request, make)
    _check_settings(unlearner, book, identity)
    weights = processes.by_first(lambda: start_weights(unlearner))
    _check_start(request, weights, book)
    if "before" not in book.content:
        before = processes.by_first(lambda: book.measured(unwrapped(unlearner.model), book.plan))
        book.note(start_weights=keyed(weights, book.key), before=before)

    about = {
        "name": book.content["protocol"],
        "request": request.number,
        "of": len(book.plan),
        "start": None if request.start is None else request.start.name,
    }

    def finish() -> dict[str, Any]:
        """Process 0: the run counts as finished only when its numbers are there."""
        network = leave(request, unlearner)
        numbers = book.measured(network, book.deleted_by(request))
        left = keyed(weights_of("leave", network), book.key)
        entry = about | {"rows": list(request.rows), "folder": request.folder.name}
        book.note(
            requests=[*book.content["requests"], entry],
            after=[*book.content["after"], {"request": request.number, "weights": left, **numbers}],
        )
        return {}

    training.unlearn(
        unlearner,
        output_dir=request.folder,
        record=record | {"protocol": about},
        identity=identity,
        leave=finish,
        **options,
    )
    book.content = processes.by_first(lambda: book.content)
    if len(book.content["after"]) < request.number:
        expected = f"expected a run whose numbers stand in {book.path}, or none yet"
        raise ValueError(f"output_dir: {expected}, got the finished run {request.folder}")


def _made(request: Request, make: Callable[[Request], Any]) -> Any:
    """What `make` builds for `request`.

    Raises:
        ValueError: it is not of this request, or has taken a step.
    """
    unlearner = make(request)
    if unlearner.seed != request.seed:
        raise ValueError(f"make: expected an Unlearner with seed={request.seed}, got seed={unlearner.seed}")
    if unlearner.step_index != 0:
        got = f"one that has taken {unlearner.step_index} steps"
        raise ValueError(f"make: expected a new Unlearner, got {got}")
    # A method that reads no images to forget keeps none, and one that reads neighbours keeps the means.
    forget, own = unlearner.forget, (request.forget, request.forget.freeze())
    if forget is not None and forget.content_hash() not in [store.content_hash() for store in own]:
        expected = f"expected an Unlearner with forget=request.forget ({request.forget})"
        raise ValueError(f"make: {expected}, got another set, {forget}")
    return unlearner


def _check_settings(unlearner, book: _Book, more: dict[str, Any] | None) -> None:
    """Whether this request is run as those before it, whichever process or day they were run in.

    Raises:
        ValueError: naming what differs, with both values; or images to keep that would undo a deletion.
    """
    continual, retain = book.content["protocol"] == "continual", unlearner.retain
    # Once: that later requests keep the same images is compared below.
    if continual and retain is not None and not book.looked_at:
        rows, _ = overlap(book.forget, retain)
        if len(rows):
            expected = "expected images to keep without those to forget (later requests would learn them)"
            got = f"{len(rows)} of them (first: row {int(rows[0])} of forget)"
            raise ValueError(f"retain: {expected}, got {got}")
        book.looked_at = True
    whole = describe_identity(unlearner, more)
    shared = {name: value for name, value in whole.items() if name not in OF_ONE_REQUEST}
    shared["retain"] = whole["data"]["retain"]
    shared["rules"] = [rule["kind"] for rule in whole.get("rules", [])]
    shared = keyed(shared, book.key)
    book.content.setdefault("settings", shared)
    check_same(shared, book.content["settings"], list(shared), str(book.path))


def _check_start(request: Request, weights: str, book: _Book) -> None:
    """Whether a network, given by the hash of its weights, is the one that `request` begins with.

    Raises:
        ValueError: it is another.
    """
    if request.start is None:
        expected, whose = book.content.get("start_weights"), "that the protocol began with"
        if expected is None:
            return
    else:
        expected, whose = book.content["after"][-1]["weights"], f"that {request.start.name} left"
    found = keyed(weights, book.key)
    if found != expected:
        raise ValueError(f"make: expected the weights {whose} (HMAC {expected}), got others ({found})")


# --- the numbers in short -----------------------------------------------------------------------------------


def summary(content: dict[str, Any]) -> dict[str, Any]:
    """What a table shows of the content of `protocol.json`.

    Returns:
        `requests`: for each done `own` (means over its images: `before` any, `after` this), `earlier` (means
        over all images deleted before, right after their own deletion and now; None without any), `retain`.
        `mean` and `std` over the requests of `own` and `retain`. A number that is not finite makes a mean
        None.
    """
    done = content["after"]
    if not done:
        return {"requests": [], "mean": {}, "std": {}}
    originally = {image["row"]: image for image in content["before"]["images"]}
    when_deleted: dict[int, dict[str, Any]] = {}
    rows = []
    for entry in done:
        own = [image for image in entry["images"] if image["request"] == entry["request"]]
        earlier = [image for image in entry["images"] if image["request"] != entry["request"]]
        rows.append(
            {
                "request": entry["request"],
                "own": {
                    "before": _means([originally[image["row"]] for image in own]),
                    "after": _means(own),
                },
                "earlier": {
                    "when_deleted": _means([when_deleted[image["row"]] for image in earlier]),
                    "now": _means(earlier),
                }
                if earlier
                else None,
                "retain": entry["retain"],
            }
        )
        when_deleted |= {image["row"]: image for image in own}
    over = {"own": [row["own"]["after"] for row in rows], "retain": [row["retain"] for row in rows]}
    return {
        "requests": rows,
        "mean": {name: _over(values, mean) for name, values in over.items()},
        "std": {name: _over(values, _spread) for name, values in over.items()},
    }


def _means(images: list[dict[str, Any]]) -> dict[str, float | None]:
    """Over images, of each of their numbers."""
    numbers = [dict(image) for image in images]
    for image in numbers:
        del image["request"], image["row"]
    return _over(numbers, mean)


def _over(values: list[dict[str, Any]], statistic: Callable) -> dict[str, float | None]:
    found = {}
    for name in values[0]:
        column = [value[name] for value in values]
        found[name] = None if None in column else statistic(column)
    return found


def _spread(values: list[float]) -> float | None:
    """Their standard deviation, of a sample; None of a single one."""
    return stdev(values) if len(values) > 1 else None
