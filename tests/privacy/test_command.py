"""What the command leaves, as somebody finds it to whom the run's folder was given without `private/`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from attacker import entries, files, moments, tensors, told
from one_image import CANDIDATES, RETAIN, RIGHT

from fastunlearn import ImageStore
from fastunlearn.cli import main
from fastunlearn.testing.checkpoints import save_tiny_checkpoint, tiny_unet

pytest.importorskip("tyro")
pytest.importorskip("diffusers")

WEIGHTS = Path("model") / "unet" / "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """A folder with the model, and the images to forget and to keep."""
    folder = tmp_path_factory.mktemp("images")
    save_tiny_checkpoint(folder / "model")
    np.save(folder / "secret-name.npy", CANDIDATES[RIGHT][None].numpy())
    np.save(folder / "retain.npy", torch.cat([RETAIN, CANDIDATES[RIGHT][None]]).numpy())
    return folder


def unlearn(images: Path, output: Path, *more: object) -> Path:
    sets = ("--forget", images / "secret-name.npy", "--retain", images / "retain.npy", "--drop_overlap")
    size = ("--steps", 2, "--batch-size", 2, "--checkpointing_steps", 1, "--device", "cpu")
    given = ("--model", images / "model", *sets, "--method", "retrack", "--k", 3, *size)
    assert main([str(each) for each in ("unlearn", *given, "--output", output, *more)]) == 0
    return output


@pytest.fixture(scope="module")
def finished(images: Path, tmp_path_factory) -> Path:
    return unlearn(images, tmp_path_factory.mktemp("runs") / "finished")


def test_nothing_in_the_open_names_the_image(finished: Path):
    found = files(finished, but="private")
    weights = tiny_unet().state_dict()
    assert {name for name, _ in tensors(found)} == set(weights)
    hashes = [ImageStore(CANDIDATES[[RIGHT]]).content_hash(), ImageStore(RETAIN).content_hash()]
    assert [told(text, found) for text in [*hashes, "secret-name"]] == [[]] * 3
    # Which row of --retain was left out would be as good as its name: only their number is said.
    (run_file,) = [path for path in found if path.name == "run.json"]
    assert json.loads(run_file.read_text())["forget_in_retain"]["dropped_equal"] == 1


def test_the_private_folder_keeps_what_is_needed_and_no_gradient(finished: Path):
    private = finished / "private"
    assert not moments(files(private))
    assert not list(tensors(files(private)))  # neither checkpoints nor caches of neighbours
    assert told("secret-name", files(private))


def test_the_seed_is_one_that_nobody_guesses(images: Path, finished: Path, tmp_path: Path):
    """Whoever knows it runs a candidate again, and compares the weights bit by bit."""
    seed = json.loads((finished / "private" / "record.json").read_text())["seed"]
    assert seed > 2**32
    assert not told(str(seed), files(finished, but="private"))
    again = unlearn(images, tmp_path / "again", "--seed", seed)
    assert same_weights(finished, again)
    other = unlearn(images, tmp_path / "other")
    assert not same_weights(finished, other)
    assert json.loads((other / "private" / "record.json").read_text())["seed"] != seed


def test_purge_leaves_the_model_and_what_says_nothing_of_an_image(images: Path, tmp_path: Path):
    folder = unlearn(images, tmp_path / "run")
    record = json.loads((folder / "private" / "record.json").read_text())
    assert main(["purge", str(folder)]) == 0
    found = files(folder)
    private = [path.name for path in found if "private" in path.parts]
    assert private in ([], ["lineage.key"])
    assert [told(str(record[name]), found) for name in ("seed", "identifiers_key")] == [[], []]
    hashes = [keys for keys, value in entries(found) if "hmac_sha256" in map(str, keys)]
    assert hashes == []
    assert {name for name, _ in tensors(found)} == set(tiny_unet().state_dict())


def same_weights(first: Path, second: Path) -> bool:
    left, right = (dict(tensors([folder / WEIGHTS])) for folder in (first, second))
    return all(torch.equal(left[name], right[name]) for name in left)
