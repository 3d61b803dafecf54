"""What stops a run in order: signals, which of them do not wait, and the end of its time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import protocols
import pytest
from runs import saved_in
from test_training import FakeUnlearner, checkpoints, run

from fastunlearn.metrics.deletion import Measures
from fastunlearn.runs import checkpoint, launcher, time_limit, training
from fastunlearn.runs.protocols import read_protocol
from fastunlearn.runs.run_record import read_run
from fastunlearn.runs.signals import EX_TEMPFAIL, OutOfTime, RunInterrupted
from fastunlearn.runs.time_limit import in_words, parse_time, process_seconds

# --- signals ------------------------------------------------------------------------------------------------


class ActedAtOnceError(Exception):
    pass


@pytest.fixture
def handlers():
    """Each signal that stops a run raises an error, as far as nobody else handles it."""

    def act(number, frame):
        raise ActedAtOnceError(signal.Signals(number).name)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    before = {number: signal.signal(number, act) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def sent(*numbers: int, at: int = 4):
    """For `on_step`: these signals, one after another, in one step."""

    def send(step: int) -> None:
        if step == at:
            for number in numbers:
                signal.raise_signal(number)

    return send


TERM, INT, HUP, USR1 = signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("numbers", [(TERM,) * 2, (HUP,) * 4, (USR1,) * 4, (USR1, TERM, TERM, HUP, INT)])
def test_more_signals_than_one_still_leave_a_checkpoint(tmp_path: Path, numbers):
    with pytest.raises(RunInterrupted) as interrupted:
        run(FakeUnlearner(on_step=sent(*numbers)), tmp_path)
    assert interrupted.value.code == 128 + numbers[0]
    assert checkpoints(tmp_path) == [3, 4]


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("number", "times", "launched"), [(INT, 2, False), (INT, 3, True), (TERM, 3, False)])
def test_the_last_of_several_acts_at_once(tmp_path: Path, monkeypatch, number, times, launched):
    monkeypatch.setattr(launcher, "started", lambda: launched)
    monkeypatch.setattr(launcher, "is_gone", lambda: False)
    with pytest.raises(RunInterrupted):
        run(FakeUnlearner(on_step=sent(*[number] * (times - 1))), tmp_path / "before")
    with pytest.raises(ActedAtOnceError, match=signal.Signals(number).name):
        run(FakeUnlearner(on_step=sent(*[number] * times)), tmp_path / "at once")
    assert checkpoints(tmp_path / "at once") == [3]


@pytest.fixture
def term_before_every_save(monkeypatch):
    saved = training.save_checkpoint

    def save(*given, **options) -> Path:
        signal.raise_signal(signal.SIGTERM)
        return saved(*given, **options)

    monkeypatch.setattr(training, "save_checkpoint", save)


@pytest.mark.usefixtures("handlers", "term_before_every_save")
def test_a_second_sigterm_does_not_abort_the_save(tmp_path: Path):
    """The first one comes in the step, the second amid its checkpoint, which is whole."""
    with pytest.raises(RunInterrupted) as interrupted:
        run(FakeUnlearner(on_step=sent(TERM)), tmp_path, checkpointing_steps=None)
    assert interrupted.value.checkpoint == saved_in(tmp_path, 4)
    assert checkpoint.latest(tmp_path / "private") == interrupted.value.checkpoint


@pytest.mark.usefixtures("handlers", "term_before_every_save")
def test_a_signal_amid_the_last_save_interrupts_nothing(tmp_path: Path):
    run(FakeUnlearner(), tmp_path, checkpointing_steps=None)
    assert read_run(tmp_path)["status"] == "complete"


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize("number", [HUP, USR1])
def test_what_is_ignored_stays_ignored(tmp_path: Path, number):
    """As by nohup."""
    signal.signal(number, signal.SIG_IGN)
    run(FakeUnlearner(on_step=sent(number)), tmp_path)
    assert signal.getsignal(number) == signal.SIG_IGN


# --- the time of a run --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("02:55:00", 10500),
        ("2:55:00", 10500),
        ("90:00", 5400),
        ("100:00:00", 360_000),
        ("1-12:00:00", 129_600),
        ("1-12", 129_600),
        ("0-00:30", 1800),
        (12.5, 12.5),
        (None, None),
    ],
)
def test_times_as_schedulers_write_them(text, seconds):
    assert parse_time("max_time", text) == seconds


@pytest.mark.parametrize(
    "text",
    ["30", "", "1:2:3", "00:60", "00:00", "1:60:00", "1-24:00", "-1:00", "1:00:00:00", "٠1:00:00", "1h"],
)
def test_what_is_no_time_is_refused(text):
    with pytest.raises(ValueError, match=r"^max_time: expected "):
        parse_time("max_time", text)


@pytest.mark.parametrize("value", [0, -1, float("inf"), True, [1]])
def test_what_is_no_number_of_seconds_is_refused(tmp_path: Path, value):
    with pytest.raises((TypeError, ValueError), match=r"^max_time: expected "):
        run(FakeUnlearner(), tmp_path / "run", max_time=value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("text", ["00:00:59", "02:55:00", "1-12:00:00"])
def test_times_in_words_are_read_again(text):
    assert in_words(parse_time("max_time", text)) == text


class Clock:
    """In place of the process's: a run takes no time but what it is told to take."""

    def __init__(self, monkeypatch, *, save: float):
        self.now = 5.0
        saved = training.save_checkpoint

        def save_slowly(*given, **options) -> Path:
            self.now += save
            return saved(*given, **options)

        monkeypatch.setattr(time_limit, "process_seconds", lambda: self.now)
        monkeypatch.setattr(training, "save_checkpoint", save_slowly)

    def steps_of(self, seconds: float):
        """For `on_step`."""

        def take(step: int) -> None:
            self.now += seconds

        return take


