"""What `accelerate launch` sets in the environment is obeyed, or refused by name."""

from __future__ import annotations

import os

import pytest
import torch

pytest.importorskip("tyro")

from fastunlearn.cli import main
from fastunlearn.cli.launch_settings import check_supported, compilation, device_name, mixed_precision
from fastunlearn.cli.launched import launched
from fastunlearn.cli.options import pick_device
from fastunlearn.cli.unlearn_flags import Execution


@pytest.fixture
def told(monkeypatch):
    """Sets what a launcher says, and nothing else."""
    for name in list(os.environ):
        if name.startswith("ACCELERATE_"):
            monkeypatch.delenv(name)

    def tell(**settings: str) -> None:
        for name, value in settings.items():
            monkeypatch.setenv(f"ACCELERATE_{name}", value)

    return tell


@pytest.mark.parametrize(
    ("asked", "given", "taken"),
    [
        (None, "auto", "auto"),
        (None, "fp16", "fp16"),
        ("no", "auto", "no"),
        ("bf16", "auto", "bf16"),
        ("BF16", "bf16", "bf16"),
        ("fp16", "auto", "fp16"),
        # what accelerate says where nobody was asked
        ("no", "bf16", "bf16"),
    ],
)
def test_its_precision_is_taken_where_the_flag_is_auto(told, asked, given, taken):
    if asked is not None:
        told(MIXED_PRECISION=asked)
    assert mixed_precision(given) == taken


@pytest.mark.parametrize(
    ("asked", "given", "message"),
    [
        ("bf16", "no", "--mixed_precision: expected bf16, as accelerate was told, or auto, got no"),
        ("fp16", "bf16", "--mixed_precision: expected fp16, as accelerate was told, or auto, got bf16"),
        ("fp8", "auto", "accelerate: expected mixed_precision no, bf16, fp16, got fp8"),
    ],
)
def test_a_precision_that_contradicts_is_refused(told, asked, given, message):
    told(MIXED_PRECISION=asked)
    with pytest.raises(ValueError, match=f"^{message}$"):
        mixed_precision(given)


DYNAMO = {"DYNAMO_MODE": "default", "DYNAMO_USE_FULLGRAPH": "False", "DYNAMO_USE_DYNAMIC": "False"}


@pytest.mark.parametrize(
    ("backend", "given", "taken"),
    [("NO", "auto", "auto"), ("NO", "off", "off"), ("INDUCTOR", "auto", "on"), ("INDUCTOR", "try", "try")],
)
def test_its_compiler_is_taken_where_the_flag_is_auto(told, backend, given, taken):
    told(DYNAMO_BACKEND=backend, **DYNAMO)
    assert compilation(given) == taken


@pytest.mark.parametrize(
    ("settings", "given", "message"),
    [
        ({"DYNAMO_BACKEND": "EAGER"}, "auto", "expected dynamo_backend inductor .*, got eager"),
        ({"DYNAMO_MODE": "max-autotune"}, "auto", "expected dynamo_mode default .*, got max-autotune"),
        ({"DYNAMO_USE_DYNAMIC": "True"}, "on", "expected dynamo_use_dynamic False .*, got True"),
        ({"DYNAMO_USE_REGIONAL_COMPILATION": "1"}, "on", "expected dynamo_use_regional_compilation False"),
        ({}, "off", "^--compile: expected on, try or auto with accelerate's dynamo_backend, got off$"),
    ],
)
def test_a_compiler_that_contradicts_is_refused(told, settings, given, message):
    told(**{"DYNAMO_BACKEND": "INDUCTOR"} | DYNAMO | settings)
    with pytest.raises(ValueError, match=message):
        compilation(given)


@pytest.mark.parametrize(
    ("settings", "got"),
    [
        ({"USE_DEEPSPEED": "true"}, "one that uses DEEPSPEED"),
        ({"USE_FSDP": "1"}, "one that uses FSDP"),
        ({"USE_MEGATRON_LM": "True"}, "one that uses MEGATRON_LM"),
        ({"USE_PARALLELISM_CONFIG": "true"}, "one that uses PARALLELISM_CONFIG"),
        ({"IN_TPU_POD": "1"}, "one that uses IN_TPU_POD"),
        ({"USE_SAGEMAKER": "true", "SAGEMAKER_DISTRIBUTED_TYPE": "DATA_PARALLEL"}, "data_parallel"),
        ({"GRADIENT_ACCUMULATION_STEPS": "4"}, "4"),
    ],
)
def test_what_cannot_be_followed_is_refused_with_one_process_too(told, settings, got):
    told(**settings)
    with pytest.raises(ValueError, match=f"^accelerate: expected .* got {got}"), launched("cpu"):
        pass


def test_what_changes_nothing_is_let_pass(told):
    told(
        USE_CPU="False",
        USE_FSDP="false",
        MIXED_PRECISION="no",
        USE_SAGEMAKER="true",
        SAGEMAKER_DISTRIBUTED_TYPE="NO",
        GRADIENT_ACCUMULATION_STEPS="1",
        CPU_AFFINITY="1",
        DEBUG_MODE="true",
    )
    check_supported()
    assert device_name(None) is None


def test_its_device_is_taken_by_every_command(told, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device(None) == torch.device("cuda")
    told(TORCH_DEVICE="cuda:1")
    assert pick_device(None) == torch.device("cuda", 1)
    told(USE_CPU="True")
    assert pick_device(None) == pick_device("cpu") == torch.device("cpu")
    with pytest.raises(
        ValueError, match=r"^--device: expected cpu, as accelerate was told, or none, got cuda$"
    ):
        pick_device("cuda")


def test_what_is_taken_over_is_said(told, capsys):
    told(MIXED_PRECISION="bf16", DYNAMO_BACKEND="INDUCTOR")
    execution = Execution().as_launched()
    assert (execution.mixed_precision, execution.compile) == ("bf16", "on")
    assert execution.autocast_dtype(torch.device("cpu")) == torch.bfloat16
    told_in = "as accelerate launch says"
    assert capsys.readouterr().out == f"--mixed_precision bf16, {told_in}\n--compile on, {told_in}\n"


def test_the_command_refuses_before_it_reads(told, tmp_path, capsys):
    told(MIXED_PRECISION="bf16")
    paths = ("--model", "nowhere", "--forget", "nowhere", "--output", str(tmp_path / "run"))
    assert main(["unlearn", *paths, "--method", "neggrad", "--device", "cpu", "--mixed_precision", "no"]) == 2
    assert "error: --mixed_precision: expected bf16, as accelerate was told" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
