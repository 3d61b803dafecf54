"""`fastunlearn evaluate`: it knows before it samples what it can have, writes results as they come, and says
yes only of what it saw."""

from __future__ import annotations

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastunlearn.cli import main
from fastunlearn.measuring import Images, Settings, Subject, measure, parse_metrics, plan
from fastunlearn.metrics.threshold import Threshold
from fastunlearn.models import save_checkpoint

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("tyro")
NOISY_END = {"num_train_timesteps": 20, "beta_start": 0.02, "beta_end": 0.8}  # alphas_cumprod ends at 2e-6
FEW = (
    "--num-images", "6", "--num-inference-steps", "3", "--timestep", "5", "--chains", "2",
    "--nll-tolerance", "1", "--device", "cpu",
)  # fmt: skip


def network(seed: int = 0, size: int = 8, **config):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
        widths = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
        return diffusers.UNet2DModel(
            **{"sample_size": size, "in_channels": 1, "out_channels": 1, **widths, **blocks, **config}
        )


def checkpoint(folder, model=None, **scheduler):
    return save_checkpoint(
        folder, network() if model is None else model, diffusers.DDPMScheduler(**{**NOISY_END, **scheduler})
    )


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> SimpleNamespace:
    """8x8: two checkpoints, two images to forget and twenty to keep.

    28x28: one checkpoint, one digit-like image, and forty.
    """
    root = tmp_path_factory.mktemp("evaluate")
    generator = np.random.default_rng(0)
    for name, shape in (
        ("forget", (2, 1, 8, 8)),
        ("retain", (20, 1, 8, 8)),
        ("digit", (1, 1, 28, 28)),
        ("digits", (40, 1, 28, 28)),
    ):
        np.save(root / f"{name}.npy", generator.integers(0, 256, shape, dtype=np.uint8))
    return SimpleNamespace(
        root=root, before=checkpoint(root / "before"), after=checkpoint(root / "after", network(1)),
        large=checkpoint(root / "large", network(size=28)),
        forget=root / "forget.npy", retain=root / "retain.npy",
        digit=root / "digit.npy", digits=root / "digits.npy",
    )  # fmt: skip


@pytest.fixture
def evaluate(world, tmp_path):
    """Runs the command on the 8x8 world, or whatever is said last; the exit code, and what the file says."""

    def evaluate(*more: object, model=None, forget=None, retain=None) -> tuple[int, dict | None]:
        output = tmp_path / "out"
        paths = ["--model", model or world.after, "--forget", forget or world.forget, "--output", output]
        if retain is not False:
            paths += ["--retain", retain or world.retain]
        code = main([str(argument) for argument in ("evaluate", *paths, *FEW, *more)])
        file = output / "evaluation.json"
        return code, json.loads(file.read_text()) if file.is_file() else None

    return evaluate


# --- what is measured ---------------------------------------------------------------------------------------


def test_it_compares_two_checkpoints(world, evaluate, tmp_path, capsys):
    code, result = evaluate("--against", world.before)
    shown = capsys.readouterr().out
    assert code == 0
    assert shown.splitlines()[-1] == f"evaluation: {tmp_path / 'out' / 'evaluation.json'}"
    assert "before" in shown
    assert "after" in shown
    assert result["status"] == "complete"
    assert result["forget_images"] == 2
    assert result["not_measured"] == {"before": {}, "after": {}}
    assert list(result["measured"]) == ["before", "after"]
    for row in result["measured"].values():
        assert list(row) == ["frequency", "nll", "reconstruction"]
        assert (
            row["reconstruction"]["total"],
            row["frequency"]["total"],
            len(row["nll"]["bits_per_dim"]),
        ) == (4, 6, 2)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["evaluation.json"]


def test_it_says_of_how_many_images_a_row_is(evaluate, capsys):
    evaluate("--metrics", "frequency,reconstruction", "--max-forget-images", "1")
    assert "reconstruction: of the first 1 of 2 images to forget" in capsys.readouterr().out
    evaluate("--metrics", "frequency,reconstruction")
    assert "of the first" not in capsys.readouterr().out


def test_what_was_read_and_how_is_recorded(evaluate):
    _, result = evaluate("--metrics", "frequency", "--resample", "box")
    for name, rows in (("forget", 2), ("retain", 20)):
        assert result["images"][name]["rows"] == rows
        assert result["images"][name]["options"]["resample"] == "box"
    assert "pictures" not in result["settings"]


