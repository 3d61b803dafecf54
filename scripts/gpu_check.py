"""What scripts/gpu_check.sh runs: stages in the order of their worth, each within its limit, all within one budget.

Nothing that was found out is lost: check.json and summary.txt are written anew after every stage, and the benchmarks write their
rows after every comparison. A stage that fails or outlasts its limit costs itself alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from gpu_summary import render

ROOT = Path(__file__).resolve().parents[1]
LETTERS = "abcdef"
DRY = os.environ.get("DRY", "0") not in ("", "0")
BUDGET = 3600 if DRY else 420  # seconds; a rehearsal takes what the machine needs
RESERVE = 4  # seconds that are left for the summary
LEAST = 12  # seconds under which no stage is begun
GRACE = 10  # seconds between SIGINT, upon which pytest writes what it has, and SIGKILL

VERSIONS = """
import json, os, platform, torch, triton
found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
if torch.cuda.is_available():
    found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found["capability"] = "%d%d" % torch.cuda.get_device_capability()
for name in ("diffusers", "nvtx", "cupy", "xdist"):
    try:
        found[name] = getattr(__import__(name), "__version__", "there")
    except ImportError as error:
        found[name] = f"missing ({error})"
print(json.dumps(found))
"""
LOAD = """
import sys
from fastunlearn.ops import _backends
import fastunlearn.functional
for library in sys.argv[1:]:
    if not _backends.extension(library):
        sys.exit(f"{library}: not loaded")
    print(library, "loaded")
"""


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
        for earlier in (*out.glob("ops_*.json"), *out.glob("steps_*.json"), *out.glob("tests.xml")):
            earlier.unlink()
        self.log = out / "log.txt"
        self.log.write_text("")

    def left(self) -> float:
        """Seconds of the budget."""
        return self.budget - RESERVE - (time.time() - self.started)

    def stage(self, letter: str, name: str, limit: float, command: Sequence[str], env: dict[str, str] | None = None) -> bool:
        """Runs `command` within `limit` seconds or what is left; whether it passed."""
        limit = min(20 * limit if DRY else limit, self.left())
        outcome = Outcome(name, letter, round(limit, 1), command=list(command))
        self.outcomes.append(outcome)
        if limit < LEAST:
            outcome.outcome = "left out: no time"
        else:
            outcome.outcome, outcome.seconds = run(command, limit, self.log, env)
        self.save()
        print(f"{letter}  {name:<28} {outcome.outcome:<28} {outcome.seconds:6.1f} s", flush=True)
        return outcome.outcome == "passed"

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
        write(self.out / "summary.txt", render(found, self.out))

    @property
    def failed(self) -> bool:
        return any(outcome.outcome.startswith(("failed", "stopped")) for outcome in self.outcomes)


def run(command: Sequence[str], limit: float, log: Path, env: dict[str, str] | None = None) -> tuple[str, float]:
    """How `command` ended, and its seconds; what it prints goes to `log`. After `limit` seconds it and all that it started are ended."""
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
    return outcome, round(time.monotonic() - began, 1)


def start(command: Sequence[str], output, env: dict[str, str] | None = None) -> subprocess.Popen:
    """In a process group of its own, so that all of it can be ended."""
    more = os.environ | (env or {})
    return subprocess.Popen(command, cwd=ROOT, env=more, stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True)


def end(process: subprocess.Popen) -> None:
    """SIGINT, and SIGKILL for whatever is left of the group after `GRACE` seconds."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(GRACE)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def write(path: Path, text: str) -> None:
    """Atomically."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


class Compilations:
    """What inductor has to compile, in the background, into one cache; done, or ended, before anything is timed.

    The layout of the networks is chosen when the steps are timed, so both are compiled.
    """

    def __init__(self, check: Check, scratch: Path):
        self.check, self.scratch = check, scratch
        self.ready = scratch / "ready.txt"
        self._running: list[tuple[subprocess.Popen, Path]] = []

    def begin(self, method: str, *others: list[str]) -> None:
        """Starts to compile the steps of `method` on the MNIST network, and whatever else pytest's arguments `others` name."""
        layouts = ("channels_last",) if DRY else ("channels_last", "contiguous")
        jobs = [
            ["bench/bench_step.py", "-k", f"{steps(method)} and {precision}", *(() if DRY else ("--layout", layout))]
            for precision in (("float32",) if DRY else ("bfloat16", "float32"))
            for layout in layouts
        ]
        for number, job in enumerate([*jobs, *others]):
            command = [*PYTEST, *job, *DEVICE, *SMOKE, "--compile-only", "--ready", str(self.ready)]
            path = self.scratch / f"{method}-{number}.txt"
            with path.open("w") as output:
                self._running.append((start(command, output, {"TRITON_INTERPRET": "0"}), path))

    def finish(self, letter: str, wait: float) -> None:
        """Gives them `wait` more seconds."""
        if not self._running:
            return
        outcome = Outcome("compilations, in background", letter, round(wait, 1))
        began = time.monotonic()
        for process, _ in self._running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, wait - (time.monotonic() - began)))
        ended = [process for process, _ in self._running if process.poll() is None]
        failed = [process for process, _ in self._running if process.poll() not in (None, 0)]
        self.end()
        done = len(self.ready.read_text().splitlines()) if self.ready.exists() else 0
        outcome.seconds = round(time.monotonic() - began, 1)
        outcome.outcome = f"{done} ready, {len(failed)} failed, {len(ended)} ended"
        self.check.outcomes.append(outcome)
        self.check.save()

    def end(self) -> None:
        """Ends what still runs, and puts what all of them said into the log."""
        with self.check.log.open("a") as log:
            for process, path in self._running:
                if process.poll() is None:
                    end(process)
                log.write(f"\n=== compilation {path.stem}\n{path.read_text()[-20_000:]}")
        self._running = []


PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
DEVICE = ["--device", "cuda"]
SMOKE = ["--smoke", "--threads", "1"] if DRY else []
KERNEL_BENCHMARKS = [
    *(f"bench/bench_{op}.py" for op in ("redirect", "residual", "mixture", "noising", "lowpass_residual")),
    *("-k", "cifar and (tensors or float32 or low) and not philox" if DRY else "celeba or cifar"),
]
INTERPRETER = {"TRITON_INTERPRET": "1" if DRY else "0"}


def steps(method: str, network: str = "mnist") -> str:
    """pytest's -k for the whole steps of a method."""
    exact = f"{'tiny' if DRY else network}-{method} and not no_is and not bernoulli"
    return f"{exact} and float32" if DRY else exact


def main() -> int:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "bench" / "results" / "gpu"
    budget = float(os.environ.get("BUDGET") or BUDGET)
    wanted = os.environ.get("STAGES", " ".join(LETTERS)).split()
    if unknown := set(wanted) - set(LETTERS):
        sys.exit(f"STAGES: expected letters of {' '.join(LETTERS)}, got {' '.join(sorted(unknown))}")
    check = Check(out.resolve(), budget, float(os.environ.get("GPU_CHECK_STARTED") or time.time()))
    with tempfile.TemporaryDirectory() as scratch:
        set_environment(Path(scratch))
        check.versions = read_versions()
        if not DRY and "gpu" not in check.versions:
            sys.exit(f"gpu_check: expected a GPU that torch sees, got none ({sys.executable}); DRY=1 rehearses the check on a CPU")
        check.save()
        take_stages(check, wanted, Path(scratch))
    check.save()
    print((check.out / "summary.txt").read_text())
    if DRY and (reasons := said_by_contestants(check.out)):
        print("in a rehearsal every contestant is built, checked and timed, but:", *reasons, sep="\n  ")
        return 1
    return int(check.failed)


def said_by_contestants(out: Path) -> list[str]:
    """Why some were not timed, or not measured in full."""
    rows = [row for path in sorted(out.glob("*_stand_in.json")) for row in json.loads(path.read_text())["rows"]]
    return [row["reason"] for row in rows if row["reason"]]


