"""JSON that somebody else wrote: an error of one kind, and nothing that hangs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import runs
import torch

from fastunlearn.host import atomic, plain_json
from fastunlearn.host.plain_json import read_json
from fastunlearn.neighbors import nearest, nearest_neighbors
from fastunlearn.objective.named_tensors import read_tensors
from fastunlearn.runs import checkpoint, protocols
from fastunlearn.runs.run_record import Metrics, read_metrics, read_run
from fastunlearn.runs.state_checks import Entry

DEEP = b"[" * 200_000


def test_what_is_written_is_read(tmp_path: Path):
    (tmp_path / "x.json").write_text('{"a": [1, "ä"]}', encoding="utf-8")
    assert read_json(tmp_path / "x.json") == {"a": [1, "ä"]}


HOSTILE = {
    "nested too deeply": DEEP,
    "no JSON": b"{",
    "no JSON: 'utf-8' codec": b'"\xff"',
}


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_no_json(tmp_path: Path, text: str):
    (tmp_path / "x.json").write_bytes(HOSTILE[text])
    with pytest.raises(ValueError, match=text):
        read_json(tmp_path / "x.json")


def test_what_is_no_file(tmp_path: Path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("/dev/zero")
    for name in ("pipe", "folder", "link"):
        with pytest.raises(ValueError, match="no regular file"):
            read_json(tmp_path / name)
    with pytest.raises(ValueError, match="No such file"):
        read_json(tmp_path / "absent")
    (tmp_path / "long.json").write_bytes(b"[1, 2]")
    monkeypatch.setattr(plain_json, "LONGEST", 5)
    with pytest.raises(ValueError, match="6 bytes, which is no text of ours"):
        read_json(tmp_path / "long.json")


# --- who reads it -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hostile", ["pipe", "deep"])
def test_files_of_a_run(tmp_path: Path, hostile: str):
    for name in ("run.json", "metrics.jsonl"):
        if hostile == "pipe":
            os.mkfifo(tmp_path / name)
        else:
            (tmp_path / name).write_bytes(DEEP + b"\n")
    with pytest.raises(
        ValueError, match=r"run_dir: expected a run folder with a readable run.json, got .*run"
    ):
        read_run(tmp_path)
    assert read_metrics(tmp_path) == []
    if hostile == "pipe":
        with pytest.raises(OSError, match="expected a file, or nothing yet, got a pipe"):
            Metrics(tmp_path, 0)


def deep_metadata(folder: Path) -> None:
    (folder / "metadata.json").write_bytes(DEEP)
    runs.sign(folder)


BROKEN = {
    "a manifest that is nested deeply": lambda folder: (folder / "manifest.json").write_bytes(DEEP),
    "no manifest": lambda folder: (folder / "manifest.json").unlink(),
    "signed metadata that are nested deeply": deep_metadata,
    "a folder that is empty": lambda folder: [file.unlink() for file in folder.iterdir()],
}


@pytest.mark.parametrize("broken", BROKEN)
def test_a_broken_newest_checkpoint_is_said_and_hides_no_older_one(tmp_path: Path, broken: str):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {}, {})
    BROKEN[broken](tmp_path / "checkpoint-2")
    with pytest.warns(UserWarning, match=r"damaged checkpoint passed over: .*checkpoint-2"):
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"
    with pytest.raises(ValueError, match="checkpoint-2"):
        checkpoint.load(tmp_path / "checkpoint-2")


@pytest.mark.parametrize("name", ["pipe", "folder", "device"])
def test_a_file_does_not_take_the_place_of_what_is_none(tmp_path: Path, name: str):
    """As root, `--output /dev/null` would otherwise put a file there, for all programs."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "device").symlink_to("/dev/null")
    kind = "a folder" if name == "folder" else "a pipe, a socket or a device"
    with (
        pytest.raises(OSError, match=f"expected a file, or nothing yet, got {kind}") as error,
        atomic.atomic_file(tmp_path / name),
    ):
        pass
    assert error.value.filename == str(tmp_path / name)
    assert len(list(tmp_path.iterdir())) == 3


# --- checkpoints with a manifest that fits ------------------------------------------------------------------

NAMES = {"far too long": "a" * 3000, "of control characters": "a\0", "no text": "\ud800"}


