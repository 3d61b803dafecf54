"""One run of the check of GPUs: its budget, its stages, the processes that they start, what is on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

from gpu_summary import read_rows, render

ROOT = Path(__file__).resolve().parents[1]
DRY = os.environ.get("DRY", "0") not in ("", "0")
FULL_BUDGET = 420  # seconds, for which the limits are made; a smaller one shortens them in proportion
BUDGET = 3600 if DRY else FULL_BUDGET
RESERVE = 4  # seconds that are left for the summary
LEAST = 12  # seconds under which no stage is begun
# Seconds that a process gets to leave by itself once its stage is over: on a GPU machine many did not in 20.
LEAVE = 8
# Seconds between SIGINT, upon which pytest and compute-sanitizer write what they have, and SIGKILL.
GRACE = 10
GRACE_OF_THE_OVER = 3  # for those whose stage is over
STACKS = 0.5  # seconds to print where all threads are
GONE = 1  # seconds that the system gets to end a process that was killed; what it cannot end is left to it
LOG_LIMIT = 12 << 20  # bytes: what is fetched from a lent machine may have 16 MiB a file


@dataclass
class Outcome:
    """How a stage went."""

    stage: str
    letter: str
    limit: float  # seconds
    seconds: float = 0.0
    outcome: str = ""  # passed, failed (status), stopped at its limit, left out
    command: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.outcome.startswith("passed")


class Ending(Protocol):
    """How a stage went, as it says itself before its process ends, which may take long on a GPU machine."""

    needed: bool  # a process that ends without saying it has failed

    def status(self) -> int | None:
        """An exit status; None as long as the stage goes on."""


@dataclass
class Mark:
    """A file that the command writes (`gpu_outcomes.py`), or does not."""

    path: Path
    needed = False

    def status(self) -> int | None:
        return int(self.path.read_text()) if self.path.exists() else None


@dataclass
class SanitizerSummary:
    """compute-sanitizer's last line, behind the line that all calls were made."""

    log: Path
    begin: int  # bytes of the log before this stage
    needed = True

    def status(self) -> int | None:
        with self.log.open("rb") as file:
            file.seek(self.begin)
            said = file.read().decode(errors="replace")
        summary = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (.*)$", said, re.MULTILINE)
        if summary is None:
            return None
        clean = re.match(r"0 (errors|hazards)\b", summary[1]) and ALL_CALLS_MADE in said
        return 0 if clean else 1


ALL_CALLS_MADE = "every kernel has run"  # the last line of sanitizer_calls.py


class Check:
    """One run: its budget, its folder, what it has found so far.

    Args:
        out: where the files go; made if missing.
        budget: seconds, counted from `started`.
        started: seconds since the epoch.
    """

    def __init__(self, out: Path, budget: float, started: float):
        self.out, self.budget, self.started = out, budget, started
        self.versions: dict[str, str] = {}
        self.outcomes: list[Outcome] = []
        out.mkdir(parents=True, exist_ok=True)
        self.log = out / "log.txt"
        self.log.write_text("")

    def clear(self, *names: str) -> None:
        """Removes what an earlier run has left of the files that are about to be written."""
        for name in names:
            (self.out / name).unlink(missing_ok=True)

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - RESERVE - (time.time() - self.started)

    def share(self, seconds: float) -> float:
        """Of a limit, what a smaller budget leaves of it; a rehearsal takes what the machine needs."""
        return 20 * seconds if DRY else seconds * min(1.0, self.budget / FULL_BUDGET)

    def spare(self, later: float) -> float:
        """Of what is left, what stages of `later` seconds in all do not need; a rehearsal has enough."""
        return self.left() if DRY else max(0.0, self.left() - self.share(later))

    def stage(
        self,
        letter: str,
        name: str,
        limit: float,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        *,
        ending: Ending | None = None,
        measures: str | None = None,
        clears: Sequence[str] = (),
    ) -> bool:
        """Runs `command` within `limit` seconds or what is left; whether it passed.

        Args:
            ending: what tells how the stage went before its process ends; a `Mark` if not given.
            measures: the kind of rows, "ops" or "steps", of which the stage must add some: one that skips
                everything has measured nothing, however it ends.
            clears: files that an earlier run left and this stage writes anew; they stay where it does not
                run.
        """
        limit = min(self.share(limit), self.left())
        outcome = Outcome(name, letter, round(limit, 1), command=list(command))
        self.outcomes.append(outcome)
        if limit < LEAST:
            outcome.outcome = "left out: no time"
        else:
            self.clear(*clears)
            before = self.rows(measures)
            outcome.outcome, outcome.seconds = run(command, limit, self.log, env, ending=ending)
            if outcome.passed and measures and self.rows(measures) == before:
                outcome.outcome = "failed: measured nothing"
        self.save()
        print(f"{letter}  {name:<28} {outcome.outcome:<36} {outcome.seconds:6.1f} s", flush=True)
        return outcome.passed

    def rows(self, kind: str | None) -> int:
        """How many rows of a kind are on disk."""
        return len(read_rows(self.out, kind, self.device)) if kind else 0

    def leave_out(self, letter: str, name: str, reason: str) -> None:
        """Says that a stage did not run."""
        self.outcomes.append(Outcome(name, letter, 0.0, outcome=f"left out: {reason}"))
        self.save()

    def save(self) -> None:
        """Writes check.json and summary.txt."""
        found = {
            "dry": DRY,
            "budget": self.budget,
            "seconds": round(time.time() - self.started, 1),
            "versions": self.versions,
            "stages": [asdict(outcome) for outcome in self.outcomes],
        }
        write(self.out / "check.json", json.dumps(found, indent=1) + "\n")
        try:
            summary = render(found, self.out, self.device, self.started)
        except Exception as error:  # a table that cannot be drawn costs no stage
            summary = f"no summary, see check.json: {type(error).__name__}: {error}\n"
        write(self.out / "summary.txt", summary)

    @property
    def device(self) -> str:
        """The GPU's name as the benchmarks' files have it."""
        name = self.versions.get("gpu", "stand-in").lower().removeprefix("nvidia ")
        return re.sub(r"[^a-z0-9]+", "_", name)

    @property
    def failed(self) -> bool:
        """Whether a stage failed (the last of its name counts), or, in a rehearsal, was left out."""
        last = {outcome.stage: outcome.outcome for outcome in self.outcomes}
        bad = ("failed", "stopped", "left out") if DRY else ("failed", "stopped")
        return any(outcome.startswith(bad) for outcome in last.values())


