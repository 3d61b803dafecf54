"""`fastunlearn unlearn`, started in several processes as `torchrun` and `accelerate launch` do."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import crash
import numpy as np
import pytest
import runs
import torch
import torch.distributed as dist
from locks import held_elsewhere, refused
from safetensors.torch import load_file
from team import PATIENCE, tell_place

from fastunlearn.cli import main
from fastunlearn.host.folder_lock import LOCK_FILE, locked
from fastunlearn.runs.private import read_private
from fastunlearn.runs.protocols import FILE, read_protocol
from fastunlearn.runs.run_record import read_metrics, read_run
from fastunlearn.testing.checkpoints import save_tiny_checkpoint

LAUNCHERS = {
    "torchrun": ("torch.distributed.run", "--standalone", "--nproc_per_node", "2"),
    "accelerate": (
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--mixed_precision",
        "no",
        "--main_process_port",
        "0",
    ),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, four images to forget and twenty to keep."""
    pytest.importorskip("diffusers")
    pytest.importorskip("tyro")
    root = tmp_path_factory.mktemp("world")
    images = np.random.default_rng(0).integers(0, 256, (24, 1, 8, 8), dtype=np.uint8)
    np.save(root / "forget.npy", images[:4])
    np.save(root / "retain.npy", images[4:])
    return SimpleNamespace(
        model=save_tiny_checkpoint(root / "model"), forget=root / "forget.npy", retain=root / "retain.npy"
    )


def command(world: SimpleNamespace, output: Path, *more: object, seed: int | None = 0) -> list[str]:
    paths = ("--model", world.model, "--forget", world.forget, "--retain", world.retain, "--output", output)
    # AdamW makes a whole step of a gradient that is nothing but rounding: the rate is what keeps that below
    # the tolerance.
    fixed = (
        "--method",
        "retrack",
        "--k",
        "3",
        "--steps",
        "4",
        "--batch-size",
        "4",
        "--learning-rate",
        "1e-4",
    )
    seeds = () if seed is None else ("--seed", seed)
    return [str(argument) for argument in ("unlearn", *paths, *fixed, *seeds, *more)]


