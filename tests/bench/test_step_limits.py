"""Steps beside their own limits: the command runs, refuses wrong updates, and the docs have its table."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench import step_limits
from bench.steps.methods import timed

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "bench/results/step_limits_cpu.json"


def run(monkeypatch, *arguments):
    monkeypatch.setattr("sys.argv", ["bench", "--network", "tiny", "--seconds", "0", *map(str, arguments)])
    monkeypatch.setattr(step_limits, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()
    try:
        step_limits.main()
    finally:
        torch.set_num_threads(threads)


def test_a_step_is_timed_beside_its_limit_and_vanilla_beside_its_own(monkeypatch, tmp_path):
    path = tmp_path / "found.json"
    for method in ("dpo", "retrack self_normalized", "dpo"):
        run(monkeypatch, "--method", method, "--json", path)
    rows = {row["method"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["retrack self_normalized", "dpo"]
    for row in rows.values():
        assert row["rounds"] == step_limits.LEAST_ROUNDS
        for ratio in (row["limit"], row["vanilla"], *row["times_faster"].values()):
            assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert rows["dpo"]["times_faster"].keys() == {"papers' formula", "strongest"}


def test_a_wrong_update_is_not_timed(monkeypatch):
    build = step_limits.Setting.build

    def wrong(setting, name, **options):
        step = build(setting, name, **options)
        return (lambda draw=None: None) if name == "strongest" else step

    monkeypatch.setattr(step_limits.Setting, "build", wrong)
    with pytest.raises(AssertionError, match="dpo, strongest: its update is off by 1"):
        run(monkeypatch, "--method", "dpo")


def test_the_docs_have_the_table_of_the_results(monkeypatch, capsys):
    run(monkeypatch, "--table", RESULTS)
    assert capsys.readouterr().out in (ROOT / "docs/benchmarks.md").read_text()


def test_every_new_objective_was_measured():
    measured = {row["method"] for row in json.loads(RESULTS.read_text())["rows"]}
    older = {"retrack", "siss", "siss no_is", "siss bernoulli", "erasediff", "neggrad", "vanilla"}
    assert measured >= timed().keys() - older
