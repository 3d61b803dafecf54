"""What a run leaves to whom: nothing outside of private/ names an image, nothing in it is for others' eyes,
and a run that is killed while it ends is ended by the next call.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import shutil
import signal
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import crash
import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file, save_file
from test_training import FakeUnlearner

from fastunlearn.data import load_images
from fastunlearn.host.atomic import atomic_directory
from fastunlearn.runs import checkpoint
from fastunlearn.runs.identity import described, identity, start_weights
from fastunlearn.runs.lineage import LINEAGE_KEY
from fastunlearn.runs.private import keyed, read_private, update_private
from fastunlearn.runs.run_record import read_run
from fastunlearn.runs.training import purge

SEED = 8_070_450_532_247_928_832  # of 63 bits, so that no other number looks like it


def files_in(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def public(folder: Path) -> dict[Path, bytes]:
    """What everybody may read of a run or a protocol."""
    return {path: path.read_bytes() for path in files_in(folder) if "private" not in path.parts}


@pytest.fixture
def open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def assert_closed(private: Path) -> None:
    """To everybody but its owner, with all that is in it."""
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in [private, *private.rglob("*")]}
    assert modes == {path: 0o700 if path.is_dir() else 0o600 for path in modes}


# --- the command --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, two images to forget, and a training set that has them, too."""
    pytest.importorskip("tyro")
    pytest.importorskip("diffusers")
    from fastunlearn.testing.checkpoints import save_tiny_checkpoint

    root = tmp_path_factory.mktemp("world")
    images = np.random.default_rng(0).integers(0, 256, (12, 1, 8, 8), dtype=np.uint8)
    np.save(root / "jane-doe.npy", images[:2])
    np.save(root / "all.npy", images)
    sets = {"forget": root / "jane-doe.npy", "retain": root / "all.npy"}
    return SimpleNamespace(model=save_tiny_checkpoint(root / "model"), images=images, **sets)


def command(world: SimpleNamespace, output: Path, *more: object) -> int:
    from fastunlearn.cli import main

    sets = ("--forget", world.forget, "--retain", world.retain, "--drop_overlap", "--drop_within", "off")
    run = ("--method", "retrack", "--k", "3", "--batch-size", "4", "--device", "cpu", "--steps", "2")
    words = ("unlearn", "--model", world.model, *sets, *run, "--output", output, *more)
    return main([str(word) for word in words])


@pytest.mark.usefixtures("open_umask")
@pytest.mark.parametrize("protocol", ["together", "separate"])
def test_nothing_that_others_may_read_names_an_image(world, tmp_path, protocol):
    mask = ("--mask_fraction", "0.5", "--mask_batches", "2")
    flags = ("--protocol", protocol, "--seed", SEED, *mask)
    with pytest.warns(UserWarning, match="^keep_checkpoints: "):
        assert command(world, tmp_path / "run", *flags, "--keep_checkpoints") == 0
    requests = [tmp_path / "run"] if protocol == "together" else sorted((tmp_path / "run").glob("request-*"))
    kept = {path.name.partition("-")[0] for path in (requests[0] / "private").iterdir()}
    assert kept == {"record.json", LINEAGE_KEY, "checkpoint", "mask.safetensors", "fastunlearn"}
    for folder in {tmp_path / "run", *requests}:
        assert_closed(folder / "private")

    # Whoever has the sets, or guesses an image, knows these.
    sets = [load_images(world.forget), load_images(world.retain)]
    sets += [sets[1].select(torch.arange(2, 12)), *(sets[0].select(torch.tensor([row])) for row in (0, 1))]
    named = [store.content_hash() for store in sets]
    named += [hashlib.sha256(image.tobytes()).hexdigest() for image in world.images[:2]]
    about = checkpoint.load(requests[0] / "private" / "checkpoint-2").metadata["identity"]
    assert not {value for _, value in runs.leaves(about)} & set(named)
    words = [*named, str(SEED), f"{SEED:x}", "jane-doe", "fastunlearn-neighbors"]
    for path, content in public(tmp_path / "run").items():
        assert not [word for word in words if word.encode() in content], path

    # They are there, under a key that is not; and so is what they were read from.
    key = read_private(requests[0] / "private")["identifiers_key"]
    whose = named[0] if protocol == "together" else named[3]
    told = hmac.new(bytes.fromhex(key), whose.encode(), "sha256").hexdigest()
    assert read_run(requests[0])["data"]["forget"]["hmac_sha256"] == told
    kept = read_private(requests[0] / "private")
    assert (kept["seed"], kept["forget"]) == (SEED, [str(world.forget)])
    assert kept["forget_in_retain"]["dropped_equal"] == [0, 1]
    assert read_run(requests[0])["forget_in_retain"]["dropped_equal"] == 2


