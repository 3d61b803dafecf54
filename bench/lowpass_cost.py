"""What a band of frequencies costs on a CPU: `lowpass_residual` beside `residual`, in turns in one process.

    python -m bench.lowpass_cost [--threads 1] [--json bench/results/lowpass_cost_cpu.json]

Both ops read two tensors and write one: 12 bytes an element in float32, so that the ratio has the floor 1.
Fourier transforms there and back would take `5/2 H W log2(H W)` operations of a plane each. Times of these
bytes and operations, at the rates of a copy and of a matrix product in the same turns, stand beside what was
measured.

Other programs on the machine count as little as possible: with one thread a call's time is the CPU time of
its thread; with more it is the wall clock's, and the lowest tenth tells more than the median. The ratio is
taken within each round, and rounds go on until the medians of all ratios stay where they are.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from fastunlearn.host.memory import keep_freed_memory
from fastunlearn.objective.frequency import LowPass
from fastunlearn.ops import lowpass_residual as lowpass_op
from fastunlearn.ops import residual as residual_op
from fastunlearn.reference.lowpass_residual import lowpass_residual as literal

from .harness import Call, HostClock, Yardstick, filling, take_turns

SHAPES = {
    "mnist": (128, 1, 28, 28),
    "latents": (4, 4, 64, 64),
    "celeba": (16, 3, 256, 256),
    "celeba, small batch": (2, 3, 256, 256),
}
LIMITS = {28: 3, 256: 6}  # times the residual's time
RADII = (0.1, 0.25, 0.5, 1.0)  # of Nyquist
# Its first step has radius 0.1, in a table for 1.
GROWING = LowPass(schedule="linear_increase", start=0.1, stop=1.0)
COPY, PRODUCT, RESIDUAL = "copy", "product", "residual"
SCHEDULED, SOFT = "0.1 in a table of 1.0", "0.5, s = 0.1"
COPY_BYTES, PRODUCT_SIZE = 256 << 20, 1024
STILL = 0.01  # the largest change of a median ratio between two batches of rounds that counts as none
MOST_BATCHES = 12


def masks(height: int, width: int) -> dict[str, tuple[Tensor, float, float]]:
    """The bands that are timed, by name."""
    fixed = {str(radius): LowPass(radius).mask(height, width) for radius in RADII}
    return fixed | {
        SOFT: LowPass(0.5, high_frequency_weight=0.1).mask(height, width),
        SCHEDULED: GROWING.mask_at(height, width, step=0, total_steps=100),
    }


def contestants(shape: tuple[int, int, int, int], *, alone: bool) -> dict[str, Call]:
    """The calls for one batch: the ops, or where `alone` their kernels into outputs that exist."""
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(shape, generator=generator) for _ in range(2))
    weight = torch.rand(shape[0], generator=generator) + 0.5

    def call(name: str, op, arguments: tuple) -> Call:
        if alone:
            return filling(name, op, arguments)
        return lambda: getattr(op, name)(*arguments)

    calls = {RESIDUAL: call("residual", residual_op, (prediction, target, weight))}
    for name, mask in masks(*shape[2:]).items():
        calls[name] = call("lowpass_residual", lowpass_op, (prediction, target, weight, *mask))
        _expect_right(calls[name](), (prediction[:2], target[:2], weight[:2]), mask)
    return calls


def _expect_right(actual: tuple[Tensor, Tensor], images: tuple[Tensor, ...], mask: tuple) -> None:
    """The first two images against Fourier transforms in float64, before anything is timed."""
    exact = literal(*(value.double() for value in images), *mask)
    for got, right in zip(actual, exact, strict=True):
        torch.testing.assert_close(got[:2], right.float())


def clock_of(yardstick: Yardstick, threads: int) -> HostClock:
    """With one thread only its CPU time counts."""
    return HostClock(yardstick, time.thread_time if threads == 1 else time.perf_counter)


def quantile(values: list[float], share: float) -> float:
    """The value below which this share of `values` lies."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


def ratios(samples: dict[str, list[float]], name: str) -> list[float]:
    """The time of `name` over that of the residual, round by round."""
    return [one / two for one, two in zip(samples[name], samples[RESIDUAL], strict=True)]


def compare(calls: dict[str, Call], clock: HostClock, seconds: float) -> tuple[dict[str, list[float]], float]:
    """The times of all rounds, and by how much the last batch of rounds moved a median ratio, at most."""
    samples = {name: [] for name in calls}
    clock(calls)  # warm-up: pages, tables
    before, moved = None, math.inf
    for _ in range(MOST_BATCHES):
        for name, values in take_turns(calls, clock, seconds, least=20).items():
            samples[name] += values
        medians = {name: statistics.median(ratios(samples, name)) for name in calls}
        if before is not None:
            moved = max(abs(medians[name] / before[name] - 1) for name in calls)
        if moved <= STILL:
            break
        before = medians
    return samples, moved


