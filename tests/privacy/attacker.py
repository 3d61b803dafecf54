"""Somebody who wants to know which image was forgotten.

He has everything that a run leaves but its keys, the network that it began with, the method and its settings,
the images to keep, and, where it is said, the seed. docs/what_a_run_leaves.md says what he finds where.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from runs import leaves
from safetensors.torch import load_file
from torch import Tensor, nn

from fastunlearn.methods import NegGrad
from fastunlearn.objective.draws import CounterSource, Draws, complete
from fastunlearn.objective.schedule import NoiseSchedule
from fastunlearn.reference import noising
from fastunlearn.reference.objectives import neggrad_loss

MOMENT = ".exp_avg"  # Adam's mean of the gradients: the end of its tensor's name
BEFORE_PARAMETER = "optimizer.state."  # and the beginning


# --- what there is ------------------------------------------------------------------------------------------


def files(folder: Path, *, but: str | None = None) -> list[Path]:
    """All files below `folder`, but those in its folder of the name `but`."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [path for path in found if but is None or folder / but not in path.parents]


def tensors(found: Iterable[Path]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor in these files, with its name."""
    for path in found:
        if path.suffix == ".safetensors":
            yield from load_file(path).items()


def moments(found: Iterable[Path]) -> dict[str, Tensor]:
    """Adam's means of the gradients, by the name of the parameter; empty if no file has any."""
    return {
        name.removeprefix(BEFORE_PARAMETER).removesuffix(MOMENT): value
        for name, value in tensors(found)
        if name.endswith(MOMENT)
    }


def entries(found: Iterable[Path]) -> Iterator[tuple[tuple, Any]]:
    """Every number and text in the JSON files, with the keys that lead to it."""
    for path in found:
        if path.suffix == ".json":
            yield from leaves(json.loads(path.read_text()))
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                yield from leaves(json.loads(line))


def told(secret: str, found: Iterable[Path]) -> list[str]:
    """The names of the files that have `secret` in their name or in their bytes."""
    return [path.name for path in found if secret in path.name or secret.encode() in path.read_bytes()]


# --- gradient matching --------------------------------------------------------------------------------------


def image_behind(
    gradient: dict[str, Tensor],
    network: nn.Module,
    schedule: NoiseSchedule,
    *,
    seed: int,
    batch_size: int,
    shape: tuple[int, ...],
) -> Tensor:
    """The image `[1, C, H, W]`, in grey levels, that a first step of NegGrad on it alone has this gradient.

    All rows of the batch are the image. Their noises and timesteps are a function of the seed, so that the
    pixels are all that is unknown; they are changed until their gradient has the direction of `gradient`.

    Args:
        gradient: by the parameters' names, multiplied by anything: Adam's mean of one clipped gradient.
        network: with the weights before the step.
        shape: of the image.
    """
    network = copy.deepcopy(network).double()
    names, parameters = zip(*network.named_parameters(), strict=True)
    wanted = _direction([gradient[name].double() for name in names])

    source = CounterSource(torch.tensor([seed, 0, 0]))
    rows = torch.zeros(batch_size, *shape)
    draws = complete(Draws(), NegGrad().draws(), source, rows, None, len(schedule))
    timesteps, noise = draws.forget_timesteps, draws.forget_noise.numbers().double()

    image = torch.zeros(1, *shape, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [image],
        max_iter=300,
        history_size=image.numel(),
        tolerance_grad=0,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def distance() -> Tensor:
        optimizer.zero_grad()
        x_t = noising(image.expand_as(noise), noise, timesteps, schedule)
        loss = neggrad_loss(network(x_t, timesteps), noise)
        found = _direction(torch.autograd.grad(loss, parameters, create_graph=True))
        squared = (found - wanted).square().sum()
        squared.backward()
        return squared

    optimizer.step(distance)
    return (image.detach() + 1) * 127.5


def _direction(gradients: Iterable[Tensor]) -> Tensor:
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    return flat / flat.norm()


def residual(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """How far two gradients are apart: the norm of their difference over that of the first."""
    left = torch.cat([value.flatten().double() for value in first.values()])
    right = torch.cat([second[name].flatten().double() for name in first])
    return ((left - right).norm() / left.norm()).item()
