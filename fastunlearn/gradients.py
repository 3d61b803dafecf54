"""Parameter gradients: where they accumulate, how two become one (rescale, project), clipping, and an update that a NaN cannot ruin."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

log = logging.getLogger("fastunlearn")


class GradientBuffers:
    """`.grad` of the parameters, and a second set of buffers for methods that need two gradients apart; swapped, never copied."""

    def __init__(self, parameters: Iterable[nn.Parameter]):
        self.parameters = list(parameters)
        for parameter in self.parameters:
            parameter.grad = None
        self._parked: list[Tensor | None] = [None] * len(self.parameters)
        self._role = "retain"

    def select(self, role: str) -> None:
        """Makes backward passes accumulate the gradient of `role`: `"retain"` (the main one) or `"forget"` (the correction)."""
        if role == self._role:
            return
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self._parked[index] = self._parked[index], parameter.grad
        self._role = role

    def main(self) -> list[Tensor]:
        """The gradients in `.grad`, of the parameters that have one."""
        self.select("retain")
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def correction(self) -> list[Tensor]:
        self.select("retain")
        return [gradient for gradient in self._parked if gradient is not None]

    def pairs(self) -> tuple[list[Tensor], list[Tensor]]:
        """Main and correction gradient of the parameters that have both."""
        self.select("retain")
        both = [(p.grad, g) for p, g in zip(self.parameters, self._parked, strict=True) if p.grad is not None and g is not None]
        return [main for main, _ in both], [correction for _, correction in both]

    def subtract_correction(self, factor: Tensor) -> None:
        """`main -= factor * correction`, in place; frees the correction."""
        self.select("retain")
        correction = self.correction()
        if correction:
            torch._foreach_mul_(correction, -factor.to(correction[0].dtype))
        main, paired = self.pairs()
        if main:
            torch._foreach_add_(main, paired)
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is None:
                parameter.grad = self._parked[index]
        self._parked = [None] * len(self.parameters)


@dataclass(frozen=True)
class Combined:
    """What a combination reports: the norm of the correction gradient and the factor it was subtracted with (None: there is no correction)."""

    correction_norm: Tensor | None = None
    scaling_factor: Tensor | None = None


# A combination turns the buffers into one gradient in `.grad`. `unit`: the correction was computed divided by it; `loss_scale`: both are multiplied by it.
Combination = Callable[[GradientBuffers, Tensor, "Tensor | float"], Combined]


def add(buffers: GradientBuffers, unit: Tensor, loss_scale: Tensor | float) -> Combined:
    """One gradient, nothing to combine."""
    return Combined()


def rescale(scaling_norm: float) -> Combination:
    """`g = g_x - f g_a` with `f = scaling_norm / ||g_a||` (SISS section 4.2; ReTrack's `backward_with_rescaling`); an infinite f counts as 0."""

    def combine(buffers: GradientBuffers, unit: Tensor, loss_scale: Tensor | float) -> Combined:
        norm = total_norm(buffers.correction(), unit.device) / loss_scale
        factor = scaling_norm / norm
        factor = torch.where(torch.isinf(factor), torch.zeros_like(factor), factor)
        buffers.subtract_correction(factor)
        return Combined(norm * unit, factor / unit)

    return combine


def project(eta: float) -> Combination:
    """`g = g_x + max(eta - <g_x, g_a> / ||g_a||^2, 0) g_a` (EraseDiff, as used by SISS and ReTrack); the factor is reported as f in `g_x - f g_a`."""

    def combine(buffers: GradientBuffers, unit: Tensor, loss_scale: Tensor | float) -> Combined:
        norm = total_norm(buffers.correction(), unit.device)
        factor = -torch.clamp(eta - inner_product(*buffers.pairs(), unit.device) / norm / norm, min=0)
        factor = torch.where(norm == 0, torch.zeros_like(factor), factor)  # a gradient of zero has nothing to project on
        buffers.subtract_correction(factor)
        return Combined(norm * unit / loss_scale, factor / unit)

    return combine


def total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The L2 norm over all `gradients` together, 0-d; 0 if there are none."""
    if not gradients:
        return torch.zeros((), device=device)
    low = [gradient for gradient in gradients if gradient.dtype == torch.bfloat16]
    norms = [nn.utils.get_total_norm([gradient for gradient in gradients if gradient.dtype != torch.bfloat16])] if len(low) < len(gradients) else []
    return torch.linalg.vector_norm(torch.stack(norms + list(torch._foreach_norm(low, 2, dtype=torch.float32)) if low else norms))


def inner_product(left: list[Tensor], right: list[Tensor], device: torch.device) -> Tensor:
    """`<left, right>` over all tensors together, 0-d. The two signs are summed apart because foreach has norms but no sums."""
    if not left:
        return torch.zeros((), device=device)
    products = torch._foreach_mul(*([gradient.float() if gradient.dtype == torch.bfloat16 else gradient for gradient in side] for side in (left, right)))
    positive = torch._foreach_norm(torch._foreach_clamp_min(products, 0.0), 1)
    negative = torch._foreach_norm(torch._foreach_clamp_max(products, 0.0), 1)
    return torch.stack(positive).sum() - torch.stack(negative).sum()


def clip(parameters: list[nn.Parameter], max_norm: float | None) -> Tensor:
    """Clips the gradients of `parameters` to `max_norm` in place (as `clip_grad_norm_`) and returns their norm before, 0-d."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    norm = total_norm(gradients, parameters[0].device)
    if max_norm is not None and gradients:
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def guarded_step(optimizer: torch.optim.Optimizer, finite: Tensor) -> None:
    """`optimizer.step()`, unless `finite` (0-d bool) is False: on the device where the optimizer takes `found_inf`, else by one host check."""
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.grad_scale, optimizer.found_inf = None, (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
        return
    if finite.device.type != "cpu":
        _say_host_check(type(optimizer).__name__)
    if bool(finite):
        optimizer.step()


@functools.cache
def _say_host_check(optimizer: str) -> None:
    log.warning("%s does not take found_inf: the check for a non-finite step waits for the device once a step (AdamW(fused=True) would not)", optimizer)
