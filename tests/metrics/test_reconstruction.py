from __future__ import annotations

import math

import pytest
import torch

from fastunlearn.host.finite import NotFiniteError
from fastunlearn.metrics.frequency import Share
from fastunlearn.metrics.reconstruction import Reconstruction, reconstruct

diffusers = pytest.importorskip("diffusers")
SCHEDULER = diffusers.DDPMScheduler(num_train_timesteps=50)
IMAGE = torch.full((1, 1, 8, 8), 0.5)
IMAGE[..., ::2] = -0.5


def remembers(image):
    """A model whose whole world is `image`."""

    def predict(x, t):
        abar = SCHEDULER.alphas_cumprod[t].view(-1, 1, 1, 1)
        return (x - abar.sqrt() * image) / (1 - abar).sqrt()

    return predict


def test_a_model_that_remembers_brings_every_chain_back():
    result, images = reconstruct(remembers(IMAGE), SCHEDULER, IMAGE, 30, chains=5, threshold=1.0)
    assert images.shape == (5, 1, 8, 8)
    assert (result.timestep, result.returned.count, result.returned.total) == (30, 5, 5)
    assert result.mean_distance < 0.1


def test_a_model_that_forgot_brings_none_back():
    result, _ = reconstruct(
        remembers(-IMAGE),
        SCHEDULER,
        IMAGE[0],
        30,
        chains=5,
        threshold=1.0,
        num_inference_steps=3,
        sampler="ddim",
    )
    assert result.returned.count == 0
    assert result.min_distance == pytest.approx(0.5 * 8, rel=0.05)  # one half in [0, 1] pixels, 64 of them


def test_what_is_not_finite_is_no_miss():
    message = "samples: expected finite values from the model, got NaN or Inf in 5 of the first 5"
    with pytest.raises(NotFiniteError, match=message):
        reconstruct(lambda x, t: x * torch.nan, SCHEDULER, IMAGE, 30, chains=5, threshold=1.0)
    holed = IMAGE.clone()
    holed[0, 0, 0, 0] = torch.nan
    with pytest.raises(NotFiniteError, match="image: expected finite values"):
        reconstruct(remembers(IMAGE), SCHEDULER, holed, 30, threshold=1.0)
    message = "reconstruction: expected finite numbers, got min_distance = nan"
    with pytest.raises(NotFiniteError, match=message):
        Reconstruction(30, 1.0, Share.of(0, 5), 1.0, math.nan)


def test_thresholds_that_mean_nothing_are_refused_before_any_work():
    def network(x, t):
        raise AssertionError("called")

    with pytest.raises(ValueError, match="threshold: expected a number, or images to keep"):
        reconstruct(network, SCHEDULER, IMAGE, 30)
    message = "threshold: expected less than 2, the distance of forget image 0 to the nearest constant"
    with pytest.raises(ValueError, match=message):
        reconstruct(network, SCHEDULER, IMAGE, 30, threshold=10.0)
    message = "images: expected images to forget that show something, got forget image 0"
    with pytest.raises(ValueError, match=message):
        reconstruct(network, SCHEDULER, torch.full_like(IMAGE, 0.3), 30, threshold=1.0)


def test_bad_arguments():
    with pytest.raises(ValueError, match="image: expected one image, got 2"):
        reconstruct(remembers(IMAGE), SCHEDULER, IMAGE.expand(2, -1, -1, -1), 30)
    with pytest.raises(ValueError, match="threshold: expected a finite number"):
        reconstruct(remembers(IMAGE), SCHEDULER, IMAGE, 30, threshold=-1)
