"""What is written aside: nobody can foresee its name, read it early, or be led elsewhere by it."""

from __future__ import annotations

import os
import stat
import threading
from pathlib import Path

import pytest

from fastunlearn.host import atomic
from fastunlearn.runs import checkpoint

NOBODY = 2**22 + 1  # no process has this number: Linux goes up to 2**22


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.startswith(".")]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.mark.usefixtures("umask")
@pytest.mark.parametrize(("wanted", "expected"), [(0o666, 0o644), (0o600, 0o600)])
def test_a_file_is_its_writers_alone_until_it_is_whole(tmp_path: Path, wanted: int, expected: int):
    path = tmp_path / "run.json"
    with atomic.atomic_file(path, mode=wanted) as file:
        (aside,) = hidden(tmp_path)
        assert mode(aside) == 0o600
        file.write(b"content")
        assert not path.exists()
    assert path.read_bytes() == b"content"
    assert mode(path) == expected
    assert hidden(tmp_path) == []
    assert os.umask(0o022) == 0o022  # was asked for, and is as before


def test_names_are_never_the_same(tmp_path: Path):
    names = set()
    for _ in range(20):
        with atomic.atomic_file(tmp_path / "x") as file:
            names |= {path.name for path in hidden(tmp_path)}
            file.write(b"x")
        with atomic.atomic_directory(tmp_path / "y"):
            names |= {path.name for path in hidden(tmp_path)}
    assert len(names) == 40


def test_a_link_at_the_temporary_name_is_not_followed(tmp_path: Path, monkeypatch):
    """Even where somebody could foresee it."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    monkeypatch.setattr(atomic.secrets, "token_hex", lambda count: "0" * 2 * count)
    planted = tmp_path / f".x.{os.getpid()}-{'0' * 16}.tmp"
    # `atomic_file` removes what lies there; this one is planted after it has looked.
    monkeypatch.setattr(atomic, "remove_leftovers", lambda *given: planted.symlink_to(victim))
    with pytest.raises(FileExistsError), atomic.atomic_file(tmp_path / "x") as file:
        file.write(b"yours")
    assert victim.read_text() == "mine"


@pytest.mark.parametrize(
    "name", [f".x.{NOBODY}.tmp", f".x.{NOBODY}-ab12.tmp", ".x.{own}.tmp", ".x.{own}-ab12.tmp"]
)
def test_what_a_killed_writer_left_is_removed_by_the_next(tmp_path: Path, name: str):
    """Also where the dead one had the number of this process, as in containers."""
    for number, make in enumerate(
        (Path.touch, Path.mkdir, lambda path: path.symlink_to(tmp_path / "victim"))
    ):
        folder = tmp_path / str(number)
        folder.mkdir()
        make(folder / name.replace("{own}", str(os.getpid())))
        (tmp_path / "victim").mkdir(exist_ok=True)
        with atomic.atomic_file(folder / "x") as file:
            file.write(b"x")
        assert [path.name for path in folder.iterdir()] == ["x"]
    assert (tmp_path / "victim").is_dir()


def test_what_this_process_is_writing_is_no_leftover(tmp_path: Path):
    """Two threads write one file: each has its own aside, and the last one stays."""
    started, ended = threading.Event(), threading.Event()

    def first() -> None:
        with atomic.atomic_file(tmp_path / "x") as file:
            file.write(b"first")
            started.set()
            assert ended.wait(60)

    writer = threading.Thread(target=first)
    writer.start()
    assert started.wait(60)
    with atomic.atomic_file(tmp_path / "x") as file:
        file.write(b"second")
    assert len(hidden(tmp_path)) == 1
    ended.set()
    writer.join()
    assert (tmp_path / "x").read_bytes() == b"first"
    assert hidden(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path: Path):
    (tmp_path / "x").write_bytes(b"old")

    def fail_half_way() -> None:
        with atomic.atomic_file(tmp_path / "x") as file:
            file.write(b"new")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (tmp_path / "x").read_bytes() == b"old"
    assert hidden(tmp_path) == []


# --- checkpoints that are links, or no checkpoints ----------------------------------------------------------


def test_a_linked_checkpoint_goes_and_what_it_leads_to_stays(tmp_path: Path):
    elsewhere, run = tmp_path / "elsewhere", tmp_path / "run"
    checkpoint.save(elsewhere, 10, {}, {})
    run.mkdir()
    (run / "checkpoint-10").symlink_to(elsewhere / "checkpoint-10")
    assert checkpoint.latest(run) == run / "checkpoint-10"
    for step in (20, 30):
        checkpoint.save(run, step, {}, {}, keep=1)
        assert [path.name for path in run.iterdir()] == [f"checkpoint-{step}"]
    assert checkpoint.latest(elsewhere) == elsewhere / "checkpoint-10"


@pytest.mark.parametrize(
    "name", ["checkpoint-²", "checkpoint-٣", "checkpoint-007", "checkpoint--1", "checkpoint-1e3"]
)
def test_what_is_only_named_like_a_checkpoint_is_left_alone(tmp_path: Path, name: str):
    checkpoint.save(tmp_path, 5, {}, {})
    (tmp_path / "checkpoint-5").rename(tmp_path / name)
    assert checkpoint.latest(tmp_path) is None
    checkpoint.save(tmp_path, 6, {}, {}, keep=1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["checkpoint-6", name])
