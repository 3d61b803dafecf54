"""Shared by all benchmarks: what is timed, where, and where results go.

pytest bench/ --benchmark-only                          the default: every op, shape and method, under ten minutes on two cores
pytest bench/bench_step.py --benchmark-only             whole steps alone
pytest bench/ --benchmark-only --full                   every number of neighbours, mask and dtype, and torch.compile on a CPU too
pytest bench/ --benchmark-only --results NAME           and writes bench/results/NAME.json (with a directory in it: NAME as it is), and whole
                                                        steps to steps_cpu.json or steps_<gpu>.json beside it; a directory: only these
pytest bench/ --benchmark-only --memory                 and the peak memory of each contestant's step (on a GPU always)
pytest bench/ --benchmark-only --official-retrack PATH --official-siss PATH    and the real repositories' step
pytest bench/ --benchmark-only --threads 2              with so many threads (default: all cores)
pytest bench/ --benchmark-only --device cpu             default: the GPU where there is one
pytest bench/ --smoke                                   every benchmark once at a tiny shape: does it work, not how fast it is
"""

from __future__ import annotations

import os
import subprocess
from datetime import datetime, timezone
from pathlib import Path

import pytest
import torch

from fastunlearn.host_memory import keep_freed_memory

from .comparison import Comparison, Options, Row
from .harness import COPY_BYTES, Yardstick
from .report import render
from .step_comparison import StepComparison, StepOptions, StepRow
from .step_report import render as render_steps
from .step_report import write as write_steps
from .steps.contestants import OFFICIAL_RETRACK, OFFICIAL_SISS
from .steps.networks import SMOKE

