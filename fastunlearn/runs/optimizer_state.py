"""The state of an optimizer under the names of its parameters, and its way back, checked before it is loaded.

torch keeps this state by position, and believes whatever is loaded: an optimizer over the same parameters in
another order then updates each of them with another one's moments, of another size or not. Fused updates read
and write beyond the end of a moment that is too short.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable, Mapping
from copy import deepcopy
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from ..host.plain_names import plain_parameters
from .state_checks import Entry, check_keys, check_number, check_state, check_tensor, like

# Of torch's own optimizers: squares, norms and sizes.
NOT_NEGATIVE = (
    "exp_avg_sq", "max_exp_avg_sq", "exp_inf", "square_avg", "sum", "row_var", "col_var", "variance",
    "step_size", "step", "acc_delta",
)  # fmt: skip
NAMES = ("params", "param_names")  # of a parameter group: what is kept under the names of the network instead

Name = Hashable  # a plain name; the position, where no network is given


def named(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> dict[str, Any]:
    """`optimizer.state_dict()` with names for positions: `groups`, `state`, and `stateless` (who has none).

    Args:
        model: the network whose parameters `optimizer` trains; None: positions are the names.

    Raises:
        ValueError: a parameter is none of `model`.
    """
    groups, state = group_names(optimizer, model), optimizer.state_dict()
    settings = [
        {key: value for key, value in group.items() if key not in NAMES} for group in state["param_groups"]
    ]
    name_of = dict(enumerate(chain.from_iterable(groups)))
    by_position = state["state"]
    return {
        "groups": [
            {"parameters": names, "settings": own} for names, own in zip(groups, settings, strict=True)
        ],
        "state": {
            name_of[position]: entries for position, entries in by_position.items() if position in name_of
        },
        "stateless": [name_of[position] for position in sorted(name_of.keys() - by_position.keys())],
        "shared": {key: by_position[key] for key in by_position.keys() - name_of.keys()},
    }


def group_names(optimizer: torch.optim.Optimizer, model: nn.Module | None) -> list[list[Name]]:
    """The names of the parameters, group by group.

    Raises:
        ValueError: a parameter is none of `model`: a checkpoint would not hold it.
    """
    if model is None:
        positions = iter(range(sum(len(group["params"]) for group in optimizer.param_groups)))
        return [list(islice(positions, len(group["params"]))) for group in optimizer.param_groups]
    parameters = plain_parameters(model)
    name_of = dict(zip(map(id, parameters.values()), parameters, strict=True))
    groups = []
    for index, group in enumerate(optimizer.param_groups):
        names = list(map(name_of.get, map(id, group["params"])))
        if None in names:
            position = names.index(None)
            shape = tuple(group["params"][position].shape)
            raise ValueError(
                "optimizer: expected parameters of the model (others are in no checkpoint), got one of shape "
                f"{shape} that is none, at {position} of group {index}"
            )
        groups.append(names)
    return groups


def checked(
    optimizer: torch.optim.Optimizer, model: nn.Module | None, saved: Any, place: Entry
) -> dict[str, Any]:
    """What `named` made, as `optimizer.load_state_dict` takes it; nothing is changed.

    Every entry is held against that of a fresh state: the optimizer takes a step on a parameter of zeros.

    Raises:
        ValueError: naming file and entry: other groups, names, keys, shapes, dtypes, or impossible values.
    """
    groups = group_names(optimizer, model)
    check_keys(place, saved, {"groups": None, "state": None, "stateless": None, "shared": None})
    settings = _checked_groups(optimizer, groups, saved["groups"], place["groups"])
    parameters = {}
    for names, group in zip(groups, optimizer.param_groups, strict=True):
        parameters |= {
            name: (group, parameter) for name, parameter in zip(names, group["params"], strict=True)
        }
    stateless = saved["stateless"]
    if not isinstance(stateless, list) or not all(isinstance(name, (str, int)) for name in stateless):
        raise place["stateless"].error("a list of names", stateless)
    without = set(stateless)
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
    _check_shared(optimizer, saved["shared"], place["shared"])
    positions = iter(range(len(parameters)))
    param_groups = [
        {**own, "params": list(islice(positions, len(names)))}
        for own, names in zip(settings, groups, strict=True)
    ]
    return {"state": {**state, **saved["shared"]}, "param_groups": param_groups}


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
    if [set(names) for names in groups] != [set(map(_hashable, names)) for names in found]:
        raise place.error(f"groups of {_in_words(groups, found)}", _Words(_in_words(found, groups)))
    settings = []
    for index, (group, own) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        if len(group["parameters"]) != len(groups[index]):
            raise place[index]["parameters"].error("each name once", group["parameters"])
        own = {key: value for key, value in own.items() if key not in NAMES}
        entry = place[index]["settings"]
        check_state(entry, group.get("settings"), own)
        for key, value in group["settings"].items():
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
    return name if isinstance(name, (str, int)) else repr(name)


class _Words(str):
    """Shown as it is by an error message."""

    def __repr__(self) -> str:
        return str(self)


def _in_words(groups: list[list[Name]], others: list[list[Name]]) -> str:
    """How many parameters each group has, and some that no group of `others` has at this place."""
    parts = []
    for index, names in enumerate(groups):
        other = set(map(_hashable, others[index])) if index < len(others) else set()
        own = [str(name) for name in names if _hashable(name) not in other]
        named = f" ({', '.join(own[:3])}{', ...' if len(own) > 3 else ''})" if own else ""
        parts.append(f"{len(names)} parameters{named}")
    return " and ".join(parts) or "no parameters"


class _Fresh:
    """What an optimizer's state looks like after its first step, for each kind of parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, parameters: list[tuple[dict, Tensor]]):
        # accelerate puts an optimizer around the real one
        inner = getattr(optimizer, "optimizer", None)
        self.optimizer = inner if isinstance(inner, torch.optim.Optimizer) else optimizer
        self.total = sum(parameter.numel() for _, parameter in parameters)
        self._known: dict[tuple, dict[str, Any] | None] = {}

    def check(self, entry: Entry, found: Any, group: dict[str, Any], parameter: Tensor) -> None:
        """Whether `found` may be the state of `parameter`."""
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
            copied = object.__new__(kind)
            state = defaultdict(dict)
            if parameter in self.optimizer.state:  # some make it before the first step
                state[twin] = deepcopy(self.optimizer.state[parameter])
            settings = deepcopy({key: value for key, value in group.items() if key not in NAMES})
            defaults = deepcopy(self.optimizer.defaults)
            groups = [{**settings, "params": [twin]}]
            copied.__setstate__({"defaults": defaults, "state": state, "param_groups": groups})
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
