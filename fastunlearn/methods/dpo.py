from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional

from .. import functional as F
from ..host import check
from ..objective.conditioning import concatenate
from ..objective.draws import PAIR, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="prefers the retain image of each pair, compared with the network as it was.",
    source="arXiv 2311.12908, Eq. 14, as arXiv 2510.17917, Eq. 23, unlearns with it",
    place=6,
)
@dataclass(frozen=True)
class DPO(Method):
    """Diffusion-DPO (arXiv 2311.12908), of which the retain image is the winner, the forget image the loser.

    `L = E -log sigmoid(beta / D [R(x) - R(a)])` over pairs of a retain image x and a forget image a, with
    `R = l_reference - l` of `l = ||eps - eps_theta||^2`, a sum over the D = C H W elements of an image. A
    pair has one noise and one timestep, unless its branches draw timesteps from different densities.

    `dL / dl(x) = beta / D sigmoid(-z)` and `dL / dl(a) = -beta / D sigmoid(-z)` at `z = beta / D [R(x) -
    R(a)]`: gradient descent on one, ascent on the other, which stop where the pair is told apart.

    The exact printing of Eq. 23 was not at hand: this is its prose, "maximise the reward gap".

    Args:
        beta: temperature, of losses that are means over the elements of an image. Diffusion-DPO's code has a
            factor 1/2 in front: its beta_dpo of 2000 is 1000 here. Nobody has tuned it for unlearning: in 50
            steps the default ruined the digits of the demo's model.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range.
    """

    beta: float = 1000.0
    name: ClassVar[str] = "dpo"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})

    def __post_init__(self):
        check.number("beta", self.beta, low=0, low_open=True)

    def draws(self) -> dict[str, Draw]:
        return PAIR

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        if batch.forget.shape != batch.retain.shape:
            raise ValueError(
                f"forget: expected the shape of retain, {tuple(batch.retain.shape)} (DPO works on pairs), "
                f"got {tuple(batch.forget.shape)}"
            )
        # The rows to forget, and then those to keep, in one call of the network.
        a_t, forget_target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        x_t, retain_target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        pairs = len(batch.forget)
        terms = (
            Term("forget", forget_target),
            Term("retain", retain_target, rows=range(pairs, 2 * pairs)),
        )
        timesteps = torch.cat([draws.forget_timesteps, draws.retain_timesteps])
        kwargs = concatenate(batch.forget_kwargs, batch.retain_kwargs)
        return [Pass(torch.cat([a_t, x_t]), timesteps, terms, kwargs, coupled="pair")]

    def objective(
        self, losses: dict[str, Tensor], reference: dict[str, Tensor], elements: int
    ) -> dict[str, dict[str, Tensor]]:
        # R(x) and R(a): by how much the network has become better than the reference.
        retain = reference["retain"] - losses["retain"]
        forget = reference["forget"] - losses["forget"]
        # logsigmoid(z) is min(z, 0) - log1p(exp(-|z|)): no z makes it NaN.
        pairs = -functional.logsigmoid(self.beta / elements * (retain - forget))
        return {"total": {"retain": pairs}}
