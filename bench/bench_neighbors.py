"""Exact 10 nearest neighbours of 1,000 MNIST digits among 59,000, against scikit-learn's brute force and
faiss' IndexFlatL2.

Data: the digits of the MNIST T-Shirt set, `$FASTUNLEARN_MNIST` (an .npz with `images`) or ../shared/data;
without them random blobs of the same size and range, and the benchmark's name says "synthetic". Every timing
is taken after its result was checked.

The contestants take turns within one process, so that a busy machine slows all of them: the ratios of the
medians are what to quote.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor

from fastunlearn.neighbors.nearest import nearest_neighbors

from .comparison import Row

DIGITS = Path(
    os.environ.get(
        "FASTUNLEARN_MNIST", Path(__file__).parents[2] / "shared" / "data" / "mnist_tshirt_train.npz"
    )
)
SOURCE = "mnist" if DIGITS.exists() else "synthetic"
K = 10
ROUNDS = 7
OURS = "fastunlearn"
CASES = [("uint8", 1000), ("uint8", 16), ("float32", 1000)]  # kind of rows, forget rows


def ours(forget: Tensor, retain: Tensor, backend: str = "exact", arithmetic: str = "kernels") -> Tensor:
    """Without the extension this fails: plain torch is not timed under the kernel's name."""
    with mock.patch.dict(os.environ, FASTUNLEARN_BACKEND=arithmetic):
        return nearest_neighbors(forget, retain, K, backend=backend)[0]


def scikit_learn(forget: Tensor, retain: Tensor) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    return (
        NearestNeighbors(n_neighbors=K, algorithm="brute").fit(retain.numpy()).kneighbors(forget.numpy())[1]
    )


def faiss_flat(forget: Tensor, retain: Tensor) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(retain.shape[1])
    index.add(retain.numpy())
    return index.search(forget.numpy(), K)[1]


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    """forget uint8 `[1000, 784]`, retain uint8 `[59000, 784]`."""
    if SOURCE == "mnist":
        images = np.load(DIGITS)["images"][:60_000].reshape(60_000, -1)
    else:
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (60_000, 1, 7, 7)).astype(np.uint8)
        images = np.kron(coarse, np.ones((4, 4), np.uint8)).reshape(60_000, -1)
    images = torch.from_numpy(images)
    return images[59_000:].clone(), images[:59_000].clone()


def contestants(forget: Tensor, retain: Tensor, kind: str) -> dict[str, Callable[[], Tensor | np.ndarray]]:
    """The search of `kind` rows; the baselines take float32, and the conversion is not timed."""
    floats = forget.float(), retain.float()
    given = (forget, retain) if kind == "uint8" else floats
    found = {
        OURS: partial(ours, *given),
        "fastunlearn, faiss backend": partial(ours, *given, backend="faiss"),
    }
    if kind == "uint8":
        found["fastunlearn, plain torch"] = partial(ours, *given, arithmetic="eager")
    return found | {"scikit-learn": partial(scikit_learn, *floats), "faiss": partial(faiss_flat, *floats)}


def gate(forget: Tensor, retain: Tensor, searches: dict[str, Callable[[], Tensor | np.ndarray]]) -> None:
    """No timing without the right answer: ours is that of a direct evaluation in integers, ties in order, and
    no contestant finds a nearer row.
    """
    index = searches[OURS]()
    for position in range(0, len(forget), 50):
        distances = (retain.int() - forget[position].int()).square_().sum(1)
        expected = (distances.long() * len(retain) + torch.arange(len(retain))).topk(K, largest=False).values
        assert torch.equal(distances[index[position]] * len(retain) + index[position], expected)
    sqdist = distances_to(forget, retain, index)
    for name, search in searches.items():
        found = torch.as_tensor(search())
        assert torch.equal(distances_to(forget, retain, found).sort(1).values, sqdist), name
        if name.startswith(OURS):
            assert torch.equal(found, index), name


def distances_to(forget: Tensor, retain: Tensor, index: Tensor) -> Tensor:
    return torch.stack([(retain[index[:, j]].int() - forget.int()).square().sum(1) for j in range(K)], 1)


@pytest.mark.parametrize(("kind", "num_forget"), CASES)
def test_neighbors(benchmark, digits, threads, journal, kind: str, num_forget: int):
    """A row for each contestant: medians of runs that took turns."""
    forget, retain = digits[0][:num_forget], digits[1]
    searches = contestants(forget, retain, kind)
    gate(forget, retain, searches)
    seconds: dict[str, list[float]] = {name: [] for name in searches}

    def one_round() -> None:
        for name, search in searches.items():
            started = time.perf_counter()
            search()
            seconds[name].append(time.perf_counter() - started)

    benchmark.group = (
        f"one round of all, {K} neighbours of {num_forget:,} {kind} rows among {len(retain):,}, {SOURCE}"
    )
    benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    shape = f"{num_forget} x {len(retain)} x {retain.shape[1]}"
    journal.add(
        Row(
            *("nearest_neighbors", shape, f"{kind}, K {K}, {SOURCE}", name, "C++" if name == OURS else ""),
            seconds=median,
            best=min(seconds[name]),
            samples=ROUNDS,
            times_faster={other: value / median for other, value in medians.items() if other != name},
        )
        for name, median in medians.items()
    )
    ratios = {f"{name} / {OURS}": value / medians[OURS] for name, value in medians.items() if name != OURS}
    # the floor: a multiplication and an addition for each pair of values
    operations = 2 * len(forget) * retain.numel()
    benchmark.extra_info.update(
        source=SOURCE,
        threads=threads,
        medians=medians,
        operations_per_second=operations / medians[OURS],
        **ratios,
    )
    print(
        f"\n{benchmark.group}:", {name: float(f"{value:.3g}") for name, value in (medians | ratios).items()}
    )
