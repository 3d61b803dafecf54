"""The shapes of the papers and the inputs of every op at these shapes, drawn from a fixed seed on the device
that is timed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastunlearn.host import philox
from fastunlearn.ops._library import served
from fastunlearn.testing.accelerator import DRY
from fastunlearn.testing.factories import linear_schedule

SCHEDULE = linear_schedule()
PURPOSE = 5  # of the noise that kernels draw: any number does
JOBS = {
    "tensors": "float tensors and noise given",
    "rows": "rows of a store by index, noise given",
    "rows+philox": "rows of a store by index, noise drawn",
}
ORDERS = 4  # in which plain torch adds the elements of an image for a gate, so that no lucky sum decides it
_GATE_ELEMENTS = 1 << 22
# of the nearest neighbour, root mean square per element in [-1, 1]; the last one is half as far again
_DISTANCE = 0.1


@dataclass(frozen=True)
class Shape:
    name: str
    channels: int
    height: int
    width: int
    batch: int
    store_dtype: torch.dtype = torch.uint8

    @property
    def elements(self) -> int:
        """D: elements of one image."""
        return self.channels * self.height * self.width

    @property
    def row_bytes(self) -> int:
        """Of one image in the store."""
        return self.elements * self.store_dtype.itemsize

    @property
    def image(self) -> tuple[int, int, int]:
        return self.channels, self.height, self.width

    def __str__(self) -> str:
        return f"{self.name} B{self.batch}"


SHAPES = {
    "mnist": Shape("mnist", 1, 28, 28, 128),
    "cifar": Shape("cifar", 3, 32, 32, 128),
    "celeba": Shape("celeba", 3, 256, 256, 64),
    "sd": Shape("sd", 4, 64, 64, 16, torch.float32),  # latents
}
SMOKE = Shape("smoke", 3, 10, 9, 3 if DRY else 23)  # Triton's interpreter takes 10 ms a program


def draws(job: str) -> bool:
    """Whether the noise is drawn within the timed call."""
    return job == "rows+philox"


def on_device(shape: Shape, device: torch.device, neighbors: int = 10) -> Shape:
    """`shape` with the batch that is timed on `device`."""
    small = device.type == "cpu" and (shape.name == "celeba" or neighbors >= 1000)
    return replace(shape, batch=min(shape.batch, 8)) if small else shape


class Given(NamedTuple):
    """The arguments of the literal formulas, in one dtype."""

    images: Tensor  # [B, C, H, W]
    others: Tensor  # [B, C, H, W]
    neighbors: Tensor | None  # [B, K, C, H, W]
    noise: Tensor  # [B, C, H, W]
    prediction: Tensor  # [B, C, H, W], requires a gradient
    alpha: Tensor  # [B, 1, 1, 1]
    sigma: Tensor  # [B, 1, 1, 1]
    timesteps: Tensor  # [B]
    from_forget: Tensor  # [B]


class Inputs:
    """One batch, as every op can be given it.

    Rows `index` of `store` are the images; neighbour `j` of row `b` is `neighbor_store[neighbor_index[b,
    j]]`.
    """

    def __init__(self, shape: Shape, device: torch.device, neighbors: int = 0):
        self.shape, self.device = shape, device
        self._generator = torch.Generator(device).manual_seed(0)
        self.index = self._shuffled(shape.batch)
        self.store = self._store()
        self.other_store = self._near(self.store, _DISTANCE)  # row i is near row i of `store`
        self.neighbor_index: Tensor | None = None
        self.timesteps = torch.randint(
            0, len(SCHEDULE), (shape.batch,), generator=self._generator, device=device
        )
        self.coefficients = SCHEDULE.coefficients(self.timesteps)
        self.noise = torch.randn(shape.batch, *shape.image, generator=self._generator, device=device)
        self.prediction = self.noise + 0.3 * torch.randn(
            shape.batch, *shape.image, generator=self._generator, device=device
        )
        self.counter = torch.tensor([1234, 7, 0], device=device)
        self.from_forget = torch.rand(shape.batch, generator=self._generator, device=device) < 0.5
        if neighbors:
            self._add_neighbors(neighbors)

    @property
    def images(self) -> Tensor:
        """`[B, C, H, W]` float32."""
        return served(self.store[self.index], torch.float32)

    @property
    def other_images(self) -> Tensor:
        """`[B, C, H, W]` float32, each near the image of its row."""
        return served(self.other_store[self.index], torch.float32)

    def neighbor_images(self, rows: Tensor | slice = slice(None)) -> Tensor:
        """`[B, K, C, H, W]` float32, of these rows of the batch."""
        return served(self.neighbor_store[self.neighbor_index[rows]], torch.float32)

    def levels(self) -> tuple[Tensor, Tensor]:
        """`alpha_t, sigma_t` `[B, 1, 1, 1]` float32."""
        alpha, sigma = self.coefficients[:, :2].float().view(-1, 2, 1, 1, 1).unbind(1)
        return alpha, sigma

    def given_rows(self, job: str) -> tuple[Tensor, Tensor | None]:
        """The images as the ops take them: `images, index`."""
        return (self.images, None) if job == "tensors" else (self.store, self.index)

    def given_noise(self, job: str) -> tuple[Tensor | None, Tensor | None, int]:
        """The noise as the ops take it: `noise, counter, purpose`."""
        return (None, self.counter, PURPOSE) if draws(job) else (self.noise, None, PURPOSE)

    def at(self, rows: Tensor, dtype: torch.dtype, job: str) -> Given:
        """What the literal formulas need to know of `rows` of the batch, in `dtype`."""
        alpha, sigma = self.coefficients[rows, :2].to(dtype).view(-1, 2, 1, 1, 1).unbind(1)
        noise = self._drawn_noise(rows, dtype) if draws(job) else self.noise[rows].to(dtype)
        neighbors = self.neighbor_images(rows).to(dtype) if self.neighbor_index is not None else None
        images, others = self.images[rows].to(dtype), self.other_images[rows].to(dtype)
        prediction = self.prediction[rows].to(dtype).requires_grad_()
        return Given(
            images,
            others,
            neighbors,
            noise,
            prediction,
            alpha,
            sigma,
            self.timesteps[rows],
            self.from_forget[rows],
        )

    def some_rows(self) -> Tensor:
        """The rows of the batch that the correctness gate looks at: as many as float64 is quick for, spread
        evenly.
        """
        neighbors = 0 if self.neighbor_index is None else self.neighbor_index.shape[1]
        count = min(self.shape.batch, max(4, _GATE_ELEMENTS // (self.shape.elements * (1 + neighbors))))
        return torch.linspace(0, self.shape.batch - 1, count, device=self.device).long()

    def _drawn_noise(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """What kernels draw for `rows` of the batch: the same words, Box-Muller in `dtype`."""
        counters = [self.counter + self.counter.new_tensor([0, 0, row]) for row in rows.tolist()]
        words = torch.cat([philox.words((1, *self.shape.image), counter, PURPOSE) for counter in counters])
        radius = torch.sqrt(-2 * torch.log(philox.unit(words[..., 0::2]).to(dtype) + 2**-24))
        angle = 2 * math.pi * philox.unit(words[..., 1::2]).to(dtype)
        normals = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
        return normals[:, : self.shape.elements].reshape(len(rows), *self.shape.image)

    def _store(self) -> Tensor:
        count = (self.shape.batch, *self.shape.image)
        if self.shape.store_dtype == torch.uint8:
            return torch.randint(
                0, 256, count, generator=self._generator, device=self.device, dtype=torch.uint8
            )
        return torch.randn(count, generator=self._generator, device=self.device)

    def _near(self, images: Tensor, distance: float) -> Tensor:
        """Other rows at a root mean square distance of about `distance` per element from `images`, in the
        dtype of the store.
        """
        step = torch.randn(images.shape, generator=self._generator, device=self.device)
        if images.dtype == torch.uint8:
            return (images + 127.5 * distance * step).round().clamp(0, 255).to(torch.uint8)
        return images + distance * step

    def _add_neighbors(self, count: int) -> None:
        batch = self.shape.batch
        self.neighbor_index = self._shuffled(batch * count).view(batch, count)
        self.neighbor_store = torch.empty(
            batch * count, *self.shape.image, dtype=self.shape.store_dtype, device=self.device
        )
        self.sqdist = torch.empty(batch, count, dtype=torch.float64, device=self.device)
        for j, farther in enumerate(torch.linspace(1, 1.5, count).tolist()):
            near = self._near(self.store[self.index], farther * _DISTANCE)
            self.neighbor_store[self.neighbor_index[:, j]] = near
            self.sqdist[:, j] = self._squared_distances(self.store[self.index], near)

    @staticmethod
    def _squared_distances(images: Tensor, near: Tensor) -> Tensor:
        """In network scale, `[B]`: the exact integer times (2/255)^2 where rows are uint8."""
        total = (images.double() - near.double()).square().flatten(1).sum(1)
        return total * (2 / 255) ** 2 if images.dtype == torch.uint8 else total

    def _shuffled(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator, device=self.device)
