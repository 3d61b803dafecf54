"""How far weights before and after unlearning, and logged losses, confirm which image was forgotten.

    python scripts/measure_confirmation.py --output bench/results/confirmation_mnist.json

An attacker has the embedded model, the one that a run left, the method and its settings, and a thousand
digits of one class, one of which was forgotten. He does not have the seed, but where it is said. Every digit
to forget has a run of its own, which is looked at after 1, 10 and 50 steps: the learning rate is constant, so
that these are what shorter runs leave. docs/what_a_run_leaves.md has the tables. It takes 26 minutes of one
core.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastunlearn import ImageStore, NoiseSchedule, Unlearner, __version__
from fastunlearn import functional as F
from fastunlearn.demo import load_model
from fastunlearn.demo import settings as demo_settings
from fastunlearn.host import philox
from fastunlearn.metrics.deletion import denoising_losses
from fastunlearn.objective.draws import CounterSource, Draws, complete
from fastunlearn.recipes.mnist_tshirt import load_demo

METHODS = ("neggrad", "retrack", "siss")
DIGIT = 3  # the class of all candidates
SEED = 2**40 + 17  # of the runs: the attacker's own noise has other ones
ATTACKERS_SEED, ATTACKERS_PURPOSE = 1, 0xFFFD
STEPS = (1, 10, 50)
TOGETHER = 20  # images of the run that forgets many
LOSS_DRAWS = 4  # timesteps, with a noise each, of a candidate's loss in the networks after each run
GRADIENT_DRAWS = 16  # of the gradient of its loss in the network before
COMMON = 50  # other digits of the class, whose mean gradient says nothing of a candidate
PROTOCOL_DRAWS = 64  # of the losses in protocol.json
RERUNS = 20  # candidates that the attacker who knows the seed runs again


@dataclass
class Run:
    """What a run left: the step looked at, the rows of the candidates forgotten, and the new weights."""

    method: str
    step: int
    rows: list[int]
    weights: Tensor  # [P] float32
    forget_losses: list[float]  # as in metrics.jsonl


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=10, help="digits to forget, each in a run of its own")
    parser.add_argument("--candidates", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    settings = {name: value for name, value in vars(arguments).items() if name != "output"}
    began = time.perf_counter()

    digits = load_demo()[1]
    of_class, others = (
        (digits.labels == DIGIT)
        .nonzero()
        .flatten()
        .split_with_sizes([arguments.candidates, int((digits.labels == DIGIT).sum()) - arguments.candidates])
    )
    candidates, others = digits.select(of_class), digits.select(others[:COMMON])
    spread = torch.linspace(0, len(candidates) - 1, arguments.images).long().tolist()
    together = torch.linspace(1, len(candidates) - 2, TOGETHER).long().tolist()

    runs = []
    for method in METHODS:
        for rows in [[row] for row in spread] + [together]:
            runs += unlearned(digits, of_class, rows, method, STEPS, arguments.batch_size, SEED)
        print(f"{method}: forgot {arguments.images} digits, {time.perf_counter() - began:.0f} s", flush=True)

    found = {
        "settings": settings | {"digit": DIGIT, "steps": STEPS, "together": TOGETHER},
        "methods": {name: repr(demo_settings()[name]) for name in METHODS},
        "version": __version__,
        "torch": torch.__version__,
        "machine": platform.processor() or platform.machine(),
        "losses": confirmed_by_losses(runs, candidates),
        "directions": confirmed_by_directions(runs, candidates, others),
        "logged": confirmed_by_metrics(runs, candidates, arguments.batch_size),
        "protocol": confirmed_by_protocol(candidates, spread),
        "rerun": confirmed_by_reruns(digits, of_class, spread, arguments.batch_size),
    }
    found["seconds"] = round(time.perf_counter() - began)
    arguments.output.write_text(json.dumps(found, indent=1) + "\n")
    print(table(found))


# --- the runs -----------------------------------------------------------------------------------------------


def unlearned(
    digits: ImageStore,
    of_class: Tensor,
    rows: list[int],
    method: str,
    steps: Sequence[int],
    batch_size: int,
    seed: int,
) -> list[Run]:
    """A run that forgets the candidates `rows` and keeps all other digits, after each of `steps`."""
    forgotten = of_class[rows]
    kept = torch.ones(len(digits), dtype=torch.bool)
    kept[forgotten] = False
    model, scheduler = load_model("cpu")
    setting = demo_settings()[method]
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
    )
    unlearner = Unlearner(
        model.train(),
        optimizer,
        NoiseSchedule.from_diffusers(scheduler),
        setting.method,
        forget=digits.select(forgotten),
        retain=digits.select(kept.nonzero().flatten()),
        batch_size=batch_size,
        total_steps=steps[-1],
        seed=seed,
        allow_overlap=True,
        warn_of_near_copies=False,
    )
    runs, losses = [], []
    for step in range(1, steps[-1] + 1):
        losses.append(unlearner.step().forget_loss.item())
        if step in steps:
            runs.append(Run(method, step, rows, flat(model), list(losses)))
    return runs


def flat(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def put(model: nn.Module, weights: Tensor) -> None:
    torch.nn.utils.vector_to_parameters(weights.clone(), model.parameters())


# --- the attacks --------------------------------------------------------------------------------------------


def confirmed_by_losses(runs: list[Run], candidates: ImageStore) -> list[dict]:
    """By how much the loss of a candidate has grown, and how large it is, after the last step."""
    model, scheduler = load_model("cpu")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    how = {"draws": LOSS_DRAWS, "batch_size": 100, "seed": ATTACKERS_SEED}
    before = denoising_losses(model, schedule, candidates, **how)
    found = []
    for run in runs:
        if run.step != STEPS[-1]:
            continue
        put(model, run.weights)
        after = denoising_losses(model, schedule, candidates, **how)
        found += [
            _result(run, "loss after over loss before", after / before),
            _result(run, "loss after", after),
        ]
        print(found[-2], flush=True)
    return found


def confirmed_by_directions(runs: list[Run], candidates: ImageStore, others: ImageStore) -> list[dict]:
    """Cosine of the way that the weights went, or of its sign, and the gradient of a candidate's loss.

    Of the gradient without what it has in common with those of `others`.
    """
    model, scheduler = load_model("cpu")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    moved = torch.stack([run.weights for run in runs]) - flat(model)
    ways = torch.cat([moved, moved.sign()])
    ways /= ways.norm(dim=1, keepdim=True)
    common = sum(gradient(model, schedule, image) for image in each(others)) / len(others)
    cosines = []
    for image in each(candidates):
        own = gradient(model, schedule, image) - common
        cosines.append(ways @ (own / own.norm()))
    cosines = torch.stack(cosines, dim=1)
    found = []
    for run, cosine, of_sign in zip(runs, cosines[: len(runs)], cosines[len(runs) :], strict=True):
        found += [_result(run, "direction", cosine), _result(run, "sign of the direction", of_sign)]
    return found


def each(images: ImageStore):
    for row in range(len(images)):
        yield images.rows(torch.tensor([row]))


def gradient(model: nn.Module, schedule: NoiseSchedule, image: Tensor) -> Tensor:
    """Of the loss of `image` `[1, C, H, W]`, over all parts of the schedule: `[P]`, of length 1."""
    count = GRADIENT_DRAWS
    timesteps = ((torch.arange(count) + 0.5) * len(schedule) / count).long()
    noise = philox.normal((count, *image.shape[1:]), torch.tensor([ATTACKERS_SEED, 0, 0]), ATTACKERS_PURPOSE)
    x_t, target = F.noised(image.expand_as(noise).contiguous(), noise, timesteps, schedule)
    loss = F.denoising_loss(model(x_t, timesteps).sample, target).mean()
    found = torch.cat([part.flatten() for part in torch.autograd.grad(loss, list(model.parameters()))])
    return found / found.norm()


def confirmed_by_metrics(runs: list[Run], candidates: ImageStore, batch_size: int) -> list[dict]:
    """How near a candidate's loss in the network before is to the first one in metrics.jsonl of NegGrad."""
    model, scheduler = load_model("cpu")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    how = {"draws": GRADIENT_DRAWS, "batch_size": 100, "seed": ATTACKERS_SEED}
    # Without the seed the mean over other draws, with it the very draws of the first step.
    pixels = candidates.shape[0] * candidates.shape[1] * candidates.shape[2]
    without = denoising_losses(model, schedule, candidates, **how) * pixels
    known = torch.stack([first_loss(model, schedule, image, batch_size) for image in each(candidates)])
    found = []
    for run in runs:
        if run.method == "neggrad" and run.step == 1 and len(run.rows) == 1:
            logged = run.forget_losses[0]
            found += [
                _result(run, "first logged loss, without the seed", -(without - logged).abs()),
                _result(run, "first logged loss, with the seed", -(known - logged).abs()),
            ]
    return found


