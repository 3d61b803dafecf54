"""Builds the C++/CUDA extension through CMakeLists.txt.

Everything else about the package stands in pyproject.toml.

FASTUNLEARN_CUDA   auto (default): CUDA sources too where nvcc and a CUDA build of torch are found; check:
compile them for every shipped
                   architecture, spills are errors, and link (against a stub where torch has no CUDA); off:
                   CPU only.
FASTUNLEARN_CUDA_ARCHS   architectures, default "80;90".
FASTUNLEARN_EXTENSION    auto (default): without torch, cmake or a compiler the package installs as plain
Python, with a warning;
                         require: that is an error; off: no extension.
MAX_JOBS           compilations at a time, default 2.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
NEEDS = "(in a checkout; needs cmake >= 3.24 and a C++17 compiler)"
REBUILD = f"python -m pip install --no-build-isolation --no-deps -e .   {NEEDS}"


def one_of(variable: str, *values: str) -> str:
    value = os.environ.get(variable) or values[0]
    if value not in values:
        raise SystemExit(f"{variable}: expected one of {', '.join(values)}, got {value!r}")
    return value


def torch_dir() -> Path | None:
    """The installed torch, which is never imported: only its headers and libraries are used.

    Found from pip's isolated build, too.
    """
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_paths()[scheme]) / "torch" for scheme in ("platlib", "purelib")]
    return next((place for place in places if (place / "include/torch/csrc/stable/library.h").exists()), None)


def sources() -> list[str]:
    lines = (ROOT / "csrc/sources.txt").read_text().splitlines()
    return [line.split()[1] for line in lines if line and not line.startswith("#")]


class CMakeBuild(build_ext):
    """One CMake project instead of setuptools' compiler calls.

    It makes `_C.abi3.so`, and `_C_cuda.abi3.so` where CUDA is wanted.
    """

    def build_extension(self, extension: Extension) -> None:
        if one_of("FASTUNLEARN_EXTENSION", "auto", "require", "off") == "off":
            return
        torch, missing = torch_dir(), []
        if torch is None:
            missing.append("torch >= 2.11, installed before")
        if not shutil.which("cmake"):
            missing.append("cmake")
        if not self._compiler():
            missing.append("a C++ compiler")
        if missing:
            lacks = f"no C++ extension (missing: {', '.join(missing)})"
            message = f"fastunlearn: {lacks}; plain torch will be used. Later: {REBUILD}"
            if os.environ.get("FASTUNLEARN_EXTENSION") == "require":
                raise SystemExit(message)
            self.warn(message)
            return
        out = self._library_folder().resolve()
        out.mkdir(parents=True, exist_ok=True)
        arguments = [f"-DTORCH_DIR={torch}", f"-DOUT={out}", *self._cuda_arguments(torch)]
        ninja = shutil.which("ninja")
        arguments += ["-GNinja", f"-DCMAKE_MAKE_PROGRAM={ninja}"] if ninja else ["-GUnix Makefiles"]
        # kept: the next build compiles only what changed
        folder = ROOT / "build" / ("extension-ninja" if ninja else "extension-make")
        folder.mkdir(parents=True, exist_ok=True)
        # it may remember tools of a pip environment that is gone
        if subprocess.call(["cmake", str(ROOT), *arguments], cwd=folder) != 0:
            subprocess.check_call(["cmake", "--fresh", str(ROOT), *arguments], cwd=folder)
        subprocess.check_call(
            ["cmake", "--build", ".", "--parallel", os.environ.get("MAX_JOBS", "2")], cwd=folder
        )

    @staticmethod
    def _compiler() -> str | None:
        return shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")

    @staticmethod
    def _cuda_arguments(torch: Path) -> list[str]:
        mode = one_of("FASTUNLEARN_CUDA", "auto", "check", "off")
        nvcc = shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")
        if mode == "off" or (mode == "auto" and not (nvcc and (torch / "lib/libtorch_cuda.so").exists())):
            return ["-DWITH_CUDA=OFF"]
        if nvcc is None:
            raise SystemExit(
                "FASTUNLEARN_CUDA=check: expected nvcc on the path or in /usr/local/cuda/bin, found none"
            )
        return [
            "-DWITH_CUDA=ON",
            f"-DCMAKE_CUDA_COMPILER={nvcc}",
            f"-DCMAKE_CUDA_ARCHITECTURES={os.environ.get('FASTUNLEARN_CUDA_ARCHS', '80;90')}",
        ]

    def copy_extensions_to_source(self) -> None:
        """An editable install runs from the source folder."""
        target = Path(self.get_finalized_command("build_py").get_package_dir("fastunlearn"))
        for stale in target.glob("_C*.abi3.so"):
            stale.unlink()
        for library in self.get_outputs():
            self.copy_file(library, str(target / Path(library).name))

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self._library_folder().glob("_C*.abi3.so"))]

    def _library_folder(self) -> Path:
        return Path(self.build_lib) / "fastunlearn"

    def get_output_mapping(self) -> dict[str, str]:
        return {}


headers = [
    str(path.relative_to(ROOT))
    for path in sorted((ROOT / "csrc").glob("*"))
    if path.suffix in (".h", ".cuh", ".cmake", ".txt", ".cpp", ".cu")
]
setup(
    ext_modules=[
        Extension(
            "fastunlearn._C",
            sources=[],
            depends=sorted({*sources(), *headers, "CMakeLists.txt"}),
            py_limited_api=True,
        )
    ],
    cmdclass={"build_ext": CMakeBuild},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
