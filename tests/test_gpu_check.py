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
    # No test waits for what never ends, and none is too slow for what does.
    for name, seconds in {"LEAVE": 0.5, "GRACE": 0.5, "GRACE_OF_THE_OVER": 50_000}.items():
        monkeypatch.setattr(module, name, seconds)
    monkeypatch.setattr(module, "LEAST", 0.5)
    return module


@pytest.fixture
def gpu_check(gpu_run, monkeypatch):
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
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
    gpu_run.end(process, 0.5)
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

        def first_look():
            del process.poll
            raise KeyboardInterrupt

        process.poll = first_look
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


def pytest_of(folder, tests, hooks="", *options):
    """The command that runs `tests` as a stage does, beside a conftest of `hooks`."""
    (folder / "test_some.py").write_text(f"import os, threading, time, pytest\n\n{tests}")
    (folder / "conftest.py").write_text(f"import time\n\n{hooks}")
    plugins = ["-p", "no:cacheprovider", "-p", "gpu_outcomes"]
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--rootdir",
        str(folder),
        *plugins,
        *options,
        str(folder / "test_some.py"),
    ]


def with_scripts(**more):
    return {"PYTHONPATH": str(ROOT / "scripts")} | more


# The end of a session, and that of a process of pytest-xdist, for which the one that hands out the tests
# would wait.
HANGS = "def {hook}({given}):\n    if {where}:\n        time.sleep(100_000)"
NEVER_LEAVES = pytest.mark.parametrize(
    ("hook", "given", "where", "options"),
    [
        ("pytest_unconfigure", "", "True", []),
        ("pytest_sessionfinish", "session", "hasattr(session.config, 'workerinput')", ["-n", "2"]),
    ],
    ids=["alone", "xdist"],
)


@NEVER_LEAVES
def test_a_stage_is_over_when_its_tests_are(gpu_run, tmp_path, hook, given, where, options):
    command = pytest_of(
        tmp_path, "def test_one(): pass", HANGS.format(hook=hook, given=given, where=where), *options
    )
    check = gpu_run.Check(tmp_path / "out", 100_000, time.time())
    assert check.stage("b", "hangs", 50_000, command, with_scripts())
    assert on_disk(check) == [("hangs", "passed (did not exit by itself)")]
    assert not check.failed
    log = check.log.read_text()
    assert f"in {hook}" in log  # where it hung
    assert "still there" in log
    assert "-m pytest" in log


@NEVER_LEAVES
def test_tests_that_failed_count_where_the_process_stays(gpu_run, tmp_path, hook, given, where, options):
    tests = "def test_one(): pass\n\ndef test_two(): assert False"
    command = pytest_of(tmp_path, tests, HANGS.format(hook=hook, given=given, where=where), *options)
    check = gpu_run.Check(tmp_path / "out", 100_000, time.time())
    assert not check.stage("b", "hangs", 50_000, command, with_scripts())
    assert on_disk(check) == [("hangs", "failed (1) (did not exit by itself)")]
    assert check.failed


def test_what_ends_by_itself_has_its_own_status(gpu_run, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "LEAVE", 50_000)
    check = gpu_run.Check(tmp_path / "out", 100_000, time.time())
    check.stage("b", "fine", 50_000, pytest_of(tmp_path, "def test_one(): pass"), with_scripts())
    check.stage("b", "fails", 50_000, pytest_of(tmp_path, "def test_one(): assert False"), with_scripts())
    crash = "import os\n\ndef pytest_unconfigure():\n    os._exit(7)"
    check.stage("b", "crashes", 50_000, pytest_of(tmp_path, "def test_one(): pass", crash), with_scripts())
    check.stage("b", "empty", 50_000, pytest_of(tmp_path, ""), with_scripts())
    assert on_disk(check) == [
        ("fine", "passed"),
        ("fails", "failed (1)"),
        ("crashes", "failed (7)"),
        ("empty", "failed (5)"),
    ]


CLEARED = """
class Kept:
    def __del__(self, mkdir=os.mkdir):
        mkdir({cleared!r})
kept = Kept()
def test_one():
    import atexit
    atexit.register(lambda: open({called!r}, "w").close())
"""


