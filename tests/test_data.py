"""Readers: every format gives the rows that went in.

What is damaged, ambiguous, pickled or of the wrong kind is refused with the file's name.
"""

from __future__ import annotations

import gzip
import io
import pickle
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from encoded_images import encoded, needs_datasets, needs_pyarrow, put, table
from PIL import Image

from fastunlearn.data import folders, load_images, save_latents
from fastunlearn.data.idx import idx_header, read_idx
from fastunlearn.host.store import ImageStore


def images(*shape: int, dtype=np.uint8) -> np.ndarray:
    numbers = np.random.default_rng(0).integers(0, 256, shape)
    return numbers.astype(np.uint8) if dtype == np.uint8 else (numbers / 127.5 - 1).astype(dtype)


def npy(folder: Path, array: np.ndarray, name: str = "x.npy") -> Path:
    np.save(folder / name, array)
    return folder / name


def npz(folder: Path, name: str = "x.npz", **arrays: np.ndarray) -> Path:
    np.savez(folder / name, **arrays)
    return folder / name


def idx(folder: Path, array: np.ndarray, name: str = "t-images-idx3-ubyte") -> Path:
    content = idx_header(array.shape) + array.tobytes()
    (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder / name


def picture(folder: Path, array: np.ndarray, name: str = "x.png", mode: str | None = None, **options) -> Path:
    """A picture of a `[H, W]` or `[H, W, 3]` array."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    (picture if mode is None else picture.convert(mode)).save(path, **options)
    return path


def pictures(folder: Path, **arrays: np.ndarray) -> Path:
    for name, array in arrays.items():
        picture(folder, array, f"{name}.png")
    return folder


def frames(folder: Path) -> Path:
    first, second = (Image.fromarray(images(8, 8) // factor) for factor in (1, 2))
    first.save(folder / "x.tiff", save_all=True, append_images=[second])
    return folder / "x.tiff"


def bomb(folder: Path, scale: float) -> Path:
    """A png whose header says `scale` times the pixels that Pillow allows."""
    width = int((scale * Image.MAX_IMAGE_PIXELS) ** 0.5) + 1
    content = bytearray(encoded(images(8, 8)))
    content[16:24] = struct.pack(">2I", width, width)
    content[29:33] = struct.pack(">I", __import__("zlib").crc32(content[12:29]))
    return put(folder, bytes(content), "x.png")


G = (4, 6)  # a grey picture
# (id, what to call with a temporary folder, type, text)
CASES = [
    ("no-paths", lambda d: load_images([]), ValueError, r"paths: expected at least one path, got none"),
    ("paths-number", lambda d: load_images(5), TypeError, r"paths: expected a path or several, got 5"),
    (
        "paths-none",
        lambda d: load_images([d, None]),
        TypeError,
        r"paths: expected a path or several, got None",
    ),
    (
        "missing",
        lambda d: load_images(d / "gone"),
        ValueError,
        r"gone: expected a folder of images.* got a path that does not exist",
    ),
    (
        "unknown-ending",
        lambda d: load_images(put(d, b"x", "x.txt")),
        ValueError,
        r"x.txt: expected .* got a file that ends in .txt",
    ),
    (
        "no-ending",
        lambda d: load_images(put(d, b"x", "x")),
        ValueError,
        r"x: expected .* got a file without an ending",
    ),
    *(
        (
            f"refused{ending}",
            lambda d, ending=ending: load_images(put(d, pickle.dumps(1), f"x{ending}")),
            ValueError,
            rf"x\{ending}: expected .* got \{ending}: such files are pickles, and unpickling runs whatever "
            rf"code they hold",
        )
        for ending in (".bin", ".pt", ".pth", ".ckpt", ".pkl")
    ),
    (
        "size-text",
        lambda d: load_images(d, size="28"),
        TypeError,
        r"size: expected an integer or \(height, width\), got '28'",
    ),
    ("size-zero", lambda d: load_images(d, size=0), ValueError, r"size: expected an integer >= 1, got 0"),
    (
        "channels-zero",
        lambda d: load_images(d, channels=0),
        ValueError,
        r"channels: expected an integer >= 1, got 0",
    ),
    (
        "channels-float",
        lambda d: load_images(d, channels=3.0),
        TypeError,
        r"channels: expected an integer, got 3.0",
    ),
    # npy
    (
        "npy-pickle",
        lambda d: load_images(put(d, pickle.dumps([1]), "x.npy")),
        ValueError,
        r"x.npy: expected .* plain numbers \(pickled objects are refused",
    ),
    (
        "npy-objects",
        lambda d: load_images(npy(d, np.array([{}, None]))),
        ValueError,
        r"x.npy: expected .* plain numbers \(pickled objects are refused",
    ),
    ("npy-empty", lambda d: load_images(put(d, b"", "x.npy")), ValueError, r"x.npy: .*does not read"),
    (
        "npy-cut",
        lambda d: load_images(put(d, npy(d, images(9, 8, 8)).read_bytes()[:-5], "cut.npy")),
        ValueError,
        r"cut.npy: .*does not read",
    ),
    (
        "npy-rank-2",
        lambda d: load_images(npy(d, images(60, 784))),
        ValueError,
        r"x.npy: expected an array \[N, C, H, W\].* got shape \[60, 784\]",
    ),
    (
        "npy-rank-5",
        lambda d: load_images(npy(d, images(1, 1, 1, 8, 8))),
        ValueError,
        r"x.npy: expected an array .* got shape \[1, 1, 1, 8, 8\]",
    ),
    (
        "npy-one-hwc",
        lambda d: load_images(npy(d, images(32, 32, 3))),
        ValueError,
        r"x.npy: .* grey .* may be a single image: give channels",
    ),
    (
        "npy-one-chw",
        lambda d: load_images(npy(d, images(3, 32, 32))),
        ValueError,
        r"x.npy: expected grey images .* got shape \[3, 32, 32\]",
    ),
    (
        "npy-hw1",
        lambda d: load_images(npy(d, images(32, 32, 1)), channels=1),
        ValueError,
        r"x.npy: expected grey images .* got shape \[32, 32, 1\]",
    ),
    (
        "npy-both",
        lambda d: load_images(npy(d, images(9, 3, 8, 3))),
        ValueError,
        r"x.npy: expected channels in .* both could be meant",
    ),
    (
        "npy-neither",
        lambda d: load_images(npy(d, images(9, 8, 8, 8))),
        ValueError,
        r"x.npy: .* neither could be meant: give channels=",
    ),
    (
        "npy-channels",
        lambda d: load_images(npy(d, images(9, 3, 8, 8)), channels=1),
        ValueError,
        r"x.npy: expected 1 channel in .* got shape \[9, 3, 8, 8\]",
    ),
    (
        "npy-size",
        lambda d: load_images(npy(d, images(9, 3, 8, 8)), size=(8, 9)),
        ValueError,
        r"x.npy: .* 8 x 9 \(arrays are not resized\)",
    ),
    (
        "npy-labels",
        lambda d: load_images(npy(d, images(9, 8, 8)), labels=True),
        ValueError,
        r"x.npy: expected labels too .* one array only",
    ),
    (
        "npy-int64",
        lambda d: load_images(npy(d, np.zeros((2, 8, 8), np.int64))),
        TypeError,
        r"x.npy: images: expected dtype uint8, .* got int64",
    ),
    (
        "npy-no-rows",
        lambda d: load_images(npy(d, images(0, 8, 8))),
        ValueError,
        r"x.npy: .*(at least one row|does not read)",
    ),
    (
        "npy-nan",
        lambda d: load_images(npy(d, np.full((2, 8, 8), np.nan, np.float32))),
        ValueError,
        r"x.npy: images: expected finite .* in row 0",
    ),
    (
        "npy-0-to-255",
        lambda d: load_images(npy(d, np.full((2, 8, 8), 255.0))),
        ValueError,
        r"x.npy: images: expected .* within \[-1, 1\].* \[255, 255\]",
    ),
    # npz
    (
        "npz-objects",
        lambda d: load_images(npz(d, images=np.array([{}]))),
        ValueError,
        r"x.npz: expected .* plain numbers \(pickled objects are refused",
    ),
    (
        "npz-cut",
        lambda d: load_images(put(d, npz(d, x=images(9, 8, 8)).read_bytes()[:-50], "x.npz")),
        ValueError,
        r"x.npz: expected an .npz file, which is",
    ),
    (
        "npz-pickle",
        lambda d: load_images(put(d, pickle.dumps([1]), "x.npz")),
        ValueError,
        r"x.npz: expected an .npz file, which is a zip archive",
    ),
    (
        "npz-damaged",
        lambda d: load_images(
            put(d, npz(d, x=images(9, 8, 8)).read_bytes().replace(b"NUMPY", b"NUMBY"), "x.npz")
        ),
        ValueError,
        r"x.npz: ",
    ),
    (
        "npz-is-npy",
        lambda d: load_images(put(d, npy(d, images(2, 8, 8)).read_bytes(), "x.npz")),
        ValueError,
        r"x.npz: expected an .npz file, which is a zip",
    ),
    (
        "npz-which",
        lambda d: load_images(npz(d, a=images(2, 8, 8), b=images(2, 8, 8))),
        ValueError,
        r"x.npz: expected .* named images, .* got a, b",
    ),
    (
        "npz-no-labels",
        lambda d: load_images(npz(d, images=images(2, 8, 8)), labels=True),
        ValueError,
        r"x.npz: expected .* named labels .*got none",
    ),
    (
        "npz-few-labels",
        lambda d: load_images(npz(d, images=images(2, 8, 8), labels=images(3)), labels=True),
        ValueError,
        r"x.npz: expected .* integers of shape \[2\], got uint8 of shape \[3\]",
    ),
    # idx
    (
        "idx-magic",
        lambda d: load_images(put(d, b"\x00\x00\x0d\x03" + bytes(20), "x.idx")),
        ValueError,
        r"x.idx: expected an idx file .* got 00 00 0d 03",
    ),
    (
        "idx-empty",
        lambda d: load_images(put(d, b"", "x-idx3-ubyte")),
        ValueError,
        r"x-idx3-ubyte: expected an idx file .* got an empty file",
    ),
    (
        "idx-header",
        lambda d: load_images(put(d, b"\x00\x00\x08\x03\x00", "x.idx")),
        ValueError,
        r"x.idx: expected 3 axis lengths .* got 1 bytes",
    ),
    (
        "idx-cut",
        lambda d: load_images(put(d, idx_header((2, 2, 2)) + bytes(7), "x.idx")),
        ValueError,
        r"x.idx: expected 8 bytes .* got 7",
    ),
    (
        "idx-long",
        lambda d: load_images(put(d, idx_header((2, 2, 2)) + bytes(9), "x.idx")),
        ValueError,
        r"x.idx: expected 8 bytes .* got more",
    ),
    (
        "idx-gz-long",
        lambda d: load_images(put(d, gzip.compress(idx_header((2, 2, 2)) + bytes(9)), "x.gz")),
        ValueError,
        r"x.gz: expected 8 .* got more",
    ),
    (
        "idx-gz-cut",
        lambda d: load_images(put(d, gzip.compress(idx_header((2, 2, 2)) + bytes(8))[:-9], "x.gz")),
        ValueError,
        r"x.gz: expected a whole gzip",
    ),
    (
        "idx-not-gz",
        lambda d: load_images(put(d, b"plain", "x.gz")),
        ValueError,
        r"x.gz: expected a whole gzip file",
    ),
    (
        "idx-no-rows",
        lambda d: load_images(put(d, idx_header((0, 2, 2)), "x.idx")),
        ValueError,
        r"x.idx: expected at least one entry, got shape \[0, 2, 2\]",
    ),
    (
        "idx-is-labels",
        lambda d: load_images(idx(d, images(9), "t-labels-idx1-ubyte")),
        ValueError,
        r"expected images .* shape \[9\], as of labels",
    ),
    (
        "idx-no-labels",
        lambda d: load_images(idx(d, images(9, 8, 8)), labels=True),
        ValueError,
        r"expected labels .* named like t-labels-idx1-ubyte, got none",
    ),
    # pictures
    (
        "empty-folder",
        lambda d: load_images(d),
        ValueError,
        r"expected a folder with images \((AVIF|BMP), .*\), got none in it or below it",
    ),
    (
        "sizes-differ",
        lambda d: load_images(pictures(d, a=images(*G), b=images(*G), c=images(6, 4))),
        ValueError,
        r"c.png: expected \[C, H, W\] = \[1, 4, 6\] uint8, as .*a.png \(size=.*, got \[C, H, W\] = \[1, 6, "
        r"4\] uint8",
    ),
    (
        "modes-differ",
        lambda d: load_images(pictures(d, a=images(*G), b=images(*G, 3))),
        ValueError,
        r"b.png: .* \[1, 4, 6\].* got .* \[3, 4, 6\]",
    ),
    (
        "palette",
        lambda d: load_images(picture(d, images(*G), mode="P")),
        ValueError,
        r"x.png: expected mode L or RGB, got P \(channels=1 or",
    ),
    (
        "rgba",
        lambda d: load_images(picture(d, images(*G, 3), mode="RGBA")),
        ValueError,
        r"x.png: expected mode L or RGB, got RGBA",
    ),
    (
        "16-bit",
        lambda d: load_images(picture(d, images(*G).astype(np.uint16)), channels=1),
        ValueError,
        r"x.png: expected 8 bits a channel, got 16 \(use .npy",
    ),
    (
        "4-channels",
        lambda d: load_images(picture(d, images(*G)), channels=4),
        ValueError,
        r"channels: expected 1 or 3 for encoded images, got 4",
    ),
    (
        "not-a-picture",
        lambda d: load_images(put(d, b"hello", "x.jpg")),
        ValueError,
        r"x.jpg: expected an image \(.*JPEG.*\), got text",
    ),
    (
        "cut-picture",
        lambda d: load_images(put(d, encoded(images(64, 64))[:-900], "x.png")),
        ValueError,
        r"x.png: .* got one that is damaged",
    ),
    ("frames", lambda d: load_images(frames(d)), ValueError, r"x.tiff: expected one image, got 2 frames"),
    (
        "bomb",
        lambda d: load_images(bomb(d, 3)),
        ValueError,
        r"x.png: expected at most \d+ pixels \(Pillow's limit\)",
    ),
    (
        "bomb-that-warns",
        lambda d: load_images(bomb(d, 1.5)),
        ValueError,
        r"x.png: expected at most \d+ pixels \(Pillow's limit\)",
    ),
    (
        "picture-labels",
        lambda d: load_images(picture(d, images(*G)), labels=True),
        ValueError,
        r"x.png: expected labels too .* single image",
    ),
    (
        "loose-picture",
        lambda d: load_images(picture(d, images(*G)).parent, labels=True),
        ValueError,
        r"x.png: expected every image in a sub-folder",
    ),
    # several paths
    (
        "shapes-differ",
        lambda d: load_images([npy(d, images(2, 8, 8)), npy(d, images(2, 9, 8), "y.npy")]),
        ValueError,
        r"y.npy: expected rows of shape \[1, 8, 8\], as in .*x.npy, got \[1, 9, 8\]",
    ),
    (
        "dtypes-differ",
        lambda d: load_images([npy(d, images(2, 8, 8)), npy(d, images(2, 8, 8, dtype=np.float32), "y.npy")]),
        ValueError,
        r"y.npy: expected dtype uint8, as in .*x.npy, got float32",
    ),
    (
        "split-missing",
        lambda d: load_images(put(d, b"{}", "dataset_dict.json").parent),
        ValueError,
        r"expected one split .* such as .*train, got",
    ),
]


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("call", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_refuses(call, error, text, tmp_path):
    with pytest.raises(error, match=text):
        call(tmp_path)


# Arrays

NCHW = images(5, 3, 8, 6)
LAYOUTS = {
    "nchw": (NCHW, None, NCHW),
    "nhwc": (NCHW.transpose(0, 2, 3, 1), None, NCHW),
    "grey": (NCHW[:, 0], None, NCHW[:, :1]),
    "one-grey": (NCHW[:1, 0], None, NCHW[:1, :1]),
    "nhw1": (NCHW[:, 0, :, :, None], None, NCHW[:, :1]),
    "three-grey": (NCHW[:3, 0], 1, NCHW[:3, :1]),
    "one-chw": (NCHW[0], 3, NCHW[:1]),
    "one-hwc": (NCHW[0].transpose(1, 2, 0), 3, NCHW[:1]),
    "by-channels": (images(5, 4, 8, 3), 3, images(5, 4, 8, 3).transpose(0, 3, 1, 2)),
    "sixteen": (images(5, 16, 8, 8), 16, images(5, 16, 8, 8)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_npy(layout, tmp_path):
    array, channels, expected = LAYOUTS[layout]
    store = load_images(npy(tmp_path, np.ascontiguousarray(array)), channels=channels)
    assert store.is_uint8
    assert np.array_equal(store.raw(torch.arange(len(store))).numpy(), expected)
    assert store.sources == (str(tmp_path / "x.npy"),)


@pytest.mark.parametrize("dtype", ["<f2", "<f4", "<f8", ">f4"])
def test_float_npy(dtype, tmp_path):
    array = images(4, 3, 8, 8, dtype=np.dtype(dtype))
    assert np.array_equal(load_images(npy(tmp_path, array)).images.numpy(), array)


def test_latents_npy(tmp_path):
    array = images(2, 4, 8, 8, dtype=np.float32) * 9
    store = load_images(npy(tmp_path, array), latents=True)
    assert store.latents
    assert np.array_equal(store.images.numpy(), array)


def test_npy_stays_on_disk(tmp_path):
    path = npy(tmp_path, images(5, 8, 8))
    store = load_images(path)
    with open(path, "r+b") as file:  # a store in memory would not see this
        file.seek(-1, io.SEEK_END)
        file.write(b"\x2a")
    assert store.images[4, 0, 7, 7] == 0x2A


def test_floats_in_0_to_1_are_doubted(tmp_path, caplog):
    load_images(npy(tmp_path, np.linspace(0, 1, 64).reshape(1, 8, 8)))
    (record,) = caplog.records
    assert "x.npy: 1 rows have no value below 0; floats are [-1, 1]" in record.message


def test_a_file_beside_its_folder_is_refused(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    Image.new("L", (8, 8)).save(folder / "a.png")
    for paths in ([folder, folder / "a.png"], [folder / "a.png", folder]):
        with pytest.raises(
            ValueError, match=r"paths: expected every path once, got .*a.png and a folder that it lies in"
        ):
            load_images(paths)


@pytest.mark.parametrize("other", ["{}", "{}/../{}", "link"])
def test_a_path_that_is_given_twice_is_refused(tmp_path, other):
    """Its rows would be drawn twice as often."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    path = npy(folder, images(5, 8, 8))
    (folder / "link").symlink_to(path)
    again = folder / other.replace("{}/../{}", f"../pictures/{path.name}").replace("{}", path.name)
    with pytest.raises(ValueError, match=r"paths: expected every path once, got .* a second time"):
        load_images([path, again])


@pytest.mark.parametrize("key", ["images", "arr_0", "photos"])
def test_npz(key, tmp_path):
    labels = np.arange(5, dtype=np.uint8)
    path = npz(tmp_path, labels=labels, **{key: NCHW})
    assert load_images(path).labels is None
    store = load_images(path, labels=True)
    assert np.array_equal(store.images.numpy(), NCHW)
    assert store.labels.tolist() == labels.tolist()


def test_npz_prefers_images(tmp_path):
    assert np.array_equal(load_images(npz(tmp_path, other=images(2, 2, 2), images=NCHW)).images.numpy(), NCHW)


def test_npz_key_names_the_array_of_several(tmp_path):
    path = npz(tmp_path, x_train=NCHW, x_test=NCHW[:2], labels=np.arange(5))
    with pytest.raises(ValueError, match=r"got x_train, x_test") as error:
        load_images(path)
    assert "npz_key names another" in str(error.value)
    assert np.array_equal(load_images(path, npz_key="x_train").images.numpy(), NCHW)
    assert load_images(path, npz_key="x_train", labels=True).labels.tolist() == list(range(5))
    assert np.array_equal(load_images(path, npz_key="x_test").images.numpy(), NCHW[:2])
    named_images = npz(tmp_path, "y.npz", images=NCHW, other=NCHW[:3])
    assert len(load_images(named_images, npz_key="other").images) == 3
    with pytest.raises(ValueError, match=r"x.npz: expected an array named x \(npz_key\), got x_train"):
        load_images(path, npz_key="x")
    with pytest.raises(ValueError, match=r"npz_key: expected None without a path that ends in .npz, got 'x'"):
        load_images(npy(tmp_path, NCHW), npz_key="x")
    with pytest.raises(TypeError, match=r"npz_key: expected a name, or None, got 3"):
        load_images(path, npz_key=3)


@pytest.mark.parametrize("ending", ["", ".gz"])
@pytest.mark.parametrize("name", ["t-images-idx3-ubyte", "t-images.idx3-ubyte"])
def test_idx_with_labels(name, ending, tmp_path):
    path = idx(tmp_path, NCHW[:, 0], name + ending)
    idx(
        tmp_path,
        np.arange(5, dtype=np.uint8),
        name.replace("images", "labels").replace("idx3", "idx1") + ending,
    )
    store = load_images(path, labels=True)
    assert np.array_equal(store.images.numpy(), NCHW[:, :1])
    assert store.labels.tolist() == [0, 1, 2, 3, 4]


def test_idx_of_four_axes(tmp_path):
    assert np.array_equal(load_images(idx(tmp_path, NCHW, "t-images-idx4-ubyte")).images.numpy(), NCHW)


def test_idx_gz_is_not_decompressed_beyond_what_its_header_says(tmp_path, monkeypatch):
    path = put(tmp_path, gzip.compress(idx_header((1, 2, 2)) + bytes(10**7)), "x.gz")
    taken = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda self, size=-1: taken.append(size) or read(self, size))
    with pytest.raises(ValueError, match="got more"):
        read_idx(path)
    assert max(taken) < 100
    assert min(taken) > 0


