"""What examples/exact_problem.py found: the tables of docs/exact.md, the papers' claims, and the picture."""

from __future__ import annotations

import statistics
from dataclasses import dataclass

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

REGIONS = "on", "off"  # the points to forget


# --- what the papers say ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Claim:
    """That one arm comes nearer than another, or as near.

    Args:
        text: what is claimed.
        source: who says so.
        better, worse: the arms.
        where: the distance that is compared, after the last step: "on", "off", or "sum" of both.
        alike: the claim is that they are equally good: within a tenth of the distance of `worse`.
    """

    text: str
    source: str
    better: str
    worse: str
    where: str = "sum"
    alike: bool = False

    def holds(self, record: dict) -> list[bool]:
        """For each seed."""
        pairs = zip(ends(record, self.better, self.where), ends(record, self.worse, self.where), strict=True)
        if self.alike:
            return [abs(first - second) <= 0.1 * second for first, second in pairs]
        return [first < second for first, second in pairs]


def at_one_rate(*names: str) -> tuple[str, ...]:
    return tuple(f"{name}, untuned" for name in names)


RT, SISS_, TF = "ReTrack", "SISS", "2510.17917"
ONE_RATE = "At one learning rate, as the papers compare"
CLAIMS = [
    Claim("ReTrack forgets more than naive deletion", f"{RT}, tables 1 to 3", "retrack", "vanilla", "on"),
    Claim("ReTrack forgets more than SISS", f"{RT}, tables 1 to 3", "retrack", "siss", "on"),
    Claim("ReTrack keeps the rest better than SISS", f"{RT}, tables 1 to 3", "retrack", "siss", "off"),
    Claim("ReTrack keeps it better than EraseDiff", f"{RT}, tables 1 to 3", "retrack", "erasediff", "off"),
    Claim("ReTrack keeps it better than NegGrad", f"{RT}, tables 1 to 3", "retrack", "neggrad", "off"),
    *(
        Claim(f"{ONE_RATE}: {text}", f"{RT}, tables 1 to 3", *at_one_rate("retrack", other), where)
        for text, other, where in (
            ("ReTrack forgets more than naive deletion", "vanilla", "on"),
            ("ReTrack forgets more than SISS", "siss", "on"),
            ("ReTrack keeps the rest better than SISS", "siss", "off"),
            ("ReTrack keeps it better than EraseDiff", "erasediff", "off"),
            ("ReTrack keeps it better than NegGrad", "neggrad", "off"),
        )
    ),
    Claim("k hardly matters: 1 is as good as 10", f"{RT}, table 4", "retrack, k = 1", "retrack", alike=True),
    Claim(
        "k hardly matters: 100 is as good as 10", f"{RT}, table 4", "retrack, k = 100", "retrack", alike=True
    ),
    Claim(
        "Without the retain term the rest suffers", f"{RT}, table 5", "retrack", "retrack, lambda 1", "off"
    ),
    Claim(
        "lambda that makes both terms similar (`auto`) is as good as a tuned one",
        f"{RT}, section 3.4",
        "retrack, auto",
        "retrack",
        alike=True,
    ),
    Claim(
        "The importance-weighted term helps naive deletion, whose loss it is",
        f"{RT}, section 3.2",
        "retrack, importance",
        "vanilla",
    ),
    Claim(
        "Truncated weights are as good as self-normalised ones",
        f"{RT}, section 3.3",
        "retrack",
        "retrack, self_normalized",
        alike=True,
    ),
    Claim("SISS forgets more than naive deletion", f"{SISS_}, tables 1, 2", "siss", "vanilla", "on"),
    Claim("SISS keeps the rest better than NegGrad", f"{SISS_}, tables 1, 2", "siss", "neggrad", "off"),
    Claim("SISS keeps it better than EraseDiff", f"{SISS_}, tables 1, 2", "siss", "erasediff", "off"),
    *(
        Claim(f"{ONE_RATE}: {text}", f"{SISS_}, tables 1, 2", *at_one_rate("siss", other), where)
        for text, other, where in (
            ("SISS forgets more than naive deletion", "vanilla", "on"),
            ("SISS keeps the rest better than NegGrad", "neggrad", "off"),
            ("SISS keeps it better than EraseDiff", "erasediff", "off"),
        )
    ),
    Claim("lambda 0.5 forgets more than 0", f"{SISS_}, tables 1, 2", "siss", "siss, lambda 0", "on"),
    Claim("lambda 0.5 keeps the rest better than 1", f"{SISS_}, table 1", "siss", "siss, lambda 1", "off"),
    Claim("One weighted call is as good as two", f"{SISS_}, tables 1, 2", "siss", "siss, no_is", alike=True),
    Claim("The mixture is better with its weights", f"{SISS_}, section 4", "siss", "siss, bernoulli"),
    Claim(
        "A superfactor forgets more than naive deletion",
        f"{SISS_}, Eq. 8",
        "siss, superfactor",
        "vanilla",
        "on",
    ),
    Claim("SISS is better in the middle window", f"{TF}, table 2", "siss, middle", "siss"),
    Claim("NegGrad is better in the middle window", f"{TF}, table 2", "neggrad, middle", "neggrad"),
    Claim("DPO is better in the middle window", f"{TF}, table 2", "dpo, middle", "dpo"),
    Claim("KTO is better in the middle window", f"{TF}, table 2", "kto, middle", "kto"),
    Claim(
        "The middle window is better than the early one", f"{TF}, section 3", "siss, middle", "siss, early"
    ),
    Claim("The middle window is better than the late one", f"{TF}, section 3", "siss, middle", "siss, late"),
    Claim("DPO keeps the rest better than SISS", f"{TF}, table 2", "dpo", "siss", "off"),
    Claim("KTO keeps the rest as well as SISS", f"{TF}, table 2", "kto", "siss", "off", alike=True),
    Claim("NPO without retain term is better than NegGrad", "NPO", "npo, forget_only", "neggrad"),
    Claim("VDU's anchor makes NegGrad better", "VDU", "neggrad, vdu", "neggrad"),
    *(
        Claim(f"So does `{anchor}`, of one checkpoint", "ours", f"neggrad, {anchor}", "neggrad")
        for anchor in ("vdu_laplace", "vdu_swag", "vdu_l2")
    ),
    Claim("SalUn's mask makes NegGrad better", "SalUn", "neggrad, mask", "neggrad"),
    Claim("SalUn's mask makes SISS better", "SalUn", "siss, mask", "siss"),
    Claim("SalUn's mask makes EraseDiff better", "SalUn", "erasediff, mask", "erasediff"),
]