@pytest.mark.parametrize("options", [[], ["-n", "1"]], ids=["alone", "xdist"])
def test_no_process_clears_its_memory_before_it_leaves(gpu_run, tmp_path, monkeypatch, options):
    monkeypatch.setattr(gpu_run, "LEAVE", 50_000)
    cleared, called = tmp_path / "cleared", tmp_path / "called"
    command = pytest_of(tmp_path, CLEARED.format(cleared=str(cleared), called=str(called)), "", *options)
    assert gpu_run.run(command, 50_000, tmp_path / "log", with_scripts())[0] == "passed"
    assert called.exists()  # what is to be done at the end is done
    assert not cleared.exists()
    usual = [argument for argument in command if argument != "gpu_outcomes"]
    del usual[usual.index("no:cacheprovider") + 1]
    assert gpu_run.run(usual, 50_000, tmp_path / "log")[0] == "passed"
    assert cleared.exists()


MANY = """
def test_passes(): pass
def test_fails(): assert "what it said" == ""
def test_skips(): pytest.skip("why")
@pytest.fixture
def breaks():
    yield
    raise RuntimeError("late")
def test_fails_late(breaks): pass
"""
CRASH = "\ndef test_crashes(): os._exit(9)\n"


def told_by(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(("more", "options"), [("", []), (CRASH, ["-n", "2"])], ids=["alone", "xdist"])
def test_each_test_is_on_disk_as_it_ends(gpu_run, tmp_path, monkeypatch, more, options):
    monkeypatch.setattr(gpu_run, "LEAVE", 50_000)
    path = tmp_path / "tests.jsonl"
    command = pytest_of(tmp_path, MANY + more, "", *options)
    outcome, _ = gpu_run.run(command, 50_000, tmp_path / "log", with_scripts(GPU_CHECK_TESTS=str(path)))
    assert outcome == "failed (1)"
    collected, *tests = told_by(path)
    expected = {
        "test_passes": "passed",
        "test_fails": "failed",
        "test_skips": "skipped",
        "test_fails_late": "failed",
    }
    if more:
        expected["test_crashes"] = "failed"
    assert collected == {"collected": len(expected)}
    assert {test["test"].partition("::")[2]: test["outcome"] for test in tests} == expected
    assert all(test["at"] >= 0 and test["seconds"] >= 0 for test in tests)
    said = {test["test"].partition("::")[2]: test.get("said", "") for test in tests}
    assert "what it said" in said["test_fails"]
    assert "late" in said["test_fails_late"]
    assert said["test_passes"] == ""


def test_a_module_that_cannot_be_read_is_a_failure(gpu_run, tmp_path):
    path = tmp_path / "tests.jsonl"
    command = pytest_of(tmp_path, "import nothing_of_this_name")
    gpu_run.run(command, 50_000, tmp_path / "log", with_scripts(GPU_CHECK_TESTS=str(path)))
    failed = [test for test in told_by(path) if test.get("outcome") == "failed"]
    assert len(failed) == 1
    assert "nothing_of_this_name" in failed[0]["said"]


def test_a_stage_that_is_stopped_keeps_the_tests_that_ended(gpu_run, tmp_path):
    path, log = tmp_path / "tests.jsonl", tmp_path / "log"
    command = pytest_of(tmp_path, "def test_one(): pass\n\ndef test_endless(): time.sleep(100_000)")
    with log.open("w") as output:
        process = gpu_run.start(command, output, with_scripts(GPU_CHECK_TESTS=str(path)))
        while not (path.exists() and "passed" in path.read_text()):
            assert process.poll() is None, log.read_text()
            time.sleep(0.01)
        gpu_run.tell_where(process, output)
        gpu_run.end(process, 0.5)
    collected, one = told_by(path)[:2]
    assert collected == {"collected": 2}
    assert (one["test"].partition("::")[2], one["outcome"]) == ("test_one", "passed")


def test_who_has_no_handler_is_not_asked_where_he_is(gpu_run, tmp_path):
    """The signal would end him."""
    with (tmp_path / "log").open("w") as output:
        process = gpu_run.start(["sleep", "100000"], output)
        gpu_run.tell_where(process, output)
        assert process.poll() is None
        gpu_run.end(process, 100)
    assert process.returncode == -2  # of the SIGINT
    assert "sleep 100000" in (tmp_path / "log").read_text()


class Clock:
    """Time that passes only where someone waits."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now

    time = monotonic

    def sleep(self, seconds):
        self.now += seconds


class Immortal:
    """A process that no signal ends."""

    pid, returncode = 0, None

    def __init__(self, clock):
        self.clock = clock

    def poll(self):
        return None

    def wait(self, timeout):
        self.clock.sleep(timeout)
        raise subprocess.TimeoutExpired("immortal", timeout)


@pytest.mark.parametrize("limit", [12, 60, 165])
def test_the_budget_has_room_for_what_a_stage_takes_to_end(gpu_run, tmp_path, monkeypatch, limit):
    clock, signals = Clock(), []
    monkeypatch.setattr(gpu_run, "time", clock)
    monkeypatch.setattr(gpu_run, "GRACE", 10)
    monkeypatch.setattr(gpu_run, "start", lambda *args: Immortal(clock))
    monkeypatch.setattr(gpu_run, "members", lambda group: [])
    monkeypatch.setattr(gpu_run.os, "killpg", lambda group, number: signals.append((number.name, clock.now)))
    outcome, seconds = gpu_run.run(["never run"], limit, tmp_path / "log")
    assert outcome == f"stopped at its limit of {limit} s"
    assert [name for name, _ in signals][:2] == ["SIGINT", "SIGKILL"]
    assert limit * 0.7 < signals[0][1] < signals[1][1] <= limit  # asked in time, and killed in time
    assert seconds <= limit + 2 * gpu_run.GONE
    assert 2 * gpu_run.GONE < gpu_run.RESERVE


CLEAN = "========= COMPUTE-SANITIZER\nevery kernel has run\n========= ERROR SUMMARY: 0 errors\n"


@pytest.mark.parametrize(
    ("said", "status"),
    [
        (CLEAN, 0),
        (
            CLEAN.replace(
                "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)"
            ),
            0,
        ),
        (CLEAN.replace("0 errors", "1 error"), 1),
        (CLEAN.replace("0 errors", "10 errors"), 1),
        (
            CLEAN.replace(
                "ERROR SUMMARY: 0 errors", "RACECHECK SUMMARY: 2 hazards displayed (0 errors, 2 warnings)"
            ),
            1,
        ),
        (CLEAN.replace("every kernel has run\n", ""), 1),
        (CLEAN.partition("========= ERROR")[0], None),
        ("", None),
    ],
)
def test_the_summary_of_the_sanitizer(gpu_run, tmp_path, said, status):
    log = tmp_path / "log"
    log.write_text(CLEAN)  # of the stage before
    summary = gpu_run.SanitizerSummary(log, log.stat().st_size)
    with log.open("a") as file:
        file.write(said)
    assert summary.status() == status


@pytest.mark.parametrize(
    ("said", "then", "outcome"),
    [
        (CLEAN, "time.sleep(100_000)", "passed (did not exit by itself)"),
        (CLEAN.replace("0 errors", "3 errors"), "time.sleep(100_000)", "failed (1) (did not exit by itself)"),
        (CLEAN, "", "passed"),
        (CLEAN, "raise SystemExit(9)", "failed (9)"),
        ("every kernel has run\n", "", "failed: no clean summary"),
    ],
)
def test_a_sanitizer_that_stays(gpu_run, tmp_path, monkeypatch, said, then, outcome):
    if "sleep" not in then:
        monkeypatch.setattr(gpu_run, "LEAVE", 50_000)
    check = gpu_run.Check(tmp_path, 100_000, time.time())
    command = [sys.executable, "-c", f"import time; print({said!r}, flush=True)\n{then}"]
    check.stage(
        "e", "memcheck", 50_000, command, ending=gpu_run.SanitizerSummary(check.log, check.log.stat().st_size)
    )
    assert on_disk(check) == [("memcheck", outcome)]


def test_the_sanitizer_s_calls_say_that_they_were_made(gpu_run):
    assert f'print("{gpu_run.ALL_CALLS_MADE}"' in (ROOT / "scripts" / "sanitizer_calls.py").read_text()


@pytest.mark.parametrize(("precisions", "threads"), [(("bfloat16",), 8), (("bfloat16", "float32"), 4)])
def test_those_that_compile_share_the_cores(gpu_run, gpu_check, tmp_path, monkeypatch, precisions, threads):
    started = []
    monkeypatch.setattr(
        gpu_check, "start", lambda command, output, env: started.append((" ".join(command), env))
    )
    monkeypatch.setattr(gpu_check.os, "cpu_count", lambda: 16)
    check = gpu_run.Check(tmp_path / "out", 1000, time.time())
    compilations = gpu_check.Compilations(check, tmp_path, tmp_path / "ready.txt")
    compilations.begin("retrack", precisions, ["bench/bench_redirect.py"])
    *steps, _ = started
    assert len(steps) == 2 * len(precisions)
    assert all(env["TORCHINDUCTOR_COMPILE_THREADS"] == str(threads) for _, env in started)
    assert all("--layout contiguous" in command for command, _ in steps)
    assert [sum(name in command for command, _ in steps) for name in precisions] == [2] * len(precisions)


MARKS = """
import pathlib, time
path = pathlib.Path({path!r})
path.with_suffix(".tmp").write_text("{status}")
path.with_suffix(".tmp").replace(path)
time.sleep(100_000)
"""


def test_what_compiles_is_over_when_it_says_so(gpu_run, gpu_check, tmp_path):
    check = gpu_run.Check(tmp_path / "out", 1000, time.time())
    ready = tmp_path / "ready.txt"
    ready.write_text("one\tdone\ntwo\tits compilation failed: why\n")
    compilations = gpu_check.Compilations(check, tmp_path, ready)
    for number, status in enumerate((0, 1)):
        mark, path = gpu_run.Mark(tmp_path / f"{number}.mark"), tmp_path / f"{number}.txt"
        code = MARKS.format(status=status, path=str(mark.path))
        with path.open("w") as output:
            compilations._running.append((gpu_run.start([sys.executable, "-c", code], output), path, mark))
    processes = [process for process, _, _ in compilations._running]
    compilations.finish("e", 50_000)
    assert on_disk(check) == [
        ("compilations, in background", "1 ready, 1 failed; processes: 1 failed, 0 ended")
    ]
    for process in processes:
        wait_until_gone(process.pid)


def test_what_was_compiled_with_many_threads_is_found_with_one():
    """Those that compile have many; those that look into the cache have one."""
    from torch._inductor import config

    assert hasattr(config, "compile_threads")
    assert not [name for name in config.save_config_portable() if "compile_threads" in name]


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
    tests = [{"collected": 4}]
    for outcome, seconds in (("passed", 7), ("failed", 2), ("skipped", 0)):
        tests.append({"test": f"a::{outcome}", "outcome": outcome, "seconds": seconds, "at": 9.0})
    (tmp_path / "tests.jsonl").write_text("".join(json.dumps(test) + "\n" for test in tests))
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
    assert "tests: 1 passed, 1 failed, 1 skipped, 1 had not ended\n  failed: a::failed\n" in summary
    assert "  slowest: 7 s a::passed, 2 s a::failed" in summary
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
    (tmp_path / "tests.jsonl").write_text(
        '{"test": "a", "outcome": "passed", "seconds": 1}\n{"test": "b", "outc'
    )
    check.save()
    summary = (tmp_path / "summary.txt").read_text()
    assert "no GPU" in summary
    assert "tests: 1 passed, 0 failed, 0 skipped\n" in summary


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


def test_what_contestants_say_is_read_from_their_own_files(gpu_check, tmp_path):
    """Other files of results have other rows."""
    row = {"reason": "", "note": None}
    (tmp_path / "lowpass_step_stand_in.json").write_text(json.dumps({"rows": [{"share": {}}]}))
    assert gpu_check.said_by_contestants(tmp_path) == []
    rows = [row, row | {"reason": "not built"}, row | {"note": "not compiled"}]
    (tmp_path / "steps_stand_in.json").write_text(json.dumps({"rows": rows}))
    assert gpu_check.said_by_contestants(tmp_path) == ["not built", "not compiled"]
