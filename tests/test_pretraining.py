"""Pre-training: the folder diffusers opens, the record beside it, and a run that is killed and resumed ends with the same bits."""

from __future__ import annotations

import json
from pathlib import Path

import crash
import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file

from fastunlearn import checkpoint

STEPS = 60


def pretrain_tiny(output_dir: str) -> None:
    from fastunlearn.pretraining import pretrain
    from fastunlearn.recipes.mnist_tshirt import Pretraining
    from fastunlearn.store import ImageStore

    torch.manual_seed(0)
    images = torch.randint(0, 256, (30, 1, 8, 8), dtype=torch.uint8)
    blocks = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1, "norm_num_groups": 4, "dropout": 0.1, **blocks}
    recipe = Pretraining(unet=unet, batch_size=4, total_steps=STEPS, lr=1e-3, warmup_steps=5, ema_decay=0.9)
    pretrain(ImageStore(images), recipe, Path(output_dir) / "model", seed=3, checkpointing_steps=7, show_progress=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, float]:
    """A finished run, and its seconds."""
    folder = tmp_path_factory.mktemp("pretraining")
    crash.run_to_end(pretrain_tiny, folder / "warm")
    return folder / "warm", crash.run_to_end(pretrain_tiny, folder / "timed")


def test_result_opens_in_diffusers_and_is_recorded(uninterrupted):
    folder = uninterrupted[0] / "model"
    pipeline = DDPMPipeline.from_pretrained(folder)
    assert pipeline.unet.config.sample_size == 8
    record = json.loads((folder / "pretraining.json").read_text())
    assert [entry["step"] for entry in record["log"]] == [50, 60]
    assert record["seed"] == 3
    assert record["images"] == 30
    assert record["log"][-1]["loss"] < record["log"][0]["loss"]


def test_killed_and_resumed_run_is_bit_equal(uninterrupted, tmp_path):
    """Checkpoints fall between the entries of the loss log, so the running mean has to come back too."""
    expected_dir, seconds = uninterrupted
    kills = crash.Kills()
    while checkpoint.latest(tmp_path / "model.run") is None:
        crash.kill_once(pretrain_tiny, tmp_path, tmp_path / "model.run", 0.4 * seconds, kills, while_saving=False)
    for _ in range(2):
        crash.kill_once(pretrain_tiny, tmp_path, tmp_path / "model.run", 0.0, kills, while_saving=True)
    assert kills.total >= 2
    assert kills.while_saving >= 1
    crash.run_to_end(pretrain_tiny, tmp_path)
    weights = "model/unet/diffusion_pytorch_model.safetensors"
    found, expected = load_file(tmp_path / weights), load_file(expected_dir / weights)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    logs = [json.loads((folder / "model" / "pretraining.json").read_text())["log"] for folder in (tmp_path, expected_dir)]
    assert [(entry["step"], entry["loss"], entry["lr"]) for entry in logs[0]] == [(entry["step"], entry["loss"], entry["lr"]) for entry in logs[1]]
