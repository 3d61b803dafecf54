"""Runs on file systems that lack something, as those of other machines do: a warning, and the same files."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from test_training import FakeUnlearner, checkpoints, run, stopped

from fastunlearn.host import atomic
from fastunlearn.host.folder_lock import LOCK_FILE, locked
from fastunlearn.runs import checkpoint
from fastunlearn.runs.run_record import read_run

# --- what is not there --------------------------------------------------------------------------------------


def failing(code: int) -> Callable:
    def fail(*arguments, **options):
        raise OSError(code, os.strerror(code))

    return fail


def no_fsync(monkeypatch) -> None:
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))


def no_fsync_of_folders(monkeypatch) -> None:
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)


def no_renaming_over(monkeypatch) -> None:
    real = os.replace

    def replace(source, target):
        if os.path.lexists(target):
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    no_exchange(monkeypatch)


def no_exchange(monkeypatch) -> None:
    monkeypatch.setattr(atomic, "exchange", lambda first, second: False)


def no_modes(monkeypatch) -> None:
    """Every file is open to all, and stays so."""
    real = os.open

    def opened(path, flags, mode=0o777, **options):
        descriptor = real(path, flags, mode, **options)
        if flags & os.O_CREAT:
            change(descriptor, 0o777)
        return descriptor

    change = os.fchmod
    monkeypatch.setattr(os, "open", opened)
    for call in ("fchmod", "chmod"):
        monkeypatch.setattr(os, call, failing(errno.EPERM))


def no_locks(monkeypatch) -> None:
    """Nor is an open file removed."""
    real, kept = Path.unlink, []

    def unlink(self, *arguments, **options):
        if self.name == LOCK_FILE and self not in kept:
            kept.append(self)
            raise OSError(errno.EBUSY, os.strerror(errno.EBUSY))
        real(self, *arguments, **options)

    monkeypatch.setattr(fcntl, "flock", failing(errno.ENOTSUP))
    monkeypatch.setattr(Path, "unlink", unlink)


def nothing(monkeypatch) -> None:
    for lack in (no_fsync, no_renaming_over, no_modes, no_locks):
        lack(monkeypatch)


SAID = {
    no_fsync: ["no fsync (what was written last may be lost when the power fails)"],
    no_fsync_of_folders: ["no fsync (what was written last may be lost when the power fails)"],
    no_renaming_over: ["no renaming over a file (a kill in the wrong instant leaves the old one aside)"],
    no_exchange: [],
    no_modes: ["no file modes (private files are readable by whoever may read the folder)"],
    no_locks: [f"no locks (who is killed leaves {LOCK_FILE}, to be removed by hand)"],
}
SAID[nothing] = [SAID[lack][0] for lack in (no_fsync, no_modes, no_renaming_over, no_locks)]


@pytest.mark.parametrize("lack", SAID, ids=lambda lack: lack.__name__)
def test_a_run_is_the_same_and_a_warning_says_what_is_missing(tmp_path: Path, monkeypatch, caplog, lack):
    expected = run(FakeUnlearner(), tmp_path / "whole")
    folder = tmp_path / "run"
    with monkeypatch.context() as patched, caplog.at_level(logging.WARNING, "fastunlearn"):
        lack(patched)
        stopped(FakeUnlearner(), folder, step=6)
        # A second time over what stands there.
        (folder / "private" / "checkpoint-6" / checkpoint.MANIFEST).write_text("{}")
        with pytest.warns(UserWarning, match="damaged checkpoint passed over"):
            history = run(FakeUnlearner(), folder, resume_from_checkpoint="latest")
    assert [record["loss"] for record in history.records] == [record["loss"] for record in expected.records]
    assert checkpoints(folder) == checkpoints(tmp_path / "whole")
    assert checkpoint.latest(folder) == folder / "checkpoint-10"
    assert read_run(folder)["status"] == "complete"
    assert [path.name for path in folder.rglob(".*")] == []
    told = [record.getMessage() for record in caplog.records if "this file system has" in record.getMessage()]
    said = f"{folder}: this file system has {'; '.join(SAID[lack])}"
    assert told == ([said] if SAID[lack] else [])


# --- without renaming over ----------------------------------------------------------------------------------


class KilledError(BaseException):
    """In place of a kill."""


@pytest.fixture
def killed_in_between(tmp_path: Path, monkeypatch) -> Path:
    """A file that its writer had moved aside when it was killed; nothing of its code ran after that."""
    path = tmp_path / "run.json"
    path.write_bytes(b"old")

    def killed(*names) -> None:
        raise KilledError

    with monkeypatch.context() as patched:
        no_renaming_over(patched)
        refusing = os.replace

        def replace(source, target):
            refusing(source, target)
            patched.setattr(os, "replace", killed)

        patched.setattr(os, "replace", replace)
        patched.setattr(atomic, "restore_displaced", lambda *given: None)
        with pytest.raises(KilledError), atomic.atomic_file(path) as file:
            file.write(b"new")
    assert not path.exists()
    return path


def test_who_takes_the_lock_puts_back_what_was_moved_aside(killed_in_between: Path):
    with locked(killed_in_between.parent, "test"):
        assert killed_in_between.read_bytes() == b"old"
    assert [file.name for file in killed_in_between.parent.iterdir()] == ["run.json"]


def test_who_writes_the_file_does_so_too(killed_in_between: Path):
    with atomic.atomic_file(killed_in_between) as file:
        assert killed_in_between.read_bytes() == b"old"
        file.write(b"newer")
    assert [file.name for file in killed_in_between.parent.iterdir()] == ["run.json"]
    assert killed_in_between.read_bytes() == b"newer"


def test_a_file_that_cannot_take_the_place_leaves_the_old_one(tmp_path: Path, monkeypatch):
    """The old one is moved aside, the new one refused, and the old one put back at once."""
    path = tmp_path / "run.json"
    path.write_bytes(b"old")
    real = os.replace

    def refuse_what_is_new(source, target):
        if str(source).endswith(".tmp"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse_what_is_new)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)), atomic.atomic_file(path) as file:
        file.write(b"new")
    assert [file.name for file in tmp_path.iterdir()] == ["run.json"]
    assert path.read_bytes() == b"old"


def test_what_was_left_by_who_was_killed_while_trying_is_swept(tmp_path: Path):
    (tmp_path / f".probe.{2**22 + 1}-ab12.tmp").write_text("probe")  # no process has this number
    with locked(tmp_path, "test"):
        assert [path.name for path in tmp_path.iterdir()] == [LOCK_FILE]


def test_files_of_others_are_not_put_back(tmp_path: Path):
    for name in (".config.bak.old", ".config.12x.old", ".config.1-xyz.tmp"):
        (tmp_path / name).write_text("theirs")
    with locked(tmp_path, "test"), atomic.atomic_file(tmp_path / "config") as file:
        file.write(b"ours")
    assert len(list(tmp_path.glob(".*"))) == 3


# --- disks that fail ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_none_that_lacks_something(tmp_path: Path, monkeypatch, code):
    """It is seen before the first step."""
    steps = []
    monkeypatch.setattr(os, "fsync", failing(code))
    expected = f"run: expected a place that can be written to, got: {os.strerror(code)}"
    with pytest.raises(OSError, match=expected):
        run(FakeUnlearner(on_step=steps.append), tmp_path / "run")
    assert steps == []
    assert not (tmp_path / "run").exists()
