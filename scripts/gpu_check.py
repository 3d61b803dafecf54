"""What scripts/gpu_check.sh runs: stages in the order of their worth, each within its limit.

Nothing that was found out is lost: check.json and summary.txt are written anew after every stage, and the
benchmarks write their rows after every comparison. A stage that fails or outlasts its limit costs itself
alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_run import BUDGET, DRY, ROOT, Check, Outcome, kill, shorten, start

LETTERS = "abcdef"

VERSIONS = """
import json, platform, torch, triton
from importlib.metadata import PackageNotFoundError, version

found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__}
if torch.cuda.is_available():
    found |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    found["capability"] = "%d%d" % torch.cuda.get_device_capability()
for name in ("numpy", "diffusers", "nvtx", "cupy-cuda13x", "pytest-xdist"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        found[name] = "missing"
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


class Compilations:
    """What inductor has to compile, in the background, into one cache; over before anything is timed.

    The layout of the networks is chosen when the steps are timed, so both are compiled.
    """

    def __init__(self, check: Check, scratch: Path):
        self.check, self.scratch = check, scratch
        self.ready = scratch / "ready.txt"
        self._running: list[tuple[subprocess.Popen, Path]] = []

    def begin(self, method: str, precisions: tuple[str, ...], *others: list[str]) -> None:
        """Starts to compile the steps of `method` on the MNIST network, and what the arguments `others` name.

        Ours and the baselines are compiled apart: which of the two are ready must not depend on who comes
        first. A rehearsal has two cores, and one process for all.
        """
        parts = [
            ["--layout", layout, "--contestants", contestants]
            for layout in ("channels_last", "contiguous")
            for contestants in ("fastunlearn,Unlearner", "limit,strongest")
        ]
        jobs = [
            ["bench/bench_step.py", "-k", steps(method, precision=precision), *part]
            for precision in precisions
            for part in ([[]] if DRY else parts)
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
        lines = self.ready.read_text().splitlines() if self.ready.exists() else []
        done = sum(line.endswith("\tdone") for line in lines)
        outcome.seconds = round(time.monotonic() - began, 1)
        processes = f"processes: {len(failed)} failed, {len(ended)} ended"
        outcome.outcome = f"{done} ready, {len(lines) - done} failed; {processes}"
        self.check.outcomes.append(outcome)
        self.check.save()

    def end(self) -> None:
        """Ends what still runs, all at once: what was compiled is in the cache.

        What they said goes to the log.
        """
        for process, _ in self._running:
            if process.poll() is None:
                kill(process)
        with self.check.log.open("a") as log:
            for _, path in self._running:
                log.write(f"\n=== compilation {path.stem}\n{path.read_text()[-20_000:]}")
        self._running = []


PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider"]
PYTEST.append("--continue-on-collection-errors")
DEVICE = ["--device", "cuda"]
SMOKE = ["--smoke", "--threads", "1"] if DRY else []
KERNEL_BENCHMARKS = [
    *(f"bench/bench_{op}.py" for op in ("redirect", "residual", "mixture", "noising", "lowpass_residual")),
    *("-k", "cifar and (tensors or float32 or low) and not philox" if DRY else "celeba or cifar"),
]
INTERPRETER = {"TRITON_INTERPRET": "1" if DRY else "0"}


def steps(method: str, network: str = "mnist", precision: str = "bfloat16") -> str:
    """pytest's -k for the whole steps of a method in one precision. A rehearsal has a tiny network."""
    return f"{'tiny' if DRY else network}-{method} and {precision} and not no_is and not bernoulli"


def main() -> int:
    default = ROOT / "out" / "gpu_check_dry" if DRY else ROOT / "bench" / "results" / "gpu"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    budget = float(os.environ.get("BUDGET") or BUDGET)
    wanted = (os.environ.get("STAGES") or " ".join(LETTERS)).split()
    if unknown := set(wanted) - set(LETTERS):
        sys.exit(f"STAGES: expected letters of {' '.join(LETTERS)}, got {' '.join(sorted(unknown))}")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with tempfile.TemporaryDirectory() as scratch:
        set_environment(Path(scratch))
        versions = read_versions()
        if not DRY and "gpu" not in versions:
            wanted_gpu = f"gpu_check: expected a GPU that torch sees, got none ({sys.executable})"
            sys.exit(f"{wanted_gpu}; DRY=1 rehearses the check on a CPU")
        check = Check(out.resolve(), budget, float(os.environ.get("GPU_CHECK_STARTED") or time.time()))
        check.versions = versions
        check.save()
        take_stages(check, wanted, Path(scratch))
    check.save()
    shorten(check.log)
    print((check.out / "summary.txt").read_text())
    if DRY and "d" in wanted and (reasons := said_by_contestants(check.out)):  # which compiles for f, too
        print("in a rehearsal every contestant is built, checked and timed, but:", *reasons, sep="\n  ")
        return 1
    return int(check.failed)


def said_by_contestants(out: Path) -> list[str]:
    """Why some were not timed, or not measured in full."""
    files = [json.loads(path.read_text()) for path in sorted(out.glob("*_stand_in.json"))]
    rows = [row for file in files for row in file["rows"]]
    return [said for row in rows for said in (row["reason"], row.get("note")) if said]


def set_environment(scratch: Path) -> None:
    """For all stages: one cache for inductor and one for Triton, which later stages find filled."""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(scratch / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(scratch / "triton")
    # Of each process: eight of tests and nine that compile run at once.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "2"
    os.environ["PYTHONUNBUFFERED"] = "1"
    os.environ["FASTUNLEARN_DRY"] = "1" if DRY else "0"
    if "FASTUNLEARN_COMMIT" not in os.environ:
        os.environ["FASTUNLEARN_COMMIT"] = commit()


def commit() -> str:
    """Of the checkout; where the sources travel without their history, what gpu_wheels.sh wrote down."""
    noted = Path(os.environ.get("WHEELS", ROOT / ".wheels")) / "COMMIT"
    command = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        describe = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        said = describe.stdout.strip()
    except OSError:  # no git there
        said = ""
    return said or (noted.read_text().strip() if noted.exists() else "unknown")


def read_versions() -> dict[str, str]:
    said = subprocess.run([sys.executable, "-c", VERSIONS], cwd=ROOT, capture_output=True, text=True)
    if said.returncode:
        reason = said.stderr.strip().splitlines()[-1]
        sys.exit(f"gpu_check: expected torch and triton in {sys.executable}, got: {reason}")
    return json.loads(said.stdout.strip().splitlines()[-1]) | {"commit": os.environ["FASTUNLEARN_COMMIT"]}


def take_stages(check: Check, wanted: list[str], scratch: Path) -> None:
    compilations = Compilations(check, scratch)
    results = ["--benchmark-only", "--results", str(check.out), "--go-on", "--ready", str(compilations.ready)]
    bench = [*PYTEST, *DEVICE, *SMOKE, *results]
    try:
        if "a" in wanted:
            take_first_look(check)
        if {"c", "d"} & set(wanted):
            compilations.begin("retrack", ("bfloat16", "float32"), KERNEL_BENCHMARKS)
        if "b" in wanted:
            test(check)
        wait = min(check.share(60), max(0.0, check.left() - check.share(220)))
        compilations.finish("b", wait)
        if "c" in wanted:
            command = [*bench, *KERNEL_BENCHMARKS, "--seconds", "0.4"]
            clears = [f"ops_{check.device}.json"]
            check.stage("c", "kernels", 70, command, INTERPRETER, measures="ops", clears=clears)
        if "d" in wanted:
            clears = [f"steps_{check.device}.json"]
            for precision in ("bfloat16", "float32"):
                case = steps("retrack", precision=precision)
                command = [*bench, "bench/bench_step.py", "-k", case, "--step-seconds", "8"]
                check.stage("d", f"ReTrack step, {precision}", 75, command, measures="steps", clears=clears)
                clears = []
        if "f" in wanted and check.left() > 120:
            compilations.begin("siss", ("bfloat16",))
        if "e" in wanted:
            for tool in ("memcheck", "racecheck"):
                sanitize(check, tool)
        compilations.finish("f", min(check.share(60), max(0.0, check.left() - 60)))
        if "f" in wanted:
            # Of the largest network two layouts do not fit beside each other, and only --full times it.
            large = ["--layout", "channels_last"] if DRY else ["--layout", "channels_last", "--full"]
            more_steps = [
                ("SISS", steps("siss"), []),
                ("CIFAR-10", steps("retrack", "cifar"), []),
                ("CelebA-HQ", steps("retrack", "celeba"), large),
            ]
            for name, case, more in more_steps:
                if DRY and name != "SISS":  # the tiny network again: every contestant was rehearsed above
                    more = [*more, "--contestants", "limit,retrack repo,Unlearner"]
                command = [*bench, "bench/bench_step.py", "-k", case, "--step-seconds", "6", *more]
                check.stage("f", f"{name} step, bfloat16", 90, command, measures="steps")
    finally:
        compilations.end()


def test(check: Check) -> None:
    """What only a GPU can test, in several processes where pytest-xdist is there."""
    workers = [] if check.versions["pytest-xdist"] == "missing" else ["-n", "2" if DRY else "8"]
    patience = [] if DRY else ["--timeout", "100"]
    junit = ["--junitxml", str(check.out / "tests.xml")]
    command = [*PYTEST, "tests", "-m", "gpu and not slow", *workers, *patience, *junit]
    check.stage("b", "tests for GPUs", 120, command, INTERPRETER, clears=["tests.xml"])


def take_first_look(check: Check) -> None:
    """The extension, built beforehand or built here; then every kernel once, against float64."""
    libraries = ["_C"] if DRY else ["_C", "_C_cuda"]
    if not check.stage("a", "extension loads", 30, [sys.executable, "-c", LOAD, *libraries]):
        build = {
            "FASTUNLEARN_CUDA": "off" if DRY else "auto",
            "FASTUNLEARN_CUDA_ARCHS": check.versions.get("capability", "90"),
            "FASTUNLEARN_EXTENSION": "require",
            "MAX_JOBS": str(os.cpu_count()),
        }
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        check.stage("a", "extension is built", 90, command, build)
        check.stage("a", "extension loads", 30, [sys.executable, "-c", LOAD, *libraries])
    smoke = ["--smoke", "--threads", "1", "--benchmark-only", *DEVICE]
    check.stage("a", "kernels against float64", 60, [*PYTEST, *KERNEL_BENCHMARKS, *smoke], INTERPRETER)


def sanitize(check: Check, tool: str) -> None:
    """The kernels' calls under compute-sanitizer. A rehearsal makes the calls without it."""
    calls = [sys.executable, "scripts/sanitizer_calls.py", "cpu" if DRY else "cuda", "few"]
    if DRY:
        check.stage("e", tool, 45, calls)
        return
    sanitizer = shutil.which("compute-sanitizer", path=f"/usr/local/cuda/bin:{os.environ.get('PATH', '')}")
    if sanitizer is None:
        check.leave_out("e", tool, "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
        return
    # Without torch's caching every tensor is an allocation of its own: no access beyond its end hits another.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *calls]
    check.stage("e", tool, 45, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})


if __name__ == "__main__":
    sys.exit(main())
