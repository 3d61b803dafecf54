"""Which runs are the same run: what a resumed one may change, and what is refused with both values."""

from __future__ import annotations

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import runs
import torch
from small_methods import Pairs
from torch import nn

from fastunlearn import ImageStore, NoiseSchedule, Unlearner
from fastunlearn.host.precision import tf32
from fastunlearn.methods import SISS, ReTrack
from fastunlearn.objective.frequency import LowPass
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.objective.selection import Selection
from fastunlearn.objective.time import Density, LogitNormal, Product, Stratified, TimeWindow, Uniform
from fastunlearn.runs.identity import described, identity
from fastunlearn.runs.run_record import read_run
from fastunlearn.runs.selections import in_words
from fastunlearn.runs.training import unlearn
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

Lr = torch.optim.lr_scheduler


class Configured(TinyDenoiser):
    """With a configuration, as diffusers' networks have one."""

    def __init__(self, **config: Any):
        super().__init__()
        self.config = {"act_fn": "silu", "sample_size": (8, 8), "_name_or_path": str(config)} | config


def factor(slope: float) -> Callable[[int], float]:
    return lambda step: 1 / (1 + slope * step)


def frozen(model: nn.Module) -> nn.Module:
    model.time.requires_grad_(False)
    return model


def adamw(**options: Any) -> Callable[..., torch.optim.Optimizer]:
    return lambda parameters: torch.optim.AdamW(parameters, **{"lr": 1e-3, "fused": True} | options)


def lambda_lr(function: Callable[[int], float]) -> Callable[..., Any]:
    return lambda optimizer: Lr.LambdaLR(optimizer, function)


def changed_table() -> NoiseSchedule:
    schedule = linear_schedule()
    alpha = schedule.alpha.clone()
    alpha[500] = alpha[500].nextafter(torch.tensor(1.0).double())
    return NoiseSchedule(alpha, schedule.sigma)


class Shrink(ParameterRule):
    def __init__(self, factor: float):
        self.factor = factor

    def restrict(self, parameters, gradients):
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(self.factor)

    def state_dict(self):
        return {"factor": self.factor}


class Powers(Density):
    """A density of the user's, of which nothing is known but its table."""

    def __init__(self, power: int):
        self.power = power

    def table(self, num_timesteps: int) -> torch.Tensor:
        table = torch.arange(1, num_timesteps + 1, dtype=torch.float64) ** self.power
        return table / table.sum()


GROWING = LowPass(schedule="linear_increase", start=0.2, stop=0.9)


