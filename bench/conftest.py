"""Shared by all benchmarks: what is timed, where, and where results go.

pytest bench/ --benchmark-only                          the default: every op, shape and method, under ten
minutes on two cores pytest bench/bench_step.py --benchmark-only             whole steps alone pytest bench/
--benchmark-only --full                   every number of neighbours, mask and dtype, and torch.compile on a
CPU too pytest bench/ --benchmark-only --results NAME           and writes bench/results/NAME.json (with a
directory in it: NAME as it is), and whole
                                                        steps to steps_cpu.json or steps_<gpu>.json beside it;
                                                        a directory: both, the ops as ops_cpu.json or
                                                        ops_<gpu>.json. Both anew after every comparison
pytest bench/ --benchmark-only --memory                 and the peak memory of each contestant's step (on a
GPU always) pytest bench/ --benchmark-only --official-retrack PATH --official-siss PATH    and the real
repositories' step pytest bench/ --benchmark-only --threads 2              with so many threads (default: all
cores) pytest bench/ --benchmark-only --device cpu             default: the GPU where there is one pytest
bench/ --compile-only --ready FILE               compiles what would be compiled, and says so in FILE, line by
line (ready.py) pytest bench/ --benchmark-only --ready FILE             leaves out what is not in FILE pytest
bench/ --smoke                                   every benchmark once at a tiny shape: does it work, not how
fast it is

With FASTUNLEARN_DRY=1 a CPU stands in for the GPU: the same contestants, built, checked and timed; no number
means anything.
"""

from __future__ import annotations

import os
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from fastunlearn.host.memory import keep_freed_memory
from fastunlearn.testing.accelerator import Accelerator, StandIn, find_accelerator, rehearsal

from .comparison import Comparison, Options
from .harness import COPY_BYTES, Yardstick
from .journal import Journal
from .ready import Ready
from .report import render
from .step_comparison import StepComparison, StepOptions
from .step_report import render as render_steps
from .steps.choices import LAYOUTS
from .steps.contestants import OFFICIAL_RETRACK, OFFICIAL_SISS
from .steps.networks import SMOKE

