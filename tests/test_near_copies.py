"""Copies of images to forget among those to keep: planted ones are found, clean sets raise no alarm."""

from __future__ import annotations

import io
import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from fastunlearn import ImageStore, ReTrack, Unlearner, near_copies
from fastunlearn.assets import path as asset
from fastunlearn.neighbors import likeness, renderings
from fastunlearn.neighbors.copies import NearCopyWarning
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

NUM_FORGET, NUM_RETAIN = 8, 1000


@pytest.fixture(scope="module")
def digits() -> np.ndarray:
    """MNIST digits in a random order, uint8 `[N, 1, 28, 28]`."""
    images = np.load(asset("mnist_tshirt_demo.npz"))["images"]
    return images[np.random.default_rng(0).permutation(len(images))][:, None]


@pytest.fixture(scope="module")
def photographs() -> np.ndarray:
    """Coloured textures with edges, uint8 `[N, 3, 32, 32]`: noise of all scales, in two regions."""
    random = np.random.default_rng(1)
    images = []
    for _ in range(200):
        layers = [random.normal(128, 35, (side, side, 3)) for side in (2, 4, 8, 32)]
        layers = [np.clip(layer, 0, 255).astype(np.uint8) for layer in layers]
        smooth = [np.asarray(Image.fromarray(layer).resize((32, 32)), float) - 128 for layer in layers]
        mixed = 128 + smooth[0] + smooth[1] * 0.7 + smooth[2] * 0.5 + smooth[3] * 0.15
        mixed[:, int(random.integers(8, 24)) :] += random.normal(0, 30, 3)
        images.append(np.clip(mixed, 0, 255).astype(np.uint8).transpose(2, 0, 1))
    return np.stack(images)


def picture(image: np.ndarray) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0)))


def pixels(image: Image.Image) -> np.ndarray:
    array = np.asarray(image)
    return array[None] if array.ndim == 2 else array.transpose(2, 0, 1)