# The run that is saved, the one that would go on, and what the message says of both.
REFUSED: dict[str, tuple[dict, dict, tuple[str, ...]]] = {
    "start weights": ({}, {"model": lambda: TinyDenoiser(seed=1)}, ("start_weights",)),
    "width": ({}, {"model": lambda: TinyDenoiser(width=4)}, ("network", "parameters (89 here, 133 there)")),
    "configuration": (
        {"model": Configured},
        {"model": lambda: Configured(act_fn="gelu")},
        ("network", "config.act_fn", "'gelu'", "'silu'"),
    ),
    "mode": ({}, {"model": lambda: TinyDenoiser().eval()}, ("training (False here, True there)",)),
    "what is trained": ({}, {"wrap": frozen}, ("4 of 6 tensors", "6 of 6 tensors")),
    "precision of parameters": (
        {"autocast_dtype": torch.bfloat16},
        {"autocast_dtype": torch.bfloat16, "model": lambda: TinyDenoiser().bfloat16()},
        ("torch.bfloat16", "torch.float32"),
    ),
    "prediction type": (
        {},
        {"schedule": linear_schedule(prediction_type="v_prediction")},
        ("schedule", "'v_prediction'", "'epsilon'"),
    ),
    "noise levels": ({}, {"schedule": changed_table()}, ("schedule", "hmac_sha256")),
    "length of the schedule": ({}, {"schedule": linear_schedule(500)}, ("timesteps", "500", "1000")),
    "method": ({}, {"method": SISS()}, ("method", "'SISS'", "'ReTrack'")),
    "setting of the method": ({}, {"method": ReTrack(k=2, lambd=0.4)}, ("lambd (0.4 here, 0.3 there)",)),
    "seed": ({}, {"seed": 6}, ("this seed, got another",)),
    "batch size": ({}, {"batch_size": 6}, ("batch_size 6, got 4",)),
    "clipping": ({}, {"max_grad_norm": 2.0}, ("max_grad_norm 2.0, got 1.0",)),
    "no clipping": ({}, {"max_grad_norm": None}, ("max_grad_norm None, got 1.0",)),
    "autocast": ({}, {"autocast_dtype": torch.bfloat16}, ("'torch.bfloat16' here, None there",)),
    "loss scaling": (
        {"autocast_dtype": torch.float16, "scale": 8.0},
        {"autocast_dtype": torch.float16, "scale": 16.0},
        ("grad_scaler", "16.0", "8.0"),
    ),
    "optimizer": (
        {},
        {"optimizer": lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)},
        ("'Adam'", "'AdamW'"),
    ),
    "learning rate": ({}, {"optimizer": adamw(lr=2e-3)}, ("learning_rates.0 (0.002 here, 0.001 there)",)),
    "betas": ({}, {"optimizer": adamw(betas=(0.8, 0.999))}, ("betas.0 (0.8 here, 0.9 there)",)),
    "weight decay": ({}, {"optimizer": adamw(weight_decay=0.5)}, ("weight_decay (0.5 here, 0.01 there)",)),
    "scheduler": (
        {},
        {"lr_scheduler": lambda o: Lr.CosineAnnealingLR(o, 4)},
        ("'CosineAnnealingLR'", "'LinearLR'"),
    ),
    "no scheduler": ({}, {"lr_scheduler": lambda o: None}, ("lr_scheduler None", "'LinearLR'")),
    "setting of the scheduler": (
        {},
        {"lr_scheduler": lambda o: Lr.LinearLR(o, 0.5, 1.0, 8)},
        ("settings.total_iters (8 here, 4 there)",),
    ),
    "function of the scheduler": (
        {"lr_scheduler": lambda_lr(factor(0.1))},
        {"lr_scheduler": lambda_lr(factor(0.2))},
        ("lr_scheduler", "factors.0.at.1 (0.833", "0.909"),
    ),
    "average": ({}, {"ema": 0.99}, ("ema", "0.99", "0.9")),
    "no average": ({}, {"ema": None}, ("expected the state of ['lr_scheduler'] beside", "['ema', "
                                                                                        "'lr_scheduler']")),
    "rules": ({}, {"rules": [Shrink(0.9)]}, ("rules", "Shrink")),
    "setting of a rule": (
        {"rules": [Shrink(0.9)]},
        {"rules": [Shrink(0.8)]},
        ("rules", "0.state.factor (0.8 here, 0.9 there)"),
    ),
    "reference": (
        {"method": Pairs(), "reference_model": TinyDenoiser(seed=4)},
        {"method": Pairs(), "reference_model": TinyDenoiser(seed=5)},
        ("reference_model", "weights"),
    ),
    "window": (
        {"time_window": TimeWindow(250, 750)},
        {"time_window": TimeWindow(200, 750)},
        ("timesteps", "forget.start (200 here, 250 there)"),
    ),
    "no window": (
        {"time_window": TimeWindow(250, 750)},
        {},
        ("timesteps uniform, got {'forget': {'name': 'TimeWindow', 'start': 250",),
    ),
    "density of what is kept": (
        {},
        {"retain_density": LogitNormal()},
        ("timesteps {'forget': {'name': 'Uniform'}, 'retain': {'name': 'LogitNormal'", "got uniform"),
    ),
    "strata": (
        {"time_window": Product(TimeWindow(250, 750), LogitNormal())},
        {"time_window": Stratified(Product(TimeWindow(250, 750), LogitNormal()))},
        ("timesteps", "forget.name ('Stratified' here, 'Product' there)"),
    ),
    "density of the user's": (
        {"time_window": Powers(1)},
        {"time_window": Powers(2)},
        ("timesteps", "forget.drawn.hmac_sha256"),
    ),
    "band": (
        {"lowpass": LowPass(0.5)},
        {"lowpass": LowPass(0.4)},
        ("lowpass", "radius (0.4 here, 0.5 there)"),
    ),
    "fraction": (
        {"lowpass": LowPass(0.3333)},
        {"lowpass": LowPass(Fraction(1, 3))},
        ("radius ('1/3' here, 0.3333 there)",),
    ),
    "no band": ({"lowpass": LowPass(0.5)}, {}, ("lowpass none, got {'name': 'LowPass', 'radius': 0.5",)),
    "length of a schedule of the band": (
        {"lowpass": GROWING, "total_steps": 4},
        {"lowpass": GROWING, "total_steps": 5},
        ("total_steps 5, got 4",),
    ),
    "weight of the loss": (
        {"loss_weight": "cosmap"},
        {"loss_weight": "sigma_sqrt"},
        ("loss_weight", "name ('sigma_sqrt' here, 'cosmap' there)"),
    ),
    "gamma": (
        {"loss_weight": "min_snr"},
        {"loss_weight": "min_snr", "snr_gamma": 3},
        ("loss_weight", "gamma (3.0 here, 5.0 there)"),
    ),
    "images to forget": ({}, {"forget": ImageStore(runs.images(4, 9))}, ("data", "forget.hmac_sha256")),
    "images to keep": ({}, {"retain": ImageStore(runs.images(21, 2))}, ("retain.rows (21 here, 20 there)",)),
}  # fmt: skip


