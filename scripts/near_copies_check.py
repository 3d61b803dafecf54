"""How many planted copies `near_copies` finds, and how many images of a clean set it takes for copies.

    python scripts/near_copies_check.py --name MNIST --images mnist.npz --output result.json

`--images` is an .npz with an array `images`, uint8 `[N, H, W]` or `[N, H, W, C]`; `--rows` takes the first of
them. For every seed, `--forget` rows are taken out at random as the images to forget; the others are the
images to keep.

- clean: these two sets as they are; a forget row of which a copy is found counts as a false alarm.
- planted: one copy of every forget row, of one class of copies in turn, replaces a row among those to keep.
"""

from __future__ import annotations

import argparse
import io
import json
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastunlearn.host.store import ImageStore
from fastunlearn.neighbors.copies import near_copies

FILTERS = ("BILINEAR", "BICUBIC", "LANCZOS", "BOX", "HAMMING", "NEAREST")
LIMITS = {"found": 0.99, "false_alarms": 0.001}


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))


def pixels(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def jpeg(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Of a quality from 60 to 95."""
    file = io.BytesIO()
    picture(image).save(file, "JPEG", quality=int(random.integers(60, 96)))
    return pixels(Image.open(file))


def resized(image: np.ndarray, random: np.random.Generator, name: str) -> np.ndarray:
    """By a factor from 0.5 to 2, as likely below 1 as above, and back."""
    before, scale = picture(image), 2.0 ** random.uniform(-1, 1)
    size = tuple(max(1, round(side * scale)) for side in before.size)
    return pixels(before.resize(size, Image.Resampling[name]).resize(before.size, Image.Resampling[name]))


def turned(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """In one of the seven other orientations."""
    number = random.integers(1, 8)
    image = np.rot90(image, number % 4, axes=(1, 2))
    return image[:, :, ::-1] if number >= 4 else image


def combined(image: np.ndarray, random: np.random.Generator) -> np.ndarray:
    return jpeg(turned(resized(image, random, str(random.choice(FILTERS[:5]))), random), random)


COPIES = {
    "jpeg": jpeg,
    "turned": turned,
    **{
        f"resized, {name.lower()}": lambda image, random, name=name: resized(image, random, name)
        for name in FILTERS
    },
    "resized, turned, jpeg": combined,
}


def planted(images: np.ndarray, forget: np.ndarray, retain: np.ndarray, seed: int) -> tuple[dict, int, float]:
    """Per class `[found, planted]`; pairs found that were not planted; seconds."""
    random, kept, classes = np.random.default_rng(seed), images[retain], list(COPIES)
    for number, row in enumerate(forget):
        kept[number] = COPIES[classes[number % len(classes)]](images[row], random)
    started = time.perf_counter()
    found = near_copies(ImageStore(images[forget]), ImageStore(kept))
    seconds = time.perf_counter() - started
    pairs = set(zip(found.forget_rows.tolist(), found.retain_rows.tolist(), strict=True))
    numbers = range(len(forget))
    counts = Counter(classes[number % len(classes)] for number in numbers if (number, number) in pairs)
    totals = Counter(classes[number % len(classes)] for number in numbers)
    others = sum(forget_row != retain_row for forget_row, retain_row in pairs)
    return {name: [counts[name], totals[name]] for name in classes}, others, seconds


def clean(images: np.ndarray, forget: np.ndarray, retain: np.ndarray) -> tuple[list, float]:
    """`[row of images, row of images, distance]` of every pair that is found, and the seconds."""
    started = time.perf_counter()
    found = near_copies(ImageStore(images[forget]), ImageStore(images[retain]))
    seconds = time.perf_counter() - started
    columns = (
        forget[found.forget_rows.numpy()],
        retain[found.retain_rows.numpy()],
        found.distances.numpy().round(1),
    )
    return [list(pair) for pair in zip(*(column.tolist() for column in columns), strict=True)], seconds


def measure(images: np.ndarray, num_forget: int, clean_seeds: list[int], planted_seeds: list[int]) -> dict:
    result: dict = {"clean": {}, "planted": {}}
    for seed in sorted({*clean_seeds, *planted_seeds}):
        order = np.random.default_rng(seed).permutation(len(images))
        forget, retain = order[:num_forget], order[num_forget:]
        if seed in clean_seeds:
            pairs, seconds = clean(images, forget, retain)
            alarms = len({pair[0] for pair in pairs})
            result["clean"][seed] = {"false_alarms": alarms, "pairs": pairs, "seconds": round(seconds, 1)}
        if seed in planted_seeds:
            by_class, others, seconds = planted(images, forget, retain, seed)
            counts = {"found": by_class, "not_planted": others, "seconds": round(seconds, 1)}
            result["planted"][seed] = counts
        print(seed, json.dumps({part: runs.get(seed) for part, runs in result.items()}), flush=True)
    runs = result["clean"].values()
    found, total = np.sum(
        [counts for run in result["planted"].values() for counts in run["found"].values()], axis=0
    )
    result["false_alarms"] = sum(run["false_alarms"] for run in runs) / max(1, num_forget * len(runs))
    result["found"] = int(found) / int(total)
    result["passed"] = result["found"] >= LIMITS["found"] and result["false_alarms"] <= LIMITS["false_alarms"]
    return result


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--name", required=True, help="of the data set, as the result calls it")
    parser.add_argument("--images", type=Path, required=True)
    parser.add_argument("--rows", type=int, help="the first rows only")
    parser.add_argument("--forget", type=int, default=1000)
    parser.add_argument("--clean-seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--planted-seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    images = np.load(options.images)["images"][: options.rows]
    images = images[:, None] if images.ndim == 3 else images.transpose(0, 3, 1, 2).copy()
    result = measure(images, options.forget, options.clean_seeds, options.planted_seeds)
    about = {
        "data": options.name,
        "images": len(images),
        "forget": options.forget,
        "threads": torch.get_num_threads(),
    }
    options.output.write_text(json.dumps(about | result, indent=1) + "\n")
    print(f"found {result['found']:.4f}, false alarms {result['false_alarms']:.5f}: {options.output}")
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    raise SystemExit(main())
