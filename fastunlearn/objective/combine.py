"""How the gradients of a step become one: added up, or a correction that is rescaled or projected.

A combination names its gradients in the order in which a step completes them. `Sum` has one, `"total"`. The
others keep the gradient of the forget terms, the correction, apart from that of the retain terms, the main
one, and leave `main - factor * correction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..host.tensor_lists import inner_product


@dataclass(frozen=True)
class Combined:
    """What a combination reports. All are None where there is no correction."""

    # 0-d, L2 norm of the correction.
    correction_norm: Tensor | None = None
    # 0-d, f in `main - f correction`.
    scaling_factor: Tensor | None = None
    # The same for the correction as it was computed, divided by its unit: in float range, however small the
    # unit is.
    applied_factor: Tensor | None = None


@dataclass(frozen=True)
class Sum:
    """All terms are one gradient, `"total"`."""

    gradients: ClassVar[tuple[str, ...]] = ("total",)


@dataclass(frozen=True)
class Rescale:
    """`g = g_retain - f g_forget` with `f = scaling_norm / ||g_forget||`; an infinite f counts as 0.

    SISS section 4.2; ReTrack's `backward_with_rescaling`.
    """

    scaling_norm: float
    gradients: ClassVar[tuple[str, ...]] = ("forget", "retain")
    # The factor can be had before there is a main gradient.
    needs_main: ClassVar[bool] = False

    def unit(self, weights: Sequence[Tensor]) -> Tensor | None:
        """0-d: the largest of the correction's `weights` (each `[B]`, >= 0); None where there are none.

        Rescaling cancels a common factor of them. Taken out, it keeps tiny weights, and the gradients that
        they make, out of float32's subnormal numbers; the step puts it back into what it reports.
        """
        if not weights:
            return None
        if len(weights) == 1:
            return weights[0].amax()
        return torch.stack([each.amax() for each in weights]).amax()

    def factor(
        self, norm: Tensor, main: list[Tensor], correction: list[Tensor], loss_scale: Tensor | float
    ) -> Tensor:
        # f = scaling_norm / ||g_forget||. `norm` and the main gradient are multiplied by the loss scale.
        factor = self.scaling_norm * loss_scale / norm
        return torch.where(torch.isinf(factor), torch.zeros_like(factor), factor)


@dataclass(frozen=True)
class Project:
    """`g = g_retain + max(eta - <g_retain, g_forget> / ||g_forget||^2, 0) g_forget`.

    EraseDiff, as used by SISS and ReTrack. The factor is reported as f in `g_retain - f g_forget`.
    """

    eta: float
    gradients: ClassVar[tuple[str, ...]] = ("forget", "retain")
    needs_main: ClassVar[bool] = True

    def unit(self, weights: Sequence[Tensor]) -> None:
        """None: the factor depends on how large the correction is."""
        return None

    def factor(
        self, norm: Tensor, main: list[Tensor], correction: list[Tensor], loss_scale: Tensor | float
    ) -> Tensor:
        # f = -max(eta - <g_retain, g_forget> / ||g_forget||^2, 0), in which a loss scale cancels. The norm is
        # not squared: that of a small gradient would leave float32.
        factor = -torch.clamp(self.eta - inner_product(main, correction, norm.device) / norm / norm, min=0)
        # A gradient of zero has nothing to project on.
        return torch.where(norm == 0, torch.zeros_like(factor), factor)


Combination = Sum | Rescale | Project
