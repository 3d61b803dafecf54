"""What a step trains and with what: parameters that it can answer for, optimizer, what stood in `.grad`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..host import check, say
from .wrappers import (
    check_update_is_due,
    check_wrappers,
    grad_scaler_of,
    refuse_elsewhere,
    unwrap_optimizer,
    warn_if_accumulating,
)

# What is said once.
ALONE = (
    "model: %d processes run together, but this network is not in DistributedDataParallel, and there is no "
    "process_group: each process makes updates of its own, and they drift apart unless that is meant"
)
BFLOAT16 = (
    "model: bfloat16 parameters: an update of less than 1/256 of a weight is rounded away, unless the "
    "optimizer keeps more bits; float32 parameters with autocast_dtype=torch.bfloat16 lose none"
)
UNSCALED = (
    "grad_scaler: none with autocast_dtype=torch.float16, in which gradients below 6e-8 become 0: "
    "torch.amp.GradScaler() keeps them, bfloat16 needs none"
)
UNREACHED = (
    "optimizer: %d of %d parameters get no gradient, and stay as they are (%s): does the output not "
    "depend on them, are they another copy's, or in a checkpoint with use_reentrant=True?"
)

# Attributes by which libraries mark parameters that are not whole, or not updated from `.grad`.
MARKS = {
    "_fsdp_flattened": "parameters that FSDP has flattened",
    "_in_backward_optimizers": "an optimizer that steps inside the backward pass",
    "_is_flat_param": "parameters that FSDP has flattened",
    "ds_id": "parameters that DeepSpeed ZeRO-3 spreads over processes",
    "tensor_model_parallel": "parameters that Megatron-LM spreads over processes",
}
NAMES_SHOWN = 3


class Trained(NamedTuple):
    """Arguments of a step that have been looked at; what they are wrapped in is off."""

    model: Callable
    parameters: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None
    grad_scaler: torch.amp.GradScaler | None
    process_group: dist.ProcessGroup | None
    wrappers: list[Any]  # Those of accelerate around the optimizer.
    reference: Callable | None = None  # The network that a method compares with.


def look_at(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    grad_scaler: torch.amp.GradScaler | None,
    process_group: dist.ProcessGroup | None,
    *,
    keep_grad: bool = False,
) -> Trained:
    """The arguments of a step as it uses them. Nothing on the device is read.

    Args:
        model: as the caller has it, perhaps in DistributedDataParallel.

    Raises:
        TypeError, ValueError: naming the argument that a step could not answer for.
    """
    network = unwrapped(model)
    for each in (model, network):
        refuse_elsewhere("model", each)
    optimizer, wrappers = unwrap_optimizer(optimizer)
    grad_scaler = grad_scaler_of(wrappers, grad_scaler)
    parameters = trainable(network, optimizer)
    check_gradients(network, optimizer, parameters, keep_grad=keep_grad)
    check_update_is_due(wrappers)
    if optimizer is not None and not wrappers:
        warn_if_accumulating()
    check_wrappers(wrappers, reduced=process_group is not None or network is not model)
    # The step() of a scaler that is not enabled would make the update unconditionally.
    if grad_scaler is not None and not grad_scaler.is_enabled():
        grad_scaler = None
    if optimizer is not None and process_group is None and network is model and _count_processes() > 1:
        say.once(ALONE, _count_processes())
    return Trained(network, parameters, optimizer, grad_scaler, processes(model, process_group), wrappers)


def _count_processes() -> int:
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def check_reached(model: Callable, parameters: list[nn.Parameter]) -> None:
    """Whether the backward passes of a step came to `parameters`. Values are not read.

    Says once of those that they did not come to: they stay as they are, and no number of the step shows it.

    Raises:
        ValueError: they came to none.
    """
    missing = [parameter for parameter in parameters if parameter.grad is None]
    if len(missing) == len(parameters):
        expected = "expected parameters that the model's output depends on"
        why = (
            "was it built for another copy of the model, "
            "or is all of that in an activation checkpoint with use_reentrant=True?"
        )
        raise ValueError(f"optimizer: {expected}, got none ({why})")
    if missing:
        say.once(UNREACHED, len(missing), len(parameters), _names(model, missing))


def unwrapped(model: Callable) -> Callable:
    """The network itself.

    DistributedDataParallel reduces neither a second backward pass nor one with given inputs: the step calls
    what it wraps, and reduces itself.
    """
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model.module
    return model


def processes(model: Callable, process_group: dist.ProcessGroup | None) -> dist.ProcessGroup | None:
    """The processes that train `model` together; None: this one alone."""
    if process_group is None and isinstance(model, nn.parallel.DistributedDataParallel):
        process_group = model.process_group
    if process_group is None or dist.get_world_size(process_group) == 1:
        return None
    return process_group


def trainable(model: Callable, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """The parameters that a step on `model`, unwrapped, trains.

    Raises:
        TypeError, ValueError: there are none, or some that are not whole, or that a step could not update.
    """
    parameters = _requiring_grad(model, optimizer)
    # torch only warns; norm, clipping and update would count its gradient twice.
    twice = len(parameters) - len({id(parameter) for parameter in parameters})
    if twice:
        raise ValueError(f"optimizer: expected every parameter once, got {twice} a second time")
    if not parameters:
        raise ValueError("model: expected at least one trainable parameter, got none with requires_grad=True")
    dtypes = {parameter.dtype for parameter in parameters}
    if torch.bfloat16 in dtypes:
        say.once(BFLOAT16)
    # Few have a type or attributes of their own, and asking the others for them is what takes time here.
    for parameter in parameters:
        if type(parameter) is not nn.Parameter or parameter.__dict__:
            _refuse_parts(parameter)
            _refuse_marked(parameter)
    if torch.float16 in dtypes:
        raise TypeError(
            "model: expected float32 (or bfloat16) parameters, got float16, in which norms overflow; "
            "autocast_dtype runs the network in float16"
        )
    return parameters


def _requiring_grad(model: Callable, optimizer: torch.optim.Optimizer | None) -> list[nn.Parameter]:
    """The parameters of `optimizer`, or else of `model`, that require a gradient.

    Raises:
        TypeError: the optimizer is none that a step can call, or there is none, and the model is no module.
    """
    if optimizer is None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model: expected a torch.nn.Module where optimizer is None, got {type(model).__name__}"
            )
        return [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(
            f"optimizer: expected a torch.optim.Optimizer or None, got {type(optimizer).__name__}"
        )
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError("optimizer: expected one whose step() needs no closure, got LBFGS")
    return [parameter for parameter in _of(optimizer) if parameter.requires_grad]


def _refuse_parts(parameter: nn.Parameter) -> None:
    if hasattr(parameter, "device_mesh"):
        raise TypeError(
            "model: expected whole parameters in every process, got DTensor shards (FSDP, tensor "
            "parallelism), whose norms are partial"
        )


def _refuse_marked(parameter: nn.Parameter) -> None:
    for mark in parameter.__dict__.keys() & MARKS.keys():
        if getattr(parameter, mark) is not False:
            raise TypeError(f"model: expected whole parameters, updated by the optimizer, got {MARKS[mark]}")


def _of(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    return (parameter for group in optimizer.param_groups for parameter in group["params"])


def check_keep_grad(given: Any) -> None:
    """
    Raises:
        TypeError: `given` is no bool.
    """
    if not isinstance(given, bool):
        raise TypeError(f"keep_grad: expected True or False, got {check.describe(given)}")


def check_gradients(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    parameters: list[nn.Parameter],
    *,
    keep_grad: bool,
) -> None:
    """Whether the step is free to use `.grad`. Values are not read.

    Raises:
        TypeError: hooks after accumulation, which would see two or three gradients a step, or a gradient that
            is not dense.
        ValueError: a gradient stands in `.grad` and is not to be kept, or it is that of a frozen parameter,
            which the optimizer would move.
    """
    check_keep_grad(keep_grad)
    # A private table of torch's; None where there is no such hook.
    hooked = [parameter for parameter in parameters if parameter._post_accumulate_grad_hooks]
    if hooked:
        expected = (
            "expected parameters without hooks after accumulation (an optimizer in the backward pass, say)"
        )
        text = "a step accumulates its gradients in several backward passes"
        raise TypeError(f"model: {expected}, since {text}, got them on {_names(model, hooked)}")

    # The optimizer would also move a frozen parameter that has a gradient.
    everything = parameters if optimizer is None else list(_of(optimizer))
    standing = [parameter for parameter in everything if parameter.grad is not None]
    if not standing:
        return
    frozen = [parameter for parameter in standing if not parameter.requires_grad]
    if frozen:
        expected = "expected no gradient in a frozen parameter, which the optimizer would move"
        clear = "optimizer.zero_grad(set_to_none=True) clears it"
        raise ValueError(f"keep_grad: {expected} ({clear}), got one in {_names(model, frozen)}")
    if not keep_grad:
        expected = "expected .grad to be None before a step (optimizer.zero_grad(set_to_none=True) clears it)"
        instead = "or keep_grad=True, which adds what stands there to the step's gradient"
        raise ValueError(f"keep_grad: {expected}, {instead}, got a gradient in {_names(model, standing)}")
    sparse = [parameter for parameter in standing if parameter.grad.layout != torch.strided]
    if sparse:
        raise TypeError(f"keep_grad: expected dense gradients, got sparse ones in {_names(model, sparse)}")


def _names(model: Callable, parameters: list[Tensor]) -> str:
    """`parameters` by their names in `model`, or by their shapes; the first few."""
    named = {}
    if isinstance(model, nn.Module):
        named = {parameter: name for name, parameter in model.named_parameters()}
    shown = []
    for parameter in parameters[:NAMES_SHOWN]:
        shown.append(named.get(parameter, f"a parameter of shape {tuple(parameter.shape)}"))
    text = ", ".join(shown)
    more = len(parameters) - NAMES_SHOWN
    return f"{text} and {more} more" if more > 0 else text


@contextmanager
def set_aside(parameters: Iterable[nn.Parameter]) -> Iterator[list[Tensor | None]]:
    """Within the block `.grad` is the step's. What stood there is handed out, and put back after an error."""
    parameters = list(parameters)
    kept = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    try:
        yield kept
    except BaseException:
        for parameter, gradient in zip(parameters, kept, strict=True):
            parameter.grad = gradient
        raise


def add_kept(parameters: Iterable[nn.Parameter], kept: list[Tensor | None]) -> None:
    """Adds `kept` to the gradients in `.grad`. Its tensors are the caller's: nothing is written to them."""
    own, others = [], []
    for parameter, gradient in zip(parameters, kept, strict=True):
        if gradient is None:
            continue
        if parameter.grad is None:
            parameter.grad = gradient.detach().clone()
        else:
            own.append(parameter.grad)
            others.append(gradient.detach())
    if own:
        torch._foreach_add_(own, others)
