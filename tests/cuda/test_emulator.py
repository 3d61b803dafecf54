"""The emulator notices what it is there for: kernels that are wrong on purpose."""

from __future__ import annotations

import emulated
import pytest


@pytest.mark.parametrize(
    ("name", "status", "message"),
    [
        ("reads_beyond", 3, "outside a tensor"),
        ("writes_an_input", 3, "outside a tensor"),
        ("loads_misaligned", 5, "misaligned"),
        ("writes_beyond_shared", 4, "beyond the shared memory"),
        ("splits_a_barrier", 4, "a barrier that not all threads reach"),
    ],
)
def test_stops_at(emulator, name, status, message):
    done = emulated.fault(emulator, name)
    assert done.returncode == status
    assert message in done.stderr


def test_unwritten_shared_memory_is_nan(emulator):
    assert "nan" in emulated.fault(emulator, "reads_unwritten_shared").stdout


def test_a_missing_barrier_shows_in_one_of_the_orders(emulator):
    forward, backward = (
        emulated.fault(emulator, "forgets_a_barrier", order).stdout for order in ("forward", "backward")
    )
    assert forward != backward
