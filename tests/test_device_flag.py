"""`--device` of every command: what is not here is one line, which says what is."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("tyro")

from fastunlearn.cli import main
from fastunlearn.cli.options import pick_device

NOT_HERE = ("mps", "cuda", "cuda:7", "cuda:300", "cuda:-1", "cuda:01", "cpu:1", "CUDA", "gpu", "meta", "")


@pytest.fixture
def gpus(monkeypatch):
    """As if torch saw so many GPUs; 0 of a torch that could have some."""

    def see(count: int) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: True)

    return see


def refused(name: str) -> str:
    with pytest.raises(ValueError, match=r"^--device: expected ") as caught:
        pick_device(name)
    return str(caught.value)


@pytest.mark.parametrize("name", NOT_HERE)
def test_without_gpus_there_is_the_cpu(gpus, monkeypatch, name):
    gpus(0)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert refused(name) == f"--device: expected cpu (no GPUs: torch finds none here), got {name!r}"
    assert pick_device(None) == pick_device("cpu") == torch.device("cpu")


def test_the_reason_is_said(gpus, monkeypatch):
    gpus(0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert "(no GPUs: CUDA_VISIBLE_DEVICES is '')" in refused("cuda")
    monkeypatch.setattr(torch.backends.cuda, "is_built", lambda: False)
    assert "(no GPUs: this torch was built without them)" in refused("cuda")


def test_with_gpus_they_are_counted(gpus):
    gpus(2)
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda")
    assert pick_device("cuda:1") == torch.device("cuda", 1)
    assert pick_device("cpu") == torch.device("cpu")
    for name in set(NOT_HERE) - {"cuda"} | {"cuda:2"}:
        assert "expected cpu, cuda or cuda:N with N < 2, " in refused(name)


COMMANDS = {
    "sample": ("--model", "nowhere", "--num-images", "1"),
    "evaluate": ("--model", "nowhere", "--forget", "nowhere"),
    "pretrain": ("--recipe", "mnist-tshirt-small", "--data", "nowhere"),
    "demo": (),
    "unlearn": ("--model", "nowhere", "--method", "neggrad", "--forget", "nowhere"),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_refuses_before_it_reads(command, tmp_path, capsys):
    pytest.importorskip("diffusers")
    given = (command, *COMMANDS[command], "--output", str(tmp_path / "out"), "--device", "mps")
    assert main(list(given)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --device: expected cpu")
    assert error.endswith(", got 'mps'\n")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
