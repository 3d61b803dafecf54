"""What earlier runs forgot stays forgotten: `model/lineage.json`, its key, and the command."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastunlearn import ImageStore
from fastunlearn.cli import main
from fastunlearn.data import load_images
from fastunlearn.models import load_checkpoint, save_checkpoint
from fastunlearn.runs import lineage
from fastunlearn.runs.lineage import FILE, LINEAGE_KEY, Lineage, read_key, read_lineage
from fastunlearn.testing.checkpoints import save_tiny_checkpoint, tiny_unet

pytest.importorskip("tyro")
diffusers = pytest.importorskip("diffusers")
FAST = ("--steps", "1", "--batch-size", "4", "--lr", "1e-3", "--device", "cpu", "--seed", "3")
WEIGHTS = Path("model") / "unet" / "diffusion_pytorch_model.safetensors"
KEY = bytes(range(32))


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, twenty images, and a first run that forgot image 0."""
    root = tmp_path_factory.mktemp("lineage")
    images = np.random.default_rng(0).integers(0, 256, (20, 1, 8, 8), dtype=np.uint8)
    np.save(root / "all.npy", images)
    for row in range(3):
        np.save(root / f"{row}.npy", images[row : row + 1])
    world = SimpleNamespace(root=root, images=images, all=root / "all.npy", first=root / "first")
    world.model = save_tiny_checkpoint(root / "model")
    assert unlearn(world, world.first, 0, model=world.model) == 0
    return world


def unlearn(world, output: Path, row: int, *more: object, model: Path) -> int:
    """A run that forgets image `row` and keeps the others of all that there are."""
    paths = ("--model", model, "--forget", world.root / f"{row}.npy", "--retain", world.all)
    arguments = ("unlearn", *paths, "--drop_overlap", "--method", "vanilla", "--output", output, *FAST)
    return main([str(argument) for argument in (*arguments, *more)])


def record_of(run_dir: Path) -> dict:
    return json.loads((run_dir / "run.json").read_text())


def same_weights(first: Path, second: Path) -> bool:
    left, right = load_file(first / WEIGHTS), load_file(second / WEIGHTS)
    return all(torch.equal(left[name], right[name]) for name in left)


def forgotten(world, run_dir: Path, key: Path | None = None) -> list[int]:
    """Which images the lineage of a run's model names."""
    found = read_lineage(run_dir / "model")
    key = read_key(key or run_dir / "private" / LINEAGE_KEY)
    rows = lineage.rows_to_leave_out(ImageStore(world.images), found, key).tolist()
    assert len(rows) == len(found)
    return rows


def of_first(world, tmp_path: Path) -> Path:
    """A copy of the first run that a test may change."""
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "model").mkdir()
    (copy / "private").mkdir()
    for name in ("unet", "scheduler", "model_index.json"):
        os.symlink(world.first / "model" / name, copy / "model" / name)
    for name in (Path("model") / FILE, Path("private") / LINEAGE_KEY):
        (copy / name).write_bytes((world.first / name).read_bytes())
    return copy


# --- the command --------------------------------------------------------------------------------------------


def test_a_later_run_does_not_learn_again_what_was_forgotten(world, tmp_path, capsys):
    """It ends with the bits of a run whose --retain never had the image."""
    assert unlearn(world, tmp_path / "second", 1, model=world.first / "model") == 0
    assert "images to keep: 19 (1 left out, which were to be forgotten before)" in capsys.readouterr().out
    np.save(tmp_path / "others.npy", world.images[1:])
    others = SimpleNamespace(root=world.root, all=tmp_path / "others.npy")
    assert unlearn(others, tmp_path / "others", 1, model=world.first / "model") == 0
    assert same_weights(tmp_path / "second", tmp_path / "others")
    second, others = record_of(tmp_path / "second"), record_of(tmp_path / "others")
    assert second["data"]["retain"]["rows"] == others["data"]["retain"]["rows"] == 18
    assert second["lineage"] == {"forgotten_before": 1, "left_out": 1}
    assert others["lineage"] == {"forgotten_before": 1, "left_out": 0}
    # Among all other images it would have been one of those to keep.
    assert unlearn(world, tmp_path / "taught", 1, "--ignore_lineage", model=world.first / "model") == 0
    assert not same_weights(tmp_path / "second", tmp_path / "taught")


