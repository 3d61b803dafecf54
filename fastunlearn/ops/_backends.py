"""Where the kernels are, loaded at first use.

C++ and CUDA are in the extension (`fastunlearn/_C*.abi3.so`), Triton in `fastunlearn/kernels`.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from ..host import check

_PACKAGE = Path(__file__).parents[1]
REVISION = 2  # of the C++ kernels and their arguments; csrc/common.h has the same number
ISAS = ("portable", "avx2", "avx512")  # ascending; a processor without one runs the best that it has
_TRITON = ("noising", "redirect", "mixture", "residual")
_CUDA = ("lowpass_residual",)


def find_kernel(name: str, device: torch.device, args: tuple, *, required: bool) -> Callable | None:
    """The kernel of op `name` for tensors `args` on `device`; None where plain torch has to do.

    Raises:
        RuntimeError: there is none and `required` asks for one.
    """
    kernel, reason = None, f"no kernel for {device.type}"
    if device.type == "cpu":
        if extension("_C"):
            kernel = _native(name)
        elif required:  # the command is made where it is shown, not at every call
            reason = f"the C++ extension is not built; build it with: {build_command()}"
    elif device.type == "cuda":
        if any(isinstance(value, Tensor) and _is_float64_images(value) for value in args):
            reason = "GPU kernels take float16, bfloat16, float32 and uint8 images, got float64"
        else:
            kernel, reason = _on_gpu(name)
    if kernel is None and required:
        raise RuntimeError(f"FASTUNLEARN_BACKEND=kernels: expected a kernel for {name}, got none ({reason})")
    return kernel


def _is_float64_images(value: Tensor) -> bool:
    return value.dtype == torch.float64 and value.ndim >= 4


@functools.cache
def extension(library: str) -> bool:
    """Loads `_C` (CPU) or `_C_cuda`; False where it is missing, with one warning.

    The warning names the command which builds it.
    """
    path = _PACKAGE / f"{library}.abi3.so"
    if not path.exists():
        missing = f"{path.name} is not built, plain torch is used instead (slower)"
        warnings.warn(f"fastunlearn: {missing}; build it with: {build_command()}", stacklevel=2)
        return False
    wanted = os.environ.get("FASTUNLEARN_ISA") or ISAS[-1]
    if wanted not in ISAS:
        raise ValueError(f"FASTUNLEARN_ISA: expected one of {', '.join(ISAS)}, got {wanted!r}")
    check.switched_on("FASTUNLEARN_VNNI", default=True)  # C++ reads it: here a typing error is seen
    found = getattr(ctypes.CDLL(str(path)), "fastunlearn_revision", lambda: 0)()
    if found != REVISION:
        other = f"{path.name} is of another version (revision {found}, expected {REVISION})"
        instead = "plain torch is used instead (slower)"
        warnings.warn(
            f"fastunlearn: {other}, {instead}; build it again with: {build_command()}", stacklevel=2
        )
        return False
    torch.ops.load_library(path)
    return True


def build_command() -> str:
    """The command that builds the extension: of a checkout, or of the installed package."""
    if (_PACKAGE.parent / "setup.py").exists():
        what = f"--no-build-isolation -e {_PACKAGE.parent}"
    else:
        what = "--force-reinstall --no-binary fastunlearn fastunlearn"
    return f"{sys.executable} -m pip install --no-deps {what}"


@functools.cache
def _native(name: str) -> Callable:
    return getattr(torch.ops.fastunlearn_native, name).default


@functools.cache
def _on_gpu(name: str) -> tuple[Callable | None, str]:
    """The kernel of op `name` on GPUs; or None, and why there is none."""
    if name in _TRITON:
        if importlib.util.find_spec("triton") is None:
            instead = "triton is not installed, plain torch is used instead (slower)"
            warnings.warn(f"fastunlearn: {instead}; install it with: pip install triton", stacklevel=3)
            return None, "triton is not installed"
        return getattr(importlib.import_module(f"fastunlearn.kernels.{name}"), name), ""
    if name not in _CUDA:
        return None, f"{name} runs in plain torch on a GPU"

    # Where no compiler was there at installation, CuPy compiles the same sources at first use.
    if not (_PACKAGE / "_C_cuda.abi3.so").exists() and importlib.util.find_spec("cupy") is not None:
        return getattr(importlib.import_module(f"fastunlearn.ops._{name}_cupy"), name), ""
    if not extension("_C_cuda"):
        return None, f"the CUDA extension is not built; build it with: {build_command()}"
    return _native(name), ""
