"""`fastunlearn evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .options import also, unset
from .picture_flags import PictureFlags

if TYPE_CHECKING:
    from torch import Tensor

METRICS = {  # name -> (row of the table, which direction is wanted)
    "frequency": ("forget images in samples", "lower"),
    "nll": ("their bits/dim", "higher"),
    "reconstruction": ("back from noise", "lower"),
    "fid": ("FID of other samples", "lower"),
    "is": ("IS of other samples", "higher"),
}
CLASSIFIED_SHAPE = (1, 28, 28)
MOST_REAL_IMAGES = 10_000


@dataclass(kw_only=True)
class Evaluate:
    """Measure whether a checkpoint still knows the images to forget, and how well it does on the rest.

    frequency: the share of samples within --threshold of a forget image, with its exact 95 % interval. reconstruction: forget images noised
    to --timestep and denoised; the share that comes back. nll: their likelihood (probability-flow ODE; linear schedules). fid, is: 28x28
    grey digits only, through the shipped MNIST classifier, comparable with each other but not with published numbers. No picture is written.

    Try: fastunlearn evaluate --model runs/forget-7/model --against pretrained --forget forget/ --metrics frequency,reconstruction
    """

    model: Path
    """Folder of the diffusers pipeline to measure."""
    against: Annotated[Path | None, unset("nothing", "DIR")] = None
    """A second checkpoint, such as the one before unlearning, measured on the same noise."""
    forget: tuple[Path, ...]
    """Images to forget; equal ones count once."""
    retain: Annotated[tuple[Path, ...], unset("none")] = ()
    """Images to keep; fid compares with them."""
    metrics: str = "frequency,nll,reconstruction"
    """Any of frequency, nll, reconstruction, fid, is, joined by commas."""
    num_images: int = 512
    """Samples for frequency, fid and is; 299 without a hit exclude a share of 1 %."""
    threshold: float = 10.0
    """L2 distance, in pixels of [0, 1] summed over the image, below which two images are the same; the papers' 10 belongs to 28x28 digits."""
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
        from ..folder_lock import locked

        return locked(self.output, "fastunlearn evaluate")

    def run(self) -> int:
        from .. import _check
        from .options import load_for, pick_device

        wanted = [_check.one_of("metrics", name.strip(), tuple(METRICS)) for name in self.metrics.split(",")]
        device = pick_device(self.device)
        models = {"model": _load(self.model, device)} if self.against is None else {"before": _load(self.against, device), "after": _load(self.model, device)}
        model, _ = next(iter(models.values()))
        read: dict[str, Any] = {}
        forget = load_for(model, "forget", self.forget, self.pictures, read)
        if {"fid", "is"} & set(wanted) and forget.shape != CLASSIFIED_SHAPE:
            raise ValueError(f"metrics: expected fid and is for images of shape {CLASSIFIED_SHAPE} only (the shipped classifier's), got {forget.shape}")
        real = None
        if {"fid", "is"} & set(wanted):
            real = load_for(model, "retain", self.retain, self.pictures, read)
        images, real_images = _distinct(forget), None if real is None else _evenly(real, MOST_REAL_IMAGES)
        measured = {name: self._measure(*loaded, wanted, images, real_images) for name, loaded in models.items()}

        self.output.mkdir(parents=True, exist_ok=True)
        file = self.output / "evaluation.json"
        elsewhere = ("forget", "retain", "pictures")  # the last with the numbers of what was read
        noted = {name: value for name, value in vars(self).items() if name not in elsewhere}
        settings = {name: str(value) if isinstance(value, Path) else value for name, value in noted.items()}
        sets = {"images": read, "forget_images": len(images)}
        evaluation = {"settings": settings, **sets, "measured": measured}
        file.write_text(json.dumps(evaluation, indent=1) + "\n")
        _print_table(wanted, measured)
        print(f"evaluation: {file}")
        return 0

    def _measure(self, model, scheduler, wanted: list[str], images: Tensor, real: Tensor | None) -> dict[str, dict]:
        """The numbers of one checkpoint: metric -> its fields, with the one to show as `value`."""
        import torch

        from ..metrics.classifier import load_mnist_classifier
        from ..metrics.frequency import Share, distances
        from ..metrics.inception import inception_scores
        from ..metrics.nll import bits_per_dim
        from ..metrics.reconstruction import reconstruct
        from ..sampling import sample
        from ..schedule import NoiseSchedule

        noise = {"sampler": self.sampler, "batch_size": self.batch_size, "seed": self.seed, "show_progress": True}
        few = images[: self.max_forget_images]
        numbers: dict[str, dict] = {}
        if {"frequency", "fid", "is"} & set(wanted):
            samples = sample(model, scheduler, self.num_images, shape=tuple(images.shape[1:]), num_inference_steps=self.num_inference_steps, **noise)
            hits = torch.stack([distances(samples, image) < self.threshold for image in images]).any(0)
            share = Share.of(int(hits.sum()), len(samples))
            numbers["frequency"] = {"value": _in_short(share), **asdict(share)}
        if real is not None:
            scores = inception_scores(samples[~hits], real, load_mnist_classifier())
            numbers["fid"] = {"value": f"{scores.fid:.3f}", **asdict(scores)}
            numbers["is"] = {"value": f"{scores.inception_score:.3f}", **asdict(scores)}
        if "nll" in wanted:
            likelihood = bits_per_dim(model, NoiseSchedule.from_diffusers(scheduler), few, seed=self.seed, rtol=self.nll_tolerance, atol=self.nll_tolerance)
            numbers["nll"] = {"value": f"{likelihood.mean:.3f}", **asdict(likelihood)}
        if "reconstruction" in wanted:
            noise["num_inference_steps"] = min(self.num_inference_steps, self.timestep + 1)
            each = [reconstruct(model, scheduler, image, self.timestep, chains=self.chains, threshold=self.threshold, **noise)[0] for image in few]
            returned = Share.of(sum(result.returned.count for result in each), sum(result.returned.total for result in each))
            numbers["reconstruction"] = {"value": _in_short(returned), **asdict(returned), "images": [asdict(result) for result in each]}
        return {name: numbers[name] for name in wanted}


def _load(path: Path, device):
    from ..models import load_checkpoint

    return load_checkpoint(path, device=device)


def _distinct(store) -> Tensor:
    """The different rows of `store`, in their order, as network input."""
    import torch

    first: dict[bytes, int] = {}
    for start, rows in store.chunks():
        for row, image in enumerate(rows):
            first.setdefault(image.contiguous().flatten().view(torch.uint8).cpu().numpy().tobytes(), start + row)
    return store.rows(torch.tensor(list(first.values())))


def _evenly(store, count: int) -> Tensor:
    import torch

    return store.rows(torch.linspace(0, len(store) - 1, min(count, len(store))).long())


def _in_short(share) -> str:
    return f"{share.count}/{share.total} ({share.low:.1%}-{share.high:.1%})"


def _print_table(wanted: list[str], measured: dict[str, dict]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *measured, "wanted")
    for name in wanted:
        label, good = METRICS[name]
        table.add_row(label, *(numbers[name]["value"] for numbers in measured.values()), good)
    Console().print(table)
