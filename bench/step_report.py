"""The tables of whole steps at the end of a run, and their JSON."""

from __future__ import annotations

import io
import shutil
from collections.abc import Iterable
from typing import NamedTuple

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .step_comparison import StepRow
from .steps.contestants import (
    EAGER,
    LIMIT,
    OFFICIAL_RETRACK,
    OFFICIAL_SISS,
    OURS,
    RETRACK_REPO,
    SISS_REPO,
    STRONGEST,
    UNLEARNER,
    mode_of,
    papers_baseline,
)
from .steps.methods import timed
from .steps.networks import SMOKE
from .steps.stages import STAGES

_STYLE = {"box": SIMPLE, "padding": (0, 1, 0, 0)}
_FAITHFUL = 0.05  # a rendering counts as the official repository if its time is this near
_ROOM = 1.3  # the kernels' goal over the strongest plain torch, where the limit leaves that much


class Goal(NamedTuple):
    """What a step is to reach: at least `least` times faster than `other`."""

    device: str
    networks: tuple[str, ...]  # (): all
    methods: tuple[str, ...]  # (): all
    other: str  # "papers": contestant (1) of the method
    least: float


GOALS = (
    Goal("cpu", (), (), LIMIT, 1 / 1.03),
    Goal("cpu", (), ("siss",), RETRACK_REPO, 2.2),
    Goal("cpu", (), ("retrack", "erasediff"), "papers", 1.2),
    Goal("cpu", (), (), STRONGEST, 1.0),
    Goal("cuda", (), (), LIMIT, 1 / 1.05),
    Goal("cuda", ("mnist", "cifar"), (), "papers", 5.0),
    Goal("cuda", ("celeba",), (), "papers", 4.0),
    Goal("cuda", ("sd",), (), "papers", 6.0),
    Goal("cuda", (), ("siss",), RETRACK_REPO, 8.0),
    Goal("cuda", (), ("siss",), SISS_REPO, 5.0),
    Goal("cuda", (), (), STRONGEST, 1.0),
)
MEMORY_GOAL = 0.6  # of contestant (1)'s peak, weights included, for methods with two gradients, on a CPU


def render(rows: list[StepRow], device: str) -> str:
    """All tables as text, for a terminal or a log."""
    console = Console(
        file=io.StringIO(), width=max(250, shutil.get_terminal_size().columns), force_terminal=False
    )
    for precision in dict.fromkeys(_precisions(rows)):
        console.print(
            _times(
                [row for row, of in zip(rows, _precisions(rows), strict=True) if of == precision], precision
            )
        )
    for reason in dict.fromkeys(said for row in rows for said in (row.note, row.reason) if said):
        console.print(reason, soft_wrap=True, markup=False, highlight=False)
    for table in (_stages(rows), _fidelity(rows), _goals(rows, device)):
        if table.row_count:
            console.print(table)
    return console.file.getvalue()


def comparisons(rows: Iterable[StepRow]) -> list[dict[str, StepRow]]:
    """The rows of each comparison by contestant, of those that ran.

    The precision of a comparison is that of the limit.
    """
    found, last = [], None
    for row in rows:
        if row.contestant == LIMIT:
            last = {}
            found.append(last)
        if row.seconds is not None:
            last[row.contestant] = row
    return found


def _precisions(rows: list[StepRow]) -> list[str]:
    """Of the comparison that each row belongs to: that of its limit.

    The papers' way is float32 in all of them.
    """
    found: list[str] = []
    for row in rows:
        found.append(row.precision if row.contestant == LIMIT else found[-1])
    return found


def _times(rows: list[StepRow], precision: str) -> Table:
    title = (
        f"whole steps, {precision}: medians of alternating rounds; img/s: rows that the network learns from; "
        "x: times faster than, limit and strongest in the same mode; MB: peak without / with weights"
    )
    table = Table(title=title, **_STYLE)
    for name in ("network, method", "contestant", "precision", "layout"):
        table.add_column(name, no_wrap=True)
    headings = (
        "ms",
        "best",
        "worst",
        "n",
        "img/s",
        "x limit",
        "x papers",
        "x eager",
        "x strong.",
        "gate",
        "MB",
        "host ms",
        "launches",
        "first call s",
    )
    for name in headings:
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.contestant == LIMIT and table.row_count:
            table.add_section()
        label = f"{row.network} {row.method}, batch {row.batch}" if row.contestant == LIMIT else ""
        if row.seconds is None:
            table.add_row(label, row.contestant, row.precision, row.layout, "not timed")
            continue
        mode = mode_of(row.contestant)
        others = (mode.of(LIMIT), papers_baseline(row.method), EAGER, mode.of(STRONGEST))
        cells = [f"{seconds * 1e3:.4g}" for seconds in (row.seconds, row.best, row.worst)] + [
            str(row.samples),
            f"{row.images_per_second:.4g}",
        ]
        cells += [f"{row.times_faster[other]:.2f}" if other in row.times_faster else "" for other in others]
        cells += [f"{row.update_error:.0e}" if row.update_error is not None else ""]
        cells += [
            f"{row.step_memory / 1e6:.0f} / {(row.step_memory + row.weights) / 1e6:.0f}"
            if row.step_memory is not None
            else ""
        ]
        cells += [f"{row.host_seconds * 1e3:.3g}" if row.host_seconds is not None else ""]
        cells += [str(row.launches) if row.launches is not None else ""]
        cells += [f"{row.first_call_seconds:.1f}" if row.first_call_seconds is not None else ""]
        table.add_row(label, row.contestant, row.precision, row.layout, *cells)
    return table


