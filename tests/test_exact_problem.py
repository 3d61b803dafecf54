"""examples/exact_problem.py: the exact denoiser is exact, no method is missing, docs/exact.md has the
results, and ReTrack's importance weights lead to the exact denoiser.
"""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastunlearn import functional as F
from fastunlearn.methods import ReTrack
from fastunlearn.methods.registry import methods

pytest.importorskip("matplotlib")

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "bench" / "results" / "exact_problem.json"


@pytest.fixture(scope="module")
def problem():
    """The example as a module, beside the one that it imports."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("exact_problem")
    for name in ("exact_problem", "exact_report"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def report(problem):
    return sys.modules["exact_report"]


@pytest.fixture(scope="module")
def record():
    return json.loads(RESULTS.read_text())


# --- the answer ---------------------------------------------------------------------------------------------


def test_the_exact_denoiser_is_the_score_of_the_noised_points(problem):
    """eps = -sigma grad log p_t(x_t), with p_t a mixture of as many Gaussians as there are points."""
    _, retain = (store.images.double() for store in problem.points())
    x_t = torch.randn(50, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    timesteps = torch.arange(50) % len(problem.SCHEDULE)
    alpha, sigma = (
        table[timesteps].view(-1, 1, 1) for table in (problem.SCHEDULE.alpha, problem.SCHEDULE.sigma)
    )
    apart = x_t.flatten(1)[:, None] - alpha * retain.flatten(1)
    log_density = torch.logsumexp(-apart.square().sum(2) / (2 * sigma[:, 0] ** 2), dim=1)
    (score,) = torch.autograd.grad(log_density.sum(), x_t)
    expected = -sigma[:, :, :, None] * score
    torch.testing.assert_close(problem.exact_denoiser(retain, x_t.detach(), timesteps), expected)


def test_nothing_denoises_the_points_to_keep_better(problem):
    """Its loss is below those of the denoiser of all points, of a shifted and of a shrunk one."""
    forget, retain = (store.images.double() for store in problem.points())
    generator = torch.Generator().manual_seed(1)
    rows = torch.arange(20_000) % len(retain)
    timesteps = torch.randint(len(problem.SCHEDULE), (20_000,), generator=generator)
    noise = torch.randn(20_000, 2, 1, 1, generator=generator, dtype=torch.float64)
    x_t, _ = F.noised(retain[rows], noise, timesteps, problem.SCHEDULE)
    exact = problem.exact_denoiser(retain, x_t, timesteps)
    of_all = problem.exact_denoiser(torch.cat([forget, retain]), x_t, timesteps)
    loss = (exact - noise).square().mean()
    for other in (of_all, exact + 0.05, 0.95 * exact):
        assert loss < (other - noise).square().mean()


def test_distances_are_0_for_the_answer_and_grow_with_the_error(problem):
    retain = problem.points()[1].images

    class Answer(torch.nn.Module):
        error = 0.0

        def forward(self, x_t, timesteps):
            exact = problem.exact_denoiser(retain, x_t, timesteps)
            return exact + torch.tensor([3.0, 4.0], dtype=torch.float64).view(2, 1, 1) * self.error

    model = Answer()
    assert problem.distances(model) == {"on": 0, "off": 0}
    model.error = 0.1
    assert problem.distances(model) == {"on": 0.5, "off": 0.5}


# --- nothing is missing -------------------------------------------------------------------------------------


def test_every_method_and_variant_has_an_arm_and_a_result(problem, record):
    """One that is new: run the example again, or say in LEFT_OUT why it has no meaning there."""
    expected = set()
    for name, method in methods().items():
        if method.method.__module__.startswith("fastunlearn.") and name not in problem.LEFT_OUT:
            expected |= {f"{name}, {variant}" if variant else name for variant in method.variants}
    assert expected <= set(problem.ARMS)
    assert set(record["arms"]) == set(problem.ARMS)


def test_the_results_are_those_of_the_settings(problem, record):
    settings = problem.Settings()
    assert record["settings"] == json.loads(json.dumps(asdict(settings)))
    for title, arm in problem.ARMS.items():
        found = record["arms"][title]
        assert found["best"] == arm.described(found["number"])
        assert len(found["tries"]) in (0, 6)
        assert list(found["runs"]) == [str(seed) for seed in settings.seeds]
        if found["tries"]:
            sums = [end["on"] + end["off"] for end in found["tries"]]
            assert sums[found["number"]] in sorted(sums)[:2]
    assert set(record["long"]) == set(problem.LONG)


def test_importance_weights_come_near_the_network_that_never_saw_the_points(record):
    """In 400 steps, on all seeds: most of the way on the points to forget, nearly all of it on the others."""
    for seed, networks in record["networks"].items():
        run = record["long"]["retrack, importance"][seed]
        for where, least in (("on", 0.8), ("off", 0.9)):
            start, retrained = networks["start"][where], networks["retrained"][where]
            assert start - run[where][-1] > least * (start - retrained)


def test_the_docs_have_the_tables_of_the_results(report, record, problem):
    """`python examples/exact_problem.py --output bench/results/exact_problem.json --table` prints them."""
    page = (ROOT / "docs" / "exact.md").read_text()
    for table in report.tables(record):
        assert table in page
    for name, reason in problem.LEFT_OUT.items():
        assert f"`{name}`: {reason}" in page


def test_the_better_of_two_tries_stays(problem, report, monkeypatch, capsys):
    """Two arms, runs of two steps: what is tuned, what goes on, and the tables of it."""
    arms = {title: problem.ARMS[title] for title in ("vanilla", "neggrad, untuned")}
    monkeypatch.setattr(problem, "ARMS", arms)
    monkeypatch.setattr(problem, "LONG", {"vanilla": problem.LONG["vanilla"]})
    settings = problem.Settings(pretraining=2, steps=2, long_steps=2, seeds=(1, 2), measured_every=1)
    record = json.loads(json.dumps(problem.experiment(settings)))

    tuned, alone = record["arms"].values()
    assert (len(tuned["tries"]), len(alone["tries"])) == (6, 0)
    assert tuned["best"] == arms["vanilla"].described(tuned["number"])
    for run in (tuned["runs"]["1"], alone["runs"]["2"], record["long"]["vanilla"]["1"]):
        assert [len(run[where]) for where in ("on", "off")] == [3, 3]
    for seed in ("1", "2"):
        start = record["networks"][seed]["start"]
        assert {where: tuned["runs"][seed][where][0] for where in start} == start
    assert len(report.arms_table(record).splitlines()) == 2 + 2 + 2
    assert len(report.long_table(record).splitlines()) == 2 + 1
    assert "vanilla, 2 steps" in capsys.readouterr().out

    runs = {3: {"1": {"on": [0, 2.0], "off": [0, 1.0]}}, 4: {"1": {"on": [0, 1.0], "off": [0, 1.5]}}}
    assert problem.better(runs) == 4
    runs[4]["1"]["on"][-1] = float("nan")
    assert problem.better(runs) == 3


# --- what holds on all seeds --------------------------------------------------------------------------------


def test_a_claim_compares_seed_by_seed(report):
    def arm(*on):
        return {"runs": {str(seed): {"on": [9.0, value], "off": [9.0, 1.0]} for seed, value in enumerate(on)}}

    record = {"arms": {"a": arm(1.0, 2.0, 3.0), "b": arm(1.05, 1.9, 4.0)}}
    assert report.Claim("", "", "a", "b", "on").holds(record) == [True, False, True]
    assert report.Claim("", "", "a", "b", "off").holds(record) == [False, False, False]
    assert report.Claim("", "", "a", "b", "on", alike=True).holds(record) == [True, True, False]


def test_every_claim_is_of_arms_and_says_what_it_compares(problem, report):
    for claim in report.CLAIMS:
        assert {claim.better, claim.worse} <= set(problem.ARMS), claim.text
        assert claim.where in ("on", "off", "sum")


def test_the_picture_shows_every_curve(problem, report, record, tmp_path):
    forget, retain = (store.images.flatten(1) for store in problem.points())
    figure = report.picture(record, forget, retain)
    file = tmp_path / "exact.png"
    figure.savefig(file)
    _, on, off = figure.axes
    for panel in (on, off):
        labels = [line.get_label() for line in panel.lines]
        assert labels == [*report.DRAWN, "trained on the rest alone"]
    with Image.open(file) as drawn, Image.open(ROOT / "docs" / "exact.png") as kept:
        assert drawn.size == kept.size


# --- the small version --------------------------------------------------------------------------------------

SEED = 1


@dataclass(frozen=True)
class Small:
    """One seed, with networks that were trained half as long."""

    start: dict[str, float]
    retrained: dict[str, float]
    ends: dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def small(problem):
    settings = problem.Settings(pretraining=400, seeds=(SEED,), measured_every=400)
    networks = {SEED: problem.networks_of(SEED, settings)}
    arms = {
        "importance": (problem.LONG["retrack, importance"], 400),
        "self-normalised": (problem.Arm(ReTrack(weights="self_normalized", lambd=0.9), lr=1e-2), 40),
        "ascent": (problem.ARMS["neggrad, untuned"], 40),
    }
    ends = {}
    for name, (arm, steps) in arms.items():
        curve = problem.unlearn(arm, arm.tries()[0], SEED, networks, settings, steps)
        ends[name] = {where: distances[-1] for where, distances in curve.items()}
    found = {name: problem.distances(problem.load(weights)) for name, weights in networks[SEED].items()}
    return Small(**found, ends=ends)


def test_importance_weights_lead_to_a_network_that_never_saw_the_points(small):
    """Within a tenth of its distances, in both regions; the start is more than half as far again."""
    for where, retrained in small.retrained.items():
        assert small.start[where] > 1.5 * retrained
        assert small.ends["importance"][where] < 1.1 * retrained


def test_self_normalised_weights_forget_within_few_steps(small):
    """They regress on the answer itself where the points to forget lie, which training on the rest hardly
    sees: nearer than the network that never saw them.
    """
    assert small.ends["self-normalised"]["on"] < small.retrained["on"]
    assert small.ends["self-normalised"]["off"] < small.start["off"]


def test_ascent_destroys_both_regions(small):
    for where, start in small.start.items():
        assert small.ends["ascent"][where] > 2 * start
