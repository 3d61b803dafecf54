"""How a step is taken, whatever the method: the options of every `*_step` and of `Unlearner`, checked."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..host import check
from ..host.precision import AUTOCAST_DTYPES
from ..objective.draws import Draws
from ..objective.frequency import LowPass
from ..objective.parameters import ParameterRule, overrides
from ..objective.protocol import NEEDS, Method
from ..objective.schedule import NoiseSchedule
from ..objective.selection import Selection
from ..objective.time import Density
from .compilation import Compile
from .predict import unsteady
from .select import Moment
from .trained import unwrapped


class StepOptions(TypedDict, total=False):
    """Keyword arguments of every `*_step`, described in `retrack_step`."""

    draws: Draws | None
    generator: torch.Generator | None
    forget_kwargs: dict[str, Any] | None
    retain_kwargs: dict[str, Any] | None
    max_grad_norm: float | None
    autocast_dtype: torch.dtype | None
    grad_scaler: torch.amp.GradScaler | None
    keep_grad: bool
    micro_batch_size: int | None
    compile: Compile | None
    process_group: dist.ProcessGroup | None
    rules: Sequence[ParameterRule]
    time_window: Density | None
    retain_density: Density | None
    lowpass: LowPass | None
    loss_weight: str | None
    snr_gamma: float | None
    step: int | Tensor | None
    total_steps: int | None


class Settings(NamedTuple):
    """What a step needs to know beside its method, its networks and its numbers."""

    max_grad_norm: float | None = 1.0  # None: gradients are not clipped.
    autocast_dtype: torch.dtype | None = None
    micro_batch_size: int | None = None  # Rows in one call of the network. None: all.
    compile: Compile | None = None
    rules: tuple[ParameterRule, ...] = ()
    selection: Selection = Selection()


def checked(model: Any, schedule: Any, given: Settings, *, process_group: Any) -> Settings:
    """The checks that a `*_step` and an `Unlearner` share; none of them reads the device.

    Returns:
        `given` with Python's numbers and a tuple of rules.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    # What a step works on.
    if not isinstance(schedule, NoiseSchedule):
        how = "NoiseSchedule.from_diffusers(scheduler) makes one"
        raise TypeError(f"schedule: expected a NoiseSchedule ({how}), got {check.describe(schedule)}")
    if not callable(model):
        raise TypeError(f"model: expected a callable (x_t, t, **kwargs), got {check.describe(model)}")

    # How it is taken.
    max_grad_norm, autocast_dtype, micro_batch_size, compile, rules, selection = given
    if max_grad_norm is not None:
        max_grad_norm = check.number("max_grad_norm", max_grad_norm, low=0, low_open=True)
    if micro_batch_size is not None:
        micro_batch_size = check.integer("micro_batch_size", micro_batch_size, low=1)
    if autocast_dtype is not None and autocast_dtype not in AUTOCAST_DTYPES:
        expected = "expected torch.bfloat16, torch.float16 or None"
        raise ValueError(f"autocast_dtype: {expected}, got {autocast_dtype!r}")
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        expected = "expected a torch.distributed.ProcessGroup or None"
        raise TypeError(f"process_group: {expected}, got {check.describe(process_group)}")
    if compile not in (None, True, False, "try", "regional"):
        raise ValueError(f"compile: expected None, True, False, 'try' or 'regional', got {compile!r}")
    rules = _rules(rules)
    return Settings(max_grad_norm, autocast_dtype, micro_batch_size, compile, rules, selection)


def _rules(given: Any) -> tuple[ParameterRule, ...]:
    if not isinstance(given, (tuple, list)) or not all(isinstance(rule, ParameterRule) for rule in given):
        raise TypeError(f"rules: expected a sequence of ParameterRule, got {check.describe(given)}")
    return tuple(given)


def check_moment(step: Any, total_steps: Any, device: torch.device) -> Moment:
    """Where in a run a step is, as its caller says.

    Raises:
        TypeError, ValueError: no number of a step, or a tensor that lies elsewhere.
    """
    if isinstance(step, Tensor):
        check.tensor("step", step, ndim=0, floating=False)
        if step.device != device:
            raise ValueError(
                f"step: expected a tensor on the device of the images, {device}, got {step.device}"
            )
    elif step is not None:
        step = check.integer("step", step, low=0)
    if total_steps is not None:
        total_steps = check.integer("total_steps", total_steps, low=1)
    return Moment(step, total_steps)


def check_rules(
    rules: Sequence[ParameterRule],
    optimizer: torch.optim.Optimizer | None,
    parameters: Sequence[nn.Parameter],
) -> None:
    """
    Raises:
        ValueError: a rule acts after the update, and the caller makes the update; or it was not made for the
            trained `parameters`.
    """
    late = [type(rule).__name__ for rule in rules if overrides(rule, "after_update")]
    if late and optimizer is None:
        expected = "expected none that acts after the update where optimizer is None"
        raise ValueError(f"rules: {expected}, got {', '.join(late)}")
    for rule in rules:
        rule.check(parameters)