# Latents

MEAN, STD = (rows.astype(np.float32) for rows in (images(5, 4, 8, 6) / 9 - 14, images(5, 4, 8, 6) / 99))


def latents_folder(folder: Path, **arrays: np.ndarray) -> Path:
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return folder


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("labels", [False, True])
def test_latents_round_trip_and_stay_on_disk(dtype, labels, tmp_path, monkeypatch):
    monkeypatch.setattr(ImageStore.chunks, "__defaults__", (1000,))
    # not contiguous
    mean, std = (torch.from_numpy(rows).to(dtype).permute(0, 1, 3, 2) for rows in (MEAN, STD))
    store = ImageStore(mean, std=std, latents=True, labels=range(5) if labels else None)
    save_latents(tmp_path / "set" / "retain", store)
    read = load_images(tmp_path / "set" / "retain", latents=True, labels=labels)
    assert read.on_disk
    assert read.latents
    assert torch.equal(read.images, mean)
    assert torch.equal(read.std, std)
    assert read.images.dtype == read.std.dtype == dtype
    assert (read.labels.tolist() if labels else read.labels) == (list(range(5)) if labels else None)
    assert read.content_hash() == store.content_hash()
    assert (tmp_path / "set" / "retain" / "mean.npy").stat().st_mode & 0o077 == 0


