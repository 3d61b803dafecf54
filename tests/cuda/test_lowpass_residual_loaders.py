"""The two loaders of csrc/lowpass_residual.cuh agree, and NVRTC compiles what CuPy will give it."""

from __future__ import annotations

import itertools

import emulated
import nvrtc
import pytest
import torch

from fastunlearn.ops import _lowpass_residual_cupy as loader

KERNELS = (
    ["plane"]
    + [f"{name}_{tiles}" for name in ("analysis", "synthesis", "synthesis_residual") for tiles in (5, 9, 17)]
    + ["select", "energy"]
)
A100_SHARED = 163 * 1024  # bytes a block can have; an H200 has 227 KiB


SIZES = [
    *(
        (128, 1, 28, 28),
        (128, 3, 32, 32),
        (63, 3, 32, 32),
        (64, 3, 64, 64),
        (16, 4, 64, 64),
        (2, 3, 256, 256),
    ),
    *((1, 1, 300, 200), (1, 2, 33, 1000), (5, 7, 17, 9), (0, 3, 8, 8)),
]


def cases():
    """Arguments of many calls, without memory behind the images."""
    for (batch, channels, height, width), share, outside in itertools.product(
        SIZES, (0.1, 0.25, 0.5, 0.8, 1.0), (0.0, 0.5)
    ):
        band = torch.ones(int(share * (height // 2)) + 1, int(share * (width // 2)) + 1)
        for dtype in (torch.float32, torch.float16):
            images = torch.empty(batch, channels, height, width, dtype=dtype, device="meta")
            yield images, images, torch.ones(batch), band, 1.0, outside


def test_both_plan_the_same(emulator):
    """make_plan in C++ and in Python. Images on the meta device: null pointers, as in the emulator."""
    every = list(cases())
    for args, expected in zip(
        every, emulated.plans(emulator, [emulated.header(*args) for args in every]), strict=True
    ):
        prediction, target, weight, band, inside, outside = args
        row_columns, column_columns = (
            min(2 * count - 1, size) for count, size in zip(band.shape, prediction.shape[2:], strict=True)
        )
        tables = (
            torch.empty(prediction.shape[2], row_columns),
            torch.empty(prediction.shape[3], column_columns),
        )
        arguments = loader.pack(
            prediction, target, weight, band, *tables, weight, prediction, inside=inside, outside=outside
        )
        plan = loader.make_plan(arguments)
        planned = [arguments[name].item() for name in loader._PLANNED]
        steps = [
            value
            for step in plan.steps
            for value in (KERNELS.index(step.kernel), step.blocks, step.threads, step.shared)
        ]
        assert [*planned, plan.coefficients, plan.partials, *steps] == expected
        assert all(step.shared <= A100_SHARED for step in plan.steps)


def test_arguments_have_the_size_of_the_struct():
    assert loader.ARGUMENTS.itemsize == 184  # as csrc/lowpass_residual_plan.h asserts


def test_nvrtc_compiles_the_source():
    """To PTX, which takes the whole of the source and none of the assembler's time."""
    assert set(nvrtc.entries(nvrtc.compile_source(loader.source(), "compute_80"))) == {
        f"lowpass_{name}" for name in KERNELS
    }


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_nvrtc_makes_machine_code(arch):
    assert nvrtc.compile_source(loader.source(), arch).startswith(b"\x7fELF")
