"""One writer at a time: who comes second is told who was first; what a killed owner leaves stops nobody."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import sys
import threading
import time
from datetime import datetime
from pathlib import Path

import crash
import pytest
from locks import at_one_instant, held_elsewhere, refused

from fastunlearn.host import folder_lock, lock_owner
from fastunlearn.host.folder_lock import LOCK_FILE, FolderLocked, locked, locked_file

ELSEWHERE = {"pid": 7, "host": "another.host", "started": "2026-01-01T00:00:00+00:00", "work": "unlearn"}
ELSEWHERE["kernel"] = "another"


# --- two at once --------------------------------------------------------------------------------------------


def take_in_rounds(folder: str, rounds: int, start, done) -> list:
    """For each round the number of this process, if it got the lock, or that of the owner in the error."""
    found = []
    for _ in range(rounds):
        start.wait(crash.PATIENCE)
        try:
            with locked(folder, "test"):
                found.append(("mine", os.getpid()))
                done.wait(crash.PATIENCE)
        except FolderLocked as error:
            found.append(("theirs", error.owner.pid))
            done.wait(crash.PATIENCE)
    return found


def test_of_processes_that_start_at_one_instant_exactly_one_wins(tmp_path: Path):
    rounds = 8
    answers = at_one_instant(4, take_in_rounds, str(tmp_path / "run"), rounds)
    for taken in zip(*answers, strict=True):
        winners = [pid for outcome, pid in taken if outcome == "mine"]
        assert len(winners) == 1
        assert {pid for _, pid in taken} == set(winners)  # the others name it
    assert not list((tmp_path / "run").glob("*"))  # the empty folder stays where one that lost had made it


def take_turns(folder: str, times: int, start, done) -> int:
    """How often this process was inside together with another one, out of `times`."""
    together, turns = 0, 0
    inside = Path(folder + ".inside")
    start.wait(crash.PATIENCE)
    while turns < times:
        try:
            with locked(folder, "test"):
                turns += 1
                try:
                    inside.mkdir()
                except FileExistsError:
                    together += 1
                else:
                    inside.rmdir()
        except FolderLocked:
            pass
    return together


def test_a_lock_that_changes_hands_never_has_two_owners(tmp_path: Path):
    """The file, and here its folder, too, is removed and made anew with every turn."""
    assert at_one_instant(3, take_turns, str(tmp_path / "run"), 40) == [0, 0, 0]


def test_a_folder_that_goes_while_it_is_looked_at_is_made_again(tmp_path: Path, monkeypatch):
    """`mkdir` finds it there; its owner leaves, and removes it, before it is found to be a folder."""
    folder = tmp_path / "run"
    moments = iter(["leaves"])

    def mkdir(self: Path, *arguments, **options) -> None:
        if next(moments, None) == "leaves":
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))
        os.mkdir(self)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    with locked(folder, "test"):
        assert (folder / LOCK_FILE).exists()


def test_a_file_at_the_place_of_the_folder_is_named(tmp_path: Path):
    (tmp_path / "run").write_text("x")
    assert not_writable(tmp_path / "run") in (os.strerror(errno.EEXIST), os.strerror(errno.ENOTDIR))
    assert (tmp_path / "run").read_text() == "x"


def test_who_opened_the_file_of_one_that_then_leaves_takes_the_new_file(tmp_path: Path, monkeypatch):
    """The race itself: between opening and locking the owner removes its file, and a third one comes in."""
    entered, leave = threading.Event(), threading.Event()
    opened = folder_lock._open
    others = []

    def open_then_wait(file: Path):
        descriptor = opened(file)
        if threading.current_thread() is threading.main_thread() and not others:
            others.append(file)
            leave.set()
            first.join()
            second.start()
            assert entered.wait(crash.PATIENCE)
        return descriptor

    def hold(until: threading.Event) -> None:
        with locked(tmp_path, "test"):
            entered.set()
            until.wait(crash.PATIENCE)

    over = threading.Event()
    first = threading.Thread(target=hold, args=(leave,))
    second = threading.Thread(target=hold, args=(over,))
    first.start()
    assert entered.wait(crash.PATIENCE)
    entered.clear()
    monkeypatch.setattr(folder_lock, "_open", open_then_wait)
    try:
        with pytest.raises(FolderLocked), locked(tmp_path, "test"):
            pass
    finally:
        over.set()
        second.join()
    with locked(tmp_path, "test"):
        pass


def test_the_error_names_owner_host_and_start(tmp_path: Path):
    before = datetime.now().astimezone().replace(microsecond=0)
    with held_elsewhere(locked, tmp_path / "run", "purge"):
        error = refused(locked, tmp_path / "run")
    owner = error.owner
    assert (owner.pid, owner.host, owner.work) == (os.getpid(), socket.gethostname(), "purge")
    assert before <= datetime.fromisoformat(owner.started) <= datetime.now().astimezone()
    named = f"process {owner.pid} on {owner.host} (purge, since {owner.started})"
    expected = "expected a place that no other run writes to, got one held by"
    assert str(error).startswith(f"{tmp_path / 'run'}: {expected} {named}: ")


def test_a_thread_may_enter_again_for_other_work_and_keeps_it_until_it_has_left_as_often(tmp_path: Path):
    with locked(tmp_path, "unlearn"):
        same = tmp_path / "." / ".." / tmp_path.name
        with locked(same, "purge"), pytest.raises(FolderLocked), locked(tmp_path, "unlearn"):
            pass
        assert (tmp_path / LOCK_FILE).exists()
        outcome = []
        thread = threading.Thread(target=lambda: outcome.append(is_free(tmp_path)))
        thread.start()
        thread.join()
        assert outcome == [False]
    assert is_free(tmp_path)
    assert not list(tmp_path.iterdir())


def is_free(folder: Path) -> bool:
    try:
        with locked(folder, "test"):
            return True
    except FolderLocked:
        return False


def test_a_folder_below_and_files_beside_are_not_concerned(tmp_path: Path):
    with held_elsewhere(locked, tmp_path), held_elsewhere(locked_file, tmp_path / "a.npz"):
        with locked(tmp_path / "below", "test"), locked_file(tmp_path / "b.npz", "test"):
            pass
        (tmp_path / "link.npz").symlink_to(tmp_path / "a.npz")
        (tmp_path / "link").symlink_to(tmp_path)
        assert str(refused(locked_file, tmp_path / "link.npz")).startswith(f"{tmp_path / 'a.npz'}: expected")
        refused(locked, tmp_path / "link")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "link.npz"]


def test_the_folder_is_that_of_the_system_behind_a_link_and_back(tmp_path: Path):
    """`link/..` is where the link leads to, and up; not the folder of the link."""
    (tmp_path / "far" / "away").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "far" / "away")
    with held_elsewhere(locked, tmp_path / "far" / "run"):
        refused(locked, tmp_path / "link" / ".." / "run")


def test_what_was_made_for_the_lock_alone_goes_and_what_has_content_stays(tmp_path: Path, monkeypatch):
    with locked(tmp_path / "a" / "b" / "c", "test"):
        (tmp_path / "a" / "kept").write_text("x")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["kept"]
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with locked("empty", "test"):
        os.chdir("/")
    assert (tmp_path / "empty").is_dir()
    assert not list((tmp_path / "empty").iterdir())


# --- owners that die ----------------------------------------------------------------------------------------


def hold_until_killed(folder: str, pipe) -> None:
    with locked(folder, "unlearn"):
        pipe.send(os.getpid())
        pipe.recv()


def hold_with_a_child(folder: str, pipe) -> None:
    """The child is forked inside, and waits for the end of the pipe."""
    with locked(folder, "unlearn"):
        child = os.fork()
        if child == 0:
            pipe.poll(crash.PATIENCE)
            os._exit(0)
        pipe.send(child)
        signal.pause()


def started(target, folder: Path):
    crash.start_server()
    ours, theirs = crash.CONTEXT.Pipe()
    process = crash.CONTEXT.Process(target=target, args=(str(folder), theirs), daemon=True)
    process.start()
    assert ours.poll(crash.PATIENCE)
    return process, ours, theirs, ours.recv()


def test_what_a_killed_owner_leaves_stops_nobody(tmp_path: Path):
    process, pipe, _, pid = started(hold_until_killed, tmp_path)  # without our end of `pipe` it would leave
    assert f"held by process {pid} on " in str(refused(locked, tmp_path))
    process.kill()
    process.join()
    pipe.close()
    assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == pid
    with locked(tmp_path, "test"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert not list(tmp_path.iterdir())


def test_a_child_that_outlives_its_killed_parent_does_not_hold_the_lock(tmp_path: Path):
    process, ours, _, child = started(hold_with_a_child, tmp_path)
    process.kill()
    process.join()
    os.kill(child, 0)  # lives
    assert is_free(tmp_path)
    ours.send("end")


def test_a_forked_child_neither_holds_nor_gives_back_what_its_parent_holds(tmp_path: Path):
    read, write = os.pipe()
    with locked(tmp_path, "test"):
        child = os.fork()
        if child == 0:
            os.write(write, b"free" if is_free(tmp_path) else b"held")
            os._exit(0)
        os.waitpid(child, 0)
        assert os.read(read, 4) == b"held"
        assert (tmp_path / LOCK_FILE).exists()
        (lock,) = folder_lock._locks.values()
        assert not os.get_inheritable(lock.descriptor)  # by programs that are started
    os.close(read)
    os.close(write)


# --- owners on other hosts ----------------------------------------------------------------------------------


class Clock:
    """Stands for the module `time`; sleeping moves it on."""

    def __init__(self):
        self.now = time.time()

    def time(self) -> float:
        return self.now

    monotonic = time

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(lock_owner, "time", clock)
    return clock


def leave_note(folder: Path, *, age: float) -> None:
    (folder / LOCK_FILE).write_text(json.dumps(ELSEWHERE))
    os.utime(folder / LOCK_FILE, (time.time() - age, time.time() - age))


@pytest.mark.parametrize(("age", "waits"), [(5, True), (3600, False)])
def test_an_owner_elsewhere_that_is_silent_has_ended(tmp_path: Path, clock: Clock, age: float, waits: bool):
    leave_note(tmp_path, age=age)
    before = clock.now
    assert is_free(tmp_path)
    assert (clock.now - before >= lock_owner.SILENCE) == waits


def test_an_owner_in_another_container_of_this_host_needs_no_watching(tmp_path: Path, clock: Clock):
    """It has another host name, but its lock is seen: it holds none any more."""
    leave_note(tmp_path, age=5)
    note = json.loads((tmp_path / LOCK_FILE).read_text())
    (tmp_path / LOCK_FILE).write_text(json.dumps(note | {"kernel": lock_owner.Owner.here("test").kernel}))
    before = clock.now
    assert is_free(tmp_path)
    assert clock.now == before


def test_an_owner_elsewhere_whose_heart_beats_is_respected(tmp_path: Path, clock: Clock, monkeypatch):
    """On a file system whose locks do not reach other hosts: ours is granted."""
    leave_note(tmp_path, age=5)
    moments = iter(range(100))
    monkeypatch.setattr(lock_owner, "_touched", lambda file: int(clock.now * 1e9) + next(moments) // 9)
    assert "process 7 on another.host (unlearn, since 2026-01-01" in str(refused(locked, tmp_path))
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == ELSEWHERE


def test_an_owner_elsewhere_that_leaves_while_we_look_has_ended(tmp_path: Path, clock: Clock, monkeypatch):
    """It removes the file that we have locked: the lock is that of a new one."""
    leave_note(tmp_path, age=5)

    def leave(seconds: float) -> None:
        clock.now += seconds
        (tmp_path / LOCK_FILE).unlink()

    monkeypatch.setattr(clock, "sleep", leave)
    with locked(tmp_path, "test"):
        assert json.loads((tmp_path / LOCK_FILE).read_text())["pid"] == os.getpid()


def test_the_heart_beats_while_the_lock_is_held(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(lock_owner, "HEARTBEAT", 0.01)
    with locked(tmp_path, "test"):
        os.utime(tmp_path / LOCK_FILE, (0, 0))
        deadline = time.monotonic() + crash.PATIENCE
        while (tmp_path / LOCK_FILE).stat().st_mtime == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / LOCK_FILE).stat().st_mtime > 0


def test_without_flock_the_file_is_the_lock(tmp_path: Path, monkeypatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(folder_lock.fcntl, "flock", flock)
    with held_elsewhere(locked, tmp_path):
        error = refused(locked, tmp_path)
    assert error.owner.pid == os.getpid()
    assert f"or remove {tmp_path / LOCK_FILE} if it was killed" in str(error)
    assert is_free(tmp_path)
    leave_note(tmp_path, age=3600)
    assert not is_free(tmp_path)
    assert json.loads((tmp_path / LOCK_FILE).read_text()) == ELSEWHERE


# --- hostile files, folders that cannot be written ----------------------------------------------------------


NOTES = [b"", b"\xff\x00", b"[" * 100_000, b"[]", b"null", b"{}", b'{"pid": "1", "host": 2}', b"x" * 10_000]
CONTROL = json.dumps(ELSEWHERE | {"host": "\x1b[2J"}).encode()
NEGATIVE = json.dumps(ELSEWHERE | {"pid": -1}).encode()


@pytest.mark.parametrize("note", [*NOTES, CONTROL, NEGATIVE], ids=lambda note: repr(note[:20]))
def test_any_content_of_the_file_is_survived(tmp_path: Path, monkeypatch, note: bytes):
    (tmp_path / LOCK_FILE).write_bytes(note)
    monkeypatch.setattr(lock_owner, "NOTE_PATIENCE", 0)
    descriptor = os.open(tmp_path / LOCK_FILE, os.O_RDWR)
    folder_lock.fcntl.flock(descriptor, folder_lock.fcntl.LOCK_EX)
    assert "held by a process that has not said who it is" in str(refused(locked, tmp_path))
    os.close(descriptor)
    assert is_free(tmp_path)


def not_writable(folder: Path) -> str:
    """The reason that the error gives."""
    expected = f"{folder}: expected a place that can be written to"
    with pytest.raises(OSError, match=expected) as caught, locked(folder, "test"):
        pytest.fail("locked")
    return str(caught.value).partition(", got: ")[2]


def test_a_lock_that_leads_elsewhere_is_not_followed(tmp_path: Path):
    (tmp_path / "precious").write_text("x")
    kinds = [lambda path: path.symlink_to(tmp_path / "precious"), os.mkfifo, Path.mkdir]
    for number, make in enumerate(kinds):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / LOCK_FILE)
        assert not_writable(folder) != ""
    assert (tmp_path / "precious").read_text() == "x"


def test_a_read_only_folder_is_named(tmp_path: Path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(arguments[0]))

    monkeypatch.setattr(folder_lock.os, "open", refuse)
    assert not_writable(tmp_path / "run") == "Read-only file system"
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc refuses new folders with ENOENT")
def test_a_place_that_cannot_be_is_an_error_and_no_endless_loop():
    assert not_writable(Path("/proc/fastunlearn")) == os.strerror(errno.ENOENT)
