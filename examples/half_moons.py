"""Forgetting at some timesteps only, where one can see it: points in the plane (arXiv 2510.17917, Figure 2).

A network is trained on two half moons and made to forget the tip of one: by ascent on the loss of the tip at
the timesteps of a window, and descent on that of all else at every timestep. Every point is an image of two
channels and one pixel, so that the steps are the library's own. In some 20 s of one thread:

    python examples/half_moons.py --output half_moons.png

docs/selection.md reads the picture.
"""

from __future__ import annotations

import argparse
import copy
import math
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor, nn

from fastunlearn import ImageStore, NoiseSchedule, Unlearner, Vanilla
from fastunlearn import functional as F
from fastunlearn.methods import FORGET, RETAIN, Method, Pass, Term
from fastunlearn.models.sampling import sample
from fastunlearn.objective.time import Density, TimeWindow

SCHEDULER = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
SCHEDULE = NoiseSchedule.from_diffusers(SCHEDULER)

# Timesteps count from the clean image: early ones have least noise, and decide on details.
WINDOWS = {
    "full": TimeWindow(0, len(SCHEDULE)),
    "early": TimeWindow(0, 250),
    "middle": TimeWindow.middle(SCHEDULE),  # [250, 750)
    "late": TimeWindow.late(SCHEDULE),  # [750, 1000)
}
NO_ASCENT = "no ascent"
STEPS = 100

# Of a moon, and of the points about it, in [-1, 1].
RADIUS, STANDARD_DEVIATION = 0.5, 0.04
# What is farther from both moons is on neither: one point in 16 000.
NEAR = 4 * STANDARD_DEVIATION
# Places on the upper moon are in [0, 1), on the lower one in [1, 2). An eighth of them is to be forgotten.
PIECES = 16
TIP = 0.75, 1.0


# --- points and a network -----------------------------------------------------------------------------------


def moon_points(places: Tensor) -> Tensor:  # [N] -> [N, 2]
    """The points of both half circles at `places` in [0, 2)."""
    angle = math.pi * (places % 1)
    upper = torch.stack([angle.cos() - 0.5, angle.sin() - 0.25], dim=1)
    return RADIUS * torch.where(places[:, None] < 1, upper, -upper)


def is_tip(places: Tensor) -> Tensor:  # [N] -> bool [N]
    return (places >= TIP[0]) & (places < TIP[1])


def training_points(seed: int, count: int = 4096) -> tuple[ImageStore, ImageStore]:
    """Those to forget and those to keep, as images `[N, 2, 1, 1]`."""
    generator = torch.Generator().manual_seed(seed)
    places = 2 * torch.rand(count, generator=generator)
    points = moon_points(places) + STANDARD_DEVIATION * torch.randn(count, 2, generator=generator)
    images, forget = points.view(count, 2, 1, 1), is_tip(places)
    return ImageStore(images[forget]), ImageStore(images[~forget])


class Denoiser(nn.Module):
    """A perceptron that sees a point and its timestep as waves of several lengths."""

    def __init__(self, width: int = 64, octaves_of_point: int = 4, octaves_of_time: int = 6):
        super().__init__()
        self.register_buffer("of_point", math.pi / 2 * 2.0 ** torch.arange(octaves_of_point))
        self.register_buffer("of_time", math.pi / len(SCHEDULE) * 2.0 ** torch.arange(octaves_of_time))
        waves = 2 * octaves_of_point + octaves_of_time
        sizes = [2 + 2 * waves, width, width, width]
        hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.SiLU())]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:  # [B, 2, 1, 1], [B] -> [B, 2, 1, 1]
        point = x_t.flatten(1)
        of_point = (point[:, :, None] * self.of_point).flatten(1)
        waves = torch.cat([of_point, timesteps[:, None] * self.of_time], dim=1)
        return self.layers(torch.cat([point, waves.sin(), waves.cos()], dim=1)).view_as(x_t)


def pretrain(points: ImageStore, seed: int, steps: int = 1500) -> Denoiser:
    torch.manual_seed(seed)  # the first weights
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0, fused=True)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    options = {"batch_size": 512, "seed": seed, "lr_scheduler": decay}
    run = Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=points, **options)
    for _ in range(steps):
        run.step()
    return model


# --- forgetting ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Difference(Method):
    """`E_x ||eps - eps_theta(x_t)||^2 - weight E_a ||eps - eps_theta(a_t)||^2`: descent and ascent.

    Args:
        weight: of the ascent.
    """

    weight: float = 0.1
    name = "difference"
    needs = frozenset({"forget", "retain"})

    def draws(self):
        return FORGET | RETAIN

    def compose(self, batch, draws, schedule):
        forget = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
        retain = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        ascent = Term("forget", forget.target, scale=-self.weight)
        descent = Term("retain", retain.target)
        return [
            Pass(forget.x_t, draws.forget_timesteps, (ascent,), batch.forget_kwargs),
            Pass(retain.x_t, draws.retain_timesteps, (descent,), batch.retain_kwargs),
        ]


