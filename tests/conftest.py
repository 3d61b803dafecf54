"""What all tests share: one thread, fixed random numbers, nothing left behind, the golden vectors, and the
GPU.

`pytest -m gpu` is what only a GPU can test (scripts/gpu_check.sh). With FASTUNLEARN_DRY=1 a CPU stands in for
it, and of every test function the first case runs: whether the tests themselves work, not whether every case
passes.
"""

from __future__ import annotations

import logging
import os
import random
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

from fastunlearn.testing import golden as golden_vectors
from fastunlearn.testing.accelerator import DRY, Accelerator, find_accelerator, rehearsal

torch.set_num_threads(1)  # results do not depend on the machine

# The same examples at every run, on every machine, however busy it is.
calm = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("everywhere", derandomize=True, **calm)
settings.load_profile("everywhere")


@pytest.fixture(autouse=True)
def same_random_numbers():
    """A test draws the same numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_terminal():
    """What a test prints is as wide as here, and without colours, wherever the tests are started from."""
    names = "COLUMNS", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"
    given = {name: os.environ.pop(name) for name in names if name in os.environ}
    os.environ["COLUMNS"] = "120"
    yield
    del os.environ["COLUMNS"]
    os.environ.update(given)


STOPPING = signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1


def process_state() -> dict[str, object]:
    """What belongs to the whole process, and would reach the tests that run later."""
    # Not what libraries add when they are first imported.
    read_here = "FASTUNLEARN_", "ACCELERATE_", "CUDA_", "OMP_", "TRITON_", "RANK", "WORLD_SIZE", "LOCAL_"
    by_inductor = "TRITON_PTXAS_PATH", "TRITON_CACHE_DIR"  # set where it first compiles a kernel
    environment = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(read_here) and name not in by_inductor
    }
    return {
        "environment": environment,
        "folder": os.getcwd(),
        "threads of torch": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "cudnn.benchmark": torch.backends.cudnn.benchmark,
        "float32 products": torch.backends.cuda.matmul.fp32_precision,
        "log level": logging.getLogger("fastunlearn").level,
        "signals": [signal.getsignal(number) for number in STOPPING],
    }


@pytest.fixture(autouse=True)
def nothing_left_behind():
    """A test that leaves the process in another state fails, rather than one of those after it."""
    before = process_state()
    yield
    for what, value in process_state().items():
        assert value == before[what], f"{what}: changed by this test"


KERNELS = Path(__file__).parent / "triton"  # tests of what runs on GPUs alone


def pytest_configure(config: pytest.Config) -> None:
    patches = rehearsal()
    patches.__enter__()
    config.add_cleanup(lambda: patches.__exit__(None, None, None))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent == KERNELS:
            item.add_marker("gpu")
    if DRY:
        _keep_first_cases(config, items)


def _keep_first_cases(config: pytest.Config, items: list[pytest.Item]) -> None:
    seen, kept, left_out = set(), [], []
    for item in items:
        function = item.path, item.nodeid.partition("[")[0], item.get_closest_marker("gpu") is not None
        (left_out if function in seen else kept).append(item)
        seen.add(function)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden vectors: `$FASTUNLEARN_GOLDEN`, or the committed selection.

    An empty or missing folder is an error.
    """
    return golden_vectors.root(Path(__file__).parent / "golden" / "data")


@pytest.fixture(scope="session")
def pair():
    """Two processes in a gloo group."""
    from team import Team

    with Team(2) as team:
        yield team


@pytest.fixture
def gpu() -> Accelerator:
    """The GPU, or its stand-in; a test that asks for it is marked `gpu`, and skipped where neither is."""
    found = find_accelerator()
    if found is None:
        pytest.skip("needs a GPU (FASTUNLEARN_DRY=1: a stand-in)")
    return found
