"""The commands, in one process on a tiny network; exit codes and imports in processes of their own."""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import get_args, get_type_hints

import numpy as np
import pytest
import runs
import torch
from locks import held_elsewhere
from PIL import Image
from safetensors.torch import load_file

from fastunlearn import __version__, nearest_neighbors
from fastunlearn.cli import main
from fastunlearn.data import load_images
from fastunlearn.host import disk
from fastunlearn.host.folder_lock import locked, locked_file
from fastunlearn.host.kept import KeptRows
from fastunlearn.host.store import ImageStore
from fastunlearn.methods import EraseDiffBome, ReTrack
from fastunlearn.models import load_checkpoint, save_checkpoint
from fastunlearn.recipes.mnist_tshirt import PRETRAINING
from fastunlearn.runs.lineage import LINEAGE_KEY
from fastunlearn.testing.checkpoints import TINY_SHAPE, save_tiny_checkpoint

pytest.importorskip("tyro")
COMMANDS = ("demo", "unlearn", "evaluate", "sample", "neighbors", "pretrain", "data", "purge")
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
FAST = ("--steps", "2", "--batch-size", "4", "--device", "cpu", "--seed", "0")
METHODS = {
    "retrack": ["--k", "3"],
    "siss": ["--variant", "bernoulli"],
    "erasediff": ["--eta", "0.01"],
    "neggrad": ["--superfactor", "2"],
    "vanilla": [],
    "dpo": ["--beta", "500"],
    "kto": ["--z0", "zero"],
    "npo": ["--retain_weight", "0.5"],
}


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> SimpleNamespace:
    """A checkpoint, two images to forget as PNG, twenty to keep as npy."""
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    (root / "forget").mkdir()
    forget = generator.integers(0, 256, (2, 8, 8), dtype=np.uint8)
    for row, image in enumerate(forget):
        Image.fromarray(image).save(root / "forget" / f"{row}.png")
    np.save(root / "retain.npy", generator.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    return SimpleNamespace(
        model=save_tiny_checkpoint(root / "model"),
        forget=root / "forget",
        retain=root / "retain.npy",
        images=forget,
    )


@pytest.fixture(autouse=True)
def prepared(monkeypatch) -> list[str]:
    """Stands in for the setting of malloc, which would outlive the test; one entry a call."""
    calls: list[str] = []
    monkeypatch.setattr("fastunlearn.host.memory.keep_freed_memory", lambda: calls.append("kept"))
    return calls


def run(*arguments: object) -> int:
    return main([str(argument) for argument in arguments])


def unlearn(world, output: Path, *more: object, method: str = "retrack") -> int:
    """`fastunlearn unlearn` for two steps with ReTrack's k = 3, or whatever `more` says last."""
    paths = ("--model", world.model, "--forget", world.forget, "--retain", world.retain, "--output", output)
    return run("unlearn", *paths, "--method", method, *FAST, *METHODS[method], *more)


def weights(output: Path) -> dict[str, torch.Tensor]:
    return load_file(output / "model" / WEIGHTS)


def assert_same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# --- unlearn


@pytest.mark.parametrize("method", METHODS)
def test_every_method_writes_a_model_that_diffusers_opens(world, tmp_path, capsys, method):
    assert unlearn(world, tmp_path / "run", method=method) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"unlearned model: {tmp_path / 'run' / 'model'}"
    from diffusers import DDPMPipeline

    before = load_file(world.model / WEIGHTS)
    after = dict(DDPMPipeline.from_pretrained(tmp_path / "run" / "model").unet.state_dict())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert [
        json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ] == [1, 2]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["status"], record["method"]["name"].lower(), record["batch_size"]) == (
        "complete",
        method,
        4,
    )


WITHOUT_EFFECT = {
    "k": ("retrack", ["--weights", "importance", "--k", "3"]),
    "eta": ("erasediff_bome", ["--lambda_bome", "0.1", "--eta", "3.0"]),
    "rule": ("erasediff_bome", ["--lambda_bome", "0", "--rule", "norm"]),
}


@pytest.mark.parametrize("flag", WITHOUT_EFFECT)
def test_a_flag_that_changes_nothing_beside_the_others_is_refused(world, tmp_path, capsys, flag):
    method, flags = WITHOUT_EFFECT[flag]
    paths = "--model", world.model, "--forget", world.forget, "--retain", world.retain
    assert run("unlearn", *paths, "--method", method, "--output", tmp_path / "run", *FAST, *flags) == 2
    expected = f"error: --{flag}: expected none where it changes nothing, got {flags[-1]} for "
    assert capsys.readouterr().err.startswith(expected)


def test_flags_that_change_something_are_taken():
    assert ReTrack(k=3).without_effect == EraseDiffBome(eta=3.0, rule="norm").without_effect == frozenset()


def test_images_of_both_sets_are_refused_with_the_flags_that_help(world, tmp_path, capsys):
    rows = np.load(world.retain)
    np.save(tmp_path / "forget.npy", rows[:1])
    assert unlearn(world, tmp_path / "run", "--forget", tmp_path / "forget.npy") == 2
    expected = r"--drop_overlap leaves them out of --retain, --allow_overlap keeps them there"
    assert expected in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("flags", "chosen"),
    [
        (("--superfactor", "30"), {"superfactor": 30.0, "scaling_norm": None}),
        (("--scaling", "ratio"), {"scaling": "ratio", "scaling_norm": 0.1}),
        (("--scaling", "clip", "--scaling-norm", "2"), {"scaling": "clip", "scaling_norm": 2.0}),
    ],
    ids=str,
)
def test_siss_is_scaled_as_it_is_told(world, tmp_path, flags, chosen):
    assert unlearn(world, tmp_path / "run", *flags, method="siss") == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert chosen.items() <= record["method"].items()


def test_a_scaling_beside_a_superfactor_is_refused(world, tmp_path, capsys):
    assert unlearn(world, tmp_path / "run", "--superfactor", "3", "--scaling-norm", "5", method="siss") == 2
    assert "scaling_norm: expected None with a superfactor" in capsys.readouterr().err.replace("-", "_")


def test_sets_that_a_method_does_not_read_may_be_left_out(world, tmp_path):
    assert (
        run(
            "unlearn",
            "--model",
            world.model,
            "--forget",
            world.forget,
            "--method",
            "neggrad",
            "--output",
            tmp_path / "a",
            *FAST,
        )
        == 0
    )
    assert (
        run(
            "unlearn",
            "--model",
            world.model,
            "--retain",
            world.retain,
            "--method",
            "vanilla",
            "--output",
            tmp_path / "b",
            *FAST,
        )
        == 0
    )


def test_the_seed_decides_and_flags_have_two_names(world, tmp_path):
    unlearn(world, tmp_path / "a", "--learning_rate", "1e-4", "--seed", "1")
    unlearn(world, tmp_path / "b", "--lr", "1e-4", "--seed", "1")
    unlearn(world, tmp_path / "c", "--learning-rate", "1e-4", "--seed", "2")
    assert_same(weights(tmp_path / "a"), weights(tmp_path / "b"))
    assert not torch.equal(
        weights(tmp_path / "a")["conv_in.weight"], weights(tmp_path / "c")["conv_in.weight"]
    )


def test_a_resumed_run_equals_one_that_was_not_stopped(world, tmp_path):
    schedule = (
        "--lr_scheduler",
        "cosine",
        "--lr_warmup_steps",
        "1",
        "--use_ema",
        "--checkpointing_steps",
        "2",
        "--steps",
        "4",
    )
    unlearn(world, tmp_path / "whole", *schedule)
    half_done(world, tmp_path / "resumed", *schedule)
    torch.manual_seed(1)  # a state that must not matter
    assert unlearn(world, tmp_path / "resumed", *schedule, "--resume_from_checkpoint", "latest") == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "resumed"))


