"""What confirms a candidate: identifiers, a seed to run it again with, logged losses; and where they are."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import protocols
import pytest
import torch
from attacker import entries, files, tensors, told
from one_image import CANDIDATES, RIGHT, SEED, run, stopped_run, unlearner

from fastunlearn import ImageStore
from fastunlearn.methods import SISS, NegGrad, ReTrack
from fastunlearn.metrics.deletion import denoising_losses
from fastunlearn.runs.identity import identity
from fastunlearn.runs.private import keyed
from fastunlearn.runs.protocols import purge_protocol
from fastunlearn.runs.training import purge
from fastunlearn.testing.factories import linear_schedule

RETRACK = ReTrack(k=3, lambd=0.3)
METHODS = [NegGrad(), RETRACK, SISS()]
methods = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


# --- identifiers --------------------------------------------------------------------------------------------


@pytest.fixture(params=["stopped", "finished"])
def left(request, tmp_path: Path) -> Path:
    """What a run leaves that was stopped, and one at its end."""
    make = stopped_run if request.param == "stopped" else run
    return make(RETRACK, tmp_path / "run")


def test_no_hash_of_a_candidate_is_found(left: Path):
    """Neither of its rows, nor of its neighbours among the images to keep."""
    hashes = plain_hashes(RIGHT)
    assert len(hashes) == 4
    assert [told(text, files(left)) for text in hashes] == [[]] * 4
    assert [told(text, purged(left)) for text in hashes] == [[]] * 4


def test_the_key_confirms_a_candidate(left: Path):
    """It lies in the private folder alone: what it makes of a candidate's hashes is found outside."""
    key = json.loads((left / "private" / "record.json").read_text())["identifiers_key"]
    outside = files(left, but="private")
    assert not told(key, outside)
    found = [bool(told(keyed(content_hash(row), key), outside)) for row in range(len(CANDIDATES))]
    assert found == only_the_right_one()


def test_purge_leaves_no_identifier(left: Path):
    key = json.loads((left / "private" / "record.json").read_text())["identifiers_key"]
    identifiers = [keyed(text, key) for text in plain_hashes(RIGHT)]
    assert any(told(text, files(left)) for text in identifiers)
    found = purged(left)
    assert not any(told(text, found) for text in [key, *identifiers])


def plain_hashes(candidate: int) -> list[str]:
    """What names the candidate to everybody: SHA-256 of its pixels, and all in which its run is another's."""
    own, other = (set(hashes(row)) for row in (candidate, candidate + 1))
    of_pixels = hashlib.sha256(CANDIDATES[candidate].numpy().tobytes()).hexdigest()
    # Shortened, so that an identifier that is cut off does not escape.
    return [of_pixels, of_pixels[:16], *sorted(own - other)]


def hashes(candidate: int) -> list[str]:
    described = json.dumps(identity(unlearner(RETRACK, candidate)))
    return [text for text in described.split('"') if len(text) == 64]


def content_hash(candidate: int) -> str:
    return unlearner(RETRACK, candidate).forget.content_hash()


def purged(folder: Path) -> list[Path]:
    """What is left then."""
    purge(folder)
    return files(folder)


# --- the seed -----------------------------------------------------------------------------------------------


@methods
def test_whoever_knows_the_seed_runs_the_candidates_again(method, tmp_path: Path):
    """The weights that are left confirm one bit by bit. With another seed they do not."""
    folder = run(method, tmp_path / "run", steps=2)
    (checkpoint,) = folder.glob("checkpoint-*")
    weights = dict(tensors(files(checkpoint)))
    assert [again(method, row, SEED, weights) for row in range(len(CANDIDATES))] == only_the_right_one()
    assert not any(again(method, RIGHT, seed, weights) for seed in range(10))


def again(method, candidate: int, seed: int, weights: dict[str, torch.Tensor]) -> bool:
    """Whether two steps on this candidate end with these weights."""
    tried = unlearner(method, candidate, seed)
    for _ in range(2):
        tried.step()
    found = tried.model.state_dict()
    return all(torch.equal(found[name], value) for name, value in weights.items())


# --- losses -------------------------------------------------------------------------------------------------


@methods
def test_logged_losses_confirm_a_candidate_by_the_seed(method, tmp_path: Path):
    """They lie in the open until `purge`, and the seed does not."""
    folder = run(method, tmp_path / "run")
    assert [keys for keys, value in entries(files(folder, but="private")) if value == SEED] == []
    (line,) = (folder / "metrics.jsonl").read_text().splitlines()
    logged = json.loads(line)["forget_loss"]
    losses = [unlearner(method, row).step().forget_loss.item() for row in range(len(CANDIDATES))]
    assert [loss == logged for loss in losses] == only_the_right_one()


def test_purge_leaves_no_loss(tmp_path: Path):
    folder = run(RETRACK, tmp_path / "run", steps=2)
    purge(folder)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [set(line) for line in lines] == [{"step", "lr", "seconds", "skipped_steps"}] * 2


def test_protocol_json_confirms_candidates_by_the_seed(tmp_path: Path):
    """It has the loss of each image to forget in the network before; the seed is of the noise."""
    protocols.run(tmp_path, "separate", "neggrad", num_steps=1, measures=protocols.measures(seed=SEED))
    open_to_all = files(tmp_path, but="private")
    assert [keys for keys, value in entries(open_to_all) if value == SEED] == []

    candidates = torch.cat([protocols.forget_set().images, CANDIDATES])
    own = denoising_losses(
        protocols.original(), linear_schedule(50), ImageStore(candidates), draws=8, batch_size=16, seed=SEED
    )
    written = [value for keys, value in entries([tmp_path / "protocol.json"]) if keys[-1] == "loss"]
    found = [any(abs(loss - number) < 1e-6 for number in written) for loss in own.tolist()]
    assert found == [row < protocols.FORGET for row in range(len(candidates))]

    # `purge` leaves the losses of the images to keep, and nothing of a single image.
    before = set(written)
    purge_protocol(tmp_path)
    left = {value for keys, value in entries(files(tmp_path)) if keys[-1] == "loss"}
    assert left < before
    assert all(min(abs(loss - number) for number in left) > 1e-6 for loss in own.tolist())
    forget = protocols.forget_set()
    alone = [ImageStore(image[None]).content_hash() for image in forget.images]
    assert [told(text, files(tmp_path)) for text in [forget.content_hash(), *alone]] == [[]] * 4


def only_the_right_one() -> list[bool]:
    return [row == RIGHT for row in range(len(CANDIDATES))]
