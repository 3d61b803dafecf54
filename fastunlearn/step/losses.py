"""What a step reports of its losses: the mean of each role over the rows of all processes, and the loss that
the step descends.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from ..methods import Pass
from ..objective.combine import Combined
from .accumulate import reduce_mean


class Losses:
    """Sums of the terms' losses over the passes of a step, on the device: those of this process, until
    `result` makes them everyone's.
    """

    def __init__(self, passes: list[Pass], group: dist.ProcessGroup | None):
        terms = [term for part in passes for term in part.terms]
        self._group = group
        self._scales = {term.role: term.scale for term in terms}
        self._sums: dict[str, Tensor] = {}
        self._rows = [sum(len(term.target) for term in terms if term.role == role) for role in self._scales]
        units = [term.unit for term in terms if term.unit is not None]
        self.unit: Tensor | float = 1.0  # of the forget term, of all processes
        # what turns weights in units of this process into weights in units of all
        self.unit_ratio: Tensor | None = None
        if units:
            unit = units[0].clone()
            if group is not None:
                dist.all_reduce(unit, op=dist.ReduceOp.MAX, group=group)
            self.unit = torch.where(unit > 0, unit, torch.ones_like(unit))
            self.unit_ratio = None if group is None else units[0] / self.unit

    def add(self, part: Pass, losses: list[Tensor]) -> None:
        """`losses`: `[B]` for each term of `part`, the weighted squared errors of its rows, without its scale
        and unit.
        """
        for term, loss in zip(part.terms, losses, strict=True):
            total = loss.sum()
            if term.spread is not None:
                total = total + (term.weight * term.spread).sum()
            self._sums[term.role] = self._sums[term.role] + total if term.role in self._sums else total

    def result(self, combined: Combined) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the mean of each role.

        The loss is the sum of the scaled means; with two gradients `retain - factor * forget`.
        """
        nothing = torch.zeros_like(next(iter(self._sums.values())))
        means = {role: self._sums.get(role, nothing) for role in self._scales}
        if self.unit_ratio is not None:
            means["forget"] = means["forget"] * self.unit_ratio
        if self._group is not None:
            means = self._everyones(means)
        if combined.applied_factor is None:
            loss = sum(self._scales[role] * mean for role, mean in means.items())
        else:
            # in units of the forget term, which may be too small to divide by
            loss = means["retain"] - combined.applied_factor * means["forget"]
            means["forget"] = means["forget"] * self.unit
        return loss, means

    def _everyones(self, means: dict[str, Tensor]) -> dict[str, Tensor]:
        """The mean of `means` over the processes, which is that over all rows only where each process has as
        many as the others.

        NaN where they have not, so that the step is skipped.

        Raises:
            ValueError: they have not, and reading it costs nothing: on CPUs.
        """
        own = torch.stack(list(means.values())).double()  # of one dtype in all processes
        rows = torch.stack([torch.full_like(own[0], count) for count in self._rows])
        told = torch.stack([own, rows, rows.square()])
        reduce_mean([told], self._group)
        mean, rows_mean, square_mean = told.unbind()
        alike = (square_mean == rows_mean.square()).all()  # integers: exact, and no spread about their mean
        if mean.device.type == "cpu" and not alike:
            found = ", ".join(f"{count} for {role}" for role, count in zip(means, self._rows, strict=True))
            expected = "as many rows in every process"
            raise ValueError(
                f"process_group: expected {expected}, got {found} here and {rows_mean.tolist()} on average"
            )
        return dict(zip(means, torch.where(alike, mean, torch.nan).unbind(), strict=True))