def half_done(world, output: Path, *more: object) -> Path:
    """What a run leaves that was killed after its second step of four."""
    arguments = ("--checkpointing_steps", "2", "--steps", "4", *more)
    with pytest.warns(UserWarning, match="keep_checkpoints"):
        assert unlearn(world, output, *arguments, "--keep_checkpoints") == 0
    return runs.unfinish(output, 2)


def changed_model(world, folder: Path, **settings: object) -> Path:
    """The checkpoint of `world` with other settings of its scheduler."""
    shutil.copytree(world.model, folder)
    file = folder / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))
    return folder


@pytest.mark.parametrize("kind", ["latents", "labels"])
@pytest.mark.parametrize("command", ["unlearn", "evaluate"])
def test_what_is_no_network_of_pictures_alone_is_refused_before_a_picture_is_read(
    world, tmp_path, capsys, monkeypatch, command, kind
):
    monkeypatch.setattr("fastunlearn.data.load_images", None)  # nor is a neighbour looked for
    model = Path(shutil.copytree(world.model, tmp_path / "model"))
    file = model / ("model_index.json" if kind == "latents" else "unet/config.json")
    entry = {"vqvae": ["diffusers", "VQModel"]} if kind == "latents" else {"num_class_embeds": 10}
    file.write_text(json.dumps(json.loads(file.read_text()) | entry))
    arguments = ["--model", model, "--forget", world.forget, "--retain", world.retain]
    if command == "unlearn":
        arguments += ["--method", "retrack"]
    assert run(command, *arguments, "--output", tmp_path / "out") == 2
    named = "works on the latents of its vqvae" if kind == "latents" else "num_class_embeds: null"
    assert named in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_is_not_resumed_from_another_model(world, tmp_path, capsys):
    output = half_done(world, tmp_path / "run")
    record = (output / "run.json").read_text()
    others = {
        "start_weights": save_tiny_checkpoint(tmp_path / "other", seed=1),
        "prediction_type": changed_model(world, tmp_path / "v", prediction_type="v_prediction"),
        "beta_end": changed_model(world, tmp_path / "beta", beta_end=0.03),
        "clip_sample": changed_model(world, tmp_path / "clip", clip_sample=False),
        "name": changed_model(world, tmp_path / "class", _class_name="DDIMScheduler"),
    }
    both = {
        "prediction_type": ("'v_prediction'", "'epsilon'"),
        "beta_end": ("0.03", "0.02"),
        "name": ("'DDIMScheduler'", "'DDPMScheduler'"),
    }
    for name, model in others.items():
        arguments = ("--steps", "4", "--resume_from_checkpoint", "latest", "--model", model)
        assert unlearn(world, output, *arguments) == 2
        shown = capsys.readouterr().err
        assert "resume_from_checkpoint: expected a checkpoint of a run with" in shown
        assert all(word in shown for word in (name, *both.get(name, ()))), shown
        assert (output / "run.json").read_text() == record
        assert not (output / "model").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--lr", "1e-4"), ("another with --learning_rate (0.0001 here, 5e-05 there)",)),
        (("--lr_scheduler", "cosine"), ("--lr_scheduler {'name': 'LambdaLR', ...}, got None",)),
        (("--max_grad_norm", "2"), ("--max_grad_norm 2.0, got 1.0",)),
        (("--mixed_precision", "bf16"), ("--mixed_precision ('torch.bfloat16' here, None there)",)),
        (("--allow_tf32",), ("--allow_tf32 products ('tf32' here, 'none' there)",)),
        (("--lambda", "0.1"), ("--lambda (0.1 here, 0.005 there)",)),
        (("--seed", "1"), ("a run with this --seed, got another",)),
        (("--batch-size", "6"), ("--train_batch_size 6, got 4",)),
        (("--use_ema",), ("expected the state of ['ema']",)),
        (("--adam_beta1", "0.9"), ("--adam_beta1 (0.9 here, 0.95 there)",)),
    ],
    ids=lambda value: value[0] if value[0].startswith("--") else "",
)
def test_a_run_is_not_resumed_with_other_flags(world, tmp_path, capsys, flags, words):
    output = half_done(world, tmp_path / "run")
    assert unlearn(world, output, "--steps", "4", "--resume_from_checkpoint", "latest", *flags) == 2
    shown = capsys.readouterr().err
    assert all(word in shown for word in words), shown


def test_a_model_that_has_moved_is_the_same_and_the_record_stays(world, tmp_path):
    output = half_done(world, tmp_path / "run", "--lr_warmup_steps", "1")
    moved = shutil.copytree(world.model, tmp_path / "moved")
    changed = (
        "--micro_batch_size",
        "3",
        "--checkpointing_steps",
        "3",
        "--logging_steps",
        "2",
        "--channels_last",
        "on",
    )
    arguments = (
        "--lr_warmup_steps",
        "1",
        "--steps",
        "5",
        "--resume_from_checkpoint",
        "latest",
        "--model",
        moved,
    )
    assert unlearn(world, output, *arguments, *changed) == 0
    record = json.loads((output / "run.json").read_text())
    assert (record["base_model"], record["steps"]) == (str(world.model), 5)
    assert [(entry["step"], entry["base_model"]) for entry in record["resumed"]] == [(2, str(moved))]


def test_micro_batches_and_mixed_precision(world, tmp_path):
    unlearn(world, tmp_path / "whole", "--micro_batch_size", "8")
    unlearn(world, tmp_path / "parts", "--micro-batch-size", "3")
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    # two steps of at most 5e-5 each
    assert max((whole[name] - parts[name]).abs().max() for name in whole) < 1e-4
    assert unlearn(world, tmp_path / "bf16", "--mixed_precision", "bf16") == 0
    assert weights(tmp_path / "bf16")["conv_in.weight"].dtype == torch.float32


def started(monkeypatch, world, output: Path, *more: object) -> tuple[object, str]:
    """The Unlearner that a command makes, and the precision of float32 products on GPUs while it runs.

    No step is taken.
    """
    seen = []

    def unlearn_nothing(unlearner, **options):
        seen.append((unlearner, torch.backends.cuda.matmul.fp32_precision))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunlearn.runs.training.unlearn", unlearn_nothing)
    assert unlearn(world, output, *more) == 130
    ((unlearner, precision),) = seen
    return unlearner, precision


def test_on_a_cpu_auto_is_float32_contiguous_uncompiled_and_keeps_memory(
    monkeypatch, world, tmp_path, prepared
):
    unlearner, precision = started(monkeypatch, world, tmp_path / "run")
    weight = unlearner.model.conv_out.weight
    assert (unlearner.autocast_dtype, unlearner.grad_scaler, unlearner.compile) == (None, None, False)
    assert weight.is_contiguous()
    assert not weight.is_contiguous(memory_format=torch.channels_last)
    assert precision == "none"  # torch's default, untouched
    assert prepared == ["kept"]


@pytest.mark.parametrize(
    ("flag", "dtype", "scaled"),
    [("no", None, False), ("bf16", torch.bfloat16, False), ("fp16", torch.float16, True)],
)
def test_mixed_precision_decides_dtype_and_scaler(monkeypatch, world, tmp_path, flag, dtype, scaled):
    unlearner, _ = started(monkeypatch, world, tmp_path / "run", "--mixed_precision", flag)
    assert (unlearner.autocast_dtype, unlearner.grad_scaler is not None) == (dtype, scaled)


