"""lowpass_residual on a GPU without a compiler.

CuPy (NVRTC) compiles csrc/lowpass_residual.cuh at first use and keeps the binary on disk. This repeats
csrc/lowpass_residual_plan.h and csrc/lowpass_residual_cuda.cpp in Python; a test compares the two plans.
Tested on an H200, not timed there.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

_NAMES = ("_plan.h", "_blocks.cuh", "_chunks.cuh", "_plane.cuh", ".cuh")
_PARTS = ("tensor_core.cuh", *(f"lowpass_residual{name}" for name in _NAMES))
_POINTERS = (
    "prediction",
    "target",
    "weight",
    "band",
    "row_basis",
    "column_basis",
    "energy",
    "gradient",
    "coefficients",
    "partials",
)
_STRIDES = ("prediction_stride", "target_stride", "gradient_stride")
_SIZES = (
    "batch",
    "channels",
    "height",
    "width",
    "row_frequencies",
    "column_frequencies",
    "row_columns",
    "column_columns",
)
_TYPES = ("prediction_type", "target_type", "weight_is_double")
_PLANNED = ("vector", "splits", "panels", "panel_frequencies", "selects", "terms", "planes_per_block")
ARGUMENTS = np.dtype(  # struct Arguments
    [(name, np.uint64) for name in _POINTERS]
    + [(name, np.int64) for name in _STRIDES]
    + [(name, np.int32) for name in (*_SIZES, *_TYPES)]
    + [("inside", np.float32), ("outside", np.float32)]
    + [(name, np.int32) for name in _PLANNED],
    align=True,
)
_TYPE_OF = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ROWS, _CHUNK, _SLAB_PITCH, _ROW_PITCH, _SELECT_ELEMENTS = 64, 32, 36, 76, 2048
_PLANE_THREADS, _PLANE_SHARED, _WHOLE_SAMPLE_BATCH = 256, 99 * 1024, 64
# eights of column frequencies, warps, whether synthesis keeps pairs of halves
_SHAPES = ((5, 4, True), (9, 4, False), (17, 8, False))


class Step(NamedTuple):
    kernel: str
    blocks: int
    threads: int
    shared: int  # bytes


class Plan(NamedTuple):
    steps: list[Step]
    coefficients: int  # floats of scratch
    partials: int


def lowpass_residual(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    band: Tensor,
    inside: float,
    outside: float,
    row_basis: Tensor,
    column_basis: Tensor,
    energy: Tensor,
    gradient: Tensor,
) -> None:
    """What `torch.ops.fastunlearn_native.lowpass_residual` does, on a GPU and on torch's current stream."""
    import cupy

    tensors = (prediction, target, weight, band, row_basis, column_basis, energy, gradient)
    arguments = pack(*tensors, inside=inside, outside=outside)
    plan = make_plan(arguments)
    scratch = energy.new_empty(plan.coefficients + plan.partials)
    arguments["coefficients"] = scratch.data_ptr()
    arguments["partials"] = scratch.data_ptr() + 4 * plan.coefficients
    device = prediction.device.index
    stream = cupy.cuda.ExternalStream(torch.cuda.current_stream(device).cuda_stream, device)
    with cupy.cuda.Device(device), stream:
        for step in plan.steps:
            kernel = _module().get_function(f"lowpass_{step.kernel}")
            if step.shared > 48 * 1024:
                kernel.max_dynamic_shared_size_bytes = step.shared
            kernel((step.blocks,), (step.threads,), (arguments,), shared_mem=step.shared)


def pack(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor,
    band: Tensor,
    row_basis: Tensor,
    column_basis: Tensor,
    energy: Tensor,
    gradient: Tensor,
    *,
    inside: float,
    outside: float,
) -> np.ndarray:
    """`struct Arguments` as an array of one; what `make_plan` and the scratch memory fill is 0."""
    arguments = np.zeros(1, ARGUMENTS)
    tensors = (prediction, target, weight, band, row_basis, column_basis, energy, gradient)
    for name, tensor in zip(_POINTERS, tensors, strict=False):
        arguments[name] = tensor.data_ptr()
    for name, tensor in zip(_STRIDES, (prediction, target, gradient), strict=True):
        arguments[name] = tensor.stride(0)
    sizes = (*prediction.shape, *band.shape, row_basis.shape[1], column_basis.shape[1])
    types = (_TYPE_OF[prediction.dtype], _TYPE_OF[target.dtype], weight.dtype == torch.float64)
    for name, value in zip((*_SIZES, *_TYPES), (*sizes, *types), strict=True):
        arguments[name] = value
    arguments["inside"], arguments["outside"] = inside, outside
    return arguments


