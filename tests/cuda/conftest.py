"""The kernels of csrc/lowpass_residual.cuh, wherever they can run: on the CPU under the emulator, on a GPU
through each of their two loaders.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable
from pathlib import Path

import emulated
import pytest
import torch

from fastunlearn.ops import _backends
from fastunlearn.ops.lowpass_residual import basis


@pytest.fixture(scope="session")
def emulator(tmp_path_factory) -> Path:
    if not (shutil.which("g++") or shutil.which("c++")):
        pytest.skip("the emulator needs a C++ compiler")
    return emulated.build(tmp_path_factory.mktemp("emulator"))


@pytest.fixture(
    params=["emulator", *(pytest.param(loader, marks=pytest.mark.gpu) for loader in ("extension", "cupy"))]
)
def kernel(request) -> Callable:
    """`kernel(prediction, target, weight, band, inside, outside)` -> energy and gradient, from and to the
    CPU.
    """
    if request.param == "emulator":
        program = request.getfixturevalue("emulator")
        return lambda *args: emulated.lowpass_residual(program, *args)
    if request.getfixturevalue("gpu").device.type != "cuda":
        pytest.skip("cannot be rehearsed: the compiled kernels need a GPU; the emulator runs their source")
    if request.param == "extension":
        if not _backends.extension("_C_cuda"):
            pytest.skip(f"the CUDA extension is not built: {_backends.build_command()}")
        return lambda *args: _on_gpu(torch.ops.fastunlearn_native.lowpass_residual.default, *args)
    if importlib.util.find_spec("cupy") is None:
        pytest.skip("CuPy is not installed")
    from fastunlearn.ops._lowpass_residual_cupy import lowpass_residual

    return lambda *args: _on_gpu(lowpass_residual, *args)


def _on_gpu(launch: Callable, prediction, target, weight, band, inside, outside):
    device = torch.device("cuda", torch.cuda.current_device())
    prediction, target, weight, band = (
        _same_strides(value, device) for value in (prediction, target, weight, band)
    )
    (height, width), (rows, columns) = prediction.shape[-2:], band.shape
    tables = basis(height, rows, device, torch.float32), basis(width, columns, device, torch.float32)
    energy = torch.full((len(prediction),), float("nan"), device=device)
    gradient = torch.full(prediction.shape, float("nan"), device=device, dtype=prediction.dtype)
    launch(prediction, target, weight, band, inside, outside, *tables, energy, gradient)
    return energy.cpu(), gradient.cpu()


def _same_strides(value: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On `device`, with the memory between the samples: `Tensor.to` would close the gaps."""
    whole = value.untyped_storage()
    copy = torch.empty(len(whole) // value.element_size(), dtype=value.dtype, device=device)
    copy.copy_(torch.tensor([], dtype=value.dtype).set_(whole, 0, copy.shape))
    return copy.as_strided(value.shape, value.stride(), value.storage_offset())
