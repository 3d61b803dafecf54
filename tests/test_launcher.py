"""Workers whose launcher is killed end by themselves; what nobody launched is left alone."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path

import crash
import pytest

from fastunlearn.host.folder_lock import locked
from fastunlearn.runs import launcher
from fastunlearn.runs.run_record import read_run


class Launched:
    """A launcher with one worker, which does `work(folder, pipe)`; its errors go to `folder/stderr`."""

    def __init__(self, work: Callable, folder: Path, environment: dict[str, str]):
        crash.start_server()
        self.log = folder / "stderr"
        self.pipe, theirs = crash.CONTEXT.Pipe()
        given = work, str(folder), environment, theirs
        self.launcher = crash.CONTEXT.Process(target=_launch, args=given, daemon=True)
        self.launcher.start()
        theirs.close()

    def hear(self):
        assert self.pipe.poll(crash.PATIENCE), self.log.read_text()
        return self.pipe.recv()

    def kill_launcher(self) -> None:
        """The worker has another parent when this returns."""
        self.launcher.kill()
        self.launcher.join()


def _launch(work: Callable, folder: str, environment: dict[str, str], pipe) -> None:
    os.environ.update(environment)
    if os.fork() == 0:
        descriptor = os.open(f"{folder}/stderr", os.O_WRONLY | os.O_CREAT)
        os.dup2(descriptor, 2)
        try:
            work(Path(folder), pipe)
        finally:
            os._exit(0)
    pipe.close()
    while True:
        signal.pause()


def run_ten_steps(folder: Path, pipe) -> None:
    """Says that it is at step 2, waits, goes on, and says how it ended."""
    from test_training import FakeUnlearner, run

    from fastunlearn.runs.training import RunInterrupted

    def wait(step: int) -> None:
        if step == 2:
            pipe.send("at step 2")
            pipe.recv()

    try:
        run(FakeUnlearner(on_step=wait), folder / "run", checkpointing_steps=None)
    except RunInterrupted as interrupted:
        pipe.send((interrupted.code, interrupted.checkpoint.name))
        with pytest.raises(RunInterrupted):  # nor does another run of the same process go on
            run(FakeUnlearner(), folder / "next")
    else:
        pipe.send("complete")


def run_ten_watched_steps(folder: Path, pipe) -> None:
    """As a command does: a thread looks, too."""
    with launcher.watched():
        run_ten_steps(folder, pipe)


def pause_watched(folder: Path, pipe) -> None:
    with launcher.watched():
        pipe.send("paused")
        while True:
            signal.pause()


BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none"}


@pytest.mark.parametrize("work", [run_ten_steps, run_ten_watched_steps])
def test_the_run_of_a_killed_launcher_ends_with_the_step(tmp_path: Path, work: Callable):
    worker = Launched(work, tmp_path, BY_TORCHRUN)
    assert worker.hear() == "at step 2"
    launcher_pid = worker.launcher.pid
    worker.kill_launcher()
    worker.pipe.send("go on")
    code, checkpoint = worker.hear()
    assert code == 128 + signal.SIGTERM
    assert checkpoint in ("checkpoint-2", "checkpoint-3")  # the thread may see it in step 2
    assert read_run(tmp_path / "run")["status"] == "interrupted"
    told = worker.log.read_text()
    assert told.count(f"the launcher (process {launcher_pid}) has ended") == 1
    assert "stopped after step" in told
    with locked(tmp_path / "run", "test"):
        pass


def test_a_run_that_nobody_launched_outlives_its_parent(tmp_path: Path):
    """From a shell that ends, with nohup or without."""
    settings = {"WORLD_SIZE": "1", "ACCELERATE_MIXED_PRECISION": "no"}
    worker = Launched(run_ten_watched_steps, tmp_path, settings)
    assert worker.hear() == "at step 2"
    worker.kill_launcher()
    worker.pipe.send("go on")
    assert worker.hear() == "complete"
    assert worker.log.read_text() == ""


def test_a_run_whose_launcher_lives_goes_on(tmp_path: Path):
    worker = Launched(run_ten_watched_steps, tmp_path, BY_TORCHRUN)
    assert worker.hear() == "at step 2"
    worker.pipe.send("go on")
    assert worker.hear() == "complete"
    worker.kill_launcher()


def test_what_a_command_does_beside_steps_ends_too(tmp_path: Path):
    worker = Launched(pause_watched, tmp_path, BY_TORCHRUN)
    assert worker.hear() == "paused"
    worker.kill_launcher()
    assert worker.pipe.poll(crash.PATIENCE)
    with pytest.raises(EOFError):  # its end is that of the worker, which had the other end alone
        worker.pipe.recv()
    assert "has ended" in worker.log.read_text()
