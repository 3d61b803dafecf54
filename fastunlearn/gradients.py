"""Parameter gradients: how two become one (rescale, project), their mean over processes, clipping, and an update that a NaN cannot ruin."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

log = logging.getLogger("fastunlearn")

REDUCED_AT_ONCE = 64 << 20  # bytes of gradients in one all-reduce
MULTIPLIED_AT_ONCE = 64 << 20  # bytes of products that an inner product holds

# What torch says of a network whose backward pass is not the step's to take, and what that means here.
REFUSED_BACKWARD = {
    "use_reentrant": (
        "model: expected activation checkpoints with use_reentrant=False (in diffusers and transformers an "
        "argument of what enables gradient checkpointing), got reentrant ones, which cannot go back for the "
        "trained parameters alone"
    ),
    "backward through the graph a second time": (
        "model: expected an output whose graph is that of its own call, got one that shares a part with "
        "another call of the step (something with a graph that was computed before, such as a text embedding: "
        "detach() it, or compute it inside of the model)"
    ),
}


@dataclass(frozen=True)
class Combined:
    """What a combination reports: the norm of the correction gradient and the factor it was subtracted with (None: there is no correction)."""

    correction_norm: Tensor | None = None
    scaling_factor: Tensor | None = None
    applied_factor: Tensor | None = None  # the same for the correction as it was computed, divided by its unit: in float range however small the unit is


@dataclass(frozen=True)
class Rescale:
    """`g = g_x - f g_a` with `f = scaling_norm / ||g_a||` (SISS section 4.2; ReTrack's `backward_with_rescaling`); an infinite f counts as 0."""

    scaling_norm: float
    needs_main: ClassVar[bool] = False  # the factor can be had before there is a main gradient

    def factor(self, norm: Tensor, main: list[Tensor], correction: list[Tensor], loss_scale: Tensor | float) -> Tensor:
        factor = self.scaling_norm * loss_scale / norm
        return torch.where(torch.isinf(factor), torch.zeros_like(factor), factor)


@dataclass(frozen=True)
class Project:
    """`g = g_x + max(eta - <g_x, g_a> / ||g_a||^2, 0) g_a` (EraseDiff, as used by SISS and ReTrack); the factor is reported as f in `g_x - f g_a`."""

    eta: float
    needs_main: ClassVar[bool] = True

    def factor(self, norm: Tensor, main: list[Tensor], correction: list[Tensor], loss_scale: Tensor | float) -> Tensor:
        factor = -torch.clamp(self.eta - inner_product(main, correction, norm.device) / norm / norm, min=0)
        return torch.where(norm == 0, torch.zeros_like(factor), factor)  # a gradient of zero has nothing to project on


Combination = Rescale | Project


class Accumulator:
    """Backward passes of two roles, `"retain"` (the main gradient) and `"forget"` (the correction), and how they become one gradient in `.grad`.

    With `in_place` all passes of the correction come first: it is then scaled where it lies, and the main gradient is added to it. Otherwise
    the two have a set of buffers each, swapped between `.grad` and here, never copied.

    Args:
        combination: None: both roles are one gradient.
        unit: 0-d; the correction was computed divided by it.
        loss_scale: both gradients are multiplied by it.
        group: processes whose mean the gradients are; each gradient is reduced before its norm is taken.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        combination: Combination | None = None,
        *,
        in_place: bool = False,
        unit: Tensor | float = 1.0,
        loss_scale: Tensor | float = 1.0,
        group: dist.ProcessGroup | None = None,
    ):
        self.parameters = list(parameters)
        self.combination, self.unit, self.loss_scale, self.group = combination, unit, loss_scale, group
        for parameter in self.parameters:
            parameter.grad = None
        self._parked: list[Tensor | None] = [None] * len(self.parameters)
        self._combined: Combined | None = None if combination else Combined()
        self._in_place = in_place and combination is not None and not combination.needs_main
        self._role = "forget" if self._in_place else "retain"

    def backward(self, role: str, prediction: Tensor, gradient: Tensor, *, retain_graph: bool = False) -> None:
        """Adds the gradient of `role` that `gradient` (d loss / d prediction) brings."""
        self._select(role)
        try:
            torch.autograd.backward(prediction, gradient, retain_graph=retain_graph, inputs=self.parameters)
        except RuntimeError as error:
            for text, explanation in REFUSED_BACKWARD.items():
                if text in str(error):
                    raise ValueError(explanation) from error
            raise

    def finish(self) -> Combined:
        """Leaves the combined gradient in `.grad`: of all processes, and still multiplied by the loss scale."""
        self._select("retain")
        self._reduce()
        if self._combined is None:
            self._combined = self._merge()
        return self._combined

    def _merge(self) -> Combined:
        """Adds the parked correction to the main gradient in `.grad`."""
        self._swap()
        self._reduce()
        norm = total_norm(self._present(), self._device)
        both = [(main, parameter.grad) for main, parameter in zip(self._parked, self.parameters, strict=True) if parameter.grad is not None]
        mains, corrections = [main for main, _ in both if main is not None], [own for main, own in both if main is not None]
        factor = self.combination.factor(norm, mains, corrections, self.loss_scale)
        _multiply([own for main, own in both if main is None], -factor)
        if mains and self._device.type == "cpu":  # one pass over both; on GPUs foreach has a fast way for tensors of equal shapes only
            torch._foreach_addcmul_(mains, corrections, [(-factor).to(main.dtype) for main in mains])
        elif mains:
            _multiply(corrections, -factor)
            torch._foreach_add_(mains, corrections)
        for parameter, main in zip(self.parameters, self._parked, strict=True):
            parameter.grad = parameter.grad if main is None else main
        self._parked = [None] * len(self.parameters)
        return self._report(norm, factor)

    def _select(self, role: str) -> None:
        """Lets backward passes accumulate the gradient of `role`."""
        if role == self._role or self.combination is None:
            return
        if self._in_place:
            if role == "forget":
                raise RuntimeError("the correction was complete: its passes come first")
            self._settle()
        else:
            self._swap()
        self._role = role

    def _settle(self) -> None:
        """Makes the complete correction in `.grad`, g_a, to -f g_a, on which the main gradient comes."""
        self._reduce()
        correction = self._present()
        norm = total_norm(correction, self._device)
        factor = self.combination.factor(norm, [], [], self.loss_scale)
        _multiply(correction, -factor)
        self._combined = self._report(norm, factor)

    def _report(self, norm: Tensor, factor: Tensor) -> Combined:
        return Combined(norm * self.unit / self.loss_scale, factor / self.unit, factor)

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self._parked[index] = self._parked[index], parameter.grad

    def _present(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _reduce(self) -> None:
        """Makes `.grad` the mean over the processes. A gradient that is missing here counts as zero; one that is missing everywhere stays missing,
        since an optimizer would decay the parameter of a zero one."""
        if self.group is None:
            return
        missing = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        present = torch.ones(len(self.parameters), device=self._device)
        for index in missing:
            self.parameters[index].grad = torch.zeros_like(self.parameters[index])
            present[index].zero_()
        reduce_mean([*self._present(), present], self.group)
        if missing:
            if self._device.type != "cpu":
                _say_missing(len(missing))
            shares = present.tolist()
            for index in missing:
                if shares[index] == 0:
                    self.parameters[index].grad = None

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device


def reduce_mean(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """The mean of `tensors` over the processes of `group`, in place; every process brings the same shapes in the same order."""
    for some in _portions(tensors, REDUCED_AT_ONCE):
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        torch._foreach_copy_(some, [part.view_as(tensor) for part, tensor in zip(flat.split([t.numel() for t in some]), some, strict=True)])


def total_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """The L2 norm over all `gradients` together, 0-d; 0 if there are none."""
    if not gradients:
        return torch.zeros((), device=device)
    low = [gradient for gradient in gradients if gradient.dtype == torch.bfloat16]
    norms = [nn.utils.get_total_norm([gradient for gradient in gradients if gradient.dtype != torch.bfloat16])] if len(low) < len(gradients) else []
    return torch.linalg.vector_norm(torch.stack(norms + list(torch._foreach_norm(low, 2, dtype=torch.float32)) if low else norms))


def inner_product(left: list[Tensor], right: list[Tensor], device: torch.device) -> Tensor:
    """`<left, right>` over all tensors together, 0-d."""
    if not left:
        return torch.zeros((), device=device)
    if device.type == "cpu":  # foreach on a CPU is a loop over the tensors, too, and writes the products
        return torch.stack([torch.dot(*(_at_least_float32(side).flatten() for side in pair)) for pair in zip(left, right, strict=True)]).sum()
    sums = []
    for some in _portions(list(zip(left, right, strict=True)), MULTIPLIED_AT_ONCE):
        products = torch._foreach_mul(*([_at_least_float32(gradient) for gradient in side] for side in zip(*some, strict=True)))
        sums += torch._foreach_norm(torch._foreach_clamp_min(products, 0.0), 1)  # foreach has norms but no sums: the two signs apart
        torch._foreach_clamp_max_(products, 0.0)
        sums += torch._foreach_neg(torch._foreach_norm(products, 1))
    return torch.stack(sums).sum()


def _at_least_float32(gradient: Tensor) -> Tensor:
    return gradient.float() if gradient.dtype == torch.bfloat16 else gradient


def _multiply(gradients: list[Tensor], factor: Tensor) -> None:
    """In place. bfloat16 gradients are multiplied by the float32 factor and rounded once."""
    for some in _portions(gradients, sys.maxsize):
        torch._foreach_mul_(some, factor if some[0].dtype == torch.bfloat16 else factor.to(some[0].dtype))


def _portions(items: list, limit: int) -> Iterator[list]:
    """`items`, tensors or tuples of them, in order: runs of one dtype and of at most `limit` bytes (or one item)."""
    run, size, dtype = [], 0, None
    for item in items:
        tensor = item[0] if isinstance(item, tuple) else item
        if run and (size + tensor.nbytes > limit or tensor.dtype != dtype):
            yield run
            run, size = [], 0
        run.append(item)
        size, dtype = size + tensor.nbytes, tensor.dtype
    if run:
        yield run


def clipping(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """What gradients of L2 norm `norm` are divided by so that it becomes `max_norm` at most, >= 1 (as `clip_grad_norm_` does); None: nothing."""
    return None if max_norm is None else ((norm + 1e-6) / max_norm).clamp(min=1)


def update(
    optimizer: torch.optim.Optimizer, divisor: Tensor | None, finite: Tensor, gradients: list[Tensor], grad_scaler: torch.amp.GradScaler | None = None
) -> None:
    """`optimizer.step()` on `gradients / divisor`, unless `finite` (0-d bool) is False.

    An optimizer that knows `grad_scale` and `found_inf` (fused AdamW) does all of it on the device in the pass that it makes anyway; for others, and
    with a `grad_scaler` (whose `unscale_` has been called), the gradients are divided before. For others the host waits for `finite`, too.
    """
    fused = _skips_on_device(optimizer)
    if grad_scaler is not None:
        for found_inf in grad_scaler._found_inf_per_device(optimizer).values():
            found_inf.copy_(torch.maximum(found_inf, (~finite).to(found_inf)))  # it has seen the gradients, but not the loss
        divide(gradients, divisor)
        if fused or not getattr(optimizer, "_step_supports_amp_scaling", False) or bool(finite):
            grad_scaler.step(optimizer)
        grad_scaler.update()
    elif fused:
        optimizer.grad_scale, optimizer.found_inf = None if divisor is None else divisor.float(), (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    else:
        if finite.device.type != "cpu":
            _say_host_check(type(optimizer).__name__)
        if bool(finite):
            divide(gradients, divisor)
            optimizer.step()


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step with `found_inf` changes nothing.

    Not SGD's first with momentum: torch makes the buffers of unwritten memory, and would leave them so. Not a
    wrapper that looks like the optimizer in it (Lightning's do): the one in it would not see `found_inf`. Not a
    subclass with a step() of its own, which may be blind to it.
    """
    if _replaces_step(type(optimizer)):
        return False
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        return False
    if not getattr(optimizer, "_step_supports_amp_scaling", False) or not all(group.get("fused", True) for group in optimizer.param_groups):
        return False
    return bool(optimizer.state) or not any(group.get("momentum") for group in optimizer.param_groups)


@functools.lru_cache(maxsize=256)  # asked at every step
def _replaces_step(kind: type) -> bool:
    """Whether `kind` inherits "takes `found_inf`" from one of torch's optimizers, but not the step() that does."""
    own, *replaced = [base for base in kind.__mro__ if "step" in vars(base)]
    inherited = any(_of_torch(base) for base in replaced if base is not torch.optim.Optimizer)
    return inherited and not _of_torch(own) and "_step_supports_amp_scaling" not in vars(own)


def _of_torch(kind: type) -> bool:
    return f"{kind.__module__}.".startswith("torch.optim.")


def divide(gradients: list[Tensor], divisor: Tensor | None) -> None:
    """`gradients /= divisor`, in place."""
    if divisor is not None:
        _multiply(gradients, divisor.reciprocal())


@functools.cache
def _say_host_check(optimizer: str) -> None:
    log.warning("%s takes no found_inf (yet): the check for a non-finite step waits for the device (AdamW(fused=True) would not)", optimizer)


@functools.cache
def _say_missing(count: int) -> None:
    log.warning(
        "%d parameters get no gradient: every step waits for the device to learn whether they have one in another process; requires_grad_(False) avoids it",
        count,
    )
