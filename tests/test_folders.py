"""A set of images never shrinks without a word: every file below a folder is a row, or an error names it."""

from __future__ import annotations

import gzip
import io
import itertools
import os
import socket
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from fastunlearn.data import folders as folders_module
from fastunlearn.data import load_images, save_latents
from fastunlearn.data import pictures as pictures_module
from fastunlearn.host.store import ImageStore

GREY = np.zeros((8, 8), np.uint8)


def encoded(number: int = 0, kind: str = "PNG") -> bytes:
    """An image of one grey, which JPEG keeps as well."""
    buffer = io.BytesIO()
    Image.fromarray(GREY + np.uint8(number)).save(buffer, kind)
    return buffer.getvalue()


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def first_pixels(store) -> list[int]:
    """The numbers that `encoded` was given."""
    return store.images[:, 0, 0, 0].tolist()


def refused(*paths, **options) -> str:
    with pytest.raises(ValueError) as caught:
        load_images(list(paths), **options)
    return str(caught.value)


# --- what is read ----------------------------------------------------------------------------------------


def test_a_file_is_told_by_its_content(tmp_path):
    names = [
        "1",
        "2.jfif",
        "3.txt",
        "4.heic",
        "5.GIF",
        ".6.png",
        ".cache/7.png",
        ".ipynb_checkpoints/8",
        "__MACOSX/9.pt",
        "a.npy",
    ]
    kinds = {"2.jfif": "JPEG", "5.GIF": "GIF"}
    for number, name in enumerate(names):
        put(tmp_path / name, encoded(number, kinds.get(name, "PNG")))
    store = load_images(tmp_path, channels=1)
    assert len(store) == len(names)
    in_order = sorted(range(len(names)), key=lambda number: tmp_path / names[number])
    assert first_pixels(store) == in_order


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow has no AVIF")
def test_avif_is_read(tmp_path):
    put(tmp_path / "x.avif", encoded(kind="AVIF"))
    put(tmp_path / "y", encoded(kind="AVIF"))
    assert len(load_images(tmp_path, channels=1)) == 2


@pytest.mark.parametrize("name", ["photo", "photo.gif", "photo.jfif", "photo.txt", "idx-of-photos.png"])
def test_a_single_path_is_told_by_its_content_too(name, tmp_path):
    kind = {"photo.gif": "GIF", "photo.jfif": "JPEG"}.get(name, "PNG")
    assert load_images(put(tmp_path / name, encoded(kind=kind)), channels=1).shape == (1, 8, 8)


# --- what is named ---------------------------------------------------------------------------------------


def saved(writer, *arguments, **arrays) -> bytes:
    buffer = io.BytesIO()
    writer(buffer, *arguments, **arrays)
    return buffer.getvalue()


NAMED = {
    "photo.heic": (
        b"\0\0\0\x18ftypheic" + bytes(40),
        r"got HEIC, for which Pillow has no decoder: convert it",
    ),
    "notes.txt": (b"what to do", r"got text"),
    "latin.txt": ("caf\u00e9 ".encode("latin-1") * 20, r"got data that Pillow does not recognise"),
    "empty.png": (b"", r"got an empty file"),
    "zeros.jpg": (bytes(1000), r"got zeros"),
    "begun.png": (b"\x89PNG", r"got data that begins like PNG and that Pillow does not recognise"),
    "a.npy": (saved(np.save, GREY), r"got an array \(.npy\), which is read when its own path is given"),
    "a.npz": (saved(np.savez, images=GREY), r"got a zip archive: unpack it, or, if it is an .npz"),
    "a.parquet": (b"PAR1" + bytes(40), r"got a parquet table, which is read when its own path is given"),
    "t-images-idx3-ubyte": (
        bytes([0, 0, 8, 3]) + bytes(12),
        r"got images in one file \(idx\), which is read when",
    ),
    "t-labels-idx1-ubyte": (bytes([0, 0, 8, 1]) + bytes(12), r"got labels \(idx\)"),
    "a.gz": (gzip.compress(b"x"), r"got gzip: unpack it"),
    "page.pdf": (b"%PDF-1.7", r"got PDF"),
    "drawing.svg": (b"<svg/>", r"got SVG"),
    "cat.png": (b"%!PS-Adobe-3.0 EPSF-3.0\n", r"got PostScript, which is a program and is never run"),
    "._1.png": (b"\0\x05\x16\x07" + bytes(40), r"got what macOS keeps beside a file"),
    "photo.ppm": (
        encoded(kind="PPM"),
        r"expected an image \(.*BMP.*\), got data that Pillow does not recognise",
    ),
    ".gitkeep": (b"", r"got an empty file"),
    "metadata.txt": (b"x", r"got text"),
    "labels.csv": (b"a,b", r"got text"),
    "Thumbs.db.old": (b"x", r"got text"),
    ".ipynb_checkpoints/a.ipynb": (b"{}", r"got text"),
    "Thumbs.db": (encoded(), r"expected no image under a name that is passed over"),
    "metadata.csv": (encoded(kind="JPEG"), r"expected no image under a name that is passed over"),
}