def test_latents_without_std_round_trip(tmp_path):
    save_latents(tmp_path, ImageStore(MEAN, latents=True))
    read = load_images(tmp_path, latents=True)
    assert read.std is None
    assert np.array_equal(read.images.numpy(), MEAN)


def test_npz_of_mean_and_std(tmp_path):
    path = npz(tmp_path, mean=MEAN.transpose(0, 2, 3, 1), std=STD.transpose(0, 2, 3, 1), labels=np.arange(5))
    store = load_images(path, latents=True, labels=True)
    assert np.array_equal(store.images.numpy(), MEAN)
    assert np.array_equal(store.std.numpy(), STD)
    assert store.labels.tolist() == [0, 1, 2, 3, 4]


def test_folders_of_latents_are_joined(tmp_path):
    for name, rows in (("a", slice(3)), ("b", slice(3, 5))):
        save_latents(tmp_path / name, ImageStore(MEAN[rows], std=STD[rows], latents=True))
    store = load_images([tmp_path / "b", tmp_path / "a"], latents=True)
    assert np.array_equal(store.images.numpy(), MEAN[[3, 4, 0, 1, 2]])
    assert np.array_equal(store.std.numpy(), STD[[3, 4, 0, 1, 2]])


def test_a_write_that_dies_leaves_no_folder_of_latents(tmp_path, monkeypatch):
    store = ImageStore(MEAN, std=STD, latents=True)
    chunks = ImageStore.chunks
    monkeypatch.setattr(
        ImageStore,
        "chunks",
        lambda self: chunks(self) if self is not store else (_ for _ in ()).throw(KeyboardInterrupt),
    )
    with pytest.raises(KeyboardInterrupt):
        save_latents(tmp_path, store)
    assert [file.name for file in tmp_path.iterdir()] == ["std.npy"]
    with pytest.raises(ValueError, match=r"std.npy: expected an image .*, got an array"):
        load_images(tmp_path, latents=True)


