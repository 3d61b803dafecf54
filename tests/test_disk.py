"""A disk that is full, or will be: said in one line, before the work where that can be known."""

from __future__ import annotations

import errno
import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from runs import make
from safetensors.torch import load_file

from fastunlearn.host import disk
from fastunlearn.host.atomic import atomic_directory, atomic_file
from fastunlearn.runs import checkpoint
from fastunlearn.runs.run_record import Metrics
from fastunlearn.runs.space import _bytes_of, check_space
from fastunlearn.runs.training import unlearn

Usage = namedtuple("Usage", ["total", "used", "free"])


def of_free(monkeypatch, free: int) -> list[Path]:
    """From now on disks have `free` bytes; which were asked about."""
    asked = []

    def disk_usage(path):
        shutil_usage(path)  # as the real one, it wants something that is there
        asked.append(Path(path))
        return Usage(10**12, 0, free)

    shutil_usage = shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    return asked


def hidden(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


def test_the_disk_is_asked_where_the_file_will_be(tmp_path, monkeypatch):
    asked = of_free(monkeypatch, 7)
    assert disk.free_bytes(tmp_path / "not" / "yet") == 7
    assert asked == [tmp_path]
    disk.require(tmp_path / "x", "a file", 7)
    with pytest.raises(
        OSError, match=rf"^{tmp_path}/x: expected 8 bytes of free disk for a file, got 7 bytes$"
    ) as error:
        disk.require(tmp_path / "x", "a file", 8)
    assert error.value.errno == errno.ENOSPC


def test_what_no_disk_says_is_not_refused(tmp_path, monkeypatch):
    def disk_usage(path):
        raise OSError(errno.ENOSYS, "no statvfs here")

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    assert disk.free_bytes(tmp_path) is None
    disk.require(tmp_path, "a file", 10**18)


@pytest.fixture
def small_files():
    """Files of this process end at 1 MiB: what the kernel says then is what it says of a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_file_that_grows_too_large_is_said_in_one_line(tmp_path, small_files):
    (tmp_path / "x").write_text("old")

    def write() -> None:
        with atomic_file(tmp_path / "x") as file:
            file.write(bytes(3 << 20))

    expected = f"{tmp_path}/x: expected a disk that takes it"
    with pytest.raises(OSError, match=rf"^{expected}, got: File too large after 1.0 MB of it") as error:
        write()
    assert error.value.errno == errno.EFBIG
    assert (tmp_path / "x").read_text() == "old"
    assert hidden(tmp_path) == []


def test_a_folder_that_grows_too_large_is_said_in_one_line(tmp_path, small_files):
    """safetensors writes the file, in its own words."""
    weights = {"w": torch.zeros(1 << 19)}
    with pytest.raises(
        OSError, match=r"checkpoint-3: expected a disk that takes it, got: File too large"
    ) as error:
        checkpoint.save(tmp_path, 3, {"model": weights}, {})
    assert error.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_and_a_quota_are_told(code, tmp_path, monkeypatch):
    of_free(monkeypatch, 5_000)

    def write() -> None:
        with atomic_directory(tmp_path / "x") as folder:
            (folder / "part").write_bytes(bytes(1_500))
            raise OSError(code, "as the kernel says")

    with pytest.raises(
        OSError, match=r"x: expected a disk that takes it, got: .* after 1.5 kB of it, with 5.0 kB free$"
    ) as error:
        write()
    assert error.value.errno == code
    assert hidden(tmp_path) == []


def test_other_errors_stay_as_they_are(tmp_path):
    with (
        pytest.raises(PermissionError, match=r"\[Errno 13\] no: 'elsewhere'"),
        atomic_directory(tmp_path / "x"),
    ):
        raise PermissionError(errno.EACCES, "no", "elsewhere")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_metrics_of_a_full_disk_name_their_file(tmp_path):
    metrics = Metrics(tmp_path, 0)
    metrics.close()
    metrics._file = open("/dev/full", "w")  # noqa: SIM115
    with pytest.raises(
        OSError, match=r"metrics.jsonl: expected a disk that takes it, got: No space left on device"
    ):
        metrics.append({"step": 1})


# --- runs ------------------------------------------------------------------------------------------------


def tensor_bytes(checkpoint_folder: Path) -> int:
    """Of all tensors in its files."""
    files = checkpoint_folder.glob("*.safetensors")
    return sum(tensor.nbytes for file in files for tensor in load_file(file).values())


def test_what_a_run_is_thought_to_write_is_what_it_writes(tmp_path):
    unlearner = make()
    model, before = _bytes_of(unlearner)
    history = unlearn(unlearner, num_steps=1, output_dir=tmp_path / "run", show_progress=False)
    assert model == sum(tensor.nbytes for tensor in unlearner.model.state_dict().values())
    checkpoint.save(tmp_path, 1, {}, {}, optimizer=unlearner.optimizer, model=unlearner.model)
    moments = tensor_bytes(tmp_path / "checkpoint-1")
    _, after = _bytes_of(unlearner)
    counters = len(list(unlearner.model.parameters())) * 4  # AdamW's `step`, which a new one has not
    assert after == before + counters
    assert after >= model + moments
    assert history.records


@pytest.mark.parametrize(
    ("options", "checkpoints"),
    [
        ({}, 1),
        ({"checkpointing_steps": 2}, 3),  # after steps 2, 4 and 5
        ({"checkpointing_steps": 5}, 1),
        ({"checkpointing_steps": 1}, 5),
        ({"checkpointing_steps": 1, "checkpoints_total_limit": 2}, 3),
        ({"checkpointing_steps": 1, "checkpoints_total_limit": 9}, 5),
    ],
)
def test_room_for_a_run_is_asked_for_before_its_first_step(options, checkpoints, tmp_path, monkeypatch):
    unlearner = make()
    model, each = _bytes_of(unlearner)
    needed = checkpoints * each + model
    of_free(monkeypatch, needed - 1)
    words = rf"expected .* of free disk for {checkpoints} checkpoints? and the model, got"
    with pytest.raises(OSError, match=words):
        unlearn(unlearner, num_steps=5, output_dir=tmp_path / "run", show_progress=False, **options)
    assert unlearner.step_index == 0
    of_free(monkeypatch, needed)
    check_space(
        unlearner, tmp_path, 5, options.get("checkpointing_steps"), options.get("checkpoints_total_limit")
    )


def test_a_run_that_goes_on_needs_room_for_what_is_left(tmp_path, monkeypatch):
    unlearner = make()
    unlearner.step()
    unlearner.step()
    model, each = _bytes_of(unlearner)
    of_free(monkeypatch, 3 * each + model)
    check_space(unlearner, tmp_path, 5, 1, None)
    of_free(monkeypatch, each + model)  # the others are there, and the oldest goes
    check_space(unlearner, tmp_path, 5, 1, 2)
    with pytest.raises(OSError, match="for 3 checkpoints and the model"):
        check_space(unlearner, tmp_path, 5, 1, None)


def test_room_is_asked_for_before_each_checkpoint(tmp_path, monkeypatch):
    """Others write to the disk while the run goes on. What stands stays, and the run says how it ended."""

    def fill_the_disk(step: int, values: dict) -> None:
        if step == 3:
            of_free(monkeypatch, 10)

    options = {"checkpointing_steps": 2, "report_to": fill_the_disk, "show_progress": False}
    with pytest.raises(
        OSError, match=r"checkpoint-4: expected .* of free disk for a checkpoint, got 10 bytes$"
    ):
        unlearn(make(), num_steps=5, output_dir=tmp_path, **options)
    assert len(list(tmp_path.rglob("checkpoint-2"))) == 1
    assert hidden(tmp_path) == []
    assert "failed: OSError" in (tmp_path / "run.json").read_text()
