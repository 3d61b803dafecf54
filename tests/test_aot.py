"""Every configuration of every Triton kernel compiles for sm_80 and sm_90 without a GPU, and docs/kernels.md
lists what came out.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
ROOT = Path(__file__).resolve().parents[1]


def test_every_configuration_compiles_and_the_table_is_current():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, "scripts/aot_check.py", "--check"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]


@pytest.fixture(scope="module")
def aot_check():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("aot_check", ROOT / "scripts" / "aot_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def complaints(aot_check, variant):
    usage = aot_check.compile_variant(variant, 80)
    return aot_check.complaints("sm_80", variant, usage, aot_check.SHARED_LIMIT[80])


# What loses its vectors -> what is said of it: floats, half precision, bytes of which 4 or 16 are read at
# once.
LOST = {
    ("residual", "D <= 1024, float32", "target"): "prediction, target: expected 2 ld of 16 bytes, got 1",
    ("noising", "D > 16384, bfloat16, noise -> bfloat16, no target", "x_t"):
        "x_t: expected 2 st of 8 bytes, got 0",
    ("noising", "D <= 16384, uint8, Philox -> float32", "images"): "images: expected 0 ld of 1 bytes, got 4",
    ("redirect", "CelebA, K = 10, uint8, Philox", "neighbors"):
        "images, neighbors: expected 5 ld of 16 bytes, got 1",
}  # fmt: skip


@pytest.mark.parametrize("lost", LOST, ids="-".join)
def test_lost_vectors_are_found(lost, aot_check):
    """A pointer of which Triton does not know that it is aligned is read or written element by element."""
    op, label, pointer = lost
    variant = next(variant for variant in aot_check.configurations(op) if variant.label == label)
    assert complaints(aot_check, variant) == []
    found = complaints(aot_check, variant._replace(unaligned=(pointer,)))
    assert f"{variant.kernel.__name__}: {label} (sm_80): {LOST[lost]}" in found


def test_local_memory_is_found(aot_check):
    """With registers for no more than a few numbers, the others go to local memory."""
    celeba = [
        variant for variant in aot_check.configurations("redirect") if variant.label.startswith("CelebA")
    ]
    variant = celeba[0]
    found = complaints(aot_check, variant._replace(max_registers=24))
    assert any("bytes of local memory a thread (spills)" in complaint for complaint in found)
