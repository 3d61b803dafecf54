"""What all tests share: one thread (results and times do not depend on the machine) and the golden vectors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastunlearn.testing import golden as golden_vectors

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def golden() -> Path:
    """The folder of golden vectors: `$FASTUNLEARN_GOLDEN`, or the committed selection. An empty or missing folder is an error."""
    return golden_vectors.root(Path(__file__).parent / "golden" / "data")
