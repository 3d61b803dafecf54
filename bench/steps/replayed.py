"""A step of plain torch as one graph: what replay is for this package's own step, for the baselines."""

from __future__ import annotations

from collections.abc import Callable

from fastunlearn.engine.replay import WARM_UP_STEPS, Graphs

from .job import Draw
from .networks import Step


class Replayed:
    """Takes `step` eagerly a few times, records it, and from then on launches the record.

    Args:
        step: nothing in it may depend on the host but the draw, which is part of the record where it is
            given.
        graphs: who records.
    """

    def __init__(self, step: Step, graphs: Graphs):
        self._step, self._graphs = step, graphs
        self._run: Callable[[], None] | None = None
        self._draw: Draw | None = None

    def __call__(self, draw: Draw | None = None) -> None:
        if self._run is None or draw is not self._draw:
            self._record(draw)
        self._run()

    def _record(self, draw: Draw | None) -> None:
        for _ in range(WARM_UP_STEPS):
            self._graphs.warm_up(lambda: self._step(draw))
        self._run, self._draw = self._graphs.capture(lambda: self._step(draw)), draw
