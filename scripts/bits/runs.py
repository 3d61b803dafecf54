"""Cases of whole runs: stopped, resumed by the tree that began them and by the other one; the command."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from contextlib import redirect_stderr
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

from fastunlearn import Unlearner

from . import parts, unlearners
from .registry import Place, add
from .unlearners import METHODS, Setting

unlearn = parts.found("unlearn", "fastunlearn.training", "fastunlearn.runs.training")
RunInterrupted = parts.found("RunInterrupted", "fastunlearn.training", "fastunlearn.runs.training")
STEPS, STOPPED_AT, SAVED_EVERY = 5, 3, 2
SETTINGS = {
    "average and scheduler": Setting(average=True, decaying=True, network={"dropout": 0.2}),
    "scaler": Setting(scaler=True),
    "micro batches of 4, two groups": Setting({"micro_batch_size": 4}, rows="floats", optimizer="groups"),
    "posterior, sgd": Setting(rows="posterior", optimizer="sgd"),
}


class Stopped(Unlearner):
    """Sends itself a signal in its third step."""

    def step(self, draws=None):
        if self.step_index + 1 == STOPPED_AT:
            os.kill(os.getpid(), signal.SIGTERM)
        return super().step(draws)


def run(unlearner: Unlearner, folder: Path, resume: str | None = None) -> dict[str, Any]:
    """The weights, numbers and files of a run."""
    options = {"checkpointing_steps": SAVED_EVERY, "show_progress": False, "resume_from_checkpoint": resume}
    unlearn(unlearner, num_steps=STEPS, output_dir=folder, **options)
    return unlearners.left_by(unlearner) | left_in(folder)


def left_in(folder: Path) -> dict[str, Any]:
    """The numbers of a run folder without its times, and the tensors of what it leaves."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{name: value for name, value in line.items() if name != "seconds"} for line in lines]
    left = sorted(folder.glob("**/checkpoint-*/*"))
    files = [file for file in left if file.suffix == ".safetensors"]
    names = [str(file.relative_to(folder)) for file in left]
    return {
        "metrics": metrics,
        "files": names,
        "tensors": {str(file.relative_to(folder)): load_file(file) for file in files},
    }


def stop(method: str, setting: Setting, folder: Path) -> None:
    """A run that a signal stops after its third step."""
    try:
        with redirect_stderr(StringIO()):  # where the run says that it was stopped
            run(unlearners.make(METHODS[method], setting, kind=Stopped), folder)
    except RunInterrupted:
        return
    raise AssertionError("the signal did not stop the run")


def whole(method: str, setting: Setting, place: Place) -> dict[str, Any]:
    return run(unlearners.make(METHODS[method], setting), folder_for(place.scratch, "whole", method, setting))


def resumed(method: str, setting: Setting, place: Place) -> dict[str, Any]:
    """Stopped and resumed by one tree; ends as if it had not been stopped."""
    folder = folder_for(place.scratch, "resumed", method, setting)
    stop(method, setting, folder)
    return ended(method, setting, folder, place)


def handed_over(method: str, setting: Setting, place: Place) -> dict[str, Any]:
    """Stopped by the old tree, and resumed by this one."""
    begun = folder_for(place.handed, "begun", method, setting)
    if place.handed == place.scratch:
        stop(method, setting, begun)
    folder = shutil.copytree(begun, folder_for(place.scratch, "handed over", method, setting))
    return ended(method, setting, folder, place)


def ended(method: str, setting: Setting, folder: Path, place: Place) -> dict[str, Any]:
    """Resumes the run in `folder`, and compares with one that was not stopped."""
    torch.manual_seed(1)  # a state that must not matter
    after = run(unlearners.make(METHODS[method], setting), folder, "latest")
    uninterrupted = run(
        unlearners.make(METHODS[method], setting), folder.parent / f"{folder.name} uninterrupted"
    )
    for name, tensor in uninterrupted["model"].items():
        if not torch.equal(tensor, after["model"][name]):
            raise AssertionError(
                f"{name}: a resumed run ended with other weights than one that was not stopped"
            )
    return after


def folder_for(root: Path, what: str, method: str, setting: Setting) -> Path:
    name = next(name for name, known in SETTINGS.items() if known is setting)
    return root / f"{what}, {method}, {name}"


# --- the command ---------------------------------------------------------------------------------------


def command(method: str, more: tuple[str, ...], place: Place) -> dict[str, Any]:
    """`python -m fastunlearn unlearn`; the old tree writes the model that both start from."""
    inputs = place.handed / "command inputs"
    if not inputs.exists():
        write_inputs(inputs)
    output = place.scratch / f"command, {method}"
    fixed = [
        "--steps",
        "2",
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--method",
        method,
        "--output",
        str(output),
    ]
    paths = [
        "--model",
        str(inputs / "model"),
        "--forget",
        str(inputs / "forget.npy"),
        "--retain",
        str(inputs / "retain.npy"),
    ]
    asked = [sys.executable, "-P", "-m", "fastunlearn", "unlearn", *paths, *fixed, *more]
    answer = subprocess.run(asked, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"the command ended with {answer.returncode}: {answer.stderr[-2000:]}")
    left = left_in(output)
    # The state of a fresh process's generator is the machine's: no step of these methods reads it.
    left["tensors"] = {
        name: file for name, file in left["tensors"].items() if not name.endswith("random.safetensors")
    }
    return {"model": load_file(output / "model/unet/diffusion_pytorch_model.safetensors")} | left


def write_inputs(folder: Path) -> None:
    import diffusers

    unet = unlearners.diffusers_network()
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler(num_train_timesteps=20)).save_pretrained(
        folder / "model"
    )
    np.save(folder / "forget.npy", parts.byte_images(2, 1).numpy())
    np.save(folder / "retain.npy", parts.byte_images(20, 2).numpy())


for setting_name, setting in SETTINGS.items():
    for method in ("retrack", "siss", "erasediff"):
        for case in (whole, resumed, handed_over):
            quick = (method, setting_name) == ("retrack", "average and scheduler")
            add(
                "runs",
                f"{case.__name__}, {method}, {setting_name}",
                partial(case, method, setting),
                quick=quick,
            )
add(
    "command",
    "unlearn, retrack",
    partial(command, "retrack", ("--k", "3", "--use_ema", "--lr_scheduler", "cosine")),
    quick=False,
)
add("command", "unlearn, siss", partial(command, "siss", ("--checkpointing_steps", "1")), quick=False)
