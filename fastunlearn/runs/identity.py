"""What makes two runs the same run: a checkpoint is resumed only by a run of the same identity.

It is taken before the first step, of objects that are new: whatever a run changes afterwards (rates,
counters, weights) has the value there that its arguments give it. docs/resume.md lists what stands in it, and
what does not.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, is_dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..host import check
from ..host.arrays import tensor_bytes
from ..host.plain_names import plain, plain_parameters, plain_state
from .selections import WITHOUT, reason, selected

SHOWN = 4  # differences of an entry in a message
# Where a function of the step is asked what it gives: at each of the first steps, then ever more rarely.
FACTOR_STEPS = [*range(1024), *range(1024, 20_000, 64), *range(20_000, 1_000_001, 20_000)]
FACTORS_SHOWN = (0, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1000)  # of these steps messages give the values
UNKNOWN = "not known: the run did not begin at step 0"  # equal to anything
ABSENT = "nothing of this name"


def identity(unlearner, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything but the start weights (`start_weights`); JSON-able, the same for any number of processes.

    Args:
        more: what else belongs to it.

    Raises:
        ValueError: a name in `more` is taken.
    """
    method = unlearner.method
    hyperparameters = asdict(method) if is_dataclass(method) else vars(method)
    description = {
        "seed": unlearner.seed,
        "network": _network(unlearner.model),
        "schedule": _schedule(getattr(unlearner, "schedule", None)),
        "optimizer": _optimizer(unlearner.optimizer),
        "lr_scheduler": _lr_scheduler(unlearner),
        "method": {"name": type(method).__name__} | hyperparameters,
        **selected(unlearner),
        "batch_size": unlearner.batch_size,
        "data": {name: _store(getattr(unlearner, name)) for name in ("forget", "retain")},
        "neighbors": _neighbors(getattr(unlearner, "neighbor_rows", None)),
        "max_grad_norm": getattr(unlearner, "max_grad_norm", None),
        "precision": _precision(unlearner),
        "ema": _part(unlearner, "ema"),
    }
    # Only where there are any: a run without them is the same run as one of before there were rules.
    if getattr(unlearner, "rules", ()):
        description["rules"] = [
            {"kind": described(type(rule)), "state": _rule_state(rule.state_dict())}
            for rule in unlearner.rules
        ]
    reference = getattr(unlearner, "reference_model", None)
    if isinstance(reference, nn.Module):
        weights = weights_of("reference_model", reference)
        description["reference_model"] = {"network": _network(reference), "weights": weights}
    elif reference is not None:
        description["reference_model"] = described(reference)
    if more is None:
        more = {}
    taken = sorted((description.keys() | {"start_weights"}) & more.keys())
    if taken:
        raise ValueError(f"identity: expected names of your own, got {taken[0]!r}, which has a meaning")
    # Entries are compared in this order, and the first that differs is told: the more readable ones first.
    return described({**more, **description})


def start_weights(unlearner) -> str:
    """SHA-256 over the model's state before any step, by plain name, whatever its device and wrapping.

    Raises:
        TypeError: the state holds something that is no tensor: no checkpoint can.
    """
    if unlearner.step_index != 0:
        return UNKNOWN
    return weights_of("model", unlearner.model)


def weights_of(argument: str, model: Any) -> str:
    """SHA-256 over the model's state, by plain name.

    Raises:
        TypeError: naming `argument`, as in `start_weights`.
    """
    # By hashes of the tensors, so that names and values cannot run into each other.
    digest = hashlib.sha256()
    for name, value in sorted(plain_state(model).items()):
        if not isinstance(value, Tensor):
            got = f"{check.describe(value)} for {name}"
            raise TypeError(f"{argument}: expected a state dict of tensors, got {got}")
        digest.update(f"{name} {_hash(value)}\n".encode())
    return digest.hexdigest()


