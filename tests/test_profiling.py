"""The ranges of the six stages: free when off, complete when on, closed by exceptions, absent from compiled
graphs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from fastunlearn import siss_step
from fastunlearn.host import profiling
from fastunlearn.host.profiling import stage
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule, mixture_inputs

STAGES = {"draw", "compose", "predict", "residual", "combine", "update"}


@pytest.fixture
def ranges(monkeypatch):
    """Ranges on, drawn by a stand-in for nvtx that keeps what is open and what was opened."""
    recorded = SimpleNamespace(open=[], seen=[])

    class Annotate:
        def __init__(self, message: str, domain: str):
            self.name = f"{domain}::{message}"

        def __enter__(self):
            recorded.open.append(self.name)
            recorded.seen.append(self.name)

        def __exit__(self, *exception):
            assert recorded.open.pop() == self.name

    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=Annotate))
    profiling.enable()
    yield recorded
    profiling.enable(False)


@pytest.fixture
def take_siss_step():
    model, inputs, schedule = TinyDenoiser(), mixture_inputs(), linear_schedule()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    return lambda model=model: siss_step(model, optimizer, schedule, inputs.forget, inputs.retain)


def annotations(profile) -> set[str]:
    """The spans of a profile that a `record_function` opened, without operators of the same names."""
    return {
        event.name
        for event in profile.events()
        if event.is_user_annotation and event.name.startswith("fastunlearn")
    }


def calls_of(function) -> int:
    """How many calls of functions, in Python and in C, `function()` makes."""
    events = []
    sys.setprofile(lambda frame, event, argument: events.append(event))
    try:
        function()
    finally:
        sys.setprofile(None)
    return sum(event in ("call", "c_call") for event in events)


def test_off_is_free():
    """One call more than an empty context: it reads a flag."""
    assert stage("predict") is stage("update")
    assert type(stage("predict")) is nullcontext
    nothing = nullcontext()

    def empty():
        with nothing:
            pass

    def off():
        with stage("predict"):
            pass

    assert calls_of(off) == calls_of(empty) + 1


def test_a_real_step_shows_its_six_stages(take_siss_step):
    """With the real nvtx, which runs without a GPU too."""
    pytest.importorskip("nvtx")
    profiling.enable()
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            take_siss_step()
    finally:
        profiling.enable(False)
    assert annotations(profile) == {f"fastunlearn::{name}" for name in STAGES}


def test_off_shows_nothing(take_siss_step):
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        take_siss_step()
    assert not annotations(profile)


def test_nvtx_gets_the_same_names_in_its_own_domain(ranges, take_siss_step):
    take_siss_step()
    assert set(ranges.seen) == {f"fastunlearn::{name}" for name in STAGES}
    assert ranges.open == []


def test_an_exception_leaves_no_range_open(ranges, take_siss_step):
    class Broken(TinyDenoiser):
        def forward(self, x_t, t):
            raise RuntimeError("out of order")

    with pytest.raises(RuntimeError, match="out of order"):
        take_siss_step(Broken())
    assert "fastunlearn::predict" in ranges.seen
    assert ranges.open == []


def test_on_and_off_at_run_time(ranges):
    with stage("draw"):
        profiling.enable(False)
        with stage("compose"):
            pass
        assert ranges.open == ["fastunlearn::draw"]
    profiling.enable()
    with stage("update"):
        pass
    assert ranges.seen == ["fastunlearn::draw", "fastunlearn::update"]
    assert ranges.open == []


@pytest.mark.parametrize("on", [False, True])
def test_a_compiled_graph_has_no_range_inside(ranges, on):
    profiling.enable(on)

    @torch.compile(fullgraph=True, backend="eager")
    def double(x):
        with stage("predict"):
            return 2 * x

    with stage("outside"):
        assert torch.equal(double(torch.ones(3)), torch.full((3,), 2.0))
    assert ranges.seen == (["fastunlearn::outside"] if on else [])


def test_a_missing_nvtx_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvtx", None)  # Python's way to say: not to be imported
    with pytest.raises(ImportError, match=r"expected the package nvtx \(pip install nvtx\)"):
        profiling.enable()
    assert stage("draw") is stage("update")  # still off


@pytest.mark.parametrize(("value", "on"), [("1", True), ("0", False), ("", False)])
def test_the_environment_decides_at_import_and_only_then_imports_nvtx(value, on):
    if on:
        pytest.importorskip("nvtx")
    loaded = "print('nvtx' in sys.modules, p.stage('a') is not p.stage('b'))"
    code = f"import sys, fastunlearn.host.profiling as p; {loaded}"
    environment = os.environ | {"FASTUNLEARN_NVTX": value}
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.split() == [str(on), str(on)]
