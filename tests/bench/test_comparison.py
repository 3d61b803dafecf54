"""What a benchmark does when something goes wrong, and what it times."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from bench import harness
from bench.comparison import COMPILED, EAGER, KERNEL, PAPERS, Comparison, Options
from bench.journal import Journal
from bench.ready import Ready
from bench.step_comparison import StepComparison, StepOptions
from bench.steps import contestants, stages
from bench.steps.choices import by_layout
from bench.steps.job import Job
from bench.steps.networks import NETWORKS
from fastunlearn.ops import residual as op
from fastunlearn.testing import accelerator
from fastunlearn.testing.host_sync import TapeGraphs


class Benchmark:
    """As much of pytest-benchmark's fixture as a comparison needs."""

    group = None

    def __init__(self):
        self.extra_info = {}

    def pedantic(self, function, args, rounds, iterations):
        return function(*args)


def rows_in(path):
    return {row["contestant"]: row for row in json.loads(path.read_text())["rows"]}


# --- ops


def compare(path, calls, gate=lambda name, call: None, options=None):
    """One comparison of `residual` on a CPU."""
    yardstick = harness.Yardstick(None, 1 << 16)
    options = options or Options(full=False, smoke=True, seconds=0.0)
    comparison = Comparison(Benchmark(), yardstick, options, 1, Journal(path))
    arguments = torch.ones(2, 3), torch.zeros(2, 3), torch.ones(2)
    comparison(
        "residual", "any shape", "float32", calls, kernels=["residual"], floor=1, moved=1, gate=gate,
        closed_form=op._eager, arguments=arguments,
    )  # fmt: skip


def result():
    return (torch.ones(1),)


def fails():
    raise RuntimeError("out of luck")


def test_a_contestant_that_fails_costs_nobody_else(tmp_path):
    compare(tmp_path / "rows.json", {PAPERS: result, "rfft2": fails, KERNEL: result})
    rows = rows_in(tmp_path / "rows.json")
    assert rows["rfft2"]["seconds"] is None
    assert rows["rfft2"]["reason"] == "rfft2: RuntimeError: out of luck"
    assert {name for name, row in rows.items() if row["seconds"]} == {PAPERS, EAGER, KERNEL}


def test_a_kernel_that_fails_fails_the_benchmark_once_the_others_are_on_disk(tmp_path):
    with pytest.raises(pytest.fail.Exception, match="kernel: RuntimeError: out of luck"):
        compare(tmp_path / "rows.json", {PAPERS: result, KERNEL: fails})
    rows = rows_in(tmp_path / "rows.json")
    assert rows[PAPERS]["seconds"]
    assert rows[KERNEL]["reason"] == "kernel: RuntimeError: out of luck"


def test_a_contestant_that_fails_in_the_turns_costs_nobody_else(tmp_path):
    calls = []

    def fails_later():
        calls.append(None)
        return result() if len(calls) < 3 else fails()

    compare(tmp_path / "rows.json", {PAPERS: result, "rfft2": fails_later, KERNEL: result})
    rows = rows_in(tmp_path / "rows.json")
    assert rows["rfft2"]["reason"] == "rfft2: RuntimeError: out of luck"
    assert all(rows[name]["seconds"] for name in (PAPERS, EAGER, KERNEL))


def test_results_can_be_continued_and_damaged_ones_are_put_aside(tmp_path):
    path = tmp_path / "rows.json"
    compare(path, {PAPERS: result, KERNEL: result})
    before = json.loads(path.read_text())["rows"]
    journal = Journal(path, go_on=True)
    journal.write()
    assert json.loads(path.read_text())["rows"] == before
    path.write_text('{"rows": [')
    Journal(path, go_on=True).write()
    assert json.loads(path.read_text())["rows"] == []
    assert (tmp_path / "rows.damaged").read_text() == '{"rows": ['


def test_a_line_of_a_writer_that_was_ended_is_no_line(tmp_path):
    (tmp_path / "ready.txt").write_text("one\tdone\ntw")
    ready = Ready(tmp_path / "ready.txt")
    assert ready.missing("one") is None
    assert "not ready in time" in ready.missing("tw")


