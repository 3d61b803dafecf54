from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional

from .. import functional as F
from ..host import check
from ..objective.draws import FORGET, RETAIN, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register

# The loss grows as 2 ln 2 D / beta, and has to stay in float32 for images of up to 10^13 elements.
SMALLEST_BETA = 1e-24


@register(
    help="gradient ascent that fades as the network falls behind what it was, beside vanilla.",
    source="arXiv 2404.05868, on the losses of arXiv 2510.17917, appendix B",
    variants={"forget_only": {"retain_weight": 0.0}},
    place=8,
)
@dataclass(frozen=True)
class NPO(Method):
    """Negative preference optimization (arXiv 2404.05868): a loser without a winner, and vanilla beside it.

    `L = E_a -(2 D / beta) log sigmoid(beta / D [l(a) - l_reference(a)]) + retain_weight E_x l(x)` with `l =
    ||eps - eps_theta||^2`, a sum over the D = C H W elements of an image.

    `dL / dl(a) = -2 sigmoid(-beta / D [l(a) - l_reference(a)])`: NegGrad's -1 where both networks are equal,
    and ever less the worse the network has become. As beta goes to 0 its gradient tends to NegGrad's with
    superfactor 1, while the loss grows as 2 ln 2 D / beta.

    Args:
        beta: temperature, of losses that are means over the elements of an image; at least 1e-24.
        retain_weight: weight of the vanilla term on retain images; 0 leaves it out, and needs none.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range.
    """

    beta: float = 1000.0
    retain_weight: float = 1.0
    name: ClassVar[str] = "npo"
    compared: ClassVar[frozenset[str]] = frozenset({"forget"})

    def __post_init__(self):
        check.number("beta", self.beta, low=SMALLEST_BETA)
        check.number("retain_weight", self.retain_weight, low=0)

    @property
    def needs(self) -> frozenset[str]:
        # A retain term that counts 0 has no rows.
        if self.retain_weight == 0:
            return frozenset({"forget", "reference"})
        return frozenset({"forget", "retain", "reference"})

    def draws(self) -> dict[str, Draw]:
        return FORGET if self.retain_weight == 0 else FORGET | RETAIN

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # Two calls, since the reference is compared with on forget images alone.
        x_t, target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        terms = (Term("forget", target),)
        forget = Pass(x_t, draws.forget_timesteps, terms, batch.forget_kwargs)
        if self.retain_weight == 0:
            return [forget]
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        terms = (Term("retain", target),)
        return [forget, Pass(x_t, draws.retain_timesteps, terms, batch.retain_kwargs)]

    def objective(
        self, losses: dict[str, Tensor], reference: dict[str, Tensor], elements: int
    ) -> dict[str, dict[str, Tensor]]:
        contributions = {}
        if "forget" in losses:
            beta = self.beta / elements
            worse = losses["forget"] - reference["forget"]
            # logsigmoid(z) is min(z, 0) - log1p(exp(-|z|)): no z makes it NaN.
            contributions["forget"] = -2 / beta * functional.logsigmoid(beta * worse)
        if "retain" in losses:
            contributions["retain"] = self.retain_weight * losses["retain"]
        return {"total": contributions}