def test_it_is_handed_on_from_run_to_run(world, tmp_path):
    second, third = tmp_path / "second", tmp_path / "third"
    assert unlearn(world, second, 1, model=world.first / "model") == 0
    # The folder of the network alone leads to it, too.
    assert unlearn(world, third, 2, model=second / "model" / "unet") == 0
    assert [forgotten(world, run) for run in (world.first, second, third)] == [[0], [0, 1], [0, 1, 2]]
    assert record_of(third)["lineage"] == {"forgotten_before": 2, "left_out": 2}
    assert record_of(third)["data"]["retain"]["rows"] == 17
    keys = [(run / "private" / LINEAGE_KEY) for run in (world.first, second, third)]
    assert len({key.read_text() for key in keys}) == 1
    assert {stat.S_IMODE(key.stat().st_mode) for key in keys} == {0o600}


def test_the_first_run_of_all_says_nothing_of_earlier_ones(world):
    assert record_of(world.first)["lineage"] == {}
    assert forgotten(world, world.first) == [0]


def test_a_method_without_images_to_keep_hands_it_on(world, tmp_path):
    paths = ("--model", world.first / "model", "--forget", world.root / "1.npy", "--output", tmp_path)
    assert main([str(word) for word in ("unlearn", *paths, "--method", "neggrad", *FAST)]) == 0
    assert forgotten(world, tmp_path) == [0, 1]
    assert record_of(tmp_path)["lineage"] == {"forgotten_before": 1}


def test_new_weights_do_not_learn_it_either(world, tmp_path):
    """Nor is a lineage begun where nothing is forgotten."""
    paths = ("--retain", world.all, "--method", "vanilla", "--from_scratch", *FAST)
    for start, name in ((world.first / "model", "again"), (world.model, "without")):
        command = ("unlearn", "--model", start, "--output", tmp_path / name, *paths)
        assert main([str(word) for word in command]) == 0
    assert record_of(tmp_path / "again")["data"]["retain"]["rows"] == 19
    assert forgotten(world, tmp_path / "again") == [0]
    assert not (tmp_path / "without" / "model" / FILE).exists()
    assert not (tmp_path / "without" / "private" / LINEAGE_KEY).exists()


@pytest.mark.parametrize(("protocol", "last"), [("separate", [0, 2]), ("continual", [0, 1, 2])])
def test_each_request_of_a_protocol_hands_on_what_it_began_with(world, tmp_path, protocol, last):
    np.save(tmp_path / "two.npy", world.images[1:3])
    paths = ("--model", world.first / "model", "--forget", tmp_path / "two.npy", "--retain", world.all)
    flags = ("--drop_overlap", "--method", "vanilla", "--protocol", protocol, "--output", tmp_path / "run")
    assert main([str(word) for word in ("unlearn", *paths, *flags, *FAST)]) == 0
    assert forgotten(world, tmp_path / "run" / "request-1") == [0, 1]
    assert forgotten(world, tmp_path / "run" / "request-2") == last
    assert record_of(tmp_path / "run" / "request-2")["data"]["retain"]["rows"] == 17


def test_a_resumed_run_needs_nothing_more_of_the_first(world, tmp_path, monkeypatch):
    """The key lies in its own folder since it began, so that of the run before may be gone by then."""
    first, second = of_first(world, tmp_path), tmp_path / "second"

    def full(*arguments, **options):
        raise OSError("no space left")

    with monkeypatch.context() as disk:
        disk.setattr("fastunlearn.models.save_checkpoint", full)
        assert unlearn(world, second, 1, model=first / "model") == 2
    assert not (second / "model").exists()
    (first / "private" / LINEAGE_KEY).unlink()
    assert unlearn(world, second, 1, "--resume_from_checkpoint", "latest", model=first / "model") == 0
    assert forgotten(world, second) == [0, 1]


