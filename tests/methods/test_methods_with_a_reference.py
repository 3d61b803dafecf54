"""A method that compares the network with what it was: who brings the other one, where nobody is asked."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from runs import unfinish
from small_methods import Pairs

from fastunlearn.engine import unlearner
from fastunlearn.methods import register
from fastunlearn.models import load_checkpoint
from fastunlearn.testing.checkpoints import save_tiny_checkpoint


@pytest.fixture(autouse=True)
def _registered(methods_go_again):
    register(help="prefers the retain image of a pair.")(Pairs)


@pytest.fixture
def runs(monkeypatch) -> list[unlearner.Unlearner]:
    """Every `Unlearner` that is made."""
    made = []
    make = unlearner.Unlearner.__init__

    def remembered(self, *args, **options):
        make(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(unlearner.Unlearner, "__init__", remembered)
    return made


def test_the_command_line_compares_with_the_checkpoint_that_was_given(tmp_path, runs):
    pytest.importorskip("tyro")
    pytest.importorskip("diffusers")
    from fastunlearn.cli import main

    images = np.random.default_rng(0).integers(0, 256, (22, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "forget.npy", images[:2])
    np.save(tmp_path / "retain.npy", images[2:])
    base, _ = load_checkpoint(save_tiny_checkpoint(tmp_path / "model"))
    command = ["unlearn", "--method", "pairs", "--beta", "0.5", "--model", tmp_path / "model"]
    command += ["--forget", tmp_path / "forget.npy", "--retain", tmp_path / "retain.npy"]
    command += [
        "--steps",
        3,
        "--lr",
        1e-2,
        "--batch-size",
        4,
        "--device",
        "cpu",
        "--output",
        tmp_path / "run",
    ]
    command += ["--checkpointing_steps", 2, "--keep_checkpoints"]
    with pytest.warns(UserWarning, match="keep_checkpoints"):
        assert main([str(argument) for argument in command]) == 0
    unfinish(tmp_path / "run", 2)
    with pytest.warns(UserWarning, match="keep_checkpoints"):
        assert main([str(argument) for argument in [*command, "--resume_from_checkpoint", "latest"]]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["method"] == {"name": "Pairs", "beta": 0.5}
    assert len(runs) == 2
    for run in runs:
        for name, weight in run.reference_model.state_dict().items():
            assert torch.equal(weight, base.state_dict()[name])
        # torch chooses kernels by both: in the mode of training it has the bits of the network.
        assert run.reference_model.training
        assert all(weight.requires_grad for weight in run.reference_model.parameters())
        assert any(
            not torch.equal(weight, base.state_dict()[name])
            for name, weight in run.model.state_dict().items()
        )


@pytest.mark.parametrize("contestant", ["fastunlearn", "Unlearner"])
def test_the_benchmarks_compare_with_a_copy(contestant):
    pytest.importorskip("pytest_benchmark")
    from bench.steps.contestants import Setting
    from bench.steps.job import Job
    from bench.steps.networks import NETWORKS

    job = Job(NETWORKS["tiny"], "pairs", torch.device("cpu"))
    assert [(call.rows, call.backwards) for call in job.calls] == [(2 * job.batch, 0), (2 * job.batch, 1)]
    setting = Setting(job, torch.contiguous_format, joined=True)
    before = [weight.detach().clone() for weight in setting.model(contestant).parameters()]
    step = setting.build(contestant)
    step()
    after = list(setting.model(contestant).parameters())
    assert all(weight.isfinite().all() for weight in after)
    assert any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
