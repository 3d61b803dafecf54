"""What all tests share: one thread (results and times do not depend on the machine), the golden vectors, and the GPU.

`pytest -m gpu` is what only a GPU can test (scripts/gpu_check.sh). With FASTUNLEARN_DRY=1 a CPU stands in for it, and of every
test function the first case runs: whether the tests themselves work, not whether every case passes.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastunlearn.testing import golden as golden_vectors
from fastunlearn.testing.accelerator import DRY, Accelerator, find_accelerator, rehearsal

torch.set_num_threads(1)

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
        function = item.path, item.nodeid.partition("[")[0]
        (left_out if function in seen else kept).append(item)
        seen.add(function)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden vectors: `$FASTUNLEARN_GOLDEN`, or the committed selection. An empty or missing folder is an error."""
    return golden_vectors.root(Path(__file__).parent / "golden" / "data")


@pytest.fixture
def gpu() -> Accelerator:
    """The GPU, or its stand-in; a test that asks for it is marked `gpu`, and skipped where there is neither."""
    found = find_accelerator()
    if found is None:
        pytest.skip("needs a GPU (FASTUNLEARN_DRY=1: a stand-in)")
    return found
