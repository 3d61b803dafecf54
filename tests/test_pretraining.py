"""Pre-training: the folder diffusers opens, the record beside it, and a run that is killed and resumed ends
with the same bits.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import crash
import pytest
import runs
import torch
from safetensors.torch import load_file

from fastunlearn.host import disk
from fastunlearn.runs import checkpoint

diffusers = pytest.importorskip("diffusers")
STEPS, SAVE_EVERY = 60, 7


def pretrain_tiny(output_dir: str, *, seed: int = 3, lr: float = 1e-3, rows: int = 30) -> None:
    from fastunlearn.host.store import ImageStore
    from fastunlearn.recipes.mnist_tshirt import Pretraining
    from fastunlearn.runs.pretraining import pretrain

    torch.manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)[:rows]
    blocks = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
    }
    unet = {
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "dropout": 0.1,
        **blocks,
    }
    recipe = Pretraining(unet=unet, batch_size=4, total_steps=STEPS, lr=lr, warmup_steps=5, ema_decay=0.9)
    options = {"checkpointing_steps": SAVE_EVERY, "show_progress": False, "record": {"read": {"rows": 30}}}
    pretrain(ImageStore(images), recipe, Path(output_dir) / "model", seed=seed, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, crash.Lines]:
    """A finished run, and its lines."""
    folder = tmp_path_factory.mktemp("pretraining")
    return folder, crash.lines_of(pretrain_tiny, folder)


def test_result_opens_in_diffusers_and_is_recorded(uninterrupted):
    folder = uninterrupted[0] / "model"
    pipeline = diffusers.DDPMPipeline.from_pretrained(folder)
    assert pipeline.unet.config.sample_size == 8
    record = json.loads((folder / "pretraining.json").read_text())
    assert [entry["step"] for entry in record["log"]] == [50, 60]
    assert record["seed"] == 3
    assert (record["images"], record["read"]) == (30, {"rows": 30})
    assert record["log"][-1]["loss"] < record["log"][0]["loss"]


def test_killed_and_resumed_run_is_bit_equal(uninterrupted, tmp_path):
    """Checkpoints fall between the entries of the loss log, so the running mean has to come back too."""
    expected_dir, lines = uninterrupted
    kills, run_dir = crash.Kills(), tmp_path / "model.run"
    crash.kill_at(2 * lines.all // 5, pretrain_tiny, tmp_path, run_dir, kills, saving=False)
    resumed_from = checkpoint.latest(run_dir)
    assert resumed_from is not None
    before = kills.while_saving  # 1 if that line happened to be one of a save
    one_save = lines.saving / -(-STEPS // SAVE_EVERY)
    for part in (0.6, 0.8):  # in the middle of the first save after it, when its files are being written
        crash.kill_at(int(part * one_save), pretrain_tiny, tmp_path, run_dir, kills, saving=True)
    assert kills == crash.Kills(total=3, while_saving=before + 2)
    assert checkpoint.latest(run_dir) == resumed_from
    crash.run_to_end(pretrain_tiny, tmp_path)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    found, expected = load_file(tmp_path / weights), load_file(expected_dir / weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [
        json.loads((folder / "model" / "pretraining.json").read_text())["log"]
        for folder in (tmp_path, expected_dir)
    ]
    assert [(entry["step"], entry["loss"], entry["lr"]) for entry in logs[0]] == [
        (entry["step"], entry["loss"], entry["lr"]) for entry in logs[1]
    ]


@pytest.mark.parametrize(
    ("lr", "every", "found"),
    [(1e30, 100, "a finite mean loss, got nan"), (float("inf"), 1, "finite weights, got NaN or Inf in ")],
)
def test_weights_that_are_not_finite_end_it_and_are_never_written(tmp_path, lr, every, found):
    """The first checkpoint finds them, or, before one is due, the log its loss."""
    from fastunlearn.host.store import ImageStore
    from fastunlearn.recipes.mnist_tshirt import Pretraining
    from fastunlearn.runs.pretraining import pretrain
    from fastunlearn.runs.run_health import WeightsNotFinite

    unet = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (8,)}
    unet |= {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet |= {"layers_per_block": 1, "norm_num_groups": 4}
    recipe = Pretraining(unet=unet, batch_size=4, total_steps=60, lr=lr, warmup_steps=0, ema_decay=0.9)
    images = ImageStore(torch.zeros(4, 1, 8, 8, dtype=torch.uint8))
    with pytest.raises(WeightsNotFinite, match=rf"step \d+: expected {found}.*no checkpoint was written yet"):
        pretrain(images, recipe, tmp_path / "model", checkpointing_steps=every, show_progress=False)
    assert not list(tmp_path.iterdir())


def test_it_begins_only_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10)
    with pytest.raises(OSError, match="of free disk for 3 checkpoints and the model, got 10 bytes"):
        pretrain_tiny(str(tmp_path))
    assert not list(tmp_path.rglob("checkpoint-*"))


def test_two_into_one_output_are_refused(tmp_path):
    from locks import held_elsewhere

    from fastunlearn.host.folder_lock import FolderLocked, locked

    refused = pytest.raises(FolderLocked, match=r"model\.run: .*held by process")
    with held_elsewhere(locked, tmp_path / "model.run"), refused:
        pretrain_tiny(str(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture
def half_done(uninterrupted, tmp_path) -> Path:
    """What a run leaves whose last checkpoint is that of step 56."""
    shutil.copytree(
        uninterrupted[0] / "model.run" / "checkpoint-56", tmp_path / "model.run" / "checkpoint-56"
    )
    return tmp_path


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"seed": 4}, "a run with this seed, got another"),
        ({"lr": 2e-3}, r"a run with recipe .*lr \(0.002 here, 0.001 there\)"),
        ({"rows": 29}, "a run with data [0-9a-f]{64}, got [0-9a-f]{64}"),
    ],
)
def test_another_pretraining_is_refused_with_both_values(half_done, change, text):
    with pytest.raises(ValueError, match=text):
        pretrain_tiny(str(half_done), **change)
    assert not (half_done / "model").exists()


def test_a_checkpoint_that_does_not_fit_is_refused(half_done):
    saved = half_done / "model.run" / "checkpoint-56"
    name = "optimizer.state.conv_in.bias.exp_avg"
    runs.change_tensors(saved, "optimizer", lambda named: named.update({name: named[name][:3].clone()}))
    with pytest.raises(
        ValueError,
        match=r"conv_in\.bias\.exp_avg: expected float32 of shape \(8,\), got float32 of shape \(3,\)",
    ):
        pretrain_tiny(str(half_done))
    runs.change_tensors(saved, "ema", lambda named: named.pop("conv_in.bias"))
    with pytest.raises(ValueError, match=r"ema\.conv_in\.bias: expected an entry of this name"):
        pretrain_tiny(str(half_done))
