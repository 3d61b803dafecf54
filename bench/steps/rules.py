"""Rules on parameters beside a method: made-up masks and anchors, and the bytes below which none gets."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import nn

from fastunlearn.methods import Anchor, Mask, ParameterRule

from .job import Job


class Rule(NamedTuple):
    """A rule, and what it has to read and write for each float32 weight."""

    make: Callable[[nn.Module], ParameterRule]
    bytes_of_a_weight: int


def _mask(model: nn.Module) -> Mask:
    """Half of the weights move, as in SalUn."""
    generator = torch.Generator().manual_seed(2)
    masks = {
        name: torch.rand(weight.shape, generator=generator) < 0.5 for name, weight in model.named_parameters()
    }
    return Mask(masks, model=model)


def _anchor(model: nn.Module) -> Anchor:
    """A mean near the weights, a precision for each, and a pull that is felt."""
    mean = {name: 0.99 * weight.detach() for name, weight in model.named_parameters()}
    precision = {name: 1 + weight.abs() for name, weight in mean.items()}
    return Anchor(mean, precision, gamma=float(sum(map(torch.numel, mean.values()))), model=model)


RULES = {
    # The gradient is read and written, its mask read: 9. Weights are read and kept with the mask, 9, and
    # after the update they are read with what was kept and the mask, and written: 13.
    "mask": Rule(_mask, 31),
    # Weight, mean and precision are read; the gradient is read and written.
    "anchor": Rule(_anchor, 20),
}


def rules_of(job: Job, model: nn.Module) -> list[ParameterRule]:
    """The rules of a step of `job`."""
    return [RULES[job.timed.rule].make(model)] if job.timed.rule else []
