"""What of an `Unlearner` a checkpoint holds, and its way back: looked at as a whole, then put in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..host.plain_names import load_plain_state, plain_parameters, plain_state
from ..objective.parameters import overrides
from . import optimizer_state
from .checkpoint import Checkpoint
from .state_checks import Entry, check_keys, check_state, check_tensor, like

PARTS = ("lr_scheduler", "ema", "grad_scaler")  # of an unlearner that may have them
# What changes in the state of well-known objects, by the module that defines them. All else are settings,
# which have to be those of the run that goes on.
MOVING = {
    "torch.optim.lr_scheduler": (
        "last_epoch",
        "_step_count",
        "_last_lr",
        "T_cur",
        "T_i",
        "best",
        "num_bad_epochs",
        "cooldown_counter",
        "_is_initial",
        "_get_lr_called_within_step",
    ),
    "torch.amp.grad_scaler": ("scale", "_growth_tracker"),
    "torch.cuda.amp.grad_scaler": ("scale", "_growth_tracker"),
    "diffusers.training_utils": ("optimization_step", "cur_decay_value"),
}
BY_PARAMETER = "by_parameter"  # the only key of what stands for a list of one tensor a parameter


def parts_of(unlearner) -> dict[str, Any]:
    """Scheduler, EMA and scaler, where the unlearner has them, and the rules that have a state."""
    parts = {name: getattr(unlearner, name, None) for name in PARTS}
    for number, rule in enumerate(getattr(unlearner, "rules", ())):
        if overrides(rule, "state_dict"):
            parts[f"rule_{number}"] = rule
    return {name: part for name, part in parts.items() if part is not None}


def part_state(part: Any, model: nn.Module) -> dict[str, Any]:
    """`part.state_dict()` with the plain names of the parameters where it has one tensor for each of them."""
    if isinstance(part, nn.Module):  # an average that is a network itself
        return plain_state(part)
    parameters = plain_parameters(model)
    shapes = [parameter.shape for parameter in parameters.values()]
    state = {}
    for key, value in part.state_dict().items():
        # diffusers' EMA keeps its averages by position, as torch's optimizers do.
        averaged = isinstance(value, list) and all(isinstance(item, Tensor) for item in value)
        if averaged and [item.shape for item in value] == shapes:
            value = {BY_PARAMETER: dict(zip(parameters, value, strict=True))}
        state[key] = value
    return state


def random_state(unlearner) -> dict[str, Tensor]:
    """Of torch's generators on the CPU and on the model's GPU."""
    device = _device(unlearner)
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


@dataclass
class _Step:
    """A part of the work of `restore`, and how to undo it."""

    entry: Entry
    do: Callable[[], None]
    undo: Callable[[], None] = lambda: None


def restore(unlearner, saved: Checkpoint, rank: int) -> None:
    """Puts `saved` into `unlearner`: all of it or, after an error, nothing.

    Args:
        unlearner: one that has taken no step.
        saved: what was read from a checkpoint: it may be anything.
        rank: of this process, which gets the random state that the one of this rank had, if there was one.

    Raises:
        ValueError: naming file and entry: what is there is not the state of this unlearner.
    """
    model, optimizer, device = unlearner.model, unlearner.optimizer, _device(unlearner)
    random, counters = saved.states["random"], saved.metadata["unlearner"]

    # First everything is looked at, and nothing changed.
    if set(saved.tensors) != {"model"}:
        found = ", ".join(sorted(saved.tensors)) or "no model"
        raise ValueError(f"{saved.path}: expected model.safetensors and states, got {found}")
    model_entry = Entry(saved.path, "model")
    _check_model(model_entry, saved.tensors["model"], model)
    counters_entry, own_counters = Entry(saved.path, "unlearner"), unlearner.state_dict()
    _check_counters(counters_entry, counters, own_counters)
    _check_random(Entry(saved.path, "random"), random, device)
    optimizer_entry = Entry(saved.path, "optimizer")
    moments = optimizer_state.checked(optimizer, model, saved.states["optimizer"], optimizer_entry)
    work = []
    for name, part in parts_of(unlearner).items():
        entry, own = Entry(saved.path, name), part_state(part, model)
        moving = MOVING.get(type(part).__module__)
        check_state(entry, saved.states[name], own, moving, growing=moving is None)
        work.append(_loading(entry, part, like(saved.states[name], own, device)))
    before = optimizer.state_dict()

    # Then it is put in place. Objects of the user's may still refuse what they are given, so they come first
    # and can be undone; the model comes last, because it takes what fits without fail.
    work.append(
        _Step(
            optimizer_entry,
            do=lambda: optimizer_state.load(optimizer, moments),
            undo=lambda: optimizer.load_state_dict(before),
        )
    )
    work.append(
        _Step(
            counters_entry,
            do=lambda: unlearner.load_state_dict(counters),
            undo=lambda: unlearner.load_state_dict(own_counters),
        )
    )
    work.append(_Step(model_entry, do=lambda: load_plain_state(model, saved.tensors["model"])))
    _do(work)
    if rank < len(random):
        _set_random_state(unlearner, random[rank])


def _loading(entry: Entry, part: Any, found: dict[str, Any]) -> _Step:
    """`part.load_state_dict` of what `part_state` made."""
    # A copy, to undo with: some objects return the tensors that they are about to change.
    before = _copied(part.state_dict())
    if isinstance(part, nn.Module):
        return _Step(entry, lambda: load_plain_state(part, found), lambda: part.load_state_dict(before))
    state = {}
    for key, value in found.items():
        if isinstance(value, dict) and set(value) == {BY_PARAMETER}:
            value = list(value[BY_PARAMETER].values())
        state[key] = value
    return _Step(entry, lambda: part.load_state_dict(state), lambda: part.load_state_dict(before))


def _copied(state: Any) -> Any:
    """A copy of a state, tensors included: some objects load theirs in place."""
    if isinstance(state, Tensor):
        return state.detach().clone()
    if isinstance(state, dict):
        return {key: _copied(value) for key, value in state.items()}
    if isinstance(state, (list, tuple)):
        return type(state)(_copied(value) for value in state)
    return state


def _do(work: list[_Step]) -> None:
    """All of `work`; where a step fails, those before it are undone, and what it may have begun itself."""
    done: list[_Step] = []
    for step in work:
        done.append(step)
        try:
            step.do()
        except Exception as error:  # whatever an object of the user's raises
            for earlier in reversed(done):
                with suppress(Exception):  # the first error is the one to be told
                    earlier.undo()
            text = f"expected a state that it takes, got one that it refuses: {type(error).__name__}: {error}"
            raise ValueError(f"{step.entry.path}: {step.entry.stem}: {text}") from error


def _check_model(place: Entry, found: Mapping[str, Tensor], model: nn.Module) -> None:
    own = plain_state(model)
    check_keys(place, found, own)
    for name, value in own.items():
        check_tensor(place[name], found[name], value)


def _check_counters(place: Entry, found: Any, own: dict[str, Any]) -> None:
    """The seed, and how many steps were taken and skipped."""
    check_state(place, found, own)
    if found["seed"] != own["seed"]:
        raise place["seed"].error(f"the seed of the run, {own['seed']}", found["seed"])
    if found["skipped_steps"] > found["step_index"]:
        raise place["skipped_steps"].error(
            f"at most the {found['step_index']} steps taken", found["skipped_steps"]
        )


def _check_random(place: Entry, found: Any, device: torch.device) -> None:
    """One state a process; each is tried on a generator of its own."""
    if not isinstance(found, list) or not found:
        raise place.error("a list of states, one a process", found)
    # A run on a GPU that goes on on a CPU has states that cannot be tried here, and are not used.
    devices = {"cpu": torch.device("cpu")}
    if device.type == "cuda":
        devices["cuda"] = device
    for rank, state in enumerate(found):
        entry = place[rank]
        if not isinstance(state, dict) or "cpu" not in state or set(state) - {"cpu", "cuda"}:
            raise entry.error("the states of generators named cpu and cuda", state)
        for kind, value in state.items():
            if not isinstance(value, Tensor) or value.dtype != torch.uint8 or value.ndim != 1:
                raise entry[kind].error("uint8 of one dimension", value)
            if kind not in devices:
                continue
            try:
                torch.Generator(devices[kind]).set_state(value)
            except (RuntimeError, TypeError) as error:
                raise entry[kind].error(f"the state of a generator ({error})", value) from error


def _set_random_state(unlearner, state: dict[str, Tensor]) -> None:
    device = _device(unlearner)
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _device(unlearner) -> torch.device:
    return next(unlearner.model.parameters()).device