def test_a_wrong_result_is_not_timed(tmp_path):
    def gate(name, call):
        assert name != EAGER, "wrong"

    compare(tmp_path / "rows.json", {PAPERS: result, KERNEL: result}, gate)
    rows = rows_in(tmp_path / "rows.json")
    assert rows[EAGER]["seconds"] is None
    assert "wrong" in rows[EAGER]["reason"]


def test_what_was_not_compiled_in_time_is_left_out_and_named(tmp_path):
    (tmp_path / "ready.txt").write_text("residual, any shape, float32\tdone\n")
    for ready, left_out in ((Ready(tmp_path / "ready.txt"), False), (Ready(tmp_path / "none.txt"), True)):
        options = Options(full=True, smoke=True, seconds=0.0, ready=ready)
        compare(tmp_path / "rows.json", {PAPERS: result, KERNEL: result}, options=options)
        row = rows_in(tmp_path / "rows.json")[COMPILED]
        assert (row["seconds"] is None) == left_out
        assert ("not ready" in row["reason"]) == left_out


def test_compiling_beforehand_says_what_is_ready_and_times_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(harness.compilation, "BACKEND", "eager")
    ready = Ready(tmp_path / "ready.txt", recording=True)
    options = Options(full=True, smoke=True, seconds=0.0, compile_only=True, ready=ready)
    compare(tmp_path / "rows.json", {PAPERS: fails, KERNEL: result}, options=options)
    assert (tmp_path / "ready.txt").read_text() == "residual, any shape, float32\tdone\n"
    assert not (tmp_path / "rows.json").exists()