def make_plan(arguments: np.ndarray) -> Plan:
    """make_plan of csrc/lowpass_residual_plan.h: fills the planned fields of `arguments`; what to launch."""
    a = {name: arguments[name].item() for name in ARGUMENTS.names}
    planes = a["batch"] * a["channels"]
    planned = dict.fromkeys(_PLANNED, 0)
    planned["vector"] = _is_vector(a)
    steps, coefficients = [], 0
    if planes and _plane_shared(a, 1) <= _PLANE_SHARED:
        steps = _plan_planes(a, planned)
    elif planes:
        steps, coefficients = _plan_streamed(a, planned)
    if planned["terms"]:
        steps.append(Step("energy", _ceil_div(a["batch"], 128), 128, 0))
    for name, value in planned.items():
        arguments[name] = value
    return Plan(steps, coefficients, planes * planned["terms"])


def _plan_planes(a: dict, planned: dict) -> list[Step]:
    """A plane fits into shared memory: a block does it, or all planes of a sample, in one launch."""
    whole = a["channels"] == 1
    if a["batch"] >= _WHOLE_SAMPLE_BATCH and _plane_shared(a, a["channels"]) <= _PLANE_SHARED:
        whole = True
    count = a["channels"] if whole else 1
    # One block for a sample writes its energy; of several each leaves a term.
    planned.update(planes_per_block=count, terms=0 if whole else 1)
    blocks = a["batch"] * a["channels"] // count
    return [Step("plane", blocks, _PLANE_THREADS, _plane_shared(a, count))]


def _plan_streamed(a: dict, planned: dict) -> tuple[list[Step], int]:
    """Planes go through shared memory in chunks: analysis, selection, synthesis; floats of coefficients."""
    planes, outside = a["batch"] * a["channels"], a["outside"] != 0
    wide_enough = (shape for shape in _SHAPES if a["column_frequencies"] <= 8 * shape[0])
    tiles, warps, split = next(wide_enough, _SHAPES[-1])
    splits = _ceil_div(a["height"], _ROWS)
    panels = _ceil_div(a["column_frequencies"], 8 * tiles)
    elements = a["row_columns"] * panels * 16 * tiles
    selects = _ceil_div(elements, _SELECT_ELEMENTS)
    planned.update(splits=splits, panels=panels, panel_frequencies=8 * tiles, selects=selects)
    # Energy inside the band comes from the coefficients, energy outside of it from the residual.
    planned["terms"] = selects + splits if outside else selects

    analysis, synthesis = _streamed_shared(16 * tiles, split)
    kind = "synthesis_residual" if outside else "synthesis"
    steps = [
        Step(f"analysis_{tiles}", planes * splits * panels, 32 * warps, analysis),
        Step("select", planes * selects, 256, 32),
        Step(f"{kind}_{tiles}", planes * splits, 32 * warps, synthesis),
    ]
    return steps, planes * splits * elements


def source() -> str:
    """The kernels as one text: CuPy's cache on disk sees a change in any of the files."""
    package = Path(__file__).parents[1]
    places = package / "csrc", package.parent / "csrc"
    folder = next(place for place in places if (place / _PARTS[0]).exists())
    lines = [line for part in _PARTS for line in (folder / part).read_text().splitlines()]
    return "\n".join(line for line in lines if not line.startswith(('#include "', "#pragma once")))


@functools.cache
def _module():
    import cupy

    return cupy.RawModule(code=source(), options=("--std=c++17",))


def _is_vector(a: dict) -> bool:
    """Whether all rows of images can be read and written four elements at a time."""
    if a["width"] % 4 != 0:
        return False
    images = (("prediction", "prediction_type"), ("target", "target_type"), ("gradient", "prediction_type"))
    for name, kind in images:
        vector_bytes = 8 if a[kind] else 16  # of half precision, and of float32
        if a[name] % vector_bytes != 0 or a[f"{name}_stride"] % 4 != 0:
            return False
    return True


def _plane_shared(a: dict, planes: int) -> int:
    """Bytes of shared memory of a block that does `planes` planes."""
    columns = _plane_pitch(a["column_columns"])
    tables = a["width"] * columns + a["height"] * _plane_pitch(a["row_columns"])
    plane = a["height"] * (_plane_pitch(a["width"]) + columns) + a["row_columns"] * columns
    return 4 * (tables + planes * plane + _PLANE_THREADS // 32)


def _streamed_shared(columns: int, split: bool) -> tuple[int, int]:
    """Bytes of shared memory of analysis and synthesis for blocks of `columns` cosines and sines: `Shape`."""
    pitch, deep_pitch, halves = columns + 4, columns + 8, 2 if split else 1
    fold = 2 * _ROWS * _SLAB_PITCH + 2 * _CHUNK * pitch
    reduce = _ROWS * (deep_pitch + 2 * _ROW_PITCH)
    expand = _ROWS * _SLAB_PITCH + halves * _CHUNK * (pitch if split else deep_pitch)
    unfold = _CHUNK * pitch + 2 * _ROWS * _SLAB_PITCH
    return 4 * max(fold, reduce), 4 * (halves * _ROWS * pitch + max(expand, unfold))


def _plane_pitch(columns: int) -> int:
    return (columns + 3) // 8 * 8 + 4


def _ceil_div(a: int, b: int) -> int:
    return -(-a // b)
