"""A child that is forked after the parent has computed with two threads computes, and does not hang."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch

from fastunlearn.host.store import ImageStore
from fastunlearn.neighbors.nearest import nearest_neighbors

PATIENCE = 120  # seconds, after which the forked child hangs


def of_torch() -> torch.Tensor:
    """Large enough that torch shares it among its threads."""
    return torch.arange(2_000_000).float().exp()


def of_ours() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (600, 1, 28, 28), dtype=torch.uint8, generator=generator)
    return nearest_neighbors(ImageStore(images[:20]), ImageStore(images[20:]), 3)[0]


WORK = {"torch": of_torch, "ours": of_ours}


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("work", WORK)
def test_a_child_forked_after_use_computes(work: str):
    """It repeats what its parent did with two threads, and compares."""
    expected = WORK[work]()
    child = os.fork()
    if child == 0:
        # Whatever happens: the child is no test, and must not go on as one.
        try:
            os._exit(0 if torch.equal(WORK[work](), expected) and torch.get_num_threads() == 1 else 1)
        finally:
            os._exit(2)
    deadline = time.monotonic() + PATIENCE
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            pytest.fail("the forked child hangs")
        time.sleep(0.01)
    assert ended == (child, 0)
    assert torch.get_num_threads() == 2  # the parent's own stay
