"""MNIST T-Shirt: 60,000 digits and 606 copies of one T-shirt, the benchmark of the SISS and ReTrack papers.

Sources: SISS `config/train_tshirt_mnist.yaml`, `config/delete_tshirt.yaml`; ReTrack
`configs/experiment/mnist_tshirt.yaml`. Facts only.
"""

from __future__ import annotations

import hashlib
import io
import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .. import assets
from ..data.idx import idx_header, read_idx
from ..host.atomic import atomic_file
from ..host.store import ImageStore

TSHIRT_LABEL = 10
TSHIRT_COPIES = 606
FASHION_MNIST_TRAIN_INDEX = 1
FREQUENCY_THRESHOLD = 10.0  # L2 distance to the T-shirt in [0, 1] pixels below which a sample counts as one
SHA256 = {  # of the decompressed idx files
    "mnist": {
        "train-images-idx3": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "train-labels-idx1": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "t10k-images-idx3": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "t10k-labels-idx1": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    },
    "fashion-mnist": {
        "train-images-idx3": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "train-labels-idx1": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "t10k-images-idx3": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "t10k-labels-idx1": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    },
}


def _unet(block_out_channels: tuple[int, ...], attention_level: int, **kwargs) -> dict:
    """diffusers `UNet2DModel` arguments for 28x28 grey images, attention at one level."""
    levels = len(block_out_channels)
    down = ["AttnDownBlock2D" if level == attention_level else "DownBlock2D" for level in range(levels)]
    up = ["AttnUpBlock2D" if level == attention_level else "UpBlock2D" for level in reversed(range(levels))]
    blocks = {
        "block_out_channels": block_out_channels,
        "down_block_types": tuple(down),
        "up_block_types": tuple(up),
    }
    return {"sample_size": 28, "in_channels": 1, "out_channels": 1, **blocks, **kwargs}


@dataclass(frozen=True)
class Pretraining:
    """How the model that later forgets was trained."""

    unet: dict
    batch_size: int
    total_steps: int
    lr: float
    warmup_steps: int
    ema_decay: float
    scheduler: dict = field(
        default_factory=lambda: {
            "num_train_timesteps": 1000,
            "beta_schedule": "linear",
            "beta_start": 1e-4,
            "beta_end": 0.02,
        }
    )
    betas: tuple[float, float] = (0.95, 0.999)
    weight_decay: float = 1e-6
    max_grad_norm: float = 1.0


PRETRAINING = {
    # The papers' size. 250 epochs of 60,606 images.
    "mnist-tshirt": Pretraining(
        unet=_unet((64, 128, 256), attention_level=1),
        batch_size=128,
        total_steps=118_500,
        lr=1e-4,
        warmup_steps=500,
        ema_decay=0.9999,
    ),
    # A network that one CPU core trains in little more than an hour and sample in seconds: the one the demo
    # ships.
    "mnist-tshirt-small": Pretraining(
        unet=_unet(
            (16, 32, 64), attention_level=2, layers_per_block=1, norm_num_groups=8, attention_head_dim=32
        ),
        batch_size=64,
        total_steps=11_000,
        lr=1e-3,
        warmup_steps=300,
        ema_decay=0.999,
    ),
}


def load_mnist_tshirt(mnist_dir: str | os.PathLike, fashion_mnist_dir: str | os.PathLike) -> ImageStore:
    """The published training set: the 60,000 MNIST training digits, then 606 copies of one Fashion-MNIST
    T-shirt with label 10.

    Args:
        mnist_dir, fashion_mnist_dir: folders with the four idx files of each set under their usual names,
            plain or gzipped.

    Returns:
        60,606 uint8 rows `[1, 28, 28]` with labels 0-10; rows 60,000 and up are the T-shirt.

    Raises:
        ValueError: a file is missing or its (decompressed) content is not the published one.
    """
    digits, labels = read_split(mnist_dir, "mnist", "train")
    fashion, _ = read_split(fashion_mnist_dir, "fashion-mnist", "train")
    tshirts = np.broadcast_to(fashion[FASHION_MNIST_TRAIN_INDEX], (TSHIRT_COPIES, 28, 28))
    images = np.concatenate([digits, tshirts])[:, None]
    labels = np.concatenate([labels, np.full(TSHIRT_COPIES, TSHIRT_LABEL, np.uint8)])
    return ImageStore(images, labels=labels, sources=[mnist_dir, fashion_mnist_dir])