HERE = Path(__file__).parent
LOAD = os.getloadavg()[0]  # before the run adds its own
# On a GPU, where time may be short, the kernels that the papers' shapes need most come first.
ORDER = (
    "bench_redirect",
    "bench_residual",
    "bench_mixture",
    "bench_noising",
    "bench_lowpass_residual",
    "bench_attention",
    "bench_neighbors",
    "bench_step",
)
MEMORY = pytest.StashKey[str]()  # what becomes of freed memory
ACCELERATOR = pytest.StashKey[Accelerator | None]()
READY = pytest.StashKey[Ready]()
OPS, STEPS = pytest.StashKey[Journal](), pytest.StashKey[Journal]()
CHOSEN = pytest.StashKey[dict]()  # for steps: by measurement at the start


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastunlearn benchmarks")
    group.addoption("--results", metavar="NAME", help="write the measurements to bench/results/NAME.json")
    group.addoption(
        "--go-on",
        action="store_true",
        help="what the files of --results hold stays; this run's rows come after",
    )
    group.addoption(
        "--threads", type=int, default=os.cpu_count(), help="threads of torch and of the baselines"
    )
    group.addoption(
        "--device",
        default="cpu" if find_accelerator() is None else "cuda",
        choices=("cpu", "cuda"),
        help="where ops and steps are timed",
    )
    group.addoption(
        "--layout", choices=LAYOUTS, help="memory format of the networks (default: the faster one)"
    )
    group.addoption(
        "--contestants",
        metavar="A,B",
        help="of whole steps only these, in all their modes: limit,strongest,Unlearner",
    )
    group.addoption(
        "--compile-only", action="store_true", help="compiles what would be compiled; times nothing"
    )
    group.addoption(
        "--ready",
        metavar="FILE",
        type=Path,
        help="what --compile-only has compiled: written by it, read otherwise",
    )
    group.addoption("--full", action="store_true", help="every case, and torch.compile on a CPU too")
    group.addoption(
        "--smoke", action="store_true", help="one round at a tiny shape, to see that the benchmarks work"
    )
    group.addoption(
        "--warm",
        action="store_true",
        help="caches keep what the contestant before left: no flush between calls",
    )
    group.addoption(
        "--keep-freed-memory",
        action="store_true",
        help="no contestant pays for pages that malloc gave back to the system (glibc)",
    )
    group.addoption(
        "--memory",
        action="store_true",
        help="the peak memory of each contestant's step, in a process of its own (on a CPU; part of --full)",
    )
    group.addoption(
        "--official-retrack", metavar="PATH", help="a checkout of ReTrack's repository, whose step takes part"
    )
    group.addoption(
        "--official-siss", metavar="PATH", help="a checkout of SISS' repository, whose losses take part"
    )
    group.addoption(
        "--step-seconds",
        type=float,
        default=20.0,
        help="how long the contestants of one step take turns (at least 3 rounds)",
    )
    group.addoption(
        "--seconds",
        type=float,
        default=1.5,
        help="how long the contestants of one comparison take turns (at least 5 rounds)",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    # the tables of lowpass_residual
    config.addinivalue_line("filterwarnings", "ignore:Dynamo detected a call to a `functools.lru_cache`")
    option = config.getoption
    patches = rehearsal()
    patches.__enter__()
    config.add_cleanup(lambda: patches.__exit__(None, None, None))
    config.stash[ACCELERATOR] = find_accelerator() if option("--device") == "cuda" else None
    if option("--device") == "cuda" and config.stash[ACCELERATOR] is None:
        raise pytest.UsageError("--device cuda: expected a GPU that torch sees, got none")
    if option("--compile-only") and option("--ready") is None:
        raise pytest.UsageError(
            "--compile-only: expected --ready FILE beside it, which says what was compiled"
        )
    config.stash[READY] = Ready(option("--ready"), recording=option("--compile-only"))
    config.stash[MEMORY] = (
        "kept" if option("--keep-freed-memory") and keep_freed_memory() else "as malloc does"
    )
    config.stash[CHOSEN] = {}
    ops, steps = _results(option("--results"), _device_name(config.stash[ACCELERATOR]))
    common = {"threads": option("--threads"), "dry": isinstance(config.stash[ACCELERATOR], StandIn)}
    go_on = option("--go-on")
    config.stash[OPS] = Journal(ops, _machine(config), common | {"warm": option("--warm")}, go_on=go_on)
    config.stash[STEPS] = Journal(
        steps, _machine(config), common | {"chosen": config.stash[CHOSEN]}, go_on=go_on
    )


def _results(name: str | None, device: str) -> tuple[Path | None, Path | None]:
    """The files of the ops and of the steps."""
    if name is None:
        return None, None
    if Path(name).is_dir():
        return Path(name) / f"ops_{device}.json", Path(name) / f"steps_{device}.json"
    path = Path(name if os.path.dirname(name) else HERE / "results" / name).with_suffix(".json")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, path.parent / f"steps_{device}.json"


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What the numbers depend on is the processor and the versions, not the name of the host."""
    machine_info.pop("node", None)
    machine_info.update(torch=torch.__version__, triton=_version("triton"), commit=_commit())
    machine_info.update(
        load_average=LOAD,
        freed_memory=config.stash[MEMORY],
        instruction_set=os.environ.get("FASTUNLEARN_ISA", "best"),
    )
    if torch.cuda.is_available():
        machine_info.update(
            gpu=torch.cuda.get_device_name(), driver=_driver(), cuda=torch.version.cuda, cupy=_version("cupy")
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A smoke run needs one shape with uint8 rows and one with float rows, and nothing but the ops and the
    steps.
    """
    if config.getoption("--smoke"):
        kept = [item for item in items if _is_smoke(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept
    if config.stash[ACCELERATOR] is not None:
        items.sort(key=lambda item: ORDER.index(item.path.stem))


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(config: pytest.Config):
    """The comparisons have tables of their own (`report.py`, `step_report.py`)."""
    groups = yield
    return [
        (name, found)
        for name, found in groups
        if not any({"rows", "steps"} & benchmark["extra_info"].keys() for benchmark in found)
    ]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    device, ops, steps = config.getoption("--device"), config.stash[OPS], config.stash[STEPS]
    if ops.rows:
        gpu = config.stash[ACCELERATOR]
        terminalreporter.write("\n" + render(ops.rows, device, None if gpu is None else gpu.name))
    if steps.rows:
        terminalreporter.write("\n" + render_steps(steps.rows, device))
    for journal in (ops, steps):
        if journal.rows and journal.path is not None:
            terminalreporter.write_line(f"measurements: {journal.path}")
    if (ops.rows or steps.rows) and LOAD > 0.5 and device == "cpu":
        why = "on a busy machine threads wait for each other: no number above is one to quote"
        terminalreporter.write_line(f"the load average was {LOAD:.1f} at the start; {why}")


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest):
    """The number of threads of every benchmark, for torch and whatever BLAS or OpenMP the baselines bring."""
    threadpoolctl = pytest.importorskip("threadpoolctl")
    count = request.config.getoption("--threads")
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    with threadpoolctl.threadpool_limits(count):
        yield count
    torch.set_num_threads(before)


@pytest.fixture
def journal(request: pytest.FixtureRequest) -> Journal:
    """Where the rows of a benchmark of its own kind go."""
    return request.config.stash[OPS]


@pytest.fixture(scope="session")
def yardstick(request: pytest.FixtureRequest) -> Yardstick:
    option = request.config.getoption
    return Yardstick(
        request.config.stash[ACCELERATOR], 1 << 20 if option("--smoke") else COPY_BYTES, warm=option("--warm")
    )


@pytest.fixture
def compare(
    request: pytest.FixtureRequest, benchmark, yardstick: Yardstick, threads: int, monkeypatch
) -> Comparison:
    """Compares the contestants of one op.

    Ops must run their kernel: plain torch is never timed under the kernel's name.
    """
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "kernels")
    option, stash = request.config.getoption, request.config.stash
    options = Options(
        option("--full"), option("--smoke"), option("--seconds"), option("--compile-only"), stash[READY]
    )
    return Comparison(benchmark, yardstick, options, threads, stash[OPS])


@pytest.fixture
def compare_steps(request: pytest.FixtureRequest, benchmark, threads: int, monkeypatch) -> StepComparison:
    """Compares the contestants of one method's whole step.

    On a GPU ours must run its kernels, never plain torch.
    """
    if request.config.stash[ACCELERATOR] is not None:
        monkeypatch.setenv("FASTUNLEARN_BACKEND", "kernels")
    option, stash = request.config.getoption, request.config.stash
    checkouts = {OFFICIAL_RETRACK: option("--official-retrack"), OFFICIAL_SISS: option("--official-siss")}
    options = StepOptions(
        full=option("--full"),
        smoke=option("--smoke"),
        memory=option("--full") or option("--memory"),
        seconds=option("--step-seconds"),
        official={name: path for name, path in checkouts.items() if path},
        layout=option("--layout"),
        contestants=tuple(filter(None, (option("--contestants") or "").split(","))),
        compile_only=option("--compile-only"),
        ready=stash[READY],
    )
    return StepComparison(benchmark, stash[ACCELERATOR], options, threads, stash[STEPS], stash[CHOSEN])


def _is_smoke(item: pytest.Item) -> bool:
    if "compare_steps" in item.fixturenames:
        on_gpu = item.config.stash[ACCELERATOR] is not None
        return item.callspec.params["network"] == SMOKE and (
            on_gpu or item.callspec.params["precision"] == "float32"
        )
    return "compare" in item.fixturenames and _shape_name(item) in (None, "cifar", "sd")


def _device_name(accelerator: Accelerator | None) -> str:
    """`"cpu"`, or the GPU's name as files have it: `"h200"`."""
    return (
        "cpu"
        if accelerator is None
        else re.sub(r"[^a-z0-9]+", "_", accelerator.name.lower().removeprefix("nvidia "))
    )


def _driver() -> str | None:
    """The version of the GPU's driver; None where nvidia-smi does not tell."""
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _machine(config: pytest.Config) -> dict:
    info = config.hook.pytest_benchmark_generate_machine_info(config=config)
    config.hook.pytest_benchmark_update_machine_info(config=config, machine_info=info)
    return info | {"datetime": datetime.now(timezone.utc).isoformat()}


def _shape_name(item: pytest.Item) -> str | None:
    shape = item.callspec.params.get("shape")
    return shape and shape.name


def _version(package: str) -> str | None:
    try:
        return __import__(package).__version__
    except ImportError:
        return None


def _commit() -> str:
    """Of the checkout, or `$FASTUNLEARN_COMMIT` where the sources travel without their history."""
    given = os.environ.get("FASTUNLEARN_COMMIT")
    if given:
        return given
    describe = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=HERE, capture_output=True, text=True
    )
    return describe.stdout.strip() or "unknown"
