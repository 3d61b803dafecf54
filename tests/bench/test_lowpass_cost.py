"""What a band of frequencies costs: the two commands run, refuse wrong results, and write what they say."""

import json

import pytest
import torch

from bench import lowpass_cost, lowpass_step
from fastunlearn.testing.accelerator import StandIn


def run(module, monkeypatch, tmp_path, *arguments):
    path = tmp_path / "found.json"
    monkeypatch.setattr("sys.argv", ["bench", "--seconds", "0.01", "--json", str(path), *arguments])
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "auto")  # the commands set it for their process
    monkeypatch.setattr(module, "keep_freed_memory", lambda: None)
    threads = torch.get_num_threads()
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)
    return json.loads(path.read_text())


def test_the_ops_are_compared_in_turns(monkeypatch, tmp_path):
    monkeypatch.setattr(lowpass_cost, "SHAPES", {"tiny": (2, 1, 28, 28)})
    monkeypatch.setattr(lowpass_cost, "COPY_BYTES", 1 << 20)
    monkeypatch.setattr(lowpass_cost, "PRODUCT_SIZE", 32)
    found = run(lowpass_cost, monkeypatch, tmp_path)
    ways = {(table["caches"], table["what"]) for table in found["tables"]}
    assert ways == {("warm", "op"), ("cold", "op"), ("warm", "kernel alone")}
    for table in found["tables"]:
        assert table["limit"] == 3
        assert table["rows"]["residual"]["ratio"] == 1
        assert all(row["seconds"] > 0 for row in table["rows"].values())


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(lowpass_cost, "literal", lambda *args: (torch.zeros(2), torch.zeros(2, 1, 28, 28)))
    with pytest.raises(AssertionError):
        lowpass_cost.contestants((2, 1, 28, 28), alone=False)


@pytest.mark.parametrize("on", ["cpu", "gpu"])
def test_whole_steps_with_and_without_a_band(monkeypatch, tmp_path, on):
    arguments = ["--case", "tiny", "retrack"]
    if on == "gpu":
        monkeypatch.setattr(lowpass_step, "find_accelerator", StandIn)
        monkeypatch.setattr("fastunlearn.testing.accelerator.DRY", True)
        monkeypatch.setattr(lowpass_step, "DRY", True)
        arguments.append("--gpu")
    (row,) = run(lowpass_step, monkeypatch, tmp_path, *arguments)["rows"]
    names = {lowpass_step.FIXED, lowpass_step.GROWING, lowpass_step.AGAIN}
    names |= {lowpass_step.WINDOW} if on == "gpu" else set()
    assert row["share"].keys() == names
    assert row["seconds"] > 0


def test_a_gpu_that_is_missing_is_named(monkeypatch, capsys):
    monkeypatch.setattr(lowpass_step, "find_accelerator", lambda: None)
    monkeypatch.setattr("sys.argv", ["bench", "--gpu"])
    with pytest.raises(SystemExit):
        lowpass_step.main()
    assert "--gpu: expected a GPU that torch sees, got none" in capsys.readouterr().err