@pytest.mark.parametrize(("start", "stays"), [("model", True), ("first/model", False)])
def test_a_key_that_a_run_left_which_never_ended(world, tmp_path, start, stays):
    """It is that of the next run in its place, but for one with a lineage, whose key is another."""
    key = tmp_path / "private" / LINEAGE_KEY
    key.parent.mkdir()
    lineage.write_key(key, KEY)
    assert unlearn(world, tmp_path, 1, model=world.root / start) == 0
    assert (read_key(key) == KEY) is stays
    assert forgotten(world, tmp_path) == ([1] if stays else [0, 1])


def test_a_key_that_lies_elsewhere_is_made_once_and_not_copied(world, tmp_path, capsys):
    key = tmp_path / "keys" / "mine"
    given = ("--lineage_key", key)
    assert unlearn(world, tmp_path / "first", 0, *given, model=world.model) == 0
    assert stat.S_IMODE(key.stat().st_mode) == 0o600
    content = key.read_text()
    assert unlearn(world, tmp_path / "second", 1, *given, model=tmp_path / "first" / "model") == 0
    assert key.read_text() == content
    assert [path.name for path in key.parent.iterdir()] == ["mine"]
    assert not list(tmp_path.rglob(LINEAGE_KEY))
    assert forgotten(world, tmp_path / "second", key) == [0, 1]
    # Without the flag there is none.
    assert unlearn(world, tmp_path / "third", 2, model=tmp_path / "second" / "model") == 2
    assert "--lineage_key: expected the key of " in capsys.readouterr().err


def remove_key(run: Path) -> None:
    (run / "private" / LINEAGE_KEY).unlink()


def other_key(run: Path) -> None:
    lineage.write_key(run / "private" / LINEAGE_KEY, KEY)


def no_key(run: Path) -> None:
    (run / "private" / LINEAGE_KEY).write_text("secret")


def piped_key(run: Path) -> None:
    remove_key(run)
    os.mkfifo(run / "private" / LINEAGE_KEY)


@pytest.mark.parametrize(
    ("spoil", "got"),
    [
        (remove_key, "got none in "),
        (other_key, "got another in "),
        (no_key, "lineage.key to hold 64 hex digits, got other text"),
        (piped_key, "lineage.key to hold 64 hex digits, got no regular file"),
    ],
)
def test_without_the_key_a_run_is_refused(world, tmp_path, capsys, spoil, got):
    first, second = of_first(world, tmp_path), tmp_path / "second"
    spoil(first)
    assert unlearn(world, second, 1, model=first / "model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --lineage_key: expected ")
    assert got in error
    assert error.endswith("; --ignore_lineage goes on, and may teach the network those images again\n")
    assert error.count("\n") == 1
    assert not second.exists()


def test_without_the_key_a_run_goes_on_if_it_is_told_to(world, tmp_path, capsys):
    first, second = of_first(world, tmp_path), tmp_path / "second"
    remove_key(first)
    assert unlearn(world, second, 1, "--ignore_lineage", model=first / "model") == 0
    warned = capsys.readouterr().err
    assert warned.count("--ignore_lineage") == 1
    assert "1 image that --model was made to forget before may stand among those to keep" in warned
    assert record_of(second)["lineage"] == {"forgotten_before": 1, "ignored": True}
    assert record_of(second)["data"]["retain"]["rows"] == 19
    # What could not be read is handed on as it was, beside what this run forgot.
    before, after = read_lineage(first / "model"), read_lineage(second / "model")
    assert before.parts[0] in after.parts
    assert len(after) == 2
    own = Lineage(tuple(part for part in after.parts if part not in before.parts))
    key = read_key(second / "private" / LINEAGE_KEY)
    assert lineage.rows_to_leave_out(ImageStore(world.images), own, key).tolist() == [1]
    # No one key tells all of it now, and a further run writes its rows under the one that is there.
    third = tmp_path / "third"
    assert unlearn(world, third, 2, model=second / "model") == 2
    assert "got a record under 2 keys (an earlier run ignored it)" in capsys.readouterr().err
    assert unlearn(world, third, 2, "--ignore_lineage", model=second / "model") == 0
    found = read_lineage(third / "model")
    assert (len(found.parts), len(found)) == (2, 3)
    assert found.is_under(key)