def test_a_compilation_that_fails_is_called_a_failure(tmp_path, monkeypatch):
    def backend(module, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(harness.compilation, "BACKEND", backend)
    ready = Ready(tmp_path / "ready.txt", recording=True)
    options = Options(full=True, smoke=True, seconds=0.0, compile_only=True, ready=ready)
    compare(tmp_path / "rows.json", {PAPERS: result, KERNEL: result}, options=options)
    options = Options(full=True, smoke=True, seconds=0.0, ready=Ready(tmp_path / "ready.txt"))
    compare(tmp_path / "rows.json", {PAPERS: result, KERNEL: result}, options=options)
    reason = rows_in(tmp_path / "rows.json")[COMPILED]["reason"]
    assert "its compilation failed" in reason
    assert "no compiler" in reason


# --- whole steps


def compare_steps(path, method="vanilla"):
    options = StepOptions(full=False, smoke=True, memory=False, seconds=0.0, official={}, layout="contiguous")
    StepComparison(Benchmark(), None, options, 1, Journal(path), {})("tiny", method)


def breaking(monkeypatch, name, after):
    """The contestant `name` raises `KeyboardInterrupt`, `RuntimeError` or the like at its step number
    `after`.
    """

    def break_with(error):
        build = contestants.Setting.build

        def built(setting, asked, **options):
            step, calls = build(setting, asked, **options), []
            if asked != name or options.get("plain"):
                return step

            def broken(draw=None):
                calls.append(draw)
                if len(calls) == after:
                    raise error
                step(draw)

            return broken

        monkeypatch.setattr(contestants.Setting, "build", built)

    return break_with


@pytest.mark.parametrize("after", [1, 4])
def test_a_step_that_fails_is_reported_and_the_others_stand(tmp_path, monkeypatch, after):
    """At its first step, or in the middle of the turns."""
    breaking(monkeypatch, "strongest", after)(RuntimeError("no memory"))
    compare_steps(tmp_path / "rows.json")
    rows = rows_in(tmp_path / "rows.json")
    assert rows["strongest"]["seconds"] is None
    assert rows["strongest"]["reason"] == "strongest: RuntimeError: no memory"
    others = [row for name, row in rows.items() if name != "strongest"]
    assert all(row["seconds"] and "strongest" not in row["times_faster"] for row in others)


def test_a_run_that_is_stopped_keeps_the_rounds_that_it_timed(tmp_path, monkeypatch):
    breaking(monkeypatch, "fastunlearn", 4)(KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        compare_steps(tmp_path / "rows.json")
    rows = rows_in(tmp_path / "rows.json")
    assert rows["fastunlearn"]["samples"] == 1
    assert all(row["seconds"] for row in rows.values())


def test_times_are_on_disk_before_anything_else_is_measured(tmp_path, monkeypatch):
    seen = []

    def shares(step, accelerator):
        seen.append(rows_in(tmp_path / "rows.json")["fastunlearn"]["seconds"])
        raise ImportError("no profiler")

    monkeypatch.setattr("bench.steps.stages.shares", shares)
    compare_steps(tmp_path / "rows.json")
    row = rows_in(tmp_path / "rows.json")["fastunlearn"]
    assert seen == [row["seconds"]]
    assert row["reason"] == "stages of fastunlearn: ImportError: no profiler"


class Stale:
    """A step that repeats its first update for ever, as a graph over memory that nobody writes to would."""

    def __init__(self, step, parameters):
        self.step, self.parameters, self.update = step, list(parameters), None

    def __call__(self, draw=None):
        before = [parameter.detach().clone() for parameter in self.parameters]
        if self.update is None:
            self.step(draw)
            self.update = [one.detach() - two for one, two in zip(self.parameters, before, strict=True)]
            return
        with torch.no_grad():
            torch._foreach_add_(self.parameters, self.update)


def wrong_sign(step, parameters):
    parameters = list(parameters)

    def wrong(draw=None):
        before = [parameter.detach().clone() for parameter in parameters]
        step(draw)
        with torch.no_grad():
            for parameter, value in zip(parameters, before, strict=True):
                parameter.copy_(2 * value - parameter)

    return wrong


def not_a_number(step, parameters):
    def wrong(draw=None):
        step(draw)
        with torch.no_grad():
            next(iter(parameters)).fill_(torch.nan)

    return wrong


WRONG = {
    "does nothing": lambda step, parameters: lambda draw=None: None,
    "wrong sign": wrong_sign,
    "not a number": not_a_number,
    "repeats itself": Stale,
}


def replacing(monkeypatch, name, wrong):
    """At the gate, contestant `name` takes the step that `wrong` makes of its own."""
    build = contestants.Setting.build

    def built(setting, asked, **options):
        step = build(setting, asked, **options)
        if asked != name or not options.get("plain"):
            return step
        return wrong(step, list(setting.model(asked).parameters()))

    monkeypatch.setattr(contestants.Setting, "build", built)


@pytest.fixture(scope="module")
def setting():
    """ReTrack on the smallest network, where a tape takes the place of a CUDA graph."""
    job = Job(NETWORKS["tiny"], "retrack", torch.device("cpu"))
    return by_layout(job, accelerator.StandIn(), {}, "contiguous")["contiguous"]


@pytest.fixture
def with_tapes(monkeypatch):
    monkeypatch.setitem(accelerator.replay.RECORDERS, "cpu", lambda device: TapeGraphs())
    monkeypatch.setattr(accelerator.Pass, "by_role", lambda self: [self])


@pytest.mark.parametrize("wrong", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("name", ["strongest", "strongest, replayed", "Unlearner", "Unlearner, replayed"])
@pytest.mark.usefixtures("with_tapes")
def test_the_gate_lets_nothing_wrong_pass(setting, monkeypatch, name, wrong):
    if wrong is Stale and "replayed" not in name:
        pytest.skip("an eager contestant takes one step at the gate")
    right = contestants.Gate(setting, 4).check(name)
    assert right.error <= right.allowed
    replacing(monkeypatch, name, wrong)
    found = contestants.Gate(setting, 4).check(name)
    assert not found.error <= found.allowed


@pytest.mark.parametrize("wrong", [wrong_sign, not_a_number], ids=["wrong sign", "not a number"])
def test_what_does_not_pass_the_gate_is_not_timed(tmp_path, monkeypatch, wrong):
    replacing(monkeypatch, "strongest", wrong)
    compare_steps(tmp_path / "rows.json")
    rows = rows_in(tmp_path / "rows.json")
    assert rows["strongest"]["seconds"] is None
    assert "its update differs from the papers'" in rows["strongest"]["reason"]
    assert rows["fastunlearn"]["seconds"]


def test_a_step_that_changes_no_weights_is_not_timed(tmp_path, monkeypatch):
    """What is timed is built anew after the gate."""
    build = contestants.Setting.build

    def built(setting, asked, **options):
        idle = asked == "strongest" and not options.get("plain")
        return (lambda draw=None: None) if idle else build(setting, asked, **options)

    monkeypatch.setattr(contestants.Setting, "build", built)
    compare_steps(tmp_path / "rows.json")
    row = rows_in(tmp_path / "rows.json")["strongest"]
    assert row["seconds"] is None
    assert row["reason"] == "strongest: RuntimeError: its step changes no weights"


def test_a_compiled_step_that_was_not_ready_is_left_out_and_named(tmp_path):
    line = "tiny, vanilla, float32, contiguous, strongest\tits compilation failed: no luck\n"
    (tmp_path / "ready.txt").write_text(line)
    options = StepOptions(full=True, smoke=True, memory=False, seconds=0.0, official={}, layout="contiguous")
    options = replace(options, ready=Ready(tmp_path / "ready.txt"))
    StepComparison(Benchmark(), None, options, 1, Journal(tmp_path / "rows.json"), {})("tiny", "vanilla")
    rows = rows_in(tmp_path / "rows.json")
    assert rows["strongest, compiled"]["reason"] == "strongest, compiled: its compilation failed: no luck"
    assert "not ready in time" in rows["fastunlearn, compiled"]["reason"]
    assert rows["fastunlearn"]["seconds"]


def test_a_layout_that_cannot_be_chosen_costs_no_contestant(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.steps.choices.faster_layout", lambda settings, mode: fails())
    options, chosen = StepOptions(full=False, smoke=True, memory=False, seconds=0.0, official={}), {}
    StepComparison(Benchmark(), None, options, 1, Journal(tmp_path / "rows.json"), chosen)("tiny", "vanilla")
    assert all(row["seconds"] for row in rows_in(tmp_path / "rows.json").values())
    assert chosen["tiny float32"]["layout_failures"] == ["limit: RuntimeError: out of luck"]


def test_without_the_papers_way_rows_say_that_nothing_was_checked(tmp_path, monkeypatch):
    breaking(monkeypatch, "retrack repo", 1)(RuntimeError("no memory"))
    monkeypatch.setattr("bench.step_comparison.Gate", lambda setting, rows: fails())
    compare_steps(tmp_path / "rows.json")
    row = rows_in(tmp_path / "rows.json")["fastunlearn"]
    assert row["seconds"]
    assert "not checked, for the papers' way failed" in row["note"]


def test_a_profile_of_a_gpu_has_spans_twice():
    cpu, cuda = torch.autograd.DeviceType.CPU, torch.autograd.DeviceType.CUDA

    def event(key, device, kernels, annotation=True):
        return SimpleNamespace(
            key=key, device_type=device, device_time_total=kernels, is_user_annotation=annotation
        )

    events = [
        event("a", cpu, 10.0),
        event("a", cuda, 295.0),
        event("a", cpu, 3.0, annotation=False),
        event("b", cpu, 5.0),
    ]
    assert stages.span_times(events, "device_time_total") == {"a": 10.0, "b": 5.0}


def test_stage_shares_need_no_nvtx(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nvtx", None)
    compare_steps(tmp_path / "rows.json")
    assert sum(rows_in(tmp_path / "rows.json")["fastunlearn"]["stages"].values()) == pytest.approx(
        1, abs=1e-2
    )


# --- the clock of a device


class Timeline:
    """A host and a device on one clock that only they move: work is queued by the host and done by the device
    in order.
    """

    device = torch.device("cpu")

    def __init__(self):
        self.now = self.busy_until = 0.0

    def host_works(self, seconds):
        self.now += seconds

    def device_works(self, seconds):
        self.busy_until = max(self.busy_until, self.now) + seconds

    wait = device_works

    def synchronize(self):
        self.now = max(self.now, self.busy_until)

    def event(self):
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.busy_until, self.now))
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event


def test_python_is_not_timed_on_a_device(monkeypatch):
    timeline = Timeline()
    monkeypatch.setattr(harness.time, "perf_counter", lambda: timeline.now)

    def call():
        timeline.host_works(3e-3)
        timeline.device_works(1e-4)
        timeline.host_works(2e-3)
        timeline.device_works(1e-4)

    yardstick = SimpleNamespace(accelerator=timeline, flush=lambda: timeline.device_works(1e-5))
    taken = harness._DeviceClock(yardstick, timeline)({"call": call})
    assert taken["call"] == pytest.approx(2e-4)
    monkeypatch.setattr(Timeline, "wait", lambda self, seconds: None)
    assert harness._DeviceClock(yardstick, timeline)({"call": call})["call"] > 2e-3
