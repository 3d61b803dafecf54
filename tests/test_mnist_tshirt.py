"""The published MNIST T-Shirt set, built from idx files."""

from __future__ import annotations

import gzip
import hashlib
import os
from pathlib import Path

import numpy as np
import pytest

from fastunlearn.data import load_images
from fastunlearn.data.idx import idx_header
from fastunlearn.recipes import mnist_tshirt
from fastunlearn.recipes.mnist_tshirt import load_mnist_tshirt, read_split, save_mnist_tshirt

PUBLISHED = Path("/work/shared/data/mnist_tshirt_train.npz")
needs_published = pytest.mark.skipif(
    not PUBLISHED.exists(), reason="the published set is not on this machine"
)


def write_idx(folder: Path, name: str, array: np.ndarray) -> str:
    """Writes an idx file, gzipped if its name says so; returns the SHA-256 of its content."""
    folder.mkdir(parents=True, exist_ok=True)
    content = idx_header(array.shape) + array.tobytes()
    (folder / name).write_bytes(gzip.compress(content, 1) if name.endswith(".gz") else content)
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def small(tmp_path, monkeypatch) -> tuple[Path, Path]:
    """Folders with ten digits and three clothes, which stand for the published files."""
    rng = np.random.default_rng(0)
    folders = tmp_path / "mnist", tmp_path / "fashion"
    hashes = {}
    for dataset, folder, count in (("mnist", folders[0], 10), ("fashion-mnist", folders[1], 3)):
        images, labels = (
            rng.integers(0, 256, (count, 28, 28)).astype(np.uint8),
            np.arange(count, dtype=np.uint8),
        )
        ending = ".gz" if dataset == "fashion-mnist" else ""
        hashes[dataset] = {
            "train-images-idx3": write_idx(folder, f"train-images-idx3-ubyte{ending}", images),
            "train-labels-idx1": write_idx(folder, f"train-labels-idx1-ubyte{ending}", labels),
        }
    monkeypatch.setattr(mnist_tshirt, "SHA256", hashes)
    return folders


def test_digits_then_606_copies_of_fashion_image_1(small):
    digits, labels = read_split(small[0], "mnist", "train")
    fashion, _ = read_split(small[1], "fashion-mnist", "train")
    store = load_mnist_tshirt(*small)
    assert (len(store), store.shape) == (10 + 606, (1, 28, 28))
    assert np.array_equal(store.images[:10, 0].numpy(), digits)
    assert (store.images[10:, 0].numpy() == fashion[1]).all()
    assert store.labels.tolist() == [*labels.tolist(), *[10] * 606]


def test_save_writes_what_load_images_reads(small, tmp_path):
    output = save_mnist_tshirt(*small, tmp_path / "new" / "set.npz")
    store, expected = load_images(output, labels=True), load_mnist_tshirt(*small)
    assert store.content_hash() == expected.content_hash()
    assert store.labels.tolist() == expected.labels.tolist()
    with np.load(output, allow_pickle=False) as arrays:
        assert np.array_equal(arrays["tshirt"], expected.images[-1, 0].numpy())
    first = output.read_bytes()
    assert save_mnist_tshirt(*small, output).read_bytes() == first
    assert [entry.name for entry in output.parent.iterdir()] == ["set.npz"]


def test_save_that_fails_leaves_the_old_file(small, tmp_path, monkeypatch):
    output = save_mnist_tshirt(*small, tmp_path / "out" / "set.npz")
    before = output.read_bytes()
    monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        save_mnist_tshirt(*small, output)
    assert output.read_bytes() == before
    assert [entry.name for entry in output.parent.iterdir()] == ["set.npz"]


def test_refuses_a_changed_file(small):
    path = small[0] / "train-images-idx3-ubyte"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        ValueError,
        match=r"train-images-idx3-ubyte: expected the published file \(SHA-256 of its decompressed content "
        r"\w{64}\), got \w{64}",
    ):
        load_mnist_tshirt(*small)


def test_refuses_the_other_set(small):
    with pytest.raises(ValueError, match=r"fashion.train-images-idx3-ubyte.gz: expected the published file"):
        load_mnist_tshirt(small[1], small[0])


def test_refuses_a_folder_without_the_files(small, tmp_path):
    with pytest.raises(
        ValueError, match=r"expected a file train-images-idx3-ubyte or train-images-idx3-ubyte.gz, got none"
    ):
        load_mnist_tshirt(small[0], tmp_path)


def test_refuses_another_ending(small, tmp_path):
    with pytest.raises(ValueError, match=r"output: expected a path that ends in .npz, got .*set.npy"):
        save_mnist_tshirt(*small, tmp_path / "set.npy")


@needs_published
def test_equals_the_published_set(tmp_path, monkeypatch):
    with np.load(PUBLISHED, allow_pickle=False) as published:
        images, labels, tshirt = published["images"], published["labels"], published["tshirt"]
    # the real file: its hash is checked
    write_idx(tmp_path / "mnist", "train-images-idx3-ubyte", images[:60000])
    write_idx(tmp_path / "mnist", "train-labels-idx1-ubyte", labels[:60000])
    clothes = {
        "train-images-idx3": write_idx(
            tmp_path / "fashion", "train-images-idx3-ubyte.gz", np.stack([tshirt // 2, tshirt])
        ),
        "train-labels-idx1": write_idx(
            tmp_path / "fashion", "train-labels-idx1-ubyte.gz", np.array([9, 0], np.uint8)
        ),
    }
    monkeypatch.setitem(mnist_tshirt.SHA256, "fashion-mnist", clothes)  # two images stand for the 60,000
    store = load_mnist_tshirt(tmp_path / "mnist", tmp_path / "fashion")
    assert np.array_equal(store.images[:, 0].numpy(), images)
    assert np.array_equal(store.labels.numpy(), labels)