LATENT_CASES = [
    (
        "images",
        lambda d: save_latents(d, ImageStore(NCHW)),
        ValueError,
        r"store: expected latents \(latents=True\), got ImageStore\(5 rows",
    ),
    (
        "tensor",
        lambda d: save_latents(d, torch.zeros(2, 4, 8, 8)),
        TypeError,
        r"store: expected an ImageStore, got float32 of shape",
    ),
    (
        "bfloat16",
        lambda d: save_latents(d, ImageStore(torch.zeros(2, 4, 8, 8).bfloat16(), latents=True)),
        TypeError,
        r"store: .* know bfloat16",
    ),
    (
        "twice",
        lambda d: save_latents(latents_folder(d, std=STD), ImageStore(MEAN, latents=True)),
        ValueError,
        r"expected a folder without latents",
    ),
    (
        "std-shape",
        lambda d: load_images(latents_folder(d, mean=MEAN, std=STD[:4]), latents=True),
        ValueError,
        r"std: expected the shape of images",
    ),
    (
        "rank",
        lambda d: load_images(latents_folder(d, mean=MEAN[0]), latents=True),
        ValueError,
        r"mean.npy: expected an array \[N, C, H, W\], got shape",
    ),
    (
        "channels",
        lambda d: load_images(latents_folder(d, mean=MEAN), latents=True, channels=16),
        ValueError,
        r"mean.npy: expected channels 16, got 4",
    ),
    (
        "size",
        lambda d: load_images(latents_folder(d, mean=MEAN), latents=True, size=8),
        ValueError,
        r"mean.npy: expected size \(8, 8\), got \(8, 6\)",
    ),
    (
        "no-labels",
        lambda d: load_images(latents_folder(d, mean=MEAN), latents=True, labels=True),
        ValueError,
        r"expected labels in labels.npy .* got none",
    ),
    (
        "pickle",
        lambda d: load_images(put(d, pickle.dumps(1), "mean.npy").parent, latents=True),
        ValueError,
        r"mean.npy: expected .* plain numbers",
    ),
    (
        "npz-not-latents",
        lambda d: load_images(npz(d, mean=MEAN, std=STD)),
        ValueError,
        r"x.npz: std: expected none, or latents=True",
    ),
    (
        "npz-std-shape",
        lambda d: load_images(npz(d, mean=MEAN, std=STD[:4]), latents=True),
        ValueError,
        r"x.npz: expected std of the shape of mean",
    ),
    (
        "one-without-std",
        lambda d: load_images([npz(d, mean=MEAN, std=STD), npz(d, "y.npz", images=MEAN)], latents=True),
        ValueError,
        r"y.npz: expected standard deviations of dtype float32, as in .*x.npz .* got None",
    ),
]


