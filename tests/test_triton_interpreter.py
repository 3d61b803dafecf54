"""tests/triton under Triton's interpreter, in a process of its own: the interpreter must be chosen before
triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton has wheels for Linux only")
pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9),
    reason="older interpreters pass float64 scalars as float32 and round a fused multiply-add twice",
)
ROOT = Path(__file__).resolve().parents[1]


def test_triton_kernels_under_the_interpreter():
    environment = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    command = [sys.executable, "-m", "pytest", "tests/triton", "-q", "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