@pytest.mark.parametrize("name", NAMES)
def test_names_in_a_manifest_that_the_system_would_stumble_over(tmp_path: Path, name: str):
    for step in (1, 2):
        checkpoint.save(tmp_path, step, {}, {})
    manifest = {NAMES[name]: "0" * 64, "metadata.json": "0" * 64}
    (tmp_path / "checkpoint-2" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.warns(
        UserWarning, match=r"checkpoint-2.manifest.json: expected plain file names, got '"
    ) as told:
        assert checkpoint.latest(tmp_path) == tmp_path / "checkpoint-1"
    assert len(str(told[0].message)) < 1000


def test_what_a_checkpoint_says_is_one_line(tmp_path: Path):
    place = Entry(tmp_path, "model")["x\n\x1b[31m" * 1000]
    text = str(place.error("a number", "y\n" * 1000))
    assert text.isprintable()
    assert len(text) < 1000


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu])
def test_floats_that_torch_does_not_compute_with(tmp_path: Path, dtype: torch.dtype):
    """An optimizer of which no more is known may have any floats, if they are finite: torch cannot tell."""
    checkpoint.save(tmp_path, 1, {"model": {"x": torch.zeros(2).to(dtype)}}, {})
    with pytest.raises(ValueError, match=r"model.safetensors: .*x: expected floats of at least 16 bits, got"):
        checkpoint.load(tmp_path / "checkpoint-1")


# --- what lies beside checkpoints ---------------------------------------------------------------------------

WHOLE = b'{"step": 1, "seconds": 2.5}\n'
BROKEN_LINES = {
    "no UTF-8": b'{"step": 2, "x": "\xff"}\n',
    "a step in words": b'{"step": "2"}\n',
    "a step that is true": b'{"step": true}\n',
    "a list": b"[2]\n",
}


@pytest.mark.parametrize("line", BROKEN_LINES)
def test_a_line_of_metrics_that_is_none_ends_them(tmp_path: Path, line: str):
    (tmp_path / "metrics.jsonl").write_bytes(WHOLE + BROKEN_LINES[line] + WHOLE)
    assert read_metrics(tmp_path) == [json.loads(WHOLE)]


@pytest.mark.parametrize("seconds", ['"long"', "-1", "1e300", "NaN", "9" * 400, "null"])
def test_seconds_that_no_run_has_taken_count_as_none(tmp_path: Path, seconds: str):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "seconds": {seconds}}}\n')
    metrics = Metrics(tmp_path, 1)
    metrics.close()
    assert metrics.seconds == 0


IMAGE = {"request": 1, "row": 0, "nll": 1.0}
PROTOCOL = {
    "format": protocols.FORMAT,
    **dict.fromkeys(protocols.DECISIVE, 1),
    "before": {"images": [IMAGE]},
    "settings": {},
    "start_weights": "00",
    "requests": [{"rows": [0]}],
    "after": [{"request": 1, "weights": "0a", "images": [IMAGE], "retain": {"nll": 1.0}}],
}


@pytest.mark.parametrize("images", [[{}], [{"row": 1, "request": 1}], [{"row": []}], 3, None, [3]], ids=str)
def test_a_protocol_whose_numbers_no_summary_can_be_made_of(tmp_path: Path, images):
    (tmp_path / "protocol.json").write_text(json.dumps(PROTOCOL))
    assert protocols.read_protocol(tmp_path) == PROTOCOL
    (tmp_path / "protocol.json").write_text(json.dumps(PROTOCOL | {"before": {"images": images}}))
    with pytest.raises(ValueError, match=r"output_dir: expected .*protocol.json to be a .* record"):
        protocols.read_protocol(tmp_path)


def test_a_pipe_in_the_place_of_a_mask_or_of_neighbours_is_not_opened(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ValueError, match="pipe: expected a safetensors file, got something else"):
        read_tensors(tmp_path / "pipe")
    images = runs.images(3, 0)
    nearest_neighbors(images, images, 1, cache_dir=tmp_path / "found")
    (cache,) = (tmp_path / "found").iterdir()
    cache.unlink()
    os.mkfifo(cache)
    with pytest.raises(OSError, match="expected a file, or nothing yet, got a pipe"):
        nearest_neighbors(images, images, 1, cache_dir=tmp_path / "found")


def test_neighbours_of_other_numbers_are_looked_for_again(tmp_path: Path):
    images = runs.images(3, 0)
    found = nearest_neighbors(images, images, 1, cache_dir=tmp_path)
    (cache,) = tmp_path.iterdir()
    nearest._write_cache(cache, found[0].to(torch.float8_e4m3fn), found[1])
    with pytest.warns(UserWarning, match=r"damaged neighbour cache \(it holds torch.float8_e4m3fn"):
        again = nearest_neighbors(images, images, 1, cache_dir=tmp_path)
    assert torch.equal(found[0], again[0])
