from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import functional as F
from ..host import check
from ..objective.conditioning import concatenate
from ..objective.draws import FORGET, RETAIN, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="redirects the denoising of a forget image to its nearest images to keep (start here).",
    source="arXiv 2509.13007, section 3.4",
    recipes={
        "mnist-tshirt": {"k": 10, "lambd": 0.005, "lr": 5e-5},
        "celeba-hq": {"k": 10, "lambd": 0.005, "lr": 5e-6},
        "cifar-10": {"k": 10, "lambd": 0.02, "lr": 2e-5},
        "sd-1.4": {"k": 10, "lambd": 0.5, "lr": 1e-5},
        "mnist-tshirt-small": {"k": 10, "lambd": 0.05, "lr": 1.5e-4},
    },
    timed_on="mnist",
    place=1,
)
@dataclass(frozen=True)
class ReTrack(Method):
    """ReTrack (arXiv 2509.13007): forget images are denoised towards their k nearest retain neighbours.

    `L = lambd * mean_b sum_j p_j ||eps_theta(x_t) - v_j||^2 + (1 - lambd) * L_vanilla(retain)` (section 3.4),
    with one target in place of k. Forget and retain rows go through the network together, one forward and one
    backward (on CPUs apart: as fast, with half the activations).

    Args:
        k: nearest images to keep that a forget image is redirected to. 1 to 1000 make almost no difference
            in the paper.
        lambd: weight of the forget term in [0, 1]; choose it so that both terms are of similar size.
    """

    k: int = 10
    lambd: float = 0.005
    name: ClassVar[str] = "retrack"

    def __post_init__(self):
        check.integer("k", self.k, low=1)
        check.number("lambd", self.lambd, low=0, high=1)

    @property
    def needs(self) -> frozenset[str]:
        # With lambd = 1 the retain term counts 0, and has no rows.
        if self.lambd == 1:
            return frozenset({"forget", "neighbors"})
        return frozenset({"forget", "neighbors", "retain"})

    def draws(self) -> dict[str, Draw]:
        if self.lambd == 1:
            return FORGET
        return FORGET | RETAIN

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # The forget term of section 3.4 with one target in place of k: with v = sum_j p_j v_j,
        # `sum_j p_j ||e - v_j||^2 = ||e - v||^2 + spread`, and the spread does not depend on the network.
        redirected = F.redirect(
            batch.forget,
            batch.neighbors,
            draws.forget_noise,
            draws.forget_timesteps,
            schedule,
            sqdist=batch.sqdist,
        )
        forget = Term("forget", redirected.target, spread=redirected.spread, scale=self.lambd)
        if self.lambd == 1:
            return [Pass(redirected.x_t, draws.forget_timesteps, (forget,), batch.forget_kwargs)]

        # The retain term, L_vanilla: its rows follow those to forget in one call of the network.
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        first, last = len(batch.forget), len(batch.forget) + len(batch.retain)
        retain = Term("retain", target, rows=range(first, last), scale=1 - self.lambd)
        return [
            Pass(
                torch.cat([redirected.x_t, x_t]),
                torch.cat([draws.forget_timesteps, draws.retain_timesteps]),
                (forget, retain),
                concatenate(batch.forget_kwargs, batch.retain_kwargs),
            )
        ]