@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in LATENT_CASES]
)
def test_latents_refuse(call, error, text, tmp_path):
    with pytest.raises(error, match=text):
        call(tmp_path)


# Pictures


@pytest.mark.parametrize("ending", ["png", "bmp", "tiff", "tif"])
@pytest.mark.parametrize("channels", [1, 3])
def test_picture(ending, channels, tmp_path):
    pixels = NCHW[0, 0] if channels == 1 else NCHW[0].transpose(1, 2, 0)
    store = load_images(picture(tmp_path, pixels, f"x.{ending}"), channels=channels)
    assert store.is_uint8
    assert np.array_equal(store.images[0].numpy(), NCHW[0, :channels])


@pytest.mark.parametrize(("ending", "options"), [("jpg", {"quality": 95}), ("webp", {"lossless": True})])
def test_compressed_picture(ending, options, tmp_path):
    smooth = np.add.outer(np.arange(16), np.arange(16))[..., None].repeat(3, 2).astype(np.uint8) * 8
    store = load_images(picture(tmp_path, smooth, f"x.{ending}", **options))
    assert np.abs(store.images[0].permute(1, 2, 0).numpy().astype(int) - smooth).max() <= 4


def test_folder_is_recursive_and_sorted(tmp_path):
    for name, row in (("b/1.png", 2), ("a/2.PNG", 1), ("a/1.png", 0), ("c.png", 3)):
        picture(tmp_path, NCHW[row].transpose(1, 2, 0), name)
    store = load_images(tmp_path)
    assert np.array_equal(store.images.numpy(), NCHW[:4])
    assert store.labels is None


