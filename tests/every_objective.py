"""Every objective that a step can have, for tests of whole steps: all methods and their variants, and rules
on parameters beside one method for each way in which gradients become one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastunlearn import ImageStore, Unlearner
from fastunlearn.methods import DPO, SISS, Anchor, EraseDiff, EraseDiffBome, Mask, Method, NegGrad, ReTrack
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.methods import compared_with, every_variant

SCHEDULE = linear_schedule()
BATCH = 6


@dataclass(frozen=True)
class Objective:
    """What a step descends, and which weights may move."""

    method: Method
    mask: bool = False
    anchor: bool = False

    def __str__(self) -> str:
        rules = [name for name in ("mask", "anchor") if getattr(self, name)]
        return " with ".join([str(self.method), " and ".join(rules)] if rules else [str(self.method)])

    def rules(self, model: nn.Module) -> list[Mask | Anchor]:
        """Of the trained parameters of `model`: nearly half of them move, and all are pulled."""
        trained = {name: own for name, own in model.named_parameters() if own.requires_grad}
        found = []
        if self.mask:
            found.append(Mask.from_gradients(_numbers_for(trained, 9), 0.4, model=model))
        if self.anchor:
            # A gradient about as long as those of the methods.
            mean = {name: own.detach() + 0.1 for name, own in trained.items()}
            precision = {name: own.abs() for name, own in _numbers_for(trained, 5).items()}
            found.append(Anchor(mean, precision, 1e4, model=model))
        return found


# Hyperparameters under which every term counts: the projections leave no forget term out, and differences of
# losses are not too large for a sigmoid.
HYPERPARAMETERS = {"k": 2, "lambd": 0.3, "eta": 3.0, "beta": 2.0}
METHODS = [
    *every_variant(**HYPERPARAMETERS),
    ReTrack(k=2, lambd=1.0),
    ReTrack(k=2, lambd=0.3, within_condition=True),
    EraseDiffBome(eta=3.0, inner_steps=2),
]
RULED = [
    Objective(SISS(), mask=True),
    Objective(SISS(), anchor=True),
    *(
        Objective(method, mask=True, anchor=True)
        for method in (NegGrad(), EraseDiff(eta=3.0), ReTrack(k=2, lambd="auto"), DPO(beta=2.0))
    ),
]
OBJECTIVES = {str(each): each for each in (*map(Objective, METHODS), *RULED)}


def make(
    objective: Objective,
    given: dict[str, Any],
    *,
    model: nn.Module | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    reference: Any = None,
    **options: Any,
) -> Unlearner:
    """An Unlearner on a CPU.

    Args:
        given: the selection, as it fits the method.
    """
    model = TinyDenoiser() if model is None else model
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-7, weight_decay=0.1, fused=True)
    compared = compared_with(objective.method, TinyDenoiser(seed=1) if reference is None else reference)
    return Unlearner(
        model,
        optimizer,
        SCHEDULE,
        objective.method,
        **_stores(objective.method),
        **compared,
        **given,
        rules=objective.rules(model),
        **{"batch_size": BATCH, "warn_of_near_copies": False, **options},
    )


def _stores(method: Method) -> dict[str, ImageStore]:
    """4 images to forget and 20 to keep, near enough to them that every weight between the two matters."""
    generator = torch.Generator().manual_seed(0)
    forget = torch.randint(0, 256, (4, 1, 8, 8), generator=generator)
    moved = torch.randint(-20, 21, (20, 1, 8, 8), generator=generator)
    retain = (forget.repeat(5, 1, 1, 1) + moved).clamp(0, 255)
    images = {"forget": forget.to(torch.uint8), "retain": retain.to(torch.uint8)}
    if not getattr(method, "within_condition", False):
        return {name: ImageStore(each) for name, each in images.items()}
    return {name: ImageStore(each, labels=torch.arange(len(each)) % 2) for name, each in images.items()}


def _numbers_for(trained: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    """A random tensor for each parameter."""
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(own.shape, generator=generator) for name, own in trained.items()}