def test_execution_flags_reach_the_run(monkeypatch, world, tmp_path):
    before = torch.backends.cuda.matmul.fp32_precision
    unlearner, precision = started(
        monkeypatch, world, tmp_path / "run", "--channels_last", "on", "--allow_tf32", "--compile", "try"
    )
    assert unlearner.model.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert unlearner.compile == "try"
    assert precision == "tf32"
    assert torch.backends.cuda.matmul.fp32_precision == before
    unlearner, precision = started(
        monkeypatch, world, tmp_path / "run", "--channels-last", "off", "--compile", "on"
    )
    assert not unlearner.model.conv_out.weight.is_contiguous(memory_format=torch.channels_last)
    assert unlearner.compile is True


def test_auto_on_a_gpu(monkeypatch):
    """As far as it can be seen without one: what is handed to the library."""
    from fastunlearn.cli.unlearn_flags import Execution

    monkeypatch.setattr(
        "fastunlearn.host.precision.resolve_autocast", lambda requested, device: (requested, device)
    )
    device, execution = torch.device("cuda", 1), Execution()
    assert execution.autocast_dtype(device) == ("auto", device)
    assert execution.memory_format(device) is torch.channels_last
    assert execution.compile_argument is None


def test_nothing_shows_or_stores_a_forget_image_unless_asked(world, tmp_path):
    run_dir = tmp_path / "run"
    unlearn(world, run_dir)
    assert sorted(path.name for path in (run_dir / "private").iterdir()) == [LINEAGE_KEY, "record.json"]
    assert not [path for path in run_dir.rglob("*") if path.suffix in (".png", ".html", ".npy", ".npz")]
    for path in run_dir.rglob("*"):
        assert not path.is_file() or not any(
            image.tobytes() in path.read_bytes() for image in world.images
        ), path


def test_report_images_and_purge(world, tmp_path, capsys):
    run_dir = tmp_path / "run"
    unlearn(world, run_dir, "--report_images")
    picture = run_dir / "private" / "reconstructions.png"
    assert Image.open(picture).size[0] > 8
    assert stat.S_IMODE(picture.stat().st_mode) == 0o600
    assert run("purge", run_dir) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"2 files removed: {run_dir}"
    assert [path.name for path in (run_dir / "private").iterdir()] == [LINEAGE_KEY]
    assert (run_dir / "model" / WEIGHTS).is_file()


WRONG_UNLEARN = [
    (
        "a flag of another method",
        ["--eta", "0.1"],
        r"--eta: expected --k, --lambd, --weights, --within_condition with --method retrack, got --eta 0.1, "
        "a flag of erasediff",
    ),
    (
        "a shared flag elsewhere",
        ["--method", "vanilla", "--lambd", "0.1"],
        r"expected no such flag with --method vanilla, got --.*a flag of",
    ),
    ("k too large", ["--k", "21"], r"k: expected an integer in \[1, 20\] \(the rows of retain\), got 21"),
    ("lambda outside", ["--lambda", "1.5"], r"--lambda: expected a finite number in \[0, 1\], got 1.5"),
    ("no batch", ["--batch-size", "0"], r"--train_batch_size: expected an integer in .*, got 0"),
    ("no learning rate", ["--lr", "-1"], r"learning_rate: expected a finite number in .*, got -1.0"),
    ("the first beta of 1", ["--adam_beta1", "1"], r"adam_beta1: expected a number in \[0, 1\), got 1"),
    ("a batch", ["--batch-size", str(10**11)], r"--train_batch_size: expected an integer in \[1, 4294967296"),
    ("beta", ["--adam_beta1", "1.5"], r"adam_beta1: expected a finite number in \[0, 1\], got 1.5"),
    (
        "beta of 1",
        ["--adam_beta2", "1"],
        r"adam_beta2: expected a number in \[0, 1\), got 1: the average would never move",
    ),
    ("no steps", ["--steps", "0"], r"max_train_steps: expected an integer >= 1, got 0"),
    (
        "all warm-up",
        ["--lr_warmup_steps", "2"],
        r"lr_warmup_steps: expected an integer in \[0, 1\] \(max_train_steps - 1\), got 2",
    ),
    (
        "no checkpoint",
        ["--resume_from_checkpoint", "nowhere"],
        r"resume_from_checkpoint: expected 'latest' or the folder of a checkpoint, got 'nowhere'",
    ),
    (
        "no model",
        ["--model", "nowhere"],
        r"nowhere: expected a folder of DDPMPipeline.save_pretrained.*, got a path that does not exist",
    ),
    ("no data", ["--forget", "nowhere.npy"], r"nowhere.npy: expected .*, got a path that does not exist"),
    ("no forget set", ["--forget"], r"--forget: expected at least one path with --method retrack, got none"),
    ("no device to run on", ["--device", "meta"], r"--device: expected cpu.*, got 'meta'"),
    ("no device", ["--device", "tpu9"], r"--device: expected cpu.*, got 'tpu9'"),
]


@pytest.mark.parametrize(
    ("arguments", "message"), [case[1:] for case in WRONG_UNLEARN], ids=[case[0] for case in WRONG_UNLEARN]
)
def test_wrong_input_is_one_line_and_code_2(world, tmp_path, capsys, arguments, message):
    assert unlearn(world, tmp_path / "run", *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert re.search(message, error)


def test_overlap_is_refused_unless_allowed(world, tmp_path, capsys):
    both = ("--retain", world.retain, world.forget / "1.png")
    assert unlearn(world, tmp_path / "run", *both) == 2
    assert (
        "forget: expected images that are not in retain, got 1 that are (rows 1)" in capsys.readouterr().err
    )
    assert unlearn(world, tmp_path / "run", *both, "--allow_overlap") == 0


def test_the_retain_set_may_be_the_whole_training_set(world, tmp_path, capsys):
    """`--drop_overlap` takes the forget images out of it, every copy of them, and the run is the one without
    them.
    """
    again = shutil.copy(world.forget / "1.png", tmp_path / "again.png")
    whole = ("--retain", world.forget / "1.png", world.retain, again)
    assert unlearn(world, tmp_path / "whole", *whole, "--drop_overlap") == 0
    assert "(2 dropped, which are to be forgotten)" in capsys.readouterr().out
    assert unlearn(world, tmp_path / "clean") == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "clean"))


def test_a_training_set_on_disk_stays_there(world, tmp_path, monkeypatch):
    """`--drop_overlap` does not copy what is left of it, and the run is the one of the set in memory."""
    rows = np.concatenate([world.images[:, None], np.load(world.retain)])
    np.save(tmp_path / "whole.npy", rows)
    np.savez(tmp_path / "whole.npz", images=rows)
    in_memory = ("--retain", tmp_path / "whole.npz", "--drop_overlap")
    assert unlearn(world, tmp_path / "in_memory", *in_memory) == 0

    most, read = [], ImageStore.raw
    monkeypatch.setattr(ImageStore, "raw", lambda store, index: most.append(len(index)) or read(store, index))
    monkeypatch.setattr(KeptRows.chunks, "__defaults__", (4 * 64,))
    monkeypatch.setattr("fastunlearn.host.store.DIGEST_BYTES", 4 * 64)
    on_disk = ("--retain", tmp_path / "whole.npy", "--drop_overlap", "--drop_within", "off")
    assert unlearn(world, tmp_path / "on_disk", *on_disk) == 0
    assert max(most) <= 6  # a chunk, or the neighbours of both images
    assert_same(weights(tmp_path / "on_disk"), weights(tmp_path / "in_memory"))


def test_arrays_of_another_size_are_refused(world, tmp_path, capsys):
    np.save(tmp_path / "large.npy", np.zeros((3, 1, 9, 9), np.uint8))
    assert unlearn(world, tmp_path / "run", "--retain", tmp_path / "large.npy") == 2
    assert (
        "large.npy: expected images of 8 x 8 (arrays are not resized), got shape [3, 1, 9, 9]"
        in capsys.readouterr().err
    )


