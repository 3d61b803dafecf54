"""The public names as JSON: signatures, and fields of dataclasses and named tuples."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import fastunlearn
from fastunlearn import functional

from .parts import found

FUNCTIONAL = (
    "noised",
    "redirect",
    "mixture",
    "denoising_loss",
    "weighted_residual",
    "Noised",
    "Redirect",
    "Mixture",
)
# What a method tells the step is no promise to callers; its hyperparameters are.
METHODS = ("EraseDiff", "NegGrad", "ReTrack", "SISS", "Vanilla")
RUNS = ("unlearn", "History", "RunInterrupted", "TooManySkippedSteps", "WeightsNotFinite", "purge")


def public_api() -> dict[str, Any]:
    """Each public function and class: its parameters, and the fields or public attributes that it has."""
    api = {name: _described(getattr(fastunlearn, name)) for name in sorted(fastunlearn.__all__)}
    api |= {f"functional.{name}": _described(getattr(functional, name)) for name in FUNCTIONAL}
    for name in METHODS:
        api[name]["methods"] = {}
    return api | {
        f"training.{name}": _described(found(name, "fastunlearn.training", "fastunlearn.runs.training"))
        for name in RUNS
    }


def _described(thing: Any) -> dict[str, Any]:
    described: dict[str, Any] = {"parameters": _parameters(thing), "fields": [], "methods": {}}
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing):
            described["fields"] = [field.name for field in dataclasses.fields(thing)]
        elif hasattr(thing, "_fields"):
            described["fields"] = list(thing._fields)
        public = [
            name for name in dir(thing) if not name.startswith("_") and not hasattr(BaseException, name)
        ]
        described["methods"] = {name: _parameters(inspect.getattr_static(thing, name)) for name in public}
    return described


def _parameters(thing: Any) -> list[list[str]]:
    """`[name, kind, default]` of each parameter; none of what cannot be called."""
    thing = getattr(thing, "__func__", thing)  # of a class method
    try:
        parameters = inspect.signature(thing).parameters.values() if callable(thing) else ()
    except (TypeError, ValueError):  # of exceptions that say nothing of themselves
        return []
    return [
        [each.name, each.kind.name, "" if each.default is each.empty else repr(each.default)]
        for each in parameters
    ]
