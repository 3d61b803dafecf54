"""NVRTC through ctypes: the compiler that CuPy uses, without CuPy and without a GPU.

`pip install nvidia-cuda-nvrtc`.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
from pathlib import Path

import pytest


def compile_source(source: str, arch: str) -> bytes:
    """PTX (`arch` = compute_80) or machine code (sm_80) with the options of CuPy's `RawModule`.

    Skips the test where there is no NVRTC.
    """
    library = _library()
    program = ctypes.c_void_p()
    _check(
        library,
        library.nvrtcCreateProgram(
            ctypes.byref(program), source.encode(), b"lowpass_residual.cu", 0, None, None
        ),
    )
    options = (ctypes.c_char_p * 2)(f"--gpu-architecture={arch}".encode(), b"--std=c++17")
    status = library.nvrtcCompileProgram(program, len(options), options)
    assert status == 0, _read(library, program, "ProgramLog").decode()
    return _read(library, program, "CUBIN" if arch.startswith("sm_") else "PTX")


def entries(ptx: bytes) -> list[str]:
    """Names of the kernels in `ptx`."""
    return re.findall(r"\.visible \.entry (\w+)", ptx.decode())


def _library() -> ctypes.CDLL:
    """NVRTC: of the packages that torch or CuPy bring, or the toolkit's."""
    folders = [Path("/usr/local/cuda")]
    spec = importlib.util.find_spec("nvidia")
    if spec is not None:
        folders = [*map(Path, spec.submodule_search_locations), *folders]
    for folder in folders:
        for path in sorted(folder.rglob("libnvrtc.so.*")):
            return ctypes.CDLL(str(path))
    pytest.skip("NVRTC is not installed (pip install nvidia-cuda-nvrtc)")


def _read(library: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(library, getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(library, getattr(library, f"nvrtcGet{what}")(program, text))
    if what == "CUBIN":
        return text.raw
    return text.raw.rstrip(b"\0")


def _check(library: ctypes.CDLL, status: int) -> None:
    library.nvrtcGetErrorString.restype = ctypes.c_char_p
    assert status == 0, library.nvrtcGetErrorString(status)