def rates(samples: dict[str, list[float]]) -> dict[str, float]:
    """Of the yardsticks in the same rounds: bytes/s of a copy and operations/s of a matrix product."""
    return {
        "bytes_per_second": 2 * COPY_BYTES / statistics.median(samples[COPY]),
        "flops_per_second": 2 * PRODUCT_SIZE**3 / statistics.median(samples[PRODUCT]),
    }


def floors(shape: tuple[int, int, int, int], rate: dict[str, float]) -> dict[str, float]:
    """Bytes and operations that nobody can do without, or only with another algorithm, and their seconds."""
    elements, plane = math.prod(shape), shape[2] * shape[3]
    flops = 2 * 2.5 * elements * math.log2(plane)
    return {
        "bytes": 12 * elements,
        "bytes_seconds": 12 * elements / rate["bytes_per_second"],
        "fourier_flops": flops,
        "fourier_seconds": flops / rate["flops_per_second"],
    }


def measure(shape_name: str, threads: int, warm: bool, alone: bool, seconds: float) -> dict:
    """One table: every band at one shape."""
    shape = SHAPES[shape_name]
    yardstick = Yardstick(None, COPY_BYTES, warm=warm)
    calls, square = contestants(shape, alone=alone), torch.rand(PRODUCT_SIZE, PRODUCT_SIZE)
    samples, moved = compare(calls, clock_of(yardstick, threads), seconds)
    measures = {COPY: yardstick.copy, PRODUCT: lambda: square @ square}
    rate = rates(take_turns(measures, clock_of(yardstick, threads), 1.0, least=5))
    rows = {}
    for name in calls:
        ratio = ratios(samples, name)
        rows[name] = {
            "seconds": statistics.median(samples[name]),
            "seconds_lowest_tenth": quantile(samples[name], 0.1),
            "ratio": statistics.median(ratio),
            "ratio_quartiles": [quantile(ratio, 0.25), quantile(ratio, 0.75)],
            "ratio_of_lowest_tenths": quantile(samples[name], 0.1) / quantile(samples[RESIDUAL], 0.1),
        }
    return {
        "shape": list(shape),
        "name": shape_name,
        "threads": threads,
        "caches": "warm" if warm else "cold",
        "what": "kernel alone" if alone else "op",
        "limit": LIMITS.get(shape[-1]),
        "rounds": len(samples[RESIDUAL]),
        "last_change": moved,
        "floor": floors(shape, rate) | rate,
        "rows": rows,
    }


def shown(tables: list[dict]) -> Table:
    """Times of the residual, and ratios to them."""
    names = [name for name in tables[0]["rows"] if name != RESIDUAL]
    view = Table(
        title="lowpass_residual over residual: median of the rounds (ratio of the lowest tenths)",
        box=SIMPLE,
    )
    for column in ("", "limit", "floor, us", "residual, us", *names):
        view.add_column(column, justify="right")
    for table in tables:
        cells = [table["rows"][name] for name in names]
        floor = table["floor"]
        view.add_row(
            f"{table['name']} {table['caches']} {table['what']}, {table['threads']} thread(s)",
            str(table["limit"] or ""),
            f"{floor['bytes_seconds'] * 1e6:.0f}, {floor['fourier_seconds'] * 1e6:.0f}",
            f"{table['rows'][RESIDUAL]['seconds'] * 1e6:.0f}",
            *(f"{cell['ratio']:.2f} ({cell['ratio_of_lowest_tenths']:.2f})" for cell in cells),
        )
    return view


def rounded(value):
    """Floats to four digits: the rest is noise."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {name: rounded(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return value


def machine(threads: list[int]) -> dict:
    """Where and when this ran."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = {line.split(":")[0].strip(): line.split(":")[1].strip() for line in lines if ":" in line}
    return {
        "processor": " ".join(names.get(name, "?") for name in ("model name", "cpu family", "model")),
        "cores": os.cpu_count(),
        "load_before": os.getloadavg()[0],
        "torch": torch.__version__,
        "threads": threads,
        "freed_memory": "kept",
        "datetime": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, action="append", help="may be given several times; default: 1")
    parser.add_argument("--shape", choices=SHAPES, action="append", help="default: all")
    parser.add_argument("--seconds", type=float, default=1.0, help="of a batch of rounds")
    parser.add_argument("--json", type=Path, help="written there")
    args = parser.parse_args()
    # Pages that malloc gave back cost both ops the same and would hide what they differ in.
    keep_freed_memory()
    os.environ["FASTUNLEARN_BACKEND"] = "kernels"
    threads = args.threads or [1]
    where, tables = machine(threads), []
    for count in threads:
        torch.set_num_threads(count)
        for name in args.shape or SHAPES:
            for warm, alone in ((True, False), (False, False), (True, True)):
                tables.append(measure(name, count, warm, alone, args.seconds))
                if args.json:
                    args.json.write_text(json.dumps(where | {"tables": rounded(tables)}, indent=1) + "\n")
    Console(width=200).print(shown(tables))


if __name__ == "__main__":
    main()
