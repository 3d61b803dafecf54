"""scripts/ablations.py goes on where it was stopped, refuses another's file, and measures what it says."""

import copy
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastunlearn import ImageStore, NoiseSchedule
from fastunlearn.demo.evaluation import INJECTION_TIMESTEPS
from fastunlearn.methods import SISS, ReTrack

ROOT = Path(__file__).parents[1]


@pytest.fixture
def ablations(monkeypatch):
    spec = importlib.util.spec_from_file_location("ablations", ROOT / "scripts" / "ablations.py")
    module = importlib.util.module_from_spec(spec)
    # A dataclass looks for its module by name.
    monkeypatch.setitem(sys.modules, "ablations", module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def two_arms(ablations, monkeypatch):
    """One group of two arms with two seeds."""
    group = replace(ablations.GROUPS["retrack"], seeds=2, arms=("pretrained", "ReTrack, k = 1"))
    monkeypatch.setattr(ablations, "GROUPS", {"retrack": group})
    return ablations


def command(output: Path, *more: str) -> list[str]:
    return ["--output", str(output), "--only", "retrack", *more]


def test_it_goes_on_where_it_was_stopped(two_arms, tmp_path, monkeypatch, capsys):
    names = {arm: name for name, arm in two_arms.ARMS.items()}
    done = []

    def run(arm, seed, settings, forget, retain):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((names[arm], seed))
        return dict.fromkeys(two_arms.COLUMNS, float(len(done)))

    monkeypatch.setattr(two_arms, "run", run)
    path = tmp_path / "runs.json"
    with pytest.raises(KeyboardInterrupt):
        two_arms.main(command(path))
    assert done == [("pretrained", 0), ("ReTrack, k = 1", 0), ("pretrained", 1)]
    there = json.loads(path.read_text())["runs"]
    assert [numbers["nll"] for numbers in there["pretrained"].values()] == [1, 3]
    assert [numbers["nll"] for numbers in there["ReTrack, k = 1"].values()] == [2]

    # What was missing runs, nothing else, and what was there stays.
    done.clear()
    two_arms.main(command(path))
    assert done == [("ReTrack, k = 1", 1)]
    there = json.loads(path.read_text())["runs"]
    assert [numbers["nll"] for numbers in there["pretrained"].values()] == [1, 3]
    assert [numbers["nll"] for numbers in there["ReTrack, k = 1"].values()] == [2, 1]

    # Then there is nothing left to run; the tables need no runs, either.
    for more in ((), ("--table",)):
        capsys.readouterr()
        two_arms.main(command(path, *more))
        assert "and no regulariser** (2 seeds)" in capsys.readouterr().out
    assert len(done) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_run_unlearns_and_measures(ablations, monkeypatch):
    """On a tiny network: every column is there, and the arm and the seed matter."""
    diffusers = pytest.importorskip("diffusers")
    blocks = {"down_block_types": ["DownBlock2D"] * 2, "up_block_types": ["UpBlock2D"] * 2}
    widths = {"block_out_channels": (8, 8), "layers_per_block": 1, "norm_num_groups": 4}
    network = diffusers.UNet2DModel(sample_size=28, in_channels=1, out_channels=1, **widths, **blocks).eval()
    scheduler = diffusers.DDPMScheduler()
    monkeypatch.setattr(ablations, "load_model", lambda device: (copy.deepcopy(network), scheduler))
    monkeypatch.setattr(ablations, "NLL_TOLERANCE", 1.0)
    monkeypatch.setattr(ablations, "REAL_DIGITS", 16)
    settings = ablations.Settings(
        steps=2, batch_size=2, chains=2, chain_steps=4, num_samples=8, sample_steps=2, retain_rows=6
    )
    forget, retain = ablations.load_demo()

    def run(name: str, seed: int) -> dict:
        return ablations.run(ablations.ARMS[name], seed, settings, forget, retain)

    before = run("pretrained", 0)
    assert set(before) == {*ablations.COLUMNS, "skipped_steps", "cpu_seconds"}
    seeds = [run("full, all frequencies", seed)["retain_loss"] for seed in (0, 1)]
    assert len({before["retain_loss"], *seeds}) == 3

    # A network that says NaN: the run says so.
    torch.nn.init.constant_(network.conv_out.weight, float("nan"))
    after = run("full, all frequencies", 0)
    assert "NaN" in after["failed"]
    assert after["skipped_steps"] == 2


def test_a_file_of_other_settings_is_refused(ablations, tmp_path):
    path, settings = tmp_path / "runs.json", ablations.Settings()
    record = ablations.open_record(path, settings)
    record["runs"]["pretrained"] = {"0": {"nll": 1.0}}
    ablations.write(record, path)
    assert ablations.open_record(path, settings) == record

    with pytest.raises(SystemExit, match=r"runs\.json: expected a file of .*'steps': 41.*got one of .*40"):
        ablations.open_record(path, replace(settings, steps=41))
    record["arms"]["pretrained"] = "Arm(method=Vanilla())"
    ablations.write(record, path)
    with pytest.raises(SystemExit, match=r"expected runs of pretrained with Arm\(\).*Vanilla"):
        ablations.open_record(path, settings)


def test_an_arm_is_told_without_its_defaults(ablations):
    """So that a method may get a hyperparameter, and the runs of before are still those of the arm."""
    arm = ablations.Arm(ReTrack(k=20, lambd=0.005))
    assert ablations.told(arm) == "Arm(method=ReTrack(k=20))"
    assert ablations.told(ablations.Arm()) == "Arm()"
    assert ablations.told(ablations.Arm(SISS(0.5, 30.0))) == "Arm(method=SISS(scaling_norm=30.0))"
    told = [ablations.told(arm) for arm in ablations.ARMS.values()]
    assert len(set(told)) == len(set(ablations.ARMS.values()))


def test_every_arm_is_in_a_table_and_none_is_there_twice(ablations):
    in_tables = {arm for group in ablations.GROUPS.values() for arm in group.arms}
    assert in_tables == set(ablations.ARMS)
    assert len({repr(arm) for arm in ablations.ARMS.values()}) == len(ablations.ARMS)
    for group in ablations.GROUPS.values():
        assert set(group.papers or {}) <= set(group.arms)


def test_a_table_has_means_deviations_and_runs_that_failed(ablations):
    group = ablations.Group("Some", 3, ("a", "b", "c", "d"), "paper", {"b": "9.9"})
    numbers = dict.fromkeys(ablations.COLUMNS, 1.0)
    runs = {
        "a": {"0": numbers, "1": numbers | {"nll": 2.0}, "2": numbers | {"nll": 50.0}},
        "b": {"0": numbers, "1": {"failed": "NaN"}},
        "c": {"0": {"failed": "NaN"}, "1": {"failed": "NaN"}},
    }
    title, _, heads, _, a, b, c = ablations.table(group, runs).splitlines()
    # The third seed of the first arm has nothing to compare with.
    assert title == "**Some** (2 seeds)"
    nll = heads.split(" | ").index("NLL")
    assert a.split(" | ")[nll] == "1.50 ± 0.71"
    assert b.split(" | ")[0] == "| b (1 of 2 not finite)"
    assert b.split(" | ")[nll] == "1.00"
    assert b.endswith("| 9.9 |")
    assert c.startswith("| c (2 of 2 not finite) |  |")

    assert ablations.table(group, {}) == ""
    one = ablations.table(group, {"a": {"0": numbers}})
    assert one.startswith("**Some** (one seed)")
    assert "±" not in one


def test_weights_of_k_neighbours_are_compared_with_those_of_all_images(ablations, monkeypatch):
    """Against a softmax over all images, written out: what is off is the probability beyond the k nearest."""
    monkeypatch.setattr(ablations, "WEIGHT_NEIGHBORS", (1, 5, 1000))
    monkeypatch.setattr(ablations, "WEIGHT_TIMESTEPS", (0, 20, 49))
    schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.95, 0.01, 50, dtype=torch.float64))
    forget = ImageStore(torch.randint(256, (1, 1, 4, 4), dtype=torch.uint8))
    retain = ImageStore(torch.randint(256, (30, 1, 4, 4), dtype=torch.uint8))
    found = ablations.compare_weights(schedule, forget, retain, draws=4)
    # There are no thousand images.
    assert list(found["neighbors"]) == ["1", "5"]
    assert found["images"] == 30
    assert list(found["seconds"]) == ["1", "5", "30"]

    a = forget.rows(torch.tensor([0])).double().flatten(1)
    images = retain.rows(torch.arange(30)).double().flatten(1)
    nearest = (images - a).square().sum(1).argsort()
    noise = torch.randn(4, 16, generator=ablations.fixed()).double()
    for k in (1, 5):
        for t, variation in zip(found["timesteps"], found["neighbors"][str(k)]["variation"], strict=True):
            alpha, sigma = schedule.alpha[t].double(), schedule.sigma[t].double()
            x_t = alpha * a + sigma * noise
            squared = torch.cdist(x_t, alpha * images).square()
            p = torch.softmax(-squared / (2 * sigma**2), dim=1)
            beyond = 1 - p[:, nearest[:k]].sum(1)
            assert variation == pytest.approx(beyond.mean().item(), abs=1e-5)


