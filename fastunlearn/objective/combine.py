"""How the gradients of a step become one: added up, or a correction that is rescaled, projected or balanced.

A combination names its gradients in the order in which a step completes them. `Sum` has one, `"total"`. The
others keep the gradient of the forget terms, the correction, apart from that of the retain terms, the main
one, and leave `main - factor * correction`, or, where there is a `main_factor`, `main_factor * main - factor
* correction`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..host import check
from ..host.tensor_lists import inner_product, total_norm

SCALINGS = ("norm", "ratio", "clip")
# What EraseDiff's code adds to the denominators of its multipliers.
SMALL = 1e-8


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
    # 0-d, what the main gradient was multiplied by. None: 1.
    main_factor: Tensor | None = None


# 0-d: f, and what the main gradient is multiplied by. None: 1.
Factors = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class Sum:
    """All terms are one gradient, `"total"`."""

    gradients: ClassVar[tuple[str, ...]] = ("total",)


@dataclass(frozen=True)
class Rescale:
    """`g = g_retain - f g_forget`, where the norm of the correction `f g_forget` is what is asked for.

    SISS section 4.2; ReTrack's `backward_with_rescaling`.

    Args:
        scaling_norm: as `scaling` reads it.
        scaling: `"norm"`, as in the papers' code: the correction is set to the norm `scaling_norm`, up or
            down, `f = scaling_norm / ||g_forget||`. `"ratio"`: to `scaling_norm` times the norm of the main
            gradient, `f = scaling_norm ||g_retain|| / ||g_forget||`. `"clip"`: it is only ever made smaller,
            `f = min(1, scaling_norm / ||g_forget||)`. An infinite f of the first two counts as 0.
    """

    scaling_norm: float
    scaling: Literal["norm", "ratio", "clip"] = "norm"
    gradients: ClassVar[tuple[str, ...]] = ("forget", "retain")

    def __post_init__(self) -> None:
        check.one_of("scaling", self.scaling, SCALINGS)

    @property
    def needs_main(self) -> bool:
        """Whether the factor can only be had once there is a main gradient."""
        return self.scaling == "ratio"

    def unit(self, weights: Sequence[Tensor]) -> Tensor | None:
        """0-d: the largest of the correction's `weights` (each `[B]`, >= 0); None where there are none.

        Rescaling cancels a common factor of them, or puts it back (`"clip"`). Taken out, it keeps tiny
        weights, and the gradients that they make, out of float32's subnormal numbers; the step puts it back
        into what it reports.
        """
        if not weights:
            return None
        if len(weights) == 1:
            return weights[0].amax()
        return torch.stack([each.amax() for each in weights]).amax()

    def factors(
        self,
        norm: Tensor,
        main: Sequence[Tensor | None],
        correction: Sequence[Tensor | None],
        loss_scale: Tensor | float,
        unit: Tensor | float,
    ) -> Factors:
        """f for the correction as it was computed: divided by `unit`, and so is its `norm`.

        Beside it what the main gradient is multiplied by. Both gradients are multiplied by the loss scale.
        Each has an entry for every parameter, None where it is missing; without `needs_main` nobody reads
        them.
        """
        if self.scaling == "ratio":
            # f = scaling_norm ||g_retain|| / ||g_forget||, in which the loss scale cancels; 0 / 0 is 0.
            present = [gradient for gradient in main if gradient is not None]
            wanted = self.scaling_norm * total_norm(present, norm.device)
            factor = torch.where(norm == 0, norm, wanted / norm)
        else:
            # f = scaling_norm / ||g_forget||
            factor = self.scaling_norm * loss_scale / norm
        if self.scaling == "clip":
            # f = min(1, scaling_norm / ||g_forget||): of the gradient divided by its unit, at most the unit.
            return factor.clamp(max=unit), None
        return torch.where(torch.isinf(factor), torch.zeros_like(factor), factor), None


@dataclass(frozen=True)
class Project:
    """`g = g_retain + max(eta - c, 0) g_forget`, in which `rule` says what c is.

    - `"projection"`: `<g_retain, g_forget> / ||g_forget||^2`. EraseDiff, as used by SISS and ReTrack:
      afterwards `<g, g_forget> >= eta ||g_forget||^2`.
    - `"norm"`: `<g_retain, g_forget> / (||g_forget|| + 1e-8)`, which EraseDiff's code names as BOME's.
    - `"cosine"`: `<g_retain, g_forget> / (||g_retain|| ||g_forget|| + 1e-8)`, which EraseDiff's code runs.

    Args:
        multiplier: stands in place of `max(eta - c, 0)`; None: the rule holds.

    The factor is reported as f in `g_retain - f g_forget`.
    """

    eta: float
    rule: Literal["projection", "norm", "cosine"] = "projection"
    multiplier: float | None = None
    gradients: ClassVar[tuple[str, ...]] = ("forget", "retain")
    needs_main: ClassVar[bool] = True

    def unit(self, weights: Sequence[Tensor]) -> None:
        """None: the factor depends on how large the correction is."""
        return None

    def factors(
        self,
        norm: Tensor,
        main: Sequence[Tensor | None],
        correction: Sequence[Tensor | None],
        loss_scale: Tensor | float,
        unit: Tensor | float,
    ) -> Factors:
        """As `Rescale.factors`."""
        if self.multiplier is not None:
            return torch.full_like(norm, -self.multiplier), None
        # A parameter that has one gradient alone adds nothing to the inner product.
        pairs = zip(main, correction, strict=True)
        both = [(one, other) for one, other in pairs if one is not None and other is not None]
        product = inner_product([one for one, _ in both], [other for _, other in both], norm.device)
        if self.rule == "projection":
            # f = -max(eta - <g_retain, g_forget> / ||g_forget||^2, 0), in which a loss scale cancels. The
            # norm is not squared: that of a small gradient would leave float32.
            share = product / norm / norm
        elif self.rule == "norm":
            # Of gradients that are multiplied by the loss scale: one of the two is divided by it.
            share = product / loss_scale / (norm + SMALL * loss_scale)
        else:
            # The sum in the denominator is that of unscaled gradients.
            present = [gradient for gradient in main if gradient is not None]
            norms = (total_norm(present, norm.device) / loss_scale) * (norm / loss_scale)
            share = product / loss_scale / loss_scale / (norms + SMALL)
        factor = -torch.clamp(self.eta - share, min=0)
        # A gradient of zero has nothing to project on.
        return torch.where(norm == 0, torch.zeros_like(factor), factor), None


@dataclass(frozen=True)
class Balance:
    """`g = lambd g_forget + (1 - lambd) g_retain`, both of one norm at every step.

    `lambd = ||g_retain|| / (||g_forget|| + ||g_retain||)`: ReTrack's rule for lambd (section 3.4), by
    gradients. Where one of both vanishes, the other stands alone. The factor is reported as f = -lambd.
    """

    gradients: ClassVar[tuple[str, ...]] = ("forget", "retain")
    needs_main: ClassVar[bool] = True

    def unit(self, weights: Sequence[Tensor]) -> None:
        """None: the factor depends on how large the correction is."""
        return None

    def factors(
        self,
        norm: Tensor,
        main: Sequence[Tensor | None],
        correction: Sequence[Tensor | None],
        loss_scale: Tensor | float,
        unit: Tensor | float,
    ) -> Factors:
        """As `Rescale.factors`; there is no unit."""
        # lambd = ||g_retain|| / (||g_forget|| + ||g_retain||), in which a loss scale cancels. 1 - lambd has a
        # quotient of its own: the difference would be 0 in float32 where the forget gradient is far smaller.
        main_norm = total_norm([gradient for gradient in main if gradient is not None], norm.device)
        both = norm + main_norm
        lambd, rest = main_norm / both, norm / both
        # The gradient that vanishes would take the other with it.
        zero, one = torch.zeros_like(lambd), torch.ones_like(lambd)
        lambd = torch.where(norm == 0, zero, torch.where(main_norm == 0, one, lambd))
        rest = torch.where(norm == 0, one, torch.where(main_norm == 0, zero, rest))
        return -lambd, rest


Combination = Sum | Rescale | Project | Balance