def test_a_run_stops_while_there_is_time_for_its_checkpoint(tmp_path: Path, monkeypatch, capsys):
    expected = run(FakeUnlearner(), tmp_path / "whole")
    with monkeypatch.context() as patched:
        clock = Clock(patched, save=20)
        with pytest.raises(OutOfTime) as stopped:
            run(FakeUnlearner(on_step=clock.steps_of(10)), tmp_path / "run", max_time="00:02:00")
    assert stopped.value.code == EX_TEMPFAIL == os.EX_TEMPFAIL
    # After step 1 a checkpoint shows what one takes; that of step 3 was due. After step 4 (85 s) another step
    # would fit, and the last checkpoint, but not one that is due in between.
    assert checkpoints(tmp_path / "run") == [1, 3, 4]
    assert stopped.value.checkpoint == saved_in(tmp_path / "run", 4)
    assert clock.now == 105
    assert read_run(tmp_path / "run")["status"] == "interrupted"
    message = capsys.readouterr().err
    assert message.startswith("max_time 00:02:00: stopped after step 4 of 10. To go on, run again with")
    history = run(FakeUnlearner(), tmp_path / "run", resume_from_checkpoint="latest")
    assert [record["loss"] for record in history.records] == [record["loss"] for record in expected.records]


def test_a_run_that_ends_in_time_is_complete(tmp_path: Path, monkeypatch):
    clock = Clock(monkeypatch, save=20)
    options = {"max_time": 1000, "checkpointing_steps": None, "keep_checkpoints": True}
    with pytest.warns(UserWarning, match="keep_checkpoints"):
        run(FakeUnlearner(on_step=clock.steps_of(10)), tmp_path, **options)
    assert checkpoints(tmp_path) == [1, 10]


def test_time_that_is_over_before_the_first_step_is_an_error(tmp_path: Path, monkeypatch):
    """Trying again would not help."""
    Clock(monkeypatch, save=0)
    with pytest.raises(
        ValueError, match=r"^max_time: expected more than the 00:00:05 since this process started"
    ):
        run(FakeUnlearner(), tmp_path / "run", max_time=4)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="the start of a process is read in /proc")
def test_time_counts_from_the_start_of_the_process():
    """That of a child, which is known here: from before the fork to after its end."""
    reader, writer = os.pipe()
    before = time.monotonic()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, str(time.monotonic() - process_seconds()).encode())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    after = time.monotonic()
    started = float(os.read(reader, 100))
    os.close(reader)
    os.close(writer)
    tick = 2 / os.sysconf("SC_CLK_TCK")
    assert before - tick <= started <= after


# --- protocols ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("handlers")
def test_a_signal_while_a_protocol_measures_says_where_it_stopped(tmp_path: Path, monkeypatch, capsys):
    of_retain, calls = Measures.of_retain, []

    def measured(self, model):
        calls.append(model)
        if len(calls) == 3:  # after the second request, whose images have been measured
            signal.raise_signal(signal.SIGTERM)
        return of_retain(self, model)

    with monkeypatch.context() as patched:
        patched.setattr(Measures, "of_retain", measured)
        with pytest.raises(RunInterrupted) as stopped:
            protocols.run(tmp_path, "continual", "neggrad")
    assert stopped.value.code == 128 + signal.SIGTERM
    message = capsys.readouterr().err
    assert message.startswith("SIGTERM: stopped with 1 of 3 requests trained and measured. To go on, ")
    assert len(calls) == 3
    assert len(read_protocol(tmp_path)["after"]) == 1
    assert protocols.run(tmp_path, "continual", "neggrad")["status"] == "complete"


def test_a_protocol_begins_no_request_without_time(tmp_path: Path, monkeypatch, capsys):
    seconds = iter([0.0] * 1000)
    monkeypatch.setattr(time_limit, "process_seconds", lambda: next(seconds))
    of_retain = Measures.of_retain

    def measured(self, model):
        nonlocal seconds
        if (tmp_path / "request-1").exists():
            seconds = iter([100.0] * 1000)
        return of_retain(self, model)

    monkeypatch.setattr(Measures, "of_retain", measured)
    with pytest.raises(OutOfTime) as stopped:
        protocols.run(tmp_path, "separate", "neggrad", max_time=60)
    assert stopped.value.code == EX_TEMPFAIL
    assert capsys.readouterr().err.startswith("max_time 00:01:00: stopped with 1 of 3 requests ")
    assert not (tmp_path / "request-2").exists()
