"""What an optimizer's state tells of an image, and that it does not outlive its run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attacker import entries, files, image_behind, moments, residual, tensors, told
from one_image import (
    BATCH,
    CANDIDATES,
    RIGHT,
    SEED,
    SHAPE,
    first_moments,
    network,
    run,
    stopped_run,
)

from fastunlearn.methods import SISS, NegGrad, ReTrack
from fastunlearn.runs.training import purge
from fastunlearn.testing.factories import linear_schedule

METHODS = [NegGrad(), ReTrack(k=3, lambd=0.3), SISS()]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
KEEPS = pytest.mark.filterwarnings("ignore:keep_checkpoints")


@pytest.fixture(params=["stopped", "kept"])
def with_optimizer_state(request, tmp_path: Path) -> Path:
    """A run folder in which the optimizer's state lies: the run was stopped, or told to keep it."""
    if request.param == "stopped":
        return stopped_run(NegGrad(), tmp_path / "run")
    return run(NegGrad(), tmp_path / "run", keep_checkpoints=True)


@KEEPS
def test_the_optimizer_state_gives_the_image_back(with_optimizer_state: Path):
    """To whoever may read it, and knows the seed, which lies beside it."""
    found = files(with_optimizer_state)
    assert SEED in [value for _, value in entries(found)]
    recovered = image_behind(
        moments(found), network(), linear_schedule(), seed=SEED, batch_size=BATCH, shape=SHAPE
    )
    errors = (recovered - CANDIDATES[RIGHT]).abs()
    assert (errors < 0.5).sum() == 64  # grey levels: all pixels, exactly


@KEEPS
def test_it_lies_in_the_private_folder_alone(with_optimizer_state: Path):
    private = with_optimizer_state / "private"
    assert moments(files(private))
    assert nothing_to_start_from(files(with_optimizer_state, but="private"))
    # And nobody but its owner may read it.
    for path in (private, *private.rglob("*")):
        assert path.stat().st_mode & 0o077 == 0, path


@KEEPS
def test_purge_leaves_nothing_of_it(with_optimizer_state: Path):
    purge(with_optimizer_state)
    assert nothing_to_start_from(files(with_optimizer_state))


@methods
def test_a_finished_run_leaves_the_weights_alone(method, tmp_path: Path):
    """Beside them only the seed is there to be found, in the private folder, and after `purge` neither."""
    folder = run(method, tmp_path / "run", steps=2, checkpointing_steps=1)
    assert list(tensors(files(folder)))
    assert nothing_to_start_from(files(folder, but="private"))
    assert not moments(files(folder))
    purge(folder)
    assert nothing_to_start_from(files(folder))


@methods
def test_it_confirms_a_candidate(method, tmp_path: Path):
    """Also where the gradient is of more images: whoever knows them takes the step on each candidate."""
    found = moments(files(stopped_run(method, tmp_path / "run")))
    distances = [residual(found, first_moments(method, candidate)) for candidate in range(len(CANDIDATES))]
    assert distances[RIGHT] < 1e-6
    assert min(distance for row, distance in enumerate(distances) if row != RIGHT) > 0.01


def test_weights_still_give_the_image_back_to_whoever_knows_the_seed(tmp_path: Path):
    """After one step of plain descent their difference is the gradient. So a seed that others know, such as
    the one by default in Python, is none (docs/what_a_run_leaves.md).
    """
    folder = run(
        NegGrad(), tmp_path / "run", optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    purge(folder)
    before, after = network().state_dict(), dict(tensors(files(folder)))
    gradient = {name: before[name] - after[name] for name in before}
    recovered = image_behind(gradient, network(), linear_schedule(), seed=SEED, batch_size=BATCH, shape=SHAPE)
    assert ((recovered - CANDIDATES[RIGHT]).abs() < 0.5).sum() == 64


def nothing_to_start_from(found: list[Path]) -> bool:
    """Whether `found` has neither gradients nor the numbers that they were computed with.

    Files of another kind than those that the attacker can read are refused: nobody could say what they tell.
    """
    assert {path.suffix for path in found} <= {".json", ".jsonl", ".safetensors"}
    weights = {name: value.shape for name, value in network().state_dict().items()}
    others = [name for name, value in tensors(found) if weights.get(name) != value.shape]
    seeds = [keys for keys, value in entries(found) if value == SEED or "seed" in map(str, keys)]
    return (others, seeds, told(str(SEED), found)) == ([], [], [])