def set_environment(scratch: Path) -> None:
    """For all stages: one cache for inductor and one for Triton, which later stages find filled."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"  # of each process: eight tests and four compilations run at once
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["FASTUNLEARN_DRY"] = "1" if DRY else "0"
    if "FASTUNLEARN_COMMIT" not in os.environ:
        os.environ["FASTUNLEARN_COMMIT"] = commit()


def commit() -> str:
    """Of the checkout; where the sources travel without their history, what gpu_wheels.sh wrote down."""
    describe = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=ROOT, capture_output=True, text=True)
    noted = Path(os.environ.get("WHEELS", ROOT / ".wheels")) / "COMMIT"
    return describe.stdout.strip() or (noted.read_text().strip() if noted.exists() else "unknown")


def read_versions() -> dict[str, str]:
    said = subprocess.run([sys.executable, "-c", VERSIONS], cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        sys.exit(f"gpu_check: expected torch and triton in {sys.executable}, got: {said.stderr.strip().splitlines()[-1]}")
    return json.loads(said.stdout) | {"commit": os.environ["FASTUNLEARN_COMMIT"]}


def take_stages(check: Check, wanted: list[str], scratch: Path) -> None:
    compilations = Compilations(check, scratch)
    results = ["--benchmark-only", "--results", str(check.out), "--go-on", "--ready", str(compilations.ready)]
    bench = [*PYTEST, *DEVICE, *SMOKE, *results]
    try:
        if "a" in wanted:
            take_first_look(check)
        if {"c", "d"} & set(wanted):
            compilations.begin("retrack", KERNEL_BENCHMARKS)
        if "b" in wanted:
            workers = [] if DRY or check.versions["xdist"].startswith("missing") else ["-n", "8"]
            junit = ["--junitxml", str(check.out / "tests.xml")]
            check.stage("b", "tests for GPUs", 120, [*PYTEST, "tests", "-m", "gpu and not slow", *workers, *junit], INTERPRETER)
        compilations.finish("b", min(1200 if DRY else 60, max(0.0, check.left() - 120)))
        if "c" in wanted:
            check.stage("c", "kernels", 70, [*bench, *KERNEL_BENCHMARKS, "--seconds", "0.4"], INTERPRETER)
        if "d" in wanted:
            command = [*bench, "bench/bench_step.py", "-k", steps("retrack"), "--step-seconds", "10"]
            check.stage("d", "ReTrack step", 130, command)
        if "f" in wanted and check.left() > 120:
            compilations.begin("siss")
        if "e" in wanted:
            for tool in ("memcheck", "racecheck"):
                sanitize(check, tool)
        compilations.finish("f", min(1200 if DRY else 60, max(0.0, check.left() - 60)))
        if "f" in wanted:
            for name, method, network in (("SISS step", "siss", "mnist"), ("CIFAR step", "retrack", "cifar"), ("CelebA-HQ step", "retrack", "celeba")):
                more = ["--full"] if network == "celeba" and not DRY else []
                command = [*bench, "bench/bench_step.py", "-k", steps(method, network), "--step-seconds", "6", *more]
                check.stage("f", name, 90, command)
    finally:
        compilations.end()


def take_first_look(check: Check) -> None:
    """The extension that was built beforehand, or one that is built here; then every kernel once, against float64."""
    libraries = ["_C"] if DRY else ["_C", "_C_cuda"]
    if not check.stage("a", "extension loads", 30, [sys.executable, "-c", LOAD, *libraries]):
        build = {
            "FASTUNLEARN_CUDA": "off" if DRY else "auto",
            "FASTUNLEARN_CUDA_ARCHS": check.versions.get("capability", "90"),
            "FASTUNLEARN_EXTENSION": "require",
            "MAX_JOBS": str(os.cpu_count()),
        }
        check.stage("a", "extension is built", 90, [sys.executable, "setup.py", "build_ext", "--inplace"], build)
        check.stage("a", "extension loads", 30, [sys.executable, "-c", LOAD, *libraries])
    smoke = ["--smoke", "--threads", "1", "--benchmark-only", *DEVICE]
    check.stage("a", "kernels against float64", 60, [*PYTEST, *KERNEL_BENCHMARKS, *smoke], INTERPRETER)


def sanitize(check: Check, tool: str) -> None:
    """The kernels' calls under compute-sanitizer. A rehearsal makes the calls without it."""
    calls = [sys.executable, "scripts/sanitizer_calls.py", "cpu" if DRY else "cuda", "few"]
    if DRY:
        check.stage("e", tool, 45, calls)
        return
    sanitizer = next((path for path in ("/usr/local/cuda/bin/compute-sanitizer", *which("compute-sanitizer")) if Path(path).is_file()), None)
    if sanitizer is None:
        check.leave_out("e", tool, "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
        return
    # Without torch's caching every tensor is an allocation of its own, so that no access beyond its end hits another tensor.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *calls]
    check.stage("e", tool, 45, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


def which(name: str) -> list[str]:
    return [str(Path(folder) / name) for folder in os.environ.get("PATH", "").split(os.pathsep)]


if __name__ == "__main__":
    sys.exit(main())
