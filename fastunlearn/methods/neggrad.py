from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import functional as F
from ..host import check
from ..objective.draws import FORGET, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="gradient ascent on the forget set; fast and destructive.",
    source="arXiv 2503.01034 (SISS), its baseline",
    recipes={
        "mnist-tshirt": {"superfactor": 1.0, "lr": 5e-5},
        "celeba-hq": {"superfactor": 1.0, "lr": 5e-6},
        "cifar-10": {"superfactor": 1.0, "lr": 2e-5},
        "sd-1.4": {"superfactor": 1.0, "lr": 1e-5},
        "mnist-tshirt-small": {"superfactor": 1.0, "lr": 1.5e-4},
    },
    place=4,
)
@dataclass(frozen=True)
class NegGrad(Method):
    """Gradient ascent on the forget set: `-superfactor E ||eps - eps_theta(a_t, t)||^2`.

    A baseline of SISS (arXiv 2503.01034), whose code calls it `simple_neg_del`.

    Args:
        superfactor: factor of the ascent; clipping to max_grad_norm leaves little of it.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range.
    """

    superfactor: float = 1.0
    name: ClassVar[str] = "neggrad"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})

    def __post_init__(self):
        check.number("superfactor", self.superfactor, low=0, low_open=True)

    def draws(self) -> dict[str, Draw]:
        return FORGET

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        x_t, target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        # Descent on the negative loss.
        forget = Term("forget", target, scale=-self.superfactor)
        return [Pass(x_t, draws.forget_timesteps, (forget,), batch.forget_kwargs)]
