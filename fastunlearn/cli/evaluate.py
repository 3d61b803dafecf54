"""`fastunlearn evaluate`."""

from __future__ import annotations

import sys
import traceback
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .options import also, unset
from .picture_flags import PictureFlags

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ..host.store import ImageStore
    from ..measuring import Images, Record, Settings, Subject, Verdict
    from ..metrics.threshold import Threshold

ROWS = {  # metric -> (row of the table, which direction is wanted)
    "frequency": ("forget images in samples", "lower"),
    "nll": ("their bits/dim", "higher"),
    "reconstruction": ("back from noise", "lower"),
    "fid": ("FID of other samples", "lower"),
    "is": ("IS of other samples", "higher"),
}
MOST_REAL_IMAGES = 10_000
DEFAULT_THRESHOLD = "the papers' 10 for 28x28 grey images, else calibrated on --retain"


@dataclass(kw_only=True)
class Evaluate:
    """Measure whether a checkpoint still knows the images to forget, and how well it does on the rest.

    frequency: the share of samples within --threshold of a forget image, with its exact 95 % interval.
    reconstruction: forget images noised to --timestep and denoised; the share that comes back. nll: their
    likelihood (probability-flow ODE). fid, is: 28x28 grey digits only, through the shipped MNIST classifier,
    comparable with each other but not with published numbers. No picture is written.

    What cannot be had is known before the first sample, and costs its row, with the reason; the exit code is
    then 1. With --against there is a verdict: yes only if the images came back before, do not after, are in
    none of the samples (frequency), and the quality of the rest (is) was measured and kept.

    Try: fastunlearn evaluate --model runs/forget-7/model --against pretrained --forget forget/ --retain keep/
    """

    model: Path
    """Folder of the diffusers pipeline to measure."""
    against: Annotated[Path | None, unset("nothing", "DIR")] = None
    """A second checkpoint, such as the one before unlearning, measured on the same noise."""
    forget: tuple[Path, ...]
    """Images to forget; equal ones count once."""
    retain: Annotated[tuple[Path, ...], unset("none")] = ()
    """Images to keep: --threshold is calibrated on them, and fid compares with them."""
    metrics: str = "frequency,nll,reconstruction"
    """Any of frequency, nll, reconstruction, fid, is, joined by commas."""
    num_images: int = 512
    """Samples for frequency, fid and is; 299 without a hit exclude a share of 1 %."""
    threshold: Annotated[float | None, unset(DEFAULT_THRESHOLD, "FLOAT")] = None
    """L2 distance, in pixels of [0, 1] summed over the image, below which two images are the same.
    Calibrated: the 0.1 % quantile of the distances among images to keep, at most half the distance of a
    forget image to a picture that shows nothing."""
    timestep: int = 250
    """Where reconstruction injects the noise."""
    chains: int = 64
    """Reconstructions of each forget image."""
    max_forget_images: int = 8
    """How many distinct forget images nll and reconstruction look at; the first ones."""
    nll_tolerance: float = 1e-3
    """Of the ODE solver; the papers' 1e-5 takes ten times as long for the second decimal."""
    sampler: Literal["ddpm", "ddim"] = "ddpm"
    """ddpm: ancestral. ddim: deterministic."""
    num_inference_steps: int = 50
    """Network calls a sample or chain."""
    batch_size: Annotated[int, also("--eval-batch-size")] = 64
    """Images a network call; changes speed only."""
    seed: int = 0
    """Selects all noise."""
    output: Path = Path("out/evaluate")
    """Folder for evaluation.json."""
    device: Annotated[str | None, unset("the first GPU, else cpu", "cpu|cuda|cuda:N")] = None
    """Where it runs."""
    pictures: PictureFlags = field(default_factory=PictureFlags)

    def lock(self):
        from ..host.folder_lock import locked

        return locked(self.output, "fastunlearn evaluate")

    def run(self) -> int:
        from ..host import check
        from ..measuring import Record, Settings, decide, parse_metrics
        from ..measuring.record import FILE
        from .options import check_file, check_outside, pick_device

        check_outside(self.output, forget=self.forget, retain=self.retain)
        check_file("--output", self.output / FILE)
        wanted = parse_metrics(self.metrics)
        settings = Settings(
            num_images=self.num_images,
            timestep=self.timestep,
            chains=self.chains,
            nll_tolerance=self.nll_tolerance,
            sampler=self.sampler,
            num_inference_steps=self.num_inference_steps,
            batch_size=self.batch_size,
            seed=self.seed,
            show_progress=True,
        )
        check.integer("max_forget_images", self.max_forget_images, low=1)
        if self.threshold is not None:
            check.number("threshold", self.threshold, low=0, low_open=True)
        subjects = self._subjects(pick_device(self.device))
        read: dict[str, Any] = {}
        images = self._images(wanted, next(iter(subjects.values())).model, read)
        refused = _plan(wanted, subjects, images, settings)

        record = Record(self.output, self._head(images, read), tuple(subjects), wanted)
        try:
            for name, subject in subjects.items():
                _measure(name, subject, wanted, refused[name], images, settings, record)
            counts = {"looked_at": len(images.few), "given": len(images.forget)}
            # A model that is measured alone has nothing before it.
            before = record.measured.get("before")
            after = record.measured["model" if before is None else "after"]
            verdict = decide(before, after, **counts)
            record.finish(verdict=asdict(verdict))
        except BaseException as error:
            record.fail(error)
            raise
        self._print(record, images, verdict)
        return 0 if record.complete else 1

    def _subjects(self, device: torch.device) -> dict[str, Subject]:
        """The checkpoints by their column: all are loaded, with finite weights, before one is measured."""
        from ..measuring import Subject
        from ..models import load_checkpoint
        from .options import model_shape

        paths = {"model": self.model}
        if self.against is not None:
            paths = {"before": self.against, "after": self.model}
        subjects = {name: Subject(*load_checkpoint(path, device=device)) for name, path in paths.items()}
        shapes = [model_shape(subject.model) for subject in subjects.values()]
        if len(set(shapes)) > 1:
            raise ValueError(
                f"against: expected a checkpoint for images of {shapes[-1]}, as --model, "
                f"got one for {shapes[0]}"
            )
        return subjects

    def _images(self, wanted: tuple[str, ...], model, read: dict[str, Any]) -> Images:
        """The sets; what was read of their files goes into `read`."""
        from ..measuring import Images
        from .options import load_for

        forget = _distinct(load_for(model, "forget", self.forget, self.pictures, read))
        if wanted == ("nll",):  # needs neither a threshold nor images to keep
            return Images(forget, forget[: self.max_forget_images], None, "no metric needs one")
        retain = load_for(model, "retain", self.retain, self.pictures, read) if self.retain else None
        threshold = self._threshold(forget, retain)
        real = None
        if retain is not None and {"fid", "is"} & set(wanted):
            real = _evenly(retain, MOST_REAL_IMAGES)
        return Images(forget, forget[: self.max_forget_images], real, threshold)

    def _threshold(self, forget: Tensor, retain: ImageStore | None) -> Threshold | str:
        """The threshold, or why there is none; one that was given and cannot serve is wrong input."""
        from ..metrics.threshold import choose, even_rows

        some = None if retain is None else retain.rows(even_rows(len(retain), forget[0].numel()))
        try:
            return choose(self.threshold, forget, some)
        except ValueError as error:
            if self.threshold is not None:
                raise
            return str(error)

    def _head(self, images: Images, read: dict[str, Any]) -> dict:
        """What evaluation.json begins with; it names no image."""
        elsewhere = ("forget", "retain", "pictures")  # the last with the numbers of what was read
        noted = {name: value for name, value in vars(self).items() if name not in elsewhere}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in noted.items()}
        threshold = images.threshold
        threshold = {"refused": threshold} if isinstance(threshold, str) else asdict(threshold)
        sets = {"images": read, "forget_images": len(images.forget)}
        return {"settings": settings, **sets, "threshold": threshold}

    def _print(self, record: Record, images: Images, verdict: Verdict) -> None:
        from rich.console import Console
        from rich.table import Table

        table = Table("", *record.measured, "wanted")
        for metric in record.wanted:
            label, good = ROWS[metric]
            rows = record.measured.values()
            table.add_row(label, *(row[metric].value if metric in row else "not had" for row in rows), good)
        Console().print(table)
        for line in _notes(record, images):
            print(line)
        if self.against is not None:
            from ..measuring.verdict import QUESTION

            print(f"{QUESTION}: {verdict.answer} ({verdict.reason})")
        print(f"evaluation: {record.file}")


