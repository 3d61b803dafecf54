"""examples/half_moons.py: what ascent at the timesteps of a window does to points in the plane, as in
docs/half_moons.png.
"""

from __future__ import annotations

import importlib.util
import io
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastunlearn import Draws, method_step
from fastunlearn.testing.budgets import relative_l2

pytest.importorskip("diffusers")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def toy():
    """The example as a module."""
    spec = importlib.util.spec_from_file_location("half_moons", ROOT / "examples" / "half_moons.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["half_moons"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules["half_moons"]


@pytest.fixture(scope="module")
def timed(toy):
    """The result of the picture, and how long a processor worked on it: some 20 s."""
    before = time.process_time()
    result = toy.experiment(seed=0)
    return result, time.process_time() - before


@pytest.fixture(scope="module")
def result(timed):
    return timed[0]


def share(which: torch.Tensor) -> float:
    return which.double().mean().item()


def test_samples_are_told_apart(toy):
    places = torch.linspace(0, 2, 1601)[:-1]
    on_the_curve = toy.Samples.of(toy.moon_points(places))
    assert torch.equal(on_the_curve.on_tip, toy.is_tip(places))
    assert share(on_the_curve.on_tip) == 1 / 8
    assert not on_the_curve.on_nothing.any()
    assert on_the_curve.distance == pytest.approx(0, abs=1e-3)
    assert on_the_curve.uneven == pytest.approx(0, abs=1e-2)

    # One moon without the other: eight of the fourteen pieces that are kept have no sample.
    upper = toy.Samples.of(toy.moon_points(places[places < 1]))
    assert upper.uneven == pytest.approx(8 / 14, abs=1e-2)

    # A little outside of the upper half circle, and two corners.
    center = toy.RADIUS * torch.tensor([[-0.5, -0.25]])
    assert toy.Samples.of(center + torch.tensor([[0.0, 1.05 * toy.RADIUS]])).on_rest.all()
    away = toy.Samples.of(torch.tensor([[1.0, 1.0], [-1.0, -1.0]]))
    assert away.on_nothing.all()
    assert away.uneven == pytest.approx(1)


def test_training_points_are_on_the_moons(toy):
    forget, retain = toy.training_points(seed=0)
    points = toy.Samples.of(torch.cat([forget.images, retain.images]).flatten(1))
    assert share(points.on_nothing) < 1e-3
    # Noise carries a few points over the border of the tip.
    assert share(points.on_tip) == pytest.approx(len(forget) / len(points.points), abs=0.01)


def test_the_gradient_is_that_of_descent_and_ascent(toy):
    torch.manual_seed(0)
    model = toy.Denoiser().double()
    a, x = torch.randn(2, 5, 2, 1, 1, dtype=torch.float64)
    noise, other_noise = torch.randn(2, 5, 2, 1, 1, dtype=torch.float64)
    times, other_times = torch.randint(0, 1000, (2, 5))

    def loss(images, noise, times):
        alpha, sigma = (table[times].view(-1, 1, 1, 1) for table in (toy.SCHEDULE.alpha, toy.SCHEDULE.sigma))
        return (model(alpha * images + sigma * noise, times) - noise).square().sum() / len(images)

    expected = torch.autograd.grad(
        loss(x, other_noise, other_times) - 0.3 * loss(a, noise, times), list(model.parameters())
    )
    draws = Draws(
        forget_noise=noise, forget_timesteps=times, retain_noise=other_noise, retain_timesteps=other_times
    )
    method_step(toy.Difference(weight=0.3), model, None, toy.SCHEDULE, forget=a, retain=x, draws=draws)
    assert relative_l2([parameter.grad for parameter in model.parameters()], list(expected)) < 1e-10


def test_the_toy_takes_less_than_a_minute_of_one_processor(timed):
    """Not of the clock: other processes do not count."""
    assert timed[1] < 60


def test_the_network_has_learned_both_moons(result):
    before = result["before"]
    # An eighth of the points are on the tip; a network that had not learned it would make next to none.
    assert share(before.on_tip) > 1 / 16
    assert share(before.on_nothing) < 0.1
    assert before.uneven < 0.2


def test_ascent_at_early_timesteps_destroys_the_samples(result):
    """Little noise is left there: a step that goes wrong is not put right by any later one. The ascent has no
    bound, so no sample is left on the data where the window is early, and fewer where it is full.
    """
    early, full = result["early"], result["full"]
    assert share(early.on_tip) < 0.01
    assert share(full.on_tip) < 0.01
    assert share(early.on_nothing) > 0.5
    assert early.distance > full.distance > 1.5 * result["before"].distance
    assert early.uneven > full.uneven > 1.5 * result["before"].uneven


def test_ascent_at_middle_timesteps_takes_the_tip_alone(result, toy):
    """What the ascent does there is put right at early timesteps, whose steps lead to what is kept: more of
    the tip is gone than without ascent, and samples are as near the data as before.
    """
    before, middle, without = result["before"], result["middle"], result[toy.NO_ASCENT]
    assert share(middle.on_tip) < share(without.on_tip) - error_of_difference(middle.on_tip, without.on_tip)
    assert share(middle.on_nothing) < share(before.on_nothing) + 0.05
    assert middle.distance < 1.2 * before.distance
    assert middle.uneven < 0.5 * result["full"].uneven


def test_ascent_at_late_timesteps_does_next_to_nothing(result, toy):
    """Under that much noise the tip cannot be told from the rest, so ascent and descent meet in one loss, and
    the descent has the larger weight. What is forgotten is what training on the rest forgets.
    """
    late, without = result["late"], result[toy.NO_ASCENT]
    assert abs(share(late.on_tip) - share(without.on_tip)) < error_of_difference(late.on_tip, without.on_tip)
    assert share(late.on_tip) > share(result["middle"].on_tip)
    assert late.distance == pytest.approx(without.distance, rel=0.2)


def error_of_difference(first: torch.Tensor, second: torch.Tensor) -> float:
    """Three standard errors of the difference of two shares."""
    return 3 * ((first.double().var() + second.double().var()) / len(first)).sqrt().item()


def test_the_command_draws_the_picture(result, toy, tmp_path, monkeypatch, capsys):
    """Of the result that the tests above look at; it is not computed again."""
    monkeypatch.setattr(toy, "experiment", lambda seed, steps: result)
    file = tmp_path / "moons.png"
    monkeypatch.setattr(sys, "argv", ["half_moons.py", "--output", str(file)])
    toy.main()
    printed = capsys.readouterr().out
    for name, samples in result.items():
        assert "  ".join((f"{name:10}", *samples.numbers)) in printed
    with Image.open(file) as drawn, Image.open(ROOT / "docs" / "half_moons.png") as kept:
        assert drawn.size == kept.size
        assert len(drawn.convert("RGB").getcolors(1 << 24)) > 100  # it is not empty


def test_the_picture_has_a_panel_before_and_one_for_each_window(result, toy):
    figure = toy.picture(result)
    figure.savefig(io.BytesIO())
    titles = [panel.get_title(loc="left") for panel in figure.axes]
    assert [title.split(":")[0] for title in titles] == ["before", "full", "early", "middle", "late"]
    for panel, name in zip(figure.axes, ["before", *toy.WINDOWS], strict=True):
        assert panel.get_xlabel() == "\n".join(result[name].numbers)
        dots = sum(len(line.get_xdata()) for line in panel.lines if line.get_marker() == ".")
        assert dots == toy.DRAWN