def unlearn(
    model: Denoiser,
    forget: ImageStore,
    retain: ImageStore,
    window: Density | None,
    steps: int,
    seed: int,
) -> Denoiser:
    """A copy of `model` after some steps; without a window they only go on training on `retain`."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0, fused=True)
    options = {"retain": retain, "batch_size": 256, "seed": seed}
    method = Vanilla()
    if window is not None:
        method = Difference()
        options |= {"forget": forget, "time_window": window}
    run = Unlearner(model, optimizer, SCHEDULE, method, **options)
    for _ in range(steps):
        run.step()
    return model


# --- what came of it ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Samples:
    """Points that a network makes, and where they lie."""

    points: Tensor  # [N, 2]
    on_tip: Tensor  # bool [N]: near the moons, nearest to the tip
    on_rest: Tensor  # bool [N]: near the moons, nearest to what is kept
    distance: float  # of all that are not on the tip from what is kept, mean, in radii of a moon
    uneven: float  # share of those on the rest that would have to move for an even spread over it

    @classmethod
    def of(cls, points: Tensor) -> Samples:
        places = torch.linspace(0, 2, 4001)[:-1]
        tip = is_tip(places)
        distances = torch.cdist(points, moon_points(places))
        nearest, where = distances.min(dim=1)
        on_tip, on_rest = (nearest <= NEAR) & tip[where], (nearest <= NEAR) & ~tip[where]
        distance = distances[~on_tip][:, ~tip].min(dim=1).values.mean().item() / RADIUS

        piece_of = (places * PIECES / 2).long()
        counts = torch.bincount(piece_of[where[on_rest]], minlength=PIECES)[piece_of[~tip].unique()]
        # Where no sample is on the moons, none of the spread is left.
        shares = counts / counts.sum().clamp(min=1)
        uneven = (1 / len(shares) - shares).clamp(min=0).sum().item()
        return cls(points, on_tip, on_rest, distance, uneven)

    @property
    def on_nothing(self) -> Tensor:  # bool [N]
        return ~(self.on_tip | self.on_rest)

    @property
    def numbers(self) -> tuple[str, str]:
        """Two lines to read."""
        on_tip, on_nothing = (which.float().mean().item() for which in (self.on_tip, self.on_nothing))
        first = f"on the tip {on_tip:.1%}, on no moon {on_nothing:.1%}"
        return first, f"distance {self.distance:.2f}, uneven {self.uneven:.0%}"


def draw_samples(model: Denoiser, seed: int, count: int = 2000) -> Samples:
    options = {"num_inference_steps": 50, "batch_size": count, "seed": seed}
    return Samples.of(sample(model, SCHEDULER, count, shape=(2, 1, 1), **options).flatten(1))


def experiment(seed: int = 0, steps: int = STEPS) -> dict[str, Samples]:
    """Samples before, after `steps` in each window, and after as many without any ascent."""
    forget, retain = training_points(seed)
    model = pretrain(ImageStore(torch.cat([forget.images, retain.images])), seed)
    result = {"before": draw_samples(model, seed)}
    for name, window in (WINDOWS | {NO_ASCENT: None}).items():
        after = unlearn(model, forget, retain, window, steps, seed)
        result[name] = draw_samples(after, seed)
    return result


# --- the picture --------------------------------------------------------------------------------------------

TEXT, MOON, TIP_OF_MOON = "#20242a", "#d5d9e0", "#f8d3c0"
ON_REST, ON_TIP, ON_NOTHING = "#1f5fa8", "#e25414", "#20242a"
DRAWN = 800  # samples in a panel


def picture(result: dict[str, Samples], steps: int = STEPS) -> Figure:
    """A panel for the network before, and one for each window."""
    # Not by pyplot, which would keep the figure and look for a screen.
    figure = Figure(figsize=(13, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    titles = {"before": "before"}
    titles |= {name: f"{name}: t in [{window.start}, {window.stop})" for name, window in WINDOWS.items()}
    for (name, title), panel in zip(titles.items(), figure.subplots(1, len(titles)), strict=True):
        _draw(panel, result[name])
        panel.set_title(title, fontsize=10, loc="left", color=TEXT)
    heading = f"{steps} steps: descent on what is kept, ascent on the tip at the timesteps of a window"
    heading += " (t = 0 has least noise)"
    figure.suptitle(heading, fontsize=10, x=0.01, ha="left", color=TEXT)
    figure.get_layout_engine().set(h_pad=0.1)
    return figure


def _draw(panel, samples: Samples) -> None:
    """The moons, and samples on top of them, in matplotlib's axes `panel`."""
    just_before = 1e-4
    parts = ((0, TIP[0], MOON), (1, 2 - just_before, MOON), (TIP[0], TIP[1] - just_before, TIP_OF_MOON))
    for first, last, colour in parts:
        curve = moon_points(torch.linspace(first, last, 100))
        panel.plot(*curve.T, color=colour, linewidth=8, solid_capstyle="butt")
    kinds = ((samples.on_rest, ON_REST), (samples.on_tip, ON_TIP), (samples.on_nothing, ON_NOTHING))
    for which, colour in kinds:
        shown = samples.points[:DRAWN][which[:DRAWN]]
        panel.plot(*shown.T, ".", color=colour, markersize=3, markeredgewidth=0)
    panel.set_xlabel("\n".join(samples.numbers), fontsize=8.5, color=TEXT, loc="left")
    # Samplers clip to [-1, 1]: what has left that is drawn on the border.
    panel.set(xlim=(-1.03, 1.03), ylim=(-1.03, 1.03), aspect="equal", xticks=[], yticks=[])
    for spine in panel.spines.values():
        spine.set_color("#b6bcc4")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("half_moons.png"), help="the picture")
    parser.add_argument("--steps", type=int, default=STEPS, help="of unlearning, in each window")
    parser.add_argument("--seed", type=int, default=0, help="of points, network, steps and samples")
    given = parser.parse_args()
    torch.set_num_threads(1)  # so small a network is slower with more
    result = experiment(given.seed, given.steps)
    for name, samples in result.items():
        print(f"{name:10}", *samples.numbers, sep="  ")
    picture(result, given.steps).savefig(given.output)
    print(given.output)


if __name__ == "__main__":
    main()
