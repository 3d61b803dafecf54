"""Files that act are never run, and files that are damaged are refused."""

from __future__ import annotations

import ast
import io
import os
import struct
import subprocess
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from encoded_images import (
    COLOURS,
    GREY,
    encoded,
    needs_avif,
    needs_datasets,
    needs_pyarrow,
    one_image_saved,
    put,
    read,
    table,
)
from PIL import EpsImagePlugin, Image, ImageFile

from fastunlearn.data import load_images
from fastunlearn.data.content import formats

PACKAGE = Path(__file__).parents[1] / "fastunlearn"


# --- formats ---------------------------------------------------------------------------------------------

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 6\n%%EndComments\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path, monkeypatch) -> Path:
    """A program called `gs`; the file appears when it is started."""
    folder, started = tmp_path / "bin", tmp_path / "started"
    folder.mkdir()
    program = put(folder, f"#!/bin/sh\ntouch {started}\nexit 1\n".encode(), "gs")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None, raising=False)
    return started


def test_the_stand_in_for_ghostscript_is_what_pillow_starts(ghostscript):
    with pytest.raises((OSError, subprocess.CalledProcessError)), Image.open(io.BytesIO(POSTSCRIPT)) as image:
        image.load()
    assert ghostscript.exists()


@pytest.mark.parametrize("name", ["cat.png", "cat", "cat.eps"])
def test_postscript_is_never_run(name, tmp_path, ghostscript):
    path = put(tmp_path, POSTSCRIPT, name)
    with pytest.raises(
        ValueError, match=rf"{name}: expected .*got .*PostScript, which is a program and is never run"
    ):
        load_images(path, channels=3)
    with pytest.raises(ValueError, match=rf"{name}: expected an image .*PostScript"):
        load_images(put_in_a_folder(path), channels=3)
    assert not ghostscript.exists()


def put_in_a_folder(path: Path) -> Path:
    folder = path.parent / "set"
    folder.mkdir()
    (folder / path.name).write_bytes(path.read_bytes())
    return folder


@needs_pyarrow
@pytest.mark.parametrize(
    "cell", [POSTSCRIPT, {"bytes": POSTSCRIPT, "path": "cat.png"}], ids=["binary", "struct"]
)
def test_postscript_in_a_table_is_never_run(cell, tmp_path, ghostscript):
    with pytest.raises(ValueError, match=r"x.parquet row 0: expected an image .*PostScript"):
        load_images(table(tmp_path, image=[cell]), channels=3)
    assert not ghostscript.exists()


@needs_datasets
def test_postscript_in_a_saved_data_set_is_never_run(tmp_path, ghostscript):
    import datasets

    rows = {"image": [{"bytes": POSTSCRIPT, "path": None}]}
    datasets.Dataset.from_dict(rows, datasets.Features(image=datasets.Image())).save_to_disk(tmp_path / "set")
    with pytest.raises(ValueError, match=r"set row 0: expected an image .*PostScript"):
        load_images(tmp_path / "set", channels=3)
    assert not ghostscript.exists()


def test_pillow_is_asked_for_these_formats_alone():
    assert set(formats()) <= {"PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "AVIF"}
    opened = []
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Image.open", "PIL.Image.open"):
                opened.append([ast.unparse(word.value) for word in node.keywords if word.arg == "formats"])
    assert opened
    assert all(asked == ["formats()"] for asked in opened)


@pytest.mark.parametrize("kind", ["ICO", "TGA", "PPM", "JPEG2000", "PDF", "SGI", "PCX", "DDS"])
def test_other_formats_of_pillow_are_refused(kind, tmp_path):
    with pytest.raises(ValueError, match=r"x.png: expected an image \("):
        read(tmp_path, encoded(Image.new("RGB", (16, 16)), kind))


# --- damage ----------------------------------------------------------------------------------------------

WAVES = (np.add.outer(np.arange(64) * 3, np.arange(64))[..., None] + np.array([0, 40, 80])).astype(np.uint8)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("GIF", {}),
        pytest.param("AVIF", {}, marks=needs_avif),
    ],
)
@pytest.mark.parametrize("kept", [0.5, 0.9])
def test_a_file_that_was_cut_is_refused(kind, options, kept, tmp_path):
    content = encoded(WAVES, kind, **options)
    damaged, unknown = "a whole image, got one that is damaged", r"an image \(.*\), got data that begins like"
    with pytest.raises(ValueError, match=f"x.png: expected ({damaged}|{unknown})"):
        read(tmp_path, content[: int(kept * len(content))], channels=3)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", pytest.param("AVIF", marks=needs_avif)])
@pytest.mark.parametrize("kept", [0.3, 0.5, 0.7])
def test_an_image_whose_end_is_zeros_is_refused(kind, kept, tmp_path):
    """What a download that allots the whole file first, or a crash, leaves: Pillow may decode it."""
    noise = np.random.default_rng(0).integers(0, 30, (128, 128, 3))
    ramp = np.add.outer(np.arange(128), np.arange(128))[..., None] + np.array([0, 20, 40])
    content = encoded((ramp + noise).clip(0, 255).astype(np.uint8), kind)
    whole = int(kept * len(content))
    with pytest.raises(ValueError, match=r"x.png: expected a whole image, got one that is damaged"):
        read(tmp_path, content[:whole] + bytes(len(content) - whole), channels=3)


