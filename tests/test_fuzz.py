"""Files that were changed at random: they are read, or refused by an error of ours.

FASTUNLEARN_FUZZ_EXAMPLES=5000 pytest tests/test_fuzz.py tests/models/test_fuzz_pipeline.py
"""

from __future__ import annotations

import gzip
import io
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import fuzzing
import numpy as np
import pytest
import runs
import torch
from encoded_images import COLOURS, GREY, encoded
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, features

from fastunlearn import ImageStore
from fastunlearn.data import load_images
from fastunlearn.data.idx import idx_header
from fastunlearn.data.options import Options
from fastunlearn.neighbors import nearest
from fastunlearn.objective.named_tensors import read_tensors, write_tensors
from fastunlearn.runs import lineage, protocols, run_record
from fastunlearn.runs.identity import described, identity, start_weights
from fastunlearn.runs.processes import Processes
from fastunlearn.runs.resume import load_checkpoint

# --- pictures -----------------------------------------------------------------------------------------------


def pictures() -> dict[str, bytes]:
    palette = Image.fromarray(COLOURS).convert("P")
    exif = Image.Exif()
    exif[0x0112] = 6
    return {
        "colours.png": encoded(COLOURS),
        "grey.png": encoded(GREY),
        "palette.png": encoded(palette, transparency=0),
        "text.png": encoded(COLOURS, exif=exif, icc_profile=bytes(range(200))),
        "x.jpg": encoded(COLOURS, "JPEG", exif=exif),
        "progressive.jpg": encoded(COLOURS, "JPEG", progressive=True),
        "cmyk.jpg": encoded(Image.fromarray(COLOURS).convert("CMYK"), "JPEG"),
        "x.mpo.jpg": encoded(
            Image.fromarray(COLOURS), "MPO", save_all=True, append_images=[palette.convert("RGB")]
        ),
        "x.gif": encoded(palette, "GIF"),
        "x.bmp": encoded(COLOURS, "BMP"),
        "palette.bmp": encoded(palette, "BMP"),
        "x.tif": encoded(COLOURS, "TIFF"),
        "lzw.tif": encoded(COLOURS, "TIFF", compression="tiff_lzw"),
        "deflate.tif": encoded(COLOURS, "TIFF", compression="tiff_adobe_deflate"),
        "jpeg.tif": encoded(COLOURS, "TIFF", compression="jpeg"),
        "x.webp": encoded(COLOURS, "WEBP"),
        "lossless.webp": encoded(COLOURS, "WEBP", lossless=True, exif=exif),
    } | ({"x.avif": encoded(COLOURS, "AVIF")} if features.check("avif") else {})


PICTURES = pictures()


@given(change=fuzzing.changes(sorted(PICTURES)))
@fuzzing.examples(200)
def test_pictures(change, folder):
    reader = fuzzing.Reader(
        PICTURES, lambda folder: load_images(folder / change.name, channels=3, alpha="drop")
    )
    fuzzing.check(reader, folder, change)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("changed") / "files"


# --- arrays -------------------------------------------------------------------------------------------------


def arrays() -> dict[str, bytes]:
    rows, labels = np.stack([GREY, 255 - GREY]), np.arange(2)

    def saved(save: Callable, *args, **kwargs) -> bytes:
        buffer = io.BytesIO()
        save(buffer, *args, **kwargs)
        return buffer.getvalue()

    idx = idx_header(rows.shape) + rows.tobytes()
    return {
        "x.npy": saved(np.save, rows[:, None]),
        "float.npy": saved(np.save, (rows[:, None] / 255).astype(np.float32)),
        "big.npy": saved(np.save, (rows[:, None] / 255).astype(">f8")),
        "x.npz": saved(np.savez, images=rows[:, None], labels=labels),
        "packed.npz": saved(np.savez_compressed, images=rows[:, None]),
        "x-idx3-ubyte": idx,
        "x-idx3-ubyte.gz": gzip.compress(idx, mtime=0),
    }


ARRAYS = arrays()


@given(change=fuzzing.changes(sorted(ARRAYS)))
@fuzzing.examples(200)
def test_arrays(change, folder):
    reader = fuzzing.Reader(ARRAYS, lambda folder: load_images(folder / change.name, channels=1))
    fuzzing.check(reader, folder, change)