def check_added(rule: ParameterRule, added: Any) -> torch.Tensor:
    """What `rule.add` returned, for the reported loss.

    Raises:
        TypeError: it is no number on the device.
    """
    if not isinstance(added, torch.Tensor) or added.ndim != 0:
        name = f"{type(rule).__name__}.add"
        raise TypeError(f"{name}: expected a 0-d tensor or None, got {check.describe(added)}")
    return added.detach()


def check_needs(method: Method) -> None:
    """
    Raises:
        TypeError, ValueError: the method needs what there is no word for, or neighbours of nothing.
    """
    if not isinstance(method, Method):
        raise TypeError(f"method: expected a method such as ReTrack(), got {check.describe(method)}")
    name, needs = f"{type(method).__name__}.needs", getattr(method, "needs", None)
    if not isinstance(needs, (set, frozenset)):
        raise TypeError(f"{name}: expected a frozenset of {', '.join(NEEDS)}, got {check.describe(needs)}")
    unknown = sorted(needs.difference(NEEDS))
    if unknown:
        raise ValueError(f"{name}: expected some of {', '.join(NEEDS)}, got {unknown[0]!r}")
    if not {"forget", "retain"} & needs or ("neighbors" in needs and "forget" not in needs):
        expected = "expected 'forget' or 'retain', and 'forget' where there is 'neighbors'"
        raise ValueError(f"{name}: {expected}, got {', '.join(sorted(needs)) or 'none'}")


def check_sizes(method: Method, sizes: Any) -> dict[str, int]:
    """How many images there are in the sets that the method reads; `{}` where it does not ask.

    Raises:
        TypeError, ValueError: it asks and is not told, or the other way round.
    """
    name = type(method).__name__
    if "sizes" not in method.needs:
        if sizes is not None:
            expected = f"expected None ({name} does not ask how large the sets are)"
            raise ValueError(f"sizes: {expected}, got {check.describe(sizes)}")
        return {}
    # As an Unlearner has them: neighbours are rows of the retain set.
    read = {"forget": {"forget"}, "retain": {"retain", "neighbors"}}
    wanted = [branch for branch, words in read.items() if words & method.needs]
    expected = f"expected how many images each whole set has, a dict of {', '.join(wanted)} ({name} asks)"
    if not isinstance(sizes, Mapping):
        raise TypeError(f"sizes: {expected}, got {check.describe(sizes)}")
    if set(sizes) != set(wanted):
        raise ValueError(f"sizes: {expected}, got one of {', '.join(map(str, sizes)) or 'nothing'}")
    return {branch: check.integer(f"sizes[{branch!r}]", sizes[branch], low=1) for branch in wanted}


def check_reference(
    method: Method,
    model: Callable,
    reference_model: Callable | None,
    autocast_dtype: torch.dtype | None,
) -> None:
    """
    Raises:
        TypeError, ValueError: the method needs a reference network that there is not, or the other way round;
            or the reference would change with the model, or with each call, or could not take its images.
    """
    needed = "reference" in method.needs
    if needed and not callable(reference_model):
        expected = f"expected a callable (x_t, t, **kwargs), which {type(method).__name__} compares with"
        raise TypeError(f"reference_model: {expected}, got {check.describe(reference_model)}")
    if not needed and reference_model is not None:
        expected = f"expected None ({type(method).__name__} compares with no other network)"
        raise ValueError(f"reference_model: {expected}, got {check.describe(reference_model)}")
    if not needed:
        return
    model, reference = unwrapped(model), unwrapped(reference_model)
    # A method of the network, such as `model.forward`, is the network, too.
    if reference is model or getattr(reference, "__self__", None) is model:
        expected = "expected another network than model, such as frozen_copy(model)"
        raise ValueError(f"reference_model: {expected}, got the same")
    if isinstance(model, nn.Module) and isinstance(reference, nn.Module):
        _check_apart(model, reference)
        if autocast_dtype is None:
            _check_same_dtypes(model, reference)
    found = unsteady(reference)
    if found is not None:
        raise ValueError(
            f"reference_model: expected a network without {found.what} (eval() stops it), got {found.where}"
        )


def _check_apart(model: nn.Module, reference: nn.Module) -> None:
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    shared = [name for name, own in reference.named_parameters() if id(own) in trained]
    if shared:
        expected = (
            "expected weights of its own (without_adapters(model), or a plain function, is taken at its word)"
        )
        raise ValueError(f"reference_model: {expected}, got {shared[0]}, which is trained")
    if hasattr(reference, "_hf_hook"):  # accelerate's, which moves weights at each call
        return
    here, there = (next(network.parameters(), None) for network in (model, reference))
    if here is not None and there is not None and here.device != there.device:
        raise ValueError(f"reference_model: expected weights on {here.device}, got {there.device}")


def _check_same_dtypes(model: nn.Module, reference: nn.Module) -> None:
    """Networks of another class than the model's may convert their images themselves.

    Raises:
        TypeError: a copy of the model has weights that do not go with the images.
    """
    if type(reference) is not type(model):
        return
    here, there = (
        {weight.dtype for weight in network.parameters() if weight.is_floating_point()}
        for network in (model, reference)
    )
    if here and there and not here & there:
        expected = f"expected weights in {_listed(here)}, as those of model, or an autocast_dtype"
        raise TypeError(f"reference_model: {expected}, got {_listed(there)}")


def _listed(dtypes: set[torch.dtype]) -> str:
    return ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