# --- the tables ---------------------------------------------------------------------------------------------


def ends(record: dict, title: str, where: str, at: int = -1, group: str = "arms") -> list[float]:
    """The distances of an arm, seed by seed, at one of the steps that were measured."""
    found = record[group][title]
    runs = found["runs"] if group == "arms" else found
    return [run["on"][at] + run["off"][at] if where == "sum" else run[where][at] for run in runs.values()]


def of_network(record: dict, name: str, where: str) -> list[float]:
    """The distances of `start` or `retrained`, seed by seed."""
    return [networks[name][where] for networks in record["networks"].values()]


def shown(values: list[float]) -> str:
    """The mean, and the range over the seeds."""
    return f"{statistics.mean(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def arms_table(record: dict) -> str:
    """Every arm, the nearest first."""
    steps, early = record["settings"]["steps"], 1
    after = record["settings"]["measured_every"]
    heads = [
        "",
        "best of its tries",
        f"on, {after} steps",
        f"off, {after}",
        f"on, {steps} steps",
        f"off, {steps}",
    ]
    rows = []
    for name in ("start", "retrained"):
        measured = [shown(of_network(record, name, where)) for where in REGIONS]
        rows.append([f"**{name}**", "", "", "", *measured])
    for title in sorted(record["arms"], key=lambda title: statistics.mean(ends(record, title, "sum"))):
        first = [f"{statistics.mean(ends(record, title, where, early)):.3f}" for where in REGIONS]
        last = [shown(ends(record, title, where)) for where in REGIONS]
        rows.append([title, record["arms"][title]["best"], *first, *last])
    return markdown(heads, rows)