def test_a_finished_command_keeps_the_seed_alone_and_purge_takes_that(world, tmp_path, capsys):
    from fastunlearn.cli import main

    assert command(world, tmp_path / "first") == command(world, tmp_path / "second") == 0
    private = tmp_path / "first" / "private"
    assert sorted(path.name for path in private.iterdir()) == [LINEAGE_KEY, "record.json"]
    seeds = [read_private(tmp_path / name / "private")["seed"] for name in ("first", "second")]
    assert seeds[0] != seeds[1]
    # The same seed, the same run.
    assert command(world, tmp_path / "again", "--seed", seeds[0]) == 0
    weights = [
        load_file(next((tmp_path / name).rglob("*.safetensors"))) for name in ("first", "again", "second")
    ]
    assert runs.same(weights[0], weights[1])
    assert not runs.same(weights[0], weights[2])

    before = {path: path.read_bytes() for path in files_in(tmp_path / "first")}
    # As a kill leaves them that comes after run.json says "complete".
    (private / "checkpoint-2").mkdir()
    (private / "mask.safetensors").touch()
    assert command(world, tmp_path / "first", "--resume_from_checkpoint", "latest") == 0
    assert capsys.readouterr().out.endswith(
        f"{tmp_path / 'first'}: the run is complete, nothing is left to do (its settings were not compared)\n"
    )
    assert command(world, tmp_path / "first", "--forget", tmp_path / "nowhere") == 2
    assert capsys.readouterr().err.startswith("error: --output: expected a folder without a finished run")
    assert {path: path.read_bytes() for path in files_in(tmp_path / "first")} == before
    assert sorted(path.name for path in private.iterdir()) == [LINEAGE_KEY, "record.json"]

    assert main(["purge", str(tmp_path / "first")]) == 0
    assert [path.name for path in private.iterdir()] == [LINEAGE_KEY]
    assert b"hmac" not in b"".join(public(tmp_path / "first").values())


def test_a_purged_protocol_has_no_number_of_an_image(world, tmp_path):
    from fastunlearn.cli import main

    assert command(world, tmp_path, "--protocol", "continual") == 0
    whole = json.loads((tmp_path / "protocol.json").read_text())
    assert main(["purge", str(tmp_path)]) == 0
    purged = json.loads((tmp_path / "protocol.json").read_text())
    assert "before" not in purged
    assert "summary" not in purged
    assert purged["after"] == [
        {"request": each["request"], "retain": each["retain"]} for each in whole["after"]
    ]
    left = [path.name for path in tmp_path.rglob("*") if path.parent.name == "private"]
    assert left == [LINEAGE_KEY, LINEAGE_KEY]
    for path, content in public(tmp_path).items():
        assert b"hmac" not in content, path
        assert b'"loss": ' not in content or path.name == "protocol.json", path
    assert command(world, tmp_path, "--protocol", "continual", "--resume_from_checkpoint", "latest") == 0


