from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from .. import functional as F
from ..host import check
from ..objective.draws import Draws
from ..objective.protocol import Batch, Method, Pass, Term, concatenate, mean_weight
from ..objective.schedule import NoiseSchedule


@dataclass(frozen=True)
class ReTrack(Method):
    """ReTrack (arXiv 2509.13007): redirect the denoising trajectory of a forget image to its k nearest retain
    neighbours.

    `L = lambd * mean_b sum_j p_j ||eps_theta(x_t) - v_j||^2 + (1 - lambd) * L_vanilla(retain)` (section 3.4),
    with one target in place of k. Forget and retain rows go through the network together, one forward and one
    backward (on CPUs apart: as fast, with half the activations).

    Args:
        k: nearest neighbours of each forget image.
        lambd: weight of the forget term, in [0, 1]; the paper chooses it so that both terms are of similar
            size.
    """

    k: int = 10
    lambd: float = 0.005
    name: ClassVar[str] = "retrack"

    def __post_init__(self):
        check.integer("k", self.k, low=1)
        check.number("lambd", self.lambd, low=0, high=1)

    @property
    def batches(self) -> frozenset[str]:
        return frozenset({"forget", "neighbors"} | ({"retain"} if self.lambd < 1 else set()))

    @property
    def draws(self) -> frozenset[str]:
        return frozenset(
            {"forget_noise", "forget_timesteps"}
            | ({"retain_noise", "retain_timesteps"} if self.lambd < 1 else set())
        )

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        redirected = F.redirect(
            batch.forget,
            batch.neighbors,
            draws.forget_noise,
            draws.forget_timesteps,
            schedule,
            sqdist=batch.sqdist,
        )
        forget = Term(
            "forget", redirected.target, mean_weight(batch.forget), spread=redirected.spread, scale=self.lambd
        )
        if self.lambd == 1:
            return [Pass(redirected.x_t, draws.forget_timesteps, (forget,), batch.forget_kwargs)]
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        retain = Term(
            "retain", target, mean_weight(batch.retain), start=len(batch.forget), scale=1 - self.lambd
        )
        rows = torch.cat([redirected.x_t, x_t]), torch.cat([draws.forget_timesteps, draws.retain_timesteps])
        return [Pass(*rows, (forget, retain), concatenate(batch.forget_kwargs, batch.retain_kwargs))]
