"""Squared distances that a caller's loop hands to `retrack_step`: those of its images, or refused."""

import pytest
import torch

from fastunlearn import ImageStore, nearest_neighbors, retrack_step
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCALE = (2 / 255) ** 2  # from grey levels to network input


def batch(dtype=torch.float32):
    """Rows of uint8 stores as a loop hands them over, and what the search returned for them."""
    images = torch.randint(
        0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    forget, retain = ImageStore(images[:3]), ImageStore(images[3:])
    index, sqdist = nearest_neighbors(forget, retain, k=2)
    neighbors = retain.rows(index.flatten()).view(3, 2, 1, 8, 8)
    every = torch.arange(3)
    return [rows.to(dtype) for rows in (forget.rows(every), neighbors, retain.rows(every))], sqdist


def step(images, sqdist):
    model = TinyDenoiser().to(images[0].dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return retrack_step(model, optimizer, linear_schedule(), *images, lambd=0.5, sqdist=sqdist)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_distances_of_the_search_are_taken(dtype):
    images, sqdist = batch(dtype)
    assert not step(images, sqdist * SCALE).skipped


@pytest.mark.parametrize(
    "spoil",
    [
        lambda sqdist: sqdist.double(),  # grey levels
        lambda sqdist: (sqdist * SCALE)[[1, 2, 0]],  # rows in another order
        lambda sqdist: (sqdist * SCALE).sqrt(),  # not squared
        lambda sqdist: sqdist * float("nan"),
    ],
    ids=["grey levels", "other rows", "not squared", "NaN"],
)
def test_other_distances_are_refused(spoil):
    images, sqdist = batch()
    with pytest.raises(ValueError, match="sqdist: expected squared distances between the images given"):
        step(images, spoil(sqdist))


def test_a_negative_distance_is_shown():
    """Of the second neighbour, too, which is not measured."""
    images, sqdist = batch()
    sqdist = sqdist * SCALE
    sqdist[2, 1] = -3
    with pytest.raises(ValueError, match=r"sqdist: expected squared distances >= 0, got -3"):
        step(images, sqdist)


def test_distances_on_another_device_are_refused_by_name():
    images, sqdist = batch()
    model = TinyDenoiser().to("meta")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    images = [rows.to("meta") for rows in images]
    with pytest.raises(ValueError, match="sqdist: expected the device of forget, meta, got cpu"):
        retrack_step(model, optimizer, linear_schedule(), *images, sqdist=sqdist * SCALE)
