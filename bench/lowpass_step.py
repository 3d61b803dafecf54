"""The share of a band of frequencies in whole steps: a step with `lowpass=` and the same without, in turns in
one process, on the same rows and weights.

    python -m bench.lowpass_step [--json bench/results/lowpass_step_cpu.json]
    python -m bench.lowpass_step --gpu     # replayed steps of an Unlearner in bfloat16, with a window, too

On a CPU: one thread, and of it the CPU time: other programs on the machine count as little as possible. Still
the share is smaller than what two equal steps differ by. So the difference of the two ops, each measured
alone at the shape of the step, stands beside it, over the time of the step.
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

from fastunlearn import LowPass, Stratified, TimeWindow
from fastunlearn.engine.replay import WARM_UP_STEPS
from fastunlearn.host.memory import keep_freed_memory
from fastunlearn.testing.accelerator import DRY, Accelerator, find_accelerator, rehearsal

from .harness import Call, Yardstick, alternate, take_turns
from .lowpass_cost import RESIDUAL, clock_of, contestants, machine, quantile, rounded
from .steps import ours
from .steps.job import Job
from .steps.networks import NETWORKS

RADIUS = 0.25  # of Nyquist
STEPS = 100_000  # of the schedule, more than are taken
WITHOUT, AGAIN = "without", "without, again"
FIXED, GROWING = "lowpass", "lowpass with a schedule"
WINDOW = "window, in strata"
SELECTIONS = {
    WITHOUT: {},
    FIXED: {"lowpass": LowPass(RADIUS)},
    GROWING: {"lowpass": LowPass(schedule="linear_increase", start=0.1, stop=RADIUS)},
    WINDOW: {"time_window": Stratified(TimeWindow(250, 750))},
    AGAIN: {},
}
CASES = [("small", "retrack"), ("small", "siss"), ("mnist", "retrack"), ("mnist", "siss")]


def steps(job: Job) -> dict[str, Call]:
    """The steps that take turns: one network, one optimizer."""
    model = job.network.build()
    optimizer = job.network.optimizer(model.parameters(), job.lr, fused=True)
    step = partial(ours.functional, job, model, optimizer, 1.0, job.images)
    growing = SELECTIONS[GROWING]["lowpass"]
    numbers = count()

    def scheduled() -> None:
        step(lowpass=growing, step=next(numbers), total_steps=STEPS)()

    return {
        WITHOUT: step(),
        FIXED: step(**SELECTIONS[FIXED]),
        GROWING: scheduled,
        AGAIN: step(),
    }


def of_the_op(job: Job, seconds: float) -> float:
    """Seconds that `lowpass_residual` takes beyond `residual` on the rows of the forget term."""
    calls = contestants((job.batch, *job.network.shape), alone=False)
    pair = {name: calls[name] for name in (RESIDUAL, str(RADIUS))}
    clock = clock_of(Yardstick(None, warm=False), threads=1)
    clock(pair)
    samples = take_turns(pair, clock, seconds, least=20)
    pairs = zip(samples[str(RADIUS)], samples[RESIDUAL], strict=True)
    return statistics.median(one - two for one, two in pairs)


def measure(network: str, method: str, seconds: float) -> dict:
    """One row: a method on a network."""
    job = Job(NETWORKS[network], method, torch.device("cpu"))
    calls, clock = steps(job), clock_of(Yardstick(None, 4 << 20, warm=True), threads=1)
    clock(calls)
    samples = take_turns(calls, clock, seconds, least=10)
    op = of_the_op(job, min(seconds, 5.0))
    row = in_numbers(job, samples)
    return row | {"seconds_of_the_op": op, "share_of_the_op": op / row["seconds"]}


def measure_replayed(network: str, method: str, seconds: float, accelerator: Accelerator) -> dict:
    """The same on a GPU, where a step is a graph: an `Unlearner` for each selection, on the same weights."""
    job = Job(NETWORKS[network], method, accelerator.device, "bfloat16")
    model = job.network.build().to(accelerator.device)
    calls = {}
    for name, selection in SELECTIONS.items():
        optimizer = job.network.optimizer(model.parameters(), job.lr, fused=True)
        run = {"compile": False, "replay": True, "total_steps": STEPS, **selection}
        calls[name] = ours.unlearner(job, model, optimizer, 1.0, job.images, **run)
        # Eager ones, and the capture.
        for _ in range(WARM_UP_STEPS + 1):
            calls[name]()
    samples = alternate(calls, Yardstick(accelerator, 4 << 20, warm=True), seconds, least=2 if DRY else 10)
    return in_numbers(job, samples)


def in_numbers(job: Job, samples: dict[str, list[float]]) -> dict:
    """What the seconds of each contestant say: those of a step without a band, and what the others add."""
    shares = {}
    for name in samples:
        if name != WITHOUT:
            pairs = zip(samples[name], samples[WITHOUT], strict=True)
            shares[name] = [one / two - 1 for one, two in pairs]
    return {
        "network": job.network.name,
        "method": job.method,
        "batch": job.batch,
        "image": list(job.network.shape),
        "rounds": len(samples[WITHOUT]),
        "seconds": statistics.median(samples[WITHOUT]),
        "share": {name: statistics.median(values) for name, values in shares.items()},
        "share_quartiles": {
            name: [quantile(values, 0.25), quantile(values, 0.75)] for name, values in shares.items()
        },
    }


def shown(rows: list[dict]) -> Table:
    """One line for each method and network."""
    view = Table(title=f"a step with LowPass({RADIUS}) over one without: median (quartiles)", box=SIMPLE)
    names = [name for name in SELECTIONS if name in rows[0]["share"]]
    for column in ("", "ms without", *names, "the op alone"):
        view.add_column(column, justify="right")
    for row in rows:
        cells = [
            "{:+.2%} ({:+.2%}, {:+.2%})".format(row["share"][name], *row["share_quartiles"][name])
            for name in names
        ]
        name = f"{row['network']} {row['method']} B{row['batch']}"
        of_the_op = f"{row['share_of_the_op']:+.3%}" if "share_of_the_op" in row else ""
        view.add_row(name, f"{row['seconds'] * 1e3:.2f}", *cells, of_the_op)
    return view


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="of the turns of one method on one network"
    )
    parser.add_argument(
        "--case", nargs=2, metavar=("NETWORK", "METHOD"), action="append", help="default: small and mnist"
    )
    parser.add_argument("--gpu", action="store_true", help="on the GPU; FASTUNLEARN_DRY=1 rehearses it")
    parser.add_argument("--json", type=Path, help="written there")
    args = parser.parse_args()
    accelerator = find_accelerator() if args.gpu else None
    if args.gpu and accelerator is None:
        parser.error("--gpu: expected a GPU that torch sees, got none")
    keep_freed_memory()
    torch.set_num_threads(1)
    where, rows = machine([1]), []
    if accelerator is not None:
        where |= {"gpu": accelerator.name}
    for network, method in args.case or CASES:
        if accelerator is None:
            rows.append(measure(network, method, args.seconds))
        else:
            with rehearsal():
                rows.append(measure_replayed(network, method, args.seconds, accelerator))
        Console(width=160).print(shown(rows))
        if args.json:
            whole = where | {"radius": RADIUS, "rows": rounded(rows)}
            args.json.write_text(json.dumps(whole, indent=1) + "\n")


if __name__ == "__main__":
    main()
