"""What a method tells the step: network calls, regressions on their outputs, and what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from ..host import check
from ..host.store import ImageStore, Rows
from .combine import Combination, Sum
from .conditioning import map_tensors
from .draws import Draw, Draws
from .frequency import BandMask, LowPass
from .schedule import NoiseSchedule

# A weight below this share of the heaviest counts as 0.
SMALLEST_RELATIVE_WEIGHT = 1e-12
ROLES = ("forget", "retain")
NEEDS = ("forget", "retain", "neighbors", "reference", "stores", "sizes")


@dataclass(frozen=True)
class Batch:
    """What a step works on. Conditioning (`*_kwargs`): tensors, batch first, constants, dicts of them."""

    forget: Tensor | Rows | None = None  # [B, C, H, W]
    retain: Tensor | Rows | None = None  # [B, C, H, W]
    neighbors: Tensor | Rows | None = None  # [B, K, C, H, W]
    sqdist: Tensor | None = None  # [B, K] float64
    forget_kwargs: dict[str, Any] = field(default_factory=dict)
    retain_kwargs: dict[str, Any] = field(default_factory=dict)
    stores: Mapping[str, ImageStore] = field(default_factory=dict)  # Whole sets, for methods that need them.
    sizes: Mapping[str, int] = field(default_factory=dict)  # Rows of the whole forget and retain set.


@dataclass(frozen=True)
class Predicted:
    """A target that a network predicts for the noisy images of the term itself; it has no graph.

    Args:
        by: `"model"`, the network that is trained, as it is before the update; `"reference"`, the other one.
        kwargs: conditioning of the term's rows, in place of that of the pass; None: the same.
    """

    by: Literal["model", "reference"]
    kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        check.one_of("Predicted.by", self.by, ("model", "reference"))


@dataclass(frozen=True)
class Term:
    """A regression on some rows of a pass.

    Without an `objective` of its own, a method's term adds to a gradient
    `scale * sum_b weight_b (||prediction_b - target_b||^2 + spread_b) / over`.

    Args:
        role: what its loss is reported as, `"forget"` or `"retain"`.
        target: `[B, C, H, W]`, or who predicts it.
        weight: `[B]`, what each row counts: bool, or floats, of which one below 1e-12 of the largest
            counts as 0. None: all count 1.
        over: what the weighted sum is divided by; None: B, the rows of the term in the whole batch.
        rows: of the pass; None: as many as the target has, from the first on.
        spread: `[B]`, added to the losses; it has no gradient.
        scale: a constant factor of the term; below 0, predictions are pushed away from the target.
        gradient: to which of the combination's gradients the term belongs; None: `"total"`, or, where two are
            kept apart, that of its role.
        band: the spatial frequencies of the residual that count; None: all, or, for the forget terms, those
            of the step's `lowpass`.
    """

    role: str
    target: Tensor | Predicted
    weight: Tensor | None = None
    over: float | None = None
    rows: range | None = None
    spread: Tensor | None = None
    scale: float = 1.0
    gradient: str | None = None
    band: LowPass | BandMask | None = None

    def __post_init__(self) -> None:
        if self.rows is None and isinstance(self.target, Tensor):
            object.__setattr__(self, "rows", range(len(self.target)))

    def at(self, rows: range, own: Tensor | slice) -> Term:
        """The term on its rows `own` alone, which are `rows` of another pass."""
        return replace(
            self,
            rows=rows,
            target=_at(self.target, own),
            weight=None if self.weight is None else self.weight[own],
            spread=None if self.spread is None else self.spread[own],
        )


def _at(target: Tensor | Predicted, own: Tensor | slice) -> Tensor | Predicted:
    if isinstance(target, Tensor):
        return target[own]
    if target.kwargs is None:
        return target
    return replace(target, kwargs=map_tensors(lambda value: value[own], target.kwargs))


Coupling = Literal["row", "pair", "batch"]
COUPLINGS = ("row", "pair", "batch")


@dataclass(frozen=True)
class Pass:
    """One call of the network, and the regressions on its output.

    Args:
        coupled: which rows a method's `objective` ties together, so that none of them may be missing when it
            is asked: `"row"`, none; `"pair"`, the b-th rows of all terms, which are equally long; `"batch"`,
            all rows. A method without an objective of its own ties none.
    """

    x_t: Tensor  # [R, C, H, W]
    timesteps: Tensor  # [R] int64
    terms: tuple[Term, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    coupled: Coupling = "row"

    def __post_init__(self) -> None:
        # The dataclass is frozen: its own attributes are set past it.
        if any(term.rows is None for term in self.terms):
            # Those whose target is predicted.
            everything = range(len(self.x_t))
            terms = (replace(term, rows=everything) if term.rows is None else term for term in self.terms)
            object.__setattr__(self, "terms", tuple(terms))

    @property
    def gradients(self) -> set[str]:
        """Those that its terms belong to."""
        return {term.gradient for term in self.terms}

    def only(self, rows: range) -> Pass:
        """The work on some neighbouring rows."""
        return self._slice(rows.start, rows.stop)

    def split(self, rows: int | None) -> list[Pass]:
        """The same work in calls of at most `rows` rows, in order."""
        if rows is None or rows >= len(self.x_t):
            return [self]
        starts = range(0, len(self.x_t), rows)
        return [self._slice(start, min(start + rows, len(self.x_t))) for start in starts]

    def split_pairs(self, rows: int | None) -> list[Pass]:
        """The same work in calls of at most `rows` rows, each with whole pairs.

        The terms, which share no rows, are split at the same places.
        """
        pairs = len(self.terms[0].rows)
        if rows is None or rows >= len(self.x_t):
            return [self]
        step = rows // len(self.terms)
        parts = []
        for start in range(0, pairs, step):
            own = range(start, min(start + step, pairs))
            at = torch.cat(
                [
                    torch.arange(term.rows[own.start], term.rows[own.stop - 1] + 1, device=self.x_t.device)
                    for term in self.terms
                ]
            )
            terms = tuple(
                term.at(range(number * len(own), (number + 1) * len(own)), slice(own.start, own.stop))
                for number, term in enumerate(self.terms)
            )
            parts.append(self._select(at, terms))
        return parts

    def by_role(self) -> list[Pass]:
        """The same work in up to three calls, by the roles that need a row.

        Rows that only the forget terms need, rows that both need, rows that only the retain terms need. A row
        outside of a term, or of weight zero in it, takes no backward pass for it; and several small calls
        hold fewer activations than a large one. How many rows there are of each kind is data, so this is for
        CPUs, where reading it is no wait. A pass with two terms of a role comes back as it is, and terms of
        one gradient on the same rows stay together: such a row takes one pass back, whichever of them needs
        it.
        """
        roles = [term.role for term in self.terms]
        if len(set(roles)) < len(roles) or not set(roles) <= set(ROLES):
            return [self]
        needed_by = [set() for _ in range(len(self.x_t))]
        for term in self.terms:
            for row, weight in zip(term.rows, term.weight.tolist(), strict=True):
                if weight != 0:
                    needed_by[row].add(term.role)
        if self._is_one_sum():
            needed_by = [set(roles) if own else own for own in needed_by]
        parts = []
        for wanted in ({"forget"}, {"forget", "retain"}, {"retain"}):
            rows = [row for row, own in enumerate(needed_by) if own == wanted]
            if len(rows) == len(self.x_t) and len(wanted) == len(roles):
                return [self]
            if rows:
                parts.append(self._rows_of(rows, wanted))
        return parts or [self]

    def _is_one_sum(self) -> bool:
        """Whether all terms stand on the same rows, and are known to belong to the same gradient."""
        of_first = self.terms[0].rows, self.terms[0].gradient
        same = all((term.rows, term.gradient) == of_first for term in self.terms)
        return same and of_first[1] is not None

    def _rows_of(self, rows: list[int], roles: set[str]) -> Pass:
        terms = [term for term in self.terms if term.role in roles]
        if len(rows) == len(self.x_t):
            return replace(self, terms=tuple(terms))
        at = torch.tensor(rows)
        everything = range(len(rows))
        return self._select(at, tuple(term.at(everything, at - term.rows.start) for term in terms))

    def _slice(self, start: int, stop: int) -> Pass:
        terms = []
        for term in self.terms:
            first, last = max(start, term.rows.start), min(stop, term.rows.stop)
            if first < last:
                own = slice(first - term.rows.start, last - term.rows.start)
                terms.append(term.at(range(first - start, last - start), own))
        return self._select(slice(start, stop), tuple(terms))

    def _select(self, at: Tensor | slice, terms: tuple[Term, ...]) -> Pass:
        kwargs = map_tensors(lambda value: value[at], self.kwargs)
        return Pass(self.x_t[at], self.timesteps[at], terms, kwargs, self.coupled)


class Method:
    """Base of the methods: frozen dataclasses of hyperparameters. Nothing else asks which one it has.

    A subclass says what it `needs`, what it `draws`, what it makes of a batch (`compose`), perhaps what it
    makes of the losses (`objective`), and how its gradients become one (`combine`).
    """

    name: ClassVar[str]
    # Of `NEEDS`: what `compose` and `objective` read. A method with "neighbors" says how many in a field `k`.
    needs: ClassVar[frozenset[str]]
    # Of `ROLES`: whose losses `objective` compares with those of the reference, which sees no other pass.
    compared: ClassVar[frozenset[str]] = frozenset(ROLES)
    # Updates on the forget gradient alone that are tried out before a step and taken back. The loss that they
    # reach is taken off that of the forget terms in what the step reports; no gradient depends on it.
    inner_steps: int = 0

    def __init_subclass__(cls, **options) -> None:
        """Numbers that numpy or torch made become Python's before `__post_init__` checks them.

        No method has to think of it.
        """
        super().__init_subclass__(**options)
        # The class's own checks, or those that it inherits, run after, on Python's numbers.
        check_own = cls.__post_init__

        def check_plain_numbers(self, *given) -> None:
            for hyperparameter in fields(self):
                value = getattr(self, hyperparameter.name)
                object.__setattr__(self, hyperparameter.name, check.scalar(hyperparameter.name, value))
            check_own(self, *given)

        cls.__post_init__ = check_plain_numbers

    def __post_init__(self) -> None:
        """Refuses hyperparameters that make no sense."""

    @property
    def without_effect(self) -> frozenset[str]:
        """Hyperparameters that change nothing beside the others: a command refuses their flags."""
        return frozenset()

    def check_sets(self, stores: Mapping[str, ImageStore], device: torch.device) -> None:
        """Refuses whole sets that `compose` could not read as `Batch.stores`.

        Asked once, when the sets are where steps on `device` will find them.

        Raises:
            ValueError: naming the set.
        """

    @property
    def combine(self) -> Combination:
        """How the gradients of a step become one."""
        return Sum()

    def draws(self) -> dict[str, Draw]:
        """The fields of `Draws` that `compose` reads, and how each is drawn, in this order."""
        raise NotImplementedError

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        """The network calls of a step. `draws` is complete."""
        raise NotImplementedError

    def objective(
        self, losses: dict[str, Tensor], reference: dict[str, Tensor], elements: int
    ) -> dict[str, dict[str, Tensor]]:
        """What is descended, where it is more than a weighted sum of the losses.

        Args:
            losses: for each role the losses of its rows, `||prediction - target||^2 + spread`, `[B]` float32
                or better, differentiable. `weight`, `over` and `scale` of the terms are not in them.
            reference: the same of the reference network, constants; `{}` where the method needs none, or
                compares none of these rows.
            elements: C H W, those of one image: what a loss is divided by to be a mean over them.

        Returns:
            For each gradient, for each role its contributions, one a row: each role's are averaged over its
            rows, in all micro-batches and processes. Where rows are not tied together (`Pass.coupled`),
            it is asked for the rows of one call of the network at a time, whose roles may be some of all.
        """
        raise NotImplementedError


def has_own_objective(method: Method) -> bool:
    """Whether the losses are more to `method` than summands with known weights."""
    return type(method).objective is not Method.objective


def without_negligible(weight: Tensor) -> Tensor:
    """`weight` `[B]` with zero where a row counts for less than 1e-12 of the heaviest.

    At most timesteps one of a row's two SISS weights does. Subnormal gradients would slow a CPU down
    threefold, and a row of weight zero needs no backward pass.
    """
    size = weight.abs()
    return torch.where(size < SMALLEST_RELATIVE_WEIGHT * size.amax(), torch.zeros_like(weight), weight)