def test_a_large_folder_tells_that_it_is_being_read(tmp_path, monkeypatch, capsys):
    """Before the first image is decoded, and no small folder does."""
    content = encoded(images(8, 6, 3))
    (tmp_path / "many").mkdir()
    for name in range(folders.MANY):
        put(tmp_path / "many", content, f"{name}.png")
    shown = []
    decode = folders.decode

    def decode_and_look(*arguments):
        shown.append(capsys.readouterr().out)
        return decode(*arguments)

    monkeypatch.setattr(folders, "decode", decode_and_look)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 1)
    load_images(tmp_path / "many", show_progress=True)
    assert shown[0].startswith(f"reading {folders.MANY} files below {tmp_path / 'many'}\n")
    shown.clear()
    capsys.readouterr()
    load_images(tmp_path / "many")
    (tmp_path / "many" / "0.png").unlink()
    load_images(tmp_path / "many", show_progress=True)
    assert "reading" not in "".join(shown) + capsys.readouterr().out


def test_folder_names_are_labels_when_asked_for(tmp_path):
    for name in ("shoes/1.png", "bags/x/1.png", "bags/2.png"):
        picture(tmp_path, images(8, 8), name)
    assert load_images(tmp_path, labels=True).labels.tolist() == [0, 0, 1]


