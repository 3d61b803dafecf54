"""What other libraries put around an optimizer or a model.

accelerate's optimizer is seen through; what updates parameters elsewhere is refused. None of those libraries
is imported here: an object of theirs can only come from somebody who has imported them already.
"""

from __future__ import annotations

import dis
import functools
import inspect
import logging
import sys
import types
from typing import Any

import torch
from torch import Tensor

from ..host import check, say

UPDATE_BETWEEN_UPDATES = (
    "optimizer: accelerate accumulates gradients, and makes no update in this iteration; this optimizer is "
    "not prepared, and makes one at every step. Here accumulation is one call with all rows of an update, "
    "which micro_batch_size splits"
)
log = logging.getLogger("fastunlearn")

# Whose classes keep gradients or parameters where a step does not find them, by the modules of the classes.
ELSEWHERE = {
    "accelerate.utils.deepspeed": "DeepSpeed",
    "accelerate.utils.megatron_lm": "Megatron-LM",
    "colossalai": "Colossal-AI",
    "deepspeed": "DeepSpeed",
    "fairscale": "FairScale",
    "horovod": "Horovod",
    "lomo_optim": "LOMO, which updates inside the backward pass",
    "megatron": "Megatron-LM",
    "torch.distributed.fsdp": "FSDP",
}
# Optimizers that update from .grad, as any other does where no engine has them.
PLAIN = "deepspeed.ops"
WHOLE = "whole parameters in every process, updated from .grad"


def refuse_elsewhere(name: str, value: Any, expected: str = WHOLE) -> None:
    """
    Raises:
        TypeError: `value`, the argument `name`, is of a library that keeps gradients or parameters elsewhere.
    """
    library = _library(type(value))
    if library is not None:
        raise TypeError(f"{name}: expected {expected}, got {type(value).__name__} of {library}")


# Kept, since it is asked at every step.
@functools.lru_cache(maxsize=256)
def _library(kind: type) -> str | None:
    """The library in `ELSEWHERE` that `kind` or a class that it inherits from is of."""
    for base in kind.__mro__:
        if f"{base.__module__}.".startswith(f"{PLAIN}."):
            continue
        for module, library in ELSEWHERE.items():
            if f"{base.__module__}.".startswith(f"{module}."):
                return library
    return None


def unwrap_optimizer(optimizer: Any) -> tuple[Any, list[Any]]:
    """The optimizer inside accelerate's wrappers (there may be none), and the wrappers, outermost first.

    Raises:
        TypeError: the step() of the optimizer or of a wrapper changes nothing.
    """
    wrappers = []
    while True:
        refuse_elsewhere("optimizer", optimizer)
        kind = _of_accelerate("optimizer", "AcceleratedOptimizer")
        if kind is None or not isinstance(optimizer, kind):
            break
        if type(optimizer).step is not kind.step:
            raise _updates_elsewhere(optimizer)
        wrappers.append(optimizer)
        optimizer = optimizer.optimizer
    if isinstance(optimizer, torch.optim.Optimizer) and _leaves_parameters_alone(optimizer):
        raise _updates_elsewhere(optimizer)
    return optimizer, wrappers


def _of_accelerate(module: str, name: str) -> type | None:
    return getattr(sys.modules.get(f"accelerate.{module}"), name, None)


def _updates_elsewhere(optimizer: torch.optim.Optimizer) -> TypeError:
    expected = "expected one whose step() updates the parameters from .grad"
    return TypeError(
        f"optimizer: {expected}, got {type(optimizer).__name__}, whose updates are made elsewhere"
    )


def _leaves_parameters_alone(optimizer: torch.optim.Optimizer) -> bool:
    """Whether step() is empty, or left to DistributedDataParallel: updates come with the backward pass."""
    # A private mark of ZeroRedundancyOptimizer.
    if getattr(optimizer, "_overlap_with_ddp", False):
        return True
    # An empty step() has the instructions of an empty function.
    function = inspect.unwrap(type(optimizer).step)
    return inspect.isfunction(function) and _is_empty(function.__code__)


# Kept, since it is asked at every step.
@functools.lru_cache(maxsize=256)
def _is_empty(code: types.CodeType) -> bool:
    """Whether `code` does nothing but return None."""
    return _work(code) == _work(_nothing.__code__)


def _nothing() -> None:
    pass


def _work(code: types.CodeType) -> list[tuple[str, Any]]:
    """The instructions of `code`, but for those that do nothing."""
    work = []
    for step in dis.get_instructions(code):
        if step.opname not in ("RESUME", "NOP"):
            work.append((step.opname, step.argval))
    return work


