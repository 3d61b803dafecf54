from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import functional as F
from ..host import check
from ..objective import combine as combination
from ..objective.draws import Draws
from ..objective.protocol import Batch, Method, Pass, Term, mean_weight
from ..objective.schedule import NoiseSchedule


@dataclass(frozen=True)
class EraseDiff(Method):
    """EraseDiff as compared by SISS and ReTrack: forget images are trained to predict uniform noise, combined
    by projection.

    `g = g_retain + max(eta - <g_retain, g_forget> / ||g_forget||^2, 0) g_forget` (methods.md C). Each term is
    a mean over its own batch; the papers' code divides both by the forget batch, which differs only where the
    batches do.
    """

    eta: float = 1e-3
    name: ClassVar[str] = "erasediff"
    batches: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})
    draws: ClassVar[frozenset[str]] = frozenset(
        {"forget_noise", "forget_timesteps", "retain_noise", "retain_timesteps", "uniform_target"}
    )

    def __post_init__(self):
        check.number("eta", self.eta, low=0)

    @property
    def combine(self) -> combination.Combination:
        return combination.Project(self.eta)

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        forget_x_t, _ = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        retain_x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        return [
            Pass(
                forget_x_t,
                draws.forget_timesteps,
                (Term("forget", draws.uniform_target, mean_weight(batch.forget)),),
                batch.forget_kwargs,
            ),
            Pass(
                retain_x_t,
                draws.retain_timesteps,
                (Term("retain", target, mean_weight(batch.retain)),),
                batch.retain_kwargs,
            ),
        ]