def test_a_given_key_has_to_be_there_and_to_fit(world, tmp_path, capsys):
    key = tmp_path / "key"
    for got in ("got none in", "got another in"):
        assert unlearn(world, tmp_path / "run", 1, "--lineage_key", key, model=world.first / "model") == 2
        assert f"{got} {key}" in capsys.readouterr().err
        lineage.write_key(key, KEY)
    (tmp_path / "folder").mkdir()
    given = ("--lineage_key", tmp_path / "folder")
    assert unlearn(world, tmp_path / "run", 1, *given, model=world.model) == 2
    assert "folder to hold 64 hex digits, got no regular file" in capsys.readouterr().err


def test_ignoring_it_with_the_key_keeps_one_record(world, tmp_path):
    assert unlearn(world, tmp_path / "second", 1, "--ignore_lineage", model=world.first / "model") == 0
    assert record_of(tmp_path / "second")["data"]["retain"]["rows"] == 19
    assert forgotten(world, tmp_path / "second") == [0, 1]


@pytest.mark.parametrize(
    ("flag", "value", "usual"),
    [("resample", "lanczos", "bilinear"), ("crop", "stretch", "center"), ("exif", "ignore", "apply")],
)
def test_images_that_were_read_otherwise_are_not_compared(world, tmp_path, capsys, flag, value, usual):
    options = (f"--{flag}", value)
    assert unlearn(world, tmp_path / "run", 1, *options, model=world.first / "model") == 2
    error = capsys.readouterr().err
    expected = f"expected {usual}, with which images were read that were forgotten before, got {value}"
    assert error.startswith(f"error: --{flag}: {expected}: they cannot be compared with --retain; ")
    assert not (tmp_path / "run" / "model").exists()


def test_a_retain_set_of_another_dtype_is_not_compared(world, tmp_path, capsys):
    floats = SimpleNamespace(root=tmp_path, all=tmp_path / "all.npy")
    images = world.images.astype(np.float32) / 127.5 - 1
    np.save(floats.all, images)
    np.save(tmp_path / "1.npy", images[1:2])
    assert unlearn(floats, tmp_path / "run", 1, model=world.first / "model") == 2
    expected = "expected the dtype uint8, as images that were forgotten before have, got float32"
    assert capsys.readouterr().err.startswith(f"error: --retain: {expected}: they cannot be compared")


def test_photographs_are_told_by_their_pixels(world, tmp_path, capsys):
    """Of files, as the network was shown them."""
    photos = tmp_path / "photos"
    photos.mkdir()
    generator = np.random.default_rng(1)
    for number in range(4):
        Image.fromarray(generator.integers(0, 256, (20, 16), dtype=np.uint8)).save(photos / f"{number}.png")
    flags = ("--drop_overlap", "--method", "vanilla", *FAST)
    start = world.model
    for number in range(2):
        paths = ("--model", start, "--forget", photos / f"{number}.png", "--retain", photos)
        output = tmp_path / f"run-{number}"
        assert main([str(word) for word in ("unlearn", *paths, *flags, "--output", output)]) == 0
        start = output / "model"
    assert record_of(tmp_path / "run-1")["lineage"] == {"forgotten_before": 1, "left_out": 1}
    assert record_of(tmp_path / "run-1")["data"]["retain"]["rows"] == 2
    # Nothing stands there but what has to: no name, no number of a row, no value without the key.
    text = (tmp_path / "run-1" / "model" / FILE).read_text()
    assert not [word for word in (*(f"{number}.png" for number in range(4)), str(tmp_path)) if word in text]


def test_nothing_is_left_to_keep(world, tmp_path, capsys):
    np.save(tmp_path / "one.npy", world.images[:1])
    one = SimpleNamespace(root=world.root, all=tmp_path / "one.npy")
    assert unlearn(one, tmp_path / "run", 1, model=world.first / "model") == 2
    expected = "error: --retain: expected an image that was not forgotten before, got 1 that all were"
    assert capsys.readouterr().err.startswith(expected)


