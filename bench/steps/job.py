"""What is learned: the images of a step, its random numbers, and the data sets that they come from, for all
contestants alike.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

import fastunlearn as fu
from fastunlearn.methods import Batch
from fastunlearn.objective.draws import Same
from fastunlearn.objective.protocol import Method, Pass, Predicted, has_own_objective
from fastunlearn.step.arrange import finish
from fastunlearn.step.inner import Correction

from .methods import timed
from .networks import SISS_LAMBD, K, Network

FORGET_ROWS = 8  # in the store
TIMESTEPS, BETAS = 1000, (1e-4, 0.02)  # of the linear schedule
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}  # name -> dtype of autocast


class _Sliceable:
    def rows(self, start: int, stop: int):
        """The part that belongs to the rows `start..stop` of the batch."""
        return type(self)(
            *(
                None if value is None else value[start:stop]
                for value in (getattr(self, field.name) for field in fields(self))
            )
        )


class Call(NamedTuple):
    """One network call of a step."""

    rows: int
    backwards: int  # backward passes of it; 0: a forward pass without a graph


@dataclass(frozen=True)
class Images(_Sliceable):
    """The rows of one step, on the device."""

    forget: Tensor  # [B, C, H, W] float32
    retain: Tensor  # [B, C, H, W] float32
    neighbors: Tensor  # [B, K, C, H, W] float32
    sqdist: Tensor  # [B, K] float64


@dataclass(frozen=True)
class Draw(_Sliceable):
    """The random numbers of one step, on the device.

    The SISS variants have one noise and one timestep for both branches.
    """

    forget_timesteps: Tensor  # [B] int64
    forget_noise: Tensor  # [B, C, H, W]
    retain_timesteps: Tensor  # [B] int64
    retain_noise: Tensor  # [B, C, H, W]
    from_forget: Tensor  # [B] bool: SISS makes x_t from the forget image
    uniform_target: Tensor  # [B, C, H, W] in [0, 1)


class Job:
    """One method on one network.

    The data are random, but with the structure that the methods work on: every retain image is a forget image
    with a little noise, so that neighbours are near, while a random pair is mostly far apart. uint8 images,
    or float32 latents.

    Args:
        network: from `NETWORKS`.
        method: from `methods.timed()`.
        device: where all but the papers' data sets live.
        precision: a key of `PRECISIONS`; the papers' way is float32 whatever this is.
        batch: rows of a step from each set; None: the network's own for the device.
    """

    def __init__(
        self,
        network: Network,
        method: str,
        device: torch.device,
        precision: str = "float32",
        *,
        batch: int | None = None,
    ):
        self.network, self.method, self.device, self.precision = network, method, device, precision
        self.timed = timed()[method]
        self.instance, self.lr = self.timed.setting(network).method, self.timed.setting(network).lr
        self.batch = batch or network.batch[device.type]
        self.micro = network.micro.get((device.type, precision))  # None: all rows in one call
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(*BETAS, TIMESTEPS), 0)
        self.schedule = fu.NoiseSchedule.from_alphas_cumprod(self.alphas_cumprod)
        generator = torch.Generator().manual_seed(1)
        forget, retain = (_latents if network.latents else _pictures)(network, generator)
        options = {"latents": network.latents}
        self.forget, self.retain = (
            fu.ImageStore(forget, **options).to(device),
            fu.ImageStore(retain, **options).to(device),
        )
        self.neighbors = fu.nearest_neighbors(self.forget, self.retain, K)
        self.condition = (
            None
            if network.condition is None
            else torch.randn(1, *network.condition, generator=generator).to(device)
        )
        self.forget_rows = (torch.arange(self.batch) % len(self.forget)).to(device)
        self.retain_rows = torch.randint(len(self.retain), (self.batch,), generator=generator).to(device)
        self.images = self._images()

    @property
    def shared_draws(self) -> bool:
        return any(isinstance(draw, Same) for draw in self.instance.draws().values())

    @property
    def sizes(self) -> dict[str, int]:
        """Of the whole sets."""
        return {"forget": len(self.forget), "retain": len(self.retain)}

    @property
    def rows(self) -> int:
        """Rows that the network learns from in one step: each set's batch where both are read, once where
        SISS mixes the two into one batch.
        """
        return sum(call.rows for call in self.calls if call.backwards)

    @cached_property
    def calls(self) -> list[Call]:
        """The network calls of a step, before they are split into micro-batches: what the method composes,
        and before it what is compared with, or predicted as a target, without a graph.
        """
        return self._calls_of(self.instance)

    @cached_property
    def inner_calls(self) -> list[Call]:
        """Those of one inner step."""
        return self._calls_of(Correction(self.instance)) if self.instance.inner_steps else []

    def _calls_of(self, method: Method) -> list[Call]:
        with torch.random.fork_rng():  # whoever draws next draws what it would have drawn
            draw = self.draw()
        conditioning = [self.conditioning(self.batch)] * 2
        images = self.images
        batch = Batch(
            images.forget,
            images.retain,
            images.neighbors,
            images.sqdist,
            *conditioning,
            stores={"forget": self.forget, "retain": self.retain},
            sizes=self.sizes,
        )
        composed = method.compose(batch, self.given(draw), self.schedule)
        without_graph = [call for part in composed for call in _without_graph(method, part)]
        if has_own_objective(method):  # each row may belong to every gradient
            learning = [Call(len(part.x_t), len(method.combine.gradients)) for part in composed]
        else:
            finished, _ = finish(composed, method.combine, group=None)
            learning = [Call(len(part.x_t), len(part.gradients)) for part in finished]
        return without_graph + learning

    def given(self, draw: Draw, **rows: Tensor) -> fu.Draws:
        """The numbers of `draw` that the method uses, as the package takes them."""
        names = {each.name for each in fields(draw)}.intersection(self.instance.draws())
        return fu.Draws(**{name: getattr(draw, name) for name in names}, **rows)

    @cached_property
    def scheduler(self):
        """As the official code takes it.

        Raises:
            ImportError: diffusers is not installed.
        """
        from diffusers import DDPMScheduler

        return DDPMScheduler(
            num_train_timesteps=TIMESTEPS, beta_schedule="linear", beta_start=BETAS[0], beta_end=BETAS[1]
        )

    def autocast(self) -> AbstractContextManager:
        dtype = PRECISIONS[self.precision]
        return nullcontext() if dtype is None else torch.autocast(self.device.type, dtype=dtype)

    def conditioning(self, rows: int) -> dict[str, Tensor]:
        """Keyword arguments of the network for a call of `rows` rows: one prompt for all of them, as in the
        papers.
        """
        return (
            {} if self.condition is None else {"encoder_hidden_states": self.condition.expand(rows, -1, -1)}
        )

    def draw(self, rows: int | None = None, *, least_timestep: int = 0) -> Draw:
        """Numbers for `rows` rows from torch's global generator, on the device."""
        shape = (rows or self.batch, *self.network.shape)
        branches = []
        for _ in range(1 if self.shared_draws else 2):
            timesteps = torch.randint(least_timestep, len(self.schedule), shape[:1], device=self.device)
            branches.append((timesteps, torch.randn(shape, device=self.device)))
        uniform = (
            torch.rand(shape, device=self.device)
            if "uniform_target" in self.instance.draws()
            else torch.empty(shape[0], 0, device=self.device)
        )
        return Draw(
            *branches[0], *branches[-1], torch.rand(shape[0], device=self.device) <= SISS_LAMBD, uniform
        )

    def in_layout(self, layout: torch.memory_format) -> Images:
        """`images` in another memory format."""
        kwargs = {
            name: getattr(self.images, name).contiguous(memory_format=layout) for name in ("forget", "retain")
        }
        return Images(
            **kwargs,
            neighbors=self.images.neighbors,
            sqdist=self.images.sqdist,
        )

    def _images(self) -> Images:
        index, sqdist = (part[self.forget_rows.to(part.device)] for part in self.neighbors)
        scale = 1.0 if self.network.latents else (2 / 255) ** 2
        neighbors = self.retain.rows(index.flatten().to(self.device)).view(*index.shape, *self.network.shape)
        return Images(
            self.forget.rows(self.forget_rows),
            self.retain.rows(self.retain_rows),
            neighbors,
            sqdist.double().to(self.device) * scale,
        )


def _without_graph(method: Method, part: Pass) -> list[Call]:
    """The calls that `part` needs before the network learns from it."""
    calls = [Call(len(term.rows), 0) for term in part.terms if isinstance(term.target, Predicted)]
    if "reference" in method.needs and any(term.role in method.compared for term in part.terms):
        calls.append(Call(len(part.x_t), 0))
    return calls


def _pictures(network: Network, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """uint8 `[FORGET_ROWS, C, H, W]` and `[retain_rows, C, H, W]`, which differ by up to 16 grey levels from
    a forget image.
    """
    forget = torch.randint(16, 240, (FORGET_ROWS, *network.shape), generator=generator)
    noise = torch.randint(-16, 16, (network.retain_rows, *network.shape), generator=generator)
    return forget.to(torch.uint8), (forget.repeat(network.retain_rows // FORGET_ROWS, 1, 1, 1) + noise).to(
        torch.uint8
    )


def _latents(network: Network, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """float32, of the same shapes."""
    forget = torch.randn(FORGET_ROWS, *network.shape, generator=generator)
    noise = torch.randn(network.retain_rows, *network.shape, generator=generator)
    return forget, forget.repeat(network.retain_rows // FORGET_ROWS, 1, 1, 1) + 0.07 * noise
