from __future__ import annotations

import pytest
import torch
from scipy.stats import binom

from fastunlearn.host.finite import NotFiniteError
from fastunlearn.metrics.distance import distances
from fastunlearn.metrics.frequency import Share, frequency

# 2 away from the nearest constant picture.
STRIPES = torch.tensor([-1.0, -1.0, 1.0, 1.0]).expand(1, 4, 4).contiguous()


def test_counts_samples_within_the_threshold():
    image = STRIPES
    samples = image.repeat(3, 1, 1, 1)
    samples[1, :, :, 0] += 1.0  # L2 in [0, 1] pixels: 0.5 * 2 = 1
    samples[2, :, :, 0] += 1.5  # 1.5
    torch.testing.assert_close(distances(samples, image), torch.tensor([0.0, 1.0, 1.5]))
    counts = [frequency(samples, image, threshold).count for threshold in (1e-3, 1.0, 1.001, 1.7)]
    assert counts == [1, 1, 2, 3]
    assert frequency(samples, image[None], 1.7).share == 1


def test_a_sample_that_is_not_finite_is_no_miss():
    samples = STRIPES.repeat(4, 1, 1, 1)
    samples[2, 0, 1, 1] = torch.nan
    samples[3, 0, 0, 0] = torch.inf
    message = r"samples: expected finite values, got NaN or Inf in 2 of 4 \(first: 2\)"
    for measure in (lambda: frequency(samples, STRIPES, 1.0), lambda: distances(samples, STRIPES)):
        with pytest.raises(NotFiniteError, match=message):
            measure()
    with pytest.raises(NotFiniteError, match="image: expected finite values, got NaN or Inf in 1 of 1"):
        frequency(samples[:2], samples[2], 1.0)
    with pytest.raises(NotFiniteError, match="share: expected finite numbers, got low = nan"):
        Share(1, 2, 0.5, torch.nan, 1.0)


def test_samples_on_another_scale_are_no_miss():
    with pytest.raises(ValueError, match=r"samples: expected values in \[-1, 1\], got values in \[0, 255\]"):
        frequency((STRIPES[None] + 1) * 127.5, STRIPES, 1.0)
    with pytest.raises(ValueError, match=r"image: expected values in \[-1, 1\], got values in \[-2, 2\]"):
        distances(STRIPES[None], 2 * STRIPES)


def test_a_share_of_nothing_is_refused():
    with pytest.raises(ValueError, match="total: expected an integer >= 1, got 0"):
        Share.of(0, 0)
    with pytest.raises(ValueError, match="samples: expected at least one image"):
        frequency(torch.zeros(0, 1, 4, 4), STRIPES, 1.0)
    assert frequency(STRIPES[None], STRIPES, 1.0).share == 1  # one row


def test_the_papers_threshold_is_for_their_size_alone():
    image = torch.ones(1, 28, 28)
    image[:, ::2] = -1
    samples = torch.stack([image, -image])
    assert frequency(samples, image).count == 1
    message = r"threshold: expected a number, or images to keep .* of 1x4x4, got neither"
    with pytest.raises(ValueError, match=message):
        frequency(STRIPES[None], STRIPES)


@pytest.mark.parametrize(("count", "total"), [(1, 10), (5, 512), (300, 512), (63, 64)])
def test_the_interval_is_clopper_pearson(count, total):
    """By definition: at the lower end `count` or more hits have probability 2.5 %, at the upper end `count`
    or fewer.
    """
    share = Share.of(count, total)
    assert binom.sf(count - 1, total, share.low) == pytest.approx(0.025)
    assert binom.cdf(count, total, share.high) == pytest.approx(0.025)
    assert share.low < share.share < share.high


def test_the_interval_at_the_ends():
    none, every = Share.of(0, 512), Share.of(64, 64)
    assert (none.low, none.high) == (0, pytest.approx(1 - 0.025 ** (1 / 512)))
    assert (every.low, every.high) == (pytest.approx(0.025 ** (1 / 64)), 1)


def test_bad_arguments():
    samples = STRIPES.repeat(2, 1, 1, 1)
    with pytest.raises(
        ValueError, match=r"image: expected one image of the samples' shape, \(1, 4, 4\), got \(1, 1, 5, 4\)"
    ):
        frequency(samples, torch.zeros(1, 5, 4), 1.0)
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        frequency(samples, samples[0], 0)
    with pytest.raises(ValueError, match=r"count: expected an integer in \[0, 3\]"):
        Share.of(4, 3)
