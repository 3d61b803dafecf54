"""The benchmarks run: every comparison once, at a tiny shape, through its correctness gate.

Of speed nothing is asserted: what a machine on which others work says of it changes from run to run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


TWO_GRADIENTS = ("siss", "siss no_is", "siss bernoulli", "erasediff")


def smoke(results: Path, *targets: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        *targets,
        "--smoke",
        "--device",
        "cpu",
        "--threads",
        "1",
        "--results",
        str(results),
        "-p",
        "no:cacheprovider",
    ]
    run = subprocess.run(
        command, cwd=ROOT, env=dict(os.environ, OMP_NUM_THREADS="1"), capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]


def test_every_benchmark_of_an_op_passes_its_gate(tmp_path):
    pytest.importorskip("pytest_benchmark")
    results = tmp_path / "smoke.json"
    smoke(results, "bench", "--ignore", "bench/bench_step.py")
    rows = json.loads(results.read_text())["rows"]
    ops = {row["op"] for row in rows if row["contestant"] == "papers" and row["seconds"] > 0}
    assert ops == {
        "noising",
        "redirect",
        "redirect+residual",
        "mixture",
        "residual",
        "lowpass_residual",
        "attention",
    }
    assert all(row["seconds"] or row["reason"] for row in rows)
    if (ROOT / "fastunlearn/_C.abi3.so").exists():
        assert {row["op"] for row in rows if row["contestant"] == "kernel" and row["seconds"]} == ops


def test_every_method_steps_and_learns_what_the_papers_way_learns(tmp_path):
    pytest.importorskip("pytest_benchmark")
    from bench.steps.contestants import papers_baseline
    from bench.steps.methods import timed

    smoke(tmp_path, "bench/bench_step.py")
    rows = json.loads((tmp_path / "steps_cpu.json").read_text())["rows"]
    assert {row["method"] for row in rows} == timed().keys()
    ours = {row["method"]: row for row in rows if row["contestant"] == "fastunlearn"}
    for row in rows:  # everything ran, and learned what the papers' way learns
        assert row["seconds"], row["reason"]
        assert row["contestant"] == "limit" or row["update_error"] < 1e-3
    # They are compared.
    for method in timed():
        if papers_baseline(method) is not None:
            assert ours[method]["times_faster"][papers_baseline(method)] > 0
    for method in TWO_GRADIENTS:
        assert sum(ours[method]["stages"].values()) == pytest.approx(1, abs=1e-2)
