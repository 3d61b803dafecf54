"""Clipping, and an update that a gradient that is not finite cannot ruin."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from ..host import say
from ..host.tensor_lists import divide

HOST_CHECK = (
    "%s takes no found_inf (yet): the check for a non-finite step waits for the device "
    "(AdamW(fused=True) would not)"
)


def clipping(norm: Tensor, max_norm: float | None) -> Tensor | None:
    """What gradients of L2 norm `norm` are divided by, >= 1, so that it becomes `max_norm` at most.

    As `clip_grad_norm_` does. None: nothing.
    """
    if max_norm is None:
        return None
    return ((norm + 1e-6) / max_norm).clamp(min=1)


def forget_unscaling(
    grad_scaler: torch.amp.GradScaler | None, optimizer: torch.optim.Optimizer | None
) -> None:
    """After an error between `unscale_` and the update: the scaler would refuse to unscale the next step."""
    if grad_scaler is not None and optimizer is not None:
        grad_scaler._per_optimizer_states.pop(id(optimizer), None)


def update(
    optimizer: torch.optim.Optimizer,
    divisor: Tensor | None,
    finite: Tensor,
    gradients: list[Tensor],
    grad_scaler: torch.amp.GradScaler | None = None,
) -> None:
    """`optimizer.step()` on `gradients / divisor`, unless `finite` (0-d bool) is False.

    An optimizer that knows `grad_scale` and `found_inf` (fused AdamW) does all of it on the device in the
    pass that it makes anyway; for others, and with a `grad_scaler` (whose `unscale_` has been called), the
    gradients are divided before. For others the host waits for `finite`, too.
    """
    fused = _skips_on_device(optimizer)
    if grad_scaler is not None:
        # The scaler has seen the gradients, but not the loss. What it found is in a private table of tensors.
        for found_inf in grad_scaler._found_inf_per_device(optimizer).values():
            found_inf.copy_(torch.maximum(found_inf, (~finite).to(found_inf)))
        divide(gradients, divisor)
        # Where torch's mark is set, the scaler leaves it to the optimizer to skip a step: one that would not
        # is not called.
        leaves_skipping = getattr(optimizer, "_step_supports_amp_scaling", False)
        if fused or not leaves_skipping or bool(finite):
            grad_scaler.step(optimizer)
        grad_scaler.update()
    elif fused:
        # The two attributes by which a scaler hands its numbers to a fused optimizer.
        optimizer.grad_scale = None if divisor is None else divisor.float()
        optimizer.found_inf = (~finite).float()
        try:
            optimizer.step()
        finally:
            del optimizer.grad_scale, optimizer.found_inf
    else:
        if finite.device.type != "cpu":
            say.once(HOST_CHECK, type(optimizer).__name__)
        if bool(finite):
            divide(gradients, divisor)
            optimizer.step()


def _skips_on_device(optimizer: torch.optim.Optimizer) -> bool:
    """Whether a step with `found_inf` changes nothing.

    Not SGD's first with momentum: torch makes the buffers of unwritten memory, and would leave them so. Not a
    wrapper that looks like the optimizer in it (Lightning's do): the one in it would not see `found_inf`. Not
    a subclass with a step() of its own, which may be blind to it.
    """
    if _replaces_step(type(optimizer)):
        return False
    if any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        return False
    # torch's mark of an optimizer that reads `found_inf`. A group that is not fused does not read it.
    if not getattr(optimizer, "_step_supports_amp_scaling", False):
        return False
    if not all(group.get("fused", True) for group in optimizer.param_groups):
        return False
    return bool(optimizer.state) or not any(group.get("momentum") for group in optimizer.param_groups)


# Kept, since it is asked at every step.
@functools.lru_cache(maxsize=256)
def _replaces_step(kind: type) -> bool:
    """Whether `kind` inherits "takes `found_inf`" from one of torch's optimizers, but not its step()."""
    own, *replaced = [base for base in kind.__mro__ if "step" in vars(base)]
    inherited = any(_of_torch(base) for base in replaced if base is not torch.optim.Optimizer)
    return inherited and not _of_torch(own) and "_step_supports_amp_scaling" not in vars(own)


def _of_torch(kind: type) -> bool:
    return f"{kind.__module__}.".startswith("torch.optim.")
