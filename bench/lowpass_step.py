"""The share of a band of frequencies in whole steps on a CPU: a step with `lowpass=` and the same without, in
turns in one process, on the same rows and weights.

    python -m bench.lowpass_step [--json bench/results/lowpass_step_cpu.json]

One thread, and of it the CPU time: other programs on the machine count as little as possible. Still the
share is smaller than what two equal steps differ by. So the difference of the two ops, each measured alone at
the shape of the step, stands beside it, over the time of the step.
"""

from __future__ import annotations

import argparse
import json
import statistics
from functools import partial
from itertools import count
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from fastunlearn import LowPass
from fastunlearn.host.memory import keep_freed_memory

from .harness import Call, Yardstick, take_turns
from .lowpass_cost import RESIDUAL, Clock, contestants, machine, quantile, rounded
from .steps import ours
from .steps.job import Job
from .steps.networks import NETWORKS

RADIUS = 0.25  # of Nyquist
STEPS = 100_000  # of the schedule, more than are taken
WITHOUT, AGAIN = "without", "without, again"
FIXED, GROWING = "lowpass", "lowpass with a schedule"
CASES = [("small", "retrack"), ("small", "siss"), ("mnist", "retrack"), ("mnist", "siss")]


def steps(job: Job) -> dict[str, Call]:
    """The steps that take turns: one network, one optimizer."""
    model = job.network.build()
    optimizer = job.network.optimizer(model.parameters(), job.lr, fused=True)
    step = partial(ours.functional, job, model, optimizer, 1.0, job.images)
    growing = LowPass(schedule="linear_increase", start=0.1, stop=RADIUS)
    numbers = count()

    def scheduled() -> None:
        step(lowpass=growing, step=next(numbers), total_steps=STEPS)()

    return {
        WITHOUT: step(),
        FIXED: step(lowpass=LowPass(RADIUS)),
        GROWING: scheduled,
        AGAIN: step(),
    }


def of_the_op(job: Job) -> float:
    """Seconds that `lowpass_residual` takes beyond `residual` on the rows of the forget term."""
    calls = contestants((job.batch, *job.network.shape), alone=False)
    pair = {name: calls[name] for name in (RESIDUAL, str(RADIUS))}
    clock = Clock(Yardstick(None, warm=False), threads=1)
    clock(pair)
    samples = take_turns(pair, clock, seconds=5.0, least=20)
    pairs = zip(samples[str(RADIUS)], samples[RESIDUAL], strict=True)
    return statistics.median(one - two for one, two in pairs)


def measure(network: str, method: str, seconds: float) -> dict:
    """One row: a method on a network."""
    job = Job(NETWORKS[network], method, torch.device("cpu"))
    calls, clock = steps(job), Clock(Yardstick(None, 4 << 20, warm=True), threads=1)
    clock(calls)
    samples = take_turns(calls, clock, seconds, least=10)
    shares = {}
    for name in (FIXED, GROWING, AGAIN):
        pairs = zip(samples[name], samples[WITHOUT], strict=True)
        shares[name] = [one / two - 1 for one, two in pairs]
    step, op = statistics.median(samples[WITHOUT]), of_the_op(job)
    return {
        "network": network,
        "method": method,
        "batch": job.batch,
        "image": list(job.network.shape),
        "rounds": len(samples[WITHOUT]),
        "seconds": step,
        "share": {name: statistics.median(values) for name, values in shares.items()},
        "share_quartiles": {
            name: [quantile(values, 0.25), quantile(values, 0.75)] for name, values in shares.items()
        },
        "seconds_of_the_op": op,
        "share_of_the_op": op / step,
    }


def shown(rows: list[dict]) -> Table:
    """One line for each method and network."""
    view = Table(title=f"a step with LowPass({RADIUS}) over one without: median (quartiles)", box=SIMPLE)
    for column in ("", "ms without", FIXED, GROWING, AGAIN, "the op alone"):
        view.add_column(column, justify="right")
    for row in rows:
        cells = [
            "{:+.2%} ({:+.2%}, {:+.2%})".format(row["share"][name], *row["share_quartiles"][name])
            for name in (FIXED, GROWING, AGAIN)
        ]
        name = f"{row['network']} {row['method']} B{row['batch']}"
        view.add_row(name, f"{row['seconds'] * 1e3:.1f}", *cells, f"{row['share_of_the_op']:+.3%}")
    return view


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the turns of one method on one network"
    )
    parser.add_argument("--json", type=Path, help="written there")
    args = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    where, rows = machine([1]), []
    for network, method in CASES:
        rows.append(measure(network, method, args.seconds))
        Console(width=160).print(shown(rows))
        if args.json:
            whole = where | {"radius": RADIUS, "rows": rounded(rows)}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