@pytest.mark.parametrize("left", ["nothing", "the key of the lineage"])
def test_a_request_that_was_killed_at_its_beginning_keeps_no_other_from_being_purged(world, tmp_path, left):
    from fastunlearn.cli import main

    assert command(world, tmp_path, "--protocol", "separate") == 0
    killed = tmp_path / "request-2"
    key = killed / "private" / "lineage.key"
    for path in files_in(killed):
        if left == "nothing" or path != key:
            path.unlink()
    shutil.rmtree(killed / "model")
    if left == "nothing":
        key.parent.rmdir()
    assert main(["purge", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.rglob("private/*")} == {"lineage.key"}
    assert b"hmac" not in (tmp_path / "protocol.json").read_bytes()


def test_purge_sweeps_what_a_killed_writer_of_a_checkpoint_left(tmp_path: Path):
    """Of an earlier version, which wrote them beside `run.json`; one that was being discarded is called so,
    too.
    """
    saved = runs.stop(runs.make(), tmp_path)
    os.rename(saved, tmp_path / f".{saved.name}.{2**22 + 1}-ab12.tmp")  # no process has this number
    purge(tmp_path)
    assert [path.name for path in files_in(tmp_path)] == ["metrics.jsonl", "run.json"]


# --- keys and seeds -----------------------------------------------------------------------------------------


def test_a_checkpoint_without_its_key_is_refused(tmp_path: Path):
    saved = runs.stop(runs.make(), tmp_path / "run")
    moved = Path(shutil.copytree(saved, tmp_path / "moved" / saved.name))
    text = f"expected the key of the identifiers in {moved}, which is kept in record.json beside it, got "
    with pytest.raises(ValueError, match=f"{text}no such file"):
        runs.run(runs.make(), tmp_path / "other", resume_from_checkpoint=moved)
    update_private(tmp_path / "strange")
    shutil.copy(tmp_path / "strange" / "private" / "record.json", moved.parent)
    with pytest.raises(ValueError, match=f"{text}another key there"):
        runs.run(runs.make(), tmp_path / "other", resume_from_checkpoint=moved)
    shutil.copy(saved.parent / "record.json", moved.parent)
    runs.run(runs.make(), tmp_path / "other", resume_from_checkpoint=moved)
    # Each run has a key of its own, whatever it goes on from.
    keys = [read_private(tmp_path / name / "private")["identifiers_key"] for name in ("run", "other")]
    assert keys[0] != keys[1]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ("[]", "expected a fastunlearn-private record"),
        ("{", "expected the private record of a run, got "),
        ({"identifiers_key": "0" * 63}, "identifiers_key: expected 64 hex digits"),
        ({"seed": -1}, r"seed: expected an integer in \[0, 2\^63\)"),
        ({"seed": True}, "seed: expected an integer"),
    ],
)
def test_a_private_record_that_is_none_is_refused(tmp_path: Path, content: Any, text: str):
    record = update_private(tmp_path, seed=1)
    path = tmp_path / "private" / "record.json"
    path.write_text(content if isinstance(content, str) else json.dumps(record | content))
    with pytest.raises(ValueError, match=f"{path}: {text}"):
        runs.run(runs.make(), tmp_path)


def test_a_private_folder_that_is_a_link_is_not_written_to(tmp_path: Path):
    (tmp_path / "run").mkdir()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "private").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ValueError, match="expected a folder private of its own, got a link, "):
        runs.run(runs.make(), tmp_path / "run")
    assert list((tmp_path / "elsewhere").iterdir()) == []


# --- earlier versions ---------------------------------------------------------------------------------------


def as_before(folder: Path, status: str) -> None:
    """Makes of a run that kept its checkpoints what version 1 would have left after step 2."""
    runs.unfinish(folder, 2)
    plain = identity(runs.make()) | described({"start_weights": start_weights(runs.make())})
    saved = folder / "checkpoint-2"
    runs.saved_in(folder, 2).rename(saved)
    runs.change_json(saved, lambda content: content["metadata"].update(identity=plain))
    runs.change_json(saved, lambda content: content["metadata"].pop("key"))
    shutil.rmtree(folder / "private")
    record = json.loads((folder / "run.json").read_text())
    listed = ["/caches/fastunlearn-neighbors-0123.safetensors"]
    record |= plain | {"version": 1, "status": status, "steps": 2, "private_files": listed}
    (folder / "run.json").write_text(json.dumps(record))


@pytest.mark.parametrize("status", ["running", "complete"])
def test_a_run_of_an_earlier_version_goes_on_once(tmp_path: Path, capsys, status: str):
    """A complete one, too: its end was noted before its model was written."""
    folder, expected = runs.whole(tmp_path / "run")
    as_before(folder, status)
    resumed = runs.make()
    runs.run(resumed, folder, resume_from_checkpoint="latest")
    told = f"going on from checkpoint-2; checkpoints of this version lie in {folder / 'private'}\n"
    assert capsys.readouterr().err == told
    assert torch.equal(runs.weights(resumed), expected)
    assert [path.name for path in folder.rglob("checkpoint-*")] == ["checkpoint-4"]
    key = read_private(folder / "private")["identifiers_key"]
    assert read_run(folder)["data"] == keyed(identity(resumed)["data"], key)
    assert "seed" not in read_run(folder)
    # What it listed is still told of, where others do not read it.
    assert read_run(folder)["private_files"] == []
    assert len(read_private(folder / "private")["private_files"]) == 1


