"""The demo's page and the table that it prints."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table as ConsoleTable
from torch import Tensor

from ..metrics.frequency import Share
from ..report import (
    Criterion,
    ReconstructionPair,
    Report,
    Section,
    Table,
    reconstructions_section,
    samples_section,
    training_section,
)
from .evaluation import SUBJECT, Evaluation

SCORES = (
    ("FID of the digits", "fid", 2),
    ("IS of the digits", "inception_score", 2),
    ("mean confidence in the digits", "mean_confidence", 3),
)


def report(
    image: Tensor,
    noised: Sequence[Tensor],
    before: Evaluation,
    after: Evaluation,
    criteria: tuple[Criterion, ...],
    results: dict,
) -> Report:
    """The page; `image` `[1, C, H, W]` was to be forgotten, `noised` are starts of the chains, `results` is
    the content of `results.json`.
    """
    run, seconds = results["run"], results["seconds"]
    pairs = [
        ReconstructionPair(first, second, images, images_after)
        for (first, images), (second, images_after) in zip(
            before.reconstructions, after.reconstructions, strict=True
        )
    ]
    settings = ", ".join(
        f"{name} = {value}" for name, value in {**run["settings"], "batch size": run["batch_size"]}.items()
    )
    training = (
        f"{run['steps']} steps of {run['method']} with {settings}; AdamW, learning rate {run['lr']:g} "
        "falling to 0 along a cosine. Retuned for this small network: the papers train one of 64, 128 and "
        "256 channels at batch size 128 and a constant 5e-5 (ReTrack with lambd = 0.005)."
    )
    note = (
        f"Samples by {run['inference_steps']} DDPM steps. FID, IS and confidence come from the small MNIST "
        f"classifier of this package, against {before.scores.num_real:,} real digits and without the "
        f"{SUBJECT}s among the samples: compare them with each other only. NLL by the probability-flow ODE."
    )
    threads = f"{run['threads']} CPU thread{'s' * (run['threads'] != 1)}"
    times = Table(
        ("stage", "seconds"),
        [
            *((stage, f"{value:.1f}") for stage, value in seconds.items()),
            ("total", f"{sum(seconds.values()):.1f}"),
        ],
        f"{threads}, device {run['device']}, torch {run['torch']}.",
    )
    sections = [
        Section("Results", table=Table(("", "before", "after"), table_rows(before, after), note)),
        samples_section(
            before.samples, after.samples, before.hits, after.hits, subject=SUBJECT, report_images=True
        ),
        reconstructions_section(image, noised, pairs, subject=SUBJECT, report_images=True),
        training_section(results["log"], training),
        Section("Time", table=times),
    ]
    lead = (
        "A small diffusion model was trained on 60,000 handwritten digits and 606 copies of one T-shirt. "
        f"{run['steps']} steps of {run['method']} are to make it forget that one image, without training it "
        "again."
    )
    footer = (
        f"fastunlearn {run['version']}, seed {run['seed']}. All numbers of this page are in results.json; "
        "the unlearned model is in model/."
    )
    title = "A diffusion model forgets a training image"
    return Report(title, lead, sections, results, verdict_of(criteria), criteria, footer)


def verdict_of(criteria: Sequence[Criterion]) -> str:
    """The answer of all questions, in a sentence."""
    failed = [criterion for criterion in criteria if not criterion.passed]
    if not failed:
        return f"Forgotten: the model no longer produces the {SUBJECT}, and its digits are kept."
    answered = f"{len(failed)} of {len(criteria)} questions are answered with no."
    if all(criterion.kept for criterion in failed):
        return f"The {SUBJECT} is gone, but the digits are not shown to be kept: {answered}"
    return f"Not forgotten: {answered}"


def table_rows(before: Evaluation, after: Evaluation) -> list[tuple[str, str, str]]:
    """The table of results: what, before, after."""
    both = list(zip(before.reconstructions, after.reconstructions, strict=True))
    return [
        (
            f"{SUBJECT} among the samples",
            *(f"{e.frequency.count} of {e.frequency.total}" for e in (before, after)),
        ),
        ("its frequency, exact 95% interval", *(_interval(e.frequency) for e in (before, after))),
        *(
            (
                f"chains from t = {pair[0][0].timestep} that restore it",
                *(f"{r.returned.count} of {r.returned.total}" for r, _ in pair),
            )
            for pair in both
        ),
        (f"NLL of the {SUBJECT}, bits/dim", *(f"{e.likelihood.mean:.2f}" for e in (before, after))),
        *(
            (name, *(f"{getattr(e.scores, key):.{digits}f}" for e in (before, after)))
            for name, key, digits in SCORES
        ),
    ]


def print_summary(
    before: Evaluation,
    after: Evaluation,
    criteria: tuple[Criterion, ...],
    seconds: dict[str, float],
    page: Path,
) -> None:
    """Table, answers, and as the last line the path of the report."""
    console = Console()
    table = ConsoleTable("", "before", "after")
    for row in table_rows(before, after):
        table.add_row(*row)
    console.print(table)
    for criterion in criteria:
        console.print(f"{'[green]yes[/]' if criterion.passed else '[red]no [/]'}  {criterion.name}")
    console.print(f"{sum(seconds.values()):.0f} s, of which unlearning {seconds['unlearn']:.0f} s")
    console.print(f"report: {page.resolve()}", soft_wrap=True)


def _interval(share: Share) -> str:
    return f"{share.share:.2%} ({share.low:.2%} to {share.high:.2%})"