def make(arguments: dict[str, Any]) -> Any:
    """An unlearner with a network of its own."""
    model = arguments.get("model")
    return runs.make(**arguments | ({} if model is None else {"model": model()}))


@pytest.mark.parametrize("name", REFUSED)
def test_another_run_is_refused_with_both_values(tmp_path: Path, name: str):
    first, second, words = REFUSED[name]
    runs.stop(make(first), tmp_path)
    record = (tmp_path / "run.json").read_text()
    unlearner = make(second)
    before = runs.snapshot(unlearner)
    with pytest.raises(ValueError, match="resume_from_checkpoint: expected") as refusal:
        runs.run(unlearner, tmp_path, resume_from_checkpoint="latest")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert runs.same(runs.snapshot(unlearner), before)
    assert (tmp_path / "run.json").read_text() == record


def test_other_neighbours_are_another_run(tmp_path: Path):
    runs.stop(runs.make(), tmp_path)
    unlearner = runs.make()
    unlearner.neighbor_rows = unlearner.neighbor_rows.flip(1)  # as if they had been given in another order
    with pytest.raises(ValueError, match=r"a run with neighbors as here, got another with hmac_sha256"):
        runs.run(unlearner, tmp_path, resume_from_checkpoint="latest")


def test_the_rounding_of_products_is_part_of_a_run(tmp_path: Path):
    with tf32(True):
        runs.stop(runs.make(), tmp_path)
    with pytest.raises(ValueError, match=r"precision .*float32\.products \('none' here, 'tf32' there\)"):
        runs.run(runs.make(), tmp_path, resume_from_checkpoint="latest")


def test_more_may_be_part_of_a_run(tmp_path: Path):
    runs.stop(runs.make(), tmp_path, identity={"scheduler": {"name": "DDPM", "clip_sample": True}})
    for other, text in (
        ({"scheduler": {"name": "DDIM", "clip_sample": True}}, r"name \('DDIM' here, 'DDPM' there\)"),
        ({"scheduler": {"name": "DDPM"}}, r"clip_sample \('nothing of this name' here, True there\)"),
        (None, "scheduler nothing of this name, got {'name': 'DDPM'"),
    ):
        with pytest.raises(ValueError, match=text):
            runs.run(runs.make(), tmp_path, resume_from_checkpoint="latest", identity=other)
    with pytest.raises(
        ValueError, match="identity: expected names of your own, got 'seed', which has a meaning"
    ):
        runs.run(runs.make(), tmp_path, resume_from_checkpoint="latest", identity={"seed": 1})
    runs.run(
        runs.make(),
        tmp_path,
        resume_from_checkpoint="latest",
        identity={"scheduler": {"clip_sample": True, "name": "DDPM"}},
    )


# --- what may change --------------------------------------------------------------------------------------

# Arguments of the unlearner and of `unlearn` that a resumed run may change, and whether it ends with the same
# bits.
ALLOWED: dict[str, tuple[dict, dict, bool]] = {
    "nothing": ({}, {}, True),
    "checkpointing_steps": ({}, {"checkpointing_steps": 1}, True),
    "checkpoints_total_limit": ({}, {"checkpoints_total_limit": 1}, True),
    "logging_steps": ({}, {"logging_steps": 3}, True),
    "report_to": ({}, {"report_to": lambda step, values: None}, True),
    "max_skipped_steps": ({}, {"max_skipped_steps": 99}, True),
    "max_skipped_share": ({}, {"max_skipped_share": 0.9}, True),
    "max_time": ({}, {"max_time": 1e9}, True),
    "show_progress": ({}, {"show_progress": True}, True),
    "total_steps": ({"total_steps": 99}, {}, True),
    "replay": ({"replay": False}, {}, True),
    "residency": ({"residency": "device"}, {}, True),
    "keep_grad": ({"keep_grad": True}, {}, True),
    "keep_checkpoints": ({}, {"keep_checkpoints": True}, True),
    "allow_overlap": ({"allow_overlap": True}, {}, True),
    "warn_of_near_copies": ({"warn_of_near_copies": False}, {}, True),
    "order of the parameters": (
        {"order": lambda parameters: parameters[::-1]},
        {},
        False,
    ),  # of the norm's summands
    "micro_batch_size": ({"micro_batch_size": 2}, {}, False),
    "compile": ({"compile": "try"}, {}, False),
    "memory format": ({"model": lambda: TinyDenoiser().to(memory_format=torch.channels_last)}, {}, False),
    "parallel": ({"wrap": nn.DataParallel}, {}, True),
}


