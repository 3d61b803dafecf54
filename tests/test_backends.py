"""Which backend runs: the extension where it is built, plain torch with one warning where it is not, and what
FASTUNLEARN_BACKEND asks for.
"""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from fastunlearn import functional as F
from fastunlearn.host.store import Rows
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
    assert str(said[0].message).endswith(
        "pip install --no-deps --force-reinstall --no-binary fastunlearn fastunlearn"
    )
    assert sys.executable in str(said[0].message)
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "eager")
    assert torch.equal(results[0].target, F.redirect(*redirect_inputs(), SCHEDULE).target)


def test_the_command_in_a_checkout_installs_the_checkout():
    assert (
        _backends.build_command()
        == f"{sys.executable} -m pip install --no-deps --no-build-isolation -e {ROOT}"
    )


@pytest.mark.usefixtures("without_extension")
def test_kernels_can_be_required(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "kernels")
    missing = r"FASTUNLEARN_BACKEND=kernels: expected a kernel for redirect, got none"
    with pytest.warns(UserWarning, match="not built"), pytest.raises(RuntimeError, match=missing):
        F.redirect(*redirect_inputs(), SCHEDULE)


@pytest.mark.skipif(not (ROOT / "fastunlearn/_C.abi3.so").exists(), reason="the extension is not built")
def test_a_library_of_another_version_is_not_used(monkeypatch):
    built = _backends.REVISION
    monkeypatch.setattr(_backends, "REVISION", -1)
    _backends.extension.cache_clear()
    try:
        with pytest.warns(
            UserWarning,
            match=rf"_C.abi3.so is of another version \(revision {built}, expected -1\), .* "
            "build it again with: .*pip install",
        ):
            assert not _backends.extension("_C")
    finally:
        _backends.extension.cache_clear()


@pytest.mark.skipif(not (ROOT / "fastunlearn/_C.abi3.so").exists(), reason="the extension is not built")
def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", "AVX2")
    _backends.extension.cache_clear()
    with pytest.raises(
        ValueError, match="FASTUNLEARN_ISA: expected one of portable, avx2, avx512, got 'AVX2'"
    ):
        _backends.extension("_C")


def test_a_store_that_is_a_permuted_view_is_not_copied(monkeypatch):
    """Rows are picked first: an NHWC file, memory-mapped, is larger than memory."""
    store = torch.randint(256, (50, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    index, many = torch.tensor([3, 3, 49]), torch.randint(50, (3, 4))
    timesteps, noise = torch.tensor([0, 500, 999]), torch.randn(3, 3, 8, 8)
    calls = {
        "noised": lambda rows: F.noised(rows(index), noise, timesteps, SCHEDULE),
        "redirect": lambda rows: F.redirect(rows(index), rows(many), noise, timesteps, SCHEDULE),
        "mixture": lambda rows: F.mixture(
            rows(index), rows(many[:, 0]), noise, timesteps, SCHEDULE, 0.5, torch.tensor([True, False, True])
        ),
    }
    expected = {name: call(lambda index: Rows(store.contiguous(), index)) for name, call in calls.items()}

    copied = []
    contiguous = torch.Tensor.contiguous
    monkeypatch.setattr(
        torch.Tensor,
        "contiguous",
        lambda self, **layout: copied.append(len(self)) or contiguous(self, **layout),
    )
    for name, call in calls.items():
        for one, two in zip(call(lambda index: Rows(store, index)), expected[name], strict=True):
            assert torch.equal(one, two)
    assert copied
    assert max(copied) < 50


def test_importing_the_package_loads_neither_triton_nor_the_extension():
    loaded = "print('triton' in sys.modules, sorted(torch.ops.loaded_libraries))"
    code = f"import fastunlearn, fastunlearn.functional, sys, torch; {loaded}"
    assert (
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        ).stdout.strip()
        == "False []"
    )


def test_every_source_is_listed():
    """What csrc/sources.txt lacks is neither compiled nor shipped."""
    lines = [
        line.split()
        for line in (ROOT / "csrc/sources.txt").read_text().splitlines()
        if line and not line.startswith("#")
    ]
    helpers = {"csrc/isa.cpp", "csrc/torch_cuda_stub.cpp"}
    found = {
        str(path.relative_to(ROOT)) for path in (ROOT / "csrc").iterdir() if path.suffix in (".cpp", ".cu")
    }
    assert {file for _, file in lines} | helpers == found


@pytest.mark.skipif(
    os.environ.get("FASTUNLEARN_EXTENSION") != "require",
    reason="without a compiler there is no extension, and plain torch is tested",
)
def test_extension_is_built_where_it_is_required():
    assert _backends.extension("_C")
    if os.environ.get("FASTUNLEARN_CUDA") == "check":
        assert (ROOT / "fastunlearn/_C_cuda.abi3.so").exists()