def first_loss(model: nn.Module, schedule: NoiseSchedule, image: Tensor, batch_size: int) -> Tensor:
    """What the first step of NegGrad logs for `image` with the seed of the runs."""
    method = demo_settings()["neggrad"].method
    batch = image.expand(batch_size, *image.shape[1:]).contiguous()
    source = CounterSource(torch.tensor([SEED, 0, 0]))
    draws = complete(Draws(), method.draws(), source, batch, None, len(schedule))
    x_t, target = F.noised(batch, draws.forget_noise, draws.forget_timesteps, schedule)
    with torch.no_grad():
        return F.denoising_loss(model(x_t, draws.forget_timesteps).sample, target).mean().double()


def confirmed_by_protocol(candidates: ImageStore, rows: list[int]) -> list[dict]:
    """How near a candidate's loss in the network before is to the one in protocol.json.

    With the seed it is that number. Here the attacker has another one, and as many draws.
    """
    model, scheduler = load_model("cpu")
    schedule = NoiseSchedule.from_diffusers(scheduler)
    how = {"draws": PROTOCOL_DRAWS, "batch_size": 100}
    written = denoising_losses(model, schedule, candidates.select(torch.tensor(rows)), seed=SEED, **how)
    own = denoising_losses(model, schedule, candidates, seed=ATTACKERS_SEED, **how)
    name = "loss in protocol.json, without the seed"
    found = []
    for row, number in zip(rows, written, strict=True):
        found.append(_result(Run("any", 0, [row], torch.empty(0), []), name, -(own - number).abs()))
    return found