def test_size_crops_the_centre_then_resizes(tmp_path):
    wide = np.zeros((8, 16, 3), np.uint8)
    wide[:, 3:13] = 200  # a square crop about the centre keeps columns 4 to 11
    picture(tmp_path, wide, "a.png")
    picture(tmp_path, np.full((4, 4, 3), 100, np.uint8), "b.png")
    store = load_images(tmp_path, size=4)
    assert store.shape == (3, 4, 4)
    assert [row.unique().tolist() for row in store.images] == [[200], [100]]
    assert load_images(tmp_path, size=(2, 6)).shape == (3, 2, 6)


def test_channels_converts_modes(tmp_path):
    picture(tmp_path, np.full(G, 255, np.uint8), "a.png", mode="1")
    picture(tmp_path, np.full((*G, 3), 255, np.uint8), "b.png", mode="RGBA")
    picture(tmp_path, np.full(G, 255, np.uint8), "c.png", mode="P")
    for channels in (1, 3):
        store = load_images(tmp_path, channels=channels)
        assert store.shape == (channels, *G)
        assert store.images.unique().tolist() == [255]


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    pixels = np.zeros((8, 16), np.uint8)
    pixels[:, :8] = 255
    turned = load_images(picture(tmp_path, pixels, "x.jpg", exif=exif, quality=95)).images[0, 0]
    assert turned.shape == (16, 8)
    assert turned[:7].min() > 200
    assert turned[9:].max() < 50