@pytest.mark.parametrize("name", NAMED)
def test_a_file_that_is_no_image_is_named_with_its_number(name, tmp_path):
    content, reason = NAMED[name]
    put(tmp_path / "fine.png", encoded())
    put(tmp_path / name, content)
    with pytest.raises(ValueError, match=reason) as caught:
        load_images(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}: expected ")
    assert str(caught.value).endswith(f"(the only one of 2 files in {tmp_path} that cannot be read)")


def test_all_that_cannot_be_read_is_named_in_one_go(tmp_path):
    for number in range(40):
        content = (encoded(number), encoded(kind="JPEG")[:-30], b"notes", b"\0\0\0\x18ftypheic" + bytes(40))[
            number % 4
        ]
        put(tmp_path / f"{number:02}.png", content)
    first, *lines, last = refused(tmp_path).split("\n")
    assert first == f"{tmp_path}: expected files that can all be read, got 30 of 40 that cannot:"
    unreadable = [number for number in range(40) if number % 4]
    assert [line.split(":")[0] for line in lines] == [
        f"  {tmp_path / f'{number:02}.png'}" for number in unreadable[:20]
    ]
    assert [line.split(" got ")[1][:12] for line in lines[:3]] == ["one that is ", "text", "HEIC, for wh"]
    assert last == "  and 10 more"


def test_images_that_differ_are_named_among_them(tmp_path):
    for name, shape in (("a", (8, 8)), ("b", (9, 8)), ("c", (8, 8)), ("d", (8, 9))):
        Image.fromarray(np.zeros(shape, np.uint8)).save(tmp_path / f"{name}.png")
    put(tmp_path / "e.png", b"notes")
    text = refused(tmp_path)
    assert "got 3 of 5 that cannot" in text
    assert all(f"{tmp_path / name}.png: " in text for name in "bde")


def test_paths_of_single_files_are_named_in_one_go(tmp_path):
    paths = [put(tmp_path / f"{number}.png", encoded() if number % 2 else b"notes") for number in range(6)]
    text = refused(*paths)
    assert text.startswith("3 paths: expected files that can all be read, got 3 of 6 that cannot:\n")
    assert [str(path) in text for path in paths] == [True, False] * 3


