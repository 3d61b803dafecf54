"""FID and IS through a toy classifier, against their formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from fastunlearn.host.finite import NotFiniteError
from fastunlearn.metrics.inception import InceptionScores, inception_scores


class Quadrants(nn.Module):
    """Features: means of the four quadrants of a 4x4 image.

    Logits: 40 times those, so that a bright quadrant is a certain class.
    """

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(40.0))

    def features(self, x: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(x, 2).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.features(x)


def images(features: Tensor) -> Tensor:
    """Images with the given quadrant means `[N, 4]`."""
    return nn.functional.interpolate(features.view(-1, 1, 2, 2).float(), scale_factor=2)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def test_fid_is_the_frechet_distance_of_the_feature_gaussians(generator):
    real = 0.1 * torch.randn(500, 4, generator=generator)
    fake = 0.2 * torch.randn(400, 4, generator=generator) + 0.3

    def root(matrix):
        values, vectors = torch.linalg.eigh(matrix)
        return vectors @ values.clamp(min=0).sqrt().diag() @ vectors.T

    a, b = real.T.cov().double(), fake.T.cov().double()
    expected = (real.mean(0) - fake.mean(0)).square().sum() + torch.trace(
        a + b - 2 * root(root(a) @ b @ root(a))
    )
    scores = inception_scores(images(fake), images(real), Quadrants(), batch_size=64)
    assert scores.fid == pytest.approx(expected.item(), rel=1e-4)
    assert (scores.num_samples, scores.num_real) == (400, 500)
    assert inception_scores(images(real), images(real), Quadrants()).fid == pytest.approx(0, abs=1e-6)


def test_is_counts_the_classes_that_are_seen(generator):
    real = images(torch.rand(10, 4, generator=generator))
    certain = images(2.0 * torch.eye(4)[torch.arange(40) % 4] - 1)
    scores = inception_scores(certain, real, Quadrants())
    assert scores.inception_score == pytest.approx(4, rel=1e-6)
    assert scores.mean_confidence == pytest.approx(1, rel=1e-6)
    one_class = inception_scores(certain[::4], real, Quadrants())
    assert one_class.inception_score == pytest.approx(1, rel=1e-6)
    unsure = inception_scores(torch.zeros(10, 1, 4, 4), real, Quadrants())
    assert (unsure.inception_score, unsure.mean_confidence) == (pytest.approx(1), pytest.approx(0.25))


def test_splits_are_averaged_and_leave_the_global_generator_alone(generator):
    real = images(torch.rand(10, 4, generator=generator))
    certain = images(2.0 * torch.eye(4)[torch.arange(40) % 4] - 1)
    state = torch.random.get_rng_state()
    split = inception_scores(certain, real, Quadrants(), splits=10)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert 1 < split.inception_score < 4  # a part of four rarely shows all four classes
    assert split == inception_scores(certain, real, Quadrants(), splits=10)


def test_the_classifier_runs_in_eval_mode_and_is_restored(generator):
    class Noisy(Quadrants):
        def features(self, x):
            assert not self.training
            return super().features(x)

    classifier = Noisy().train()
    scores = inception_scores(
        images(torch.rand(5, 4, generator=generator)),
        images(torch.rand(5, 4, generator=generator)),
        classifier,
    )
    assert classifier.training
    assert math.isfinite(scores.fid)


def test_what_is_not_finite_gets_no_score(generator):
    some = images(torch.rand(6, 4, generator=generator))
    holed = some.clone()
    holed[4, 0, 0, 0] = math.nan
    message = r"samples: expected finite values, got NaN or Inf in 1 of 6 \(first: 4\)"
    with pytest.raises(NotFiniteError, match=message):
        inception_scores(holed, some, Quadrants())
    with pytest.raises(NotFiniteError, match="real: expected finite values, got NaN or Inf in 1 of 6"):
        inception_scores(some, holed, Quadrants())
    broken = Quadrants()
    torch.nn.init.constant_(broken.scale, math.nan)
    with pytest.raises(NotFiniteError, match="classifier: expected finite weights, got NaN or Inf in scale"):
        inception_scores(some, some, broken)

    class Overflowing(Quadrants):
        def features(self, x):
            return super().features(x) * 1e30 * 1e30

    with pytest.raises(NotFiniteError, match="features: expected finite values, got NaN or Inf in 6 of 6"):
        inception_scores(some, some, Overflowing())
    with pytest.raises(NotFiniteError, match="scores: expected finite numbers, got inception_score = nan"):
        InceptionScores(1.0, math.nan, 0.5, 10, 10)


def test_constant_images_have_finite_scores(generator):
    """The covariance of their features is zero: FID is the squared distance of the means plus the variance of
    the other side."""
    spread = torch.rand(50, 4, generator=generator)
    grey, white = torch.zeros(20, 1, 4, 4), torch.ones(20, 1, 4, 4)
    assert inception_scores(grey, white, Quadrants()).fid == pytest.approx(4, rel=1e-6)
    expected = (spread.double().mean(0).square().sum() + spread.double().T.cov().trace()).item()
    assert inception_scores(grey, images(spread), Quadrants()).fid == pytest.approx(expected, rel=1e-5)
    assert inception_scores(grey, grey, Quadrants()).inception_score == pytest.approx(1)


def test_fewer_images_than_features_are_said(generator):
    few, many = images(torch.rand(4, 4, generator=generator)), images(torch.rand(5, 4, generator=generator))
    assert inception_scores(many, many, Quadrants()).note == ""
    expected = "4 samples for 4 features: compare this FID with none of another number of images"
    assert inception_scores(few, many, Quadrants()).note == expected
    both = inception_scores(few, few, Quadrants()).note
    assert both.startswith("4 samples and 4 real images for 4 features")


def test_bad_arguments():
    some = torch.zeros(3, 1, 4, 4)
    with pytest.raises(ValueError, match="samples: expected at least two images, got 1"):
        inception_scores(some[:1], some, Quadrants())
    with pytest.raises(ValueError, match="real: expected at least one image"):
        inception_scores(some, some[:0], Quadrants())
    with pytest.raises(ValueError, match=r"splits: expected an integer in \[1, 3\] \(the samples\)"):
        inception_scores(some, some, Quadrants(), splits=4)
