"""`fastunlearn demo`: watch the embedded digit model forget a T-shirt, and decide by exact tests whether it
did.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from .. import __version__, assets
from ..engine.unlearner import Unlearner
from ..host import check
from ..host.folder_lock import locked
from ..host.store import ImageStore
from ..methods import registry
from ..methods.registry import Setting
from ..models import check_replaceable, load_checkpoint, save_checkpoint
from ..models.frozen import frozen_copy
from ..objective.schedule import NoiseSchedule
from ..recipes.mnist_tshirt import load_demo
from ..report import Criterion, all_passed
from ..runs.run_health import SkipLimit, check_finite, remedy
from ..runs.trackers import ProgressBar
from .evaluation import INFERENCE_STEPS, Evaluator, decide, timed
from .page import print_summary, report

MODEL = "mnist-tshirt-small"  # also the recipe that the methods' records have settings for
LR = 1.5e-4  # of a method that says nothing of the demo
MOST_SKIPPED = SkipLimit(steps=10, share=0.5)


def settings() -> dict[str, Setting]:
    """How the demo runs each method: retuned for a network of 0.7 M parameters and a batch of 48 (the papers:
    64-128-256 channels, batch 128, constant lr 5e-5).

    The learning rate falls to 0 along a cosine, which gives the digits back what the first steps took from
    them.
    """
    return {name: record.setting(MODEL, lr=LR) for name, record in registry.methods().items()}


@dataclass(frozen=True)
class DemoResult:
    """What the demo found; `results` is the content of `results.json`."""

    passed: bool
    criteria: tuple[Criterion, ...]
    report: Path
    model: Path
    results: dict


def _alone(run: Callable[..., DemoResult]) -> Callable[..., DemoResult]:
    @functools.wraps(run)
    def run_alone(output_dir: str | os.PathLike = "out/demo", **options) -> DemoResult:
        with locked(output_dir, "demo"):
            return run(output_dir, **options)

    return run_alone


@_alone
def run_demo(
    output_dir: str | os.PathLike = "out/demo",
    *,
    steps: int = 50,
    seed: int = 0,
    num_samples: int = 512,
    batch_size: int = 48,
    method: str = "retrack",
    lr: float | None = None,
    lambd: float | None = None,
    model_dir: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    show_progress: bool = True,
) -> DemoResult:
    """Samples, unlearns the T-shirt, samples again from the same noise, decides, and writes the report and
    the unlearned model.

    Args:
        output_dir: takes `report.html`, `results.json`, the pictures as PNG, and `model/` for
            `DDPMPipeline.from_pretrained`.
        steps: unlearning steps; with 0 the demo must find that nothing was forgotten.
        seed: of every random number: sampling, unlearning, probes.
        num_samples: samples before and after; at least 299 can show that 1 % has gone. Twice as many if none
            of them shows the T-shirt before.
        batch_size: forget and retain rows a step.
        method: one of `settings()`.
        lr, lambd: instead of the method's own in `settings()`.
        model_dir: another diffusers folder than the embedded model's, of the same kind.
        device: where the model runs.
        show_progress: progress bars, and the table at the end.

    Raises:
        TypeError, ValueError: for an argument outside its range, before any work.
        FolderLocked: another process, or another thread, writes to `output_dir`.
        TooManySkippedSteps, WeightsNotFinite: the steps destroyed the model; nothing is written then.
        NotFiniteError: a ValueError; the model's weights, its samples or a score are not finite, before or
            after the steps.
    """
    steps = check.integer("steps", steps, low=0)
    num_samples = check.integer("num_samples", num_samples, low=2)
    batch_size = check.integer("batch_size", batch_size, low=1)
    seed = check.integer("seed", seed, low=0, high=2**63 - 1)
    setting = _setting(method, lr, lambd)
    output_dir = Path(output_dir)
    check_replaceable(output_dir / "model")
    seconds: dict[str, float] = {}

    with timed(seconds, "load"):
        model, scheduler = load_model(device, model_dir)
        forget, retain = load_demo()
        evaluate = Evaluator(scheduler, forget, retain, num_samples, seed, show_progress)
    before = evaluate(model, "before", seconds)
    if before.frequency.count == 0:  # about one seed in ten: what was not there before cannot be seen to go
        evaluate.num_samples *= 2
        before = evaluate(model, "before", seconds)
    with timed(seconds, "unlearn"):
        log = forget_tshirt(model, scheduler, setting, forget, retain, steps, batch_size, seed, show_progress)
    after = evaluate(model, "after", seconds)
    criteria = decide(before, after)
    with timed(seconds, "save"):
        model_path = save_checkpoint(output_dir / "model", model, scheduler)

    run = {
        "version": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "threads": torch.get_num_threads(),
        "seed": seed,
        "method": type(setting.method).__name__,
        "settings": asdict(setting.method),
        "lr": setting.lr,
        "batch_size": batch_size,
        "steps": steps,
        "num_samples": evaluate.num_samples,
        "inference_steps": INFERENCE_STEPS,
    }
    results = {
        "passed": all_passed(criteria) is True,
        "criteria": [asdict(criterion) for criterion in criteria],
        "run": run,
        "before": before.numbers(),
        "after": after.numbers(),
        "seconds": seconds,
        "log": log,
    }
    page = report(evaluate.image, evaluate.noised(), before, after, criteria, results).write(output_dir)
    if show_progress:
        print_summary(before, after, criteria, seconds, page)
    return DemoResult(results["passed"], criteria, page, model_path, results)


def _setting(method: str, lr: float | None, lambd: float | None) -> Setting:
    setting = registry.get(method).setting(MODEL, lr=LR)
    if lr is not None:
        setting = replace(setting, lr=check.number("lr", lr, low=0, low_open=True))
    if lambd is not None:
        if not hasattr(setting.method, "lambd"):
            raise ValueError(f"lambd: expected None for {method}, which has none, got {lambd!r}")
        setting = replace(setting, method=replace(setting.method, lambd=lambd))
    return setting


def load_model(device: str | torch.device = "cpu", folder: str | os.PathLike | None = None):
    """The embedded model, or the one in `folder`, in float32, and its scheduler."""
    return load_checkpoint(assets.path(MODEL) if folder is None else folder, device=torch.device(device))


def forget_tshirt(
    model: torch.nn.Module,
    scheduler,
    setting: Setting,
    forget: ImageStore,
    retain: ImageStore,
    steps: int,
    batch_size: int,
    seed: int,
    show_progress: bool,
) -> list[dict]:
    """Takes the steps on `model` in place; one entry a step: what `StepOutput` has, None where not finite."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=setting.lr, betas=(0.95, 0.999), weight_decay=1e-6, fused=True
    )
    schedule = NoiseSchedule.from_diffusers(scheduler)
    reference = None
    if "reference" in setting.method.needs:
        reference = frozen_copy(model.train())
    lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps, 1))
    unlearner = Unlearner(
        model,
        optimizer,
        schedule,
        setting.method,
        forget=forget,
        retain=retain,
        batch_size=batch_size,
        total_steps=steps,
        seed=seed,
        lr_scheduler=lr_scheduler,
        reference_model=reference,
    )
    log = []
    model.train()
    with ProgressBar(steps, 0, show_progress, f"unlearning with {type(setting.method).__name__}") as advance:
        for step in range(1, steps + 1):
            output = unlearner.step()
            entry = {
                name: value.item() for name, value in output._asdict().items() if isinstance(value, Tensor)
            }
            finite = {name: value if math.isfinite(value) else None for name, value in entry.items()}
            log.append({"step": step, **finite})
            advance(step, {**entry, "skipped_steps": int(unlearner.skipped_steps)})
    MOST_SKIPPED.check(int(unlearner.skipped_steps), steps, steps, None)
    check_finite("the unlearned model", model.state_dict(), remedy(None))
    model.eval()
    return log
