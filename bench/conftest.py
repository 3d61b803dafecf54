"""Shared by all benchmarks: where results go, and how many threads run.

    pytest bench/ --benchmark-only                          times everything
    pytest bench/ --benchmark-only --results NAME           and writes bench/results/NAME.json
    pytest bench/ --benchmark-only --threads 2              with so many threads (default: all cores)
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parent / "results"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastunlearn benchmarks")
    group.addoption("--results", metavar="NAME", help="write the measurements to bench/results/NAME.json")
    group.addoption("--threads", type=int, default=os.cpu_count(), help="threads of torch and of the baselines")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    name = config.getoption("--results")
    if name:
        RESULTS.mkdir(exist_ok=True)
        config.option.benchmark_json = str(RESULTS / f"{Path(name).stem}.json")


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict) -> None:
    """What the numbers depend on is the processor and the versions, not the name of the host."""
    machine_info.pop("node", None)
    machine_info["torch"] = torch.__version__


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
