"""What the demo measures of a model, and the questions that it decides."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from time import perf_counter

import torch
from torch import Tensor

from ..host.store import ImageStore
from ..metrics.classifier import load_mnist_classifier
from ..metrics.distance import distances
from ..metrics.frequency import Share, frequency
from ..metrics.inception import InceptionScores, inception_scores
from ..metrics.nll import Likelihood, bits_per_dim
from ..metrics.reconstruction import Reconstruction, reconstruct
from ..models.sampling import noised, sample
from ..objective.schedule import NoiseSchedule
from ..recipes.mnist_tshirt import FREQUENCY_THRESHOLD, TSHIRT_COPIES
from ..report import Criterion, frequency_criterion, quality_criterion, reconstruction_criterion

# of the T-shirt in the data that the model was trained on
TRAINING_SHARE = TSHIRT_COPIES / (60_000 + TSHIRT_COPIES)
# the papers' one, and one where little is left of the image and the trained model still finds it
INJECTION_TIMESTEPS = (250, 500)
CHAINS = 64
INFERENCE_STEPS = 20
REAL_DIGITS = 2048
NLL_TOLERANCE = 1e-3  # within 0.01 bit of the papers' 1e-5, in a tenth of the time
SUBJECT = "T-shirt"


@dataclass(frozen=True)
class Evaluation:
    """One model, measured: `samples` `[N, 1, 28, 28]`, `hits` bool `[N]` (which of them are the T-shirt), and
    the numbers.
    """

    samples: Tensor
    hits: Tensor
    frequency: Share
    reconstructions: tuple[tuple[Reconstruction, Tensor], ...]
    likelihood: Likelihood
    scores: InceptionScores

    def numbers(self) -> dict:
        """Everything but the pictures, JSON-able."""
        return {
            "frequency": asdict(self.frequency),
            "reconstructions": [asdict(result) for result, _ in self.reconstructions],
            "likelihood": asdict(self.likelihood),
            "scores": asdict(self.scores),
        }


def decide(before: Evaluation, after: Evaluation) -> tuple[Criterion, ...]:
    """The demo's questions; it passes if all are answered with yes."""
    restored = (
        reconstruction_criterion(first, second)
        for (first, _), (second, _) in zip(before.reconstructions, after.reconstructions, strict=True)
    )
    return (
        frequency_criterion(before.frequency, after.frequency, TRAINING_SHARE),
        *restored,
        quality_criterion(before.scores, after.scores),
    )


class Evaluator:
    """Measures a model; called for two models it gives both the same noise."""

    def __init__(
        self,
        scheduler,
        forget: ImageStore,
        retain: ImageStore,
        num_samples: int,
        seed: int,
        show_progress: bool,
    ):
        self.scheduler, self.num_samples, self.seed, self.show_progress = (
            scheduler,
            num_samples,
            seed,
            show_progress,
        )
        self.schedule = NoiseSchedule.from_diffusers(scheduler)
        self.image = forget.rows(torch.tensor([0]))
        self.real = retain.rows(torch.linspace(0, len(retain) - 1, min(REAL_DIGITS, len(retain))).long())
        self.classifier = load_mnist_classifier()

    def __call__(self, model: torch.nn.Module, when: str, seconds: dict[str, float]) -> Evaluation:
        common = {
            "num_inference_steps": INFERENCE_STEPS,
            "seed": self.seed,
            "show_progress": self.show_progress,
        }
        with timed(seconds, f"sample {when}"):
            samples = sample(
                model,
                self.scheduler,
                self.num_samples,
                shape=tuple(self.image.shape[1:]),
                description=f"samples {when}",
                **common,
            )
        with timed(seconds, f"reconstruct {when}"):
            reconstructions = tuple(
                reconstruct(
                    model,
                    self.scheduler,
                    self.image,
                    t,
                    chains=CHAINS,
                    threshold=FREQUENCY_THRESHOLD,
                    description=f"from t = {t} {when}",
                    **common,
                )
                for t in INJECTION_TIMESTEPS
            )
        with timed(seconds, f"likelihood {when}"):
            likelihood = bits_per_dim(
                model, self.schedule, self.image, seed=self.seed, rtol=NLL_TOLERANCE, atol=NLL_TOLERANCE
            )
        with timed(seconds, f"scores {when}"):
            hits = distances(samples, self.image) < FREQUENCY_THRESHOLD
            # without the T-shirts, as in the papers
            scores = inception_scores(samples[~hits], self.real, self.classifier)
        return Evaluation(
            samples,
            hits,
            frequency(samples, self.image, FREQUENCY_THRESHOLD),
            reconstructions,
            likelihood,
            scores,
        )

    def noised(self) -> list[Tensor]:
        """Where the first chain starts, for each injection timestep: `[1, C, H, W]`."""
        return [noised(self.scheduler, self.image, t, seed=self.seed) for t in INJECTION_TIMESTEPS]


@contextmanager
def timed(seconds: dict[str, float], stage: str) -> Iterator[None]:
    """Enters the wall-clock seconds of the block into `seconds`."""
    started = perf_counter()
    yield
    seconds[stage] = seconds.get(stage, 0.0) + perf_counter() - started
