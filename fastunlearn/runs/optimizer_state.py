"""The state of an optimizer under the names of its parameters, and its way back, checked before it is loaded.

torch keeps this state by position, and believes whatever is loaded: an optimizer over the same parameters in
another order then updates each of them with another one's moments, of another size or not. Fused updates read
and write beyond the end of a moment that is too short.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from copy import deepcopy
from itertools import chain, count, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..host.plain_names import plain_parameters
from .state_checks import Entry, check_keys, check_number, check_state, check_tensor, like

# Squares, norms, sizes and counters in the states of torch's own optimizers: none is ever below 0.
NOT_NEGATIVE = (
    "exp_avg_sq",
    "max_exp_avg_sq",
    "exp_inf",
    "square_avg",
    "sum",
    "row_var",
    "col_var",
    "variance",
    "step_size",
    "step",
    "acc_delta",
)
# Entries of a parameter group that are no settings: a checkpoint has the names of the network instead.
NAMES = ("params", "param_names")

Name = Hashable  # a plain name; the position, where no network is given


def named(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[str, Any]:
    """`optimizer.state_dict()` with names for positions: `groups`, `state`, and `stateless` (who has none).

    Args:
        model: the network whose parameters `optimizer` trains; None: positions are the names.

    Raises:
        ValueError: a parameter is none of `model`.
    """
    names_of_groups, state = group_names(optimizer, model), optimizer.state_dict()
    groups = []
    for names, group in zip(names_of_groups, state["param_groups"], strict=True):
        groups.append({"parameters": names, "settings": _settings(group)})

    # torch numbers the parameters through all groups. Keys that are no such number stand for what the
    # optimizer keeps of all parameters together.
    name_of = dict(enumerate(chain.from_iterable(names_of_groups)))
    by_position = state["state"]
    without = sorted(name_of.keys() - by_position.keys())
    return {
        "groups": groups,
        "state": {name_of[key]: entries for key, entries in by_position.items() if key in name_of},
        "stateless": [name_of[position] for position in without],
        "shared": {key: by_position[key] for key in by_position.keys() - name_of.keys()},
    }


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group without its parameters."""
    return {key: value for key, value in group.items() if key not in NAMES}


def group_names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> list[list[Name]]:
    """The names of the parameters, group by group.

    Raises:
        ValueError: a parameter is none of `model`: a checkpoint would not hold it.
    """
    if model is None:
        return _positions([len(group["params"]) for group in optimizer.param_groups])
    # By identity: parameters of equal values are different ones.
    name_of = {id(parameter): name for name, parameter in plain_parameters(model).items()}
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        names = [name_of.get(id(parameter)) for parameter in group["params"]]
        if None in names:
            position = names.index(None)
            shape = tuple(group["params"][position].shape)
            raise ValueError(
                "optimizer: expected parameters of the model (others are in no checkpoint), got one of shape "
                f"{shape} that is none, at {position} of group {index}"
            )
        groups.append(names)
    return groups


def _positions(lengths: list[int]) -> list[list[int]]:
    """The numbers 0, 1, 2, ... in groups of these lengths, as torch counts parameters."""
    numbers = count()
    return [list(islice(numbers, length)) for length in lengths]


def checked(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, saved: Any, place: Entry
) -> dict[str, Any]:
    """What `named` made, as `optimizer.load_state_dict` takes it; nothing is changed.

    Every entry is held against that of a fresh state: the optimizer takes a step on a parameter of zeros.

    Args:
        optimizer: the one that shall take the state.
        model: as in `named`.
        saved: what was read from a checkpoint: it may be anything.
        place: where it was read, for messages.

    Raises:
        ValueError: naming file and entry: other groups, names, keys, shapes, dtypes, or impossible values.
    """
    groups = group_names(optimizer, model)
    check_keys(place, saved, {"groups": None, "state": None, "stateless": None, "shared": None})
    settings = _checked_groups(optimizer, groups, saved["groups"], place["groups"])
    state = _checked_states(optimizer, groups, saved, place)
    _check_shared(optimizer, saved["shared"], place["shared"])
    param_groups = []
    positions = _positions([len(names) for names in groups])
    for own, numbers in zip(settings, positions, strict=True):
        param_groups.append({**own, "params": numbers})
    return {"state": {**state, **saved["shared"]}, "param_groups": param_groups}


