"""One process of `scripts/compare_speed.py`: takes steps when it is asked to, and tells how long each took.

It prints the titles of the cases. Then a line on its standard input is a title and a number of steps; the
answer is the nanoseconds of each step. All of it is JSON.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import fastunlearn
from fastunlearn import ImageStore, Unlearner

from . import parts
from .steps import KINDS, Data
from .unlearners import METHODS

SHAPE, ROWS = (1, 28, 28), 4
METHODS_TIMED = ("retrack", "siss", "erasediff", "neggrad", "vanilla")


class Small(nn.Module):
    """A UNet for 28x28 images: two resolutions, about 35,000 parameters."""

    def __init__(self, width: int = 16):
        super().__init__()
        self.enter = nn.Conv2d(1, width, 3, padding=1)
        self.time = nn.Linear(2, 2 * width)
        self.down = nn.Conv2d(width, 2 * width, 3, stride=2, padding=1)
        self.middle = nn.Sequential(
            nn.GroupNorm(4, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 2 * width, 3, padding=1)
        )
        self.up = nn.ConvTranspose2d(2 * width, width, 2, stride=2)
        self.leave = nn.Sequential(
            nn.GroupNorm(4, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, 1, 3, padding=1)
        )

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        angle = t.to(x_t.dtype) / 1000
        shift = self.time(torch.stack([angle.sin(), angle.cos()], dim=1))[:, :, None, None]
        fine = self.enter(x_t)
        coarse = self.down(fine) + shift
        coarse = coarse + self.middle(coarse)
        return self.leave(torch.cat([fine, self.up(coarse)], dim=1))


class Trivial(nn.Module):
    """Two parameters: what a step takes beside the network."""

    def __init__(self):
        super().__init__()
        self.factor, self.shift = nn.Parameter(torch.ones(())), nn.Parameter(torch.zeros(()))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return x_t * self.factor + self.shift


NETWORKS = {"small UNet": Small, "trivial network": Trivial}


def byte_images(count: int, seed: int) -> Tensor:
    """`[count, 1, 28, 28]` uint8."""
    return torch.randint(0, 256, (count, *SHAPE), generator=parts.seeded(seed), dtype=torch.uint8)


def step_function(method: str, network: type[nn.Module]) -> Callable[[], object]:
    """A step on batches that are at hand, with numbers from a generator."""
    forget, retain = (byte_images(ROWS, seed) / 127.5 - 1 for seed in (1, 2))
    neighbors = byte_images(10 * ROWS, 3).view(ROWS, 10, *SHAPE) / 127.5 - 1
    model, generator = network(), parts.seeded(4)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    data = Data(forget, retain, neighbors)
    return partial(KINDS[method].call, model, optimizer, parts.schedule(), data, generator=generator)


def unlearner(method: str, network: type[nn.Module]) -> Callable[[], object]:
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    stores = {"forget": ImageStore(byte_images(8, 1)), "retain": ImageStore(byte_images(200, 2))}
    return Unlearner(model, optimizer, parts.schedule(), METHODS[method], batch_size=ROWS, **stores).step


def cases() -> dict[str, Callable[[], Callable[[], object]]]:
    """Title -> what makes the step."""
    made = {}
    for network_name, network in NETWORKS.items():
        for method in METHODS_TIMED:
            made[f"{method} step, {network_name}"] = partial(step_function, method, network)
            made[f"Unlearner, {method}, {network_name}"] = partial(unlearner, method, network)
    return made


def timed(take: Callable[[], object], count: int) -> list[int]:
    """CPU time of each step, in nanoseconds. A step waits for nothing."""
    taken = []
    for _ in range(count):
        start = time.process_time_ns()
        take()
        taken.append(time.process_time_ns() - start)
    return taken


def main() -> None:
    tree = Path(sys.argv[1])
    package = Path(fastunlearn.__file__).resolve().parent
    if package.parent != tree.resolve():
        raise SystemExit(f"fastunlearn: expected it from {tree}, got it from {package}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    made, steps = cases(), {}
    print(json.dumps(list(made)), flush=True)
    for line in sys.stdin:
        title, count = json.loads(line)
        if title not in steps:
            torch.manual_seed(0)
            steps[title] = made[title]()
        print(json.dumps(timed(steps[title], count)), flush=True)


if __name__ == "__main__":
    main()
