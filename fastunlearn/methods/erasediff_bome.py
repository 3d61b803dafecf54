from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from .. import functional as F
from ..host import check
from ..host.store import ImageStore
from ..objective.combine import Project
from ..objective.conditioning import map_tensors
from ..objective.draws import FORGET, RETAIN, Draw, Draws, Uniform
from ..objective.protocol import Batch, Method, Pass, Predicted, Term
from ..objective.schedule import NoiseSchedule
from .registry import register

RULES = ("cosine", "norm", "projection")
TARGETS = ("uniform", "other_condition")


@register(
    help="EraseDiff as its authors run it: trains forget images toward uniform noise or the prediction under "
    "another condition, with a multiplier by the angle of both gradients.",
    source="arXiv 2401.05779 and its code; BOME is arXiv 2209.08709",
    variants={"fixed": {"lambda_bome": 0.1}},
    timed_on="mnist",
    place=5.5,
)
@dataclass(frozen=True)
class EraseDiffBome(Method):
    """EraseDiff in its original form: the retain loss is descended, and the forget loss with a multiplier.

    It treats unlearning (arXiv 2401.05779) as a bilevel problem (BOME, arXiv 2209.08709): minimize `L_r`
    where `L_f` is smallest. From the weights theta of a step, `inner_steps` updates on `L_f` lead to theta^K;
    the step then descends

        L_r(theta) + lambda (L_f(theta) - stopgrad L_f(theta^K)),    lambda = max(eta - c, 0),

    in which `rule` says what c is: `<g_r, g_f> / (||g_r|| ||g_f|| + 1e-8)`, `<g_r, g_f> / (||g_f|| + 1e-8)`
    or `<g_r, g_f> / ||g_f||^2`, with the gradients g_r of `L_r` and g_f of `L_f`.

    The stopped term is a constant, and no rule reads its value: inner steps change the reported `loss` (and
    `inner_loss`, which is `L_f(theta^K)`), and nothing else, so there are none by default. Weights,
    optimizer, buffers and random numbers are put back after them. (The released code puts back the weights
    alone, and goes on with the moments of Adam that its inner steps have left.)

    `L_f` is the squared distance to uniform noise or, where images have conditions (labels, prompts), to what
    the network itself predicts for the forget image under the condition of a retain image: the b-th forget
    row has that of the b-th retain row, beginning anew where those are fewer. The released code draws one
    other class a batch.

    Args:
        eta: lambda is eta less c, where that is positive. Nobody has tuned it for unlearning: in 50 steps the
            default ruined the digits of the demo's model.
        rule: what c is: the cosine of the two gradients, their product over the norm of the forget gradient,
            or over its square (the rule of `erasediff`). Under `norm` lambda depends on the unit of the
            losses, which here are sums over the elements of an image and in the released code means.
        lambda_bome: where >= 0, lambda itself, for every step (released default 0.1); below 0 the rule gives
            it.
        target: what the forget images are trained toward: uniform noise, or the network's own prediction
            under the condition of a retain image (other_condition, of a method_step alone: neither the
            commands nor an Unlearner have conditions).
        inner_steps: updates on the forget loss that are tried out before each step, for `inner_loss`; each
            costs a forget step, and the loss one more forward pass.

    Raises:
        TypeError, ValueError: naming the hyperparameter that is out of its range.
    """

    eta: float = 0.1
    rule: Literal["cosine", "norm", "projection"] = "cosine"
    lambda_bome: float = -1.0
    target: Literal["uniform", "other_condition"] = "uniform"
    inner_steps: int = 0
    name: ClassVar[str] = "erasediff_bome"
    needs: ClassVar[frozenset[str]] = frozenset({"forget", "retain"})

    def __post_init__(self):
        check.number("eta", self.eta, low=0)
        check.one_of("rule", self.rule, RULES)
        check.number("lambda_bome", self.lambda_bome)
        check.one_of("target", self.target, TARGETS)
        check.integer("inner_steps", self.inner_steps, low=0)

    @property
    def without_effect(self) -> frozenset[str]:
        return frozenset({"eta", "rule"}) if self.lambda_bome >= 0 else frozenset()

    def check_sets(self, stores: Mapping[str, ImageStore], device: torch.device) -> None:
        if self.target != "uniform":
            expected = "expected 'uniform' in an Unlearner, whose images have no conditions"
            raise ValueError(f"target: {expected}, got {self.target!r}")

    def draws(self) -> dict[str, Draw]:
        if self.target == "uniform":
            return FORGET | RETAIN | {"uniform_target": Uniform("forget")}
        return FORGET | RETAIN

    @property
    def combine(self) -> Project:
        # lambda = max(eta - c, 0), or the one that is given.
        return Project(self.eta, self.rule, self.lambda_bome if self.lambda_bome >= 0 else None)

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        # L_f = ||eps_theta(a_t) - target||^2
        forget_x_t, _ = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        forget = Term("forget", self._target(batch, draws))
        # L_r = ||eps_theta(x_t) - eps||^2
        retain_x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        retain = Term("retain", target)
        return [
            Pass(forget_x_t, draws.forget_timesteps, (forget,), batch.forget_kwargs),
            Pass(retain_x_t, draws.retain_timesteps, (retain,), batch.retain_kwargs),
        ]

    def _target(self, batch: Batch, draws: Draws) -> Tensor | Predicted:
        if self.target == "uniform":
            return draws.uniform_target
        if not batch.retain_kwargs:
            expected = "expected 'uniform' where the images have no conditions (retain_kwargs)"
            raise ValueError(f"target: {expected}, got 'other_condition'")
        rows = torch.arange(len(batch.forget), device=batch.forget.device) % len(batch.retain)
        return Predicted("model", map_tensors(lambda condition: condition[rows], batch.retain_kwargs))
