"""What scripts/gpu_check.sh runs: stages in the order of their worth, each within its limit.

Nothing that was found out is lost: check.json and summary.txt are written anew after every stage, and the
benchmarks write their rows after every comparison. A stage that fails or outlasts its limit costs itself
alone.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from gpu_run import BUDGET, DRY, LEAST, ROOT, Check, Mark, Outcome, SanitizerSummary, kill, shorten, start

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

    Args:
        scratch: a folder for what they print.
        ready: the file that says what is compiled.
    """

    def __init__(self, check: Check, scratch: Path, ready: Path):
        self.check, self.scratch, self.ready = check, scratch, ready
        self._running: list[tuple[subprocess.Popen, Path, Mark]] = []

    def begin(self, method: str, precisions: tuple[str, ...], *others: list[str]) -> None:
        """Starts to compile the steps of `method` on the MNIST network, and what the arguments `others` name.

        Ours and the baselines are compiled apart: which of the two are ready must not depend on who comes
        first. Of each the first one's compilation serves the second. The cores are shared out among them. A
        rehearsal has two cores, and one process for all.
        """
        parts = [
            ["--layout", COMPILED_LAYOUT, "--contestants", contestants]
            for contestants in ("fastunlearn,Unlearner", "limit,strongest")
        ]
        jobs = [
            ["bench/bench_step.py", "-k", steps(method, precision=precision), *part]
            for precision in precisions
            for part in ([[]] if DRY else parts)
        ]
        threads = max(1, min(MOST_THREADS, (os.cpu_count() or 1) // max(1, len(jobs))))
        env = {"TRITON_INTERPRET": "0", "TORCHINDUCTOR_COMPILE_THREADS": str(threads)}
        for number, job in enumerate([*jobs, *others]):
            command = [*PYTEST, *job, *DEVICE, *SMOKE, "--compile-only", "--ready", str(self.ready)]
            path = self.scratch / f"{method}-{number}.txt"
            mark = Mark(path.with_suffix(".mark"))
            with path.open("w") as output:
                process = start(command, output, env | {"GPU_CHECK_MARK": str(mark.path)})
            self._running.append((process, path, mark))

    def finish(self, letter: str, wait: float) -> None:
        """Gives them `wait` more seconds. One is over when it says so, as a stage is."""
        if not self._running:
            return
        outcome = Outcome("compilations, in background", letter, round(wait, 1))
        began = time.monotonic()
        while None in self._statuses() and time.monotonic() < began + wait:
            time.sleep(0.05)
        statuses = self._statuses()
        self.end()
        lines = self.ready.read_text().splitlines() if self.ready.exists() else []
        done = sum(line.endswith("\tdone") for line in lines)
        outcome.seconds = round(time.monotonic() - began, 1)
        failed = sum(status not in (None, 0) for status in statuses)
        processes = f"processes: {failed} failed, {statuses.count(None)} ended"
        outcome.outcome = f"{done} ready, {len(lines) - done} failed; {processes}"
        self.check.outcomes.append(outcome)
        self.check.save()

    def _statuses(self) -> list[int | None]:
        """Of the processes; None where one goes on."""
        return [
            mark.status() if process.poll() is None else process.returncode
            for process, _, mark in self._running
        ]

    def end(self) -> None:
        """Ends what still runs, all at once: what was compiled is in the cache.

        What they said goes to the log.
        """
        kill(*(process for process, _, _ in self._running if process.poll() is None))
        with self.check.log.open("a") as log:
            for _, path, _ in self._running:
                log.write(f"\n=== compilation {path.stem}\n{path.read_text()[-20_000:]}")
        self._running = []


KERNELS, RETRACK, BANDED, MORE_STEPS = 70, 75, 40, 90  # limits, in seconds, of what is timed
# The faster one on both GPUs that were measured (bench/results/ladder.md). Where a run finds the other one
# faster, it times nothing compiled.
COMPILED_LAYOUT = "contiguous"
MOST_THREADS = 8  # of a process that compiles
PYTEST = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-p", "gpu_outcomes"]
PYTEST.append("--continue-on-collection-errors")
DEVICE = ["--device", "cuda"]
SMOKE = ["--smoke", "--threads", "1"] if DRY else []
KERNEL_BENCHMARKS = [
    *(f"bench/bench_{op}.py" for op in ("redirect", "residual", "mixture", "noising", "lowpass_residual")),
    *("-k", "cifar and (tensors or float32 or low) and not philox" if DRY else "celeba or cifar"),
]
INTERPRETER = {"TRITON_INTERPRET": "1" if DRY else "0"}


# Words that stand behind the names of ReTrack and SISS in bench/bench_step.py.
VARIANTS = ["no_is", "bernoulli", "ratio", "clip", "superfactor", "auto", "self_normalized", "importance"]


def steps(method: str, network: str = "mnist", precision: str = "bfloat16") -> str:
    """pytest's -k for the whole steps of a method in one precision, without those of its variants, for which
    there is no time. A rehearsal has a tiny network.
    """
    wanted = [f"{'tiny' if DRY else network}-{method}", precision]
    return " and ".join([*wanted, *(f"not {variant}" for variant in VARIANTS)])


def precisions() -> tuple[str, ...]:
    """Of stage d, in the order of their worth."""
    wanted = (os.environ.get("PRECISIONS") or "bfloat16 float32").split()
    if unknown := set(wanted) - {"bfloat16", "float32"}:
        sys.exit(f"PRECISIONS: expected bfloat16 and float32, got {' '.join(sorted(unknown))}")
    return tuple(wanted)


def main() -> int:
    default = ROOT / "out" / "gpu_check_dry" if DRY else ROOT / "bench" / "results" / "gpu"
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else default
    budget = float(os.environ.get("BUDGET") or BUDGET)
    wanted = (os.environ.get("STAGES") or " ".join(LETTERS)).split()
    if unknown := set(wanted) - set(LETTERS):
        sys.exit(f"STAGES: expected letters of {' '.join(LETTERS)}, got {' '.join(sorted(unknown))}")
    precisions()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda received, _: sys.exit(128 + received))
    with tempfile.TemporaryDirectory() as scratch:
        cache = Path(os.environ.get("CACHE") or scratch).resolve()
        set_environment(cache)
        versions = read_versions()
        if not DRY and "gpu" not in versions:
            wanted_gpu = f"gpu_check: expected a GPU that torch sees, got none ({sys.executable})"
            sys.exit(f"{wanted_gpu}; DRY=1 rehearses the check on a CPU")
        check = Check(out.resolve(), budget, float(os.environ.get("GPU_CHECK_STARTED") or time.time()))
        check.versions = versions
        check.save()
        take_stages(check, wanted, Path(scratch), cache)
    check.save()
    shorten(check.log)
    print((check.out / "summary.txt").read_text())
    if DRY and "d" in wanted and (reasons := said_by_contestants(check.out)):  # which compiles for f, too
        print("in a rehearsal every contestant is built, checked and timed, but:", *reasons, sep="\n  ")
        return 1
    return int(check.failed)


def said_by_contestants(out: Path) -> list[str]:
    """Why some were not timed, or not measured in full."""
    paths = [out / f"{kind}_stand_in.json" for kind in ("ops", "steps")]
    files = [json.loads(path.read_text()) for path in paths if path.exists()]
    rows = [row for file in files for row in file["rows"]]
    return [said for row in rows for said in (row["reason"], row.get("note")) if said]


def set_environment(cache: Path) -> None:
    """For all stages: one cache for inductor and one for Triton, which later stages find filled."""
    given = os.environ.get("PYTHONPATH")
    ours = [str(ROOT), str(ROOT / "scripts")]
    os.environ["PYTHONPATH"] = os.pathsep.join([*ours, given] if given else ours)
    cache.mkdir(parents=True, exist_ok=True)
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(cache / "inductor")
    os.environ["TRITON_CACHE_DIR"] = str(cache / "triton")
    # With one, inductor starts no processes of its own, whose end its process would wait for. Those that do
    # nothing but compile have more, and what they cache does not depend on it.
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
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


def take_stages(check: Check, wanted: list[str], scratch: Path, cache: Path) -> None:
    compilations = Compilations(check, scratch, cache / "ready.txt")
    results = ["--benchmark-only", "--results", str(check.out), "--go-on", "--ready", str(compilations.ready)]
    bench = [*PYTEST, *DEVICE, *SMOKE, *results]
    try:
        if "a" in wanted:
            take_first_look(check)
        if "b" in wanted:
            test(check)
        # Not beside the tests: together they outlast both limits, even on 16 cores.
        if {"c", "d"} & set(wanted):
            kernels = [KERNEL_BENCHMARKS] if "c" in wanted else []
            compilations.begin("retrack", precisions() if "d" in wanted else (), *kernels)
        if "e" in wanted:
            sanitize(check, "memcheck", 60)
            sanitize(check, "racecheck", 30)
        timed = KERNELS * ("c" in wanted) + (RETRACK * len(precisions()) + BANDED) * ("d" in wanted)
        compilations.finish("e", min(check.share(120), check.spare(timed)))
        if "c" in wanted:
            command = [*bench, *KERNEL_BENCHMARKS, "--seconds", "0.4"]
            clears = [f"ops_{check.device}.json"]
            check.stage("c", "kernels", KERNELS, command, INTERPRETER, measures="ops", clears=clears)
        if "d" in wanted:
            clears = [f"steps_{check.device}.json"]
            for precision in precisions():
                case = steps("retrack", precision=precision)
                command = [*bench, "bench/bench_step.py", "-k", case, "--step-seconds", "8"]
                name = f"ReTrack step, {precision}"
                check.stage("d", name, RETRACK, command, measures="steps", clears=clears)
                clears = []
            name = f"lowpass_step_{check.device}.json"
            command = [sys.executable, "-m", "bench.lowpass_step", "--gpu", "--json", str(check.out / name)]
            command += ["--case", "tiny" if DRY else "mnist", "retrack", "--seconds", "0.1" if DRY else "8"]
            check.stage("d", "a band in a step, bfloat16", BANDED, command, clears=[name])
        if "f" in wanted and check.spare(3 * MORE_STEPS) > LEAST:
            compilations.begin("siss", ("bfloat16",))
            compilations.finish("f", min(check.share(60), check.spare(3 * MORE_STEPS)))
        if "f" in wanted:
            # Of the largest network two layouts do not fit beside each other, and only --full times it.
            large = ["--layout", "channels_last"] if DRY else ["--layout", "channels_last", "--full"]
            more_steps = [
                ("CIFAR-10", steps("retrack", "cifar"), []),
                ("SISS", steps("siss"), []),
                ("CelebA-HQ", steps("retrack", "celeba"), large),
            ]
            for name, case, more in more_steps:
                if DRY and name != "SISS":  # the tiny network again: every contestant was rehearsed above
                    more = [*more, "--contestants", "limit,retrack repo,Unlearner"]
                command = [*bench, "bench/bench_step.py", "-k", case, "--step-seconds", "6", *more]
                check.stage("f", f"{name} step, bfloat16", MORE_STEPS, command, measures="steps")
    finally:
        compilations.end()


def test(check: Check) -> None:
    """What only a GPU can test, in several processes where pytest-xdist is there."""
    workers = [] if check.versions["pytest-xdist"] == "missing" else ["-n", "2" if DRY else "8"]
    patience = [] if DRY else ["--timeout", "100"]
    command = [*PYTEST, "tests", "-m", "gpu and not slow", *workers, *patience, "--durations", "20"]
    env = INTERPRETER | {"GPU_CHECK_TESTS": str(check.out / "tests.jsonl")}
    check.stage("b", "tests for GPUs", 165, command, env, clears=["tests.jsonl"])


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


def sanitize(check: Check, tool: str, limit: float) -> None:
    """The kernels' calls under compute-sanitizer. A rehearsal makes the calls without it."""
    calls = [sys.executable, "scripts/sanitizer_calls.py", "cpu" if DRY else "cuda", "few"]
    if DRY:
        check.stage("e", tool, limit, calls)
        return
    sanitizer = shutil.which("compute-sanitizer", path=f"/usr/local/cuda/bin:{os.environ.get('PATH', '')}")
    if sanitizer is None:
        check.leave_out("e", tool, "compute-sanitizer is neither on the PATH nor in /usr/local/cuda/bin")
        return
    # Without torch's caching every tensor is an allocation of its own: no access beyond its end hits another.
    command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *calls]
    summary = SanitizerSummary(check.log, check.log.stat().st_size)
    check.stage("e", tool, limit, command, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, ending=summary)


if __name__ == "__main__":
    sys.exit(main())
