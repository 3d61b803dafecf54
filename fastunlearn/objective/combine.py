"""How the gradient of the forget terms, kept apart, joins that of the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..host.tensor_lists import inner_product


@dataclass(frozen=True)
class Combined:
    """What a combination reports: the norm of the correction gradient and the factor it was subtracted with
    (None: there is no correction).
    """

    correction_norm: Tensor | None = None
    scaling_factor: Tensor | None = None
    # the same for the correction as it was computed, divided by its unit: in float range however small the
    # unit is
    applied_factor: Tensor | None = None


@dataclass(frozen=True)
class Rescale:
    """`g = g_x - f g_a` with `f = scaling_norm / ||g_a||` (SISS section 4.2; ReTrack's
    `backward_with_rescaling`); an infinite f counts as 0.
    """

    scaling_norm: float
    needs_main: ClassVar[bool] = False  # the factor can be had before there is a main gradient

    def factor(
        self, norm: Tensor, main: list[Tensor], correction: list[Tensor], loss_scale: Tensor | float
    ) -> Tensor:
        factor = self.scaling_norm * loss_scale / norm
        return torch.where(torch.isinf(factor), torch.zeros_like(factor), factor)


@dataclass(frozen=True)
class Project:
    """`g = g_x + max(eta - <g_x, g_a> / ||g_a||^2, 0) g_a` (EraseDiff, as used by SISS and ReTrack); the
    factor is reported as f in `g_x - f g_a`.
    """

    eta: float
    needs_main: ClassVar[bool] = True

    def factor(
        self, norm: Tensor, main: list[Tensor], correction: list[Tensor], loss_scale: Tensor | float
    ) -> Tensor:
        factor = -torch.clamp(self.eta - inner_product(main, correction, norm.device) / norm / norm, min=0)
        # a gradient of zero has nothing to project on
        return torch.where(norm == 0, torch.zeros_like(factor), factor)


Combination = Rescale | Project