def run_as(rank: int, count: int, port: int, log: str, arguments: list[str]) -> None:
    """What torchrun does for one of its processes, with a store of its own at `port` for them to meet."""
    tell_place(rank, count)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TORCHELASTIC_USE_AGENT_STORE="True")
    with open(f"{log}.{rank}", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    sys.exit(main(arguments))


def launch(tmp_path: Path, arguments: list[str], count: int = 2) -> list[tuple[int, str]]:
    """Exit code and output of each process."""
    # The port is one that is free, and stays held.
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    crash.start_server()
    log = tmp_path / "log"
    processes = [
        crash.CONTEXT.Process(target=run_as, args=(rank, count, store.port, str(log), arguments), daemon=True)
        for rank in range(count)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
        return [
            (process.exitcode, Path(f"{log}.{rank}").read_text()) for rank, process in enumerate(processes)
        ]
    finally:
        for process in processes:
            process.kill()


def weights(output: Path) -> torch.Tensor:
    return torch.cat(
        [
            tensor.flatten()
            for tensor in load_file(
                output / "model" / "unet" / "diffusion_pytorch_model.safetensors"
            ).values()
        ]
    )


def assert_close(found: Path, expected: Path) -> None:
    distance = torch.linalg.vector_norm(weights(found) - weights(expected))
    assert distance <= 1e-5 * torch.linalg.vector_norm(weights(expected))


@pytest.fixture(scope="module")
def single(world, tmp_path_factory) -> Path:
    """The run of one process."""
    output = tmp_path_factory.mktemp("single") / "run"
    assert main(command(world, output, "--device", "cpu")) == 0
    return output


def test_the_command_in_two_processes(world, single: Path, tmp_path: Path):
    # the last weights are the average
    averaged = command(world, tmp_path / "run", "--use-ema", "--ema-decay", "0", "--keep-checkpoints")
    results = launch(tmp_path, averaged)
    assert [code for code, _ in results] == [0, 0], results
    assert_close(tmp_path / "run", single)
    assert read_run(tmp_path / "run")["num_processes"] == 2
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert "unlearned model: " in results[0][1]
    assert "unlearned model: " not in results[1][1]
    kept = {path.name.partition("-")[0] for path in (tmp_path / "run" / "private").iterdir()}
    # The neighbours, searched once, among them.
    assert kept == {"checkpoint", "record.json", "lineage.key", "fastunlearn"}
    runs.unfinish(tmp_path / "run", 4)
    resumed = launch(tmp_path, [*averaged, "--steps", "6", "--resume-from-checkpoint", "latest"])
    assert [code for code, _ in resumed] == [0, 0], resumed
    assert len(read_metrics(tmp_path / "run")) == 6


def test_a_protocol_in_two_processes_is_that_of_one(world, tmp_path: Path):
    continual = ("--protocol", "continual", "--images_per_request", "2")
    # Without a seed process 0 draws one, which it tells the other, and nobody else.
    results = launch(tmp_path, command(world, tmp_path / "pair", *continual, seed=None))
    assert [code for code, _ in results] == [0, 0], results
    seed = read_private(tmp_path / "pair" / "private")["seed"]
    assert not any(str(seed) in said for _, said in results)
    single = command(world, tmp_path / "single", *continual, "--device", "cpu", seed=seed)
    assert main(single) == 0
    assert "protocol: " in results[0][1]
    assert "protocol: " not in results[1][1]
    found, expected = (read_protocol(tmp_path / folder) for folder in ("pair", "single"))
    assert found["status"] == "complete"
    assert [request["rows"] for request in found["requests"]] == [[0, 1], [2, 3]]
    for number in (1, 2):
        assert_close(tmp_path / "pair" / f"request-{number}", tmp_path / "single" / f"request-{number}")
        assert read_run(tmp_path / "pair" / f"request-{number}")["num_processes"] == 2
    assert found["before"] == expected["before"]
    losses = [[image["loss"] for image in content["after"][1]["images"]] for content in (found, expected)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    # A process fewer goes on with the rest, and a pair has nothing left to do.
    shutil.rmtree(tmp_path / "pair" / "request-2")
    kept = {name: found[name][:1] for name in ("requests", "after")} | {"status": "running"}
    (tmp_path / "pair" / FILE).write_text(json.dumps(found | kept))
    resumed = (*continual, "--resume-from-checkpoint", "latest")
    assert main(command(world, tmp_path / "pair", *resumed, "--device", "cpu", seed=None)) == 0
    assert_close(tmp_path / "pair" / "request-2", tmp_path / "single" / "request-2")
    again = launch(tmp_path, command(world, tmp_path / "pair", *resumed))
    assert [code for code, _ in again] == [0, 0], again
    (tmp_path / "pair" / FILE).write_text(json.dumps(found | {"status": "running"}))
    changed = launch(tmp_path, command(world, tmp_path / "pair", *resumed, seed=1))
    assert [code for code, _ in changed] == [2, 1], changed
    assert "seed: expected that which the protocol in" in changed[0][1]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--batch-size", "5"], "batch_size: expected a multiple of the 2 processes, got 5"),
        (["--device", "cuda:0"], "device: expected"),
        (["--forget", "nowhere.npy"], "nowhere.npy"),
    ],
)
def test_wrong_input_ends_all_with_a_message(world, tmp_path: Path, more: list[str], message: str):
    for code, output in launch(tmp_path, command(world, tmp_path / "run", *more)):
        assert code == 2
        assert message in output
        assert "Traceback" not in output


def test_a_folder_that_another_run_writes_to_is_refused_by_all(world, tmp_path: Path):
    with held_elsewhere(locked, tmp_path / "run"):
        results = launch(tmp_path, command(world, tmp_path / "run", "--device", "cpu"))
    assert [code for code, _ in results] == [1, 1]
    refusal = "expected a place that no other run writes to, got one held by process"
    assert f"error: {tmp_path / 'run'}: {refusal} {os.getpid()} on " in results[0][1]
    assert "error: process 0: FolderLocked: " in results[1][1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE: expected RANK and LOCAL_RANK beside it"),
        (
            {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "ACCELERATE_USE_FSDP": "true"},
            "got one that uses FSDP",
        ),
    ],
)
def test_a_launch_that_cannot_work_is_refused(
    world, tmp_path: Path, monkeypatch, capsys, environment: dict[str, str], message: str
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert main(command(world, tmp_path / "run")) == 2
    assert message in capsys.readouterr().err


def test_one_gpu_is_not_for_several_processes(monkeypatch):
    pytest.importorskip("tyro")
    from fastunlearn.cli.launched import _on_cpu

    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert not _on_cpu(None)
    assert not _on_cpu("cuda")
    assert _on_cpu("cpu")
    with pytest.raises(ValueError, match="device: expected cpu or cuda for 4 processes"):
        _on_cpu("cuda:1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(
        ValueError, match="num_processes: expected at most 2 on this machine, one for each GPU, got 4"
    ):
        _on_cpu(None)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    assert _on_cpu(None)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_launchers_themselves(world, single: Path, tmp_path: Path, launcher: str):
    started = [
        sys.executable,
        "-m",
        *LAUNCHERS[launcher],
        "-m",
        "fastunlearn",
        *command(world, tmp_path / "run", "--device", "cpu"),
    ]
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(started, capture_output=True, text=True, timeout=PATIENCE, env=environment)
    assert done.returncode == 0, done.stderr
    assert_close(tmp_path / "run", single)


@pytest.mark.slow
def test_a_launcher_that_is_told_to_end_leaves_a_checkpoint(world, tmp_path: Path):
    """torchrun passes a signal on to its processes, once, and waits for them."""
    steps = ("--steps", "100000", "--logging-steps", "10")
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-m",
            *LAUNCHERS["torchrun"],
            "-m",
            "fastunlearn",
            *command(world, tmp_path / "run", *steps),
        ]
    )
    try:
        deadline = time.monotonic() + PATIENCE
        while not read_metrics(tmp_path / "run") and time.monotonic() < deadline:
            time.sleep(0.2)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(PATIENCE) != 0
    finally:
        launcher.terminate()
        launcher.wait(PATIENCE)
    assert read_run(tmp_path / "run")["status"] == "interrupted"
    assert runs.saved_in(tmp_path / "run", read_run(tmp_path / "run")["steps"]).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_the_workers_of_a_launcher_that_is_killed_end_and_give_way(world, tmp_path: Path, launcher: str):
    """In order: a checkpoint, the lock given back. A second run is refused before, and goes on after."""
    psutil = pytest.importorskip("psutil")
    output = tmp_path / "run"
    arguments = command(world, output, "--device", "cpu", "--logging-steps", "10", "--steps", "100000")
    program = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "fastunlearn", *arguments]
    killed = subprocess.Popen(program, env=os.environ | {"HF_HOME": str(tmp_path / "hf")})
    workers = []
    try:
        deadline = time.monotonic() + PATIENCE
        while not read_metrics(output) and time.monotonic() < deadline:
            time.sleep(0.2)
        workers = psutil.Process(killed.pid).children(recursive=True)
        assert refused(locked, output).owner.pid in [worker.pid for worker in workers]
        killed.kill()
        killed.wait()
        _, alive = psutil.wait_procs(workers, PATIENCE)
        assert not alive
    finally:
        killed.kill()
        killed.wait()
        for worker in workers:
            if worker.is_running():
                worker.kill()
    record = read_run(output)
    assert record["status"] == "interrupted"
    assert not (output / LOCK_FILE).exists()
    assert main([*arguments, "--steps", str(record["steps"] + 1), "--resume-from-checkpoint", "latest"]) == 0