def confirmed_by_reruns(digits: ImageStore, of_class: Tensor, rows: list[int], batch_size: int) -> dict:
    """How many of the candidates give the weights of the first one's run, bit for bit, when they are run.

    The first one is among them.
    """
    others = [row for row in range(len(of_class)) if row not in rows]
    tried = [rows[0], *others[: RERUNS - 1]]
    found = {}
    for method in METHODS:
        (right,) = unlearned(digits, of_class, [rows[0]], method, [2], batch_size, SEED)
        for name, seed in (("with the seed", SEED), ("with another seed", ATTACKERS_SEED)):
            again = [
                unlearned(digits, of_class, [row], method, [2], batch_size, seed)[0].weights for row in tried
            ]
            equal = [torch.equal(weights, right.weights) for weights in again]
            found[f"{method}, {name}"] = {
                "tried": len(tried),
                "equal": sum(equal),
                "the right one is": equal[0],
            }
    return found


def _result(run: Run, statistic: str, scores: Tensor) -> dict:
    """How the forgotten candidates of `run` stand among those that it did not forget.

    Args:
        scores: of all candidates; the higher, the more the candidate looks like a forgotten one.
    """
    others = torch.ones(len(scores), dtype=torch.bool)
    others[run.rows] = False
    # Equal scores count half.
    own, rest = scores[run.rows].double()[:, None], scores[others].double()
    higher = ((own > rest).double() + (own == rest).double() / 2).mean(1)
    rank = int((rest > own.max()).sum()) + 1
    return {
        "method": run.method,
        "steps": run.step,
        "images": len(run.rows),
        "statistic": statistic,
        "auc": round(higher.mean().item(), 4),
        "rank of the best": rank,
        "score": float(f"{own.max():.4g}"),
        "best other score": float(f"{rest.max():.4g}"),
    }


def table(found: dict) -> str:
    """Markdown: how often the right candidate came first, and the area under the curve."""
    groups: dict[tuple, list[dict]] = {}
    for part in ("losses", "directions", "logged", "protocol"):
        for result in found[part]:
            key = result["method"], result["steps"], result["images"], result["statistic"]
            groups.setdefault(key, []).append(result)
    lines = ["| method | steps | images | statistic | first | AUC |", "|---|---|---|---|---|---|"]
    for (method, steps, images, statistic), results in groups.items():
        # Of many forgotten ones the best is a chance among many: only of one it says anything.
        first = "" if images > 1 else f"{_firsts(results)} of {len(results)}"
        auc = statistics.mean(result["auc"] for result in results)
        lines.append(f"| {method} | {steps} | {images} | {statistic} | {first} | {auc:.3f} |")
    return "\n".join(lines + [f"{name}: {value}" for name, value in found["rerun"].items()])


def _firsts(results: list[dict]) -> int:
    return sum(result["rank of the best"] == 1 for result in results)


if __name__ == "__main__":
    main()
