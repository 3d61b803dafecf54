"""Which backend runs: the extension where it is built, plain torch with one warning where it is not, and what FASTUNLEARN_BACKEND asks for."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastunlearn import functional as F
from fastunlearn.ops import _backends
from fastunlearn.testing.factories import linear_schedule, redirect_inputs

ROOT = Path(__file__).parents[1]
SCHEDULE = linear_schedule()


@pytest.fixture
def without_extension(monkeypatch, tmp_path):
    monkeypatch.setattr(_backends, "_PACKAGE", tmp_path / "fastunlearn")
    _backends.extension.cache_clear()
    yield
    monkeypatch.undo()
    _backends.extension.cache_clear()


@pytest.mark.usefixtures("without_extension")
def test_missing_extension_is_said_once_with_the_command_that_builds_it(monkeypatch):
    monkeypatch.delenv("FASTUNLEARN_BACKEND", raising=False)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        results = [F.redirect(*redirect_inputs(), SCHEDULE) for _ in range(2)]
    assert len(said) == 1
    assert str(said[0].message).endswith("pip install --no-deps --force-reinstall --no-binary fastunlearn fastunlearn")
    assert sys.executable in str(said[0].message)
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "eager")
    assert torch.equal(results[0].target, F.redirect(*redirect_inputs(), SCHEDULE).target)


def test_the_command_in_a_checkout_installs_the_checkout():
    assert _backends.build_command() == f"{sys.executable} -m pip install --no-deps --no-build-isolation -e {ROOT}"


@pytest.mark.usefixtures("without_extension")
def test_kernels_can_be_required(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "kernels")
    with pytest.warns(UserWarning, match="not built"), pytest.raises(RuntimeError, match=r"FASTUNLEARN_BACKEND=kernels: expected a kernel for redirect, got none"):
        F.redirect(*redirect_inputs(), SCHEDULE)


def test_importing_the_package_loads_neither_triton_nor_the_extension():
    code = "import fastunlearn, fastunlearn.functional, sys, torch; print('triton' in sys.modules, sorted(torch.ops.loaded_libraries))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False []"


def test_every_source_is_listed():
    """What csrc/sources.txt lacks is neither compiled nor shipped."""
    lines = [line.split() for line in (ROOT / "csrc/sources.txt").read_text().splitlines() if line and not line.startswith("#")]
    helpers = {"csrc/isa.cpp", "csrc/torch_cuda_stub.cpp"}
    found = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")}
    assert {file for _, file in lines} | helpers == found


@pytest.mark.skipif(os.environ.get("FASTUNLEARN_EXTENSION") != "require", reason="without a compiler there is no extension, and plain torch is tested")
def test_extension_is_built_where_it_is_required():
    assert _backends.extension("_C")
    if os.environ.get("FASTUNLEARN_CUDA") == "check":
        assert (ROOT / "fastunlearn/_C_cuda.abi3.so").exists()