def test_image_files_are_made_to_fit(world, tmp_path):
    Image.new("RGB", (20, 10), (200, 100, 50)).save(tmp_path / "photo.jpg")
    assert unlearn(world, tmp_path / "run", "--forget", tmp_path / "photo.jpg") == 0
    assert json.loads((tmp_path / "run" / "run.json").read_text())["data"]["forget"]["shape"] == list(
        TINY_SHAPE
    )


@pytest.fixture
def photos(world, tmp_path) -> Path:
    """Two photos, one of them wide, transparent and named after a person, and what a file manager left."""
    folder = tmp_path / "photos"
    shutil.copytree(world.forget, folder)
    Image.new("RGBA", (20, 10), (200, 100, 50, 0)).save(folder / "jane-doe.png")
    (folder / ".DS_Store").write_bytes(b"x")
    (folder / "1.png").unlink()
    return folder


DEFAULTS = {"exif": "apply", "crop": "center", "resample": "bilinear", "alpha": "refuse"}
CHANGED = {"exif": "ignore", "crop": "stretch", "resample": "lanczos", "alpha": "white"}
CHANGED_FLAGS = [part for name, value in CHANGED.items() for part in (f"--{name}", value)]


def test_what_was_read_is_printed_and_recorded_without_names(world, tmp_path, capsys, photos):
    assert unlearn(world, tmp_path / "run", "--forget", photos, *CHANGED_FLAGS) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"forget: 2 rows from 2 files; passed over 1 file: {photos / '.DS_Store'}" in lines
    assert "retain: 20 rows from 1 file" in lines
    text = (tmp_path / "run" / "run.json").read_text()
    options = {"size": [8, 8], "channels": 1} | CHANGED
    counts = {"rows": 2, "files": 2, "passed_over": 1, "folders_entered_before": 0}
    read = json.loads(text)["images"]
    assert read["forget"] == counts | {"options": options}
    assert read["retain"] == counts | {"rows": 20, "files": 1, "passed_over": 0, "options": options}
    assert "jane-doe" not in text


def test_what_becomes_of_pictures_is_recorded_where_nothing_was_asked_for(world, tmp_path):
    assert unlearn(world, tmp_path / "run") == 0
    read = json.loads((tmp_path / "run" / "run.json").read_text())["images"]
    options = {"size": [8, 8], "channels": 1} | DEFAULTS
    assert read["forget"]["options"] == read["retain"]["options"] == options


def test_the_flags_of_pictures_reach_the_rows(monkeypatch, world, tmp_path, photos):
    unlearner, _ = started(monkeypatch, world, tmp_path / "run", "--forget", photos, *CHANGED_FLAGS)
    expected = load_images(photos, size=8, channels=1, tell=lambda reading: None, **CHANGED)
    assert torch.equal(unlearner.forget.images, expected.images)


def test_the_array_of_an_archive_is_named(monkeypatch, world, tmp_path, photos):
    """The other set may be one of image files, which have no names."""
    rows = np.load(world.retain)
    np.savez(tmp_path / "two.npz", x_train=rows, x_test=rows[:2])
    flags = "--forget", photos, "--retain", tmp_path / "two.npz", "--npz_key", "x_train"
    unlearner, _ = started(monkeypatch, world, tmp_path / "run", *flags, *CHANGED_FLAGS)
    assert len(unlearner.retain.images) == len(rows)