def test_pillow_may_not_have_been_told_to_fill_in_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    (tmp_path / "set").mkdir()
    put(tmp_path / "set", encoded(GREY))
    for path in (put(tmp_path, encoded(GREY)), tmp_path / "set"):
        with pytest.raises(
            ValueError, match=r"PIL.ImageFile.LOAD_TRUNCATED_IMAGES: expected False, got True"
        ):
            load_images(path)


def test_whatever_pillow_stumbles_over_is_named(tmp_path, monkeypatch):
    def stumble(self, *arguments):
        raise ZeroDivisionError

    monkeypatch.setattr(ImageFile.ImageFile, "load", stumble)
    with pytest.raises(
        ValueError, match=r"x.png: expected a whole image, got one that is damaged \(ZeroDivisionError\)"
    ):
        read(tmp_path, encoded(GREY))


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF", pytest.param("AVIF", marks=needs_avif)])
def test_more_than_one_frame_is_refused(kind, tmp_path):
    other = Image.fromarray(255 - COLOURS)
    content = encoded(COLOURS, kind, save_all=True, append_images=[other])
    with pytest.raises(ValueError, match=r"x.png: expected one image, got 2 frames"):
        read(tmp_path, content, channels=3)


# --- headers that lie ------------------------------------------------------------------------------------


def chunk(kind: bytes, content: bytes) -> bytes:
    """A chunk of a PNG, with its checksum."""
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


TEXTS = {b"iCCP": b"x\0\0", b"zTXt": b"x\0\0", b"iTXt": b"x\0\1\0\0\0"}  # what stands before packed content


@pytest.mark.parametrize("kind", TEXTS, ids=bytes.decode)
def test_metadata_that_unpack_to_anything_are_refused(kind, tmp_path):
    image = encoded(GREY)
    bomb = chunk(kind, TEXTS[kind] + zlib.compress(bytes(20_000_000), 9))
    end_of_header = 33
    with pytest.raises(
        ValueError, match=r"x.png: expected a whole image, got one that is damaged \(Decompres"
    ):
        read(tmp_path, image[:end_of_header] + bomb + image[end_of_header:])


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_000, 20_000])
def test_what_pillow_warns_of_is_an_error_of_ours(side, tmp_path):
    """Where warnings are errors, too."""
    header = chunk(b"IHDR", struct.pack(">2I5B", side, side, 1, 0, 0, 0, 0))
    with pytest.raises(ValueError, match=r"x.png: expected at most \d+ pixels"):
        read(tmp_path, b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b""))


HEADERS = {
    "a text that does not end": "{'descr': '|u1', 'fortran_order': False, 'shape': (2, ",
    "brackets without end": "(" * 3000,
    "signs without end": "-" * 3000 + "1",
    "a dtype that is none": "{'descr': 'zz', 'fortran_order': False, 'shape': (2, 1, 8, 6), }",
    "a negative length": "{'descr': '|u1', 'fortran_order': False, 'shape': (-2, 1, 8, 6), }",
    "objects": "{'descr': '|O', 'fortran_order': False, 'shape': (2, 1, 8, 6), }",
}


@pytest.mark.parametrize("header", HEADERS)
def test_headers_of_arrays(header, tmp_path):
    text = HEADERS[header].encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(96)
    for path in (put(tmp_path, content, "x.npy"), archive(tmp_path, {"images.npy": content})):
        with pytest.raises(
            ValueError, match=rf"{path.name}: expected an? .np[yz] file of plain numbers"
        ) as told:
            load_images(path)
        assert str(told.value).isprintable()


def archive(folder: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(folder / "x.npz", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return folder / "x.npz"


def npy(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_what_is_no_array_in_an_archive(tmp_path):
    rows = npy(GREY[None, None])
    assert len(load_images(archive(tmp_path, {"images.npy": rows, "readme.txt": b"x"}))) == 1
    for members in ({"readme.txt": b"hello, world"}, {"images": b"hello, world"}, {"images.npy": b""}):
        with pytest.raises(ValueError, match=r"x.npz: expected an .npz file of plain numbers"):
            load_images(archive(tmp_path, members))
    path = archive(tmp_path, {"images.npy": rows})
    content = bytearray(path.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + flags] |= 1  # encrypted
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x.npz: expected an .npz file .*encrypted"):
        load_images(path)


# --- files that lead elsewhere ---------------------------------------------------------------------------


@pytest.fixture
def saved_set(tmp_path) -> Path:
    return one_image_saved(tmp_path / "set")


@pytest.mark.parametrize("name", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
def test_pipes_in_a_saved_data_set_are_not_opened(name, saved_set):
    (saved_set / name).unlink()
    os.mkfifo(saved_set / name)
    with pytest.raises(
        ValueError, match=rf"{name}: expected a file, got a named pipe, which is never opened"
    ):
        load_images(saved_set)


def test_devices_behind_links_are_not_opened(saved_set, tmp_path):
    (saved_set / "data-00000-of-00001.arrow").unlink()
    (saved_set / "data-00000-of-00001.arrow").symlink_to("/dev/zero")
    (tmp_path / "x.parquet").symlink_to("/dev/zero")
    with pytest.raises(ValueError, match=r"arrow: expected a file, got a device, which is never opened"):
        load_images(saved_set)
    with pytest.raises(ValueError, match=r"x.parquet: expected .*, got a pipe, a socket or a device"):
        load_images(tmp_path / "x.parquet")