def long_table(record: dict) -> str:
    """How near more steps lead: of the way from the start to the network that was trained anew."""
    steps = record["settings"]["long_steps"]
    rows = []
    for title in record["long"]:
        cells = [title]
        for where in REGIONS:
            last = ends(record, title, where, group="long")
            start, retrained = (of_network(record, name, where) for name in ("start", "retrained"))
            ways = [(a - b) / (a - c) for a, b, c in zip(start, last, retrained, strict=True)]
            cells += [shown(last), f"{min(ways):.0%} to {max(ways):.0%}"]
        rows.append(cells)
    return markdown(["", f"on, {steps} steps", "of the way", f"off, {steps} steps", "of the way"], rows)


def claims_table(record: dict) -> str:
    rows = []
    for claim in CLAIMS:
        held = claim.holds(record)
        verdict = {len(held): "**yes**", 0: "**no**"}.get(sum(held), "some")
        numbers = [
            f"{title}: {statistics.mean(ends(record, title, claim.where)):.3f}"
            for title in (claim.better, claim.worse)
        ]
        rows.append(
            [
                claim.text,
                claim.source,
                f"{verdict}, {sum(held)} of {len(held)}",
                claim.where,
                "; ".join(numbers),
            ]
        )
    return markdown(["claim", "source", "holds", "distance", "means over the seeds"], rows)


def markdown(heads: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def differences_table(record: dict) -> str:
    found = record["differences"]
    rows = [[where, *(f"{distances[where]:.3f}" for distances in found.values())] for where in REGIONS]
    return markdown(["", *found], rows)


def tables(record: dict) -> list[str]:
    return [differences_table(record), arms_table(record), long_table(record), claims_table(record)]


# --- the picture --------------------------------------------------------------------------------------------

# Okabe and Ito's colours, which nearly everyone can tell apart; lines differ in their markers, too.
DRAWN = {
    "retrack, self_normalized": ("#009e73", "o"),
    "retrack, importance": ("#0072b2", "s"),
    "vanilla": ("#000000", "v"),
    "retrack": ("#56b4e9", "D"),
    "siss": ("#e69f00", "^"),
    "npo": ("#cc79a7", "P"),
    "erasediff": ("#d55e00", "X"),
}
TEXT = "#20242a"


def picture(record: dict, forget: Tensor, retain: Tensor) -> Figure:
    """The points `[N, 2]`, and both distances against the steps."""
    # Not by pyplot, which would keep the figure and look for a screen.
    figure = Figure(figsize=(13, 4.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    plane, on, off = figure.subplots(1, 3)
    plane.plot(*retain.T, ".", color="#0072b2", label="to keep")
    plane.plot(*forget.T, "x", color="#d55e00", label="to forget")
    plane.set_title("the points", fontsize=10, loc="left", color=TEXT)
    plane.set(xlim=(-1, 1), ylim=(-1, 1), aspect="equal")
    plane.legend(fontsize=8, frameon=False, loc="lower left")
    _draw_curves(on, record, "on", "distance on the points to forget")
    _draw_curves(off, record, "off", "distance on the points to keep")
    off.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw_curves(panel, record: dict, where: str, title: str) -> None:
    """Mean and range over the seeds of some arms, in matplotlib's axes `panel`."""
    settings = record["settings"]
    last, every = settings["steps"], settings["measured_every"]
    steps = [*range(0, last, every), last]
    for name, (colour, marker) in DRAWN.items():
        curves = [ends(record, name, where, at) for at in range(len(steps))]
        means = [statistics.mean(values) for values in curves]
        panel.plot(steps, means, color=colour, marker=marker, markersize=5, label=name)
        lowest, highest = [min(values) for values in curves], [max(values) for values in curves]
        panel.fill_between(steps, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    retrained = statistics.mean(of_network(record, "retrained", where))
    panel.axhline(retrained, color=TEXT, linestyle=":", label="trained on the rest alone")
    panel.set_title(title, fontsize=10, loc="left", color=TEXT)
    panel.set_xlabel("steps of unlearning", fontsize=9, color=TEXT)
    panel.set_ylim(bottom=0)
