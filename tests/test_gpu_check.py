"""The check of GPUs: its limits, its budget, what is on disk.

CI rehearses the whole of it (DRY=1 scripts/gpu_check.sh).
"""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOREVER = (
    "import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(1000)"
)
STUBBORN = """
import os, pathlib, signal, time
signal.signal(signal.SIGINT, signal.SIG_IGN)
pathlib.Path({path!r}).write_text(str(os.getpid()))
time.sleep(1000)
"""


@pytest.fixture
def gpu_run(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    spec = importlib.util.spec_from_file_location("gpu_run", ROOT / "scripts" / "gpu_run.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gpu_run", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "GRACE", 0.5)
    monkeypatch.setattr(module, "LEAST", 0.5)
    return module


def on_disk(check):
    return [
        (stage["stage"], stage["outcome"])
        for stage in json.loads((check.out / "check.json").read_text())["stages"]
    ]


def test_a_stage_that_fails_costs_itself_alone(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path / "out", 1000, time.time())
    assert not check.stage("a", "one", 60, [sys.executable, "-c", "print('said'); raise SystemExit(3)"])
    assert on_disk(check) == [("one", "failed (3)")]
    assert check.stage("b", "two", 60, [sys.executable, "-c", ""])
    assert on_disk(check) == [("one", "failed (3)"), ("two", "passed")]
    assert check.failed
    assert "said" in check.log.read_text()
    assert "one                          failed (3)" in (check.out / "summary.txt").read_text()


def test_a_limit_ends_a_stage_and_all_that_it_started(gpu_run, tmp_path):
    pid = tmp_path / "pid"
    check = gpu_run.Check(tmp_path / "out", 1000, time.time())
    child = STUBBORN.format(path=str(pid))
    command = [sys.executable, "-c", FOREVER.format(child=child)]
    with (tmp_path / "log").open("w") as output:
        process = gpu_run.start(command, output)
    while not pid.exists() or not pid.read_text():
        time.sleep(0.01)
    gpu_run.end(process)
    assert process.returncode is not None
    wait_until_gone(int(pid.read_text()))
    assert not check.stage("b", "endless", 1, command)
    assert on_disk(check) == [("endless", "stopped at its limit of 1 s")]


def wait_until_gone(pid):
    """Killed processes are dead soon; one that was not killed fails the test."""
    end = time.monotonic() + 60
    while not is_gone(pid):
        assert time.monotonic() < end, f"process {pid} goes on"
        time.sleep(0.01)


def is_gone(pid):
    """Not running any more; perhaps not yet collected by the process that has inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_stage_that_was_stopped_has_failed(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path, 1000, time.time())
    check.stage("b", "endless", 1, [sys.executable, "-c", "import time; time.sleep(1000)"])
    assert check.failed


@pytest.mark.parametrize("status", [0, 1])
def test_what_a_stage_leaves_running_is_ended(gpu_run, tmp_path, status):
    pid = tmp_path / "pid"
    child = STUBBORN.format(path=str(pid))
    parent = f"""
import pathlib, subprocess, sys, time
subprocess.Popen([sys.executable, '-c', {child!r}])
while not (pathlib.Path({str(pid)!r}).exists() and pathlib.Path({str(pid)!r}).read_text()): time.sleep(0.01)
sys.exit({status})
"""
    gpu_run.Check(tmp_path / "out", 1000, time.time()).stage(
        "b", "leaves", 60, [sys.executable, "-c", parent]
    )
    wait_until_gone(int(pid.read_text()))


def test_a_check_that_is_interrupted_ends_its_stage(gpu_run, tmp_path, monkeypatch):
    started = []
    start = gpu_run.start

    def interrupted(*args):
        process = start(*args)
        started.append(process)
        wait, calls = process.wait, []

        def first_wait(timeout=None):
            calls.append(timeout)
            if len(calls) == 1:
                raise KeyboardInterrupt
            return wait(timeout)

        process.wait = first_wait
        return process

    monkeypatch.setattr(gpu_run, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        gpu_run.run([sys.executable, "-c", "import time; time.sleep(1000)"], 100, tmp_path / "log")
    wait_until_gone(started[0].pid)


def test_a_stage_that_does_not_run_removes_nothing(gpu_run, tmp_path):
    rows = tmp_path / "steps_stand_in.json"
    rows.write_text('{"rows": [1, 2]}')
    gpu_run.Check(tmp_path, 100, time.time() - 99).stage(
        "d", "late", 60, ["never run"], measures="steps", clears=[rows.name]
    )
    assert rows.exists()
    check = gpu_run.Check(tmp_path, 100, time.time())
    check.stage("d", "runs", 60, [sys.executable, "-c", ""], measures="steps", clears=[rows.name])
    assert not rows.exists()


def test_a_second_try_counts(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path, 1000, time.time())
    check.stage("a", "loads", 60, [sys.executable, "-c", "raise SystemExit(1)"])
    assert check.failed
    check.stage("a", "loads", 60, [sys.executable, "-c", ""])
    assert not check.failed


def test_no_stage_begins_when_the_budget_is_spent(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path / "out", 100, time.time() - 99)
    assert not check.stage("c", "late", 60, ["never run"])
    assert on_disk(check) == [("late", "left out: no time")]
    assert not check.failed


def test_a_stage_gets_what_is_left_of_the_budget(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path / "out", 1000, time.time() - 900)
    check.stage("c", "some", 500, [sys.executable, "-c", ""])
    assert 0 < check.outcomes[0].limit <= 1000 - 900 - gpu_run.RESERVE


def test_a_smaller_budget_shortens_the_limits(gpu_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "DRY", False)
    assert gpu_run.Check(tmp_path, 210, time.time()).share(120) == 60
    assert gpu_run.Check(tmp_path, 840, time.time()).share(120) == 120


def test_a_benchmark_that_skips_everything_has_failed(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path, 1000, time.time())
    assert not check.stage("d", "steps", 60, [sys.executable, "-c", ""], measures="steps")
    assert on_disk(check) == [("steps", "failed: measured nothing")]
    rows = tmp_path / "steps_stand_in.json"
    write = f"import pathlib; pathlib.Path({str(rows)!r}).write_text('{{\"rows\": [1]}}')"
    assert check.stage("d", "steps", 60, [sys.executable, "-c", write], measures="steps")


def test_a_summary_that_cannot_be_drawn_costs_no_stage(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path, 1000, time.time() - 10)
    (tmp_path / "steps_stand_in.json").write_text('{"rows": [{"contestant": "limit"}]}')
    assert check.stage("d", "steps", 60, [sys.executable, "-c", ""])
    assert "no summary" in (tmp_path / "summary.txt").read_text()
    assert on_disk(check) == [("steps", "passed")]


def test_what_a_run_has_left_is_removed_where_it_is_written_anew(gpu_run, tmp_path):
    for name in ("ops_h200.json", "steps_h200.json"):
        (tmp_path / name).write_text('{"rows": []}')
    gpu_run.Check(tmp_path, 1000, time.time()).clear("steps_h200.json")
    assert [path.name for path in tmp_path.glob("*_h200.json")] == ["ops_h200.json"]


def test_a_log_is_cut_in_the_middle(gpu_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LOG_LIMIT", 8)
    (tmp_path / "log.txt").write_text("begin" + 100 * "." + "end!")
    gpu_run.shorten(tmp_path / "log.txt")
    assert (tmp_path / "log.txt").read_text() == "begi\n[...]\nend!"


def test_the_summary_shows_nothing_of_earlier_runs_and_other_devices(gpu_run, tmp_path):
    op = {"op": "redirect", "shape": "cifar", "job": "rows", "contestant": "kernel alone", "reason": "said"}
    op |= {"seconds": 1e-4, "share": 0.9, "times_faster": {}}
    check = gpu_run.Check(tmp_path, 1000, time.time() - 10)
    check.versions = {"gpu": "NVIDIA H100 80GB HBM3"}
    (tmp_path / "ops_h200.json").write_text(json.dumps({"rows": [op]}))
    check.save()
    assert "redirect" not in (tmp_path / "summary.txt").read_text()
    (tmp_path / "ops_h100_80gb_hbm3.json").write_text(json.dumps({"rows": [op]}))
    check.save()
    assert "redirect" in (tmp_path / "summary.txt").read_text()
    os.utime(tmp_path / "ops_h100_80gb_hbm3.json", (0, 0))
    check.save()
    assert "redirect" not in (tmp_path / "summary.txt").read_text()


def test_the_summary_shows_what_is_there(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path, 1000, time.time() - 10)
    check.versions = {"gpu": "NVIDIA H200"}
    (tmp_path / "tests.xml").write_text(
        '<testsuites><testsuite><testcase classname="a" name="one"/><testcase classname="a" name="two"><failure/></testcase>'
        '<testcase classname="a" name="three"><skipped/></testcase></testsuite></testsuites>'
    )
    ratios = {"papers": 3.0, "compiled": 1.5}
    op = {
        "op": "redirect",
        "shape": "cifar B128 K10",
        "job": "rows",
        "contestant": "kernel alone",
        "reason": "",
    }
    op |= {"seconds": 1e-4, "share": 0.9, "times_faster": ratios}
    failed = op | {"contestant": "compiled", "seconds": None, "reason": "compiled: failed"}
    (tmp_path / "ops_h200.json").write_text(json.dumps({"rows": [op, failed]}))
    step = {
        "network": "mnist",
        "method": "retrack",
        "precision": "bfloat16",
        "batch": 128,
        "layout": "channels_last",
    }
    step |= {
        "contestant": "limit",
        "seconds": 0.01,
        "times_faster": {"retrack repo": 4.0},
        "update_error": None,
    }
    step |= {"host_seconds": 0.002, "launches": 600, "stages": {}, "reason": ""}
    ours = step | {
        "contestant": "Unlearner, compiled, replayed",
        "seconds": None,
        "reason": "left out, its compilation was not ready in time",
    }
    (tmp_path / "steps_h200.json").write_text(json.dumps({"rows": [step, ours]}))
    check.save()
    summary = (tmp_path / "summary.txt").read_text()
    assert "tests: 1 passed, 1 failed, 1 skipped\n  failed: a::two" in summary
    assert (
        "redirect           cifar B128 K10     rows              100.0      90%      3.00       1.50"
        in summary
    )
    assert "compiled: failed" in summary
    assert "mnist retrack, batch 128                bfloat16, channels_last" in summary
    assert "limit                               10.00      4.00             2.00      600" in summary
    assert "Unlearner, compiled, replayed    not timed" in summary
    assert "mnist retrack, bfloat16: none of ours was timed" in summary
    assert "left out, its compilation was not ready in time" in summary


def test_files_that_are_cut_off_do_not_hide_the_others(gpu_run, tmp_path):
    check = gpu_run.Check(tmp_path, 1000, time.time())
    (tmp_path / "tests.xml").write_text("<testsuites>")
    check.save()
    assert "no GPU" in (tmp_path / "summary.txt").read_text()


def test_it_says_what_it_cannot_do(tmp_path):
    for more, message in (
        ({"STAGES": "a z"}, "STAGES: expected letters of a b c d e f, got z"),
        ({}, "gpu_check: expected a GPU that torch sees, got none"),
    ):
        env = (
            os.environ
            | {"PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "DRY": "0", "WHEELS": "none"}
            | more
        )
        said = subprocess.run(
            ["bash", "scripts/gpu_check.sh", str(tmp_path)], cwd=ROOT, env=env, capture_output=True, text=True
        )
        assert said.returncode == 1
        assert message in said.stderr
