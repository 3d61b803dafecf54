"""One run of the check of GPUs: its budget, its stages, the processes that they start, what is on disk."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_summary import read_rows, render

ROOT = Path(__file__).resolve().parents[1]
DRY = os.environ.get("DRY", "0") not in ("", "0")
FULL_BUDGET = 420  # seconds, for which the limits are made; a smaller one shortens them in proportion
BUDGET = 3600 if DRY else FULL_BUDGET
RESERVE = 4  # seconds that are left for the summary
LEAST = 12  # seconds under which no stage is begun
# Seconds between SIGINT, upon which pytest ends its workers (10 s) and writes what it has, and SIGKILL.
GRACE = 20
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

    def stage(
        self,
        letter: str,
        name: str,
        limit: float,
        command: Sequence[str],
        env: dict[str, str] | None = None,
        *,
        measures: str | None = None,
        clears: Sequence[str] = (),
    ) -> bool:
        """Runs `command` within `limit` seconds or what is left; whether it passed.

        Args:
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
            outcome.outcome, outcome.seconds = run(command, limit, self.log, env)
            if outcome.outcome == "passed" and measures and self.rows(measures) == before:
                outcome.outcome = "failed: measured nothing"
        self.save()
        print(f"{letter}  {name:<28} {outcome.outcome:<28} {outcome.seconds:6.1f} s", flush=True)
        return outcome.outcome == "passed"

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
    command: Sequence[str], limit: float, log: Path, env: dict[str, str] | None = None
) -> tuple[str, float]:
    """How `command` ended, and its seconds; what it prints goes to `log`.

    After `limit` seconds it and all that it started are ended.
    """
    began = time.monotonic()
    with log.open("a") as output:
        print(f"\n=== {' '.join(command)}", file=output, flush=True)
        process = start(command, output, env)
        try:
            status = process.wait(limit)
            outcome = "passed" if status == 0 else f"failed ({status})"
        except subprocess.TimeoutExpired:
            end(process)
            outcome = f"stopped at its limit of {limit:.0f} s"
        finally:  # nothing that it started goes on, whoever ended it
            kill(process)
    return outcome, round(time.monotonic() - began, 1)


def start(command: Sequence[str], output, env: dict[str, str] | None = None) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be ended."""
    streams = {"stdin": subprocess.DEVNULL, "stdout": output, "stderr": subprocess.STDOUT}
    more = os.environ | (env or {})
    return subprocess.Popen(command, cwd=ROOT, env=more, start_new_session=True, **streams)


def end(process: subprocess.Popen) -> None:
    """SIGINT, and SIGKILL for whatever is left of the group after `GRACE` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    kill(process)


def kill(process: subprocess.Popen) -> None:
    """It and all that it started, at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


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