def _stages(rows: list[StepRow]) -> Table:
    title = (
        f"share of the time of {OURS}'s step in each stage (eager profile; backward passes count to the "
        "stage that starts them)"
    )
    table = Table(title=title, **_STYLE)
    for name in ("network, method", "precision"):
        table.add_column(name, no_wrap=True)
    for name in (*STAGES, "between"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.stages:
            table.add_row(
                f"{row.network} {row.method}",
                row.precision,
                *(f"{row.stages[name]:.1%}" for name in (*STAGES, "between")),
            )
    return table


def _fidelity(rows: list[StepRow]) -> Table:
    """How long the renderings of the papers' way take beside the real repositories."""
    table = Table(
        "network, method",
        "repository",
        "rendering / official",
        "",
        title="the papers' way against the official code",
        **_STYLE,
    )
    for found in comparisons(rows):
        for rendering, official in ((RETRACK_REPO, OFFICIAL_RETRACK), (SISS_REPO, OFFICIAL_SISS)):
            if rendering in found and official in found:
                ratio = found[rendering].seconds / found[official].seconds
                verdict = (
                    "a ratio may be quoted"
                    if abs(ratio - 1) <= _FAITHFUL
                    else f"off by more than {_FAITHFUL:.0%}: quote no ratio"
                )
                table.add_row(
                    f"{found[official].network} {found[official].method}", rendering, f"{ratio:.3f}", verdict
                )
    return table


def _goals(rows: list[StepRow], device: str) -> Table:
    table = Table("network, method", "precision", "what", "goal", "measured", "", title="goals", **_STYLE)
    for found in comparisons(rows):
        ours = [
            row for name, row in found.items() if name.startswith((OURS, UNLEARNER)) and row.network != SMOKE
        ]
        if not ours:
            continue
        best = min(ours, key=lambda row: row.seconds)
        strongest = min(
            (name for name in found if name.startswith(STRONGEST)),
            key=lambda name: found[name].seconds,
            default=None,
        )
        limit = min(
            (name for name in found if name.startswith(LIMIT)),
            key=lambda name: found[name].seconds,
            default=None,
        )
        label = (f"{best.network} {best.method}", best.precision)
        for goal in GOALS:
            if (
                goal.device != device
                or (goal.networks and best.network not in goal.networks)
                or (goal.methods and best.method not in goal.methods)
            ):
                continue
            other = {"papers": papers_baseline(best.method), STRONGEST: strongest, LIMIT: limit}.get(
                goal.other, goal.other
            )
            if other not in found:
                continue
            ratio = found[other].seconds / best.seconds
            if goal.other == LIMIT:
                table.add_row(
                    *label,
                    f"{best.contestant} / {other}",
                    f"<= {1 / goal.least:.2f}",
                    f"{1 / ratio:.3f}",
                    _met(ratio >= goal.least),
                )
            else:
                table.add_row(
                    *label,
                    f"{best.contestant}: times faster than {other}",
                    f">= {goal.least:g}",
                    f"{ratio:.2f}",
                    _met(ratio >= goal.least),
                )
        if (
            device == "cuda"
            and strongest
            and limit
            and found[strongest].seconds / found[limit].seconds >= _ROOM
        ):
            ratio = found[strongest].seconds / best.seconds
            table.add_row(
                *label,
                f"{best.contestant}: times faster than {strongest}, with room",
                f">= {_ROOM:g}",
                f"{ratio:.2f}",
                _met(ratio >= _ROOM),
            )
        _memory_goal(table, label, found, device)
    return table


def _memory_goal(table: Table, label: tuple[str, str], found: dict[str, StepRow], device: str) -> None:
    ours, papers = found.get(OURS), found.get(papers_baseline(label[0].partition(" ")[2]))
    if (
        device != "cpu"
        or not ours
        or not papers
        or not timed()[ours.method].two_gradients
        or None in (ours.step_memory, papers.step_memory)
    ):
        return
    ratio = (ours.step_memory + ours.weights) / (papers.step_memory + papers.weights)
    without = ours.step_memory / papers.step_memory
    what = f"{OURS}: peak memory of {papers.contestant}'s ({without:.2f} without weights)"
    table.add_row(*label, what, f"<= {MEMORY_GOAL:g}", f"{ratio:.2f}", _met(ratio <= MEMORY_GOAL))


def _met(met: bool) -> str:
    return "met" if met else "missed"