# Arguments that are part of a run: of each a change is refused above.
COMPARED = {
    "model", "optimizer", "schedule", "method", "forget", "retain", "neighbors", "batch_size", "seed",
    "autocast_dtype", "grad_scaler", "max_grad_norm", "ema", "lr_scheduler", "identity",
    "rules", "reference_model",  # in objective/test_hooks_hostile.py
    "time_window", "retain_density", "lowpass", "loss_weight", "snr_gamma",
}  # fmt: skip
# What a run is given that is neither: itself, where it is written, what its record says beside; how long it
# is and how many processes take it have tests of their own.
NEITHER = {
    "self", "unlearner", "output_dir", "resume_from_checkpoint", "record", "private", "num_steps",
    "process_group", "leave",
}  # fmt: skip


@pytest.mark.parametrize("function", [Unlearner.__init__, unlearn], ids=["Unlearner", "unlearn"])
def test_every_argument_is_compared_or_may_change(function: Callable):
    """And what may change is listed in the docs."""
    names = set(inspect.signature(function).parameters)
    may_change = names & set(ALLOWED)
    assert names - may_change <= COMPARED | NEITHER
    assert not may_change & COMPARED
    page = (Path(__file__).parents[1] / "docs" / "resume.md").read_text(encoding="utf-8")
    listed = page.partition("**What may change:**")[2].partition("\n\n")[0]
    assert [name for name in sorted(may_change) if f"`{name}`" not in listed] == []


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    return runs.whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_resumed_run_may_change(
    whole: tuple[Path, torch.Tensor], tmp_path: Path, monkeypatch, name: str
):
    folder, expected = whole
    arguments, options, exactly = ALLOWED[name]
    monkeypatch.setattr("fastunlearn.step.compilation.BACKEND", "eager")  # inductor takes a minute
    shutil.copytree(folder / "private", tmp_path / "moved" / "private")
    for step in (3, 4):
        shutil.rmtree(runs.saved_in(tmp_path / "moved", step), ignore_errors=True)
    unlearner = make(arguments)
    runs.run(unlearner, tmp_path / "moved", **{"resume_from_checkpoint": "latest"} | options)
    difference = (runs.weights(unlearner) - expected).abs().max()
    assert difference == 0 if exactly else difference < 1e-6  # four steps of at most 1e-3 each


def test_the_run_may_be_longer_where_the_rates_do_not_depend_on_its_length(tmp_path: Path):
    constant = {"lr_scheduler": lambda optimizer: Lr.ConstantLR(optimizer, 0.5, 3)}
    runs.stop(runs.make(total_steps=2, **constant), tmp_path)
    history = runs.run(runs.make(total_steps=6, **constant), tmp_path, 6, resume_from_checkpoint="latest")
    assert [record["step"] for record in history.records] == [1, 2, 3, 4, 5, 6]


