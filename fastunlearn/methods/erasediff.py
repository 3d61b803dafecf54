from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import functional as F
from ..host import check
from ..objective.combine import Project
from ..objective.draws import FORGET, RETAIN, Draw, Draws, Uniform
from ..objective.protocol import Batch, Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from .registry import register


@register(
    help="trains forget images toward uniform noise, along with the retain set.",
    source="arXiv 2401.05779, as SISS and ReTrack compare it",
    recipes={
        "mnist-tshirt": {"eta": 1e-3, "lr": 5e-5},
        "celeba-hq": {"eta": 1e-3, "lr": 5e-6},
        "cifar-10": {"eta": 1e-3, "lr": 2e-5},
        "sd-1.4": {"eta": 1e-2, "lr": 1e-5},
        "mnist-tshirt-small": {"eta": 1e-3, "lr": 1.5e-4},
    },
    timed_on="mnist",
    place=3,
)
@dataclass(frozen=True)
class EraseDiff(Method):
    """EraseDiff (arXiv 2401.05779) as SISS and ReTrack compare it: forget images are to predict noise.

    It is uniform in [0, 1). The gradients are combined by projection: `g = g_retain + max(eta - <g_retain,
    g_forget> / ||g_forget||^2, 0) g_forget`. Each term is a mean over its own batch; the papers' code divides
    both by the forget batch, which differs only where the batches do.

    Args:
        eta: the combined gradient descends on the forget term at least this share of that term's own
            gradient.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range.
    """

    eta: float = 1e-3
    name: ClassVar[str] = "erasediff"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})

    def __post_init__(self):
        check.number("eta", self.eta, low=0)

    def draws(self) -> dict[str, Draw]:
        return FORGET | RETAIN | {"uniform_target": Uniform("forget")}

    @property
    def combine(self) -> Project:
        return Project(self.eta)

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        forget_x_t, _ = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        retain_x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        forget, retain = Term("forget", draws.uniform_target), Term("retain", target)
        return [
            Pass(forget_x_t, draws.forget_timesteps, (forget,), batch.forget_kwargs),
            Pass(retain_x_t, draws.retain_timesteps, (retain,), batch.retain_kwargs),
        ]