def test_an_image_may_be_forgotten_again(world, tmp_path):
    """Although it stands in --retain: it is out of that already."""
    paths = ("--model", world.first / "model", "--forget", world.root / "0.npy", "--retain", world.all)
    command = ("unlearn", *paths, "--method", "vanilla", "--output", tmp_path / "run", *FAST)
    assert main([str(word) for word in command]) == 0
    assert forgotten(world, tmp_path / "run") == [0]


def test_purge_keeps_it_and_says_what_it_tells(world, tmp_path, capsys):
    assert unlearn(world, tmp_path, 1, model=world.first / "model") == 0
    assert main(["purge", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"kept {tmp_path / 'private' / LINEAGE_KEY}" in said
    assert "lineage.json and its key together tell of any image whether it was forgotten" in said
    assert forgotten(world, tmp_path) == [0, 1]
    assert [path.name for path in (tmp_path / "private").iterdir()] == [LINEAGE_KEY]
    # What is forgotten stays forgotten after it, too.
    assert unlearn(world, tmp_path / "next", 2, model=tmp_path / "model") == 0
    assert record_of(tmp_path / "next")["lineage"] == {"forgotten_before": 2, "left_out": 2}


def test_purge_forgets_it_if_told_so(world, tmp_path, capsys):
    assert unlearn(world, tmp_path, 1, model=world.first / "model") == 0
    first = forgotten(world, world.first)
    assert main(["purge", "--forget_lineage", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert f"removed {tmp_path / 'model' / FILE}" in said
    assert "later runs from this model may learn the images again" in said
    assert "kept" not in said
    assert not list(tmp_path.rglob("lineage*"))
    assert forgotten(world, world.first) == first
    assert unlearn(world, tmp_path / "next", 2, model=tmp_path / "model") == 0
    assert record_of(tmp_path / "next")["data"]["retain"]["rows"] == 19
    assert forgotten(world, tmp_path / "next") == [2]


def test_the_lineage_of_somebody_else_is_not_removed(world, tmp_path):
    """A link in the folder of a request leads to it; what is the request's own is removed."""
    elsewhere = of_first(world, tmp_path)
    for name in ("request-1", "request-2"):
        (tmp_path / "run" / name).mkdir(parents=True)
        (tmp_path / "run" / name / "run.json").write_bytes((world.first / "run.json").read_bytes())
        (tmp_path / "run" / name / "private").symlink_to(elsewhere / "private")
    (tmp_path / "run" / "request-1" / "model").symlink_to(elsewhere / "model")
    (tmp_path / "run" / "request-2" / "model").mkdir()
    own = tmp_path / "run" / "request-2" / "model" / FILE
    own.write_bytes((elsewhere / "model" / FILE).read_bytes())
    assert main(["purge", "--forget_lineage", str(tmp_path / "run")]) == 1  # what is left is said
    assert not own.exists()
    assert forgotten(world, elsewhere) == [0]


# --- files that are not what they should be -----------------------------------------------------------------

GROUP = {"shape": [1, 8, 8], "dtype": "uint8", "latents": False, "options": {}, "rows": ["a" * 64]}
PART = {"key_check": "0" * 64, "groups": [GROUP]}
WHOLE = {"format": "fastunlearn-lineage", "version": 1, "parts": [PART]}
MALFORMED = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "no object": "[]",
    "another format": json.dumps(WHOLE | {"format": "fastunlearn-run"}),
    "a later version": json.dumps(WHOLE | {"version": 2}),
    "no parts": json.dumps(WHOLE | {"parts": None}),
    "a part of nothing": json.dumps(WHOLE | {"parts": [{}]}),
    "two parts of one key": json.dumps(WHOLE | {"parts": [PART, PART]}),
    "groups that are none": json.dumps(WHOLE | {"parts": [PART | {"groups": [1]}]}),
    **{
        f"{name} {value!r}": json.dumps(WHOLE | {"parts": [PART | {"groups": [GROUP | {name: value}]}]})
        for name, value in (
            ("shape", 3),
            ("shape", [1.0]),
            ("dtype", 8),
            ("latents", 0),
            ("options", []),
            ("dtype", "uint8\x1b[2J\n"),
            ("options", {"crop": 1}),
            ("options", {"crop": "center" * 100}),
            ("options", {"crop\n": "center"}),
            ("rows", "a" * 64),
            ("rows", ["A" * 64]),
            ("rows", [7]),
            ("path", "/home/somebody.png"),
        )
    },
}


@pytest.mark.parametrize("content", MALFORMED.values(), ids=MALFORMED.keys())
def test_what_is_no_lineage_is_refused(tmp_path, content):
    (tmp_path / FILE).write_text(json.dumps(WHOLE))
    assert len(read_lineage(tmp_path)) == 1
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=r"^model: expected .*lineage.json to be a fastunlearn-lineage"):
        read_lineage(tmp_path)


def test_what_is_no_file_is_refused(tmp_path):
    for make in (os.mkdir, os.mkfifo, lambda path: os.symlink(tmp_path / "nothing", path)):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        make(folder / FILE)
        with pytest.raises(ValueError, match=r"^model: expected .*lineage.json to be "):
            read_lineage(folder)


def test_a_damaged_lineage_stops_a_run_unless_told_otherwise(world, tmp_path, capsys):
    first = of_first(world, tmp_path)
    (first / "model" / FILE).write_text("{")
    assert unlearn(world, tmp_path / "run", 1, model=first / "model") == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --model: expected ")
    assert error.endswith("; --ignore_lineage goes on, and may teach the network those images again\n")
    assert unlearn(world, tmp_path / "run", 1, "--ignore_lineage", model=first / "model") == 0
    assert "None of it is handed on" in capsys.readouterr().err
    assert forgotten(world, tmp_path / "run") == [1]


# --- the record ---------------------------------------------------------------------------------------------


def store(count: int = 6, dtype: torch.dtype = torch.uint8, seed: int = 0) -> ImageStore:
    images = torch.randint(0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed))
    if dtype == torch.uint8:
        return ImageStore(images.to(torch.uint8))
    return ImageStore((images / 127.5 - 1).to(dtype))


def test_without_the_key_nothing_can_be_computed():
    """Not even by who has the images: another key gives other values, and so does no key."""
    images = store()
    first = lineage.with_rows(Lineage(), KEY, images)
    second = lineage.with_rows(Lineage(), lineage.new_key(), images)
    values = [set(each.parts[0].groups[0].rows) | {each.parts[0].key_check} for each in (first, second)]
    assert len(values[0]) == len(values[1]) == 7
    assert not values[0] & values[1]
    with pytest.raises(ValueError, match=r"^lineage_key: expected the key that the lineage was written with"):
        lineage.rows_to_leave_out(images, first, lineage.new_key())


def test_it_says_nothing_of_order_or_number_of_runs():
    images = store()
    one = lineage.with_rows(Lineage(), KEY, images)
    several = Lineage()
    for row in (5, 2, 0, 1, 3, 4, 2):
        several = lineage.with_rows(several, KEY, images.select([row]))
    assert several.content() == one.content()
    assert lineage.rows_to_leave_out(images, several, KEY).tolist() == list(range(6))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_rows_are_the_same_where_overlap_says_so(dtype):
    images = store(dtype=dtype)
    record = lineage.with_rows(Lineage(), KEY, images.select([1, 4]))
    assert lineage.rows_to_leave_out(images, record, KEY).tolist() == [1, 4]
    assert lineage.rows_to_leave_out(store(dtype=dtype, seed=1), record, KEY).tolist() == []


def test_latents_are_told_by_their_means():
    means = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(0))
    retain = ImageStore(means, std=torch.ones_like(means), latents=True)
    record = lineage.with_rows(Lineage(), KEY, retain.select([2]).freeze())
    assert lineage.rows_to_leave_out(retain, record, KEY).tolist() == [2]
    with pytest.raises(ValueError, match=r"^retain: expected latents True, .* got False"):
        lineage.rows_to_leave_out(ImageStore(means.clamp(-1, 1)), record, KEY)


