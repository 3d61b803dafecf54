"""A run that is killed with SIGKILL at any line and resumed has the same bits as one that is left alone."""

from __future__ import annotations

import random
from pathlib import Path

import crash
import pytest
import runs
import torch

from fastunlearn.runs import checkpoint
from fastunlearn.runs.run_record import read_metrics, read_run

NUM_STEPS = 12


def unlearn_tiny(run_dir: str) -> None:
    """A UNet with dropout (torch's own random state matters), channels-last weights, fused AdamW, a schedule
    and EMA: everything that has a state.
    """
    from diffusers import DDPMScheduler, UNet2DModel
    from diffusers.optimization import get_cosine_schedule_with_warmup
    from diffusers.training_utils import EMAModel

    from fastunlearn.engine.unlearner import Unlearner
    from fastunlearn.host.store import ImageStore
    from fastunlearn.methods import ReTrack
    from fastunlearn.objective.schedule import NoiseSchedule
    from fastunlearn.runs.training import unlearn

    torch.manual_seed(0)
    blocks = {
        "down_block_types": ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",),
        "block_out_channels": (8,),
        "add_attention": False,
    }
    model = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        norm_num_groups=4,
        dropout=0.1,
        **blocks,
    )
    model = model.to(memory_format=torch.channels_last).train()
    images = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    stateful = {
        "ema": EMAModel(model.parameters(), decay=0.9),
        "lr_scheduler": get_cosine_schedule_with_warmup(optimizer, 3, NUM_STEPS),
    }
    stores = {"forget": ImageStore(images[:3]), "retain": ImageStore(images[3:])}
    schedule = NoiseSchedule.from_diffusers(DDPMScheduler())
    unlearner = Unlearner(
        model,
        optimizer,
        schedule,
        ReTrack(k=3, lambd=0.1),
        batch_size=4,
        seed=7,
        total_steps=NUM_STEPS,
        **stores,
        **stateful,
    )
    options = {
        "checkpointing_steps": 1,
        "checkpoints_total_limit": 2,
        "resume_from_checkpoint": "latest",
        "keep_checkpoints": True,  # to be compared
        "show_progress": False,
    }
    unlearn(unlearner, num_steps=NUM_STEPS, output_dir=run_dir, **options)


def assert_same_run(run_dir: Path, expected_dir: Path) -> None:
    saved = [runs.saved_in(path, NUM_STEPS) for path in (run_dir, expected_dir)]
    assert runs.same_run(*saved)
    found, expected = map(checkpoint.load, saved)
    found_tensors, expected_tensors = (
        {**state.tensors} | {"states": _flat(state.states)} for state in (found, expected)
    )
    assert found_tensors.keys() == expected_tensors.keys()
    for stem, named in expected_tensors.items():
        assert named.keys() == found_tensors[stem].keys()
        for name, tensor in named.items():
            same = (
                torch.equal(found_tensors[stem][name], tensor)
                if isinstance(tensor, torch.Tensor)
                else found_tensors[stem][name] == tensor
            )
            assert same, f"{stem}: {name}"
    without_time = [
        [{**record, "seconds": None} for record in read_metrics(path)] for path in (run_dir, expected_dir)
    ]
    assert without_time[0] == without_time[1]
    assert [record["step"] for record in without_time[0]] == list(range(1, NUM_STEPS + 1))
    assert read_run(run_dir)["status"] == "complete"
    assert not list(run_dir.rglob(".checkpoint*"))


def _flat(states: dict) -> dict:
    from fastunlearn.runs.state_tree import flatten

    skeleton, tensors = flatten(states)
    return {"skeleton": skeleton, **tensors}


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> tuple[Path, crash.Lines]:
    """The folder of a run that was left alone, and how many lines such a run takes."""
    pytest.importorskip("diffusers")
    folder = tmp_path_factory.mktemp("runs")
    crash.run_to_end(unlearn_tiny, folder / "plain")
    return folder / "plain", crash.lines_of(unlearn_tiny, folder / "counted")


def kill_and_resume(count: int, uninterrupted: tuple[Path, crash.Lines], tmp_path: Path) -> crash.Kills:
    """Runs are killed at random lines, every other time while they save, then completed and compared.

    One run is killed once, anywhere; another up to three times, each time within its share of the lines, so
    that it cannot end before.
    """
    expected_dir, lines = uninterrupted
    generator, kills, number = random.Random(0), crash.Kills(), 0
    while kills.total < count:
        run_dir = tmp_path / str(number)
        times = min(1 + number % 3, count - kills.total)
        for _ in range(times):
            saving = kills.total % 2 == 0
            line = generator.randint(1, (lines.saving if saving else lines.all) // times)
            crash.kill_at(line, unlearn_tiny, run_dir, run_dir / "private", kills, saving=saving)
        crash.run_to_end(unlearn_tiny, run_dir)
        assert_same_run(run_dir, expected_dir)
        number += 1
    return kills


def test_two_uninterrupted_runs_are_equal(uninterrupted):
    """Without this the comparison below would not say anything about resuming."""
    folder, _ = uninterrupted
    assert_same_run(folder.with_name("counted"), folder)
    parameters = checkpoint.load(runs.saved_in(folder, NUM_STEPS)).tensors["model"]
    before = checkpoint.load(runs.saved_in(folder, NUM_STEPS - 1)).tensors["model"]
    assert any(not torch.equal(parameters[name], before[name]) for name in parameters)


def test_twenty_kills(uninterrupted, tmp_path):
    kills = kill_and_resume(20, uninterrupted, tmp_path)
    assert kills.total == 20
    assert kills.while_saving >= 5


@pytest.mark.slow
def test_a_hundred_kills(uninterrupted, tmp_path):
    kills = kill_and_resume(100, uninterrupted, tmp_path)
    assert kills.total == 100
    assert kills.while_saving >= 25