def device_of(optimizer: torch.optim.Optimizer) -> torch.device:
    """Where the parameters of `optimizer` lie, by the first of them.

    Raises:
        ValueError: it has none.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            return parameter.device
    raise ValueError("optimizer: expected at least one parameter, got none")


def grad_scaler_of(wrappers: list[Any], given: torch.amp.GradScaler | None) -> torch.amp.GradScaler | None:
    """`given`, or the scaler that accelerate made for the optimizer.

    Raises:
        TypeError: `given` is none.
        ValueError: there are two.
    """
    if given is not None and not isinstance(given, torch.amp.GradScaler):
        expected = "expected a torch.amp.GradScaler or None"
        raise TypeError(f"grad_scaler: {expected}, got {check.describe(given)}")
    for wrapper in wrappers:
        if wrapper.scaler is None or wrapper.scaler is given:
            continue
        if given is not None:
            expected = "expected accelerator.scaler, which the prepared optimizer has, or None"
            raise ValueError(f"grad_scaler: {expected}, got another {check.describe(given)}")
        given = wrapper.scaler
    return given


def check_update_is_due(wrappers: list[Any]) -> None:
    """
    Raises:
        ValueError: accelerate accumulates gradients, and makes no update in this iteration.
    """
    if not all(wrapper.gradient_state.sync_gradients for wrapper in wrappers):
        expected = "expected one call with all rows of an update, which micro_batch_size splits"
        reason = "accelerate's sync_gradients is False: accumulate() makes no update in this iteration"
        raise ValueError(f"optimizer: {expected}, got a prepared optimizer between updates ({reason})")


def warn_if_accumulating() -> None:
    """Says, once, that an optimizer unknown to accelerate makes an update where accelerate would not."""
    # accelerate has one state of accumulation for a process, in a private dict of the class.
    state = _of_accelerate("state", "GradientState")
    if state is not None and state._shared_state.get("sync_gradients", True) is False:
        say.once(UPDATE_BETWEEN_UPDATES)


def check_wrappers(wrappers: list[Any], *, reduced: bool) -> None:
    """Whether the step does all that accelerate's own would do.

    Args:
        reduced: gradients are averaged over the processes.

    Raises:
        ValueError: several processes would each go their own way.
        TypeError: the device is an XLA one, whose gradients accelerate's own step averages.
    """
    for wrapper in wrappers:
        state = wrapper.accelerator_state
        if getattr(state.distributed_type, "value", None) == "XLA":
            raise TypeError(
                "optimizer: expected a prepared optimizer on CPUs or GPUs, got one on XLA devices"
            )
        if state.num_processes > 1 and not reduced:
            raise ValueError(
                "process_group: expected torch.distributed.group.WORLD, or the model as "
                "accelerator.prepare() returned it, with an optimizer "
                f"prepared for {state.num_processes} processes, got None"
            )


def tell_skipped(wrappers: list[Any], skipped: Tensor) -> None:
    """Lets accelerate know whether the step was skipped: its schedulers go on only if it was not.

    `skipped` (0-d bool) stays on the device; who asks for `step_was_skipped` waits for it. It holds until the
    next step, of whomever: without a scaler accelerate itself never takes it back.
    """
    # `_is_overflow` is what accelerate's `step_was_skipped` returns; there is no public way to set it.
    for wrapper in wrappers:
        _forget_at_next_step(wrapper)
        wrapper._is_overflow = skipped


class Forget:
    """A hook after `optimizer.step()`: what was skipped before is no longer the last step of `wrapper`.

    A call without gradients is no step: a loop may have kept it from before, after a step of this package.
    """

    def __init__(self, wrapper: Any):
        self.wrapper = wrapper

    def __call__(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = (parameter for group in optimizer.param_groups for parameter in group["params"])
        if any(parameter.grad is not None for parameter in parameters):
            self.wrapper._is_overflow = False


def _forget_at_next_step(wrapper: Any) -> None:
    optimizer, _ = unwrap_optimizer(wrapper)
    hooks = optimizer._optimizer_step_post_hooks.values()
    if not any(isinstance(hook, Forget) and hook.wrapper is wrapper for hook in hooks):
        optimizer.register_step_post_hook(Forget(wrapper))


def unwrap_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> tuple[Any, Any, list[Any]]:
    """What an `Unlearner` makes of its `lr_scheduler`.

    Returns:
        The scheduler inside accelerate's wrapper; the wrapper, or None; and the prepared optimizers that the
        wrapper asks whether a step was skipped, as far as `optimizer` is in them.

    Raises:
        TypeError: it has no step(), or one that is DeepSpeed's or Megatron's.
    """
    refuse_elsewhere("lr_scheduler", scheduler, "one whose step() moves the learning rates")
    if not callable(getattr(scheduler, "step", None)):
        raise TypeError(
            f"lr_scheduler: expected an object with .step() or None, got {check.describe(scheduler)}"
        )
    kind = _of_accelerate("scheduler", "AcceleratedScheduler")
    if kind is None or not isinstance(scheduler, kind):
        _check_scheduler(scheduler, optimizer)
        return scheduler, None, []
    _check_scheduler(scheduler.scheduler, optimizer)
    device = device_of(optimizer)
    if device.type != "cpu":
        log.warning(
            "lr_scheduler: a prepared one asks after every step whether it was skipped, which waits for the "
            "device; the scheduler in it (unprepared) would not, and goes on after a skipped step, too"
        )
    asked = [wrapper for wrapper in scheduler.optimizers if unwrap_optimizer(wrapper)[0] is optimizer]
    return scheduler.scheduler, scheduler, asked


def _check_scheduler(scheduler: Any, optimizer: torch.optim.Optimizer) -> None:
    """
    Raises:
        TypeError: its step() asks for a metric.
        ValueError: it moves the learning rate of another optimizer.
    """
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        raise TypeError("lr_scheduler: expected one whose step() needs no metric, got ReduceLROnPlateau")
    own = getattr(scheduler, "optimizer", None)
    if own is not None and unwrap_optimizer(own)[0] is not optimizer:
        expected = "expected a scheduler of the optimizer given"
        raise ValueError(f"lr_scheduler: {expected}, got a {type(scheduler).__name__} of another one")