def check_same(present: dict[str, Any], saved: Any, names: list[str], where: str) -> None:
    """Whether the entries `names` of two identities agree.

    Raises:
        ValueError: with both values of what differs in the first that does not.
    """
    for name in names:
        absent = WITHOUT.get(name, ABSENT)
        first, second = present.get(name, absent), saved.get(name, absent)
        differences = list(_differences(first, second))
        if not differences:
            continue
        parts = []
        for path, here, there in differences[:SHOWN]:
            values = f"{check.in_a_line(repr(here))} here, {check.in_a_line(repr(there))} there"
            parts.append(f"{check.in_a_line(path)} ({values})")
        # Of two with entries only what differs is told; plain values differ at no path.
        own, other = f"{name} as here", f"another with {', '.join(parts)} in {where}"
        if not differences[0][0]:
            own, other = f"{name} {_in_short(first)}", f"{_in_short(second)} in {where}"
        # It is nobody's business who reads what a run prints.
        if name == "seed":
            own, other = "this seed", f"another in {where}"
        more = reason(name, present, saved)
        expected = "expected a checkpoint of a run with"
        raise ValueError(f"resume_from_checkpoint: {expected} {own}, got {other}{more}")


def _in_short(value: Any) -> str:
    """An entry of an identity, as a message shows it: of something with many settings its name."""
    if isinstance(value, Mapping) and "name" in value and len(str(value)) > check.LONGEST:
        return check.in_a_line(f"{{'name': {value['name']!r}, ...}}")
    return check.in_a_line(value)


def described(value: Any) -> Any:
    """`value` as JSON, the same in every process: no addresses, no objects; large tensors by their hash."""
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        # JSON has no NaN, and NaN is not equal to itself.
        if not math.isfinite(value):
            return repr(value)
        return value
    if isinstance(value, Fraction):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): described(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return described(value.tolist())
    if isinstance(value, Tensor):
        if value.numel() == 1:
            return described(value.item())
        return {"shape": list(value.shape), "sha256": _hash(value)}
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value)
    if isinstance(value, functools.partial):
        return [described(value.func), described(value.args), described(value.keywords)]
    # A function or class by its own name, any other object by its class, since its repr may hold an address.
    module = getattr(value, "__module__", "")
    name = getattr(value, "__qualname__", type(value).__qualname__)
    return f"{module}.{name}"


def _hash(*tensors: Tensor) -> str:
    """SHA-256 over dtypes, shapes and bytes."""
    digest = hashlib.sha256()
    for value in tensors:
        digest.update(f"{value.dtype} {list(value.shape)}\n".encode())
        digest.update(tensor_bytes(value.detach().flatten()))
    return digest.hexdigest()


def _network(model: nn.Module) -> dict[str, Any]:
    """Its class, configuration (diffusers keeps one), mode and dtypes, and which parameters are trained."""
    parameters = plain_parameters(model)
    trained = sorted(name for name, parameter in parameters.items() if parameter.requires_grad)
    names = hashlib.sha256(" ".join(trained).encode()).hexdigest()[:16]
    config = getattr(plain(model), "config", None)
    if not isinstance(config, Mapping):
        config = {}
    return {
        "name": type(plain(model)).__name__,
        # What begins with "_" says where the weights came from, and with which version.
        "config": {key: value for key, value in config.items() if not str(key).startswith("_")},
        "training": model.training,
        "dtypes": {parameter.dtype for parameter in parameters.values()},
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "trained": f"{len(trained)} of {len(parameters)} tensors, {names}",
    }


def _schedule(schedule) -> dict[str, Any] | None:
    if schedule is None:
        return None
    # The tables themselves: two configurations may give the same one, and one configuration different ones.
    tables = _hash(schedule.alpha, schedule.sigma, schedule.model_timesteps)
    return {"prediction_type": schedule.prediction_type, "timesteps": len(schedule), "sha256": tables}