def test_a_forget_set_does_not_shrink(world, tmp_path, capsys, photos):
    (photos / "a.heic").write_bytes(b"\0\0\0\x18ftypheic" + bytes(40))
    (photos / "notes.txt").write_text("notes")
    assert unlearn(world, tmp_path / "run", "--forget", photos) == 2
    error = capsys.readouterr().err
    expected = "expected files that can all be read, got 3 of 4 that cannot:\n"
    assert error.startswith(f"error: {photos}: {expected}")
    named = [line.split(":")[0].split("/")[-1] for line in error.splitlines()[1:]]
    assert named == ["a.heic", "jane-doe.png", "notes.txt"]
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_saved_is_said_before_the_work(world, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model").write_text("mine")
    assert unlearn(world, tmp_path / "run") == 2
    assert (
        "expected a new or empty folder, or a saved pipeline to replace, got a file"
        in capsys.readouterr().err
    )
    assert not (tmp_path / "run" / "private").exists()


def test_a_finished_run_is_not_overwritten(world, tmp_path, capsys):
    assert unlearn(world, tmp_path / "run") == 0
    kept = weights(tmp_path / "run")
    assert unlearn(world, tmp_path / "run", "--seed", "3") == 2
    assert "--output: expected a folder without a finished run for a new one" in capsys.readouterr().err
    assert_same(weights(tmp_path / "run"), kept)


def test_a_run_that_skips_most_steps_fails_and_writes_no_model(world, tmp_path, capsys):
    """The learning rate sends the weights to where every loss overflows."""
    assert unlearn(world, tmp_path / "run", "--lr", "1e30", "--steps", "10", method="neggrad") == 1
    error = capsys.readouterr().err
    limit = r"\(max_skipped_share=0.5 of 10 steps\); no checkpoint was written yet"
    assert re.match(rf"error: \d of \d steps had a loss or gradient that is not finite {limit}", error)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["status"] == "failed: TooManySkippedSteps"
    assert not (tmp_path / "run" / "model").exists()
    assert not list((tmp_path / "run").rglob("checkpoint-*"))
    stricter = ("--lr", "1e30", "--steps", "10", "--max_skipped_steps", "0")
    assert unlearn(world, tmp_path / "few", *stricter, method="neggrad") == 1
    assert "(max_skipped_steps=0)" in capsys.readouterr().err


WRITERS = {  # command: what it writes there, how that is locked, and what else it is told
    "unlearn": ("run", locked, ["--model", "MODEL", "--forget", "FORGET", "--method", "neggrad", *FAST]),
    "evaluate": ("out", locked, ["--model", "MODEL", "--forget", "FORGET", "--metrics", "frequency"]),
    "demo": ("demo", locked, []),
    "sample": ("samples.npz", locked_file, ["--model", "MODEL", "--num_images", "1"]),
    "neighbors": ("near.npz", locked_file, ["--forget", "FORGET", "--retain", "RETAIN", "--k", "1"]),
    "pretrain": ("model", locked, ["--recipe", "mnist-tshirt-small", "--data", "RETAIN"]),
    "data": ("set.npz", locked_file, ["mnist-tshirt", "--mnist", "MODEL", "--fashion_mnist", "MODEL"]),
}


@pytest.mark.parametrize("command", [*WRITERS, "sample into a folder", "purge"])
def test_every_command_that_writes_refuses_what_another_run_writes_to(world, tmp_path, capsys, command):
    if command == "purge":
        arguments, lock, target = ["purge", tmp_path], locked, tmp_path
    else:
        command, _, folder = command.partition(" into ")
        name, lock, more = WRITERS[command]
        paths = {"MODEL": world.model, "FORGET": world.forget, "RETAIN": world.retain}
        output = tmp_path if folder else tmp_path / name
        arguments = [command, *(paths.get(word, word) for word in more), "--output", output]
        target = tmp_path / (f"{name}.run" if command == "pretrain" else name)
    with held_elsewhere(lock, target):
        before = sorted(tmp_path.rglob("*"))
        assert run(*arguments) == 1
        assert sorted(tmp_path.rglob("*")) == before
    error = capsys.readouterr().err
    refusal = f"error: {target}: expected a place that no other run writes to, got one held by process"
    assert error.startswith(f"{refusal} {os.getpid()} on ")
    assert error.count("\n") == 1


def test_every_command_is_among_them():
    assert {*WRITERS, "purge"} == set(COMMANDS)


def test_a_place_that_cannot_be_written_to_is_named(world, tmp_path, capsys):
    (tmp_path / "file").write_text("mine")
    for output in (tmp_path / "file", tmp_path / "file" / "run"):
        assert unlearn(world, output) == 2
        assert f"{output}: expected a place that can be written to, got: " in capsys.readouterr().err


def test_a_last_step_that_destroys_the_network_is_seen(world, tmp_path, capsys):
    output = tmp_path / "run"
    assert unlearn(world, output, "--lr", "1e30", "--steps", "1", method="neggrad") == 1
    assert "after its last step, got NaN or Inf; no model is written" in capsys.readouterr().err
    assert not (output / "model").exists()
    assert json.loads((output / "run.json").read_text())["status"] == "failed: WeightsNotFinite"


@pytest.mark.parametrize("command", ["unlearn", "evaluate", "neighbors", "pretrain"])
@pytest.mark.parametrize("linked", [False, True])
def test_nothing_is_written_among_the_images_that_are_read(world, tmp_path, capsys, command, linked):
    folder, output = tmp_path / "images", tmp_path / "images" / "out.npz"
    shutil.copytree(world.forget, folder)
    if linked:
        (tmp_path / "link").symlink_to(folder)
        output = tmp_path / "link" / "out.npz"
    sets = ("--forget", folder, "--retain", world.retain, "--output", output)
    arguments = {
        "unlearn": ("--model", world.model, "--method", "retrack", *FAST, *sets),
        "evaluate": ("--model", world.model, *sets),
        "neighbors": sets,
        "pretrain": ("--recipe", "mnist-tshirt-small", "--data", folder, "--output", output),
    }
    before = sorted(folder.iterdir())
    assert run(command, *arguments[command]) == 2
    flag = "data" if command == "pretrain" else "forget"
    expected = f"output: expected a place outside of the folders in --{flag}"
    assert f"error: {expected}, got {output}, which is in {folder}\n" in capsys.readouterr().err
    assert sorted(folder.iterdir()) == before


def test_an_output_behind_a_link_among_the_images_is_refused(world, tmp_path, capsys):
    """Links to folders are followed when a folder is read."""
    folder, elsewhere = tmp_path / "images", tmp_path / "elsewhere"
    shutil.copytree(world.forget, folder)
    elsewhere.mkdir()
    (folder / "link").symlink_to(elsewhere)
    for output in (elsewhere / "run", elsewhere):
        assert unlearn(world, output, "--forget", folder) == 2
        refused = f"output: expected a place outside of the folders in --forget, got {output}, which is in"
        assert refused in capsys.readouterr().err
    assert list(elsewhere.iterdir()) == []


@pytest.mark.parametrize("linked", [False, True])
def test_images_inside_of_the_output_are_refused(world, tmp_path, capsys, linked):
    output, forget = tmp_path / "run", tmp_path / "run" / "private" / "forget"
    shutil.copytree(world.forget, forget)
    if linked:
        (tmp_path / "link").symlink_to(forget)
        forget = tmp_path / "link"
    assert unlearn(world, output, "--forget", forget) == 2
    refused = f"error: --forget: expected paths outside of --output, {output}, got {forget}\n"
    assert refused in capsys.readouterr().err


def test_a_model_is_not_replaced_by_the_one_that_is_made_of_it(world, tmp_path, capsys):
    shutil.copytree(world.model, tmp_path / "run" / "model")
    assert unlearn(world, tmp_path / "run", "--model", tmp_path / "run" / "model") == 2
    assert "error: --model: expected paths outside of --output" in capsys.readouterr().err


def test_a_file_that_is_read_is_not_written(world, tmp_path, capsys):
    np.savez(tmp_path / "retain.npz", images=np.load(world.retain))
    (tmp_path / "link.npz").symlink_to(tmp_path / "retain.npz")
    before = (tmp_path / "retain.npz").read_bytes()
    for output in (tmp_path / "retain.npz", tmp_path / "link.npz"):
        sets = ("--forget", world.forget, "--retain", tmp_path / "retain.npz")
        assert run("neighbors", *sets, "--output", output) == 2
        assert "output: expected another file than those of --retain" in capsys.readouterr().err
    assert (tmp_path / "retain.npz").read_bytes() == before


def nothing_is_read(monkeypatch) -> None:
    def read(*arguments, **options):
        raise AssertionError("something was read")

    monkeypatch.setattr("fastunlearn.data.load_images", read)
    monkeypatch.setattr("fastunlearn.models.load_checkpoint", read)
    monkeypatch.setattr("fastunlearn.demo.load_model", read)
    monkeypatch.setattr("fastunlearn.recipes.mnist_tshirt.read_split", read)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--within_condition", "True"], "--within_condition: expected another value"),
        (["--target", "other_condition"], "--target: expected another value (it compares labels"),
        (["--checkpointing_steps", "0"], "--checkpointing_steps: expected an integer >= 1, got 0"),
        (["--checkpoints_total_limit", "0"], "--checkpoints_total_limit: expected an integer >= 1, got 0"),
        (["--logging_steps", "0"], "--logging_steps: expected an integer >= 1, got 0"),
        (["--max_skipped_steps", "-1"], "--max_skipped_steps: expected an integer >= 0, got -1"),
        (["--max_skipped_share", "2"], "--max_skipped_share: expected a finite number in [0, 1], got 2.0"),
        (["--report_to", "wandb"], "report_to: expected an installed tracker, got 'wandb'"),
        (["--batch-size", "0"], "--train_batch_size: expected an integer in [1, 4294967296]"),
        (["--batch-size", str(10**11)], "--train_batch_size: expected an integer in [1, 4294967296]"),
        (["--seed", "-1"], "--seed: expected an integer in [0, "),
        (["--micro-batch-size", "0"], "--micro_batch_size: expected an integer >= 1, got 0"),
        (["--lr", "0"], "--learning_rate: expected a finite number in (0, inf), got 0.0"),
        (
            ["--resume_from_checkpoint", "nowhere"],
            "--resume_from_checkpoint: expected 'latest' or the folder",
        ),
    ],
)
def test_flags_are_refused_before_anything_is_read(world, tmp_path, capsys, monkeypatch, flags, message):
    method = "erasediff_bome" if "--target" in flags else "retrack"
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    nothing_is_read(monkeypatch)
    paths = ("--model", world.model, "--forget", world.forget, "--retain", world.retain)
    output = ("--output", tmp_path / "run")
    assert run("unlearn", *paths, *output, "--device", "cpu", "--method", method, *flags) == 2
    assert f"error: {message}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_the_list_of_commands_is_in_whole_sentences(capsys):
    from fastunlearn.cli.demo import Demo
    from fastunlearn.cli.neighbors import Neighbors
    from fastunlearn.cli.purge import Purge

    with pytest.raises(SystemExit):
        run("--help")
    text = " ".join(re.sub("[│•]", " ", capsys.readouterr().out).split())
    for command in (Demo, Neighbors, Purge):
        assert " ".join(command.__doc__.split("\n\n")[0].split()) in text
    assert "75 stopped by --max_time, 128 + N stopped by signal N" in text


def test_no_run_lies_where_purge_would_remove_it(world, tmp_path, capsys):
    (tmp_path / "private").mkdir()
    (tmp_path / "run.json").touch()
    output = tmp_path / "private" / "another"
    assert unlearn(world, output) == 2
    folder = tmp_path / "private"
    expected = f"--output: expected a place outside of {folder}, which purge empties, got {output}"
    assert expected in capsys.readouterr().err
    assert not output.exists()