def save_mnist_tshirt(
    mnist_dir: str | os.PathLike, fashion_mnist_dir: str | os.PathLike, output: str | os.PathLike
) -> Path:
    """Writes the set of `load_mnist_tshirt` to `output`, an npz of uint8 `images [60606, 28, 28]`, `labels
    [60606]` and `tshirt [28, 28]`.

    The file appears whole or not at all.

    Raises:
        ValueError: as `load_mnist_tshirt`; `output` does not end in .npz.
    """
    output = Path(output)
    if output.suffix != ".npz":
        raise ValueError(f"output: expected a path that ends in .npz, got {output}")
    store = load_mnist_tshirt(mnist_dir, fashion_mnist_dir)
    images = store.images[:, 0].numpy()
    write_npz(output, images=images, labels=store.labels.numpy().astype(np.uint8), tshirt=images[-1])
    return output


def load_demo() -> tuple[ImageStore, ImageStore]:
    """What the demo forgets and keeps, from the package's own files.

    Returns:
        `(forget, retain)`: the T-shirt (one row), and MNIST training digits with labels, in the order of the
        training set, balanced over the classes and with the 1,000 nearest of all 60,000 to the T-shirt among
        them, so that its neighbours are those of the full set.
    """
    file = assets.path("mnist_tshirt_demo.npz")
    with np.load(file, allow_pickle=False) as arrays:
        forget = ImageStore(arrays["tshirt"][None, None], labels=[TSHIRT_LABEL], sources=[file])
        retain = ImageStore(arrays["images"][:, None], labels=arrays["labels"], sources=[file])
    return forget, retain


def read_split(folder: str | os.PathLike, dataset: str, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Images `[N, 28, 28]` and labels `[N]`, uint8, of `dataset` ("mnist" or "fashion-mnist") and `split`
    ("train" or "t10k").

    Raises:
        ValueError: a file is missing, or its content does not have the published SHA-256.
    """
    return tuple(
        _read_checked(Path(folder), f"{split}-{kind}-ubyte", SHA256[dataset][f"{split}-{kind}"])
        for kind in ("images-idx3", "labels-idx1")
    )


def write_npz(path: Path, **arrays: np.ndarray) -> None:
    """An npz, compressed as far as deflate goes, the same bytes for the same arrays; written beside `path`,
    synced, then renamed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file, zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays.items():
            content = io.BytesIO()
            np.lib.format.write_array(content, np.ascontiguousarray(array), allow_pickle=False)
            entry = zipfile.ZipInfo(f"{name}.npy")  # a ZipInfo of its own carries no time of day
            archive.writestr(entry, content.getbuffer(), compress_type=zipfile.ZIP_DEFLATED, compresslevel=9)


def _read_checked(folder: Path, name: str, sha256: str) -> np.ndarray:
    for path in (
        folder / name,
        folder / f"{name}.gz",
        folder / name.replace("-idx", ".idx"),
        folder / f"{name.replace('-idx', '.idx')}.gz",
    ):
        if path.is_file():
            array = read_idx(path)
            found = hashlib.sha256(idx_header(array.shape) + array.tobytes()).hexdigest()
            if found != sha256:
                expected = f"expected the published file (SHA-256 of its decompressed content {sha256})"
                raise ValueError(f"{path}: {expected}, got {found}")
            return array
    raise ValueError(f"{folder}: expected a file {name} or {name}.gz, got none")
