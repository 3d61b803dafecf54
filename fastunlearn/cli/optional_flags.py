"""Flags that may be left out, whose default is None."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import NoneType, UnionType
from typing import Any, Union, get_args

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)


def optional_flags() -> ConstructorRegistry:
    """How tyro reads a flag of a type `X | None`: as one of X.

    By itself it also takes the word None, and says of each type of X why it is not what was given.
    """
    registry = ConstructorRegistry()
    registry.primitive_rule(_without_none)
    return registry


def _without_none(flag: PrimitiveTypeInfo) -> PrimitiveConstructorSpec | None:
    """None: this rule says nothing of the type."""
    kinds = get_args(flag.type)
    if flag.type_origin not in (Union, UnionType) or NoneType not in kinds:
        return None
    without = Union[tuple(kind for kind in kinds if kind is not NoneType)]  # noqa: UP007 (of a tuple)
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(without, flag.markers))
    if isinstance(spec, UnsupportedTypeAnnotationError):
        return None

    def read(words: list[str]) -> Any:
        try:
            return spec.instance_from_str(words)
        except ValueError:
            raise ValueError(f"expected {spec.metavar}, got {' '.join(words)}") from None

    def write(value: Any) -> Sequence[str]:
        return ["none"] if value is None else spec.str_from_instance(value)

    def fits(value: Any) -> Any:
        return value is None or spec.is_instance(value)

    return replace(spec, instance_from_str=read, str_from_instance=write, is_instance=fits)
