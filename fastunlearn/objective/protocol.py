"""What a method tells the step: network calls, and weighted regressions on their outputs."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from numbers import Number
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from ..host import check as _check
from ..host.store import Rows
from . import combine as combination
from .draws import Draws
from .schedule import NoiseSchedule

Role = Literal["retain", "forget"]
CONSTANTS = (str, Number, np.bool_, type(None))  # what conditioning has beside tensors; bool is a Number


@dataclass(frozen=True)
class Batch:
    """What a step works on. Conditioning (`*_kwargs`): tensors, batch first, `CONSTANTS`, dicts of them."""

    forget: Tensor | Rows | None = None  # [B, C, H, W]
    retain: Tensor | Rows | None = None  # [B, C, H, W]
    neighbors: Tensor | Rows | None = None  # [B, K, C, H, W]
    sqdist: Tensor | None = None  # [B, K] float64
    forget_kwargs: dict[str, Any] = field(default_factory=dict)
    retain_kwargs: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Term:
    """`scale * mean_b weight_b (||prediction_b - target_b||^2 + spread_b)` over the rows `start..start + B`
    of a pass.
    """

    role: Role  # which of the two gradients it belongs to, for methods that keep them apart
    target: Tensor  # [B, C, H, W]
    weight: Tensor  # [B], already divided by the rows of the whole batch
    start: int = 0
    spread: Tensor | None = None  # [B]
    scale: float = 1.0
    # 0-d, >= 0: the weights were divided by it (0: they are 0), so that tiny ones survive float32; it cancels
    # in a rescaling
    unit: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.start + len(self.target)

    def rows(self, start: int, stop: int) -> Term | None:
        """The part of the term on the pass rows `start..stop`, counted from `start`; None if there is none."""
        first, last = max(start, self.start), min(stop, self.stop)
        if first >= last:
            return None
        own = slice(first - self.start, last - self.start)
        spread = None if self.spread is None else self.spread[own]
        return replace(
            self, target=self.target[own], weight=self.weight[own], spread=spread, start=first - start
        )


@dataclass(frozen=True)
class Pass:
    """One call of the network, and the regressions on its output."""

    x_t: Tensor  # [R, C, H, W]
    timesteps: Tensor  # [R] int64
    terms: tuple[Term, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def roles(self) -> set[Role]:
        return {term.role for term in self.terms}

    def split(self, rows: int | None) -> list[Pass]:
        """The same work in calls of at most `rows` rows."""
        if rows is None or rows >= len(self.x_t):
            return [self]
        parts = []
        for start in range(0, len(self.x_t), rows):
            stop = min(start + rows, len(self.x_t))
            terms = tuple(part for term in self.terms if (part := term.rows(start, stop)) is not None)
            kwargs = map_tensors(lambda value, at=slice(start, stop): value[at], self.kwargs)
            parts.append(Pass(self.x_t[start:stop], self.timesteps[start:stop], terms, kwargs))
        return parts

    def by_role(self) -> list[Pass]:
        """The same work in up to three calls: rows that only the forget terms need, rows that both need, rows
        that only the retain terms need.

        A row outside a term, or of weight zero in it, takes no backward pass for it; and several small calls
        hold fewer activations than a large one. How many rows there are of each kind is data, so this is for
        CPUs, where reading it is no wait. A pass with two terms of a role comes back as it is.
        """
        if len({term.role for term in self.terms}) < len(self.terms):
            return [self]
        needed = {
            term.role: {term.start + row for row, weight in enumerate(term.weight.tolist()) if weight != 0}
            for term in self.terms
        }
        parts = []
        for roles in ({"forget"}, {"forget", "retain"}, {"retain"}):
            rows = [
                row
                for row in range(len(self.x_t))
                if {role for role in needed if row in needed[role]} == roles
            ]
            if rows:
                parts.append(self._select(rows, roles))
        return parts or [self]

    def _select(self, rows: list[int], roles: set[str]) -> Pass:
        if len(rows) == len(self.x_t):
            return replace(self, terms=tuple(term for term in self.terms if term.role in roles))
        at, terms = torch.tensor(rows), []
        for term in self.terms:
            if term.role in roles:
                own = at - term.start
                spread = None if term.spread is None else term.spread[own]
                terms.append(
                    replace(term, target=term.target[own], weight=term.weight[own], spread=spread, start=0)
                )
        return Pass(
            self.x_t[at], self.timesteps[at], tuple(terms), map_tensors(lambda value: value[at], self.kwargs)
        )


class Method:
    """Base of the methods.

    Subclasses are frozen dataclasses; nothing else in the package asks which one it has.
    """

    name: ClassVar[str]
    batches: ClassVar[frozenset[str]]  # of "forget", "retain", "neighbors": what `compose` reads
    draws: ClassVar[frozenset[str]]  # fields of Draws that `compose` reads
    shared_draws: ClassVar[bool] = False  # one noise and one timestep for a forget-retain pair
    forget_probability: float = 0.0  # of `from_forget`

    def __init_subclass__(cls, **options) -> None:
        """Numbers that numpy or torch made become Python's before `__post_init__` checks them.

        No method has to think of it.
        """
        super().__init_subclass__(**options)
        check = cls.__post_init__

        def check_plain_numbers(self, *given) -> None:
            for hyperparameter in fields(self):
                value = getattr(self, hyperparameter.name)
                object.__setattr__(self, hyperparameter.name, _check.scalar(hyperparameter.name, value))
            check(self, *given)

        cls.__post_init__ = check_plain_numbers

    def __post_init__(self) -> None:
        """Refuses hyperparameters that make no sense."""

    @property
    def combine(self) -> combination.Combination | None:
        """How the gradient of the terms of role `"forget"`, kept apart, joins that of the others; None: all
        terms are one gradient.
        """
        return None

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        """The network calls of a step. `draws` is complete."""
        raise NotImplementedError


def mean_weight(batch: Tensor | Rows) -> Tensor:
    """`[B]`, the weight 1 / B of a plain mean over the batch."""
    return torch.full(
        (len(batch),),
        1 / len(batch),
        device=batch.device,
        dtype=torch.promote_types(batch.dtype, torch.float32),
    )


def map_tensors(function, first: dict[str, Any], *others: dict[str, Any]) -> dict[str, Any]:
    """`function` on corresponding tensors of nested dicts. Everything else stays as it is.

    Raises:
        ValueError: the dicts have different keys, tensors that differ by more than their rows, or something
            else that differs: rows that share a call of the network share all but their tensors.
        TypeError: an entry is none of these, or not the same kind of thing in all dicts.
    """
    return _map_tensors(function, (first, *others), "")


def _map_tensors(function, given: tuple[dict[str, Any], ...], path: str) -> dict[str, Any]:
    names = "forget_kwargs, retain_kwargs"
    within = f" in {path[:-1]!r}" if path else ""
    for other in given[1:]:
        if given[0].keys() != other.keys():
            shown = f"{sorted(given[0])} and {sorted(other)}"
            raise ValueError(f"{names}: expected the same keys{within}, got {shown}")
    result = {}
    for key in given[0]:
        values = tuple(each[key] for each in given)
        if all(isinstance(value, dict) for value in values):
            result[key] = _map_tensors(function, values, f"{path}{key}.")
        elif all(isinstance(value, Tensor) for value in values):
            if len({value.shape[1:] for value in values}) > 1:
                expected = "expected the same shape but for the rows, to share a call of the network"
                shapes = " and ".join(str(tuple(value.shape)) for value in values)
                raise ValueError(f"{names}: {expected}, got {shapes} for {path + key!r}")
            result[key] = function(*values)
        elif all(isinstance(value, CONSTANTS) for value in values):
            if any(type(value) is not type(values[0]) or value != values[0] for value in values):
                expected = "expected the same in both, to share a call of the network"
                shown = " and ".join(map(repr, values))
                raise ValueError(f"{names}: {expected}, got {shown} for {path + key!r}")
            result[key] = values[0]
        else:
            kinds = "numbers, strings, booleans, None, or dicts of them"
            expected = f"expected tensors (batch first), {kinds}, the same kind in both"
            kinds = " and ".join(type(value).__name__ for value in values)
            raise TypeError(f"{names}: {expected}, got {kinds} for {path + key!r}")
    return result


def concatenate(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Conditioning of a pass whose rows are the forget rows, then the retain rows."""
    return map_tensors(lambda a, b: torch.cat([a, b]), first, second)
