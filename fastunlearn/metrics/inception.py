"""FID and inception score through a classifier of one's own, by torchmetrics.

Numbers from another network than Inception v3 are on another scale: compare them with each other, never with
published FID or IS.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..host import check, finite
from ..models.sampling import eval_mode


@dataclass(frozen=True)
class InceptionScores:
    """What the classifier makes of the samples: finite numbers, or none at all."""

    fid: float  # against the real images: lower is better
    inception_score: float  # at most the number of classes, 1 where all samples look alike
    mean_confidence: float  # mean of the largest softmax probability
    num_samples: int
    num_real: int
    note: str = ""  # what limits the numbers, in words, or nothing

    def __post_init__(self):
        confidence = {"mean_confidence": self.mean_confidence}
        finite.numbers("scores", fid=self.fid, inception_score=self.inception_score, **confidence)


class _Precomputed(nn.Module):
    """Hands torchmetrics features that are already there.

    Its metrics call their `feature` network on whatever `update` receives.
    """

    def __init__(self, num_features: int):
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def inception_scores(
    samples: Tensor, real: Tensor, classifier: nn.Module, *, splits: int = 1, batch_size: int = 256
) -> InceptionScores:
    """FID, inception score and mean confidence of `samples` as `classifier` sees them.

    Remove what is not to be judged first: the papers take detected T-shirts out of the samples of MNIST
    T-Shirt.

    Args:
        samples: float `[N, C, H, W]` in [-1, 1], N >= 2.
        real: float `[M, C, H, W]` in [-1, 1], M >= 2.
        classifier: has `.features(x) -> [B, F]`; called, it returns logits `[B, K]`.
        splits: IS is the mean over this many parts of the samples; torchmetrics' 10 is biased low for a few
            hundred samples.
        batch_size: rows a classifier call.

    Raises:
        TypeError, ValueError: for an argument outside its range.
        NotFiniteError: a ValueError; an image, a weight, a feature or a score is not finite.
    """
    for name, images in (("samples", samples), ("real", real)):
        if len(check.images(name, images)) < 2:
            raise ValueError(f"{name}: expected at least two images, got {len(images)}")
        finite.pixels(name, images)
    finite.weights(classifier, "classifier")
    splits = check.integer("splits", splits, low=1, high=len(samples), of="the samples")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.inception import InceptionScore

    sample_features, logits = _run(classifier, samples, batch_size)
    real_features, _ = _run(classifier, real, batch_size)

    # FID (Heusel et al. 2017): the distance of the Gaussians N(m, C) of the features of both sets,
    # ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2)).
    distance = FrechetInceptionDistance(feature=_Precomputed(real_features.shape[1]), normalize=True)
    distance.update(real_features, real=True)
    distance.update(sample_features, real=False)
    fid = distance.compute().item()

    # IS (Salimans et al. 2016): exp of the mean of KL(p(y|x) || p(y)), with p(y) the mean of p(y|x) over a
    # split. torchmetrics warns of features that it keeps, and of the deviation of one split, which is not
    # read. It shuffles by the global generator before it splits.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Metric `InceptionScore` will save all extracted features")
        score = InceptionScore(feature=_Precomputed(logits.shape[1]), splits=splits)
    score.update(logits)
    with _seeded(0), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"std\(\): degrees of freedom")
        inception_score = score.compute()[0].item()

    confidence = logits.softmax(dim=1).amax(dim=1).mean().item()
    note = _note(len(samples), len(real), real_features.shape[1])
    return InceptionScores(fid, inception_score, confidence, len(samples), len(real), note)


def _note(num_samples: int, num_real: int, num_features: int) -> str:
    """What limits a FID of so many images, or nothing."""
    # Fewer images than features span no Gaussian: FID is then biased, more so the fewer they are.
    counts = {"samples": num_samples, "real images": num_real}
    few = [f"{count} {what}" for what, count in counts.items() if count <= num_features]
    if not few:
        return ""
    consequence = "compare this FID with none of another number of images"
    return f"{' and '.join(few)} for {num_features} features: {consequence}"


_SEEDED = threading.Lock()


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """Within the block torch's generator on the CPU is seeded; afterwards it goes on where it was.

    One thread at a time: else the second would find, and put back, what the first has seeded.
    """
    # torch.manual_seed would seed the generators of GPUs, too.
    with _SEEDED, torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        yield


@torch.inference_mode()
def _run(classifier: nn.Module, images: Tensor, batch_size: int) -> tuple[Tensor, Tensor]:
    """Features `[N, F]` and logits `[N, K]`, float64 on the CPU."""
    device = next(classifier.parameters()).device
    features, logits = [], []
    with eval_mode(classifier):
        for batch in images.split(batch_size):
            batch = batch.to(device, torch.float32)
            features.append(classifier.features(batch).double().cpu())
            logits.append(classifier(batch).double().cpu())
    return finite.rows("features", torch.cat(features)), finite.rows("logits", torch.cat(logits))