LATENTS = {
    "mean.npy": ARRAYS["float.npy"],
    "std.npy": ARRAYS["float.npy"],
}


@given(change=fuzzing.changes(sorted(LATENTS)))
@fuzzing.examples(100)
def test_latents(change, folder):
    fuzzing.check(fuzzing.Reader(LATENTS, lambda folder: load_images(folder, latents=True)), folder, change)


# --- tables -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tables(tmp_path_factory) -> fuzzing.Reader:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    folder = tmp_path_factory.mktemp("tables")
    content = [encoded(COLOURS), encoded(255 - COLOURS)]
    columns = {"image": [{"bytes": each, "path": "x.png"} for each in content], "label": [0, 1]}
    pq.write_table(pa.table(columns), folder / "struct.parquet")
    pq.write_table(pa.table({"img": content}), folder / "bytes.parquet", compression="gzip")
    lists = [COLOURS.tolist(), COLOURS.tolist()]
    pq.write_table(pa.table({"image": lists}), folder / "lists.parquet", compression="none")
    return fuzzing.Reader(fuzzing.content_of(folder), lambda folder: None)


@given(data=st.data())
@fuzzing.examples(200)
def test_tables(data, tables, folder):
    change = data.draw(fuzzing.changes(sorted(tables.files)))
    fuzzing.check(
        fuzzing.Reader(tables.files, lambda folder: load_images(folder / change.name, channels=3)),
        folder,
        change,
    )


@pytest.fixture(scope="module")
def saved_set(tmp_path_factory) -> fuzzing.Reader:
    datasets = pytest.importorskip("datasets")
    folder = tmp_path_factory.mktemp("saved") / "set"
    rows = {"image": [Image.fromarray(COLOURS), Image.fromarray(255 - COLOURS)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows).save_to_disk(folder)
    return fuzzing.Reader(
        fuzzing.content_of(folder), lambda folder: load_images(folder, channels=3, labels=True)
    )


@given(data=st.data())
@fuzzing.examples(100)
def test_saved_sets(data, saved_set, folder):
    fuzzing.check(saved_set, folder, data.draw(fuzzing.changes(sorted(saved_set.files))))


# --- what runs leave ----------------------------------------------------------------------------------------

MAKE = {"scale": 1024.0, "autocast_dtype": torch.float16}  # with a scaler: everything that has a state


CHECKPOINT = "checkpoint-2"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> fuzzing.Reader:
    """A checkpoint, and the key beside it."""
    folder = tmp_path_factory.mktemp("saved")
    runs.stop(runs.make(**MAKE), folder, 2)
    fresh = runs.make(**MAKE)
    same = identity(fresh) | described({"start_weights": start_weights(fresh)})

    def read(folder: Path) -> None:
        load_checkpoint(runs.make(**MAKE), folder / CHECKPOINT, Processes(None), same)

    return fuzzing.Reader(fuzzing.content_of(folder / "private"), read)


@given(data=st.data(), signed=st.sampled_from([True, True, True, False]))
@fuzzing.examples(100)
def test_checkpoints(data, signed, checkpoint, folder):
    change = data.draw(fuzzing.changes(sorted(checkpoint.files)))
    reader = checkpoint
    # A manifest that fits, as somebody would write it who wants the rest to be believed.
    if signed and not change.name.endswith("manifest.json"):
        reader = replace(checkpoint, prepare=lambda folder: runs.sign(folder / CHECKPOINT))
    fuzzing.check(reader, folder, change)


# --- what lies beside checkpoints ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> fuzzing.Reader:
    folder = tmp_path_factory.mktemp("saved")
    runs.run(runs.make(**MAKE), folder, 2)
    files = {name: (folder / name).read_bytes() for name in ("run.json", "metrics.jsonl")}

    def read(folder: Path) -> None:
        run_record.Metrics(folder, 2).close()
        run_record.purge(folder)

    return fuzzing.Reader(files, read)


@given(data=st.data())
@fuzzing.examples(100)
def test_records(data, records, folder):
    fuzzing.check(records, folder, data.draw(fuzzing.changes(sorted(records.files))))


@pytest.fixture(scope="module")
def protocol(tmp_path_factory) -> fuzzing.Reader:
    path = tmp_path_factory.mktemp("saved")
    first = {"request": 1, "row": 0, "nll": 1.0, "mse": 2.5}
    second = {"request": 2, "row": 1, "nll": 2.0, "mse": 1.5}
    after = [
        {"request": 1, "weights": "0a", "images": [first], "retain": {"nll": 1.0}},
        {"request": 2, "weights": "0b", "images": [first, second], "retain": {"nll": 1.5}},
    ]
    content = {
        "format": protocols.FORMAT,
        **dict.fromkeys(protocols.DECISIVE, 1),
        "before": {"images": [first, second]},
        "settings": {},
        "start_weights": "00",
        "requests": [{"rows": [0]}, {"rows": [1]}],
        "after": after,
    }
    (path / "protocol.json").write_text(json.dumps(content))
    return fuzzing.Reader(
        fuzzing.content_of(path), lambda folder: protocols.summary(protocols.read_protocol(folder))
    )


@given(data=st.data())
@fuzzing.examples(100)
def test_protocols(data, protocol, folder):
    fuzzing.check(protocol, folder, data.draw(fuzzing.changes(sorted(protocol.files))))


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> fuzzing.Reader:
    """A mask, and neighbours that were found."""
    folder = tmp_path_factory.mktemp("saved")
    write_tensors(folder / "mask.safetensors", {"weight": torch.ones(3, 2, dtype=torch.bool)}, "x")
    nearest._write_cache(folder / "found.safetensors", torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3))

    def read(folder: Path) -> None:
        nearest._read_cache(folder / "found.safetensors", 2, 9, 3)
        read_tensors(folder / "mask.safetensors", "x")

    return fuzzing.Reader(fuzzing.content_of(folder), read)