# Several paths


def test_paths_are_joined_in_the_given_order(tmp_path):
    paths = [
        npz(tmp_path, images=NCHW[3:], labels=np.array([3, 4])),
        npz(tmp_path, "y.npz", images=NCHW[:2].transpose(0, 2, 3, 1), labels=np.array([0, 1])),
    ]
    store = load_images(paths, labels=True)
    assert np.array_equal(store.images.numpy(), NCHW[[3, 4, 0, 1]])
    assert store.labels.tolist() == [3, 4, 0, 1]
    assert store.sources == tuple(map(str, paths))


# Tables


def cells(rows: np.ndarray) -> list[dict]:
    return [{"bytes": encoded(row.transpose(1, 2, 0)), "path": None} for row in rows]


@needs_pyarrow
@pytest.mark.parametrize("column", ["image", "img"])
@pytest.mark.parametrize("form", ["struct", "chw-lists", "hwc-lists", "grey-lists"])
def test_parquet(column, form, tmp_path):
    given = {
        "struct": lambda: cells(NCHW),
        "chw-lists": NCHW.tolist,
        "hwc-lists": NCHW.transpose(0, 2, 3, 1).tolist,
        "grey-lists": NCHW[:, 0].tolist,
    }[form]()
    path = table(tmp_path, **{column: given, "label": [4, 3, 2, 1, 0]})
    store = load_images(path, labels=True)
    assert store.is_uint8
    assert np.array_equal(store.images.numpy(), NCHW[:, :1] if form == "grey-lists" else NCHW)
    assert store.labels.tolist() == [4, 3, 2, 1, 0]
    assert load_images(path).labels is None


@needs_datasets
def test_saved_dataset(tmp_path):
    import datasets

    rows = {"image": [Image.fromarray(row.transpose(1, 2, 0)) for row in NCHW], "label": list(range(5))}
    datasets.DatasetDict(train=datasets.Dataset.from_dict(rows).select([4, 0, 2])).save_to_disk(
        tmp_path / "set"
    )
    store = load_images(tmp_path / "set" / "train", labels=True)
    assert np.array_equal(store.images.numpy(), NCHW[[4, 0, 2]])
    assert store.labels.tolist() == [4, 0, 2]
    with pytest.raises(
        ValueError, match=r"set: expected one split of the saved data set, such as .*set.train, got"
    ):
        load_images(tmp_path / "set")


HF_CASES = [
    (
        "not-parquet",
        lambda d: load_images(put(d, b"PAR1", "x.parquet")),
        ValueError,
        r"x.parquet: expected a parquet file",
    ),
    (
        "column",
        lambda d: load_images(table(d, photo=[1])),
        ValueError,
        r"x.parquet: expected a column image or img, got photo",
    ),
    (
        "label-column",
        lambda d: load_images(table(d, image=cells(NCHW)), labels=True),
        ValueError,
        r"x.parquet: expected a column label .* got image",
    ),
    (
        "no-rows",
        lambda d: load_images(table(d, image=[])),
        ValueError,
        r"x.parquet: expected at least one row, got none",
    ),
    (
        "only-a-path",
        lambda d: load_images(table(d, image=[{"bytes": None, "path": "/etc/passwd"}])),
        ValueError,
        r"row 0: expected .* got only a path",
    ),
    (
        "numbers",
        lambda d: load_images(table(d, image=[1, 2])),
        ValueError,
        r"row 0: expected an encoded image or nested lists of numbers, got int",
    ),
    (
        "large-numbers",
        lambda d: load_images(table(d, image=[[[0, 256]]])),
        ValueError,
        r"row 0: expected integers in \[0, 255\], got \[0, 256\]",
    ),
    (
        "ragged",
        lambda d: load_images(table(d, image=[[[0, 1], [2]]])),
        ValueError,
        r"row 0: expected nested lists of one length an axis",
    ),
    (
        "bad-bytes",
        lambda d: load_images(table(d, image=[b"hello"])),
        ValueError,
        r"x.parquet row 0: expected an image",
    ),
    (
        "text-label",
        lambda d: load_images(table(d, image=cells(NCHW[:1]), label=["cat"]), labels=True),
        ValueError,
        r"row 0: .* integer label, got 'cat'",
    ),
]


@needs_pyarrow
@pytest.mark.parametrize(
    ("call", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in HF_CASES]
)
def test_tables_refuse(call, error, text, tmp_path):
    with pytest.raises(error, match=text):
        call(tmp_path)


def test_missing_package_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ImportError, match=r'x.parquet: expected the package pyarrow .*\(pip install "fastunlearn\[hf\]"\)'
    ):
        load_images(put(tmp_path, b"PAR1", "x.parquet"))