def test_warnings_of_ours_are_one_line(monkeypatch):
    """Without the line of code that they come from; those of libraries are shown as always."""
    shown, usual = [], warnings.formatwarning

    def show(command) -> int:
        for file in (load_images.__code__.co_filename, "elsewhere.py"):
            shown.append(warnings.formatwarning("something is kept", UserWarning, file, 1))
        return 0

    monkeypatch.setattr("fastunlearn.cli.purge.Purge.run", show)
    assert run("purge", "anything") == 0
    assert shown == ["warning: something is kept\n", "elsewhere.py:1: UserWarning: something is kept\n"]
    assert warnings.formatwarning is usual


@pytest.mark.parametrize(
    ("command", "occupied", "arguments"),
    [
        ("unlearn", "checkpoint-3", ["--model", "MODEL", "--method", "neggrad", "--forget", "FORGET"]),
        ("unlearn", "run.json", ["--model", "MODEL", "--method", "neggrad", "--forget", "FORGET"]),
        ("unlearn", "metrics.jsonl", ["--model", "MODEL", "--method", "neggrad", "--forget", "FORGET"]),
        ("evaluate", "evaluation.json", ["--model", "MODEL", "--forget", "FORGET"]),
        ("sample", "samples.npz", ["--model", "MODEL", "--num_images", "2"]),
        ("sample", "samples.png", ["--model", "MODEL", "--num_images", "2"]),
        ("neighbors", "", ["--forget", "FORGET", "--retain", "RETAIN"]),
        ("data", "", ["mnist-tshirt", "--mnist", "MODEL", "--fashion_mnist", "MODEL"]),
        ("demo", "model/mine", []),
    ],
)
def test_an_occupied_output_is_refused_before_anything_is_read(
    world, tmp_path, capsys, monkeypatch, command, occupied, arguments
):
    """A folder stands where a file would be written, or checkpoints of another run."""
    nothing_is_read(monkeypatch)
    paths = {"MODEL": world.model, "FORGET": world.forget, "RETAIN": world.retain}
    output = tmp_path / "out.npz" if command in ("neighbors", "data") else tmp_path / "out"
    (output / occupied).mkdir(parents=True)
    assert run(command, *(paths.get(word, word) for word in arguments), "--output", output) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {'output_dir' if command == 'demo' else '--output'}: expected ")
    assert error.count("\n") == 1


def test_debug_shows_the_traceback(world, tmp_path, capsys, monkeypatch):
    assert unlearn(world, tmp_path / "run", "--k", "21", "--debug") == 2
    assert "Traceback" in capsys.readouterr().err
    monkeypatch.setenv("FASTUNLEARN_DEBUG", "1")
    assert unlearn(world, tmp_path / "run", "--k", "21") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_defect_keeps_its_traceback(world, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        return np.zeros(3).reshape(2)  # a ValueError of numpy's own

    monkeypatch.setattr("fastunlearn.models.load_checkpoint", broken)
    with pytest.raises(ValueError, match="cannot reshape"):
        unlearn(world, tmp_path / "run")


# --- near copies


@pytest.fixture(scope="session")
def copied(world, tmp_path_factory) -> SimpleNamespace:
    """Twenty smooth images to keep; row 4 is a JPEG of the image to forget, row 7 the same mirrored."""
    root = tmp_path_factory.mktemp("copied")
    generator = np.random.default_rng(3)
    small = generator.integers(0, 256, (21, 4, 4), dtype=np.uint8)
    forget, *retain = (np.asarray(Image.fromarray(image).resize((8, 8))) for image in small)
    Image.fromarray(forget).save(root / "forget.png")
    Image.fromarray(forget).save(root / "copy.jpg", quality=90)
    retain[4] = np.asarray(Image.open(root / "copy.jpg"))
    retain[7] = retain[4][:, ::-1]
    np.save(root / "retain.npy", np.stack(retain)[:, None])
    np.save(root / "clean.npy", np.delete(np.stack(retain)[:, None], [4, 7], axis=0))
    distance = np.linalg.norm(retain[4].astype(float) - forget)
    sets = {"forget": root / "forget.png", "retain": root / "retain.npy", "clean": root / "clean.npy"}
    copies = f"forget row 0: retain rows 4 ({distance:.4g}), 7 ({distance:.4g}, mirrored)"
    return SimpleNamespace(model=world.model, distance=distance, copies=copies, **sets)


def in_record(run_dir: Path) -> dict:
    """The rows that the private record names; `run.json` has their numbers."""
    found, told = (
        json.loads((run_dir / name).read_text())["forget_in_retain"]
        for name in ("private/record.json", "run.json")
    )
    counts = {name: len(each) if isinstance(each, list) else each for name, each in found.items()}
    assert told == counts
    return found


def test_near_copies_are_warned_of_with_numbers_and_rows(copied, tmp_path, capsys):
    assert unlearn(copied, tmp_path / "run") == 0
    shown = capsys.readouterr()
    warning = next(line for line in shown.err.splitlines() if line.startswith("warning: "))
    numbers = f"2 near copies of 1 image to forget, {copied.distance:.4g} to "
    assert warning.startswith(f"warning: among the images to keep are {numbers}")
    assert copied.copies in warning
    assert warning.endswith("--drop_within auto leaves them out")
    assert in_record(tmp_path / "run") == {"kept_near_copies": [4, 7]}
    assert unlearn(copied, tmp_path / "clean", "--retain", copied.clean) == 0
    assert "warning" not in capsys.readouterr().err
    assert in_record(tmp_path / "clean") == {"kept_near_copies": []}


@pytest.mark.parametrize("within", ["auto", "radius"])
def test_near_copies_are_dropped(copied, tmp_path, capsys, within):
    within = "auto" if within == "auto" else f"{copied.distance:.2f}1"
    assert unlearn(copied, tmp_path / "whole", "--drop_within", within) == 0
    shown = capsys.readouterr()
    assert f"images to keep: 18 (2 dropped by --drop_within {within}" in shown.out
    assert copied.copies in shown.out
    assert "warning" not in shown.err
    record = in_record(tmp_path / "whole")
    assert (record["dropped_equal"], record["dropped_near_copies"]) == ([], [4, 7])
    assert record.get("kept_near_copies", []) == []
    assert str(record["drop_within"]) == within
    assert unlearn(copied, tmp_path / "clean", "--retain", copied.clean) == 0
    assert_same(weights(tmp_path / "whole"), weights(tmp_path / "clean"))


def test_near_copies_that_a_radius_leaves_are_warned_of(copied, tmp_path, capsys):
    assert unlearn(copied, tmp_path / "run", "--drop_within", f"{copied.distance - 0.5}") == 0
    shown = capsys.readouterr()
    assert "images to keep: 20 (none dropped by --drop_within " in shown.out
    assert copied.copies in shown.err
    assert in_record(tmp_path / "run")["kept_near_copies"] == [4, 7]


def test_rows_are_those_of_the_retain_set_given_where_equal_ones_are_dropped_too(copied, tmp_path, capsys):
    both = ("--retain", copied.forget, copied.retain)
    assert unlearn(copied, tmp_path / "run", *both, "--drop_within", "auto") == 0
    shown = capsys.readouterr().out
    assert "images to keep: 20 (1 dropped, which are to be forgotten)" in shown
    assert f"forget row 0: retain rows 5 ({copied.distance:.4g}), 8 (" in shown
    record = {"dropped_equal": [0], "drop_within": "auto", "dropped_near_copies": [5, 8]}
    assert in_record(tmp_path / "run") == record


def test_dropping_nothing_is_said(world, copied, tmp_path, capsys):
    assert unlearn(world, tmp_path / "equal", "--drop_overlap") == 0
    assert "images to keep: 20 (none dropped: none is equal to an image to forget)" in capsys.readouterr().out
    assert unlearn(copied, tmp_path / "near", "--retain", copied.clean, "--drop_within", "auto") == 0
    assert "images to keep: 18 (none dropped by --drop_within auto: no near copies" in capsys.readouterr().out
    vanilla = (
        "--model",
        world.model,
        "--retain",
        world.retain,
        "--output",
        tmp_path / "run",
        "--method",
        "vanilla",
    )
    assert run("unlearn", *vanilla, *FAST, "--drop_overlap") == 2
    assert "--drop_overlap: expected --forget and --retain, got no --forget" in capsys.readouterr().err


def test_near_copies_are_not_looked_for_if_told_so(copied, tmp_path, capsys):
    both = ("--retain", copied.forget, copied.retain)
    assert unlearn(copied, tmp_path / "run", *both, "--drop_within", "off", "--drop_overlap") == 0
    shown = capsys.readouterr()
    assert "warning" not in shown.err
    assert "images to keep: 20 (1 dropped, which are to be forgotten)" in shown.out
    assert in_record(tmp_path / "run") == {"dropped_equal": [0]}


def test_equal_images_that_are_allowed_are_not_warned_of(copied, tmp_path, capsys):
    both = ("--retain", copied.forget, copied.clean)
    assert unlearn(copied, tmp_path / "run", *both, "--allow_overlap") == 0
    assert "warning" not in capsys.readouterr().err


def test_a_resumed_run_has_the_same_images_to_keep(copied, tmp_path, capsys):
    longer = ("--steps", "4", "--checkpointing_steps", "2")
    half_done(copied, tmp_path / "run", "--drop_within", "auto")
    resumed = (*longer, "--resume_from_checkpoint", "latest")
    assert unlearn(copied, tmp_path / "run", *resumed) == 2
    assert "resume_from_checkpoint: expected a checkpoint of a run with data" in capsys.readouterr().err
    assert unlearn(copied, tmp_path / "run", *resumed, "--drop_within", "auto") == 0
    assert unlearn(copied, tmp_path / "whole", *longer, "--retain", copied.clean) == 0
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


@pytest.mark.parametrize("within", ["near", "-3", "nan", "inf", "99999"])
def test_a_radius_that_is_none_or_leaves_nothing(copied, tmp_path, capsys, within):
    assert unlearn(copied, tmp_path / "run", "--drop_within", within) == 2
    expected = f"auto, off or a radius in grey levels, a number >= 0, got {within!r}"
    if within == "99999":
        expected = "images to keep that show no image to forget, got 20 that all do"
    assert capsys.readouterr().err == f"error: --drop_within: expected {expected}\n"
    assert not (tmp_path / "run").exists()


# --- the other commands


def test_sample(world, tmp_path, capsys):
    common = ("--model", world.model, "--num_images", "5", "--num_inference_steps", "3", "--device", "cpu")
    assert run("sample", *common, "--output", tmp_path / "out") == 0
    assert run("sample", *common, "--output", tmp_path / "again.npz", "--batch-size", "2") == 0
    assert str(tmp_path / "again.npz") in capsys.readouterr().out.splitlines()[-1]
    first, again = (
        np.load(file)["images"] for file in (tmp_path / "out" / "samples.npz", tmp_path / "again.npz")
    )
    assert first.dtype == np.uint8
    assert first.shape == (5, *TINY_SHAPE)
    assert np.abs(first.astype(int) - again).max() <= 1  # other batches round differently
    assert Image.open(tmp_path / "again.png").size[0] > 8
    assert load_images(tmp_path / "again.npz").shape == TINY_SHAPE


def test_sample_draws_only_where_there_is_room(world, tmp_path, capsys, monkeypatch):
    def sample(*arguments, **options):
        raise AssertionError("something was drawn")

    monkeypatch.setattr("fastunlearn.models.sampling.sample", sample)
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10)
    count = ("--num_images", "5", "--device", "cpu")
    assert run("sample", "--model", world.model, *count, "--output", tmp_path / "out.npz") == 2
    assert "of free disk for the samples, got 10 bytes" in capsys.readouterr().err


