from __future__ import annotations

import pytest
import torch
from scipy.stats import binom

from fastunlearn.metrics.frequency import Share, distances, frequency


def test_counts_samples_within_the_threshold():
    image = torch.zeros(1, 4, 4)
    samples = torch.zeros(3, 1, 4, 4)
    samples[1] += 0.5  # L2 in [0, 1] pixels: 0.25 * 4 = 1
    samples[2] += 1.0  # 2
    torch.testing.assert_close(distances(samples, image), torch.tensor([0.0, 1.0, 2.0]))
    assert [frequency(samples, image, threshold).count for threshold in (1e-3, 1.0, 1.001, 2.5)] == [1, 1, 2, 3]
    assert frequency(samples, image[None], 2.5).share == 1


@pytest.mark.parametrize(("count", "total"), [(1, 10), (5, 512), (300, 512), (63, 64)])
def test_the_interval_is_clopper_pearson(count, total):
    """By definition: at the lower end `count` or more hits have probability 2.5 %, at the upper end `count` or fewer."""
    share = Share.of(count, total)
    assert binom.sf(count - 1, total, share.low) == pytest.approx(0.025)
    assert binom.cdf(count, total, share.high) == pytest.approx(0.025)
    assert share.low < share.share < share.high


def test_the_interval_at_the_ends():
    none, every = Share.of(0, 512), Share.of(64, 64)
    assert (none.low, none.high) == (0, pytest.approx(1 - 0.025 ** (1 / 512)))
    assert (every.low, every.high) == (pytest.approx(0.025 ** (1 / 64)), 1)


def test_bad_arguments():
    samples = torch.zeros(2, 1, 4, 4)
    with pytest.raises(ValueError, match=r"image: expected one image of the samples' shape, \(1, 4, 4\), got \(1, 1, 5, 4\)"):
        frequency(samples, torch.zeros(1, 5, 4))
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        frequency(samples, samples[0], 0)
    with pytest.raises(ValueError, match=r"count: expected an integer in \[0, 3\]"):
        Share.of(4, 3)
