"""Exact 10 nearest neighbours of 1,000 MNIST digits among 59,000, against scikit-learn's brute force and faiss' IndexFlatL2.

Data: the digits of the MNIST T-Shirt set, `$FASTUNLEARN_MNIST` (an .npz with `images`) or ../shared/data; without them random
blobs of the same size and range, and the benchmark's name says "synthetic". Every timing is taken after its result was checked.

The contestants take turns within one process, so that a busy machine slows all of them: the ratios of the medians are what to quote.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastunlearn.neighbors import nearest_neighbors

DIGITS = Path(os.environ.get("FASTUNLEARN_MNIST", Path(__file__).parents[2] / "shared" / "data" / "mnist_tshirt_train.npz"))
SOURCE = "mnist" if DIGITS.exists() else "synthetic"
K = 10
ROUNDS = 7


@pytest.fixture(scope="module")
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """forget uint8 `[1000, 784]`, retain uint8 `[59000, 784]`."""
    if SOURCE == "mnist":
        images = np.load(DIGITS)["images"][:60_000].reshape(60_000, -1)
    else:
        generator = np.random.default_rng(0)
        coarse = generator.integers(0, 256, (60_000, 1, 7, 7)).astype(np.uint8)
        images = np.kron(coarse, np.ones((4, 4), np.uint8)).reshape(60_000, -1)
    images = torch.from_numpy(images)
    return images[59_000:].clone(), images[:59_000].clone()


def scikit_learn(forget: np.ndarray, retain: np.ndarray) -> np.ndarray:
    from sklearn.neighbors import NearestNeighbors

    return NearestNeighbors(n_neighbors=K, algorithm="brute").fit(retain).kneighbors(forget)[1]


def faiss_flat(forget: np.ndarray, retain: np.ndarray) -> np.ndarray:
    import faiss

    index = faiss.IndexFlatL2(retain.shape[1])
    index.add(retain)
    return index.search(forget, K)[1]


@pytest.fixture(scope="module")
def contestants(rows) -> dict[str, Callable[[], np.ndarray]]:
    forget, retain = rows
    forget32, retain32 = forget.float().numpy(), retain.float().numpy()  # the baselines take float32; the conversion is not timed
    return {
        "fastunlearn": lambda: nearest_neighbors(forget, retain, K)[0].numpy(),
        "scikit-learn": lambda: scikit_learn(forget32, retain32),
        "faiss": lambda: faiss_flat(forget32, retain32),
    }


@pytest.fixture(scope="module", autouse=True)
def gate(rows, contestants) -> None:
    """No timing without the right answer: our distances are the integers of a direct evaluation, ascending, and no contestant finds a nearer row."""
    forget, retain = rows
    index, sqdist = nearest_neighbors(forget, retain, K)
    for position in range(0, len(forget), 50):
        distances = (retain.int() - forget[position].int()).square_().sum(1)
        expected = (distances.long() * len(retain) + torch.arange(len(retain))).topk(K, largest=False).values
        assert torch.equal(sqdist[position] * len(retain) + index[position], expected)
    for name, search in contestants.items():
        found = torch.from_numpy(search())
        theirs = torch.stack([(retain[found[:, j]].int() - forget.int()).square().sum(1) for j in range(K)], 1)
        assert torch.equal(theirs.sort(1).values, sqdist), name


@pytest.mark.parametrize("name", ["fastunlearn", "scikit-learn", "faiss"])
def test_neighbors(benchmark, contestants, threads, name: str):
    benchmark.group = f"10 neighbours of 1,000 rows among 59,000, {SOURCE}"
    benchmark.extra_info.update(rows=SOURCE, threads=threads)
    benchmark.pedantic(contestants[name], rounds=3, iterations=1)


def test_ratio_of_alternating_medians(benchmark, contestants, threads):
    """The row to quote: `extra_info` holds the medians of runs that took turns, and how many times longer each baseline takes."""
    seconds: dict[str, list[float]] = {name: [] for name in contestants}

    def one_round() -> None:
        for name, search in contestants.items():
            started = time.perf_counter()
            search()
            seconds[name].append(time.perf_counter() - started)

    benchmark.group = f"one round of all three, alternating, {SOURCE}"
    benchmark.pedantic(one_round, rounds=ROUNDS, iterations=1)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    ratios = {f"{name} / fastunlearn": medians[name] / medians["fastunlearn"] for name in ("scikit-learn", "faiss")}
    benchmark.extra_info.update(rows=SOURCE, threads=threads, medians=medians, **ratios)
    print("\n", {name: round(value, 3) for name, value in (medians | ratios).items()})
