from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .. import functional as F
from ..host import check
from ..objective.combine import Project
from ..objective.draws import FORGET, RETAIN, Draw, Draws, Uniform
from ..objective.protocol import Batch, Method, Pass, Term
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
