"""What the JIT makes of every launcher is what scripts/aot_check.py has checked; no GPU is needed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton has wheels for Linux only")
ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("arch", ["80", "90"])
def test_the_jit_compiles_every_configuration_and_nothing_else(arch):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "tests/jit_calls.py", arch]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-5_000:] + run.stderr[-20_000:]