def test_the_retain_loss_is_that_of_all_timesteps(ablations):
    """A network that says 0 misses the noise alone: a loss of one for each pixel."""
    seen = []

    class Silent(torch.nn.Module):
        def forward(self, x, t):
            seen.append(t)
            return type("Output", (), {"sample": torch.zeros_like(x)})

    retain = ImageStore(torch.randint(256, (700, 1, 8, 8), dtype=torch.uint8))
    schedule = NoiseSchedule.from_alphas_cumprod(torch.linspace(0.99, 0.01, 1000, dtype=torch.float64))
    settings = ablations.Settings(retain_rows=500)
    loss = ablations.retain_loss(Silent(), schedule, retain, settings)
    assert sorted(torch.cat(seen).tolist()) == list(range(0, 1000, 2))
    assert loss == pytest.approx(64, rel=0.03)
    assert ablations.retain_loss(Silent(), schedule, retain, settings) == loss


def test_the_chains_are_those_of_both_injection_times(ablations):
    assert {f"chains_{t}" for t in INJECTION_TIMESTEPS} <= set(ablations.COLUMNS)


def test_the_docs_have_the_tables_of_the_results(ablations):
    """`python scripts/ablations.py --output bench/results/selection_ablations.json --table` prints them."""
    path = ROOT / "bench/results/selection_ablations.json"
    record = ablations.open_record(path, ablations.Settings())
    page = (ROOT / "docs/selection.md").read_text()
    names = [*ablations.GROUPS, ablations.WEIGHTS]
    tables = ablations.tables(record, names)
    assert list(tables) == names
    for name, text in tables.items():
        assert text in page, name
