"""Compiles the CUDA kernels of lowpass_residual for sm_80 and sm_90, without a GPU: fails on spills, too much
shared memory, or missing tensor cores.

    python scripts/cuda_resources.py           write registers, shared memory and instructions into
    docs/kernels_cuda.md python scripts/cuda_resources.py --check   fail if docs/kernels_cuda.md says
    something else

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
from pathlib import Path
from typing import NamedTuple

import torch

from fastunlearn.ops import _lowpass_residual_cupy as loader

ROOT = Path(__file__).resolve().parents[1]
SOURCE, TABLE = ROOT / "csrc" / "lowpass_residual.cu", ROOT / "docs" / "kernels_cuda.md"
BEGIN, END = "<!-- cuda_resources: begin -->", "<!-- cuda_resources: end -->"
# bytes a block may have; all blocks of a multiprocessor have 1 KiB each beside it, and 1 KiB more
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
        code = subprocess.run(
            [str(disassembler()), "-sass", str(cubin)], check=True, capture_output=True, text=True
        ).stdout
    registers = {
        name: int(count)
        for name, count in re.findall(
            r"Compiling entry function 'lowpass_(\w+)'.*?Used (\d+) registers", said, re.DOTALL
        )
    }
    bodies = dict(re.findall(r"Function : lowpass_(\w+)\n(.*?)(?=Function :|\Z)", code, re.DOTALL))
    return {
        name: Usage(
            registers[name],
            len(re.findall(r"HMMA\.1688\.F32\.TF32", body)),
            len(re.findall(r"(?:LDG|STG)\S*\.128", body)),
        )
        for name, body in bodies.items()
    }


def disassembler() -> Path:
    spec = importlib.util.find_spec("triton")
    bundled = [
        Path(folder) / "backends/nvidia/bin/cuobjdump"
        for folder in (spec.submodule_search_locations if spec else ())
    ]
    found = next((path for path in (*bundled, Path(shutil.which("cuobjdump") or "")) if path.is_file()), None)
    return found or sys.exit(
        "expected cuobjdump (it comes with Triton and with the CUDA toolkit), found none"
    )


def launches() -> dict[str, loader.Step]:
    """The largest launch of every kernel among the papers' shapes."""
    steps: dict[str, loader.Step] = {}
    for *shape, share in EXAMPLES:
        images = torch.empty(shape, device="meta")
        weight, band = (
            torch.empty(shape[0]),
            torch.empty([int(share * (size // 2)) + 1 for size in shape[2:]]),
        )
        tables = [
            torch.empty(size, min(2 * count - 1, size))
            for size, count in zip(shape[2:], band.shape, strict=True)
        ]
        for outside in (0.0, 0.5):
            for step in loader.make_plan(
                loader.pack(
                    images, images, weight, band, *tables, weight, images, inside=1.0, outside=outside
                )
            ).steps:
                steps[step.kernel] = max(step, steps.get(step.kernel, step), key=lambda step: step.shared)
    return steps


def table(steps: dict[str, loader.Step], usage: dict[int, dict[str, Usage]]) -> str:
    """Markdown."""
    rows = [
        "Compiled by nvcc; sm_80 / sm_90; no kernel spills.",
        "",
        "| kernel | threads | registers | shared memory (bytes) | blocks on a multiprocessor | tensor-core "
        "instructions | 16-byte accesses |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, step in steps.items():
        of = [usage[arch][name] for arch in SHARED_LIMIT]
        resident = [
            blocks_of(step, kernel.registers, limit)
            for kernel, limit in zip(of, SHARED_LIMIT.values(), strict=True)
        ]
        columns = (
            [kernel.registers for kernel in of],
            resident,
            [kernel.tensor_core for kernel in of],
            [kernel.wide for kernel in of],
        )
        registers, blocks, tensor_core, wide = (" / ".join(map(str, column)) for column in columns)
        rows.append(
            f"| `lowpass_{name}` | {step.threads} | {registers} | {step.shared} | {blocks} | {tensor_core} "
            f"| {wide} |"
        )
    return "\n".join(rows)


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
