"""Every method's step over its own limit, beside vanilla's over its own, in turns in one process.

    python -m bench.step_limits [--method dpo] [--json bench/results/step_limits_cpu.json]
    python -m bench.step_limits --table bench/results/step_limits_cpu.json     # of docs/benchmarks.md

The limit (`steps/limit.py`) is what the method's step cannot do without: its network passes (in one call or
two, as is faster), those of a reference and of inner steps included, the optimizer, what else it has to read
and compute. So each ratio says what the package adds. In a round every step has one turn: the limit and the
step of vanilla, those of the method, and its baselines of plain torch. Ratios are those within a round; what
counts is their median.

One thread, and of it the CPU time: other programs on the machine count as little as possible. Freed memory is
kept, so that no step pays for pages.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from itertools import count
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fastunlearn.host.memory import keep_freed_memory

from .harness import Call, take_turns
from .lowpass_cost import machine, quantile, rounded
from .steps.contestants import (
    LIMIT,
    OURS,
    PREFERENCES,
    STRONGEST,
    UNLEARNER,
    Gate,
    Setting,
    names,
    papers_baseline,
)
from .steps.job import Job
from .steps.limit import calls_of
from .steps.methods import timed
from .steps.networks import NETWORKS

VANILLA, VANILLA_LIMIT = "vanilla", "vanilla's limit"
JOINED_LIMIT = "limit, joined"  # both sets go through the network in one call
LEAST_ROUNDS = 7
GATE_ROWS = 4


def measure(network: str, method: str, seconds: float, batch: int | None) -> dict:
    """One line of the table, after the gate."""
    device, layout = torch.device("cpu"), torch.contiguous_format
    vanilla, own = (
        Setting(Job(NETWORKS[network], name, device, batch=batch), layout, joined=False)
        for name in ("vanilla", method)
    )
    step = ours(own)
    calls = {VANILLA_LIMIT: vanilla.build(LIMIT), VANILLA: vanilla.build(step)}
    limits = {LIMIT: own}
    if any(call.rows > own.job.batch for call in own.job.calls):
        limits[JOINED_LIMIT] = replace(own, joined=True)
    calls |= {name: setting.build(LIMIT) for name, setting in limits.items()}
    calls[step] = own.build(step)
    gate = Gate(own, GATE_ROWS)
    for name in (papers_baseline(method), STRONGEST):
        if name in names(own.job, compiled=False, replayed=False, official={}):
            calls[name] = own.build(name)
    for name in calls.keys() - {VANILLA_LIMIT, VANILLA, *limits}:
        found = gate.check(name)
        if not found.error <= found.allowed:
            raise AssertionError(f"{method}, {name}: its update is off by {found.error:.2g}")
    samples = _turns(calls, seconds)
    limit = min(limits, key=lambda name: statistics.median(samples[name]))
    return {
        "network": network,
        "method": method,
        "batch": own.job.batch,
        "calls": [list(call) for call in calls_of(own.job, limits[limit].joined)],
        "rounds": len(samples[limit]),
        "seconds": statistics.median(samples[step]),
        "limit": _ratio(samples[step], samples[limit]),
        "vanilla": _ratio(samples[VANILLA], samples[VANILLA_LIMIT]),
        "times_faster": {
            name: _ratio(samples[name], samples[step])
            for name in calls
            if name not in (VANILLA_LIMIT, VANILLA, *limits, step)
        },
    }


def ours(setting: Setting) -> str:
    """The functional step, but for methods that an `Unlearner` alone can run."""
    return UNLEARNER if "stores" in setting.job.instance.needs else OURS


def _turns(calls: dict[str, Call], seconds: float) -> dict[str, list[float]]:
    """The CPU seconds of each call, in rounds; all calls of a round begin with the same seed."""
    seeds = count()

    def clock(turns: dict[str, Call]) -> dict[str, float]:
        taken, seed = {}, next(seeds)
        for name, call in turns.items():
            torch.manual_seed(seed)
            began = time.thread_time()
            call()
            taken[name] = time.thread_time() - began
        return taken

    for call in calls.values():
        call()  # the optimizer's state
    return take_turns(calls, clock, seconds, LEAST_ROUNDS)


def _ratio(step: list[float], other: list[float]) -> dict[str, float]:
    ratios = [one / two for one, two in zip(step, other, strict=True)]
    low, high = quantile(ratios, 0.25), quantile(ratios, 0.75)
    return {"median": statistics.median(ratios), "low": low, "high": high}


def shown(rows: list[dict]) -> Table:
    view = Table(title="a step over its limit: median (quartiles)", box=SIMPLE)
    for column in ("", "ms", "rounds", "over its limit", "vanilla over its own", "times faster than"):
        view.add_column(column, justify="right")
    for row in rows:
        cells = ["{median:.3f} ({low:.3f}, {high:.3f})".format(**row[name]) for name in ("limit", "vanilla")]
        faster = ", ".join(f"{name} {ratio['median']:.2f}" for name, ratio in row["times_faster"].items())
        view.add_row(row["method"], f"{row['seconds'] * 1e3:.0f}", str(row["rounds"]), *cells, faster)
    return view


def table(rows: list[dict]) -> str:
    """In Markdown, methods in the order of lists."""
    lines = [
        "| step | rows of a set | ms | over its limit | vanilla over its own | papers' formula | strongest |",
        "|---|---|---|---|---|---|---|",
    ]
    order = list(timed())
    for row in sorted(rows, key=lambda row: (order.index(row["method"]), row["batch"])):
        ratios = [
            "{median:.2f} ({low:.2f} to {high:.2f})".format(**row[name]) for name in ("limit", "vanilla")
        ]
        faster = [row["times_faster"].get(name) for name in (PREFERENCES, STRONGEST)]
        cells = [
            row["method"],
            str(row["batch"]),
            f"{row['seconds'] * 1e3:.0f}",
            *ratios,
            *("" if one is None else f"{one['median']:.2f}x" for one in faster),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60.0, help="of the turns of one method")
    parser.add_argument("--network", choices=NETWORKS, default="small")
    parser.add_argument("--batch", type=int, help="rows of each set (default: the network's)")
    parser.add_argument("--method", choices=timed(), action="append", help="default: all")
    parser.add_argument("--json", type=Path, help="written there; other rows that the file has stay")
    parser.add_argument("--table", type=Path, help="prints the table of such a file, and times nothing")
    args = parser.parse_args()
    if args.table:
        print(table(json.loads(args.table.read_text())["rows"]))
        return
    keep_freed_memory()
    torch.set_num_threads(1)
    where, rows = machine([1]), []
    if args.json and args.json.exists():
        rows = json.loads(args.json.read_text())["rows"]
    for method in args.method or timed():
        found = measure(args.network, method, args.seconds, args.batch)
        rows = [row for row in rows if not _same_case(row, found)] + [found]
        Console(width=160).print(shown([found]))
        if args.json:
            args.json.write_text(json.dumps(where | {"rows": rounded(rows)}, indent=1) + "\n")


def _same_case(row: dict, other: dict) -> bool:
    return all(row[name] == other[name] for name in ("network", "method", "batch"))


if __name__ == "__main__":
    main()
