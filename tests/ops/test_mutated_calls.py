"""scripts/mutate_op_calls.py: kernels take what plain torch takes, and answer alike, or refuse."""

import importlib.util
from pathlib import Path

import pytest
import torch

from fastunlearn.ops._backends import build_command, extension

SCRIPT = Path(__file__).parents[2] / "scripts" / "mutate_op_calls.py"


@pytest.fixture
def script(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "auto")  # `outcome` sets it: what it was comes back afterwards
    spec = importlib.util.spec_from_file_location("mutate_op_calls", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not extension("_C"), reason=f"no C++ extension; build it with: {build_command()}")
@pytest.mark.filterwarnings("ignore")
def test_changed_arguments_are_refused_or_answered_alike(script, tmp_path, capsys):
    counts = script.run(0, 600, 0, tmp_path / "progress")
    assert counts["wrong"] == 0, capsys.readouterr().out
    assert counts["same"] > 100
    assert counts["refused"] > 300


def test_a_kernel_that_answers_otherwise_is_found(script, monkeypatch):
    monkeypatch.setattr(
        script, "outcome", lambda op, arguments, backend: (torch.ones(2) * (1 + (backend == "kernels")),)
    )
    assert script.verdict("residual", []).startswith("values differ")
    monkeypatch.setattr(script, "outcome", lambda op, arguments, backend: (torch.ones(2),))
    assert script.verdict("residual", []) == "same"