def jpeg(image: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    picture(image).save(file, "JPEG", quality=quality)
    return pixels(Image.open(file))


def resized(image: np.ndarray, scale: float, name: str) -> np.ndarray:
    whole = picture(image)
    size = tuple(round(side * scale) for side in whole.size)
    there = whole.resize(size, Image.Resampling[name])
    return pixels(there.resize(whole.size, Image.Resampling[name]))


def turned(image: np.ndarray, number: int) -> np.ndarray:
    image = np.rot90(image, number % 4, axes=(1, 2))
    return image[:, :, ::-1] if number >= 4 else image


COPIES = {
    "equal": lambda image: image,
    "jpeg 60": lambda image: jpeg(image, 60),
    "jpeg 95": lambda image: jpeg(image, 95),
    "half, bilinear": lambda image: resized(image, 0.5, "BILINEAR"),
    "half, bicubic": lambda image: resized(image, 0.5, "BICUBIC"),
    "half, lanczos": lambda image: resized(image, 0.5, "LANCZOS"),
    "half, box": lambda image: resized(image, 0.5, "BOX"),
    "0.83, bicubic": lambda image: resized(image, 0.83, "BICUBIC"),
    "1.3, bilinear": lambda image: resized(image, 1.3, "BILINEAR"),
    "double, bicubic": lambda image: resized(image, 2, "BICUBIC"),
    **{f"orientation {number}": lambda image, number=number: turned(image, number) for number in range(1, 8)},
    "half, turned, jpeg 60": lambda image: jpeg(turned(resized(image, 0.5, "BICUBIC"), 6), 60),
}


def sets(images: np.ndarray, num_retain: int = NUM_RETAIN) -> tuple[np.ndarray, np.ndarray]:
    return images[:NUM_FORGET], images[NUM_FORGET:][:num_retain].copy()


def found_pairs(forget: np.ndarray, retain: np.ndarray, **options) -> set[tuple[int, int]]:
    found = near_copies(ImageStore(forget), ImageStore(retain), **options)
    return set(zip(found.forget_rows.tolist(), found.retain_rows.tolist(), strict=True))


# --- auto ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("data", ["digits", "photographs"])
@pytest.mark.parametrize("kind", COPIES)
def test_planted_copies_are_found_and_nothing_else(request, data, kind):
    forget, retain = sets(request.getfixturevalue(data))
    for row, image in enumerate(forget):
        retain[10 * row] = COPIES[kind](image)
    assert found_pairs(forget, retain) == {(row, 10 * row) for row in range(NUM_FORGET)}


@pytest.mark.parametrize("data", ["digits", "photographs"])
def test_the_image_to_forget_may_be_the_worse_copy(request, data):
    """The original is among the images to keep; what is given to forget was compressed, resized, turned."""
    forget, retain = sets(request.getfixturevalue(data))
    kinds = (
        "jpeg 60",
        "half, bilinear",
        "half, box",
        "0.83, bicubic",
        "double, bicubic",
        "half, turned, jpeg 60",
    )
    retain[: len(kinds)] = forget[: len(kinds)]
    worse = np.stack([COPIES[kind](image) for kind, image in zip(kinds, forget, strict=False)])
    assert found_pairs(worse, retain) == {(row, row) for row in range(len(kinds))}


def test_copies_do_not_hide_each_other(digits):
    """More copies of one image than candidates are looked at at first, in all orientations."""
    forget, retain = sets(digits)
    planted = [jpeg(turned(forget[3], number % 8), 60 + number % 36) for number in range(40)]
    retain[100:140] = np.stack(planted)
    assert found_pairs(forget, retain) == {(3, row) for row in range(100, 140)}


def test_clean_sets_raise_no_alarm(digits):
    assert found_pairs(digits[:60], digits[60:2060]) == set()


def test_tiny_images_that_are_close_to_each_other_raise_no_alarm():
    """Digits of 8 x 8: compression moves them as far as the next digit is, so the set's own scale decides."""
    datasets = pytest.importorskip("sklearn.datasets")
    images = (datasets.load_digits().images * 255 / 16).round().astype(np.uint8)[:, None]
    images = images[np.random.default_rng(0).permutation(len(images))]
    assert found_pairs(images[:100], images[100:]) == set()


def test_distances_orientations_and_words(digits):
    forget, retain = sets(digits)
    retain[5], retain[7] = turned(forget[2], 1), jpeg(turned(forget[2], 6), 75)
    found = near_copies(ImageStore(forget), ImageStore(retain))
    assert found.forget_rows.tolist() == [2, 2]
    assert found.retain_rows.tolist() == [5, 7]
    assert found.orientations.tolist() == [1, 6]
    expected = np.linalg.norm(retain[7].astype(float) - turned(forget[2], 6))
    assert found.distances.tolist() == [0, pytest.approx(expected)]
    words = f"2 near copies of 1 image to forget, 0 to {expected:.4g} away (L2 in grey levels; images of the"
    assert str(found).startswith(words)
    rows = f"retain rows 5 (0, turned by 90 degrees), 7 ({expected:.4g}, turned by 180 degrees and mirrored)"
    assert str(found).endswith(f": forget row 2: {rows}")


def test_float_images_are_compared_as_bytes_are(digits):
    forget, retain = sets(digits)
    retain[4], retain[9] = jpeg(forget[1], 70), turned(forget[2], 5)
    bytes_found = near_copies(ImageStore(forget), ImageStore(retain))
    halves = (torch.from_numpy(images).float() / 127.5 - 1 for images in (forget, retain))
    floats_found = near_copies(*(ImageStore(images) for images in halves))
    assert floats_found.retain_rows.tolist() == bytes_found.retain_rows.tolist() == [4, 9]
    torch.testing.assert_close(floats_found.distances, bytes_found.distances, rtol=1e-4, atol=1e-2)


def test_images_that_are_not_square_have_four_orientations(photographs):
    images = np.ascontiguousarray(photographs[:, :, :, :20])
    forget, retain = sets(images)
    for row, number in enumerate((0, 2, 4, 6)):
        retain[row] = turned(forget[row], number)
    found = near_copies(ImageStore(forget), ImageStore(retain))
    assert found.orientations.tolist() == [0, 2, 4, 6]
    assert found.retain_rows.tolist() == [0, 1, 2, 3]


def test_large_images_are_found_in_the_reduced_size(photographs):
    large = np.stack(
        [pixels(picture(image).resize((144, 144), Image.Resampling.BICUBIC)) for image in photographs[:60]]
    )
    forget, retain = sets(large)
    kinds = (
        "jpeg 60",
        "half, bilinear",
        "half, box",
        "0.83, bicubic",
        "orientation 3",
        "half, turned, jpeg 60",
    )
    for row, kind in enumerate(kinds):
        retain[row] = COPIES[kind](forget[row])
    assert found_pairs(forget, retain) == {(row, row) for row in range(len(kinds))}


@pytest.mark.parametrize("channels", [2, 4])
def test_any_number_of_channels(digits, channels):
    images = np.ascontiguousarray(digits[:300].reshape(-1, channels, 28, 28))
    forget, retain = sets(images)
    retain[3] = np.stack([jpeg(channel[None], 80)[0] for channel in forget[0]])
    assert found_pairs(forget, retain) == {(0, 3)}


def test_a_retain_set_of_one(digits):
    assert found_pairs(digits[:3], jpeg(digits[1], 80)[None]) == {(1, 0)}
    assert found_pairs(digits[:3], digits[5:6]) == set()


def test_constant_images():
    levels = np.arange(0, 250, 10, dtype=np.uint8)
    images = np.broadcast_to(levels[:, None, None, None], (len(levels), 1, 16, 16)).copy()
    assert found_pairs(images[:2], images[2:]) == set()
    assert found_pairs(images[:2], images[1:]) == {(1, 0)}


def test_a_retain_set_of_equal_rows(digits):
    retain = np.repeat(digits[:1], 60, axis=0)
    assert found_pairs(digits[1:3], retain) == set()
    assert found_pairs(digits[:2], retain) == {(0, row) for row in range(60)}


def test_forget_rows_may_be_copies_of_each_other(digits):
    forget, retain = sets(digits)
    forget = np.stack([forget[0], jpeg(forget[0], 70), forget[0], forget[1]])
    retain[8] = resized(forget[0], 0.7, "BICUBIC")
    assert found_pairs(forget, retain) == {(0, 8), (1, 8), (2, 8)}


def test_chunks_and_blocks_change_nothing(digits, monkeypatch):
    forget, retain = sets(digits)
    for row, image in enumerate(forget):
        retain[90 * row] = COPIES["half, turned, jpeg 60"](image)
    whole = near_copies(ImageStore(forget), ImageStore(retain))
    monkeypatch.setattr("fastunlearn.neighbors.copy_search.CHUNK_BYTES", 7 * 784)
    monkeypatch.setattr("fastunlearn.neighbors.copy_search.QUERY_BYTES", 1)
    parts = near_copies(ImageStore(forget), ImageStore(retain[:400]))
    assert (
        parts.retain_rows.tolist()
        == [row for row in whole.retain_rows.tolist() if row < 400]
        == [0, 90, 180, 270, 360]
    )


def test_a_memory_mapped_set(digits, tmp_path):
    forget, retain = sets(digits)
    retain[17] = jpeg(forget[5], 60)
    np.save(tmp_path / "retain.npy", retain)
    assert found_pairs(forget, np.load(tmp_path / "retain.npy", mmap_mode="r")) == {(5, 17)}


# --- a radius -----------------------------------------------------------------------------------------------


def brute_force(
    forget: Tensor, retain: Tensor, radius: float, orientations: int
) -> dict[tuple[int, int], float]:
    """By the definition: the least distance over the orientations, where it is within the radius."""
    pairs = {}
    for number in range(orientations):
        turned_rows = torch.from_numpy(np.stack([turned(image, number) for image in forget.double().numpy()]))
        distances = torch.cdist(
            turned_rows.flatten(1), retain.double().flatten(1), compute_mode="donot_use_mm_for_euclid_dist"
        )
        for pair in (distances <= radius).nonzero().tolist():
            pairs[tuple(pair)] = min(distances[tuple(pair)].item(), pairs.get(tuple(pair), np.inf))
    return pairs


@pytest.mark.parametrize("kind", ["uint8", "float", "latents"])
@pytest.mark.parametrize("radius", [0, 150, 170, 1e6])
def test_a_radius_finds_what_brute_force_finds(kind, radius):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(100, 161, (60, 1, 6, 6), generator=generator, dtype=torch.uint8)
    images[30] = images[0].rot90(1, (-2, -1))
    images[31] = images[0]
    forget, retain, scale, orientations = images[:4], images[4:], 1.0, 8
    if kind != "uint8":
        forget, retain = (rows.double() / 127.5 - 1 for rows in (forget, retain))
        scale = 127.5
    if kind == "latents":
        radius, scale, orientations = radius / 127.5, 1.0, 1
    latents = kind == "latents"
    found = near_copies(
        ImageStore(forget, latents=latents), ImageStore(retain, latents=latents), within=radius
    )
    expected = brute_force(forget, retain, radius / scale, orientations)
    pairs = zip(found.forget_rows.tolist(), found.retain_rows.tolist(), found.distances.tolist(), strict=True)
    assert {(row, other): distance for row, other, distance in pairs} == pytest.approx(
        {pair: distance * scale for pair, distance in expected.items()}, abs=1e-6
    )
    assert found.radius == radius


def test_bad_input(digits):
    images = ImageStore(digits[:4])
    floats = torch.zeros(4, 1, 28, 28)
    cases = [
        (digits[:4], images, "auto", TypeError, "forget: expected an ImageStore, got ndarray"),
        (images, None, "auto", TypeError, "retain: expected an ImageStore, got None"),
        (
            images,
            ImageStore(digits[:4, :, :9]),
            "auto",
            ValueError,
            r"retain: expected rows of shape \(1, 28, 28\)",
        ),
        (
            ImageStore(floats),
            ImageStore(floats, latents=True),
            1,
            ValueError,
            "retain: expected images, as in forget, got latents",
        ),
        (
            images,
            ImageStore(floats),
            1,
            TypeError,
            "retain: expected the dtype of forget, torch.uint8, got torch.float32",
        ),
        (
            images,
            images,
            "near",
            ValueError,
            "within: expected 'auto' or a radius in grey levels, got 'near'",
        ),
        (images, images, -1, ValueError, r"within: expected a finite number in \[0, inf\), got -1"),
        (images, images, float("nan"), ValueError, "within: expected a finite number"),
        (images, images, None, TypeError, "within: expected a number, got None"),
        (images, images, True, TypeError, "within: expected a number, got True"),
        (*[ImageStore(floats, latents=True)] * 2, "auto", ValueError, "within: expected a radius .latents"),
    ]
    for forget, retain, within, error, message in cases:
        with pytest.raises(error, match=message):
            near_copies(forget, retain, within=within)


# --- the parts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(8))
def test_upright_undoes_oriented(number):
    image = torch.arange(36).view(1, 6, 6)
    assert torch.equal(renderings.upright(renderings.oriented(image, number), number), image)
    assert np.array_equal(renderings.oriented(image, number), turned(image.numpy(), number))


@pytest.mark.parametrize("name", renderings.FILTERS)
@pytest.mark.parametrize("scale", [0.5, 0.7, 1.4])
def test_resizes_do_what_pillow_does(photographs, name, scale):
    """To the rounding of the two passes in either direction, each to whole grey levels."""
    image = photographs[0]
    resizes = renderings.Resizes(32, 32, [scale], (name,))
    mine = resizes.one(len(resizes) - 1, torch.from_numpy(image)[None].float())[0]
    assert np.abs(mine.numpy() - resized(image, scale, name)).max() <= 2


def test_the_reduced_size_is_the_same_in_every_orientation():
    image = torch.rand(1, 1, 77, 77) * 255
    for number in range(8):
        turned_first = renderings.reduced(renderings.oriented(image, number))
        torch.testing.assert_close(turned_first, renderings.oriented(renderings.reduced(image), number))
    assert renderings.reduced_size(77, 77) == (32, 32)
    assert renderings.reduced_size(20, 3) == (20, 3)
    assert renderings.reduced_size(2000, 10) == (32, 1)


def test_what_a_jpeg_changes_does_not_vanish_in_a_jpeg(photographs):
    image = torch.from_numpy(jpeg(photographs[0], renderings.JPEG_QUALITY)).float()
    assert renderings.change_by_jpeg(image) > 0.3 * renderings.change_by_jpeg(
        torch.from_numpy(photographs[0]).float()
    )


def test_the_scale_of_the_set_limits_what_is_a_copy(photographs):
    image = torch.from_numpy(photographs[0]).float()
    unlimited = likeness.Judge(torch.empty(0)).limit(image)
    assert likeness.Judge(torch.full((9,), 0.5 * unlimited)).limit(image) == pytest.approx(0.2 * unlimited)
    assert likeness.Judge(torch.full((9,), 10 * unlimited)).limit(image) == pytest.approx(2 * unlimited)
    assert likeness.Judge(torch.full((9,), 4 * unlimited)).limit(image) == unlimited


# --- an Unlearner -------------------------------------------------------------------------------------------


def unlearner(forget: np.ndarray, retain: np.ndarray, **options) -> Unlearner:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stores = {"forget": ImageStore(forget), "retain": ImageStore(retain)}
    return Unlearner(model, optimizer, linear_schedule(), ReTrack(k=2), **stores, batch_size=2, **options)


def test_an_unlearner_warns_of_first_neighbours_that_are_copies(digits):
    forget, retain = sets(digits, 200)
    retain[50] = jpeg(forget[3], 75)
    distance = np.linalg.norm(retain[50].astype(float) - forget[3])
    words = f"1 near copy of 1 image to forget, .* forget row 3: retain rows 50 .{distance:.4g}"
    with pytest.warns(NearCopyWarning, match=words):
        made = unlearner(forget, retain)
    with pytest.warns(NearCopyWarning, match=words):
        unlearner(forget, retain, neighbors=found_neighbors(made))


def found_neighbors(made: Unlearner) -> tuple[Tensor, Tensor]:
    from fastunlearn import nearest_neighbors

    return nearest_neighbors(made.forget, made.retain, 2)


def test_an_unlearner_does_not_warn_without_cause(digits):
    forget, retain = sets(digits, 200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unlearner(forget, retain)
        retain[50] = jpeg(forget[3], 75)
        unlearner(forget, retain, warn_of_near_copies=False)
        retain[50] = forget[3]
        unlearner(forget, retain, allow_overlap=True)