def _optimizer(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Its class, and rates and settings of every group."""
    # A scheduler moves "lr", and keeps the first one as "initial_lr".
    left_out = ("params", "param_names", "lr", "initial_lr")
    rates, groups = [], []
    for group in optimizer.param_groups:
        rates.append(float(group.get("initial_lr", group["lr"])))
        groups.append({key: value for key, value in group.items() if key not in left_out})
    return {"name": type(optimizer).__name__, "learning_rates": rates, "groups": groups}


def _lr_scheduler(unlearner) -> dict[str, Any] | None:
    """How the rates will go on: the scheduler's settings, and what the functions of a LambdaLR give."""
    scheduler = unlearner.lr_scheduler
    if scheduler is None:
        return None
    part = _part(unlearner, "lr_scheduler")
    if not isinstance(scheduler, torch.optim.lr_scheduler.LRScheduler):
        # Nothing is known of it: its rates may depend on the length of the run.
        return part | {"total_steps": getattr(unlearner, "total_steps", None)}
    functions = getattr(scheduler, "lr_lambdas", [])
    if functions:
        part["factors"] = [_factors(function) for function in functions]
    return part


def _factors(function) -> dict[str, Any]:
    """What a function of the step gives at many steps: two functions cannot be compared in another way.

    A table may end before the last of these steps.
    """
    values = []
    for step in FACTOR_STEPS:
        try:
            values.append(float(function(step)))
        except Exception:  # a function of the user's: whatever it raises where it is not defined
            break
    # The first 1024 of FACTOR_STEPS are the steps 0 to 1023, so a step shown is its own place in `values`.
    return {
        "at": {str(step): values[step] for step in FACTORS_SHOWN if step < len(values)},
        "sha256": hashlib.sha256(repr(values).encode()).hexdigest(),
    }


def _part(unlearner, name: str) -> dict[str, Any] | None:
    """A scheduler's, an EMA's or a scaler's class and the numbers and texts of its state."""
    part = getattr(unlearner, name, None)
    if part is None:
        return None
    # Before the first step its state has the values that its arguments gave it; later nobody knows them.
    settings = UNKNOWN
    if unlearner.step_index == 0:
        settings = _settings(part.state_dict())
    return {"name": type(part).__name__, "settings": settings}


def _settings(state: Any) -> Any:
    """A state without its tensors: but for a single number under a name, those are no settings."""
    if isinstance(state, Mapping):
        kept = {}
        for key, value in state.items():
            if not isinstance(value, Tensor) or value.ndim == 0:
                kept[str(key)] = _settings(value)
        return kept
    if isinstance(state, (list, tuple)):
        return [_settings(value) for value in state if not isinstance(value, Tensor)]
    return described(state)


def _precision(unlearner) -> dict[str, Any]:
    """In what the network computes: autocast, the scaler of its gradients, and whether float32 means TF32."""
    backends = torch.backends
    return {
        "autocast_dtype": getattr(unlearner, "autocast_dtype", None),
        "grad_scaler": _part(unlearner, "grad_scaler"),
        "float32": {
            "products": backends.cuda.matmul.fp32_precision,
            "convolutions": backends.cudnn.conv.fp32_precision,
        },
    }


def _store(store) -> dict[str, Any] | None:
    if store is None:
        return None
    return {
        "rows": len(store),
        "shape": list(store.shape),
        "dtype": str(store.dtype),
        "sha256": store.content_hash(),
    }


def _rule_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """A rule's state, in which a tensor for each of many names (a mask, an anchor) is one hash."""
    short = {}
    for key, value in state.items():
        if isinstance(value, Mapping) and value and all(isinstance(each, Tensor) for each in value.values()):
            names = hashlib.sha256(" ".join(value).encode()).hexdigest()[:16]
            value = {"tensors": f"{len(value)}, {names}", "sha256": _hash(*value.values())}
        short[key] = value
    return short


def _neighbors(rows: Tensor | None) -> dict[str, Any] | None:
    """Their rows in the retain set, `[N, k]`."""
    if rows is None:
        return None
    return {"shape": list(rows.shape), "sha256": _hash(rows.long())}


def _differences(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Where two descriptions differ: path and both values."""
    if UNKNOWN in (first, second):
        return
    prefix = f"{path}." if path else ""
    both_lists = isinstance(first, list) and isinstance(second, list)
    if isinstance(first, dict) and isinstance(second, dict):
        for key in dict.fromkeys([*first, *second]):
            left, right = first.get(key, ABSENT), second.get(key, ABSENT)
            yield from _differences(left, right, f"{prefix}{key}")
    elif both_lists and len(first) == len(second):
        for index, (left, right) in enumerate(zip(first, second, strict=True)):
            yield from _differences(left, right, f"{prefix}{index}")
    # True is equal to 1 in Python, and is another setting.
    elif first != second or isinstance(first, bool) != isinstance(second, bool):
        yield path, first, second
