"""One file is all that a new method needs: examples/my_method.py, which docs/adding_a_method.md shows."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastunlearn import Draws, ImageStore, Unlearner, method_step
from fastunlearn.methods import registry
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.checkpoints import save_tiny_checkpoint
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule, mixture_inputs

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "my_method.py"
MOST_LINES = 40
EXACT = 1e-10


@pytest.fixture
def Blank(methods_go_again, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    monkeypatch.delitem(sys.modules, "my_method", raising=False)
    module = importlib.import_module("my_method")
    yield module.Blank
    del sys.modules["my_method"]


def environment() -> dict[str, str]:
    """Of a process that finds the package, the benchmarks and the example."""
    places = [str(ROOT), str(EXAMPLE.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(places), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}


def test_it_is_one_short_file():
    assert sum(bool(line.strip()) for line in EXAMPLE.read_text().splitlines()) <= MOST_LINES


def test_the_docs_show_the_file():
    page = (ROOT / "docs" / "adding_a_method.md").read_text()
    assert f"```python\n{EXAMPLE.read_text()}```" in page


def test_the_registry_finds_it(Blank):
    record = registry.get("blank")
    assert record.method is Blank
    assert list(registry.methods())[-1] == "blank"
    assert [each.name for each in record.hyperparameters()] == [field.name for field in fields(Blank)]


# --- a step
# -----------------------------------------------------------------------------


def world(prediction_type: str = "epsilon") -> SimpleNamespace:
    """A network, a batch and all random numbers of a step, in float64."""
    forget = mixture_inputs(6, seed=1, dtype=torch.float64, num_timesteps=999)
    retain = mixture_inputs(6, seed=2, dtype=torch.float64, num_timesteps=999)
    return SimpleNamespace(
        model=TinyDenoiser().double(),
        schedule=linear_schedule(prediction_type=prediction_type),
        forget=forget.forget,
        retain=retain.retain,
        draws=Draws(
            forget_noise=forget.noise,
            forget_timesteps=forget.timesteps,
            retain_noise=retain.noise,
            retain_timesteps=retain.timesteps,
        ),
    )


def literal_loss(method, world) -> torch.Tensor:
    """The formula in the docstring of the example, term by term."""
    draws = world.draws

    def error(images, shown, noise, timesteps):
        """`||prediction - target||^2` `[B]` of noised `images` in which the network is to see `shown`, and by
        how much the target moves with it.
        """
        alpha, sigma = (
            table[timesteps].view(-1, 1, 1, 1) for table in (world.schedule.alpha, world.schedule.sigma)
        )
        x_t = alpha * images + sigma * noise
        target = (x_t - alpha * shown) / sigma
        slope = alpha / sigma  # of the target, as a function of what is shown
        if world.schedule.prediction_type == "v_prediction":
            target = alpha * target - sigma * shown
            slope = 1 / sigma
        prediction = world.model(x_t, world.schedule.model_input(timesteps))
        return (prediction - target).square().sum((1, 2, 3)), slope.flatten()

    grey = torch.full_like(world.forget, method.grey)
    forget, slope = error(world.forget, grey, draws.forget_noise, draws.forget_timesteps)
    retain, _ = error(world.retain, world.retain, draws.retain_noise, draws.retain_timesteps)
    weighted = torch.minimum(torch.ones_like(slope), 1 / slope**2) * forget
    return method.lambd * weighted.mean() + (1 - method.lambd) * retain.mean()


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_its_gradient_is_that_of_the_literal_loss(Blank, prediction_type, micro_batch_size):
    method, given = Blank(grey=0.3, lambd=0.2), world(prediction_type)
    loss = literal_loss(method, given)
    expected = torch.autograd.grad(loss, list(given.model.parameters()))
    output = method_step(
        method,
        given.model,
        None,
        given.schedule,
        forget=given.forget,
        retain=given.retain,
        draws=given.draws,
        micro_batch_size=micro_batch_size,
    )
    assert output.loss == pytest.approx(loss.item(), rel=EXACT)
    assert relative_l2([parameter.grad for parameter in given.model.parameters()], list(expected)) < EXACT


def test_steps_bring_its_loss_down(Blank):
    given = world()
    optimizer = torch.optim.AdamW(given.model.parameters(), lr=1e-2)
    losses = [
        method_step(
            Blank(lambd=0.5),
            given.model,
            optimizer,
            given.schedule,
            forget=given.forget,
            retain=given.retain,
            draws=given.draws,
        ).forget_loss.item()
        for _ in range(20)
    ]
    assert losses[-1] < losses[0]


# --- Unlearner, command line, benchmarks
# -----------------------------------------------------------------------------


def test_an_unlearner_takes_the_same_step(Blank):
    """From its stores, by rows, as from batches."""
    images = torch.randint(0, 256, (24, 1, 8, 8), dtype=torch.uint8)
    forget, retain = ImageStore(images[:4]), ImageStore(images[4:])
    rows = {
        "forget_rows": torch.tensor([0, 3, 1, 1, 2, 0]),
        "retain_rows": torch.tensor([19, 0, 4, 7, 4, 11]),
    }
    noise, timesteps = torch.randn(2, 6, 1, 8, 8), torch.randint(0, 1000, (2, 6))
    numbers = {
        "forget_noise": noise[0],
        "retain_noise": noise[1],
        "forget_timesteps": timesteps[0],
        "retain_timesteps": timesteps[1],
    }
    schedule, models = linear_schedule(), [TinyDenoiser(), TinyDenoiser()]
    optimizers = [torch.optim.SGD(model.parameters(), lr=1e-3) for model in models]
    run = Unlearner(models[0], optimizers[0], schedule, Blank(), forget=forget, retain=retain, batch_size=6)
    own = run.step(Draws(**numbers, **rows))
    batches = {"forget": forget.rows(rows["forget_rows"]), "retain": retain.rows(rows["retain_rows"])}
    other = method_step(Blank(), models[1], optimizers[1], schedule, **batches, draws=Draws(**numbers))
    assert own.loss == pytest.approx(other.loss.item(), rel=1e-6)
    for one, two in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, two)
    assert not run.step().skipped  # and one that draws by itself


@pytest.fixture
def arguments(tmp_path) -> list[str]:
    """Of a run of two steps on a tiny network."""
    pytest.importorskip("tyro")
    pytest.importorskip("diffusers")
    images = np.random.default_rng(0).integers(0, 256, (22, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "forget.npy", images[:2])
    np.save(tmp_path / "retain.npy", images[2:])
    save_tiny_checkpoint(tmp_path / "model")
    sets = ["--forget", tmp_path / "forget.npy", "--retain", tmp_path / "retain.npy"]
    fast = ["--steps", 2, "--batch-size", 4, "--device", "cpu"]
    command = ["unlearn", "--method", "blank", "--model", tmp_path / "model", *sets, *fast]
    return [str(argument) for argument in [*command, "--output", tmp_path / "run"]]


def test_the_file_runs_as_the_command_line(tmp_path, arguments):
    command = [sys.executable, EXAMPLE, *arguments, "--grey", "0.5", "--lambda", "0.2"]
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["status"] == "complete"
    assert record["method"] == {"name": "Blank", "grey": 0.5, "lambd": 0.2}
    assert (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_a_flag_of_another_method_is_refused(Blank, arguments, capsys):
    from fastunlearn.cli import main

    assert main([*arguments, "--eta", "0.1"]) == 2
    expected = "--eta: expected --grey, --lambd with --method blank, got --eta 0.1, a flag of erasediff"
    assert expected in capsys.readouterr().err


def test_the_benchmarks_time_it(tmp_path):
    pytest.importorskip("pytest_benchmark")
    command = [sys.executable, "-m", "pytest", "bench/bench_step.py", "-p", "my_method", "-k", "tiny-blank"]
    command += ["--smoke", "--device", "cpu", "--threads", "1", "-p", "no:cacheprovider"]
    command += ["--results", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    rows = json.loads((tmp_path / "steps_cpu.json").read_text())["rows"]
    assert [row["contestant"] for row in rows] == ["limit", "fastunlearn", "Unlearner"]
    assert all(row["method"] == "blank" and row["seconds"] > 0 for row in rows), rows
    assert {row["rows"] for row in rows} == {8}  # both sets, four rows each
    assert rows[2]["update_error"] < 1e-3