def test_paths_of_other_kinds_are_named_in_one_go(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    fine, notes = put(tmp_path / "a", encoded()), put(tmp_path / "notes.txt", b"notes")
    pickled = put(tmp_path / "model.pt", b"\x80\x02}.")
    text = refused(fine, notes, tmp_path / "gone", pickled, tmp_path / "pipe")
    assert text.startswith("4 paths: expected files that can all be read, got 4 of 5 that cannot:\n")
    reasons = ("ends in .txt: text", "does not exist", ".pt: such files are pickles", "a pipe, a socket or")
    assert all(reason in line for reason, line in zip(reasons, text.split("\n")[1:], strict=True))


def test_one_file_alone_is_named_in_one_line(tmp_path):
    notes = put(tmp_path / "x.png", b"notes")
    assert refused(notes).endswith("got text")
    fine = put(tmp_path / "fine", encoded())
    assert refused(fine, notes).endswith("got text (the only one of 2 files that cannot be read)")


def test_names_cannot_write_to_the_terminal(tmp_path):
    put(tmp_path / "fine.png", encoded())
    put(tmp_path / "a\n\x1b[31m.png", b"notes")
    os.close(os.open(os.fsencode(tmp_path) + b"/\xff.png", os.O_CREAT | os.O_WRONLY))
    text = refused(tmp_path)
    assert r"a\n\x1b[31m.png" in text
    assert r"\udcff.png" in text
    assert text.count("\n") == 2
    text.encode("utf-8")


# --- what is passed over ---------------------------------------------------------------------------------


def test_what_is_passed_over_is_named(tmp_path):
    beside = [".DS_Store", "Thumbs.db", "a/desktop.ini", "a/metadata.jsonl", "metadata.csv", "z/THUMBS.DB"]
    for name in beside:
        put(tmp_path / name, b"BMnot an image")
    put(tmp_path / "a" / "x.png", encoded(5))
    told = []
    store = load_images(tmp_path, tell=told.append)
    assert first_pixels(store) == [5]
    (reading,) = told
    assert (reading.rows, reading.files) == (1, 1)
    assert reading.passed_over == tuple(
        str(tmp_path / name) for name in sorted(beside, key=lambda name: tmp_path / name)
    )
    assert f"passed over 6 files: {tmp_path / '.DS_Store'}, " in str(reading)
    assert reading.record()["passed_over"] == 6
    assert str(tmp_path) not in repr(reading.record())
    with pytest.warns(UserWarning, match=r"passed over 6 files: .*\.DS_Store, .*THUMBS\.DB"):
        load_images(tmp_path)


def test_nothing_passed_over_is_no_warning(tmp_path):
    put(tmp_path / "x.png", encoded())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_images(tmp_path)


def test_a_folder_of_nothing_else_is_empty(tmp_path):
    put(tmp_path / "a" / ".DS_Store", b"x")
    assert refused(tmp_path).endswith(f"got none but what is passed over: {tmp_path / 'a' / '.DS_Store'}")


# --- links and what is no file ---------------------------------------------------------------------------


def test_links_to_folders_are_followed_once(tmp_path):
    outside = tmp_path / "outside"
    put(outside / "1.png", encoded(1))
    put(outside / "deep" / "2.png", encoded(2))
    root = tmp_path / "root"
    put(root / "b" / "3.png", encoded(3))
    for name, target in (
        ("a", "b"),
        ("c", "../outside"),
        ("d", "../outside"),
        ("b/up", ".."),
        ("e", "../outside/deep"),
    ):
        (root / name).symlink_to(target)
    told = []
    store = load_images(root, tell=told.append)
    assert first_pixels(store) == [3, 1, 2]  # b/3.png, c/1.png, c/deep/2.png
    assert told[0].entered_before == tuple(str(root / name) for name in ("a", "b/up", "d", "e"))
    assert f"read once, though other paths lead there, too: {root / 'a'}, " in str(told[0])
    with pytest.warns(UserWarning, match="read once, though other paths lead there, too"):
        load_images(root)


def test_a_link_changes_nothing_where_its_folder_is_there(tmp_path):
    put(tmp_path / "real" / "1.png", encoded(1))
    put(tmp_path / "zoo" / "2.png", encoded(2))
    (tmp_path / "a-link").symlink_to("real")
    store = load_images(tmp_path, labels=True, tell=lambda reading: None)
    assert first_pixels(store) == [1, 2]
    assert store.labels.tolist() == [0, 1]


def test_the_folder_itself_may_be_a_link(tmp_path):
    put(tmp_path / "real" / "1.png", encoded(1))
    (tmp_path / "link").symlink_to("real")
    (tmp_path / "real" / "loop").symlink_to("../link")
    assert len(load_images(tmp_path / "link", tell=lambda reading: None)) == 1


def test_a_link_to_a_file_is_read_and_a_broken_one_is_named(tmp_path):
    put(tmp_path / "elsewhere" / "1", encoded(1))
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.png").symlink_to("../elsewhere/1")
    assert first_pixels(load_images(root)) == [1]
    (root / "gone.png").symlink_to("nowhere")
    (root / "self").symlink_to("self")
    text = refused(root)
    assert "got 2 of 3 that cannot" in text
    assert (
        f"{root / 'gone.png'}: expected a file that can be read, got a link to nowhere: No such file" in text
    )
    assert f"{root / 'self'}: expected a file that can be read, got a link to self: " in text


def special(folder: Path, kind: str) -> Path:
    path = folder / "x.png"
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        here = os.getcwd()
        os.chdir(folder)  # the path of a socket has at most 107 bytes
        try:
            with socket.socket(socket.AF_UNIX) as server:
                server.bind("x.png")
        finally:
            os.chdir(here)
    return path


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", ["a named pipe", "a device", "a socket"])
def test_what_is_no_file_is_named_and_never_opened(kind, tmp_path):
    put(tmp_path / "fine.png", encoded())
    path = special(tmp_path, kind)
    assert refused(tmp_path).startswith(
        f"{path}: expected a file, got {kind}, which is never opened (the only one of 2 files"
    )
    assert "got a pipe, a socket or a device, which is never opened" in refused(path)


@pytest.mark.timeout(20)
def test_a_pipe_with_a_name_that_is_passed_over_is_named(tmp_path):
    put(tmp_path / "fine.png", encoded())
    os.mkfifo(tmp_path / "Thumbs.db")
    assert "Thumbs.db: expected a file, got a named pipe" in refused(tmp_path)


def test_what_may_not_be_read_is_named(tmp_path, monkeypatch):
    """As a user without the right would see it; the tests may run as root, who has it."""
    put(tmp_path / "fine.png", encoded())
    put(tmp_path / "locked" / "1.png", encoded())
    secret = put(tmp_path / "secret.png", encoded())
    scandir = os.scandir

    def deny(path, *arguments):
        if path in (tmp_path / "locked", secret):
            raise PermissionError(13, "Permission denied")
        return (open if arguments else scandir)(path, *arguments)

    monkeypatch.setattr(os, "scandir", deny)
    monkeypatch.setattr(pictures_module, "open", deny, raising=False)
    text = refused(tmp_path)
    assert f"{tmp_path / 'locked'}: expected a folder that can be read, got Permission denied" in text
    assert f"{secret}: expected a file that can be read, got Permission denied" in text
    assert "got 2 of 3 that cannot" in text


# --- folders of other kinds ------------------------------------------------------------------------------


def test_a_folder_of_latents_holds_nothing_else(tmp_path):
    save_latents(tmp_path, ImageStore(np.zeros((2, 4, 8, 8), np.float32), latents=True))
    put(tmp_path / ".DS_Store", b"x")
    told = []
    assert len(load_images(tmp_path, latents=True, tell=told.append)) == 2
    assert told[0].passed_over == (str(tmp_path / ".DS_Store"),)
    put(tmp_path / "more" / "mean.npy", b"x")
    put(tmp_path / "mean2.npy", b"x")
    text = refused(tmp_path, latents=True)
    assert "got 2 of 3 that cannot" in text
    expected = "expected only files of latents (mean.npy, std.npy, labels.npy) in "
    assert f"{tmp_path / 'mean2.npy'}: {expected}" in text


def test_a_second_array_in_an_npy_file_is_refused(tmp_path):
    with open(tmp_path / "x.npy", "wb") as file:
        np.save(file, np.zeros((2, 1, 8, 8), np.uint8))
        np.save(file, np.zeros((3, 1, 8, 8), np.uint8))
    assert "x.npy: expected one array, got 320 bytes after it" in refused(tmp_path / "x.npy")


def test_files_of_a_folder_are_decoded_side_by_side(tmp_path, monkeypatch):
    """Each of the first two waits for the other to be there: one after another they never would meet."""
    for number in range(4):
        put(tmp_path / f"{number}.png", encoded(number))
    meeting, decode, begun = threading.Barrier(2, timeout=60), folders_module.decode, itertools.count()

    def wait_and_decode(*arguments):
        if next(begun) < 2:
            meeting.wait()
        return decode(*arguments)

    monkeypatch.setattr(folders_module, "decode", wait_and_decode)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    assert first_pixels(load_images(tmp_path)) == [0, 1, 2, 3]
