"""Checkpoints: what comes back, what a kill or damage leaves behind, and who may remove what."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from torch import nn

from fastunlearn.host import atomic
from fastunlearn.runs import checkpoint
from fastunlearn.runs.state_tree import flatten, unflatten


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.SiLU(), nn.Conv2d(5, 3, 3)).to(
        memory_format=torch.channels_last
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(step)).to(
            memory_format=torch.channels_last
        )

        def closure(inputs=inputs):
            optimizer.zero_grad()
            loss = model(inputs).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "adamw foreach amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "sgd without state": lambda p: torch.optim.SGD(p, lr=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "asgd": lambda p: torch.optim.ASGD(p, lr=1e-2),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=1e-2, max_iter=3, history_size=4),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-2),
    "radam": lambda p: torch.optim.RAdam(p, lr=1e-2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-2, momentum=0.5, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=1e-2),
    "two groups": lambda p: torch.optim.AdamW(
        [{"params": p[:1], "lr": 1e-1}, {"params": p[1:]}], lr=1e-3, betas=(0.8, 0.99)
    ),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_continues_bit_equal(tmp_path: Path, name: str):
    # torch's LBFGS refuses other layouts
    layout = torch.contiguous_format if name == "lbfgs" else torch.channels_last
    model = small_model().to(memory_format=layout)
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    train(model, optimizer, range(3))
    path = checkpoint.save(tmp_path, 3, {"model": model.state_dict()}, {}, optimizer=optimizer)
    train(model, optimizer, range(3, 6))

    resumed = small_model().to(memory_format=layout)
    resumed_optimizer = OPTIMIZERS[name](list(resumed.parameters()))
    state = checkpoint.load(path)
    resumed.load_state_dict(state.tensors["model"])
    checkpoint.load_optimizer(resumed_optimizer, state)
    train(resumed, resumed_optimizer, range(3, 6))
    for expected, found in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, found)


def test_memory_layout_of_optimizer_moments_comes_back(tmp_path: Path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    train(model, optimizer, range(1))
    state = checkpoint.load(checkpoint.save(tmp_path, 1, {}, {}, optimizer=optimizer)).states["optimizer"][
        "state"
    ]
    for index, entry in optimizer.state_dict()["state"].items():
        assert state[index]["exp_avg"].stride() == entry["exp_avg"].stride()
    assert state[0]["exp_avg"].is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_moments_take_the_layout_of_the_parameters(tmp_path: Path, layout):
    """A run may go on in another layout: the next update, from the same gradients, has the same bits."""
    other = torch.channels_last if layout is torch.contiguous_format else torch.contiguous_format
    model, resumed = small_model().to(memory_format=layout), small_model().to(memory_format=other)
    optimizer, resumed_optimizer = (
        torch.optim.AdamW(network.parameters(), lr=1e-2, fused=True) for network in (model, resumed)
    )
    train(model, optimizer, range(3))
    state = checkpoint.load(
        checkpoint.save(tmp_path, 3, {"model": model.state_dict()}, {}, optimizer=optimizer)
    )
    resumed.load_state_dict(state.tensors["model"])
    checkpoint.load_optimizer(resumed_optimizer, state)
    for before, after in zip(model.parameters(), resumed.parameters(), strict=True):
        assert resumed_optimizer.state[after]["exp_avg"].stride() == after.stride()
        gradient = torch.randn(before.shape, generator=torch.Generator().manual_seed(before.numel()))
        before.grad, after.grad = (torch.empty_like(weights).copy_(gradient) for weights in (before, after))
    optimizer.step()
    resumed_optimizer.step()
    for before, after in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(before, after)


def test_scheduler_and_scaler_states(tmp_path: Path):
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer),
            torch.optim.lr_scheduler.MultiStepLR(optimizer, [4, 4, 7]),
        ],
        milestones=[2],
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=128.0)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        scheduler.step()
    states = {"lr_scheduler": scheduler.state_dict(), "grad_scaler": scaler.state_dict()}
    loaded = checkpoint.load(checkpoint.save(tmp_path, 5, {}, {"note": [1, None]}, states=states))
    assert loaded.metadata == {"note": [1, None]}
    assert loaded.states["lr_scheduler"] == states["lr_scheduler"]
    assert loaded.states["grad_scaler"] == states["grad_scaler"]


def test_the_state_of_an_ema_of_diffusers(tmp_path: Path):
    ema_model = pytest.importorskip("diffusers.training_utils").EMAModel
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ema = ema_model(model.parameters(), decay=0.9)
    for step in range(5):
        train(model, optimizer, range(step, step + 1))
        ema.step(model.parameters())
    loaded = checkpoint.load(checkpoint.save(tmp_path, 5, {}, {}, states={"ema": ema.state_dict()}))
    other = ema_model(small_model().parameters(), decay=0.5)
    other.load_state_dict(loaded.states["ema"])
    assert other.optimization_step == 5
    assert other.decay == 0.9
    for expected, found in zip(ema.shadow_params, other.shadow_params, strict=True):
        assert torch.equal(expected, found)
        assert expected.stride() == found.stride()


def test_state_tree_keeps_structure_and_values():
    scalar = torch.tensor(3, dtype=torch.int32)
    tree = {
        "a": [1, 2.5, float("inf"), None, True, "text", (scalar, [])],
        7: {"x": torch.randn(2, 3).T, "y": ()},
        "__tensor__": "not a reference",
        "plain": {"b": {}, "half": torch.ones(2, dtype=torch.bfloat16)},
    }
    skeleton, tensors = flatten(tree)
    back = unflatten(json.loads(json.dumps(skeleton)), tensors)
    assert back.keys() == tree.keys()
    assert back["a"][:6] == tree["a"][:6]
    assert isinstance(back["a"][6], tuple)
    assert torch.equal(back["a"][6][0], scalar)
    assert back["a"][6][1] == []
    assert torch.equal(back[7]["x"], tree[7]["x"])
    assert back[7]["x"].stride() == tree[7]["x"].stride()
    assert back["__tensor__"] == "not a reference"
    assert back["plain"]["half"].dtype == torch.bfloat16


def test_tensors_of_names_with_dots_stay_apart():
    first, second = torch.ones(2), torch.zeros(3)
    skeleton, tensors = flatten({"a.b": {"c": first}, "a": {"b.c": second}})
    assert len(tensors) == 2
    back = unflatten(json.loads(json.dumps(skeleton)), tensors)
    assert torch.equal(back["a.b"]["c"], first)
    assert torch.equal(back["a"]["b.c"], second)


@pytest.mark.parametrize(
    ("skeleton", "text"),
    [
        ([{"__tensor__": "x"}], "y: expected tensors that belong to the state"),
        ([{"__tensor__": "x"}, {"__tensor__": "x"}], "'x': expected the name of a tensor, each of them once"),
        ([{"__tensor__": 5}], "5: expected the name of a tensor"),
        (
            [{"__tensor__": "x", "stride": [0]}, {"__tensor__": "y"}],
            "x: expected the strides of a dense layout",
        ),
        ([{"__tensor__": "x", "stride": [1, 1]}, {"__tensor__": "y"}], "x: expected 1 integers as strides"),
        ([{"__tensor__": "x", "more": 1}, {"__tensor__": "y"}], "__tensor__: expected it alone"),
        ([{"__items__": [[1, 2], [1, 3]]}], "__items__: expected every key once"),
    ],
)
def test_a_skeleton_from_elsewhere_is_refused(skeleton, text):
    with pytest.raises(ValueError, match=text):
        unflatten(skeleton, {"x": torch.ones(3), "y": torch.ones(2)})


def test_a_model_with_more_than_tensors_is_refused(tmp_path: Path):
    with pytest.raises(TypeError, match=r"extra: expected a tensor in a state dict, got 5"):
        checkpoint.save(tmp_path / "run", 1, {"model": {"extra": 5}}, {})
    assert not list(tmp_path.glob("run/*"))


def test_state_that_is_no_data_is_refused_before_writing(tmp_path: Path):
    with pytest.raises(TypeError, match=r"odd\.f: expected a tensor, number.* got function"):
        checkpoint.save(tmp_path / "run", 1, {}, {}, states={"odd": {"f": lambda: None}})
    assert not (tmp_path / "run").exists()


def test_tied_and_sliced_tensors_are_written_once_each(tmp_path: Path):
    weight = torch.arange(12.0).view(3, 4)
    state = checkpoint.load(
        checkpoint.save(
            tmp_path,
            0,
            {"model": {"a": weight, "b": weight, "row": weight[1], "columns": weight[:, 1:3]}},
            {},
        )
    )
    for name, expected in {"a": weight, "b": weight, "row": weight[1], "columns": weight[:, 1:3]}.items():
        assert torch.equal(state.tensors["model"][name], expected)


# --- damage


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step in (9, 10, 20):
        checkpoint.save(
            tmp_path,
            step,
            {"model": {"w": torch.full((50,), float(step))}},
            {"step": step},
            optimizer=torch.optim.SGD([torch.zeros(1)], lr=1.0),
        )
    return tmp_path


def damage_flip(path: Path) -> None:
    content = bytearray((path / "model.safetensors").read_bytes())
    content[-3] ^= 1
    (path / "model.safetensors").write_bytes(content)


def damage_truncate(path: Path) -> None:
    with open(path / "model.safetensors", "r+b") as file:
        file.truncate(100)


DAMAGES = {
    "flip": damage_flip,
    "truncate": damage_truncate,
    "missing weights": lambda path: (path / "model.safetensors").unlink(),
    "missing metadata": lambda path: (path / "metadata.json").unlink(),
    "metadata edited": lambda path: (path / "metadata.json").write_text("{}"),
    "manifest cut": lambda path: (path / "manifest.json").write_text(
        (path / "manifest.json").read_text()[:-9]
    ),
    "manifest empty": lambda path: (path / "manifest.json").write_text("{}"),
    "manifest a list": lambda path: (path / "manifest.json").write_text("[]"),
    "manifest points outside": lambda path: (path / "manifest.json").write_text(
        json.dumps({"../x": "0", "metadata.json": "0"})
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_newest_is_reported_and_the_one_before_taken(run_dir: Path, kind: str):
    assert checkpoint.latest(run_dir) == run_dir / "checkpoint-20"
    DAMAGES[kind](run_dir / "checkpoint-20")
    with pytest.raises(ValueError, match="checkpoint-20"):
        checkpoint.load(run_dir / "checkpoint-20")
    with pytest.warns(UserWarning, match="damaged checkpoint passed over.*checkpoint-20"):
        found = checkpoint.latest(run_dir)
    assert checkpoint.load(found).metadata == {"step": 10}


def test_all_damaged_gives_none(run_dir: Path):
    for step in (9, 10, 20):
        damage_flip(run_dir / f"checkpoint-{step}")
    with pytest.warns(UserWarning, match="damaged checkpoint") as warned:
        assert checkpoint.latest(run_dir) is None
    assert len(warned) == 3


def test_other_folders_are_not_checkpoints(tmp_path: Path):
    assert checkpoint.latest(tmp_path / "absent") is None
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / "checkpoint-3").mkdir()
    assert checkpoint.latest(tmp_path) is None
    with pytest.raises(ValueError, match="expected a checkpoint folder"):
        checkpoint.load(tmp_path / "checkpoint-3")


@pytest.mark.parametrize(
    "content", [{}, {"states": {"optimizer": {"__tensor__": "gone"}}, "metadata": {}}, [1]]
)
def test_consistent_manifest_of_something_else(run_dir: Path, content):
    path = run_dir / "checkpoint-20"
    (path / "metadata.json").write_text(json.dumps(content))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["metadata.json"] = checkpoint._sha256(path / "metadata.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("version", "text"),
    [(None, "got format 1, which lacks the names of the optimizer's parameters"), (3, "got format 3")],
)
def test_another_format_is_refused_with_what_it_lacks(run_dir: Path, version: int | None, text: str):
    """The first one had no number, and the state of the optimizer as torch has it, by position."""
    path = run_dir / "checkpoint-20"
    optimizer = {"state": {}, "param_groups": [{"lr": 1.0, "params": [0]}]}
    content = {"version": version, "metadata": {"step": 20}, "states": {"optimizer": optimizer}}
    (path / "metadata.json").write_text(
        json.dumps({key: value for key, value in content.items() if value is not None})
    )
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["metadata.json"] = checkpoint._sha256(path / "metadata.json")
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError,
        match=rf"checkpoint-20/metadata\.json: not a checkpoint of this version .*expected format 2, {text}",
    ):
        checkpoint.load(path)


# --- writing


def test_keep_removes_the_oldest(run_dir: Path):
    checkpoint.save(run_dir, 30, {}, {}, keep=2)
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-20", "checkpoint-30"]


def test_keep_never_leaves_only_what_is_damaged(run_dir: Path):
    damage_flip(run_dir / "checkpoint-20")
    checkpoint.save(run_dir, 15, {}, {}, keep=1)  # after a resume from 10
    assert checkpoint.latest(run_dir) == run_dir / "checkpoint-15"
    assert sorted(path.name for path in run_dir.iterdir()) == ["checkpoint-15"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"keep": 0}, "keep: expected an integer >= 1, got 0"),
        ({"step": -1}, "step: expected an integer >= 0, got -1"),
    ],
)
def test_bad_arguments(tmp_path: Path, arguments, text):
    with pytest.raises(ValueError, match=text):
        checkpoint.save(**{"run_dir": tmp_path, "step": 1, "tensors": {}, "metadata": {}} | arguments)


def test_failed_write_leaves_the_old_one(run_dir: Path, monkeypatch):
    def full_disk(*args):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(run_dir, 20, {"model": {"w": torch.zeros(2)}}, {})
    assert checkpoint.load(run_dir / "checkpoint-20").metadata == {"step": 20}
    assert len(list(run_dir.iterdir())) == 3


def test_what_safetensors_says_of_a_full_disk_is_an_error_of_the_disk(run_dir: Path, monkeypatch):
    def full_disk(*args):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match=r"checkpoint-20: expected a disk that takes it, got: .*No space left"):
        checkpoint.save(run_dir, 20, {"model": {"w": torch.zeros(2)}}, {})
    assert checkpoint.load(run_dir / "checkpoint-20").metadata == {"step": 20}


def test_a_file_that_the_disk_does_not_take_is_named(tmp_path: Path):
    (tmp_path / "file").write_text("old")
    with (
        pytest.raises(OSError, match=rf"{tmp_path}/file: expected a disk .*No space left on device"),
        atomic.atomic_file(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert [(file.name, file.read_text()) for file in tmp_path.iterdir()] == [("file", "old")]


NOBODY = 2**22 + 1  # no process has this number: Linux goes up to 2**22


@pytest.fixture
def living():
    """The number of another process, which runs as long as the test."""
    waits = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield waits.pid
    waits.communicate(b"\n")


def test_leftovers_of_dead_writers_are_removed_those_of_living_ones_kept(run_dir: Path, living: int):
    dead = NOBODY
    for name in (
        f".checkpoint-40.{dead}.tmp",
        f".checkpoint-40.{living}.tmp",
        f".checkpoint-20.{dead}.old",
        f".other.{dead}.tmp",
    ):
        (run_dir / name).mkdir()
        (run_dir / name / "part.safetensors").write_bytes(b"x")
    checkpoint.save(run_dir, 50, {}, {})
    hidden = {path.name for path in run_dir.iterdir() if path.name.startswith(".")}
    assert hidden == {f".checkpoint-40.{living}.tmp", f".other.{dead}.tmp"}


def test_folder_displaced_by_a_dead_writer_is_put_back(run_dir: Path):
    os.replace(run_dir / "checkpoint-20", run_dir / f".checkpoint-20.{NOBODY}.old")
    assert checkpoint.load(checkpoint.latest(run_dir)).metadata == {"step": 20}


@pytest.mark.parametrize("exchange", [True, False])
def test_replacing_a_folder(tmp_path: Path, monkeypatch, exchange: bool):
    if not exchange:
        monkeypatch.setattr(atomic, "exchange", lambda first, second: False)
    target = tmp_path / "a [strange] name"
    for content in ("old", "new"):
        with atomic.atomic_directory(target) as folder:
            (folder / "nested").mkdir()
            (folder / "nested" / "file").write_text(content)
    assert (target / "nested" / "file").read_text() == "new"

    def fail_half_way() -> None:
        with atomic.atomic_directory(target) as folder:
            (folder / "file").write_text("never")
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        fail_half_way()
    assert (target / "nested" / "file").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == [target.name]


@pytest.mark.skipif(not hasattr(os, "fork") or os.uname().sysname != "Linux", reason="renameat2 is Linux'")
def test_a_reader_always_finds_a_whole_folder(tmp_path: Path):
    """A thread that reads without pause while the folder is replaced without pause: it never misses it."""
    target, stop, failures, reads = tmp_path / "model", threading.Event(), [], []

    def replace(number: int) -> None:
        with atomic.atomic_directory(target) as folder:
            for name in ("a", "b"):
                (folder / name).write_text(str(number))

    def read() -> None:
        while not stop.is_set():
            try:
                folder = os.open(target, os.O_RDONLY)
            except FileNotFoundError as error:
                failures.append(error)
                continue
            reads.append(folder)
            os.close(folder)

    replace(0)
    if not atomic.exchange(target, target):
        pytest.skip("this file system cannot exchange names")
    reader = threading.Thread(target=read)
    reader.start()
    number = 0
    try:  # until both had their turns, however the machine shares them out
        while reader.is_alive() and (number < 150 or len(reads) < 150):
            number += 1
            replace(number)
    finally:
        stop.set()
        reader.join()
    assert not failures
    assert len(reads) >= 150


def test_kill_while_replacing_leaves_old_or_new(tmp_path: Path):
    """A process that saves without pause is killed 25 times; the newest checkpoint is whole after every kill.

    It says when it has saved, and dies some time later, wherever it is then: what is checked holds always.
    """
    tensors = {name: torch.zeros(3000) for name in "abcdef"}
    checkpoint.save(tmp_path, 1, {"model": tensors}, {"round": 0})
    newest = 0
    for attempt in range(25):
        saved, says = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                for count in range(newest + 1, newest + 10_000):
                    checkpoint.save(
                        tmp_path,
                        1,
                        {"model": {name: torch.full((3000,), float(count)) for name in tensors}},
                        {"round": count},
                    )
                    os.write(says, b"x")
            finally:
                os._exit(1)
        os.close(says)
        assert os.read(saved, 1) == b"x"
        time.sleep(0.0007 * attempt)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(saved)
        state = checkpoint.load(checkpoint.latest(tmp_path))
        assert state.metadata["round"] > newest
        newest = state.metadata["round"]
        assert all(
            torch.equal(tensor, torch.full((3000,), float(newest)))
            for tensor in state.tensors["model"].values()
        )
    checkpoint.save(tmp_path, 1, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
