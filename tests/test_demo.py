"""The demo's logic on a tiny network: files, verdict, seeds.

Whether the embedded model forgets is tested by `make demo` itself.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from locks import held_elsewhere

from fastunlearn import demo
from fastunlearn.demo import evaluation, page, run_demo
from fastunlearn.host.finite import NotFiniteError
from fastunlearn.host.folder_lock import FolderLocked, locked
from fastunlearn.report import Criterion
from fastunlearn.runs.run_health import TooManySkippedSteps

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    torch.manual_seed(0)
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    widths = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    unet = diffusers.UNet2DModel(sample_size=28, in_channels=1, out_channels=1, **widths, **blocks)
    folder = tmp_path_factory.mktemp("model")
    diffusers.DDPMPipeline(unet=unet, scheduler=diffusers.DDPMScheduler()).save_pretrained(folder)
    return folder


@pytest.fixture(autouse=True)
def _short(request, monkeypatch):
    if "slow" in request.keywords:
        return  # the demo as it is
    monkeypatch.setattr(evaluation, "INFERENCE_STEPS", 2)
    monkeypatch.setattr(evaluation, "CHAINS", 3)
    monkeypatch.setattr(evaluation, "REAL_DIGITS", 16)
    monkeypatch.setattr(evaluation, "NLL_TOLERANCE", 1.0)


@pytest.fixture
def run(model_dir, tmp_path):
    def run(**arguments):
        return run_demo(
            tmp_path / "demo",
            model_dir=model_dir,
            **{"steps": 2, "num_samples": 6, "batch_size": 2, "show_progress": False, **arguments},
        )

    return run


def parameters(folder) -> torch.Tensor:
    unet = diffusers.DDPMPipeline.from_pretrained(folder, use_safetensors=True).unet
    return torch.cat([parameter.flatten() for parameter in unet.parameters()])


def test_it_writes_a_report_and_a_pipeline(run, model_dir):
    result = run()
    folder = result.report.parent
    pictures = {
        "samples.png",
        "injected.png",
        "reconstruction_250.png",
        "reconstruction_500.png",
        "losses.png",
    }
    assert {file.name for file in folder.iterdir()} == {"report.html", "results.json", "model", *pictures}
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(result.results))
    assert [entry["step"] for entry in result.results["log"]] == [1, 2]
    assert all(value >= 0 for value in result.results["seconds"].values())
    assert len(result.criteria) == 4
    update = parameters(result.model) - parameters(model_dir)
    assert update.abs().max() > 1e-6


def test_without_steps_nothing_was_forgotten(run, model_dir):
    result = run(steps=0)
    assert not result.passed
    before, after = result.results["before"], result.results["after"]
    bits = [measured.pop("likelihood")["bits_per_dim"] for measured in (before, after)]
    assert bits[0] == pytest.approx(bits[1], rel=1e-9)  # an adaptive solver over a network's rounding
    assert before == after
    assert result.results["log"] == []
    assert "Not forgotten" in result.report.read_text(encoding="utf-8")
    assert torch.equal(parameters(result.model), parameters(model_dir))


def test_a_run_is_a_function_of_its_seed(run):
    first, again, other = run(seed=1), run(seed=1), run(seed=2)
    assert first.results["log"] == again.results["log"]
    assert first.results["log"] != other.results["log"]
    for when in ("before", "after"):
        one, same, another = (
            result.results[when]["reconstructions"][0]["mean_distance"] for result in (first, again, other)
        )
        assert one == pytest.approx(same, rel=1e-6)
        assert one != pytest.approx(another, rel=1e-6)


def test_it_prints_a_table_that_ends_with_the_report(run, capsys):
    result = run(show_progress=True, steps=1)
    output = capsys.readouterr().out
    assert "unlearning with ReTrack" in output
    assert "no longer generated" in output
    assert output.rstrip().endswith(str(result.report))


def test_steps_that_destroy_the_model_are_no_forgetting(run, tmp_path):
    """A learning rate of 1e30: the only step makes the weights huge, and nothing that is drawn is finite."""
    with pytest.raises(NotFiniteError, match="expected finite"):
        run(method="neggrad", lr=1e30, steps=1)
    assert not (tmp_path / "demo" / "report.html").exists()


def test_a_skipped_step_is_in_the_results_and_on_the_page(run, monkeypatch):
    """Without quality there is no yes, and NaN, which JSON has not, is null."""
    forget = demo.forget_tshirt

    def skipping(*arguments):
        log = forget(*arguments)
        return [{**log[0], "loss": None, "retain_loss": None, "skipped": True}, *log[1:]]

    monkeypatch.setattr(demo, "forget_tshirt", skipping)
    result = run()
    assert result.results["log"][0]["retain_loss"] is None
    text = result.report.read_text(encoding="utf-8")
    assert "1 of 2 steps had a loss or a gradient that is not finite" in text


def test_a_model_that_lost_its_digits_is_not_called_one_that_did_not_forget():
    gone, kept = Criterion("gone", True, ""), Criterion("digits kept", True, "", kept=True)
    there, lost = replace(gone, passed=False), replace(kept, passed=False)
    assert page.verdict_of((gone, kept)).startswith("Forgotten:")
    assert page.verdict_of((gone, lost)) == (
        "The T-shirt is gone, but the digits are not shown to be kept: 1 of 2 questions are answered with no."
    )
    assert page.verdict_of((there, lost)) == "Not forgotten: 2 of 2 questions are answered with no."


def test_the_quality_of_few_samples_is_no_quality(run):
    kept = run().criteria[-1]
    assert kept.kept
    assert not kept.passed
    assert "12 samples judged, fewer than 100" in kept.evidence


@pytest.mark.parametrize("method", sorted(demo.settings()))
def test_every_method_runs(run, method):
    result = run(method=method, steps=1)
    assert result.results["run"]["method"] == type(demo.settings()[method].method).__name__


def test_lr_and_lambd_replace_the_settings(run):
    result = run(lr=1e-5, lambd=0.5, steps=1)
    assert result.results["run"]["lr"] == 1e-5
    assert result.results["run"]["settings"]["lambd"] == 0.5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": -1}, "steps: expected an integer >= 0, got -1"),
        ({"num_samples": 1}, "num_samples: expected an integer >= 2, got 1"),
        ({"batch_size": 0}, "batch_size: expected an integer >= 1, got 0"),
        (
            {"method": "magic"},
            "method: expected one of retrack, siss, erasediff, neggrad, vanilla.*, got 'magic'",
        ),
        ({"method": "vanilla", "lambd": 0.1}, "lambd: expected None for vanilla, which has none, got 0.1"),
        ({"lr": 0.0}, "lr: expected a finite number in"),
    ],
)
def test_bad_arguments_are_refused_before_any_work(run, tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(**arguments)
    assert list(tmp_path.iterdir()) == []


def test_steps_that_destroy_the_model_end_it_and_nothing_is_written(run, tmp_path):
    with pytest.raises(TooManySkippedSteps, match="of 4 steps had a loss or gradient that is not finite"):
        run(method="neggrad", lr=1e30, steps=4)
    assert list(tmp_path.iterdir()) == []


def test_two_into_one_folder_are_refused(run, tmp_path):
    with held_elsewhere(locked, tmp_path / "demo"), pytest.raises(FolderLocked, match="held by process"):
        run()


@pytest.mark.slow
@pytest.mark.parametrize("steps", [50, 0])
def test_the_embedded_model_forgets(tmp_path, steps):
    assert run_demo(tmp_path, steps=steps, show_progress=False).passed is (steps > 0)
