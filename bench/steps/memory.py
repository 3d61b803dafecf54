"""Peak memory of a contestant's step on a CPU, in a process of its own.

    python -m bench.steps.memory --network mnist --method siss --contestant fastunlearn [--layout
    channels_last] [--joined] [--threads 2]

prints `{"weights": bytes, "step": bytes}`. `step` is the high-water mark of the resident size (VmHWM) over
three steps, less the resident size (VmRSS) after the network, the data sets, the fixed rows and the
contestant were built, before its first step: activations, gradients, every clone of them, the optimizer's
state, and what libraries allocate at their first call. `weights` are the network's parameters, which were
resident before.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import sys
from pathlib import Path

import torch

from .choices import LAYOUTS
from .contestants import Setting
from .job import Job
from .methods import timed
from .networks import NETWORKS

STEPS = 3  # the second is the first with the optimizer's state there
_ROOT = Path(__file__).parents[2]


def measure(setting: Setting, name: str, threads: int) -> dict[str, int]:
    """`weights` and `step`, bytes, of contestant `name`, in a subprocess.

    Raises:
        RuntimeError: the subprocess failed; the message is its last line.
    """
    layout = next(key for key, value in LAYOUTS.items() if value == setting.layout)
    command = [
        sys.executable,
        "-m",
        __spec__.name,
        "--network",
        setting.job.network.name,
        "--method",
        setting.job.method,
        "--contestant",
        name,
    ]
    command += ["--layout", layout, "--threads", str(threads)] + ["--joined"] * setting.joined
    run = subprocess.run(command, cwd=_ROOT, capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{name}: {run.stderr.strip().splitlines()[-1]}")
    return json.loads(run.stdout)


def status(field: str) -> int:
    """Bytes of `field` in /proc/self/status (Linux)."""
    return (
        int(re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)[1]) << 10
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=NETWORKS, required=True)
    parser.add_argument("--method", choices=timed(), required=True)
    parser.add_argument("--contestant", required=True)
    parser.add_argument("--layout", choices=LAYOUTS, default="contiguous")
    parser.add_argument(
        "--joined",
        action="store_true",
        help="ReTrack's branches in one network call, for limit and strongest",
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(
        Job(NETWORKS[args.network], args.method, torch.device("cpu")), LAYOUTS[args.layout], args.joined
    )
    model = setting.model(args.contestant)
    # the copy in the other layout is not part of the measurement
    setting.models = dict.fromkeys(setting.models, model)
    step = setting.build(args.contestant)
    gc.collect()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    for _ in range(STEPS):
        step()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    print(json.dumps({"weights": weights, "step": status("VmHWM") - before}))


if __name__ == "__main__":
    main()
