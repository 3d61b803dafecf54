"""What the tests of the ops share."""

import os
from unittest import mock

import pytest
import torch


@pytest.fixture(autouse=True)
def poisoned():
    """Outputs start out as NaN, or as the largest integer: an element that no kernel writes is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def only_kernels():
    """An op without a kernel is an error."""
    with mock.patch.dict(os.environ, FASTUNLEARN_BACKEND="kernels"):
        yield