def _plan(
    wanted: tuple[str, ...], subjects: dict[str, Subject], images: Images, settings: Settings
) -> dict[str, dict[str, str]]:
    """Checkpoint -> metric -> why it cannot be had. Where nothing can, that is an error."""
    from ..measuring import plan

    refused = {name: plan(wanted, subject, images, settings) for name, subject in subjects.items()}
    if all(len(reasons) == len(wanted) for reasons in refused.values()):
        lines = (f"{metric}: {reason}" for metric, reason in next(iter(refused.values())).items())
        raise ValueError(f"metrics: expected at least one that can be had, got none ({'; '.join(lines)})")
    return refused


def _measure(
    name: str,
    subject: Subject,
    wanted: tuple[str, ...],
    refused: dict[str, str],
    images: Images,
    settings: Settings,
    record: Record,
) -> None:
    """Measures one checkpoint, and writes each metric down as it comes."""
    from ..measuring import Measurement, measure
    from . import _exit_code

    for metric, reason in refused.items():
        record.refuse(name, metric, reason)
    possible = [metric for metric in wanted if metric not in refused]
    for metric, found in measure(possible, subject, images, settings):
        if isinstance(found, Measurement):
            record.add(name, metric, found)
            continue
        record.refuse(name, metric, str(found) or type(found).__name__)
        if _exit_code(found) is None:  # not a refusal of ours: how it came about is worth knowing
            traceback.print_exception(found, file=sys.stderr)