def run(
    command: Sequence[str],
    limit: float,
    log: Path,
    env: dict[str, str] | None = None,
    *,
    ending: Ending | None = None,
) -> tuple[str, float]:
    """How `command` ended, and its seconds; what it prints goes to `log`.

    It is over when it has said so (`ending`), and then gets a few seconds to leave. After `limit` seconds at
    the latest it and all that it started are gone; it is asked to end before.
    """
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder, log.open("a") as output:
        mark = Path(folder) / "status"
        ending = ending or Mark(mark)
        print(f"\n=== {' '.join(command)}", file=output, flush=True)
        process = start(command, output, (env or {}) | {"GPU_CHECK_MARK": str(mark)})
        try:
            if wait(process, ending, began + limit):
                outcome = by_itself(process.returncode, ending)
            else:
                outcome = ended_from_outside(process, ending, began + limit, output)
        finally:  # nothing that it started goes on, whoever ended it
            kill(process)
    return outcome or f"stopped at its limit of {limit:.0f} s", round(time.monotonic() - began, 1)


def wait(process: subprocess.Popen, ending: Ending, deadline: float) -> bool:
    """Until it has left by itself; False where it has to be ended, before `deadline` by what that takes."""
    grace = min(GRACE, (deadline - time.monotonic()) / 4)
    over = None  # since when
    while process.poll() is None:
        now = time.monotonic()
        if over is None and ending.status() is not None:
            over = now
        if now >= deadline - grace - STACKS or (over is not None and now >= over + LEAVE):
            return False
        time.sleep(0.05)
    return True


def by_itself(returncode: int, ending: Ending) -> str:
    """The outcome of a process that has left."""
    said = ending.status()
    if returncode == 0 and ending.needed and said != 0:
        return "failed: no clean summary"
    return "passed" if returncode == 0 else f"failed ({returncode})"


def ended_from_outside(process: subprocess.Popen, ending: Ending, deadline: float, output) -> str | None:
    """Ends `process`; the outcome where it has said it, also while it was ended."""
    over = ending.status() is not None
    tell_where(process, output)
    grace = GRACE_OF_THE_OVER if over else GRACE
    end(process, max(0.0, min(grace, deadline - time.monotonic())))
    status = ending.status()
    if status == 0:
        return "passed (did not exit by itself)"
    return f"failed ({status}) (did not exit by itself)" if over else None


def tell_where(process: subprocess.Popen, output) -> None:
    """Which processes there are still, and where the threads of those are that can tell."""
    print("\n=== still there: process, state, command", file=output, flush=True)
    for pid in members(process.pid):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            state = re.search(r"State:\s*(.*)", status)[1]
            print(f"{pid}  {state}  {command[:150]}", file=output, flush=True)
            if catches(status, signal.SIGUSR2):
                os.kill(pid, signal.SIGUSR2)
    time.sleep(STACKS)


def members(group: int) -> Iterator[int]:
    """The processes of a group."""
    for entry in sorted(Path("/proc").glob("[0-9]*")):
        with contextlib.suppress(OSError):
            # Behind the name, which is in parentheses: state, parent, group.
            if int((entry / "stat").read_text().rpartition(")")[2].split()[2]) == group:
                yield int(entry.name)


def catches(status: str, number: int) -> bool:
    """Whether the process of this /proc/.../status has a handler: others would die of the signal."""
    caught = re.search(r"SigCgt:\s*(\w+)", status)
    return caught is not None and bool(int(caught[1], 16) >> (number - 1) & 1)


def start(command: Sequence[str], output, env: dict[str, str] | None = None) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be ended."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    more = os.environ | (env or {})
    return subprocess.Popen(
        command, cwd=ROOT, env=more, start_new_session=True, preexec_fn=_take_interrupts, **streams
    )


def _take_interrupts() -> None:
    """A shell lets what it starts in the background ignore SIGINT, which would then ask nobody to end."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end(process: subprocess.Popen, grace: float) -> None:
    """SIGINT, and SIGKILL for whatever is left of the group after `grace` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    kill(process)


def kill(*processes: subprocess.Popen) -> None:
    """They and all that they started, at once."""
    for process in processes:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    deadline = time.monotonic() + GONE
    for process in processes:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(max(0.01, deadline - time.monotonic()))


def write(path: Path, text: str) -> None:
    """Atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def shorten(log: Path) -> None:
    """Leaves out the middle of a log that is too long to be fetched."""
    text = log.read_bytes()
    if len(text) > LOG_LIMIT:
        log.write_bytes(text[: LOG_LIMIT // 2] + b"\n[...]\n" + text[-LOG_LIMIT // 2 :])
