"""Flags of masks and anchors: how they are refused, what a run with them does, how it goes on."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import runs
import torch
from safetensors.torch import load_file

from fastunlearn.cli import _parse, main
from fastunlearn.methods import EraseDiffBome
from fastunlearn.models import load_checkpoint
from fastunlearn.testing.checkpoints import save_tiny_checkpoint

pytest.importorskip("tyro")
RETAIN, FORGET = ("--retain", "r.npy"), ("--forget", "f.npy")

# Flags, and what the message says.
REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "a gamma of nothing": (
        ("--anchor_gamma", "1"),
        "--anchor_gamma: expected --anchor beside it, got none",
    ),
    "checkpoints of nothing": (
        ("--anchor_checkpoints", "a", "b"),
        "--anchor_checkpoints: expected --anchor beside it, got none",
    ),
    "no gamma": (
        ("--anchor", "vdu_l2"),
        "--anchor_gamma: expected a number >= 0 with --anchor, got none",
    ),
    "a negative gamma": (
        ("--anchor", "vdu_l2", "--anchor_gamma", "-1"),
        "--anchor_gamma: expected a finite number in [0, inf), got -1.0",
    ),
    "one checkpoint": (
        ("--anchor", "vdu", "--anchor_gamma", "1", "--anchor_checkpoints", "a"),
        "--anchor_checkpoints: expected two or more with --anchor vdu "
        "(vdu_laplace, vdu_swag and vdu_l2 need none), got 1",
    ),
    "checkpoints of another": (
        ("--anchor", "vdu_l2", "--anchor_gamma", "1", "--anchor_checkpoints", "a", "b"),
        "--anchor_checkpoints: expected --anchor vdu beside it, got vdu_l2",
    ),
    "samples of another": (
        ("--anchor", "vdu_swag", "--anchor_gamma", "1", "--anchor_samples", "3", *RETAIN),
        "--anchor_samples: expected --anchor vdu_laplace beside it, got vdu_swag",
    ),
    "steps of another": (
        ("--anchor", "vdu_laplace", "--anchor_gamma", "1", "--anchor_steps", "3", *RETAIN),
        "--anchor_steps: expected --anchor vdu_swag beside it, got vdu_laplace",
    ),
    "one step": (
        ("--anchor", "vdu_swag", "--anchor_gamma", "1", "--anchor_steps", "1", *RETAIN),
        "--anchor_steps: expected an integer >= 2, got 1",
    ),
    "nothing to keep": (
        ("--anchor", "vdu_laplace", "--anchor_gamma", "1"),
        "--anchor: expected --retain beside vdu_laplace, which reads it, got none",
    ),
    "batches of nothing": (
        ("--mask_batches", "3", *FORGET),
        "--mask_batches: expected --mask_fraction beside it, got none",
    ),
    "more than all": (
        ("--mask_fraction", "1.5", *FORGET),
        "--mask_fraction: expected a finite number in (0, 1], got 1.5",
    ),
    "no batch": (
        ("--mask_fraction", "0.5", "--mask_batches", "0", *FORGET),
        "--mask_batches: expected an integer >= 1, got 0",
    ),
    "nothing to forget": (
        ("--mask_fraction", "0.5"),
        "--mask_fraction: expected --forget beside it, whose gradients it takes, got none",
    ),
}


def test_inner_steps_beside_rules_are_refused_before_anything_is_estimated():
    from fastunlearn.cli.rule_flags import RuleFlags

    flags = RuleFlags(anchor="vdu_l2", anchor_gamma=1.0, mask_fraction=0.5)
    flags.check_beside(EraseDiffBome())
    RuleFlags().check_beside(EraseDiffBome(inner_steps=2))
    expected = r"--inner_steps: expected 0 beside --anchor and --mask_fraction, .*, got 2"
    with pytest.raises(ValueError, match=expected):
        flags.check_beside(EraseDiffBome(inner_steps=2))


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_names_its_flag(name: str):
    flags, message = REFUSED[name]
    command = _parse(["unlearn", "--model", "m", "--output", "o", "--method", "neggrad", *flags])
    with pytest.raises(ValueError) as refusal:
        command.rules.check(command.forget, command.retain)
    assert str(refusal.value) == message


def test_without_flags_there_is_no_rule(capsys):
    command = _parse(["unlearn", "--model", "m", "--output", "o", "--method", "neggrad"])
    command.rules.check((), ())
    assert command.rules.anchor is None
    assert command.rules.mask_fraction is None


# --- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with three checkpoints, two images to forget, and twenty to keep."""
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    np.save(root / "forget.npy", generator.integers(0, 256, (2, 1, 8, 8), dtype=np.uint8))
    np.save(root / "retain.npy", generator.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    for seed, name in enumerate(("model", "second", "third")):
        save_tiny_checkpoint(root / name, seed=seed)
    return root


def unlearn(world: Path, output: Path, *more: str | Path) -> int:
    """`fastunlearn unlearn` by gradient ascent for four steps, with a checkpoint after every second."""
    paths = ("--model", world / "model", "--forget", world / "forget.npy", "--retain", world / "retain.npy")
    run = ("--output", output, "--method", "neggrad", "--checkpointing_steps", "2", "--device", "cpu")
    steps = ("--steps", "4", "--batch-size", "4", "--lr", "1e-3", "--seed", "0")
    return main([str(each) for each in ("unlearn", *paths, *run, *steps, *more)])


def weights(folder: Path) -> dict[str, torch.Tensor]:
    model, _ = load_checkpoint(folder)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def moved(world: Path, output: Path) -> float:
    """How far the weights are from those of the checkpoint."""
    before, after = weights(world / "model"), weights(output / "model")
    return float(torch.cat([(after[name] - before[name]).flatten() for name in before]).norm())


MASK = ("--mask_fraction", "0.25", "--mask_batches", "2")
RUNS: dict[str, tuple[str, ...]] = {
    "vdu": ("--anchor", "vdu", "--anchor_gamma", "1e3", "--anchor_checkpoints", "SECOND", "THIRD"),
    "vdu_laplace": ("--anchor", "vdu_laplace", "--anchor_gamma", "1e3", "--anchor_samples", "2"),
    "vdu_swag": ("--anchor", "vdu_swag", "--anchor_gamma", "1e3", "--anchor_steps", "2"),
    "vdu_l2": ("--anchor", "vdu_l2", "--anchor_gamma", "1e8"),
    "mask": (*MASK, "--adam_weight_decay", "0.5", "--use_ema"),
    "both": (*MASK, "--anchor", "vdu_l2", "--anchor_gamma", "1e8"),
}


def flags_of(world: Path, name: str) -> list[str]:
    places = {"SECOND": str(world / "second"), "THIRD": str(world / "third")}
    return [places.get(flag, flag) for flag in RUNS[name]]


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(world, tmp_path, capsys, name):
    flags = flags_of(world, name)
    assert unlearn(world, tmp_path / "whole", *flags, "--keep_checkpoints") == 0
    said = capsys.readouterr().out
    assert ("mask: " in said) == ("mask_fraction" in " ".join(flags))
    if name.startswith("vdu_"):
        assert f"anchor: {name}, gamma 1e" in said.replace("gamma 1000 ", "gamma 1e3 ")
        assert "(not VDU as published)" in said
    expected = weights(tmp_path / "whole" / "model")
    output = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    runs.unfinish(output, 2)
    latest = ("--resume_from_checkpoint", "latest")
    # Not without them.
    assert unlearn(world, output, *latest) == 2
    assert "expected a checkpoint of a run with" in capsys.readouterr().err
    assert unlearn(world, output, *flags, *latest) == 0
    found = weights(output / "model")
    assert all(torch.equal(found[own], value) for own, value in expected.items())


def test_a_mask_lets_a_quarter_of_the_weights_move(world, tmp_path):
    assert unlearn(world, tmp_path / "run", *RUNS["mask"], "--keep_checkpoints") == 0
    before, after = weights(world / "model"), weights(tmp_path / "run" / "model")
    file = tmp_path / "run" / "private" / "mask.safetensors"
    assert file.stat().st_mode & 0o777 == 0o600
    masks = load_file(file)
    total = sum(mask.numel() for mask in masks.values())
    assert sum(int(mask.sum()) for mask in masks.values()) == total // 4
    for name, mask in masks.items():
        assert torch.equal(after[name][~mask], before[name][~mask])
    assert any(not torch.equal(after[name], before[name]) for name in masks)
    # Without the flag nothing is left that only this run could use.
    assert unlearn(world, tmp_path / "again", *RUNS["mask"]) == 0
    left = (tmp_path / "again" / "private").iterdir()
    assert sorted(path.name for path in left) == ["lineage.key", "record.json"]


def test_an_anchor_holds_the_weights(world, tmp_path):
    assert unlearn(world, tmp_path / "free") == 0
    assert unlearn(world, tmp_path / "held", *RUNS["vdu_l2"]) == 0
    assert moved(world, tmp_path / "held") < 0.8 * moved(world, tmp_path / "free")


def test_an_estimate_is_kept_for_the_same_weights_images_and_settings(world, tmp_path, monkeypatch):
    from fastunlearn.engine import estimates

    counted, plain = [], estimates.forget_gradients

    def count(*arguments, **options):
        counted.append(options["num_batches"])
        return plain(*arguments, **options)

    monkeypatch.setattr(estimates, "forget_gradients", count)
    again = ("--resume_from_checkpoint", "latest", "--keep_checkpoints")

    def go_on(world: Path, *flags: str) -> int:
        """With the last step, as if the run had been killed before it counted as finished."""
        runs.unfinish(tmp_path, 4)
        return unlearn(world, tmp_path, *flags, *again)

    assert unlearn(world, tmp_path, *MASK, "--keep_checkpoints") == 0
    assert go_on(world, *MASK) == 0
    assert counted == [2]
    # Another setting is another mask, which the run is not resumed under; a damaged file is made anew.
    assert go_on(world, "--mask_fraction", "0.25", "--mask_batches", "3") == 2
    (tmp_path / "private" / "mask.safetensors").write_bytes(b"damaged")
    assert go_on(world, *MASK) == 0
    assert counted == [2, 3, 2]

    # So it is of other images, and of other weights, whose run this is not.
    for changed in ("forget.npy", "model"):
        other = Path(shutil.copytree(world, tmp_path.with_name(f"{tmp_path.name} with another {changed}")))
        if changed == "model":
            shutil.rmtree(other / "model")
            shutil.copytree(world / "second", other / "model")
        else:
            np.save(other / "forget.npy", 255 - np.load(world / "forget.npy"))
        counted.clear()
        assert go_on(other, *MASK) == 2
        assert counted == [2]
        assert go_on(world, *MASK) == 0


def test_a_norm_of_0_clips_no_batch(world, tmp_path):
    assert unlearn(world, tmp_path / "clipped", *MASK, "--keep_checkpoints") == 0
    assert unlearn(world, tmp_path / "whole", *MASK, "--mask_batch_norm", "0", "--keep_checkpoints") == 0
    files = (tmp_path / name / "private" / "mask.safetensors" for name in ("clipped", "whole"))
    clipped, whole = map(load_file, files)
    assert any(not torch.equal(clipped[name], whole[name]) for name in clipped)


def test_checkpoints_that_do_not_fit_name_their_flag(world, tmp_path, capsys):
    broken = tmp_path / "broken.safetensors"
    broken.write_bytes(b"damaged")
    flags = ("--anchor", "vdu", "--anchor_gamma", "1", "--anchor_checkpoints", world / "second", broken)
    assert unlearn(world, tmp_path / "run", *flags) == 2
    assert f"error: --anchor_checkpoints: {broken}: expected a safetensors file" in capsys.readouterr().err
