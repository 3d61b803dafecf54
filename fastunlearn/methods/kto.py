from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import functional as F
from ..host import check
from ..objective.conditioning import concatenate
from ..objective.draws import FORGET, RETAIN, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="rewards each retain image and punishes each forget image, compared with the network as it was.",
    source="arXiv 2404.04465 (Diffusion-KTO), as arXiv 2510.17917, Eq. 24, unlearns with it",
    variants={"class": {"z0": "class"}, "zero": {"z0": "zero"}},
    place=7,
)
@dataclass(frozen=True)
class KTO(Method):
    """Diffusion-KTO (arXiv 2404.04465) with retain images as the desirable, forget images as the others.

    `L = E_x [1 - sigmoid(beta / D (R(x) - z0))] + E_a [1 - sigmoid(beta / D (z0 - R(a)))]` with
    `R = l_reference - l` of `l = ||eps - eps_theta||^2`, a sum over the D = C H W elements of an image, and a
    reference point z0, a constant to the gradient. x and a are no pairs: each has its own noise and timestep.

    `dL / dl(x) = beta / D s (1 - s)` with `s = sigmoid(beta / D (R(x) - z0))`, and likewise `-beta / D s
    (1 - s)` for a: rows near the reference point count most, those far from it on either side hardly.

    The exact printing of Eq. 24 was not at hand: this is its prose with the losses of Diffusion-KTO's code.

    Args:
        beta: temperature, of losses that are means over the elements of an image.
        z0: the reference point. batch is the mean R of all rows, class the mean of the means of retain and
            forget rows, each 0 where it is negative (they differ where there are more rows of one); zero
            is 0, and ties no rows together.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range.
    """

    beta: float = 1000.0
    z0: Literal["batch", "class", "zero"] = "batch"
    name: ClassVar[str] = "kto"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain", "reference"})

    def __post_init__(self):
        check.number("beta", self.beta, low=0, low_open=True)
        check.one_of("z0", self.z0, ("batch", "class", "zero"))

    def draws(self) -> dict[str, Draw]:
        return FORGET | RETAIN

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # The rows to forget, and then those to keep, in one call of the network.
        a_t, forget_target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        x_t, retain_target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        first, last = len(batch.forget), len(batch.forget) + len(batch.retain)
        terms = (
            Term("forget", forget_target),
            Term("retain", retain_target, rows=range(first, last)),
        )
        timesteps = torch.cat([draws.forget_timesteps, draws.retain_timesteps])
        kwargs = concatenate(batch.forget_kwargs, batch.retain_kwargs)
        # The mean of all rows ties them together.
        coupled = "row" if self.z0 == "zero" else "batch"
        return [Pass(torch.cat([a_t, x_t]), timesteps, terms, kwargs, coupled=coupled)]

    def objective(
        self, losses: dict[str, Tensor], reference: dict[str, Tensor], elements: int
    ) -> dict[str, dict[str, Tensor]]:
        # R: by how much the network has become better than the reference.
        reward = {role: reference[role] - losses[role] for role in losses}
        z0, beta = self._reference_point(reward), self.beta / elements
        contributions = {}
        # 1 - sigmoid(z) = sigmoid(-z).
        if "retain" in reward:
            contributions["retain"] = torch.sigmoid(-beta * (reward["retain"] - z0))
        if "forget" in reward:
            contributions["forget"] = torch.sigmoid(-beta * (z0 - reward["forget"]))
        return {"total": contributions}

    def _reference_point(self, reward: dict[str, Tensor]) -> Tensor | float:
        """z0, 0-d, without a graph."""
        if self.z0 == "zero":
            return 0.0
        rows = [own.detach() for own in reward.values()]
        if self.z0 == "class":
            rows = [own.mean(0, keepdim=True) for own in rows]
        return torch.cat(rows).mean().clamp(min=0)
