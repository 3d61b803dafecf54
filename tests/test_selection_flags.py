"""Flags of timesteps and frequencies: what they make, how they are refused, how a run with them goes on."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import runs
import torch
from small_methods import Pairs

from fastunlearn.cli import _parse, main
from fastunlearn.methods import SISS, EraseDiff, NegGrad, ReTrack, Vanilla
from fastunlearn.models import load_checkpoint
from fastunlearn.objective.frequency import SCHEDULES, LowPass
from fastunlearn.objective.schedule import LOSS_WEIGHTS, NoiseSchedule
from fastunlearn.objective.selection import Selection
from fastunlearn.objective.time import LogitNormal, Product, Stratified, TimeWindow, Uniform
from fastunlearn.step.take import take_step
from fastunlearn.testing.checkpoints import save_tiny_checkpoint
from fastunlearn.testing.factories import linear_schedule

tyro = pytest.importorskip("tyro")
from fastunlearn.cli.selection_flags import FrequencyFlags, TimestepFlags, selection  # noqa: E402

METHODS = {
    "retrack": ReTrack(),
    "siss": SISS(),
    "erasediff": EraseDiff(),
    "neggrad": NegGrad(),
    "vanilla": Vanilla(),
}
FLOW = NoiseSchedule.flow(1000)


def chosen(
    *flags: str, method: str = "retrack", schedule: NoiseSchedule | None = None, steps: int = 8
) -> Selection:
    """What the flags choose, for images of 8 x 8."""
    paths = ("--model", "m", "--output", "o", "--method", method)
    command = _parse(["unlearn", *paths, *flags])
    schedule = linear_schedule() if schedule is None else schedule
    return selection(command.timesteps, command.frequencies, method, METHODS[method], schedule, (8, 8), steps)


WINDOW = TimeWindow(250, 750)
# What is written, and what an Unlearner is given.
TAKEN: dict[str, tuple[str, Selection]] = {
    "nothing": ("", Selection()),
    "a window": ("--forget_timesteps 250 750", Selection(WINDOW)),
    "dashes": ("--forget-timesteps 250 750", Selection(WINDOW)),
    "middle": ("--forget_timesteps middle", Selection(WINDOW)),
    "late": ("--forget_timesteps late", Selection(TimeWindow(750, 1000))),
    "last": ("--forget_timesteps last", Selection(TimeWindow(999, 1000))),
    "outside": (
        "--forget_timesteps middle --forget_timesteps_outside 0.1",
        Selection(TimeWindow(250, 750, outside=0.1)),
    ),
    "to keep": ("--retain_timesteps 0 500", Selection(retain_density=TimeWindow(0, 500))),
    "both": (
        "--forget_timesteps late --retain_timesteps 0 500 --retain_timesteps_outside 0.5",
        Selection(TimeWindow(750, 1000), TimeWindow(0, 500, outside=0.5)),
    ),
    "uniform": ("--timestep_density uniform", Selection(Uniform(), Uniform())),
    "logit-normal": (
        "--timestep_density logit_normal --logit_mean 0.5 --logit_std 2",
        Selection(LogitNormal(0.5, 2.0), LogitNormal(0.5, 2.0)),
    ),
    "a window of it": (
        "--forget_timesteps middle --timestep_density logit_normal",
        Selection(Product(WINDOW, LogitNormal()), LogitNormal()),
    ),
    "strata": ("--stratified_timesteps", Selection(Stratified(Uniform()), Stratified(Uniform()))),
    "strata of a window": (
        "--forget_timesteps middle --stratified_timesteps",
        Selection(Stratified(WINDOW), Stratified(Uniform())),
    ),
    "a weight": (
        "--forget_timesteps middle --timesteps_as_weight",
        Selection(TimeWindow(250, 750, as_weight=True)),
    ),
    "min-SNR": ("--loss_weight min_snr", Selection(loss_weight="min_snr")),
    "another gamma": ("--loss_weight min_snr --snr_gamma 3", Selection(loss_weight="min_snr", snr_gamma=3.0)),
    "cosmap": ("--loss_weight cosmap", Selection(loss_weight="cosmap")),
    "a radius": ("--lowpass 0.5", Selection(lowpass=LowPass(0.5))),
    "all of it": (
        "--lowpass 3 --lowpass_band mid --lowpass_inner 1 --lowpass_kind box --lowpass_unit bins "
        "--high_frequency_weight 0.25",
        Selection(
            lowpass=LowPass(3, band="mid", inner=1, kind="box", unit="bins", high_frequency_weight=0.25)
        ),
    ),
    "what is not low": ("--lowpass 0.5 --lowpass_band high", Selection(lowpass=LowPass(0.5, band="high"))),
    "a growing radius": (
        "--lowpass 0.2 0.8 --lowpass_schedule linear_increase",
        Selection(lowpass=LowPass(schedule="linear_increase", start=0.2, stop=0.8)),
    ),
    "stages": (
        "--lowpass 0.8 0.2 --lowpass_schedule step_decay --lowpass_stages 3",
        Selection(lowpass=LowPass(schedule="step_decay", start=0.8, stop=0.2, stages=3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TAKEN)
def test_what_the_flags_choose(name: str):
    flags, expected = TAKEN[name]
    assert chosen(*flags.split()) == expected


def test_within_a_window_flow_matching_stays_logit_normal():
    """As diffusers draws: a window alone would be uniform."""
    window = chosen("--forget_timesteps", "middle", schedule=FLOW)
    assert window == Selection(Product(WINDOW, LogitNormal()))
    uniform = chosen("--forget_timesteps", "middle", "--timestep_density", "uniform", schedule=FLOW)
    assert uniform == Selection(WINDOW, Uniform())
    strata = chosen("--stratified_timesteps", schedule=FLOW)
    assert strata == Selection(Stratified(LogitNormal()), Stratified(LogitNormal()))


def test_presets_are_parts_of_the_schedule():
    short = linear_schedule(40)
    found = [chosen("--forget_timesteps", name, schedule=short) for name in ("middle", "late", "last")]
    assert found == [Selection(TimeWindow(*window)) for window in ((10, 30), (30, 40), (39, 40))]


def test_only_what_a_method_reads_is_chosen():
    flags = ("--timestep_density", "logit_normal")
    assert chosen(*flags, method="neggrad") == Selection(LogitNormal())
    assert chosen(*flags, method="vanilla") == Selection(None, LogitNormal())
    assert chosen("--retain_timesteps", "late", method="vanilla") == Selection(None, TimeWindow(750, 1000))


# Method, flags, and what the message says.
REFUSED: dict[str, tuple[str, str, str]] = {
    "no images to forget": (
        "vanilla",
        "--forget_timesteps 250 750",
        "--forget_timesteps: expected a --method that reads images to forget, "
        "got --forget_timesteps 250 750 with vanilla",
    ),
    "no residual to filter": (
        "vanilla",
        "--lowpass 0.5",
        "--lowpass: expected a --method that reads images to forget, got --lowpass 0.5 with vanilla",
    ),
    "no images to keep": (
        "neggrad",
        "--retain_timesteps late",
        "--retain_timesteps: expected a --method that reads images to keep, "
        "got --retain_timesteps late with neggrad",
    ),
    "beyond the schedule": (
        "retrack",
        "--forget_timesteps 500 1001",
        "--forget_timesteps: expected at most the 1000 timesteps of the schedule, got 1001",
    ),
    "to keep, beyond the schedule": (
        "retrack",
        "--retain_timesteps 500 2000 --stratified_timesteps",
        "--retain_timesteps: expected at most the 1000 timesteps of the schedule, got 2000",
    ),
    "the wrong way round": (
        "retrack",
        "--forget_timesteps 750 250",
        "--forget_timesteps: expected an index below stop, 250, got 750",
    ),
    "before the schedule": (
        "retrack",
        "--forget_timesteps -1 250",
        "--forget_timesteps: expected an integer >= 0, got -1",
    ),
    "less than never": (
        "retrack",
        "--forget_timesteps middle --forget_timesteps_outside -1",
        "--forget_timesteps_outside: expected a finite number in [0, inf), got -1.0",
    ),
    "outside of nothing": (
        "retrack",
        "--retain_timesteps_outside 0.5 --forget_timesteps middle",
        "--retain_timesteps_outside: expected --retain_timesteps beside it, got none",
    ),
    "no logit-normal": (
        "retrack",
        "--logit_mean 1",
        "--logit_mean: expected --timestep_density logit_normal beside it, got none",
    ),
    "uniform has no deviation": (
        "retrack",
        "--timestep_density uniform --logit_std 2",
        "--logit_std: expected --timestep_density logit_normal beside it, got uniform",
    ),
    "no deviation": (
        "retrack",
        "--timestep_density logit_normal --logit_std 0",
        "--logit_std: expected a finite number in (0, inf), got 0.0",
    ),
    "a density that never meets its window": (
        "retrack",
        "--forget_timesteps last --timestep_density logit_normal --logit_mean 9 --logit_std 0.01",
        "--timestep_density: expected a density that meets TimeWindow(start=999, stop=1000",
    ),
    "a weight of nothing": (
        "retrack",
        "--timesteps_as_weight",
        "--timesteps_as_weight: expected --forget_timesteps or --retain_timesteps beside it, got neither",
    ),
    "a weight of logit-normal draws": (
        "retrack",
        "--forget_timesteps middle --timesteps_as_weight --timestep_density logit_normal",
        "--timesteps_as_weight: expected --timestep_density uniform, from which timesteps are drawn then, "
        "got logit_normal",
    ),
    "a gamma of nothing": (
        "retrack",
        "--snr_gamma 3",
        "--snr_gamma: expected --loss_weight min_snr beside it, got none",
    ),
    "no gamma": (
        "retrack",
        "--loss_weight min_snr --snr_gamma 0",
        "--snr_gamma: expected a finite number in (0, inf), got 0.0",
    ),
    "a band without a radius": (
        "retrack",
        "--lowpass_band high",
        "--lowpass_band: expected --lowpass beside it, got high alone",
    ),
    "a schedule without radii": (
        "retrack",
        "--lowpass_schedule linear_increase",
        "--lowpass_schedule: expected --lowpass beside it, got linear_increase alone",
    ),
    "two radii without a schedule": (
        "retrack",
        "--lowpass 0.1 0.5",
        "--lowpass: expected one radius, or --lowpass_schedule beside two, got 0.1 0.5",
    ),
    "one radius for a schedule": (
        "retrack",
        "--lowpass 0.5 --lowpass_schedule step_decay",
        "--lowpass: expected two radii, FIRST and LAST, with --lowpass_schedule step_decay, got 0.5",
    ),
    "an increase that shrinks": (
        "retrack",
        "--lowpass 0.5 0.1 --lowpass_schedule linear_increase",
        "--lowpass: expected LAST above FIRST with --lowpass_schedule linear_increase, got 0.5 0.1",
    ),
    "a decay that grows": (
        "retrack",
        "--lowpass 0.1 0.5 --lowpass_schedule step_decay",
        "--lowpass: expected LAST below FIRST with --lowpass_schedule step_decay, got 0.1 0.5",
    ),
    "a radius that stays": (
        "retrack",
        "--lowpass 0.5 0.5 --lowpass_schedule linear_decay",
        "--lowpass: expected LAST below FIRST with --lowpass_schedule linear_decay, got 0.5 0.5",
    ),
    "a radius below 0": (
        "retrack",
        "--lowpass -0.5 0.1 --lowpass_schedule linear_increase",
        "--lowpass: expected a finite number in [0, inf), got -0.5",
    ),
    "no radius": ("retrack", "--lowpass -0.5", "--lowpass: expected a finite number in [0, inf), got -0.5"),
    "stages of a line": (
        "retrack",
        "--lowpass 0.1 0.5 --lowpass_schedule linear_increase --lowpass_stages 3",
        "--lowpass_stages: expected --lowpass_schedule step_increase or step_decay beside it, "
        "got linear_increase",
    ),
    "one stage": (
        "retrack",
        "--lowpass 0.1 0.5 --lowpass_schedule step_increase --lowpass_stages 1",
        "--lowpass_stages: expected an integer >= 2, got 1",
    ),
    "more stages than steps": (
        "retrack",
        "--lowpass 0.1 0.5 --lowpass_schedule step_increase --lowpass_stages 9",
        "--max_train_steps: expected an integer in [9, 2147483647] (one for each stage), got 8",
    ),
    "inner of a low band": (
        "retrack",
        "--lowpass 0.5 --lowpass_inner 0.1",
        "--lowpass_inner: expected --lowpass_band mid beside it, got low",
    ),
    "a mid band without inner": (
        "retrack",
        "--lowpass 0.5 --lowpass_band mid",
        "--lowpass_inner: expected a radius with --lowpass_band mid, got none",
    ),
    "an inner that is outer": (
        "retrack",
        "--lowpass 0.5 --lowpass_band mid --lowpass_inner 0.7",
        "--lowpass_inner: expected a number below radius, 0.5, got 0.7",
    ),
    "a negative weight": (
        "retrack",
        "--lowpass 0.5 --high_frequency_weight -1",
        "--high_frequency_weight: expected a finite number in [0, inf), got -1.0",
    ),
    "a band of nothing": (
        "retrack",
        "--lowpass 2 --lowpass_band high",
        "--lowpass: expected a band with frequencies of images of 8 x 8, got none in the high band, disc of "
        "radius 2, in nyquist",
    ),
    "a schedule that begins with nothing": (
        "retrack",
        "--lowpass 2 0.1 --lowpass_schedule linear_decay --lowpass_band high",
        "--lowpass: expected a band with frequencies of images of 8 x 8, got none in the high band, disc of "
        "radius 2, in nyquist",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_fit_names_its_flag(name: str):
    method, flags, message = REFUSED[name]
    with pytest.raises(ValueError) as refusal:
        chosen(*flags.split(), method=method)
    assert str(refusal.value).startswith(message)


@pytest.mark.parametrize("name", ["middle", "late"])
@pytest.mark.parametrize("branch", ["forget", "retain"])
def test_quarters_of_a_schedule_without_any_name_their_flag(branch: str, name: str):
    flag = f"--{branch}_timesteps"
    message = rf"^{flag}: expected an integer >= 4 \(the timesteps of a schedule\), got 3$"
    with pytest.raises(ValueError, match=message):
        chosen(flag, name, schedule=linear_schedule(3))
    assert chosen(flag, "last", schedule=linear_schedule(3)) != Selection()


def test_weights_of_a_method_with_an_objective_of_its_own_name_their_flag():
    """What the library refuses of such a method, by the names of its arguments."""
    for flags, named in (
        (
            "--forget_timesteps middle --timesteps_as_weight",
            "--timesteps_as_weight: expected a density that is",
        ),
        ("--loss_weight min_snr", "--loss_weight: expected None"),
    ):
        command = tyro.cli(TimestepFlags, args=flags.split())
        with pytest.raises(ValueError, match=named):
            selection(command, FrequencyFlags(), "pairs", Pairs(), linear_schedule(), (8, 8), 8)


def test_a_mixture_of_forget_images_alone_names_the_flag_of_the_others():
    command = tyro.cli(TimestepFlags, args=["--forget_timesteps", "250", "750"])
    message = r"^--retain_timesteps: expected timesteps that the forget branch draws, too, .*, got t = 0$"
    with pytest.raises(ValueError, match=message):
        selection(command, FrequencyFlags(), "siss", SISS(1.0), linear_schedule(), (8, 8), 8)


def test_timesteps_without_a_loss_are_refused_where_they_are_drawn():
    alphas = linear_schedule().alpha.square().clone()
    alphas[-1] = 0
    schedule = NoiseSchedule.from_alphas_cumprod(alphas)  # of a network that predicts epsilon
    with pytest.raises(ValueError, match="alpha"):
        chosen("--forget_timesteps", "last", schedule=schedule)
    early = ("--forget_timesteps", "0", "500", "--retain_timesteps", "0", "500")
    assert chosen(*early, schedule=schedule).time_window == TimeWindow(0, 500)


def test_choices_and_defaults_are_those_of_the_library():
    hints = get_type_hints(FrequencyFlags)
    assert get_args(hints["lowpass_schedule"]) == SCHEDULES
    assert get_args(get_type_hints(TimestepFlags)["loss_weight"]) == LOSS_WEIGHTS
    own = {each.name: each.default for each in fields(FrequencyFlags)}
    library = {each.name: each.default for each in fields(LowPass) if each.name != "radius"}
    names = {
        name if name in own else f"lowpass_{name}": name
        for name in library
        if f"lowpass_{name}" in own or name in own
    }
    assert {name: own[name] for name in names} == {name: library[of] for name, of in names.items()}
    assert set(names) == set(own) - {"lowpass"}
    assert (TimestepFlags().logit_mean, TimestepFlags().logit_std) == (LogitNormal().mean, LogitNormal().std)


# --- runs


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """A folder with a checkpoint, two images to forget, and twenty to keep."""
    pytest.importorskip("diffusers")
    root = tmp_path_factory.mktemp("world")
    generator = np.random.default_rng(0)
    np.save(root / "forget.npy", generator.integers(0, 256, (2, 1, 8, 8), dtype=np.uint8))
    np.save(root / "retain.npy", generator.integers(0, 256, (20, 1, 8, 8), dtype=np.uint8))
    save_tiny_checkpoint(root / "model")
    return root


def unlearn(world: Path, output: Path, *more: str, method: str = "retrack") -> int:
    """`fastunlearn unlearn` for four steps, with a checkpoint after every second."""
    paths = ("--model", world / "model", "--forget", world / "forget.npy", "--retain", world / "retain.npy")
    run = ("--output", output, "--method", method, "--checkpointing_steps", "2", "--device", "cpu")
    steps = ("--steps", "4", "--batch-size", "4", "--seed", "0")
    neighbors = ("--k", "3") if method == "retrack" else ()
    return main([str(each) for each in ("unlearn", *paths, *run, *steps, *neighbors, *more)])


def weights(output: Path) -> torch.Tensor:
    model, _ = load_checkpoint(output / "model")
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def record(output: Path) -> dict:
    return json.loads((output / "run.json").read_text())


RUNS = {
    "a window": ("--forget_timesteps", "middle", "--forget_timesteps_outside", "0.1"),
    "strata of a window": ("--forget_timesteps", "5", "15", "--stratified_timesteps"),
    "a weight": ("--forget_timesteps", "middle", "--timesteps_as_weight", "--loss_weight", "min_snr"),
    "a band that grows": ("--lowpass", "0.2", "0.9", "--lowpass_schedule", "linear_increase"),
    "a band in stages": (
        "--lowpass",
        "0.9",
        "0.2",
        "--lowpass_schedule",
        "step_decay",
        "--lowpass_stages",
        "2",
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_with_the_bits_of_one_that_was_not_stopped(world, tmp_path, capsys, name):
    flags = RUNS[name]
    assert unlearn(world, tmp_path / "whole", *flags, "--keep_checkpoints") == 0
    expected = weights(tmp_path / "whole")
    output = Path(shutil.copytree(tmp_path / "whole", tmp_path / "run"))
    runs.unfinish(output, 2)
    latest = ("--resume_from_checkpoint", "latest")

    # Not without them, and the message says which.
    assert unlearn(world, output, *latest) == 2
    entry = (
        "lowpass none, got {'name': 'LowPass'" if name.startswith("a band") else "timesteps uniform, got {"
    )
    assert f"expected a checkpoint of a run with {entry}" in capsys.readouterr().err
    torch.manual_seed(1)  # a state that must not matter
    assert unlearn(world, output, *latest, *flags) == 0
    assert torch.equal(weights(output), expected)

    # And they matter.
    assert unlearn(world, tmp_path / "plain") == 0
    assert not torch.equal(weights(tmp_path / "plain"), expected)


def test_a_run_without_a_choice_goes_on_with_one_that_says_the_same(world, tmp_path):
    """Old folders say nothing of timesteps: they were uniform."""
    output = tmp_path / "run"
    assert unlearn(world, output, "--keep_checkpoints") == 0
    assert not {"timesteps", "lowpass", "loss_weight"} & record(output).keys()
    expected = weights(output)
    runs.unfinish(output, 2)
    uniform = ("--timestep_density", "uniform", "--loss_weight", "none")
    assert unlearn(world, output, "--resume_from_checkpoint", "latest", *uniform) == 0
    assert torch.equal(weights(output), expected)


def test_a_radius_that_moves_depends_on_the_length_of_the_run(world, tmp_path, capsys):
    output = tmp_path / "run"
    latest = ("--resume_from_checkpoint", "latest", "--steps", "6")
    assert unlearn(world, output, *RUNS["a band that grows"], "--keep_checkpoints") == 0
    runs.unfinish(output, 4)
    assert unlearn(world, output, *RUNS["a band that grows"], *latest) == 2
    assert "a run with --max_train_steps 6, got 4 in" in capsys.readouterr().err
    fixed = tmp_path / "fixed"
    assert unlearn(world, fixed, "--lowpass", "0.5", "--keep_checkpoints") == 0
    runs.unfinish(fixed, 4)
    assert unlearn(world, fixed, "--lowpass", "0.5", *latest) == 0


def test_what_was_used_is_said_and_recorded(world, tmp_path, capsys):
    to_forget = ("--forget_timesteps", "middle")
    to_keep = ("--retain_timesteps", "0", "10", "--retain_timesteps_outside", "0.5")
    band = ("--lowpass", "0.2", "0.9", "--lowpass_schedule", "linear_increase")
    assert unlearn(world, tmp_path / "chosen", *to_forget, *to_keep, *band, "--loss_weight", "min_snr") == 0
    found, shown = record(tmp_path / "chosen"), capsys.readouterr().out.splitlines()
    assert [f"{name}: {words}" in shown for name, words in found["selection"].items()] == [True] * 4
    assert found["selection"] == {
        "forget timesteps": "5 <= t < 15 of 20",
        "retain timesteps": "0 <= t < 10 of 20, the others 0.5 times as often",
        "forget frequencies": "low band, disc of radius 0.2 to 0.9, linear_increase over 4 steps, in nyquist",
        "loss weight": "min_snr, gamma 5",
    }
    assert found["timesteps"]["forget"] == {
        "name": "TimeWindow", "start": 5, "stop": 15, "outside": 0.0, "as_weight": False,
    }  # fmt: skip
    assert (found["lowpass"]["start"], found["total_steps"]) == (0.2, 4)
    assert found["loss_weight"] == {"name": "min_snr", "gamma": 5.0}
    assert unlearn(world, tmp_path / "plain", method="neggrad") == 0
    plain = {"forget timesteps": "all 20", "forget frequencies": "all", "loss weight": "none"}
    assert record(tmp_path / "plain")["selection"] == plain


def test_siss_is_told_how_far_its_densities_are_apart(world, tmp_path, monkeypatch):
    """Every step of the command gets `log p_forget(t) - log p_retain(t)` of what the flags say."""
    seen = []

    def watched(trained, method, schedule, batch, draws, *rest):
        seen.append((draws, schedule))
        return take_step(trained, method, schedule, batch, draws, *rest)

    monkeypatch.setattr("fastunlearn.engine.unlearner.take_step", watched)
    to_forget = ("--forget_timesteps", "5", "15", "--forget_timesteps_outside", "0.5")
    assert unlearn(world, tmp_path / "run", *to_forget, method="siss") == 0
    assert len(seen) == 4
    for draws, schedule in seen:
        t = torch.where(draws.from_forget, draws.forget_timesteps, draws.retain_timesteps)
        # Each of the 10 in the window has 2 of 30 parts, each of the others 1; of uniform draws, 1 of 20.
        assert len(schedule) == 20
        parts = 1 + ((t >= 5) & (t < 15)).double()
        torch.testing.assert_close(draws.time_log_ratio, (parts / 30 * 20).log())


@pytest.mark.parametrize(
    ("method", "flags"),
    [
        ("vanilla", ("--forget_timesteps", "250", "750")),
        ("retrack", ("--forget_timesteps", "250", "1001")),
        ("retrack", ("--lowpass", "2", "--lowpass_band", "high")),
    ],
    ids=["a method that does not read them", "a window beyond the schedule", "a band of nothing"],
)
def test_flags_that_do_not_fit_are_refused_before_an_image_is_read(
    world, tmp_path, capsys, monkeypatch, method, flags
):
    monkeypatch.setattr("fastunlearn.data.load_images", None)  # nor is a neighbour looked for
    assert unlearn(world, tmp_path / "run", *flags, method=method) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {flags[0]}: expected ")
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()