def test_sample_writes_nothing_of_a_model_that_draws_nothing(world, tmp_path, capsys):
    """NaN would be cast to black pixels, and -Inf be clipped to white ones."""
    model, scheduler = load_checkpoint(world.model)
    with torch.no_grad():
        model.conv_out.weight.fill_(3e38)
    broken = save_checkpoint(tmp_path / "broken", model, scheduler)
    few = ("--num_images", "5", "--num_inference_steps", "3", "--device", "cpu")
    assert run("sample", "--model", broken, *few, "--output", tmp_path / "out") == 1
    message = "samples: expected finite values from the model, got NaN or Inf in 5 of the first 5"
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_neighbors(world, tmp_path):
    assert (
        run(
            "neighbors",
            "--forget",
            world.forget,
            "--retain",
            world.retain,
            "--k",
            "4",
            "--output",
            tmp_path / "near.npz",
        )
        == 0
    )
    found = np.load(tmp_path / "near.npz")
    index, sqdist = nearest_neighbors(load_images(world.forget), load_images(world.retain), 4)
    np.testing.assert_array_equal(found["index"], index)
    np.testing.assert_array_equal(found["sqdist"], sqdist)
    assert found["sqdist"].dtype == np.int64
    read = json.loads(str(found["read"]))
    assert (read["forget"]["files"], read["retain"]["rows"]) == (2, 20)
    assert read["forget"]["options"]["crop"] == "center"
    assert stat.S_IMODE((tmp_path / "near.npz").stat().st_mode) == 0o600


def test_neighbors_names_near_copies(copied, tmp_path, capsys):
    common = ("--forget", copied.forget, "--k", "4", "--output", tmp_path / "near.npz")
    assert run("neighbors", *common, "--retain", copied.retain) == 0
    assert copied.copies in capsys.readouterr().out
    assert run("neighbors", *common, "--retain", copied.clean) == 0
    assert "no near copies" in capsys.readouterr().out


def test_neighbors_wants_an_npz(world, tmp_path, capsys):
    assert (
        run(
            "neighbors", "--forget", world.forget, "--retain", world.retain, "--output", tmp_path / "near.csv"
        )
        == 2
    )
    assert "output: expected a path that ends in .npz, got" in capsys.readouterr().err


def test_data_says_which_file_is_missing(tmp_path, capsys):
    assert (
        run(
            "data",
            "mnist-tshirt",
            "--mnist",
            tmp_path,
            "--fashion_mnist",
            tmp_path,
            "--output",
            tmp_path / "out.npz",
        )
        == 2
    )
    assert f"{tmp_path}: expected a file train-images-idx3-ubyte" in capsys.readouterr().err


def test_pretrain_hands_over_what_it_was_told(world, tmp_path, capsys, monkeypatch, prepared):
    calls = []
    monkeypatch.setattr(
        "fastunlearn.runs.pretraining.pretrain",
        lambda images, recipe, output, **options: calls.append((len(images), recipe, output, options)),
    )
    np.save(tmp_path / "digits.npy", np.zeros((3, 28, 28), np.uint8))
    arguments = ("--recipe", "mnist-tshirt-small", "--output", tmp_path / "out", "--device", "cpu")
    assert run("pretrain", *arguments, "--data", tmp_path / "digits.npy", "--seed", "5") == 0
    ((rows, recipe, output, options),) = calls
    assert (rows, recipe, output, options["seed"], options["resume"]) == (
        3,
        PRETRAINING["mnist-tshirt-small"],
        tmp_path / "out",
        5,
        False,
    )
    read = options["record"]["read"]
    assert (read["rows"], read["files"], read["passed_over"]) == (3, 1, 0)
    assert read["options"] == {"size": (28, 28), "channels": 1} | DEFAULTS
    assert prepared == ["kept"]
    assert run("pretrain", *arguments, "--data", world.retain) == 2
    assert (
        "retain.npy: expected images of 28 x 28 (arrays are not resized), got shape [20, 1, 8, 8]"
        in capsys.readouterr().err
    )
    assert (
        run("pretrain", *arguments, "--data", tmp_path / "digits.npy", "--resume_from_checkpoint", "latest")
        == 2
    )
    assert "resume_from_checkpoint: expected a checkpoint in" in capsys.readouterr().err