def test_a_random_network_on_8x8_finds_no_forget_image(evaluate, capsys):
    """With the papers' 10 it found one in every sample."""
    code, result = evaluate("--metrics", "frequency", "--num-images", "16")
    assert code == 0
    assert result["measured"]["model"]["frequency"]["count"] == 0
    assert result["measured"]["model"]["frequency"]["min_distance"] > result["threshold"]["value"]
    assert result["threshold"]["papers"] is None
    assert result["threshold"]["how"].startswith("half the distance of forget image")
    assert (
        f"threshold: {result['threshold']['value']:.4g} (half the distance of forget image"
        in capsys.readouterr().out
    )


def test_28x28_keeps_the_papers_threshold_beside_the_calibrated_one(world, evaluate, capsys):
    code, result = evaluate(
        "--metrics", "frequency", model=world.large, forget=world.digit, retain=world.digits
    )
    assert code == 0
    # These pictures are noise: a constant one is within 10 of them, so the papers' threshold cannot serve.
    assert result["threshold"]["papers"] == 10
    assert result["threshold"]["value"] == result["threshold"]["calibrated"] < 5
    shirt = np.zeros((1, 1, 28, 28), np.uint8)
    shirt[..., 14:] = 255  # 14 from the nearest constant
    np.save(world.root / "shirt.npy", shirt)
    code, result = evaluate(
        "--metrics", "frequency", model=world.large, forget=world.root / "shirt.npy", retain=world.digits
    )
    assert code == 0
    assert (result["threshold"]["value"], result["threshold"]["papers"]) == (10, 10)
    assert result["threshold"]["calibrated"] < 10
    beside = result["measured"]["model"]["frequency"]["at_calibrated_threshold"]
    assert (beside["total"], beside["threshold"]) == (6, result["threshold"]["calibrated"])
    assert "calibrated on the images to keep it would be" in capsys.readouterr().out


def test_scores_of_grey_28x28_images(world, evaluate, capsys):
    arguments = ("--metrics", "fid,is", "--num-images", "8")
    code, result = evaluate(*arguments, model=world.large, forget=world.digit, retain=world.digits)
    assert code == 0
    scores = result["measured"]["model"]["is"]
    assert scores == {**result["measured"]["model"]["fid"], "value": scores["value"]}
    assert (scores["num_samples"], scores["num_real"]) == (8, 40)
    assert "fid (model): 8 samples and 40 real images for 128 features" in capsys.readouterr().out


# --- what cannot be had -------------------------------------------------------------------------------------


def test_a_metric_that_cannot_be_had_costs_its_row(evaluate, capsys):
    """fid needs the classifier's size; the others need nothing that is not there."""
    code, result = evaluate("--metrics", "frequency,fid")
    shown = capsys.readouterr().out
    assert code == 1
    assert result["status"] == "incomplete"
    assert list(result["measured"]["model"]) == ["frequency"]
    reason = result["not_measured"]["model"]["fid"]
    assert (
        reason
        == "metrics: expected fid and is for images of shape (1, 28, 28) only (the shipped classifier's), "
        "got (1, 8, 8)"
    )
    assert f"fid (model) not had: {reason}" in shown
    assert "not had" in shown


def sampling_is_an_error(monkeypatch):
    def sample(*arguments, **options):
        raise AssertionError("sampled")

    monkeypatch.setattr("fastunlearn.measuring.measurement.sample", sample)
    monkeypatch.setattr("fastunlearn.measuring.measurement.reconstruct", sample)
    monkeypatch.setattr("fastunlearn.measuring.measurement.bits_per_dim", sample)


def test_where_nothing_can_be_had_nothing_is_sampled(evaluate, capsys, monkeypatch):
    """Without images to keep there is no threshold at 8x8."""
    sampling_is_an_error(monkeypatch)
    code, result = evaluate("--metrics", "frequency,reconstruction", retain=False)
    error = capsys.readouterr().err
    assert (code, result) == (2, None)
    assert error.count("\n") == 1
    assert error.startswith(
        "error: metrics: expected at least one that can be had, got none "
        "(frequency: threshold: expected a number"
    )


def test_the_likelihood_needs_no_threshold(evaluate):
    code, result = evaluate("--metrics", "nll", retain="nowhere")
    assert (code, result["threshold"]) == (0, {"refused": "no metric needs one"})
    code, result = evaluate(retain=False)
    assert code == 1
    assert list(result["measured"]["model"]) == ["nll"]
    assert result["not_measured"]["model"].keys() == {"frequency", "reconstruction"}
    assert "threshold: expected a number, or images to keep" in result["threshold"]["refused"]


