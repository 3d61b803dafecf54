"""What can be measured of a checkpoint, and why the rest cannot: known before any sample is drawn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from ..host import check as _check
from ..metrics.nll import check_likelihood
from ..metrics.threshold import Threshold
from ..models.sampling import check_injection, check_sampling
from ..models.sampling_grid import SAMPLERS
from ..objective.schedule import NoiseSchedule

METRICS = ("frequency", "nll", "reconstruction", "fid", "is")
CLASSIFIED_SHAPE = (1, 28, 28)  # of the shipped classifier


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Args:
        num_images: samples for frequency, fid and is.
        timestep: where reconstruction injects the noise.
        chains: reconstructions of each forget image.
        nll_tolerance: of the ODE solver, relative and absolute.
        sampler: `"ddpm"` or `"ddim"`.
        num_inference_steps: network calls a sample; a chain has at most `timestep + 1`.
        batch_size: images a network call.
        seed: of all noise.
        show_progress: progress bars.

    Raises:
        TypeError, ValueError: for a setting outside its range.
    """

    num_images: int = 512
    timestep: int = 250
    chains: int = 64
    nll_tolerance: float = 1e-3
    sampler: str = "ddpm"
    num_inference_steps: int = 50
    batch_size: int = 64
    seed: int = 0
    show_progress: bool = False

    def __post_init__(self):
        for name in ("num_images", "chains", "num_inference_steps", "batch_size"):
            _check.integer(name, getattr(self, name), low=1)
        for name in ("timestep", "seed"):
            _check.integer(name, getattr(self, name), low=0)
        _check.number("nll_tolerance", self.nll_tolerance, low=0, low_open=True)
        _check.one_of("sampler", self.sampler, SAMPLERS)

    @property
    def chain_steps(self) -> int:
        """Network calls a chain."""
        return min(self.num_inference_steps, self.timestep + 1)


@dataclass(frozen=True)
class Subject:
    """A checkpoint that is measured: the network and its diffusers scheduler."""

    model: nn.Module | Callable
    scheduler: object


@dataclass(frozen=True)
class Images:
    """What the samples are compared with, all in [-1, 1].

    Args:
        forget: `[N, C, H, W]`, different ones: samples are compared with all of them.
        few: the first of them, which nll and reconstruction look at.
        real: `[M, C, H, W]`, images to keep that fid compares with, or None.
        threshold: within which distance a sample is a forget image, or why there is none, in words.
    """

    forget: Tensor
    few: Tensor
    real: Tensor | None
    threshold: Threshold | str

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one image."""
        return tuple(self.forget.shape[1:])


def parse_metrics(text: str) -> tuple[str, ...]:
    """The metrics that `text` names, joined by commas.

    Raises:
        ValueError: none, an unknown one, or one twice.
    """
    names = [name.strip() for name in text.split(",")]
    # An empty text splits into one empty name.
    if names == [""]:
        raise ValueError(f"metrics: expected at least one of {', '.join(METRICS)}, got none")
    for name in names:
        _check.one_of("metrics", name, METRICS)
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"metrics: expected each metric once, got {', '.join(twice)} more than once")
    return tuple(names)


def plan(wanted: Sequence[str], subject: Subject, images: Images, settings: Settings) -> dict[str, str]:
    """Why metrics among `wanted` cannot be had of `subject`: metric -> reason; what is not in it can be.

    The network is called at most three times, for one image each.
    """
    sampled = _reason(lambda: _check_samples(subject, images, settings))
    # As functions, so that what was not asked for calls no network. fid and is first say what their own data
    # lack.
    reasons = {
        "frequency": lambda: sampled,
        "nll": lambda: _reason(lambda: _check_likelihood(subject, images)),
        "reconstruction": lambda: _reason(lambda: _check_chains(subject, images, settings)),
        "fid": lambda: _reason(lambda: _check_scores(images, settings)) or sampled,
        "is": lambda: _reason(lambda: _check_scores(images, settings)) or sampled,
    }
    found = {name: reasons[name]() for name in wanted}
    return {name: reason for name, reason in found.items() if reason}


def _reason(check: Callable[[], None]) -> str:
    """Why `check` refuses, or nothing."""
    # A RuntimeError is torch's: the images do not fit the network.
    try:
        check()
    except (TypeError, ValueError, RuntimeError) as error:
        return str(error)
    return ""


def _check_likelihood(subject: Subject, images: Images) -> None:
    schedule = NoiseSchedule.from_diffusers(subject.scheduler)
    check_likelihood(subject.model, schedule, images.few[:1])


# Each of the following raises what the metric itself would: they call its own checks, on one image.


def _check_samples(subject: Subject, images: Images, settings: Settings) -> None:
    _check_threshold(images)
    steps = {"num_inference_steps": settings.num_inference_steps, "sampler": settings.sampler}
    check_sampling(subject.model, subject.scheduler, shape=images.shape, **steps)


def _check_chains(subject: Subject, images: Images, settings: Settings) -> None:
    _check_threshold(images)
    steps = {"num_inference_steps": settings.chain_steps, "sampler": settings.sampler}
    check_injection(subject.model, subject.scheduler, images.few[:1], settings.timestep, **steps)


def _check_threshold(images: Images) -> None:
    if isinstance(images.threshold, str):
        raise ValueError(images.threshold)


def _check_scores(images: Images, settings: Settings) -> None:
    """Of fid and is, without the samples that they judge."""
    if images.shape != CLASSIFIED_SHAPE:
        raise ValueError(
            f"metrics: expected fid and is for images of shape {CLASSIFIED_SHAPE} only "
            f"(the shipped classifier's), got {images.shape}"
        )
    if images.real is None:
        raise ValueError("retain: expected images to keep, which fid compares with, got none")
    if len(images.real) < 2:
        raise ValueError(f"retain: expected at least two images for fid and is, got {len(images.real)}")
    if settings.num_images < 2:
        raise ValueError(f"num_images: expected at least two for fid and is, got {settings.num_images}")