@given(data=st.data())
@fuzzing.examples(100)
def test_kept(data, kept, folder):
    fuzzing.check(kept, folder, data.draw(fuzzing.changes(sorted(kept.files))))


@pytest.fixture(scope="module")
def history(tmp_path_factory) -> fuzzing.Reader:
    """What a model hands on of forgotten rows, and its key."""
    folder, key = tmp_path_factory.mktemp("saved"), bytes(32)
    store = ImageStore(runs.images(3, 0))
    content = lineage.with_rows(lineage.Lineage(), key, store, Options().of_pictures()).content()
    (folder / "lineage.json").write_bytes(content)
    lineage.write_key(folder / "lineage.key", key)

    def read(folder: Path) -> None:
        lineage.read_key(folder / "lineage.key")
        lineage.read_lineage(folder)

    return fuzzing.Reader(fuzzing.content_of(folder), read)


@given(data=st.data())
@fuzzing.examples(100)
def test_lineages(data, history, folder):
    fuzzing.check(history, folder, data.draw(fuzzing.changes(sorted(history.files))))


# --- the tests themselves -----------------------------------------------------------------------------------


def test_files_that_are_not_changed_are_read(request, folder):
    for name in ("checkpoint", "records", "protocol", "kept", "history", "saved_set"):
        reader = request.getfixturevalue(name)
        shutil.rmtree(folder, ignore_errors=True)
        fuzzing.write(folder, reader.files)
        assert fuzzing.was_read(reader.read, folder), name
    shutil.rmtree(folder, ignore_errors=True)
    fuzzing.write(folder, PICTURES | ARRAYS)
    for path in sorted(folder.iterdir()):
        channels = 3 if path.name in PICTURES else 1
        load_images(path, channels=channels, alpha="drop")


@pytest.mark.parametrize(
    "error", [KeyError("x"), RuntimeError("x"), ValueError("x: names no file")], ids=repr
)
def test_other_errors_are_none_of_ours(error, folder):
    def read(folder: Path) -> None:
        raise error

    with pytest.raises(AssertionError):
        fuzzing.was_read(read, folder)


@pytest.mark.skipif(sys.platform != "linux", reason="limits the addresses of a process as Linux does")
def test_what_takes_too_much_memory_is_none_of_ours(folder):
    with pytest.raises(AssertionError, match="MemoryError"):
        fuzzing.was_read(lambda folder: np.empty(2 * fuzzing.ROOM, np.uint8), folder)
