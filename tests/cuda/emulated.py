"""Runs the CUDA kernels of lowpass_residual on the CPU: compiles tests/cuda/emulator with the real
csrc/lowpass_residual.cuh and talks to it.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from fastunlearn.ops.lowpass_residual import basis

ROOT = Path(__file__).parents[2]
EMULATOR = Path(__file__).parent / "emulator"
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}


def build(folder: Path) -> Path:
    """The emulator as a program, in `folder`."""
    compiler = next(filter(None, map(shutil.which, ("g++", "c++"))))
    program = folder / "emulator"
    flags = [
        "-std=c++17",
        "-O2",
        "-Wall",
        "-Werror",
        "-Wno-unknown-pragmas",
        "-U_FORTIFY_SOURCE",
        '-DFASTUNLEARN_EMULATOR="emulator.h"',
    ]
    places = [f"-I{ROOT / 'csrc'}", f"-I{EMULATOR}"]
    subprocess.run(
        [compiler, *flags, *places, *map(str, sorted(EMULATOR.glob("*.cpp"))), "-o", str(program)], check=True
    )
    return program


def header(
    prediction: Tensor, target: Tensor, weight: Tensor, band: Tensor, inside: float, outside: float
) -> bytes:
    """The `Case` of emulator/main.cpp. Batch strides as the tensors have them."""
    numbers = (
        *prediction.shape,
        *band.shape,
        TYPES[prediction.dtype],
        TYPES[target.dtype],
        weight.dtype == torch.float64,
    )
    return struct.pack("<11i2f", *numbers, prediction.stride(0), target.stride(0), inside, outside)


def lowpass_residual(
    program: Path,
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    band: Tensor,
    inside: float,
    outside: float,
    *,
    order: str = "forward",
    place: str = "end",
) -> tuple[Tensor, Tensor]:
    """What the native op computes: energy `[B]` float32 and gradient like `prediction`.

    Args:
        order: in which order the threads of a block run between barriers: forward, backward, shuffled.
        place: whether tensors touch the end or the start of the memory that may be touched.
    """
    (height, width), (rows, columns) = prediction.shape[-2:], band.shape
    cpu = torch.device("cpu")
    tables = [basis(height, rows, cpu, torch.float32), basis(width, columns, cpu, torch.float32)]
    data = [_storage(prediction), _storage(target), *map(_bytes, (weight, band, *tables))]
    message = header(prediction, target, weight, band, inside, outside) + b"".join(data)
    done = subprocess.run(
        [str(program), "run", order, place], input=message, capture_output=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"exit status {done.returncode}: {done.stderr.decode()}")
    split = 4 * len(prediction)
    assert len(done.stdout) == split + prediction.numel() * prediction.element_size()
    energy, gradient = torch.empty(len(prediction)), torch.empty(prediction.shape, dtype=prediction.dtype)
    energy.view(torch.uint8).numpy().data[:] = done.stdout[:split]
    gradient.view(torch.uint8).numpy().reshape(-1).data[:] = done.stdout[split:]
    return energy, gradient


def plans(program: Path, headers: list[bytes]) -> list[list[int]]:
    """What make_plan of csrc/lowpass_residual_plan.h says to each `header`."""
    done = subprocess.run([str(program), "plan"], input=b"".join(headers), capture_output=True, check=True)
    return [[int(word) for word in line.split()] for line in done.stdout.splitlines()]


def fault(program: Path, name: str, order: str = "forward") -> subprocess.CompletedProcess:
    """Runs a kernel of emulator/faults.h."""
    return subprocess.run([str(program), "fault", order, name], capture_output=True, text=True, check=False)


def _bytes(tensor: Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def _storage(images: Tensor) -> bytes:
    """Dense samples with whatever lies between them."""
    count = (len(images) - 1) * images.stride(0) + images.shape[1:].numel() if len(images) else 0
    return _bytes(images.as_strided((count,), (1,)))
