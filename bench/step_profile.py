"""Where the time of a step goes, operator by operator.

    python -m bench.step_profile --network mnist --method siss [--contestant fastunlearn] [--json
    bench/results/step_profile_cpu.json]

profiles a few steps with torch's profiler and adds up each operator's own time by kind, beside what the
system counted in steps without the profiler: page faults and CPU time. `--method` and `--contestant` may be
given several times; `--json` writes all of them.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import time
from datetime import datetime, timezone
from pathlib import Path

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile

from fastunlearn.testing.accelerator import Accelerator, find_accelerator

from .steps import choices
from .steps.choices import LAYOUTS, synchronize
from .steps.contestants import EAGERLY, OURS
from .steps.job import PRECISIONS, Job
from .steps.methods import timed
from .steps.networks import NETWORKS, Step

# Kind -> parts of the names of operators and kernels; the first kind that fits counts.
KINDS = {
    "optimizer": (
        "adam",
        "optimizer.",
        "_foreach_add",
        "_foreach_mul",
        "_foreach_addc",
        "_foreach_sqrt",
        "_foreach_div",
        "_foreach_lerp",
        "_foreach_sub",
    ),
    "gradient norms": ("_foreach_norm", "linalg_vector_norm", "_foreach_clamp"),
    "convolution, backward": ("convolution_backward", "dgrad", "wgrad", "bprop"),
    "convolution, forward": ("convolution", "conv2d", "fprop"),
    "attention, backward": ("attention_backward", "attention_for_cpu_backward"),
    "attention, forward": ("attention",),
    "normalization": ("group_norm", "layer_norm", "rowwisemoments", "groupnorm"),
    "activation": ("silu", "gelu", "sigmoid"),
    "matrix product": ("aten::mm", "addmm", "bmm", "gemm", "baddbmm", "matmul"),
    "copy": ("copy_", "clone", "aten::cat", "contiguous", "memcpy", "aten::_to_copy", "aten::to"),
    "allocation, fill": ("aten::empty", "zero", "fill_", "memset", "accumulategrad", "detach"),
    "this package's ops": ("fastunlearn",),
}
OTHER = "other"


def kind_of(name: str) -> str:
    """The kind of an operator or kernel of that name."""
    name = name.lower()
    return next((kind for kind, parts in KINDS.items() if any(part in name for part in parts)), OTHER)


def breakdown(step: Step, device: torch.device, steps: int) -> dict[str, float]:
    """Kind -> seconds a step of the operators' own time: on a CPU summed over the calling threads, on a GPU
    of the kernels. After the longest, `OTHER`.
    """
    gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu) as recorded:
        for _ in range(steps):
            step()
        if gpu:
            torch.cuda.synchronize(device)
    seconds = dict.fromkeys([*KINDS, OTHER], 0.0)
    for event in recorded.key_averages():
        own = event.self_device_time_total if gpu else event.self_cpu_time_total
        seconds[kind_of(event.key)] += own / 1e6 / steps
    return dict(sorted(seconds.items(), key=lambda item: (item[0] == OTHER, -item[1])))


def counted(step: Step, accelerator: Accelerator | None, steps: int) -> dict[str, float]:
    """Median seconds of a step without the profiler, its CPU seconds, and its page faults (minor: served from
    memory; each costs about as much as writing the page twice).
    """
    taken, before = [], resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(steps):
        synchronize(accelerator)
        began = time.perf_counter()
        step()
        synchronize(accelerator)
        taken.append(time.perf_counter() - began)
    after = resource.getrusage(resource.RUSAGE_SELF)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {
        "seconds": statistics.median(taken),
        "cpu_seconds": cpu / steps,
        "system_seconds": (after.ru_stime - before.ru_stime) / steps,
        "page_faults": (after.ru_minflt - before.ru_minflt) / steps,
        "major_page_faults": (after.ru_majflt - before.ru_majflt) / steps,
    }


def _shown(results: list[dict]) -> Table:
    table = Table(title="own time of the operators, ms a step, and share of their sum", box=SIMPLE)
    table.add_column("", no_wrap=True)
    for result in results:
        table.add_column(f"{result['network']} {result['method']}\n{result['contestant']}", justify="right")
    for kind in (*KINDS, OTHER):
        cells = [(result["operators"][kind], sum(result["operators"].values())) for result in results]
        table.add_row(kind, *(f"{seconds * 1e3:.1f}  {seconds / total:5.1%}" for seconds, total in cells))
    table.add_section()
    for name, unit in (
        ("seconds", 1e3),
        ("cpu_seconds", 1e3),
        ("system_seconds", 1e3),
        ("page_faults", 1),
        ("major_page_faults", 1),
    ):
        table.add_row(
            f"{name}, ms" if unit == 1e3 else name,
            *(f"{result['counted'][name] * unit:.1f}" for result in results),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, default="mnist")
    parser.add_argument("--method", choices=timed(), action="append")
    parser.add_argument(
        "--contestant", action="append", help=f"as the tables of bench_step.py name them (default: {OURS})"
    )
    parser.add_argument("--precision", choices=PRECISIONS, default="float32")
    parser.add_argument("--layout", choices=LAYOUTS, help="default: the faster one")
    parser.add_argument("--batch", type=int, help="default: the network's own")
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda")
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--json", type=Path, help="written there")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    accelerator = find_accelerator() if args.device == "cuda" else None
    device, results = torch.device("cpu") if accelerator is None else accelerator.device, []
    for method in args.method or ["siss"]:
        job = Job(NETWORKS[args.network], method, device, args.precision, batch=args.batch)
        settings = choices.by_layout(job, accelerator, {}, only=args.layout)
        layout = args.layout or choices.faster_layout(settings, EAGERLY)[0]
        setting = settings[layout]
        for contestant in args.contestant or [OURS]:
            step = setting.build(contestant)
            step()
            result = {
                "network": args.network,
                "method": method,
                "contestant": contestant,
                "batch": job.batch,
                "precision": args.precision,
            }
            result["layout"] = layout
            result |= {
                "counted": counted(step, accelerator, args.steps),
                "operators": breakdown(step, device, args.steps),
            }
            results.append(result)
    Console(width=max(100, 40 + 24 * len(results))).print(_shown(results))
    if args.json:
        versions = {
            "torch": torch.__version__,
            "threads": args.threads,
            "device": args.device,
            "datetime": datetime.now(timezone.utc).isoformat(),
        }
        args.json.write_text(
            json.dumps({**versions, "steps": args.steps, "profiles": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