HERE = Path(__file__).parent
MEMORY = pytest.StashKey[str]()  # what becomes of freed memory
LOAD = os.getloadavg()[0]  # before the run adds its own
ROWS = pytest.StashKey[list[Row]]()
STEP_ROWS = pytest.StashKey[list[StepRow]]()
CHOSEN = pytest.StashKey[dict]()  # for steps: by measurement at the start
STEP_FOLDER = pytest.StashKey[Path]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastunlearn benchmarks")
    group.addoption("--results", metavar="NAME", help="write the measurements to bench/results/NAME.json")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="threads of torch and of the baselines")
    group.addoption("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"), help="where the ops are timed")
    group.addoption("--full", action="store_true", help="every case, and torch.compile on a CPU too")
    group.addoption("--smoke", action="store_true", help="one round at a tiny shape, to see that the benchmarks work")
    group.addoption("--warm", action="store_true", help="caches keep what the contestant before left: no flush between calls")
    group.addoption("--keep-freed-memory", action="store_true", help="no contestant pays for pages that malloc gave back to the system (glibc)")
    group.addoption("--memory", action="store_true", help="the peak memory of each contestant's step, in a process of its own (on a CPU; implied by --full)")
    group.addoption("--official-retrack", metavar="PATH", help="a checkout of ReTrack's repository, whose step takes part")
    group.addoption("--official-siss", metavar="PATH", help="a checkout of SISS' repository, whose losses take part")
    group.addoption("--step-seconds", type=float, default=20.0, help="how long the contestants of one step take turns (at least 3 rounds)")
    group.addoption("--seconds", type=float, default=1.5, help="how long the contestants of one comparison take turns (at least 5 rounds)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("filterwarnings", "ignore:Dynamo detected a call to a `functools.lru_cache`")  # the tables of lowpass_residual
    config.stash[ROWS], config.stash[STEP_ROWS], config.stash[CHOSEN] = [], [], {}
    config.stash[MEMORY] = "kept" if config.getoption("--keep-freed-memory") and keep_freed_memory() else "as malloc does"
    name = config.getoption("--results")
    if name and Path(name).is_dir():
        config.stash[STEP_FOLDER] = Path(name)
    elif name:
        path = Path(name if os.path.dirname(name) else HERE / "results" / name).with_suffix(".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        config.option.benchmark_json = str(path)
        config.stash[STEP_FOLDER] = path.parent


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What the numbers depend on is the processor and the versions, not the name of the host."""
    machine_info.pop("node", None)
    machine_info.update(torch=torch.__version__, triton=_version("triton"), commit=_commit())
    machine_info.update(load_average=LOAD, freed_memory=config.stash[MEMORY], instruction_set=os.environ.get("FASTUNLEARN_ISA", "best"))
    if torch.cuda.is_available():
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()
        machine_info.update(gpu=torch.cuda.get_device_name(), driver=driver, cuda=torch.version.cuda, cupy=_version("cupy"))


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list, output_json: dict) -> None:
    """Whole steps have a file of their own."""
    output_json["benchmarks"] = [benchmark for benchmark in output_json["benchmarks"] if "steps" not in benchmark["extra_info"]]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """A smoke run needs one shape with uint8 rows and one with float rows, and nothing but the ops and the steps."""
    if config.getoption("--smoke"):
        kept = [item for item in items if _is_smoke(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_benchmark_group_stats(config: pytest.Config):
    """The comparisons have tables of their own (`report.py`, `step_report.py`)."""
    groups = yield
    return [(name, found) for name, found in groups if not any({"rows", "steps"} & benchmark["extra_info"].keys() for benchmark in found)]


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    device = config.getoption("--device")
    if config.stash[ROWS]:
        terminalreporter.write("\n" + render(config.stash[ROWS], device, torch.cuda.get_device_name() if device == "cuda" else None))
    if config.stash[STEP_ROWS]:
        terminalreporter.write("\n" + render_steps(config.stash[STEP_ROWS], device))
        if STEP_FOLDER in config.stash:
            path = config.stash[STEP_FOLDER] / f"steps_{_device_name(device)}.json"
            write_steps(config.stash[STEP_ROWS], path, _machine(config), {"threads": config.getoption("--threads"), "chosen": config.stash[CHOSEN]})
            terminalreporter.write_line(f"whole steps: {path}")
    if (config.stash[ROWS] or config.stash[STEP_ROWS]) and LOAD > 0.5 and device == "cpu":
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


@pytest.fixture(scope="session")
def yardstick(request: pytest.FixtureRequest) -> Yardstick:
    device, smoke = torch.device(request.config.getoption("--device")), request.config.getoption("--smoke")
    return Yardstick(device, 1 << 20 if smoke else COPY_BYTES, warm=request.config.getoption("--warm"))


@pytest.fixture
def compare(request: pytest.FixtureRequest, benchmark, yardstick: Yardstick, threads: int, monkeypatch) -> Comparison:
    """Compares the contestants of one op. Ops must run their kernel: plain torch is never timed under the kernel's name."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "kernels")
    option = request.config.getoption
    return Comparison(benchmark, yardstick, Options(option("--full"), option("--smoke"), option("--seconds")), threads, request.config.stash[ROWS])


@pytest.fixture
def compare_steps(request: pytest.FixtureRequest, benchmark, threads: int) -> StepComparison:
    """Compares the contestants of one method's whole step."""
    option = request.config.getoption
    checkouts = {OFFICIAL_RETRACK: option("--official-retrack"), OFFICIAL_SISS: option("--official-siss")}
    official = {name: path for name, path in checkouts.items() if path}
    options = StepOptions(option("--full"), option("--smoke"), option("--full") or option("--memory"), option("--step-seconds"), official)
    stash = request.config.stash
    return StepComparison(benchmark, torch.device(option("--device")), options, threads, stash[STEP_ROWS], stash[CHOSEN])


def _is_smoke(item: pytest.Item) -> bool:
    if "compare_steps" in item.fixturenames:
        return item.callspec.params["network"] == SMOKE and item.callspec.params["precision"] == "float32"
    return "compare" in item.fixturenames and _shape_name(item) in (None, "cifar", "sd")


def _device_name(device: str) -> str:
    """`"cpu"`, or the GPU's name as files have it: `"h200"`."""
    return device if device == "cpu" else torch.cuda.get_device_name().lower().removeprefix("nvidia ").replace(" ", "_")


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
    describe = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=40"], cwd=HERE, capture_output=True, text=True)
    return describe.stdout.strip() or "unknown"
