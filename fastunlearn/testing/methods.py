"""All methods, as tests run them: a method that is added is tested by being there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, replace

from ..methods import Method, registry


def every_method(**changes) -> list[Method]:
    """The plain form of each, with its defaults; `changes` where it has such a hyperparameter (`k=2`)."""
    return [_changed(record.example, changes) for record in registry.methods().values()]


def every_variant(**changes) -> list[Method]:
    """`every_method`, each followed by its variants, which keep what makes them one (`lambd="auto"`)."""
    return [
        replace(_changed(record.example, changes), **hyperparameters)
        for record in registry.methods().values()
        for hyperparameters in record.variants.values()
    ]


def compared_with(method: Method, reference: Callable) -> dict[str, Callable]:
    """`reference` as the argument of a step or an `Unlearner`, where `method` needs one."""
    return {"reference_model": reference} if "reference" in method.needs else {}


def _changed(method: Method, changes: dict) -> Method:
    own = {field.name for field in fields(method)}
    return replace(method, **{name: value for name, value in changes.items() if name in own})
