"""A driver for Triton that compiles for GPUs which are not there, and launches nothing.

With it a launcher on a CPU's tensors goes the whole way that it goes on a GPU: binding of the arguments,
specialisation on their values and alignment, options, compilation, the check of shared memory. Triton's
interpreter must be off.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have on A100, H100/H200


@dataclass(frozen=True)
class Launch:
    """A kernel as a launcher would have started it."""

    kernel: str
    signature: dict[str, str]  # run-time argument -> Triton type
    constants: dict[str, Any]  # argument -> value, for what is known when it is compiled
    aligned: frozenset[str]  # arguments that were found divisible by 16
    options: Any  # what it was compiled with: num_warps, num_stages, maxnreg, ...
    cubin: bytes
    grid: tuple[int, int, int]
    arguments: dict[str, Any]


class CompileOnly:
    """Stands for Triton's driver of one GPU of compute capability `arch` (80 or 90)."""

    def __init__(self, arch: int):
        self.arch = arch
        self.launches: list[Launch] = []
        self.utils = self
        self._loaded: dict[int, bytes] = {}  # function -> its code

    # --- what Triton asks of a driver

    @staticmethod
    def is_active() -> bool:
        return True

    def get_current_device(self) -> int:
        return self.arch  # a kernel keeps what it has compiled by this number

    def set_current_device(self, device: int) -> None:
        raise AssertionError("a launcher changes no device")

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_MEMORY[self.arch], "multiprocessor_count": 132, "warpSize": 32}

    def launcher_cls(self, source, metadata):
        """What starts a compiled kernel: here, what writes down that it would have been started."""
        names = source.fn.arg_names
        signature = {name: kind for name, kind in source.signature.items() if kind != "constexpr"}
        constants = {names[path[0]]: value for path, value in source.constants.items()}
        divisible = [path[0] for path, found in source.attrs.items() if ["tt.divisibility", 16] in found]
        aligned = frozenset(names[position] for position in divisible)

        def launch(x, y, z, stream, function, packed_metadata, launch_metadata, enter, leave, *arguments):
            given = dict(zip(names, arguments, strict=True))
            compiled = source.fn.__name__, signature, constants, aligned, metadata, self._loaded[function]
            self.launches.append(Launch(*compiled, (x, y, z), given))

        return launch

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, ...]:
        """Module, function, registers, spills and the most threads that a block may have."""
        function = len(self._loaded) + 1
        self._loaded[function] = cubin
        return function, function, 0, 0, 1024

    def unload_module(self, module: int) -> None:
        pass


@contextmanager
def compile_only(arch: int) -> Iterator[list[Launch]]:
    """Within the block, every launch is compiled for `arch`, written into the list, and not made."""
    stand_in = CompileOnly(arch)
    driver.set_active(stand_in)
    try:
        yield stand_in.launches
    finally:
        driver._active = None  # `reset_active` would look for a GPU
