from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import functional as F
from ..objective.draws import RETAIN, Draw, Draws
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="goes on training on the retain set; forgets slowly.",
    source="arXiv 2503.01034 (SISS), its naive deletion",
    recipes={
        "mnist-tshirt": {"lr": 5e-5},
        "celeba-hq": {"lr": 5e-6},
        "cifar-10": {"lr": 2e-5},
        "sd-1.4": {"lr": 1e-5},
        "mnist-tshirt-small": {"lr": 1.5e-4},
    },
    place=5,
)
@dataclass(frozen=True)
class Vanilla(Method):
    """Naive deletion (arXiv 2503.01034): training goes on, on the retain set.

    It descends on `E ||eps - eps_theta(x_t, t)||^2`.
    """

    name: ClassVar[str] = "vanilla"
    needs: ClassVar[frozenset[str]] = frozenset({"retain"})

    def draws(self) -> dict[str, Draw]:
        return RETAIN

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        return [Pass(x_t, draws.retain_timesteps, (Term("retain", target),), batch.retain_kwargs)]