class Own:
    """A scheduler of the user's: nothing is known of what its rates depend on."""

    def step(self) -> None:
        """Nothing."""

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Nothing."""


def test_an_unknown_scheduler_may_depend_on_the_length(tmp_path: Path):
    own = {"lr_scheduler": lambda optimizer: Own()}
    runs.stop(runs.make(total_steps=2, **own), tmp_path)
    with pytest.raises(ValueError, match=r"total_steps \(6 here, 2 there\)"):
        runs.run(runs.make(total_steps=6, **own), tmp_path, 6, resume_from_checkpoint="latest")


SELECTIONS: dict[str, dict[str, Any]] = {
    "window": {"time_window": TimeWindow(250, 750, outside=0.1)},
    "stratified window": {"time_window": Stratified(TimeWindow(250, 750))},
    "weight": {"retain_density": TimeWindow(0, 500, as_weight=True), "loss_weight": "min_snr"},
    "density of the user's": {"time_window": Powers(2)},
    "mixture of two densities": {"method": SISS(), "time_window": TimeWindow(250, 750)},
    "band": {"lowpass": LowPass(Fraction(1, 3), band="high")},
    "band that grows": {"lowpass": GROWING, "total_steps": 4},
    "band in stages": {
        "lowpass": LowPass(schedule="step_decay", start=0.9, stop=0.2, stages=2),
        "total_steps": 4,
    },
}


@pytest.mark.parametrize("name", SELECTIONS)
def test_every_selection_goes_on_bit_by_bit(tmp_path: Path, name: str):
    whole, resumed = runs.make(**SELECTIONS[name]), runs.make(**SELECTIONS[name])
    runs.run(whole, tmp_path / "whole")
    runs.stop(runs.make(**SELECTIONS[name]), tmp_path / "run")
    runs.run(resumed, tmp_path / "run", resume_from_checkpoint="latest")
    assert torch.equal(runs.weights(resumed), runs.weights(whole))
    plain = runs.make(method=SELECTIONS[name].get("method"))
    runs.run(plain, tmp_path / "plain")
    assert not torch.equal(runs.weights(plain), runs.weights(whole))


def test_what_a_run_without_a_choice_does_may_be_said(tmp_path: Path):
    """Folders of before there was a choice say nothing of it."""
    assert not {"timesteps", "lowpass", "loss_weight"} & identity(runs.make()).keys()
    said = {"time_window": Uniform(), "retain_density": Uniform(), "loss_weight": "none"}
    assert identity(runs.make(**said)) == identity(runs.make())


def test_a_fraction_is_the_decimal_that_means_the_same():
    third, tenths = (
        identity(runs.make(lowpass=LowPass(Fraction(1, 3)))),
        identity(runs.make(lowpass=LowPass(Fraction(3, 10)))),
    )
    assert third["lowpass"]["radius"] == "1/3"
    assert tenths == identity(runs.make(lowpass=LowPass(0.3)))


@dataclass(frozen=True)
class Banded(ReTrack):
    """A method with a band among its settings."""

    band: LowPass = GROWING


def test_the_length_counts_where_a_band_of_the_method_moves():
    first, second = (identity(runs.make(method=Banded(k=2), total_steps=steps)) for steps in (4, 5))
    assert (first.pop("total_steps"), second.pop("total_steps")) == (4, 5)
    assert first == second
    third = identity(runs.make(method=Banded(k=2, band=LowPass(Fraction(1, 3))), total_steps=4))
    assert (third["method"]["band"]["radius"], "total_steps" in third) == ("1/3", False)


def test_a_run_of_flow_matching_that_drew_uniformly_is_told_how_to_go_on(tmp_path: Path):
    """Its default was uniform once."""
    flow = {"schedule": NoiseSchedule.flow(1000)}
    uniform = flow | {"time_window": Uniform(), "retain_density": Uniform()}
    runs.stop(runs.make(**uniform), tmp_path)
    assert "timesteps" not in read_run(tmp_path)
    with pytest.raises(
        ValueError, match=r"timesteps \{.*'LogitNormal'.*, got uniform in .*; flow matching drew"
    ):
        runs.run(runs.make(**flow), tmp_path, resume_from_checkpoint="latest")
    with pytest.raises(ValueError, match=r"got uniform in [^;]*$"):
        runs.run(runs.make(**flow, time_window=TimeWindow(0, 9)), tmp_path, resume_from_checkpoint="latest")
    runs.run(runs.make(**uniform), tmp_path, resume_from_checkpoint="latest")


def test_the_record_says_which_timesteps_and_frequencies_were_used(tmp_path: Path):
    band = {"band": "mid", "inner": 1, "kind": "box", "unit": "bins", "high_frequency_weight": 0.25}
    selections = {
        "time_window": Stratified(Product(TimeWindow(250, 750, outside=0.1), LogitNormal(0.5))),
        "retain_density": TimeWindow(0, 500, as_weight=True),
        "lowpass": LowPass(3, **band),
    }
    runs.stop(runs.make(**selections), tmp_path)
    window = "250 <= t < 750 of 1000, the others 0.1 times as often"
    frequencies = "mid band, box of radius 3, in bins, without the radius 1"
    assert read_run(tmp_path)["selection"] == {
        "forget timesteps": f"{window}, times logit-normal with mean 0.5 and deviation 1, in strata",
        "retain timesteps": "0 <= t < 500 of 1000, as a weight of uniform draws",
        "forget frequencies": f"{frequencies}, the others times 0.25",
        "loss weight": "none",
    }


def test_the_record_says_which_band_the_method_has(tmp_path: Path):
    unlearner = runs.make(method=Banded(k=2, band=LowPass(Fraction(1, 3))))
    runs.stop(unlearner, tmp_path)
    found = read_run(tmp_path)["selection"]
    assert found["forget frequencies"] == "as the method has them"
    assert found["the method's band"] == "low band, disc of radius 1/3, in nyquist"

    # That of the step is of the forget terms; the method's is then of others.
    unlearner.selection = Selection(lowpass=LowPass(0.5))
    found = in_words(unlearner)
    assert found["forget frequencies"] == "low band, disc of radius 0.5, in nyquist"
    assert found["the method's band"] == "low band, disc of radius 1/3, in nyquist"


def test_the_record_keeps_where_the_run_began(tmp_path: Path):
    runs.stop(runs.make(), tmp_path, record={"base_model": "/models/a", "note": 1})
    runs.run(
        runs.make(),
        tmp_path,
        4,
        record={"base_model": "/moved/a", "note": 2},
        resume_from_checkpoint="latest",
    )
    record = read_run(tmp_path)
    assert (record["base_model"], record["note"]) == ("/models/a", 2)
    assert [(entry["step"], entry["base_model"]) for entry in record["resumed"]] == [(2, "/moved/a")]
    assert record["steps"] == 4


def test_a_run_that_did_not_begin_at_its_first_step_can_be_resumed(tmp_path: Path):
    """Nobody knows the weights that it began with; everything else is compared."""
    unlearner = runs.make()
    unlearner.step()
    runs.stop(unlearner, tmp_path)
    resumed = runs.make()
    runs.run(resumed, tmp_path, resume_from_checkpoint="latest")
    whole = runs.make()
    runs.run(whole, tmp_path / "whole")
    assert torch.equal(runs.weights(resumed), runs.weights(whole))


def test_a_schedule_that_moves_more_than_the_rate_goes_on(tmp_path: Path):
    """OneCycleLR moves the betas, too: they are settings, and not the same at every step."""
    one_cycle = {"lr_scheduler": lambda optimizer: Lr.OneCycleLR(optimizer, 1e-2, total_steps=10)}
    whole, resumed = runs.make(**one_cycle), runs.make(**one_cycle)
    runs.run(whole, tmp_path / "whole")
    runs.stop(runs.make(**one_cycle), tmp_path / "run")
    runs.run(resumed, tmp_path / "run", resume_from_checkpoint="latest")
    assert torch.equal(runs.weights(resumed), runs.weights(whole))


SCHEDULERS: dict[str, Callable[..., Any]] = {
    "step": lambda o: Lr.StepLR(o, 2),
    "multi step": lambda o: Lr.MultiStepLR(o, [1, 3]),
    "sequence": lambda o: Lr.SequentialLR(o, [Lr.ConstantLR(o), Lr.ExponentialLR(o, 0.9)], [3]),
    "chain": lambda o: Lr.ChainedScheduler([Lr.ConstantLR(o), Lr.ExponentialLR(o, 0.9)]),
    "cycle": lambda o: Lr.CyclicLR(o, 1e-4, 1e-3, 2),
    "restarts": lambda o: Lr.CosineAnnealingWarmRestarts(o, 2),
    "table": lambda_lr(lambda step: [1.0, 0.5, 0.25, 0.125, 0.1][step]),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on_bit_by_bit(tmp_path: Path, name: str):
    settings = {"lr_scheduler": SCHEDULERS[name]}
    whole, resumed = runs.make(**settings), runs.make(**settings)
    runs.run(whole, tmp_path / "whole")
    runs.stop(runs.make(**settings), tmp_path / "run")
    runs.run(resumed, tmp_path / "run", resume_from_checkpoint="latest")
    assert torch.equal(runs.weights(resumed), runs.weights(whole))
    assert resumed.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


def test_a_description_is_json_and_the_same_in_every_process():
    first, second = (identity(runs.make(lr_scheduler=lambda_lr(factor(0.1)))) for _ in range(2))
    assert first == second == json.loads(json.dumps(first))
    values = {
        "f": factor,
        "nan": float("nan"),
        "t": torch.ones(3),
        "dtype": torch.float32,
        "set": {2, 1},
        "object": object(),
    }
    assert described(values) == json.loads(json.dumps(described(values)))
    assert "0x" not in str(described(values))
