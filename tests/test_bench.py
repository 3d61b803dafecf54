"""The benchmarks run: every comparison once, at a tiny shape, through its correctness gate. How fast anything is does not matter here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_every_benchmark_of_an_op_passes_its_gate(tmp_path):
    pytest.importorskip("pytest_benchmark")
    results = tmp_path / "smoke.json"
    command = [sys.executable, "-m", "pytest", "bench", "--smoke", "--device", "cpu", "--threads", "1", "--results", str(results), "-p", "no:cacheprovider"]
    run = subprocess.run(command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    rows = [row for benchmark in json.loads(results.read_text())["benchmarks"] for row in benchmark["extra_info"]["rows"]]
    ops = {row["op"] for row in rows if row["contestant"] == "papers" and row["seconds"] > 0}
    assert ops == {"noising", "redirect", "redirect+residual", "mixture", "residual", "lowpass_residual"}
    assert all(row["seconds"] or row["reason"] for row in rows)
    if (ROOT / "fastunlearn/_C.abi3.so").exists():
        assert {row["op"] for row in rows if row["contestant"] == "kernel" and row["seconds"]} == ops
