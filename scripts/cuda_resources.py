"""Compiles the CUDA kernels of lowpass_residual for sm_80 and sm_90, without a GPU.

    python scripts/cuda_resources.py           write registers, shared memory and instructions into
                                               docs/kernels_cuda.md
    python scripts/cuda_resources.py --check   fail if docs/kernels_cuda.md says something else

Fails on spills, too much shared memory, or missing tensor cores.
Needs nvcc; the disassembler is the one that Triton brings, or the toolkit's.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from fastunlearn.ops import _lowpass_residual_cupy as loader

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TABLE = ROOT / "csrc" / "lowpass_residual.cu", ROOT / "docs" / "kernels_cuda.md"
BEGIN, END = "<!-- cuda_resources: begin -->", "<!-- cuda_resources: end -->"
# Bytes a block may have; all blocks of a multiprocessor have 1 KiB each beside it, and 1 KiB more.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
REGISTERS = 65536  # of a multiprocessor
EXAMPLES = (
    (128, 1, 28, 28, 0.5),
    (128, 3, 32, 32, 0.5),
    (16, 4, 64, 64, 0.5),
    (64, 3, 256, 256, 0.25),
    (64, 3, 256, 256, 0.5),
    (64, 3, 256, 256, 1.0),
)


class Usage(NamedTuple):
    """What ptxas and the disassembler say about a kernel."""

    registers: int
    tensor_core: int  # instructions
    wide: int  # loads and stores of 16 bytes in global memory


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with docs/kernels_cuda.md in place of writing it"
    )
    arguments = parser.parse_args()
    usage = {arch: compiled(arch) for arch in SHARED_LIMIT}
    steps = launches()
    for name in steps:
        for arch, limit in SHARED_LIMIT.items():
            if steps[name].shared > limit:
                sys.exit(f"{name}: {steps[name].shared} bytes of shared memory, sm_{arch} has {limit}")
            if name.startswith(("plane", "analysis", "synthesis")) and not usage[arch][name].tensor_core:
                sys.exit(f"{name}: no tensor-core instruction on sm_{arch}")
    text = TABLE.read_text()
    head, tail = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    made = f"{head}\n{table(steps, usage)}\n{tail}"
    if arguments.check and made != text:
        sys.exit(f"{TABLE.relative_to(ROOT)} is out of date: run python scripts/cuda_resources.py")
    if not arguments.check:
        TABLE.write_text(made)


def compiled(arch: int) -> dict[str, Usage]:
    """Every kernel by its name without `lowpass_`. A spill is nvcc's error."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            "nvcc",
            "-std=c++17",
            f"-arch=sm_{arch}",
            "-cubin",
            "-Xptxas=-v,-warn-spills,-Werror",
            "-o",
            str(cubin),
            str(SOURCE),
        ]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        command = [str(disassembler()), "-sass", str(cubin)]
        code = subprocess.run(command, check=True, capture_output=True, text=True).stdout

    counted = re.findall(r"Compiling entry function 'lowpass_(\w+)'.*?Used (\d+) registers", said, re.DOTALL)
    registers = {name: int(count) for name, count in counted}
    usage = {}
    for name, body in re.findall(r"Function : lowpass_(\w+)\n(.*?)(?=Function :|\Z)", code, re.DOTALL):
        tensor_core = re.findall(r"HMMA\.1688\.F32\.TF32", body)
        wide = re.findall(r"(?:LDG|STG)\S*\.128", body)
        usage[name] = Usage(registers[name], len(tensor_core), len(wide))
    return usage


def disassembler() -> Path:
    """cuobjdump: the one that Triton brings, or the toolkit's."""
    candidates = []
    spec = importlib.util.find_spec("triton")
    if spec is not None:
        folders = spec.submodule_search_locations
        candidates += [Path(folder) / "backends/nvidia/bin/cuobjdump" for folder in folders]
    candidates.append(Path(shutil.which("cuobjdump") or ""))
    for path in candidates:
        if path.is_file():
            return path
    sys.exit("expected cuobjdump (it comes with Triton and with the CUDA toolkit), found none")


def launches() -> dict[str, loader.Step]:
    """The largest launch of every kernel among the papers' shapes."""
    steps: dict[str, loader.Step] = {}
    for *shape, share in EXAMPLES:
        images = torch.empty(shape, device="meta")
        weight = torch.empty(shape[0])
        band = torch.empty([int(share * (size // 2)) + 1 for size in shape[2:]])
        tables = []
        for size, count in zip(shape[2:], band.shape, strict=True):
            tables.append(torch.empty(size, min(2 * count - 1, size)))
        tensors = images, images, weight, band, *tables, weight, images
        for outside in (0.0, 0.5):
            plan = loader.make_plan(loader.pack(*tensors, inside=1.0, outside=outside))
            for step in plan.steps:
                steps[step.kernel] = max(step, steps.get(step.kernel, step), key=lambda step: step.shared)
    return steps


def table(steps: dict[str, loader.Step], usage: dict[int, dict[str, Usage]]) -> str:
    """Markdown."""
    rows = [
        "Compiled by nvcc; sm_80 / sm_90; no kernel spills.",
        "",
        "| kernel | threads | registers | shared memory (bytes) | blocks on a multiprocessor "
        "| tensor-core instructions | 16-byte accesses |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, step in steps.items():
        of = [usage[arch][name] for arch in SHARED_LIMIT]
        limits = zip(of, SHARED_LIMIT.values(), strict=True)
        cells = (
            f"`lowpass_{name}`",
            step.threads,
            both(kernel.registers for kernel in of),
            step.shared,
            both(blocks_of(step, kernel.registers, limit) for kernel, limit in limits),
            both(kernel.tensor_core for kernel in of),
            both(kernel.wide for kernel in of),
        )
        rows.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(rows)


def both(numbers: Iterable[int]) -> str:
    """Those of sm_80 and sm_90, for a cell."""
    return " / ".join(map(str, numbers))


def blocks_of(step: loader.Step, registers: int, limit: int) -> int:
    """Blocks that registers (given out in eights a thread), shared memory and 2048 threads allow."""
    return min(
        REGISTERS // (step.threads * -(-registers // 8) * 8),
        (limit + 1024) // (step.shared + 1024),
        2048 // step.threads,
        32,
    )


if __name__ == "__main__":
    main()