SCHEDULES = {
    "cosine": ({"beta_schedule": "squaredcos_cap_v2"}, 0, {}),
    "zero terminal SNR": (
        {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
        1,
        {"frequency": "alpha = 0 at t = 19"},
    ),
    "does not end in noise": ({"beta_end": 0.02}, 1, {"nll": "schedule: expected one that ends in noise"}),
    "few timesteps": (
        {"num_train_timesteps": 4, "beta_end": 0.99},
        1,
        {"reconstruction": r"timestep: expected an integer in [0, 3]"},
    ),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_keeps_what_it_can_have(world, evaluate, tmp_path, name):
    settings, expected, reasons = SCHEDULES[name]
    code, result = evaluate(model=checkpoint(tmp_path / "model", **settings))
    assert code == expected
    assert result["not_measured"]["model"].keys() == reasons.keys()
    assert all(reason in result["not_measured"]["model"][metric] for metric, reason in reasons.items())
    assert len(result["measured"]["model"]) == 3 - len(reasons)


def test_likelihoods_by_different_odes_are_not_compared(world, evaluate, tmp_path, capsys):
    cosine = checkpoint(tmp_path / "cosine", beta_schedule="squaredcos_cap_v2")
    code, result = evaluate("--metrics", "nll", "--against", cosine)
    assert code == 0
    assert [row["nll"]["ode"] for row in result["measured"].values()] == ["angle", "papers"]
    assert "nll: not comparable" in capsys.readouterr().out


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_learned_variance(evaluate, tmp_path, sampler):
    model = checkpoint(tmp_path / "model", network(out_channels=2), variance_type="learned_range")
    code, result = evaluate("--sampler", sampler, model=model)
    assert code == 0
    assert len(result["measured"]["model"]) == 3


def test_a_variance_that_was_not_learned_costs_what_samples(evaluate, tmp_path):
    model = checkpoint(tmp_path / "model", variance_type="learned")
    code, result = evaluate(model=model)
    assert code == 1
    assert list(result["measured"]["model"]) == ["nll"]
    assert (
        "(the scheduler learns the variance), got float32 of shape (1, 1, 8, 8) on cpu"
        in result["not_measured"]["model"]["frequency"]
    )


def overflowing(seed: int = 0):
    """Finite weights, and nothing that it predicts is."""
    model = network(seed)
    with torch.no_grad():
        for parameter in model.conv_out.parameters():
            parameter.fill_(3e38)
    return model


def test_a_model_that_draws_nothing_finite_is_not_one_that_forgot(world, evaluate, tmp_path, capsys):
    """NaN is within no distance of anything: 0 of 6 found was the answer.

    Here nothing can be had, which is known from one call.
    """
    broken = checkpoint(tmp_path / "broken", overflowing())
    code, result = evaluate(model=broken)
    assert (code, result) == (2, None)
    assert (
        "samples: expected finite values from the model, got NaN or Inf in 1 of the first 1"
        in capsys.readouterr().err
    )
    code, result = evaluate("--metrics", "frequency", "--against", world.before, model=broken)
    assert code == 1
    assert list(result["measured"]["before"]) == ["frequency"]
    assert "expected finite values" in result["not_measured"]["after"]["frequency"]
    assert result["verdict"]["answer"] == "not decided"


def test_weights_that_are_not_finite_are_refused_before_anything(world, evaluate, tmp_path, capsys):
    model = network()
    torch.nn.init.constant_(model.conv_out.bias, torch.nan)
    broken = checkpoint(tmp_path / "broken", model)
    for arguments in ({"model": broken}, {}):
        code, result = evaluate("--against", broken if not arguments else world.before, **arguments)
        assert (code, result) == (2, None)
        assert "expected finite weights, got NaN or Inf in conv_out.bias" in capsys.readouterr().err


def test_checkpoints_of_different_sizes_are_not_compared(world, evaluate, capsys):
    code, result = evaluate("--against", world.large)
    assert (code, result) == (2, None)
    assert (
        "against: expected a checkpoint for images of (1, 8, 8), as --model, got one for (1, 28, 28)"
        in capsys.readouterr().err
    )


WRONG = [
    (
        ["--metrics", "beauty"],
        "metrics: expected one of frequency, nll, reconstruction, fid, is, got 'beauty'",
    ),
    (
        ["--metrics", ""],
        "metrics: expected at least one of frequency, nll, reconstruction, fid, is, got none",
    ),
    (["--metrics", "nll,frequency,nll"], "metrics: expected each metric once, got nll more than once"),
    (["--metrics", "nll,"], "metrics: expected one of frequency, nll, reconstruction, fid, is, got ''"),
    (["--threshold", "0"], "threshold: expected a finite number in (0, inf), got 0.0"),
    (["--threshold", "nan"], "threshold: expected a finite number in (0, inf), got nan"),
    (["--threshold", "10"], "it would call a picture that shows nothing a match"),
    (["--chains", "0"], "chains: expected an integer >= 1, got 0"),
    (["--num-images", "0"], "num_images: expected an integer >= 1, got 0"),
    (["--max-forget-images", "0"], "max_forget_images: expected an integer >= 1, got 0"),
    (["--nll-tolerance", "0"], "nll_tolerance: expected a finite number in (0, inf), got 0.0"),
    (["--timestep", "-1"], "timestep: expected an integer >= 0, got -1"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_input_is_refused_before_any_work(evaluate, capsys, monkeypatch, arguments, message):
    sampling_is_an_error(monkeypatch)
    code, result = evaluate(*arguments)
    error = capsys.readouterr().err
    assert (code, result) == (2, None)
    assert error.count("\n") == 1
    assert message in error


# --- results as they come -----------------------------------------------------------------------------------


def test_a_metric_that_fails_on_the_way_costs_its_row(evaluate, capsys, monkeypatch):
    def underflow(*arguments, **options):
        raise AssertionError("underflow in dt 0.0")  # what torchdiffeq says of a stiff ODE

    monkeypatch.setattr("fastunlearn.measuring.measurement.bits_per_dim", underflow)
    code, result = evaluate()
    assert code == 1
    assert list(result["measured"]["model"]) == ["frequency", "reconstruction"]
    assert result["not_measured"]["model"] == {"nll": "underflow in dt 0.0"}
    assert "Traceback" in capsys.readouterr().err


def test_what_was_measured_is_on_disk_when_the_run_dies(evaluate, tmp_path, monkeypatch):
    file = tmp_path / "out" / "evaluation.json"
    seen = []

    def die(*arguments, **options):
        seen.append(json.loads(file.read_text()))
        raise KeyboardInterrupt

    monkeypatch.setattr("fastunlearn.measuring.measurement.bits_per_dim", die)
    code, result = evaluate()
    assert code == 130
    assert seen[0]["status"] == "running"
    assert list(seen[0]["measured"]["model"]) == ["frequency"]
    assert (result["status"], result["error"]) == ("failed", "KeyboardInterrupt: ")
    assert result["measured"] == seen[0]["measured"]


def test_a_defect_ends_the_run_and_keeps_what_was_measured(evaluate, tmp_path, monkeypatch):
    def broken(*arguments, **options):
        return {}["nothing"]

    monkeypatch.setattr("fastunlearn.measuring.measurement.reconstruct", broken)
    with pytest.raises(KeyError):
        evaluate()
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert (result["status"], result["error"]) == ("failed", "KeyError: 'nothing'")
    assert list(result["measured"]["model"]) == ["frequency", "nll"]


# --- the parts ----------------------------------------------------------------------------------------------


def subject(predict=None) -> Subject:
    return Subject(predict or network(), diffusers.DDPMScheduler(**NOISY_END))


def few_images(count: int = 2, threshold: Threshold | str = "none") -> Images:
    images = torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    if threshold == "none":
        threshold = Threshold(1.0, "given", None, None)
    return Images(images, images[:1], None, threshold)


def test_a_plan_calls_the_network_for_single_images_only():
    calls = []

    def predict(x, t):
        calls.append(len(x))
        return torch.zeros_like(x)

    settings = Settings(num_images=1000, timestep=5, num_inference_steps=3)
    assert plan(("frequency", "nll", "reconstruction"), subject(predict), few_images(), settings) == {}
    assert calls == [1, 1, 1]


def test_a_network_that_cannot_take_the_images_has_no_metric():
    """What torch says of sizes that do not fit each other is the reason, and no traceback."""

    def predict(x, t):
        return torch.cat([x, x[..., 1:]])

    wanted = ("frequency", "nll", "reconstruction")
    reasons = plan(wanted, subject(predict), few_images(), Settings(timestep=5, num_inference_steps=3))
    assert reasons.keys() == set(wanted)
    assert all("Sizes of tensors must match" in reason for reason in reasons.values())


def test_samples_that_turn_out_not_finite_cost_their_rows():
    """The first step is finite, as the plan finds; a later one is not."""

    def predict(x, t):
        return torch.full_like(x, torch.nan if t[0] < 5 else 0.0)

    settings = Settings(num_images=4, timestep=10, num_inference_steps=3, chains=2)
    wanted = ("frequency", "reconstruction")
    assert plan(wanted, subject(predict), few_images(), settings) == {}
    found = dict(measure(wanted, subject(predict), few_images(), settings))
    assert "got NaN or Inf in 4 of the first 4" in str(found["frequency"])
    assert "got NaN or Inf in 2 of the first 2" in str(found["reconstruction"])


def test_metrics_are_named_once():
    assert parse_metrics(" nll , is") == ("nll", "is")