@pytest.mark.parametrize(
    ("retain", "text"),
    [
        (ImageStore(torch.zeros(2, 1, 4, 4)), r"the shape \[1, 8, 8\], .*, got \[1, 4, 4\]"),
        (store(dtype=torch.float16), "the dtype uint8, .*, got float16"),
    ],
)
def test_rows_of_another_kind_are_not_compared(retain, text):
    record = lineage.with_rows(Lineage(), KEY, store())
    with pytest.raises(ValueError, match=f"^retain: expected {text}"):
        lineage.rows_to_leave_out(retain, record, KEY)


@pytest.mark.parametrize(
    ("before", "now", "differs"),
    [
        ({"crop": "center"}, {"crop": "stretch"}, True),
        # What was forgotten had the wanted ratio, and would be refused now if it had not.
        ({"crop": "none"}, {"crop": "stretch"}, False),
        ({"crop": "center"}, {"crop": "none"}, False),
        ({"alpha": "refuse"}, {"alpha": "white"}, False),
        ({"alpha": "drop"}, {"alpha": "white"}, True),
        ({"exif": "apply"}, {}, True),
        # The shape of the rows says these.
        ({"size": (8, 8), "channels": 1}, {"size": None, "channels": None}, False),
        (None, {"crop": "stretch"}, False),
    ],
)
def test_options_that_decode_the_same_image_otherwise(before, now, differs):
    images = store()
    record = lineage.with_rows(Lineage(), KEY, images, before)
    if not differs:
        assert len(lineage.rows_to_leave_out(images, record, KEY, now)) == 6
        return
    option = next(iter(before))
    with pytest.raises(ValueError, match=f"^{option}: expected {before[option]}, .*, got {now.get(option)}"):
        lineage.rows_to_leave_out(images, record, KEY, now)


