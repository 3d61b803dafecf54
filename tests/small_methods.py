"""Small methods that use each hook of the protocol once, with their literal losses.

A pair objective (as DPO's), one of the whole batch (as KTO's), one of single rows (as NPO's), a target that a
network predicts, a band of frequencies, a gradient that is named; a mask and an anchor as rules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from fastunlearn import LowPass, method_step
from fastunlearn import functional as F
from fastunlearn.objective.combine import Rescale
from fastunlearn.objective.draws import FORGET, RETAIN, Same
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.objective.protocol import Method, Pass, Predicted, Term

PAIR = FORGET | {"retain_timesteps": Same("forget_timesteps"), "retain_noise": Same("forget_noise")}


def both(batch, draws, schedule, coupled: str) -> list[Pass]:
    """Forget rows, then retain rows, in one call."""
    forget_x_t, forget_target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
    x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
    count = len(batch.forget)
    terms = (
        Term("forget", forget_target),
        Term("retain", target, rows=range(count, count + len(batch.retain))),
    )
    timesteps = torch.cat([draws.forget_timesteps, draws.retain_timesteps])
    return [Pass(torch.cat([forget_x_t, x_t]), timesteps, terms, coupled=coupled)]


@dataclass(frozen=True)
class Pairs(Method):
    """Prefers the retain image of a pair: `-log sigmoid(-beta (R_retain - R_forget))`."""

    beta: float = 0.02
    name = "pairs"
    needs = frozenset({"forget", "retain", "reference"})

    def draws(self):
        return PAIR

    def compose(self, batch, draws, schedule):
        return both(batch, draws, schedule, "pair")

    def objective(self, losses, reference, elements):
        change = {role: losses[role] - reference[role] for role in losses}
        margin = self.beta * (change["retain"] - change["forget"])
        return {"total": {"retain": functional.softplus(margin)}}


@dataclass(frozen=True)
class Whole(Method):
    """Ties the batch together: each loss beside the mean of all, which is part of the graph."""

    name = "whole"
    needs = frozenset({"forget", "retain"})

    def draws(self):
        return FORGET | RETAIN

    def compose(self, batch, draws, schedule):
        return both(batch, draws, schedule, "batch")

    def objective(self, losses, reference, elements):
        middle = torch.cat([losses["forget"], losses["retain"]]).mean()
        return {
            "total": {
                "forget": functional.softplus(0.05 * (middle - losses["forget"])),
                "retain": functional.softplus(0.05 * (losses["retain"] - middle)),
            }
        }


@dataclass(frozen=True)
class Rows(Method):
    """Two gradients of single rows, the correction bounded as NPO's."""

    beta: float = 0.05
    name = "rows"
    needs = frozenset({"forget", "retain", "reference"})

    def draws(self):
        return FORGET | RETAIN

    @property
    def combine(self):
        return Rescale(2.0)

    def compose(self, batch, draws, schedule):
        return both(batch, draws, schedule, "row")

    def objective(self, losses, reference, elements):
        found = {}
        if "forget" in losses:
            change = losses["forget"] - reference["forget"]
            found["forget"] = {"forget": functional.softplus(self.beta * change) / self.beta}
        if "retain" in losses:
            found["retain"] = {"retain": losses["retain"]}
        return found


@dataclass(frozen=True)
class Toward(Method):
    """Low frequencies toward what the reference predicts, all toward what the model itself does of halves."""

    radius: float = 0.5
    name = "toward"
    needs = frozenset({"forget", "reference"})

    def draws(self):
        return FORGET

    def compose(self, batch, draws, schedule):
        x_t, _ = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        everything = range(len(x_t))
        terms = (
            Term("forget", Predicted("reference"), rows=everything, band=LowPass(self.radius)),
            Term("retain", Predicted("model", {"shift": torch.ones(len(x_t), dtype=x_t.dtype)}), scale=0.5),
        )
        kwargs = {"shift": torch.zeros(len(x_t), dtype=x_t.dtype)}
        return [Pass(x_t, draws.forget_timesteps, terms, kwargs)]


class Mask(ParameterRule):
    """Lets only some weights move; the others stay, bit for bit."""

    def __init__(self, parameters, masks: list[Tensor]):
        self.masks = masks
        self.before = [parameter.detach().clone() for parameter in parameters]

    def restrict(self, parameters, gradients):
        for gradient, mask in zip(gradients, self.masks, strict=True):
            if gradient is not None:
                gradient.mul_(mask)

    def after_update(self, parameters):
        with torch.no_grad():
            for parameter, mask, before in zip(parameters, self.masks, self.before, strict=True):
                parameter.copy_(torch.where(mask.bool(), parameter, before))


class Anchor(ParameterRule):
    """`strength / 2 ||theta - mean||^2`."""

    def __init__(self, means: list[Tensor], strength: float):
        self.means, self.strength = means, strength

    def add(self, parameters, loss_scale):
        total = torch.zeros(())
        for parameter, mean in zip(parameters, self.means, strict=True):
            difference = parameter.detach() - mean
            total = total + difference.square().sum()
            added = self.strength * loss_scale * difference
            parameter.grad = added if parameter.grad is None else parameter.grad.add_(added)
        return self.strength / 2 * total


def gradient_of(method, model, schedule, **options) -> Tensor:
    """`[P]`: what one step leaves in `.grad`, flat."""
    out = method_step(method, model, None, schedule, **options)
    flat = torch.cat([parameter.grad.flatten() for parameter in model.parameters()])
    for parameter in model.parameters():
        parameter.grad = None
    return out, flat
