"""Thresholds: a stated quantile of distances among images to keep, and never one that noise or a blank
picture passes."""

from __future__ import annotations

import math

import pytest
import torch

from fastunlearn.host.finite import NotFiniteError
from fastunlearn.metrics.distance import distances
from fastunlearn.metrics.threshold import QUANTILE, calibrate, choose, even_rows, refuse_empty_matches
from fastunlearn.recipes.mnist_tshirt import load_demo


def blocks(values: torch.Tensor, size: int = 8) -> torch.Tensor:
    """Images `[N, 1, size, size]` of four constant quadrants with the given values `[N, 4]`."""
    return torch.nn.functional.interpolate(values.view(-1, 1, 2, 2).float(), scale_factor=size // 2)


@pytest.fixture
def retain():
    """Pictures that differ in little: their pairwise distances are far below those to a blank picture."""
    generator = torch.Generator().manual_seed(0)
    base = torch.tensor([1.0, -1.0, -1.0, 1.0])
    return blocks(base + 0.6 * torch.rand(60, 4, generator=generator) - 0.3).clamp(-1, 1)


FORGET = blocks(torch.tensor([[1.0, 1.0, -1.0, -1.0]]))  # 4 from the nearest constant picture, mid-grey


def test_the_threshold_is_the_stated_quantile(retain):
    """By brute force, in float64, over the pairs."""
    pairs = [
        distances(retain[row : row + 1], retain[other]).double().item()
        for row in range(60)
        for other in range(row)
    ]
    different = [distance for distance in pairs if distance > 5 / 255 * 8]
    expected = torch.quantile(torch.tensor(different, dtype=torch.float64), QUANTILE).item()
    value, how = calibrate(FORGET, retain)
    assert value == pytest.approx(expected, rel=1e-4)
    assert 0 < len(pairs) - len(different) < len(pairs) / 10
    assert (
        how
        == f"the 0.1% quantile of the {len(different):,} distances among different ones of 60 images to keep"
    )


def test_copies_among_the_images_to_keep_do_not_count(retain):
    """Otherwise the threshold is so small that no reproduction passes, which reads as forgotten."""
    near = (retain + 0.01 * torch.randn(retain.shape, generator=torch.Generator().manual_seed(2))).clamp(
        -1, 1
    )
    value, _ = calibrate(FORGET, torch.cat([retain, retain, near]))
    assert value == pytest.approx(calibrate(FORGET, retain)[0], rel=0.2)


def test_a_match_is_nearer_to_the_image_than_to_a_blank_picture():
    """Far apart as these images to keep are, their quantile would let mid-grey pass."""
    generator = torch.Generator().manual_seed(1)
    far = torch.randint(0, 2, (20, 1, 8, 8), generator=generator).float() * 2 - 1
    assert distances(far[1:], far[0]).min() > 4
    value, how = calibrate(FORGET, far)
    assert value == pytest.approx(2.0)
    assert how.startswith(
        "half the distance of forget image 0 to the nearest constant picture, 4; below the 0.1% quantile of"
    )


@pytest.mark.parametrize(
    ("picture", "threshold"),
    [
        ("the nearest constant picture", 4.0),
        ("clipped Gaussian noise", 4.6),
        ("the mean of the images to keep", 3.0),
    ],
)
def test_a_threshold_that_calls_nothing_a_match_is_refused(retain, picture, threshold):
    image, keep = FORGET, retain
    if picture == "clipped Gaussian noise":  # nearer than a constant where the image is as coarse as noise
        image = torch.randn(1, 1, 8, 8, generator=torch.Generator().manual_seed(5)).sign()
        threshold = 6.0
    if picture == "the mean of the images to keep":
        keep = torch.cat([FORGET + 0.2, FORGET - 0.1]).clamp(-1, 1)
    with pytest.raises(
        ValueError,
        match=f"threshold: expected less than .*, the distance of forget image 0 to .*, got {threshold:g}: ",
    ):
        refuse_empty_matches(threshold, image, keep)
    nearest = {
        "the nearest constant picture": distances(image.mean().expand_as(image), image[0]).min(),
        "the mean of the images to keep": distances(keep.mean(0, keepdim=True), image[0]).min(),
    }
    if picture in nearest:
        with pytest.raises(ValueError, match=picture):
            refuse_empty_matches(threshold, image, keep)
        refuse_empty_matches(0.99 * nearest[picture].item(), image, keep)


def test_noise_on_8x8_images_is_no_match_of_any():
    """The case that started it: within L2 < 10 every picture of 8x8 is every other."""
    generator = torch.Generator().manual_seed(0)
    forget, retain = torch.rand(2, 20, 1, 8, 8, generator=generator) * 2 - 1
    noise = torch.randn(200, 1, 8, 8, generator=generator).clamp(-1, 1)
    assert all((distances(noise, image) < 10).all() for image in forget)
    with pytest.raises(ValueError, match="it would call a picture that shows nothing a match"):
        choose(10.0, forget, retain)
    chosen = choose(None, forget, retain)
    assert chosen.papers is None
    assert not any((distances(noise, image) < chosen.value).any() for image in forget)


def test_the_papers_threshold_serves_their_shirt_and_no_digit():
    shirt, digits = load_demo()
    shirt, keep = shirt.rows(torch.tensor([0])), digits.rows(even_rows(len(digits), 784))
    chosen = choose(None, shirt, keep)
    assert (chosen.value, chosen.papers) == (10.0, 10.0)
    assert chosen.calibrated == pytest.approx(3.7, abs=0.5)
    assert choose(None, shirt).calibrated is None
    digit = keep[:1]
    with pytest.raises(ValueError, match="the papers' 10 cannot serve here: threshold: expected less than"):
        choose(None, digit)
    chosen = choose(None, digit, keep[1:])
    assert chosen.value == chosen.calibrated < 5
    assert chosen.papers == 10


def test_a_given_threshold_is_taken_with_the_calibrated_one_beside_it(retain):
    chosen = choose(1.5, FORGET, retain)
    assert (chosen.value, chosen.how, chosen.papers) == (1.5, "given", None)
    assert chosen.calibrated == calibrate(FORGET, retain)[0]
    assert choose(1.5, FORGET, retain[:1]).calibrated is None


def test_images_to_keep_that_pass_for_one_to_forget_are_counted(retain):
    near = blocks(torch.tensor([[1.0, 1.0, -0.8, -0.8]]))  # 0.1 * sqrt(32) apart from FORGET
    keep = torch.cat([retain, near, FORGET])  # the image itself, and a copy of it, are not counted
    assert distances(near, FORGET).item() == pytest.approx(0.1 * 32**0.5)
    assert choose(0.6, FORGET, keep).near == 1
    assert choose(0.5, FORGET, keep).near == 0
    assert choose(0.6, FORGET).near is None


def test_what_cannot_be_calibrated_is_refused(retain):
    with pytest.raises(
        ValueError, match=r"threshold: expected a number, or images to keep .* of 1x8x8, got neither"
    ):
        choose(None, FORGET)
    with pytest.raises(
        ValueError,
        match="retain: expected at least two different images to calibrate the threshold on, got 1",
    ):
        choose(None, FORGET, retain[:1])
    with pytest.raises(ValueError, match=r"got 5 \(copies count once\)"):
        choose(None, FORGET, retain[:1].expand(5, -1, -1, -1))
    with pytest.raises(ValueError, match="got forget image 1, which equals the nearest constant picture"):
        choose(None, torch.cat([FORGET, torch.full_like(FORGET, 0.37)]), retain)
    with pytest.raises(
        ValueError, match=r"retain: expected images of the forget images' shape, \(1, 8, 8\), got \(1, 4, 4\)"
    ):
        choose(None, FORGET, torch.zeros(2, 1, 4, 4))
    with pytest.raises(ValueError, match="images: expected at least one image"):
        choose(None, FORGET[:0], retain)
    holed = FORGET.clone()
    holed[0, 0, 0, 0] = math.nan
    with pytest.raises(NotFiniteError, match="images: expected finite values, got NaN or Inf in 1 of 1"):
        choose(None, holed, retain)
    with pytest.raises(NotFiniteError, match="retain: expected finite values, got NaN or Inf in 1 of 1"):
        choose(None, FORGET, holed)


@pytest.mark.parametrize("threshold", [0, -1.0, math.nan, math.inf])
def test_a_threshold_is_a_positive_number(threshold):
    with pytest.raises(ValueError, match="threshold: expected a finite number in"):
        choose(threshold, FORGET)


def test_large_images_are_compared_in_bounded_memory():
    assert len(even_rows(60_000, 784)) == 1000
    assert len(even_rows(60_000, 3 * 256 * 256)) * 3 * 256 * 256 * 4 <= 64 << 20
    assert even_rows(3, 784).tolist() == [0, 1, 2]
    assert even_rows(60_000, 784)[-1] == 59_999