def test_the_options_that_refuse_leave_the_pixels_of_what_they_take(tmp_path):
    """Which the comparison relies on."""
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 256, (24, 16, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    hashes = {
        load_images(tmp_path, size=(12, 8), crop=crop, alpha=alpha).content_hash()
        for crop in ("none", "center", "stretch")
        for alpha in ("refuse", "drop", "white")
    }
    assert len(hashes) == 1


def test_what_is_read_is_what_was_written(tmp_path):
    record = lineage.with_rows(Lineage(), KEY, store(), {"crop": "none", "size": (8, 8)})
    record = lineage.with_rows(record, lineage.new_key(), store(dtype=torch.float32))
    (tmp_path / FILE).write_bytes(record.content())
    assert read_lineage(tmp_path) == record
    assert len(record) == 12
    # A download of the Hugging Face Hub is a folder of links.
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / FILE).symlink_to(tmp_path / FILE)
    assert read_lineage(tmp_path / "hub") == record


def test_the_example_of_the_page(world, tmp_path, monkeypatch):
    page = (Path(__file__).parents[1] / "docs" / "lineage.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    np.save(tmp_path / "second.npy", world.images[1:2])
    np.save(tmp_path / "train.npy", world.images)
    (tmp_path / "runs").mkdir()
    of_first(world, tmp_path).rename(tmp_path / "runs" / "1")
    monkeypatch.chdir(tmp_path)
    named: dict = {}
    exec(code, named)
    assert len(named["retain"]) == 19
    assert forgotten(world, tmp_path / "runs" / "2", Path("runs/1/private") / LINEAGE_KEY) == [0, 1]


# --- the folder of the model --------------------------------------------------------------------------------


def test_a_model_with_a_lineage_is_a_model(world, tmp_path):
    """For diffusers, `sample`, and whoever writes another in its place."""
    model = world.first / "model"
    assert (model / FILE).is_file()
    pipeline = diffusers.DDPMPipeline.from_pretrained(model)
    network, _ = load_checkpoint(model)
    weights = network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in pipeline.unet.state_dict().items())
    flags = ("--num_images", "1", "--num_inference_steps", "2", "--device", "cpu")
    output = tmp_path / "samples"
    assert main(["sample", "--model", str(model), "--output", str(output), *flags]) == 0
    copy = of_first(world, tmp_path) / "model"
    save_checkpoint(copy, tiny_unet(), diffusers.DDPMScheduler())
    assert not (copy / FILE).exists()