def _notes(record: Record, images: Images) -> list[str]:
    """What the table cannot hold: the threshold's origin, what limits a score, why a metric was not had."""
    notes, threshold = [], images.threshold
    some = [metric for metric in ("nll", "reconstruction") if metric in record.wanted]
    if some and len(images.few) < len(images.forget):
        looked_at = f"of the first {len(images.few)} of {len(images.forget)} images to forget"
        notes.append(f"{', '.join(some)}: {looked_at} (--max-forget-images)")
    if not isinstance(threshold, str) and {"frequency", "reconstruction"} & set(record.wanted):
        notes.append(f"threshold: {threshold.value:.4g} ({threshold.how})")
        if threshold.calibrated not in (None, threshold.value):
            notes[-1] += f"; calibrated on the images to keep it would be {threshold.calibrated:.4g}"
        if threshold.near:
            notes.append(f"threshold: {threshold.near} images to keep are within it, and a match may be one")
    for name, row in record.measured.items():
        limits = {metric: measurement.numbers.get("note") for metric, measurement in row.items()}
        notes += [f"{metric} ({name}): {note}" for metric, note in limits.items() if note]
    if len({row["nll"].result.ode for row in record.measured.values() if "nll" in row}) > 1:
        notes.append("nll: not comparable, for the schedules of the two need different ODEs")
    for name, reasons in record.not_measured.items():
        notes += [f"{metric} ({name}) not had: {reason}" for metric, reason in reasons.items()]
    return notes


def _distinct(store: ImageStore) -> Tensor:
    """The different rows of `store`, in their order, as network input."""
    import torch

    first: dict[bytes, int] = {}
    for start, rows in store.chunks():
        for row, image in enumerate(rows):
            first.setdefault(
                image.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes(), start + row
            )
    return store.rows(torch.tensor(list(first.values())))


def _evenly(store: ImageStore, count: int) -> Tensor:
    import torch

    return store.rows(torch.linspace(0, len(store) - 1, min(count, len(store))).long())
