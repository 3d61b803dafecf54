"""What a missing package costs: the parts that need it, which say so, and no others."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ABSENT = "diffusers", "nvtx", "tyro", "datasets", "faiss"

# What is about diffusers' networks and files, or about the commands, from its first test to its last.
WHOLE_MODULES = {
    "tests/golden/test_steps.py",
    "tests/metrics/test_reconstruction.py",
    "tests/models/test_fuzz_pipeline.py",
    "tests/models/test_pipeline.py",
    "tests/models/test_transition.py",
    "tests/objective/test_schedules_of_diffusers.py",
    "tests/objective/test_time.py",
    "tests/privacy/test_command.py",
    "tests/test_cli.py",
    "tests/test_demo.py",
    "tests/test_device_flag.py",
    "tests/test_evaluate.py",
    "tests/test_half_moons.py",
    "tests/test_lineage.py",
    "tests/test_launch_settings.py",
    "tests/test_pretraining.py",
    "tests/test_protocol_flags.py",
    "tests/test_rule_flags.py",
    "tests/test_sampling.py",
    "tests/test_selection_flags.py",
}


def without_them(*arguments: str) -> subprocess.CompletedProcess:
    """Python as it is where these packages are not installed."""
    path = os.pathsep.join([str(ROOT / "tests" / "absent"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": path, "FASTUNLEARN_ABSENT": ",".join(ABSENT)}
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_every_module_of_tests_is_collected():
    """A test that needs more than what is there is skipped; so are only these modules as wholes."""
    run = without_them("-m", "pytest", "tests", "--collect-only", "-q", "-rs", "-p", "no:cacheprovider")
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5_000:]
    skipped = re.findall(r"^SKIPPED \[\d+\] (\S+?):\d+: could not import '(\w+)'", run.stdout, re.MULTILINE)
    assert {module for module, package in skipped if package in ABSENT} == WHOLE_MODULES


CALLS = {
    "profiling.enable()": ("nvtx", "from fastunlearn import profiling; profiling.enable()"),
    "load_checkpoint": (
        "diffusers",
        "from fastunlearn.assets import path; from fastunlearn.models import load_checkpoint\n"
        "load_checkpoint(path('mnist-tshirt-small'))",
    ),
    "pretrain": (
        "diffusers",
        "from fastunlearn.runs.pretraining import pretrain; pretrain(None, None, 'out')",
    ),
    "sampler='ddim'": (
        "diffusers",
        "from types import SimpleNamespace as Scheduler; from fastunlearn.models.sampling import sample\n"
        "sample(None, Scheduler(alphas_cumprod=None), 1, shape=(1, 8, 8), sampler='ddim')",
    ),
}


def test_what_needs_a_package_says_which_and_how_it_is_installed():
    """All in one process, whose start takes the time."""
    calls = {name: code for name, (_, code) in CALLS.items()}
    program = f"""
for name, code in {calls!r}.items():
    try:
        exec(code)
    except ImportError as error:
        print(error)
    else:
        print(name, "went through")
"""
    run = without_them("-c", program)
    assert run.returncode == 0, run.stderr
    for (name, (package, _)), line in zip(CALLS.items(), run.stdout.splitlines(), strict=True):
        assert f"{name}: expected the package {package} (pip install {package}), got: No module named" in line


def test_the_command_says_that_it_needs_tyro():
    run = without_them("-m", "fastunlearn", "--help")
    assert run.returncode == 2
    assert run.stderr == "error: commands: expected the package tyro (pip install tyro), got none\n"
    assert without_them("-m", "fastunlearn", "--version").returncode == 0


@pytest.mark.parametrize("name", ABSENT)
def test_they_are_absent(name):
    """Without this the tests above would say nothing."""
    code = f"""
import importlib.metadata, importlib.util
assert importlib.util.find_spec({name!r}) is None
assert {name!r} not in importlib.metadata.packages_distributions()
import {name}
"""
    run = without_them("-c", code)
    assert run.returncode != 0
    assert run.stderr.splitlines()[-1].startswith("ModuleNotFoundError: No module named")
