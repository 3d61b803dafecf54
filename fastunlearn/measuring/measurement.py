"""The measuring itself: one checkpoint, metric by metric, each as soon as it is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ..metrics.classifier import load_mnist_classifier
from ..metrics.distance import distances
from ..metrics.frequency import Share
from ..metrics.inception import inception_scores
from ..metrics.nll import bits_per_dim
from ..metrics.reconstruction import reconstruct
from ..models.sampling import sample
from ..objective.schedule import NoiseSchedule
from .planning import Images, Settings, Subject

# What a metric may raise without the others being wrong: a refusal of ours, a device out of memory, a solver
# that gives up.
COSTS_ITS_ROW = (ValueError, RuntimeError, AssertionError, ArithmeticError)
# The metrics that look at samples, which are drawn once for all of them.
OF_SAMPLES = ("frequency", "fid", "is")


@dataclass(frozen=True)
class Measurement:
    """One metric of one checkpoint.

    Args:
        value: in short, for a table.
        numbers: all of it, JSON-able.
        result: the same as the metrics' own classes.
    """

    value: str
    numbers: dict[str, Any]
    result: Any


def measure(
    wanted: Sequence[str], subject: Subject, images: Images, settings: Settings
) -> Iterator[tuple[str, Measurement | Exception]]:
    """Each metric of `wanted`, as soon as it is there: its numbers, or the error that it ended with."""
    if set(OF_SAMPLES) & set(wanted):
        yield from _measure_samples(wanted, subject, images, settings)
    for name, function in (("nll", _likelihood), ("reconstruction", _reconstructions)):
        if name in wanted:
            try:
                yield name, function(subject, images, settings)
            except COSTS_ITS_ROW as error:
                yield name, error


def _measure_samples(
    wanted: Sequence[str], subject: Subject, images: Images, settings: Settings
) -> Iterator[tuple[str, Measurement | Exception]]:
    """frequency, fid and is, as far as they are among `wanted`."""
    try:
        samples = sample(
            subject.model,
            subject.scheduler,
            settings.num_images,
            shape=images.shape,
            num_inference_steps=settings.num_inference_steps,
            **_noise(settings),
        )
        nearest = torch.stack([distances(samples, image) for image in images.forget]).amin(0)
    except COSTS_ITS_ROW as error:
        for name in OF_SAMPLES:
            if name in wanted:
                yield name, error
        return
    if "frequency" in wanted:
        yield "frequency", _frequency(nearest, images)
    # The papers judge the quality of what remains, so samples of a forget image are taken out first.
    if {"fid", "is"} & set(wanted):
        yield from _scores(wanted, samples[nearest >= images.threshold.value], images)


def _frequency(nearest: Tensor, images: Images) -> Measurement:
    """The share of samples that show a forget image.

    Args:
        nearest: float32 `[N]`, of every sample the distance to the forget image that is nearest.
    """
    threshold = images.threshold
    share = _within(nearest, threshold.value)
    numbers = {**asdict(share), "threshold": threshold.value, "min_distance": nearest.min().item()}
    return Measurement(in_short(share), numbers | _at_calibrated(nearest, images), share)


def _scores(
    wanted: Sequence[str], others: Tensor, images: Images
) -> Iterator[tuple[str, Measurement | Exception]]:
    """fid and is of the samples that are no forget image."""
    names = [name for name in ("fid", "is") if name in wanted]
    try:
        scores = inception_scores(others, images.real, load_mnist_classifier())
    except COSTS_ITS_ROW as error:
        for name in names:
            yield name, error
        return
    shown = {"fid": f"{scores.fid:.3f}", "is": f"{scores.inception_score:.3f}"}
    for name in names:
        yield name, Measurement(shown[name], asdict(scores), scores)


def _likelihood(subject: Subject, images: Images, settings: Settings) -> Measurement:
    """Bits per dimension of the few forget images."""
    tolerance = {"rtol": settings.nll_tolerance, "atol": settings.nll_tolerance}
    schedule = NoiseSchedule.from_diffusers(subject.scheduler)
    likelihood = bits_per_dim(subject.model, schedule, images.few, seed=settings.seed, **tolerance)
    return Measurement(f"{likelihood.mean:.3f}", asdict(likelihood), likelihood)


def _reconstructions(subject: Subject, images: Images, settings: Settings) -> Measurement:
    """Chains from each of the few images, and how many came back to the image they started from."""
    # One forget image at a time: the verdict asks of each whether it still comes back.
    results, apart = [], []
    for image in images.few:
        result, chains = reconstruct(
            subject.model,
            subject.scheduler,
            image,
            settings.timestep,
            chains=settings.chains,
            threshold=images.threshold.value,
            num_inference_steps=settings.chain_steps,
            **_noise(settings),
        )
        results.append(result)
        apart.append(distances(chains, image))
    shares = [result.returned for result in results]
    returned = Share.of(sum(share.count for share in shares), sum(share.total for share in shares))
    numbers = {**asdict(returned), "images": [asdict(result) for result in results]}
    return Measurement(in_short(returned), numbers | _at_calibrated(torch.cat(apart), images), tuple(results))


def _at_calibrated(apart: Tensor, images: Images) -> dict[str, dict]:
    """What the calibrated threshold says of the same distances, where another one was used.

    Args:
        apart: `[N]`, distances that were counted.
    """
    threshold = images.threshold
    if threshold.calibrated in (None, threshold.value):
        return {}
    share = asdict(_within(apart, threshold.calibrated))
    return {"at_calibrated_threshold": {**share, "threshold": threshold.calibrated}}


def _within(apart: Tensor, threshold: float) -> Share:
    return Share.of(int((apart < threshold).sum()), len(apart))


def _noise(settings: Settings) -> dict[str, Any]:
    """The arguments that samples and chains have in common."""
    return {
        "sampler": settings.sampler,
        "batch_size": settings.batch_size,
        "seed": settings.seed,
        "show_progress": settings.show_progress,
    }


def in_short(share: Share) -> str:
    """Count, total and interval, as a table shows them."""
    return f"{share.count}/{share.total} ({share.low:.1%}-{share.high:.1%})"