@pytest.mark.parametrize("passed", [True, False])
def test_demo_exits_with_its_verdict(tmp_path, capsys, monkeypatch, prepared, passed):
    calls = []

    def run_demo(output_dir, **options):
        calls.append((output_dir, options))
        return SimpleNamespace(passed=passed, report=tmp_path / "report.html")

    monkeypatch.setattr("fastunlearn.demo.run_demo", run_demo)
    assert run("demo", "--steps", "0", "--seed", "3", "--output", tmp_path) == (0 if passed else 1)
    assert str(tmp_path / "report.html") in capsys.readouterr().out.splitlines()[-1]
    ((output, options),) = calls
    assert (output, options["steps"], options["seed"], options["num_samples"]) == (tmp_path, 0, 3, 512)
    assert prepared == ["kept"]


def test_purge_needs_a_run(tmp_path, capsys):
    assert run("purge", tmp_path) == 2
    assert "run_dir: expected a run folder with a readable run.json" in capsys.readouterr().err


# --- the program


def test_choices_are_those_of_the_library():
    from fastunlearn import methods
    from fastunlearn.cli.demo import Demo
    from fastunlearn.cli.picture_flags import PictureFlags
    from fastunlearn.cli.pretrain import Pretrain
    from fastunlearn.cli.unlearn import Unlearn
    from fastunlearn.data.options import CROPS, EXIF, FILTERS

    classes = (getattr(methods, name) for name in methods.__all__)
    named = {method.name for method in classes if getattr(method, "name", None)}
    for command in (Unlearn, Demo):
        assert named <= set(get_args(get_type_hints(command.with_methods())["method"]))
    assert set(get_args(get_type_hints(Pretrain)["recipe"])) == set(PRETRAINING)
    chosen = get_type_hints(PictureFlags)
    assert [get_args(chosen[name]) for name in ("exif", "crop", "resample")] == [EXIF, CROPS, FILTERS]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_teaches(capsys, command):
    with pytest.raises(SystemExit) as end:
        run(command, "--help")
    shown = capsys.readouterr().out
    assert end.value.code == 0
    assert f"Try: fastunlearn {command}" in " ".join(shown.split())


@pytest.mark.parametrize(
    ("flag", "expected"),
    [
        ("--timestep_density", "choice 'None' for argument '--timestep-density'"),
        ("--anchor", "choice 'None' for argument '--anchor'"),
        ("--micro_batch_size", "--micro-batch-size: expected INT, got None"),
        ("--lambda", "expected FLOAT|{auto}, got None"),
        ("--lowpass", "--lowpass: expected FLOAT|{FLOAT FLOAT}, got None"),
        ("--forget_timesteps", "--forget-timesteps: expected {INT INT}|{middle,late,last}, got None"),
    ],
)
def test_a_flag_that_may_be_left_out_does_not_take_the_word_none(capsys, monkeypatch, flag, expected):
    """Nor does its error show types and markup of the parser."""
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as end:
        run("unlearn", "--model", "m", "--output", "o", "--method", "retrack", flag, "None")
    error = capsys.readouterr().err
    assert end.value.code == 2
    assert expected in error
    assert not [each for each in ("NoneType", "[bold]", "typing.") if each in error]


def test_too_many_words_for_a_flag_are_refused_by_what_it_takes(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit):
        run("unlearn", "--model", "m", "--output", "o", "--method", "siss", "--lowpass", "0.1", "0.2", "0.3")
    assert "expected FLOAT|{FLOAT FLOAT}, got 0.1 0.2 0.3" in capsys.readouterr().err


def test_the_example_of_every_help_parses():
    import fastunlearn.cli as cli

    for command in COMMANDS:
        module = __import__(f"fastunlearn.cli.{command}", fromlist=[command])
        example = getattr(module, command.capitalize()).__doc__.partition("Try: fastunlearn ")[2].split()
        assert type(cli._parse(example)).__name__ == command.capitalize()


def test_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"fastunlearn {__version__}\n"


def test_the_program_starts_without_what_takes_long_to_import():
    heavy = "torch", "diffusers", "numpy", "scipy", "matplotlib"
    show = f"print([name for name in {heavy} if name in sys.modules])"
    code = f"import sys\nfrom fastunlearn.cli import main\ntry:\n    main(['--help'])\nfinally:\n    {show}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "[]"
    assert all(command in result.stdout for command in COMMANDS)


def test_exit_codes_of_the_process(tmp_path):
    def program(*arguments: object) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "fastunlearn", *map(str, arguments)]
        options = {"env": os.environ | {"PYTHONUTF8": "1"}, "encoding": "utf-8", "cwd": tmp_path}
        return subprocess.run(command, capture_output=True, **options)

    assert program("--help").returncode == 0
    assert program("unlearn").returncode == 2
    wrong = program("purge", tmp_path)
    assert (wrong.returncode, wrong.stderr.count("\n")) == (2, 1)


def test_an_overlap_is_refused_before_the_neighbours_are_searched(world, tmp_path):
    assert unlearn(world, tmp_path / "run", "--retain", world.retain, world.forget / "1.png") == 2
    assert not (tmp_path / "run").exists()


def test_purge_cleans_what_a_run_left_that_died_early(tmp_path, capsys):
    """Killed while it searched for neighbours: a cache in private/, and no run.json yet."""
    private = tmp_path / "run" / "private"
    private.mkdir(parents=True)
    (private / "half-written.tmp").write_bytes(b"neighbours")
    assert main(["purge", str(tmp_path / "run")]) == 0
    assert not any(private.iterdir())
    assert "removed" in capsys.readouterr().out


@pytest.mark.parametrize("columns", ["1", "2", "80"])
def test_help_is_shown_whatever_the_width(monkeypatch, capsys, columns):
    """In one column it was never done."""
    monkeypatch.setenv("COLUMNS", columns)
    with pytest.raises(SystemExit):
        run("purge", "--help")
    assert "run" in capsys.readouterr().out


def test_names_that_are_no_text_are_shown_escaped(world, tmp_path):
    output = os.fsencode(tmp_path) + b"/\xff run"
    command = [
        sys.executable,
        "-m",
        "fastunlearn",
        "unlearn",
        "--model",
        world.model,
        "--forget",
        world.forget,
        *FAST,
    ]
    command += ["--method", "neggrad", "--output", output]
    result = subprocess.run([os.fsencode(argument) for argument in command], capture_output=True, check=False)
    assert result.returncode == 0, result.stderr
    assert rb"\udcff run" in result.stdout


def test_a_run_is_not_written_into_its_model(world, tmp_path, capsys):
    output = Path(shutil.copytree(world.model, tmp_path / "model"))
    before = sorted(output.rglob("*"))
    given = ("--model", output, "--forget", world.forget, "--retain", world.retain)
    assert run("unlearn", *given, "--output", output, "--method", "retrack", "--device", "cpu") == 2
    assert "error: --output: expected another folder than that of --model" in capsys.readouterr().err
    assert sorted(output.rglob("*")) == before