def test_kept_checkpoints_of_an_earlier_version_become_private(tmp_path: Path):
    folder, _ = runs.whole(tmp_path / "run")
    as_before(folder, "running")
    with pytest.warns(UserWarning, match="keep_checkpoints"):
        runs.run(runs.make(), folder, resume_from_checkpoint="latest", keep_checkpoints=True)
    assert list(folder.glob("checkpoint-*")) == []
    kept = sorted((folder / "private").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-2", "checkpoint-4"]


def test_purge_leaves_the_model_alone_of_what_an_earlier_version_wrote(tmp_path: Path):
    folder, _ = runs.whole(tmp_path / "run")
    as_before(folder, "complete")
    shutil.copytree(folder / "checkpoint-2", folder / "checkpoint-1")
    weights = load_file(folder / "checkpoint-2" / "model.safetensors")
    assert (folder / "checkpoint-2" / "optimizer.safetensors").is_file()
    purge(folder)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-2"]
    left = {path.name for path in (folder / "checkpoint-2").iterdir()}
    assert left == {"model.safetensors", "ema.safetensors", "metadata.json", "manifest.json"}
    assert runs.same(load_file(folder / "checkpoint-2" / "model.safetensors"), weights)
    assert "seed" not in read_run(folder)
    # It is complete, and there is nothing that it could go on from.
    resumed = runs.make()
    runs.run(resumed, folder, num_steps=2, resume_from_checkpoint="latest")
    assert resumed.step_index == 0


# --- kills while it ends ------------------------------------------------------------------------------------

CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.chmod")  # as Python's audit hooks call them
WRITES = os.O_WRONLY | os.O_RDWR


def ending(folder: Path, leaves: bool, before_the_end=lambda: None) -> None:
    """The last of four steps, and the end; with `leaves` as the command does it."""
    unlearner = FakeUnlearner(on_step=lambda step: before_the_end())

    def leave() -> dict[str, Any]:
        with atomic_directory(folder / "model") as model:
            save_file(dict(unlearner.model.state_dict()), model / "model.safetensors")
        return {"model": "model"}

    options = {"leave": leave} if leaves else {}
    runs.run(unlearner, folder, resume_from_checkpoint="latest", **options)


def killed_at(number: int, folder: Path, leaves: bool) -> bool:
    """Whether `ending`, in a process forked from this one, comes to its change `number` of a file after the
    last step; before it the process ends itself with SIGKILL.
    """
    child = os.fork()
    if child == 0:
        count = -1

        def begin() -> None:
            nonlocal count
            count = 0

        def watch(event: str, arguments: tuple) -> None:
            nonlocal count
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
            if count >= 0 and (event in CHANGES or writes):
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(watch)
        try:
            ending(folder, leaves, begin)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def kill_at_every_change(place: str) -> None:
    """Of both endings, in a process that has one thread, and may be forked."""
    os.fsync = lambda descriptor: None  # a kill takes nothing from the disk that was written
    stopped = Path(place) / "stopped"
    runs.stop(FakeUnlearner(), stopped, 3)
    for leaves in (False, True):
        ended = Path(shutil.copytree(stopped, Path(place) / f"ended {leaves}"))
        ending(ended, leaves)
        statuses, number = set(), 1
        while killed_at(number, folder := Path(shutil.copytree(stopped, Path(place) / "killed")), leaves):
            statuses.add(read_run(folder)["status"])
            assert_ends_well(folder, ended, leaves)
            shutil.rmtree(folder)
            number += 1
        shutil.rmtree(folder)
        assert number > 20
        assert statuses == {"running", "complete"}


def assert_ends_well(folder: Path, ended: Path, leaves: bool) -> None:
    """That `folder`, where a kill ended a run, becomes what `ended` is."""
    model = Path("model" if leaves else "checkpoint-4") / "model.safetensors"
    # In this order: the model, the word that it is there, the removal of all that it came from.
    if read_run(folder)["status"] == "complete":
        assert (folder / model).is_file()
    else:
        assert checkpoint.latest(folder / "private") is not None
    ending(folder, leaves)
    assert (folder / model).read_bytes() == (ended / model).read_bytes()
    names = [sorted(path.name for path in place.rglob("*")) for place in (folder, ended)]
    assert names[0] == names[1]


def test_a_run_that_is_killed_at_any_change_of_a_file_while_it_ends_is_ended(tmp_path: Path):
    crash.run_to_end(kill_at_every_change, tmp_path)
