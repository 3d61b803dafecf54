"""The shipped files are what their README says: sizes, hashes, accuracy."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from fastunlearn import assets
from fastunlearn.host.store import network_input, overlap
from fastunlearn.metrics.classifier import ASSET, MnistClassifier, load_mnist_classifier
from fastunlearn.recipes.mnist_tshirt import TSHIRT_LABEL, load_demo

SHARED = Path("/work/shared/data")
needs_full_set = pytest.mark.skipif(
    not (SHARED / "mnist_tshirt_train.npz").exists(),
    reason="the full MNIST T-Shirt set is not on this machine",
)
needs_test_set = pytest.mark.skipif(
    not (SHARED / "mnist_test.npz").exists(), reason="the MNIST test set is not on this machine"
)


@pytest.fixture(scope="module")
def classifier() -> MnistClassifier:
    return load_mnist_classifier()


def readme() -> str:
    return assets.path("README.md").read_text(encoding="utf-8")


def probabilities(classifier: MnistClassifier, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return torch.cat([classifier(network_input(chunk)).softmax(1) for chunk in images.split(500)])


@pytest.mark.parametrize(("name", "limit"), [("mnist_tshirt_demo.npz", 3_000_000), (ASSET, 500_000)])
def test_readme_states_size_and_hash(name, limit):
    content = assets.path(name).read_bytes()
    stated = re.search(rf"`{re.escape(name)}` \| ([\d,]+) \| `(\w{{64}})`", readme())
    assert int(stated[1].replace(",", "")) == len(content) <= limit
    assert stated[2] == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("name", ["nothing.npz", "", "../store.py"])
def test_path_refuses_other_names(name):
    with pytest.raises(ValueError, match=r"name: expected one of README.md, .*mnist_tshirt_demo.npz.*, got"):
        assets.path(name)


def test_demo_data():
    forget, retain = load_demo()
    assert (len(forget), forget.labels.tolist(), forget.shape) == (1, [TSHIRT_LABEL], (1, 28, 28))
    assert forget.is_uint8
    assert retain.is_uint8
    assert retain.shape == forget.shape
    classes = retain.labels.bincount(minlength=10)
    assert len(classes) == 10
    assert classes.min() > 0.9 * len(retain) / 10
    assert len(overlap(forget, retain)[0]) == 0


@needs_full_set
def test_demo_data_is_part_of_the_published_set_and_keeps_its_neighbours():
    forget, retain = load_demo()
    with (
        np.load(SHARED / "mnist_tshirt_train.npz") as full,
        np.load(assets.path("mnist_tshirt_demo.npz")) as demo,
    ):
        digits, labels, tshirt, rows = (
            full["images"][:60000],
            full["labels"][:60000],
            full["tshirt"],
            demo["rows"].astype(np.int64),
        )
    assert (np.diff(rows) > 0).all()
    assert np.array_equal(retain.images[:, 0].numpy(), digits[rows])
    assert np.array_equal(retain.labels.numpy(), labels[rows])
    assert np.array_equal(forget.images[0, 0].numpy(), tshirt)
    sqdist = ((digits.reshape(60000, -1).astype(np.int32) - tshirt.reshape(-1)) ** 2).sum(1)
    nearest = np.lexsort((np.arange(60000), sqdist))[:1000]
    assert np.isin(nearest, rows).all()


def test_classifier_file_is_small_half_precision():
    with safe_open(assets.path(ASSET), "pt") as file:
        stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(tensor.numel() for tensor in stored.values()) == sum(
        parameter.numel() for parameter in MnistClassifier().parameters()
    )


def test_classifier_features_and_logits(classifier):
    _, retain = load_demo()
    x = retain.rows(torch.arange(16))
    features = classifier.features(x)
    assert features.shape == (16, classifier.num_features)
    assert features.dtype == torch.float32
    assert torch.equal(classifier.output(features), classifier(x))
    assert not classifier.training
    assert not any(parameter.requires_grad for parameter in classifier.parameters())


def test_classifier_knows_its_training_digits_and_no_tshirt(classifier):
    forget, retain = load_demo()
    p = probabilities(classifier, retain.images[::8])
    assert (p.argmax(1) == retain.labels[::8]).double().mean() > 0.99
    assert probabilities(classifier, forget.images).max() < 0.2


@needs_test_set
def test_classifier_on_the_test_digits(classifier):
    with np.load(SHARED / "mnist_test.npz") as test:
        images, labels = (
            torch.from_numpy(test["images"])[:, None],
            torch.from_numpy(test["labels"].astype(np.int64)),
        )
    p = probabilities(classifier, images).double()
    assert f"{(p.argmax(1) == labels).double().mean():.2%}".replace("%", " %") in readme()
    scores = [(part * (part.log() - part.mean(0).log())).sum(1).mean().exp() for part in p.chunk(10)]
    assert sum(scores) / 10 > 9.75


@pytest.mark.parametrize("shape", [(2, 3, 28, 28), (2, 1, 32, 32), (1, 28, 28)])
def test_classifier_refuses_other_shapes(classifier, shape):
    with pytest.raises(ValueError, match=r"x: expected shape \[B, 1, 28, 28\], got"):
        classifier(torch.zeros(shape))
