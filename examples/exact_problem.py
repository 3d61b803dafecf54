"""Every method on a problem whose answer is known: the denoiser that never saw the points to forget.

Points in the plane are images of two channels and one pixel. Noised, a finite set of them is a mixture of
Gaussians, so that the best denoiser of the points to keep has a closed form, at every timestep. A small
network is trained on all points and unlearns in every way that there is; what is measured is how far it is
from that denoiser, where noised points to forget lie and where those to keep do:

    python examples/exact_problem.py --output exact_problem.json --picture exact.png
    python examples/exact_problem.py --output exact_problem.json --table    # the tables of what is there

In less than two minutes of two cores. docs/exact.md has the tables, and says what they show.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import multiprocessing
import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product, starmap
from pathlib import Path

import torch
from exact_report import picture, tables
from safetensors.torch import save_file
from torch import Tensor, nn

import fastunlearn
from fastunlearn import ImageStore, Mask, NoiseSchedule, Unlearner
from fastunlearn import functional as F
from fastunlearn.host.atomic import atomic_file
from fastunlearn.methods import SISS, Method, NegGrad, ReTrack, Vanilla
from fastunlearn.methods.registry import get, methods
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.objective.time import Density, TimeWindow

# Twenty noise levels. At the lowest one the points of a component run into each other, and components do not.
SIGMA = torch.linspace(0.25, 0.98, 20, dtype=torch.float64)
SCHEDULE = NoiseSchedule((1 - SIGMA**2).sqrt(), SIGMA)
WINDOWS = {
    "early": TimeWindow(0, len(SCHEDULE) // 4),
    "middle": TimeWindow.middle(SCHEDULE),
    "late": TimeWindow.late(SCHEDULE),
}
LAST = TimeWindow.last(SCHEDULE)

CENTRES = (-0.7, -0.3), (-0.5, 0.65), (0.2, -0.7), (0.6, 0.55), (0.75, -0.2)
FORGOTTEN_CENTRE = 0.0, 0.1
STANDARD_DEVIATION = 0.07
POINTS, FORGOTTEN_POINTS = 24, 12  # of each component to keep, and of the one to forget


@dataclass(frozen=True)
class Settings:
    """What all runs of a file have in common."""

    pretraining: int = 800  # steps, at a batch of 512
    steps: int = 40  # of unlearning
    long_steps: int = 400
    batch_size: int = 256
    tuning_seed: int = 0
    seeds: tuple[int, ...] = (1, 2, 3)
    measured_every: int = 10  # steps


# --- the problem --------------------------------------------------------------------------------------------


def points() -> tuple[ImageStore, ImageStore]:
    """Those to forget, a component of a mixture of Gaussians, and those to keep: images `[N, 2, 1, 1]`."""
    generator = torch.Generator().manual_seed(0)

    def around(centres: Tensor, count: int) -> ImageStore:
        noise = torch.randn(len(centres), count, 2, generator=generator)
        return ImageStore((centres[:, None] + STANDARD_DEVIATION * noise).view(-1, 2, 1, 1))

    retain = around(torch.tensor(CENTRES), POINTS)
    return around(torch.tensor([FORGOTTEN_CENTRE]), FORGOTTEN_POINTS), retain


def exact_denoiser(images: Tensor, x_t: Tensor, timesteps: Tensor) -> Tensor:
    """`E[eps | x_t]` for images that are drawn from `images` `[N, 2, 1, 1]`: float64, of the shape of `x_t`.

    Noised, they are a mixture of N Gaussians of variance `sigma^2` around `alpha x_j`, which weigh
    `p_j = softmax_j(-||x_t - alpha x_j||^2 / (2 sigma^2))` at x_t: `sum_j p_j (x_t - alpha x_j) / sigma`.
    """
    alpha, sigma = (table[timesteps].view(-1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    eps = (x_t.double().flatten(1)[:, None] - alpha * images.double().flatten(1)) / sigma
    p = torch.softmax(-eps.square().sum(2) / 2, dim=1)
    return (p[:, :, None] * eps).sum(1).view(x_t.shape)


@dataclass(frozen=True)
class Region:
    """Where a network is compared with the exact denoiser of the points to keep."""

    x_t: Tensor  # [N, 2, 1, 1]
    timesteps: Tensor  # [N]
    answer: Tensor  # [N, 2, 1, 1]

    @classmethod
    def of(cls, images: Tensor, retain: Tensor, count: int = 2000) -> Region:
        """Around `images`, noised at all timesteps alike; the same for all runs."""
        generator = torch.Generator().manual_seed(0)
        rows = torch.arange(count) % len(images)
        timesteps = torch.randint(len(SCHEDULE), (count,), generator=generator)
        noise = torch.randn(count, *images.shape[1:], generator=generator)
        x_t, _ = F.noised(images[rows], noise, timesteps, SCHEDULE)
        return cls(x_t, timesteps, exact_denoiser(retain, x_t, timesteps))

    @torch.no_grad()
    def distance(self, model: nn.Module) -> float:
        """L2, the root of the mean square."""
        apart = model(self.x_t, self.timesteps).double() - self.answer
        return apart.square().flatten(1).sum(1).mean().sqrt().item()


@functools.cache
def regions() -> dict[str, Region]:
    """`on` the points to forget and `off` them, on those to keep."""
    forget, retain = (store.images for store in points())
    return {"on": Region.of(forget, retain), "off": Region.of(retain, retain)}


def distances(model: nn.Module) -> dict[str, float]:
    return {name: round(region.distance(model), 5) for name, region in regions().items()}


def differences() -> dict[str, dict[str, float]]:
    """How far the exact denoiser of all points is from that of the points to keep, in each window of time."""
    everything = torch.cat([store.images for store in points()])
    found = {}
    for window, density in WINDOWS.items():
        found[window] = {}
        for name, region in regions().items():
            within = (region.timesteps >= density.start) & (region.timesteps < density.stop)
            x_t, timesteps = region.x_t[within], region.timesteps[within]
            apart = exact_denoiser(everything, x_t, timesteps) - region.answer[within]
            found[window][name] = round(apart.square().flatten(1).sum(1).mean().sqrt().item(), 5)
    return found


class Denoiser(nn.Module):
    """A perceptron that predicts v, from which eps follows: `eps = sigma x_t + alpha v`."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.register_buffer("alpha", SCHEDULE.alpha.float(), persistent=False)
        self.register_buffer("sigma", SCHEDULE.sigma.float(), persistent=False)
        hidden = (nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.layers = nn.Sequential(nn.Linear(4, width), nn.SiLU(), *hidden, nn.Linear(width, 2))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:  # [B, 2, 1, 1], [B] -> [B, 2, 1, 1]
        point = x_t.flatten(1)
        alpha, sigma = self.alpha[timesteps, None], self.sigma[timesteps, None]
        v = self.layers(torch.cat([point, sigma, (sigma / alpha).log()], dim=1))
        return (sigma * point + alpha * v).view_as(x_t)


def pretrain(images: Tensor, seed: int, settings: Settings) -> Denoiser:
    torch.manual_seed(seed)  # the first weights
    model = Denoiser()
    run = unlearner(model, Vanilla(), 1e-2, settings.pretraining, seed, 512, retain=ImageStore(images))
    for _ in range(settings.pretraining):
        run.step()
    return model


def unlearner(model, method, lr, steps, seed, batch_size, **options) -> Unlearner:
    """With AdamW, whose learning rate falls to 0 along a cosine."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0, fused=True)
    options["lr_scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    options |= {"batch_size": batch_size, "seed": seed, "warn_of_near_copies": False}
    return Unlearner(model, optimizer, SCHEDULE, method, **options)


# --- every method and its settings --------------------------------------------------------------------------

# Each arm has six tries: two strengths at three learning rates, or six rates where there is no strength.
RATES = 1e-4, 1e-3, 1e-2
RATES_ALONE = 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2

# The hyperparameter of a method, or of one of its variants, that says how hard it forgets.
STRENGTHS = {
    "retrack": ("lambd", (0.02, 0.9)),
    "retrack, auto": ("", ()),
    "siss": ("scaling_norm", (0.03, 0.1)),
    "siss, ratio": ("scaling_norm", (0.1, 0.3)),
    "siss, superfactor": ("superfactor", (0.1, 1.0)),
    "erasediff": ("eta", (1e-4, 1e-3)),
    "erasediff_bome": ("eta", (1e-2, 0.1)),
    "erasediff_bome, fixed": ("lambda_bome", (1e-2, 0.1)),
    "dpo": ("beta", (20.0, 1000.0)),
    "kto": ("beta", (20.0, 1000.0)),
    "npo": ("beta", (20.0, 1000.0)),
}
# gamma of each kind of anchor, whose precisions differ by orders of magnitude.
GAMMAS = {
    "vdu": (1e2, 1e4),
    "vdu_laplace": (1e3, 1e5),
    "vdu_swag": (1e-2, 1.0),
    "vdu_l2": (1e4, 1e6),
}

LEFT_OUT = {
    "lowpass": "images of one pixel have no frequencies",
    "within_condition": "the points have no labels",
    "other_condition": "the points have no prompts",
    "inner_steps": "they change no weight, bit for bit (tests/methods/test_erasediff_bome.py)",
}


@dataclass(frozen=True)
class Try:
    """A method with everything that is tuned."""

    method: Method
    lr: float
    gamma: float | None = None  # of an anchor


@dataclass(frozen=True)
class Arm:
    """One way to unlearn, and what is tried of it."""

    method: Method
    strength: str = ""
    values: tuple[float, ...] = ()
    rule: str = ""  # "mask", or the name of an anchor
    time_window: Density | None = None
    retain_density: Density | None = None
    lr: float | None = None  # that of an arm that is not tuned

    def tries(self) -> list[Try]:
        if self.lr is not None:
            return [Try(self.method, self.lr)]
        if self.rule in GAMMAS:
            return [Try(self.method, lr, gamma) for gamma, lr in product(GAMMAS[self.rule], RATES)]
        if not self.strength:
            return [Try(self.method, lr) for lr in RATES_ALONE]
        pairs = product(self.values, RATES)
        return [Try(replace(self.method, **{self.strength: value}), lr) for value, lr in pairs]

    def described(self, number: int) -> str:
        """What a try of this arm has that others do not."""
        tried = self.tries()[number]
        strength = f"{self.strength} {getattr(tried.method, self.strength):g}, " if self.strength else ""
        gamma = "" if tried.gamma is None else f"gamma {tried.gamma:g}, "
        return f"{strength}{gamma}rate {tried.lr:g}"


def of_registry(name: str, variant: str = "", **fields) -> Arm:
    """A variant of a registered method."""
    record = get(name)
    method = replace(record.example, **record.variants[variant], **fields)
    strength, values = STRENGTHS.get(f"{name}, {variant}", STRENGTHS.get(name, ("", ())))
    return Arm(method, strength, values)


def arms() -> dict[str, Arm]:
    """Every variant of every method of the package, and settings that are none of them."""
    found = {}
    for name, record in methods().items():
        # A method of a user, or of a test, is none of the package.
        if name in LEFT_OUT or not record.method.__module__.startswith("fastunlearn."):
            continue
        for variant in record.variants:
            found[f"{name}, {variant}" if variant else name] = of_registry(name, variant)

    for k in (1, 100):
        found[f"retrack, k = {k}"] = of_registry("retrack", k=k)
    found["retrack, lambda 1"] = Arm(ReTrack(lambd=1.0))
    for lambd in (0.0, 1.0):
        found[f"siss, lambda {lambd:g}"] = of_registry("siss", lambd=lambd)

    siss = of_registry("siss")
    for window, density in WINDOWS.items():
        found[f"siss, {window}"] = replace(siss, time_window=density)
    found["siss, last timestep alone"] = replace(siss, time_window=LAST, retain_density=LAST)
    for name in ("neggrad", "dpo", "kto"):
        found[f"{name}, middle"] = replace(of_registry(name), time_window=WINDOWS["middle"])

    for anchor in GAMMAS:
        found[f"neggrad, {anchor}"] = replace(of_registry("neggrad"), rule=anchor)
    for name in ("neggrad", "siss", "erasediff"):
        found[f"{name}, mask"] = replace(of_registry(name), rule="mask")

    # As the papers compare: one learning rate for all, and their strengths.
    alike = {
        "retrack": ReTrack(),
        "siss": SISS(scaling="ratio"),
        "erasediff": get("erasediff").example,
        "neggrad": NegGrad(),
        "vanilla": Vanilla(),
    }
    return found | {f"{name}, untuned": Arm(method, lr=UNTUNED_RATE) for name, method in alike.items()}


UNTUNED_RATE = 2e-3
ARMS = arms()

# How near they come, given more time: lambda and rate were chosen once, and are the same for all.
LONG = {
    title: Arm(method, lr=5e-3)
    for title, method in {
        "vanilla": Vanilla(),
        "retrack, importance": ReTrack(weights="importance", lambd=0.5),
        "retrack, self_normalized": ReTrack(weights="self_normalized", lambd=0.5),
        "retrack": ReTrack(lambd=0.5),
    }.items()
}


# --- the runs -----------------------------------------------------------------------------------------------

Networks = dict[int, dict[str, dict[str, Tensor]]]  # by seed, "start" and "retrained": state dicts


def networks_of(seed: int, settings: Settings) -> dict[str, dict[str, Tensor]]:
    """Trained on everything, and on the points to keep alone, for as long."""
    forget, retain = (store.images for store in points())
    sets = {"start": torch.cat([forget, retain])}
    if seed in settings.seeds:
        sets["retrained"] = retain
    return {name: pretrain(images, seed, settings).state_dict() for name, images in sets.items()}


def load(weights: dict[str, Tensor]) -> Denoiser:
    model = Denoiser()
    model.load_state_dict(weights)
    return model


def rules_of(arm: Arm, tried: Try, model: Denoiser, seed: int, networks: Networks) -> list[ParameterRule]:
    """Estimated on the network as it is at the start."""
    forget, retain = points()
    if arm.rule == "mask":
        gradients = fastunlearn.forget_gradients(model, SCHEDULE, forget, num_batches=20, seed=seed)
        return [Mask.from_gradients(gradients, model=model)]
    if arm.rule == "vdu":
        # The networks of all seeds were trained on the same points, independently.
        with tempfile.TemporaryDirectory() as folder:
            files = [Path(folder) / f"{seed}.safetensors" for seed in networks]
            for file, trained in zip(files, networks.values(), strict=True):
                save_file(trained["start"], file)
            return [fastunlearn.vdu(model, files, tried.gamma)]
    if arm.rule == "vdu_laplace":
        samples = {"samples": len(retain), "timesteps_per_sample": len(SCHEDULE), "seed": seed}
        return [fastunlearn.vdu_laplace(model, SCHEDULE, retain, tried.gamma, **samples)]
    if arm.rule == "vdu_swag":
        return [fastunlearn.vdu_swag(model, SCHEDULE, retain, tried.gamma, seed=seed)]
    if arm.rule == "vdu_l2":
        return [fastunlearn.vdu_l2(model, tried.gamma)]
    return []


def unlearn(
    arm: Arm, tried: Try, seed: int, networks: Networks, settings: Settings, steps: int
) -> dict[str, list[float]]:
    """Distances on and off the points to forget, after 0 steps, and then every so many."""
    model = load(networks[seed]["start"])
    forget, retain = points()
    options = {"rules": rules_of(arm, tried, model, seed, networks)}
    options |= {"time_window": arm.time_window, "retain_density": arm.retain_density}
    if "reference" in tried.method.needs:
        options["reference_model"] = copy.deepcopy(model).requires_grad_(False)
    sets = {"forget": forget, "retain": retain}
    options |= {name: store for name, store in sets.items() if reads(tried.method, name)}
    run = unlearner(model, tried.method, tried.lr, steps, seed, settings.batch_size, **options)

    measured = [distances(model)]
    for step in range(1, steps + 1):
        run.step()
        if step % settings.measured_every == 0 or step == steps:
            measured.append(distances(model))
    return {name: [found[name] for found in measured] for name in regions()}


def reads(method: Method, name: str) -> bool:
    return name in method.needs or (name == "retain" and "neighbors" in method.needs)


def tune(title: str, networks: Networks, settings: Settings) -> dict:
    """All tries with the tuning seed; the two best of them with the others, where the better one stays."""
    arm = ARMS[title]
    ends, tries = [], arm.tries()
    if len(tries) > 1:
        for tried in tries:
            curve = unlearn(arm, tried, settings.tuning_seed, networks, settings, settings.steps)
            ends.append({name: distance[-1] for name, distance in curve.items()})
    order = sorted(range(len(ends)), key=lambda number: total(ends[number]))
    finalists = order[:2] or [0]
    runs = {
        number: {
            str(seed): unlearn(arm, tries[number], seed, networks, settings, settings.steps)
            for seed in settings.seeds
        }
        for number in finalists
    }
    best = better(runs)
    return {"best": arm.described(best), "number": best, "tries": ends, "runs": runs[best]}


def better(runs: dict[int, dict]) -> int:
    """The try with the smaller sum over all seeds."""

    def over_seeds(number: int) -> float:
        last = [{name: curve[-1] for name, curve in run.items()} for run in runs[number].values()]
        return sum(total(end) for end in last)

    return min(runs, key=over_seeds)


def total(end: dict[str, float]) -> float:
    """What is tuned: the sum of both distances. A network that says NaN is no best one."""
    both = end["on"] + end["off"]
    return math.inf if math.isnan(both) else both


def go_on(title: str, networks: Networks, settings: Settings) -> dict:
    """A long run of each seed."""
    arm = LONG[title]
    (tried,) = arm.tries()
    return {
        str(seed): unlearn(arm, tried, seed, networks, settings, settings.long_steps)
        for seed in settings.seeds
    }


def experiment(settings: Settings, workers: int = 1) -> dict:
    """The record of all runs, told as they end."""
    began = processor_seconds()
    seeds = settings.tuning_seed, *settings.seeds
    with Workers(workers) as at_once:
        networks = dict(zip(seeds, at_once(networks_of, [(seed, settings) for seed in seeds]), strict=True))
        tuned, longer = {}, {}
        found = at_once(tune, [(title, networks, settings) for title in ARMS])
        for title, one in zip(ARMS, found, strict=True):
            tuned[title] = one
            print(f"{title:28}", one["best"], flush=True)
        found = at_once(go_on, [(title, networks, settings) for title in LONG])
        for title, one in zip(LONG, found, strict=True):
            longer[title] = one
            print(f"{title}, {settings.long_steps} steps", flush=True)
    return record_of(networks, tuned, longer, settings, processor_seconds() - began)


def record_of(networks: Networks, tuned: dict, longer: dict, settings: Settings, seconds: float) -> dict:
    """What is written."""
    trained = {
        str(seed): {name: distances(load(weights)) for name, weights in networks[seed].items()}
        for seed in settings.seeds
    }
    return {
        "settings": asdict(settings) | {"seeds": list(settings.seeds)},
        "version": fastunlearn.__version__,
        "torch": torch.__version__,
        "processor_seconds": round(seconds),
        "differences": differences(),
        "networks": trained,
        "arms": tuned,
        "long": longer,
    }


def processor_seconds() -> float:
    """Of this process and of those that it has started and that have ended: other programs do not count."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


class Workers:
    """Calls a function with many arguments, in some processes of one thread each; one is this process."""

    def __init__(self, count: int):
        context = multiprocessing.get_context("spawn")
        options = {"initializer": torch.set_num_threads, "initargs": (1,), "mp_context": context}
        self.pool = ProcessPoolExecutor(count, **options) if count > 1 else None

    def __enter__(self):
        return self

    def __exit__(self, *error):
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)

    def __call__(self, function, arguments: list[tuple]) -> Iterator:
        if self.pool is None:
            return starmap(function, arguments)
        return self.pool.map(function, *zip(*arguments, strict=True))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("exact_problem.json"), help="all numbers")
    parser.add_argument("--picture", type=Path, help="where to draw it (PNG)")
    parser.add_argument("--workers", type=int, default=2, help="processes of one thread each")
    parser.add_argument("--table", action="store_true", help="of the numbers in --output; nothing is run")
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # so small a network is slower with more
    if given.table:
        record = json.loads(given.output.read_text())
    else:
        record = experiment(Settings(), workers=given.workers)
        with atomic_file(given.output) as file:
            file.write(json.dumps(record, indent=1).encode() + b"\n")
    print(*tables(record), sep="\n\n")
    if given.picture is not None:
        forget, retain = (store.images.flatten(1) for store in points())
        picture(record, forget, retain).savefig(given.picture)


if __name__ == "__main__":
    main()
