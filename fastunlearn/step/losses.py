"""What a step reports of its losses: the mean of each role, and the loss that the step descends.

Means are those over the rows of all processes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from ..objective.combine import Combination, Combined
from ..objective.protocol import Pass, Term
from .accumulate import reduce_mean
from .arrange import Unit

Name = TypeVar("Name", bound=Hashable)  # of a mean: its role, say


class _Kind(NamedTuple):
    """Terms whose losses are summed: a role may have several, each with a scale and a gradient of its own."""

    role: str
    gradient: str
    scale: float

    @classmethod
    def of(cls, term: Term) -> _Kind:
        return cls(term.role, term.gradient, term.scale)

    def __str__(self) -> str:
        return self.role


class Losses:
    """Sums over the calls of a step, on the device: of this process, until `result` makes them everyone's.

    Args:
        passes: with final weights.
        unit: what the weights of the correction were divided by.
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        combination: Combination,
        unit: Unit,
        group: dist.ProcessGroup | None,
    ):
        terms = [term for part in passes for term in part.terms]
        self._combination, self._unit, self._group = combination, unit, group
        self._rows: dict[_Kind, int] = {}
        for term in terms:
            kind = _Kind.of(term)
            self._rows[kind] = self._rows.get(kind, 0) + len(term.rows)
        self._sums: dict[_Kind, Tensor] = {}

    def add(self, part: Pass, losses: list[Tensor]) -> None:
        """Adds the losses of one call.

        Args:
            losses: `[B]` for each term of `part`, the weighted squared errors of its rows, without its scale
                and unit.
        """
        for term, loss in zip(part.terms, losses, strict=True):
            total = loss.sum()
            if term.spread is not None:
                total = total + (term.weight * term.spread).sum()
            kind = _Kind.of(term)
            if kind in self._sums:
                total = self._sums[kind] + total
            self._sums[kind] = total

    def result(self, combined: Combined) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the mean of each role.

        The loss is the sum of the scaled means; with two gradients `main - factor * correction`, the main one
        with its factor.
        """
        # No call has rows of a role whose weights are all 0: its mean is 0.
        nothing = torch.zeros_like(next(iter(self._sums.values())))
        means = {kind: self._sums.get(kind, nothing) for kind in self._rows}
        in_units = self._in_correction()
        if self._unit.ratio is not None:
            for kind in in_units:
                means[kind] = means[kind] * self._unit.ratio
        if self._group is not None:
            means = everyones(means, self._rows, self._group)
        if combined.applied_factor is None:
            return sum(kind.scale * mean for kind, mean in means.items()), _by_role(means)
        # In units of the correction, which may be too small to divide by.
        main = self._sum_of(means, set(means) - set(in_units))
        correction = self._sum_of(means, in_units)
        loss = _descended(main, correction, combined)
        for kind in in_units:
            means[kind] = means[kind] * self._unit.everyones
        return loss, _by_role(means)

    def _in_correction(self) -> list[_Kind]:
        names = self._combination.gradients
        if len(names) == 1:
            return []
        return [kind for kind in self._rows if kind.gradient == names[0]]

    @staticmethod
    def _sum_of(means: dict[_Kind, Tensor], kinds: Sequence[_Kind] | set[_Kind]) -> Tensor:
        scaled = []
        for kind, mean in means.items():
            if kind in kinds:
                scaled.append(mean if kind.scale == 1 else kind.scale * mean)
        if not scaled:
            return torch.zeros(())
        return sum(scaled[1:], scaled[0])


def _descended(main: Tensor, correction: Tensor, combined: Combined) -> Tensor:
    """The loss of the combined gradient, from those of the two that it is made of."""
    if combined.main_factor is not None:
        main = combined.main_factor * main
    return main - combined.applied_factor * correction


def _by_role(means: dict[_Kind, Tensor]) -> dict[str, Tensor]:
    """What is reported: the sum of the means of a role's terms."""
    found: dict[str, Tensor] = {}
    for kind, mean in means.items():
        if kind.role in found:
            mean = found[kind.role] + mean
        found[kind.role] = mean
    return found


class ObjectiveLosses:
    """The same for a method with an objective of its own: the means are those of the losses alone.

    Args:
        rows: of each role, in all calls of this process.
    """

    def __init__(self, combination: Combination, rows: dict[str, int], group: dist.ProcessGroup | None):
        self._combination, self._rows, self._group = combination, rows, group
        self._sums: dict[str, Tensor] = {}
        self._values: dict[str, Tensor] = {}

    def add(self, losses: dict[str, Tensor], values: dict[str, Tensor]) -> None:
        """
        Args:
            losses: of rows of each role.
            values: what they add to the objective of each gradient.
        """
        means = {role: loss.sum() / self._rows[role] for role, loss in losses.items()}
        for sums, found in ((self._sums, means), (self._values, values)):
            for name, value in found.items():
                if name in sums:
                    value = sums[name] + value
                sums[name] = value

    def result(self, combined: Combined) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the mean of each role."""
        means = self._sums
        # In one order in all processes, whatever rows each of them asked for first.
        values = {name: self._values[name] for name in self._named()}
        if self._group is not None:
            means = everyones(means, self._rows, self._group)
            stacked = torch.stack(list(values.values()))
            reduce_mean([stacked], self._group)
            values = dict(zip(values, stacked.unbind(), strict=True))
        if combined.applied_factor is None:
            return values["total"], means
        correction, main = self._combination.gradients
        return _descended(values[main], values[correction], combined), means

    def _named(self) -> tuple[str, ...]:
        """The gradients, each of which the objective has added to.

        Raises:
            ValueError: there is one that no row counted for.
        """
        names = self._combination.gradients
        missing = [name for name in names if name not in self._values]
        if missing:
            expected = f"expected contributions to {', '.join(names)} ({type(self._combination).__name__})"
            raise ValueError(f"objective: {expected}, got none to {', '.join(missing)}")
        return names


def everyones(
    means: Mapping[Name, Tensor], rows: Mapping[Name, int], group: dist.ProcessGroup
) -> dict[Name, Tensor]:
    """The mean of `means` over the processes.

    It is that over all rows only where each process has as many as the others. NaN where they have not, so
    that the step is skipped.

    Raises:
        ValueError: they have not, and reading it costs nothing: on CPUs.
    """
    # Float64: of one dtype in all processes.
    own = torch.stack(list(means.values())).double()
    counts = torch.stack([torch.full_like(own[0], rows[name]) for name in means])
    told = torch.stack([own, counts, counts.square()])
    reduce_mean([told], group)
    mean, rows_mean, square_mean = told.unbind()
    # The processes have equal counts where those do not spread about their mean: E[n^2] = E[n]^2. These are
    # integers in float64, and exact.
    alike = (square_mean == rows_mean.square()).all()
    if mean.device.type == "cpu" and not alike:
        found = ", ".join(f"{rows[name]} for {name}" for name in means)
        expected = "as many rows in every process"
        raise ValueError(
            f"process_group: expected {expected}, got {found} here and {rows_mean.tolist()} on average"
        )
    return dict(zip(means, torch.where(alike, mean, torch.nan).unbind(), strict=True))