def _checked_states(
    optimizer: torch.optim.Optimizer, groups: list[list[Name]], saved: Mapping, place: Entry
) -> dict[int, Any]:
    """The states of the parameters by position, as torch counts them through all groups."""
    parameters: dict[Name, tuple[dict[str, Any], Tensor]] = {}
    for names, group in zip(groups, optimizer.param_groups, strict=True):
        for name, parameter in zip(names, group["params"], strict=True):
            parameters[name] = group, parameter
    stateless = saved["stateless"]
    if not isinstance(stateless, list) or not all(isinstance(name, (str, int)) for name in stateless):
        raise place["stateless"].error("a list of names", stateless)
    without = set(stateless)
    # Each parameter stands in one of the two lists: a state that was lost is not taken for none.
    check_keys(place["state"], saved["state"], {name: None for name in parameters if name not in without})

    state = {}
    fresh = _Fresh(optimizer, list(parameters.values()))
    for position, (name, (group, parameter)) in enumerate(parameters.items()):
        if name in without:
            without.remove(name)
            continue
        entries = saved["state"][name]
        fresh.check(place["state"][name], entries, group, parameter)
        state[position] = entries
    if without:
        raise place["stateless"].error("names of parameters", sorted(without, key=str)[0])
    return state


def load(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Puts what `checked` returned into `optimizer`, in the memory layout of its parameters.

    A fused update walks through parameter and moments in the order of memory: moments of another layout
    (those of a run on a GPU, resumed on a CPU) would meet the wrong weights, without an error.
    """
    optimizer.load_state_dict(state)
    for parameter, entries in optimizer.state.items():
        if not isinstance(parameter, Tensor):
            continue
        for name, value in entries.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if value.stride() != parameter.stride():
                room = torch.empty_like(parameter, dtype=value.dtype, device=value.device)
                entries[name] = room.copy_(value)


def _checked_groups(
    optimizer: torch.optim.Optimizer, groups: list[list[Name]], saved: Any, place: Entry
) -> list[dict[str, Any]]:
    """The settings of the groups, on the devices of the present ones."""
    whole = isinstance(saved, list) and all(isinstance(group, dict) for group in saved)
    if not whole or not all(isinstance(group.get("parameters"), list) for group in saved):
        raise place.error("a list of groups, each with a list of parameters", saved)
    for index, group in enumerate(saved):
        check_keys(place[index], group, {"parameters": None, "settings": None})
    found = [group["parameters"] for group in saved]
    # As sets: the order within a group may be another, since every state goes by its name.
    if [set(names) for names in groups] != [set(map(_hashable, names)) for names in found]:
        raise place.error(f"groups of {_in_words(groups, found)}", _Words(_in_words(found, groups)))
    settings = []
    for index, (group, own) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        if len(group["parameters"]) != len(groups[index]):
            raise place[index]["parameters"].error("each name once", group["parameters"])
        own = _settings(own)
        entry = place[index]["settings"]
        check_state(entry, group.get("settings"), own)
        for key, value in group["settings"].items():
            # Numbers may have been moved by a scheduler. Switches, texts and the first rate are as they were.
            fixed = key == "initial_lr" or isinstance(own[key], (bool, str, type(None)))
            if fixed and value != own[key]:
                raise entry[key].error(f"{own[key]!r}, the present setting", value)
            if key == "lr" and isinstance(value, Tensor) and (value < 0).any():
                raise entry[key].error("a rate >= 0", value)
        settings.append(like(group["settings"], own, torch.device("cpu")))
    return settings


def _check_shared(optimizer: torch.optim.Optimizer, found: Any, entry: Entry) -> None:
    """What belongs to no parameter: torch's own optimizers have nothing of the kind."""
    if not isinstance(found, Mapping) or not all(isinstance(key, str) for key in found):
        raise entry.error("an entry for each name", found)
    if _of_torch(optimizer):
        check_keys(entry, found, {})


def _of_torch(optimizer: torch.optim.Optimizer) -> bool:
    return type(optimizer).__module__.startswith("torch.optim")


def _hashable(name: Any) -> Any:
    """`name`, or, where a file has something else in its place, how Python shows it."""
    if isinstance(name, (str, int)):
        return name
    return repr(name)


class _Words(str):
    """A text that an error message shows as it is, without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _in_words(groups: list[list[Name]], others: list[list[Name]]) -> str:
    """How many parameters each group has, and some that no group of `others` has at this place."""
    parts = []
    for index, names in enumerate(groups):
        other = set()
        if index < len(others):
            other = set(map(_hashable, others[index]))
        own = [str(name) for name in names if _hashable(name) not in other]
        text = f"{len(names)} parameters"
        if len(own) > 3:
            text += f" ({', '.join(own[:3])}, ...)"
        elif own:
            text += f" ({', '.join(own)})"
        parts.append(text)
    return " and ".join(parts) or "no parameters"


class _Fresh:
    """What an optimizer's state looks like after its first step, for each kind of parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[tuple[dict, Tensor]]):
        self.optimizer = optimizer
        # accelerate puts an optimizer around the real one.
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer):
            self.optimizer = inner
        self.total = sum(parameter.numel() for _, parameter in parameters)
        self._known: dict[tuple, dict[str, Any] | None] = {}

    def check(self, entry: Entry, found: Any, group: dict[str, Any], parameter: Tensor) -> None:
        """Whether `found` may be the state of `parameter`.

        Raises:
            ValueError: it may not.
        """
        # Parameters of one kind have states of one kind, so a few steps on zeros do for thousands of them.
        kind = id(group), parameter.shape, parameter.stride(), parameter.dtype, parameter.device
        if kind not in self._known:
            self._known[kind] = self._make(group, parameter)
        own = self._known[kind]
        if own is None:
            self._check_unknown(entry, found, parameter)
            return
        check_keys(entry, found, own)
        for key, value in own.items():
            # Counters of steps change device and dtype with `fused` and `capturable`.
            counts = key == "step" and isinstance(value, Tensor) and isinstance(found[key], Tensor)
            if counts and found[key].is_floating_point():
                value = torch.zeros_like(value, dtype=found[key].dtype)
            check_state(entry[key], found[key], value)
            self._check_sign(entry[key], key, found[key])

    def _check_sign(self, entry: Entry, key: str, found: Any) -> None:
        """That squares and the like are not below 0: the root of one would be NaN."""
        if not _of_torch(self.optimizer) or key not in NOT_NEGATIVE:
            return
        if isinstance(found, Tensor) and not found.is_complex() and (found < 0).any():
            raise entry.error(f"values >= 0, not {found.min().item():g}", found)

    def _make(self, group: dict[str, Any], parameter: Tensor) -> dict[str, Any] | None:
        """The state after a step on zeros; None: this optimizer takes none alone (LBFGS wants a closure)."""
        twin = torch.zeros_like(parameter).requires_grad_()
        twin.grad = torch.zeros_like(twin)
        kind = type(self.optimizer)
        try:
            # What arguments its class takes is not known, so the copy is made as unpickling makes one: its
            # __init__ is not called, and __setstate__ gives it what an optimizer consists of.
            copied = object.__new__(kind)
            state = defaultdict(dict)
            if parameter in self.optimizer.state:  # some make it before the first step
                state[twin] = deepcopy(self.optimizer.state[parameter])
            groups = [{**deepcopy(_settings(group)), "params": [twin]}]
            defaults = deepcopy(self.optimizer.defaults)
            copied.__setstate__({"defaults": defaults, "state": state, "param_groups": groups})
            # Some optimizers draw random numbers, which the run shall not miss.
            devices = [parameter.device] if parameter.device.type == "cuda" else []
            with torch.random.fork_rng(devices):
                copied.step()
            return dict(copied.state[twin])
        except Exception:  # whatever an optimizer of another make raises when it is not set up by itself
            return None

    def _check_unknown(self, entry: Entry, found: Any, parameter: Tensor) -> None:
        """Tensors as large as the parameter, as all parameters together, or of one number; all finite."""
        if isinstance(found, Mapping):
            for key, value in found.items():
                self._check_unknown(entry[key], value, parameter)
        elif isinstance(found, (list, tuple)):
            for index, value in enumerate(found):
                self._check_unknown(entry[index], value, parameter)
        elif isinstance(found, Tensor):
            fits = found.shape == parameter.shape or found.numel() == 1 or found.shape == (self.total,)
            if not fits or not found.is_floating_point():
                kind = type(self.optimizer).__name__
                shape = tuple(parameter.shape)
                expected = f"a floating-point tensor of shape {shape} or one number"
                raise entry.error(f"{expected} (of {kind} no more is known)", found)
            check_tensor(entry, found, torch.zeros_like(found))
        elif isinstance(found, (int, float)) and not isinstance(found, bool):
            check_number(entry, found, 0.0)
