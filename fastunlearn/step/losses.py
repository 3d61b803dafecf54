"""What a step reports of its losses: the mean of each role, and the loss that the step descends.

Means are those over the rows of all processes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..objective.combine import Combination, Combined
from ..objective.protocol import Pass
from .accumulate import reduce_mean
from .arrange import Unit


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
        self._scales = {term.role: term.scale for term in terms}
        self._gradients = {term.role: term.gradient for term in terms}
        self._rows = dict.fromkeys(self._scales, 0)
        for term in terms:
            self._rows[term.role] += len(term.rows)
        self._sums: dict[str, Tensor] = {}

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
            if term.role in self._sums:
                total = self._sums[term.role] + total
            self._sums[term.role] = total

    def result(self, combined: Combined) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the mean of each role.

        The loss is the sum of the scaled means; with two gradients `main - factor * correction`.
        """
        # No call has rows of a role whose weights are all 0: its mean is 0.
        nothing = torch.zeros_like(next(iter(self._sums.values())))
        means = {role: self._sums.get(role, nothing) for role in self._scales}

        # The weights of the correction are in the unit of this process: `ratio` leads to that of all.
        in_units = self._roles_of_correction()
        if self._unit.ratio is not None:
            for role in in_units:
                means[role] = means[role] * self._unit.ratio
        if self._group is not None:
            means = everyones(means, self._rows, self._group)
        if combined.applied_factor is None:
            return sum(self._scales[role] * mean for role, mean in means.items()), means
        # The correction stays in its unit, which may be too small to divide by; so does the factor here.
        main = self._sum_of(means, set(means) - set(in_units))
        correction = self._sum_of(means, in_units)
        loss = main - combined.applied_factor * correction
        for role in in_units:
            means[role] = means[role] * self._unit.everyones
        return loss, means

    def _roles_of_correction(self) -> list[str]:
        names = self._combination.gradients
        if len(names) == 1:
            return []
        return [role for role, gradient in self._gradients.items() if gradient == names[0]]

    def _sum_of(self, means: dict[str, Tensor], roles: Sequence[str] | set[str]) -> Tensor:
        """The sum of the scaled means of `roles`; 0 where there are none."""
        scaled = []
        for role in means:
            if role in roles and self._scales[role] == 1:
                scaled.append(means[role])
            elif role in roles:
                scaled.append(self._scales[role] * means[role])
        if not scaled:
            return torch.zeros(())
        return sum(scaled[1:], scaled[0])


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
        means, values = self._sums, self._values
        if self._group is not None:
            means = everyones(means, self._rows, self._group)
            stacked = torch.stack(list(values.values()))
            reduce_mean([stacked], self._group)
            values = dict(zip(values, stacked.unbind(), strict=True))
        if combined.applied_factor is None:
            return values["total"], means
        correction, main = self._combination.gradients
        return values[main] - combined.applied_factor * values[correction], means


def everyones(means: dict[str, Tensor], rows: dict[str, int], group: dist.ProcessGroup) -> dict[str, Tensor]:
    """The mean of `means` over the processes.

    It is that over all rows only where each process has as many as the others. NaN where they have not, so
    that the step is skipped.

    Raises:
        ValueError: they have not, and reading it costs nothing: on CPUs.
    """
    # Float64: of one dtype in all processes.
    own = torch.stack(list(means.values())).double()
    counts = torch.stack([torch.full_like(own[0], rows[role]) for role in means])
    told = torch.stack([own, counts, counts.square()])
    reduce_mean([told], group)
    mean, rows_mean, square_mean = told.unbind()
    # The processes have equal counts where those do not spread about their mean: E[n^2] = E[n]^2. These are
    # integers in float64, and exact.
    alike = (square_mean == rows_mean.square()).all()
    if mean.device.type == "cpu" and not alike:
        found = ", ".join(f"{rows[role]} for {role}" for role in means)
        expected = "as many rows in every process"
        raise ValueError(
            f"process_group: expected {expected}, got {found} here and {rows_mean.tolist()} on average"
        )
    return dict(zip(means, torch.where(alike, mean, torch.nan).unbind(), strict=True))
