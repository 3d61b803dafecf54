"""ImageStore: values, views, hashes, overlap, and what it refuses."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fastunlearn.host import philox
from fastunlearn.host.store import ImageStore, overlap

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def uint8_images(count: int = 5, shape: tuple[int, ...] = (3, 4, 6), seed: int = 0) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def with_value(value: float, row: int = 3) -> torch.Tensor:
    images = torch.zeros(5, 1, 2, 2)
    images[row, 0, 1, 0] = value
    return images


def posterior(
    count: int = 5, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and standard deviation of latents `[count, 4, 2, 3]`."""
    generator = torch.Generator().manual_seed(seed)
    mean, log_std = (torch.randn(count, 4, 2, 3, generator=generator) for _ in range(2))
    return mean.mul(3).to(dtype), log_std.sub(2).exp().to(dtype)


def latent_store(count: int = 5, dtype: torch.dtype = torch.float32, **options) -> ImageStore:
    mean, std = posterior(count, dtype)
    return ImageStore(mean, std=std, latents=True, **options)


def with_std(value: float) -> ImageStore:
    mean, std = posterior()
    std[3, 1, 0, 2] = value
    return ImageStore(mean, std=std, latents=True)


ROWS = torch.tensor([1])
COUNTER = torch.tensor([7, 3, 0])
# (id, what to call with a temporary folder, type, text)
CASES = [
    (
        "list",
        lambda _: ImageStore([[1.0]]),
        TypeError,
        r"images: expected a tensor, a numpy array or an object with __dlpack__, got list",
    ),
    ("none", lambda _: ImageStore(None), TypeError, r"images: expected a tensor.* got NoneType"),
    (
        "int64",
        lambda _: ImageStore(torch.zeros(2, 1, 4, 4, dtype=torch.int64)),
        TypeError,
        r"images: expected dtype uint8, .* or float64, got int64",
    ),
    (
        "bool",
        lambda _: ImageStore(np.zeros((2, 1, 4, 4), bool)),
        TypeError,
        r"images: expected dtype uint8, .* got bool",
    ),
    (
        "complex",
        lambda _: ImageStore(torch.zeros(2, 1, 4, 4, dtype=torch.complex64)),
        TypeError,
        r"images: expected dtype .* got complex64",
    ),
    (
        "object-array",
        lambda _: ImageStore(np.empty((2, 1, 4, 4), object)),
        TypeError,
        r"images: expected an array of uint8 or of floats .* got dtype object",
    ),
    (
        "strings",
        lambda _: ImageStore(np.array([["a"]])),
        TypeError,
        r"images: expected an array of uint8 or of floats .* got dtype <U1",
    ),
    (
        "big-endian",
        lambda _: ImageStore(np.zeros((2, 1, 4, 4), ">f4")),
        TypeError,
        r"images: .* native byte order, got dtype >f4",
    ),
    (
        "sparse",
        lambda _: ImageStore(torch.zeros(2, 1, 4, 4).to_sparse()),
        TypeError,
        r"images: expected a dense tensor, got layout sparse_coo",
    ),
    (
        "negative-stride",
        lambda _: ImageStore(np.zeros((2, 1, 4, 4), np.uint8)[::-1]),
        ValueError,
        r"images: expected an array without negative strides",
    ),
    (
        "rank-3",
        lambda _: ImageStore(torch.zeros(2, 4, 4)),
        ValueError,
        r"images: expected shape \[N, C, H, W\], got \[2, 4, 4\]",
    ),
    (
        "rank-5",
        lambda _: ImageStore(torch.zeros(2, 1, 1, 4, 4)),
        ValueError,
        r"images: expected shape \[N, C, H, W\], got \[2, 1, 1, 4, 4\]",
    ),
    (
        "no-rows",
        lambda _: ImageStore(torch.zeros(0, 1, 4, 4)),
        ValueError,
        r"images: expected at least one row .* got shape \[0, 1, 4, 4\]",
    ),
    (
        "no-columns",
        lambda _: ImageStore(torch.zeros(2, 1, 4, 0)),
        ValueError,
        r"images: .* no axis of length 0, got shape \[2, 1, 4, 0\]",
    ),
    (
        "nan",
        lambda _: ImageStore(with_value(float("nan"))),
        ValueError,
        r"images: expected finite values, got NaN or Inf in row 3",
    ),
    (
        "inf",
        lambda _: ImageStore(with_value(float("inf"))),
        ValueError,
        r"images: expected finite values, got NaN or Inf in row 3",
    ),
    (
        "minus-inf-latent",
        lambda _: ImageStore(with_value(-float("inf"), 1), latents=True),
        ValueError,
        r"images: expected finite values, .* in row 1",
    ),
    (
        "above-1",
        lambda _: ImageStore(with_value(1.01)),
        ValueError,
        r"images: .*float images within \[-1, 1\], or latents=True, got .*\[0, 1.01\]",
    ),
    (
        "0-to-255",
        lambda _: ImageStore(uint8_images().float()),
        ValueError,
        r"images: expected .* within \[-1, 1\].* got float values in \[\d+, 25\d\]",
    ),
    (
        "below-minus-1",
        lambda _: ImageStore(with_value(-3.0).half()),
        ValueError,
        r"images: .* got float values in \[-3, 0\]",
    ),
    (
        "uint8-latents",
        lambda _: ImageStore(uint8_images(), latents=True),
        ValueError,
        r"latents: expected float rows for latents=True, got uint8",
    ),
    (
        "labels-length",
        lambda _: ImageStore(uint8_images(5), labels=[1, 2]),
        ValueError,
        r"labels: expected shape \[5\], one for each row of images, got \[2\]",
    ),
    (
        "labels-rank",
        lambda _: ImageStore(uint8_images(2), labels=torch.zeros(2, 1, dtype=torch.int64)),
        ValueError,
        r"labels: .*\[2\].* got \[2, 1\]",
    ),
    (
        "labels-float",
        lambda _: ImageStore(uint8_images(2), labels=[0.5, 1.0]),
        TypeError,
        r"labels: expected integers, got float32",
    ),
    (
        "labels-text",
        lambda _: ImageStore(uint8_images(2), labels=["a", "b"]),
        TypeError,
        r"labels: expected integers of shape \[2\], got list",
    ),
    (
        "labels-one",
        lambda _: ImageStore(uint8_images(2), labels=1),
        ValueError,
        r"labels: expected shape \[2\].* got \[\]",
    ),
    (
        "select-none",
        lambda _: ImageStore(uint8_images(2)).select([]),
        ValueError,
        r"index: expected shape \[M\] with M >= 1, got \[0\]",
    ),
    (
        "select-outside",
        lambda _: ImageStore(uint8_images(2)).select([0, 2]),
        ValueError,
        r"index: expected rows in \[0, 1\], got rows in \[0, 2\]",
    ),
    (
        "overlap-shape",
        lambda _: overlap(ImageStore(uint8_images()), ImageStore(uint8_images(5, (1, 4, 6)))),
        ValueError,
        r"retain: expected rows of shape \[3, 4, 6\], as in forget, got \[1, 4, 6\]",
    ),
    (
        "std-of-images",
        lambda _: ImageStore(torch.zeros(2, 1, 4, 4), std=torch.zeros(2, 1, 4, 4)),
        ValueError,
        r"std: expected none, or latents=True",
    ),
    (
        "std-list",
        lambda _: ImageStore(posterior()[0], std=[1.0], latents=True),
        TypeError,
        r"std: expected a tensor, .* got list",
    ),
    (
        "std-uint8",
        lambda _: ImageStore(posterior()[0], std=uint8_images(5, (4, 2, 3)), latents=True),
        TypeError,
        r"std: expected a floating .* uint8",
    ),
    (
        "std-shape",
        lambda _: ImageStore(posterior()[0], std=posterior(4)[1], latents=True),
        ValueError,
        r"std: .*\[5, 4, 2, 3\], got \[4, 4, 2, 3\]",
    ),
    (
        "std-device",
        lambda _: ImageStore(posterior()[0], std=posterior()[1].to("meta"), latents=True),
        ValueError,
        r"std: expected .* cpu, got meta",
    ),
    (
        "std-negative",
        lambda _: with_std(-0.5),
        ValueError,
        r"std: expected standard deviations >= 0, got -0.5 \(rows 0 to 4\)",
    ),
    (
        "std-nan",
        lambda _: with_std(float("nan")),
        ValueError,
        r"std: expected finite values, got NaN or Inf in row 3",
    ),
    (
        "std-inf",
        lambda _: with_std(float("inf")),
        ValueError,
        r"std: expected finite values, got NaN or Inf in row 3",
    ),
    (
        "lazy-with-std",
        lambda _: latent_store().lazy(ROWS),
        ValueError,
        r"lazy: expected a store of fixed rows, .* use sample\(.* or freeze\(\)",
    ),
    (
        "rows-with-std",
        lambda _: latent_store().rows(ROWS),
        ValueError,
        r"rows: expected a store of fixed rows, .* use sample\(.* or freeze\(\)",
    ),
    (
        "freeze-seed",
        lambda _: latent_store().freeze(seed=-1),
        ValueError,
        r"seed: expected an integer in \[0, \d+\], got -1",
    ),
    (
        "sample-without-std",
        lambda _: ImageStore(uint8_images()).sample(ROWS, COUNTER, 0),
        ValueError,
        r"std: expected a store with standard deviations",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_refuses(call, error, text, tmp_path):
    with pytest.raises(error, match=text):
        call(tmp_path)


def test_uint8_rows_are_to_tensor_and_normalize():
    every_value = torch.arange(256, dtype=torch.uint8).view(4, 1, 8, 8)
    store = ImageStore(every_value)
    served = store.rows(torch.tensor([3, 0]))
    assert served.dtype == torch.float32
    # torchvision's ToTensor, Normalize(0.5, 0.5)
    assert torch.equal(served, ((every_value.float() / 255 - 0.5) / 0.5)[[3, 0]])
    assert (served.min(), served.max()) == (-1, 1)
    assert torch.equal(store.raw(torch.tensor([3, 0])), every_value[[3, 0]])
    assert store.is_uint8
    assert (len(store), store.shape, store.dtype, store.device.type) == (4, (1, 8, 8), torch.uint8, "cpu")


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_float_rows_are_served_as_they_are(dtype):
    images = (torch.rand(6, 2, 3, 3, generator=torch.Generator().manual_seed(1)) * 2 - 1).to(dtype)
    store = ImageStore(images)
    assert torch.equal(store.rows(torch.tensor([5, 5, 1])), images[[5, 5, 1]].float())
    assert store.raw(torch.tensor([0])).dtype == dtype
    assert not store.is_uint8


def test_latents_may_be_of_any_size():
    images = torch.full((2, 4, 3, 3), 7.5)
    assert torch.equal(ImageStore(images, latents=True).rows(torch.tensor([1])), images[1:])


def test_rounding_at_the_border_is_accepted():
    images = torch.full((1, 1, 2, 2), 1.0).nextafter(torch.tensor(2.0))
    assert len(ImageStore(images)) == 1


PICTURES = torch.linspace(0, 1, 5 * 3 * 4 * 4).view(5, 3, 4, 4)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (PICTURES, "5 rows have no value below 0"),
        (PICTURES.half().numpy(), "5 rows have no value below 0"),
        ((PICTURES > 0.5).byte(), "5 rows of uint8 have no value above 1"),
        (2 * PICTURES - 1, None),
        ((255 * PICTURES).byte(), None),
    ],
)
def test_pictures_in_another_range_are_spoken_of(images, message, caplog):
    ImageStore(images)
    assert [message in record.message for record in caplog.records] == ([True] if message else [])


def test_latents_may_all_be_positive(caplog):
    ImageStore(PICTURES, latents=True)
    assert not caplog.records


@pytest.mark.parametrize(
    "wrap",
    [torch.clone, torch.Tensor.numpy, lambda t: np.lib.stride_tricks.as_strided(t.numpy(), writeable=False)],
    ids=["tensor", "numpy", "read-only"],
)
def test_no_copy(wrap):
    array = wrap(uint8_images())
    pointer = array.data_ptr() if isinstance(array, torch.Tensor) else array.ctypes.data
    assert ImageStore(array).images.data_ptr() == pointer


def test_no_copy_through_dlpack():
    class Foreign:
        def __init__(self, tensor):
            self.tensor = tensor

        def __dlpack__(self, **kwargs):
            return self.tensor.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.tensor.__dlpack_device__()

    images = uint8_images()
    assert ImageStore(Foreign(images)).images.data_ptr() == images.data_ptr()


def test_memory_map_larger_than_memory(tmp_path):
    path, count = tmp_path / "rows.npy", 2**20
    row = np.arange(3 * 256 * 256, dtype=np.uint32).astype(np.uint8).reshape(3, 256, 256)
    with open(path, "wb") as file:  # a sparse file of 192 GiB with two rows in it
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|u1", "fortran_order": False, "shape": (count, *row.shape)}
        )
        start = file.tell()
        try:
            file.truncate(start + count * row.size)
        except OSError:
            pytest.skip("this file system has no files of 192 GiB")
        for index in (7, count - 1):
            file.seek(start + index * row.size)
            file.write(row.tobytes())
    for view in (np.load(path, mmap_mode="r"), np.load(path, mmap_mode="r").transpose(0, 2, 3, 1)):
        store = ImageStore(view)
        drawn = store.raw(torch.tensor([count - 1, 0, 7]))
        assert drawn.is_contiguous()
        assert drawn.shape[1:] == store.shape == view.shape[1:]
        assert [rows.sum().item() for rows in drawn] == [row.sum(), 0, row.sum()]


@pytest.mark.parametrize("max_bytes", [1, 72 * 2, 10**9])
def test_chunks_cover_all_rows_in_order(max_bytes):
    images = uint8_images(5)  # 72 bytes a row
    chunks = list(ImageStore(images).chunks(max_bytes))
    assert torch.equal(torch.cat([rows for _, rows in chunks]), images)
    assert [start for start, _ in chunks] == list(range(0, 5, len(chunks[0][1])))
    assert all(rows.numel() <= max(max_bytes, 72) for _, rows in chunks)


@pytest.mark.parametrize("dtype", [torch.uint8, *FLOAT_DTYPES])
def test_content_hash_is_over_dtype_shape_and_bytes(dtype, monkeypatch):
    images = (uint8_images(7) % 2).to(dtype)
    expected = hashlib.sha256(
        f"{str(dtype)[6:]} [7, 3, 4, 6]\n".encode() + images.view(torch.uint8).numpy().tobytes()
    ).hexdigest()
    monkeypatch.setattr(ImageStore.chunks, "__defaults__", (100,))
    assert ImageStore(images).content_hash() == expected
    # strides do not matter
    assert ImageStore(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)).content_hash() == expected
    assert ImageStore(images.reshape(7, 3, 6, 4)).content_hash() != expected
    changed = images.clone()
    changed[6, 2, 3, 5] = 1 - changed[6, 2, 3, 5]
    assert ImageStore(changed).content_hash() != expected


def test_nan_is_found_in_a_later_chunk(monkeypatch):
    monkeypatch.setattr(ImageStore.chunks, "__defaults__", (16,))
    with pytest.raises(ValueError, match="in row 4"):
        ImageStore(with_value(float("nan"), row=4))


def test_select_and_to_keep_labels_and_sources(tmp_path):
    images = uint8_images(5)
    store = ImageStore(images, labels=np.arange(5, dtype=np.uint8), sources=tmp_path)
    chosen = store.select([4, 1])
    assert torch.equal(chosen.images, images[[4, 1]])
    assert chosen.labels.tolist() == [4, 1]
    assert chosen.sources == store.sources == (str(tmp_path),)
    assert chosen.content_hash() != store.content_hash()
    moved = store.to("cpu")
    assert moved.content_hash() == store.content_hash()
    assert moved.labels.dtype == torch.int64


def test_overlap_gives_forget_rows_and_the_first_retain_row():
    retain = uint8_images(50, seed=1)
    retain[30] = retain[10]
    forget = torch.stack([retain[30], uint8_images(1, seed=2)[0], retain[4], retain[10]])
    forget_rows, retain_rows = overlap(ImageStore(forget), ImageStore(retain))
    assert forget_rows.tolist() == [0, 2, 3]
    assert retain_rows.tolist() == [10, 4, 10]


def test_overlap_sees_one_changed_bit():
    retain = uint8_images(20, seed=1)
    forget = retain[5:6].clone()
    forget[0, 2, 3, 5] ^= 1
    assert [len(rows) for rows in overlap(ImageStore(forget), ImageStore(retain))] == [0, 0]


def test_overlap_of_different_dtypes_compares_network_input():
    retain = uint8_images(20, seed=1)
    forget = ImageStore(retain).rows(torch.tensor([3]))
    forget_rows, retain_rows = overlap(ImageStore(forget), ImageStore(retain))
    assert (forget_rows.tolist(), retain_rows.tolist()) == ([0], [3])


def test_overlap_takes_minus_zero_for_zero():
    zero = torch.zeros(1, 1, 2, 2)
    forget_rows, _ = overlap(ImageStore(-zero), ImageStore(zero))
    assert forget_rows.tolist() == [0]


ROUNDED = {
    "torch": lambda bytes_: bytes_.float() / 127.5 - 1,
    "numpy": lambda bytes_: torch.from_numpy(bytes_.numpy() / 127.5 - 1),
    "numpy, float32": lambda bytes_: torch.from_numpy((bytes_.numpy() / 127.5 - 1).astype(np.float32)),
    "two steps": lambda bytes_: bytes_.float() / 255 * 2 - 1,
    "float16": lambda bytes_: (bytes_.float() / 127.5 - 1).half(),
    "bfloat16": lambda bytes_: (bytes_.float() / 127.5 - 1).bfloat16(),
}


@pytest.mark.parametrize("forget_as", ["bytes", *ROUNDED])
@pytest.mark.parametrize("retain_as", ROUNDED)
def test_overlap_sees_bytes_however_they_were_rounded(forget_as, retain_as):
    retain = torch.arange(256, dtype=torch.uint8).repeat(5, 1).view(5, 1, 16, 16).roll(3, 0)
    retain += torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1)
    forget = retain[[3, 1]]
    forget = forget if forget_as == "bytes" else ROUNDED[forget_as](forget)
    found = overlap(ImageStore(forget), ImageStore(ROUNDED[retain_as](retain)))
    assert [rows.tolist() for rows in found] == [[0, 1], [3, 1]]


def test_overlap_of_floats_that_were_no_bytes_is_exact():
    retain = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    nearly = retain[:1].clone()
    nearly[0, 0, 0, 0] = nearly[0, 0, 0, 0].nextafter(torch.tensor(2.0))
    assert len(overlap(ImageStore(nearly), ImageStore(retain))[0]) == 0
    assert len(overlap(ImageStore(retain[2:3]), ImageStore(retain))[0]) == 1


def test_a_mask_selects_the_rows_it_marks():
    store = ImageStore(uint8_images(5), labels=torch.arange(5))
    mask = torch.tensor([True, False, False, True, True])
    for given in (mask, mask.numpy(), mask.tolist()):
        assert store.select(given).labels.tolist() == [0, 3, 4]
    with pytest.raises(ValueError, match=r"index: expected a mask of shape \[5\], got \[3\]"):
        store.select(mask[:3])
    with pytest.raises(ValueError, match="index: expected shape"):
        store.select(torch.zeros(5, dtype=torch.bool))
    with pytest.raises(TypeError, match="index: expected integers or a mask, got float32"):
        store.select(torch.tensor([1.7]))
    with pytest.raises(TypeError, match="index: expected integers, got bool"):
        store.lazy(mask)


def test_the_content_hash_follows_what_torch_changes_in_place():
    images = uint8_images(3)
    store = ImageStore(images)
    before = store.content_hash()
    images[0, 0, 0, 0] ^= 1
    assert store.content_hash() != before
    assert store.to("cpu").content_hash() == store.content_hash()
    images[0, 0, 0, 0] ^= 1
    assert store.content_hash() == before


# Latents with standard deviations


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_sample_is_mean_plus_std_times_counted_noise(dtype):
    mean, std = posterior(dtype=dtype)
    index = torch.tensor([4, 0, 4])
    drawn = ImageStore(mean, std=std, latents=True).sample(index, COUNTER, 8)
    noise = philox.normal((3, 4, 2, 3), COUNTER, 8).double()
    exact = mean[index].double() + std[index].double() * noise
    # plain torch in float32: what the error is measured by
    literal = (mean[index].float() + std[index].float() * noise.float()).double()
    assert drawn.dtype == torch.float32
    assert (drawn - exact).abs().max() <= 2 * (literal - exact).abs().max()
    assert not torch.equal(drawn[0], drawn[2])  # one row, drawn twice


def test_samples_have_the_mean_and_standard_deviation():
    store = latent_store(2)
    index = torch.tensor([1]).expand(20_000)
    drawn = store.sample(index, COUNTER, 8).double()
    mean, std = store.images[1].double(), store.std[1].double()
    standard = (drawn - mean) / std
    assert standard.mean(0).abs().max() < 5 / len(index) ** 0.5
    assert (standard.var(0) - 1).abs().max() < 5 * (2 / len(index)) ** 0.5


def test_sample_depends_on_step_and_purpose_only():
    store = latent_store()
    first = store.sample(ROWS, COUNTER, 8)
    assert torch.equal(first, store.sample(ROWS, COUNTER.clone(), 8))
    assert not torch.equal(first, store.sample(ROWS, COUNTER + torch.tensor([0, 1, 0]), 8))
    assert not torch.equal(first, store.sample(ROWS, COUNTER, 9))


def test_draw_samples_what_has_std_and_leaves_the_rest_to_the_ops():
    store = latent_store()
    assert torch.equal(store.draw(ROWS, COUNTER, 8), store.sample(ROWS, COUNTER, 8))
    images = ImageStore(uint8_images())
    lazy = images.draw(ROWS, COUNTER, 8)
    assert lazy.images is images.images
    assert torch.equal(lazy.index, ROWS)


def test_freeze_is_the_means_or_one_sample(monkeypatch):
    store = latent_store(7, labels=range(7))
    means = store.freeze()
    assert means.std is None
    assert means.images.data_ptr() == store.images.data_ptr()
    assert torch.equal(means.lazy(ROWS).gather(), store.images[ROWS])
    sampled = store.freeze(seed=4)
    assert sampled.labels.tolist() == list(range(7))
    difference = (sampled.images - store.images) / store.std
    assert 0.5 < difference.std() < 1.5
    monkeypatch.setattr(ImageStore.chunks, "__defaults__", (2 * 96,))
    assert torch.equal(store.freeze(seed=4).images, sampled.images)  # whatever the chunks
    assert not torch.equal(store.freeze(seed=5).images, sampled.images)
    assert means.freeze(seed=4) is means


def test_select_and_to_keep_std():
    store = latent_store(labels=range(5))
    chosen = store.select([4, 1])
    assert torch.equal(chosen.std, store.std[[4, 1]])
    assert torch.equal(chosen.images, store.images[[4, 1]])
    assert chosen.labels.tolist() == [4, 1]
    moved = store.to("cpu")
    assert torch.equal(moved.std, store.std)
    assert moved.content_hash() == store.content_hash()


def test_content_hash_sees_std():
    mean, std = posterior()
    changed = std.clone()
    changed[4, 3, 1, 2] += 1
    stores = [
        ImageStore(mean, latents=True),
        ImageStore(mean, std=std, latents=True),
        ImageStore(mean, std=changed, latents=True),
        ImageStore(mean, std=std.double(), latents=True),
    ]
    assert len({store.content_hash() for store in stores}) == 4
    assert stores[1].content_hash() == ImageStore(mean.clone(), std=std.clone(), latents=True).content_hash()


def test_overlap_compares_means():
    mean, std = posterior()
    forget_rows, retain_rows = overlap(
        ImageStore(mean[3:], std=std[:2], latents=True), ImageStore(mean, std=std, latents=True)
    )
    assert (forget_rows.tolist(), retain_rows.tolist()) == ([0, 1], [3, 4])


def test_repr_and_nbytes_tell_std():
    assert (
        repr(latent_store(dtype=torch.float16))
        == "ImageStore(5 rows of [4, 2, 3], float16 means with float16 standard deviations, cpu)"
    )
    assert latent_store().nbytes == 2 * 5 * 24 * 4
    assert ImageStore(uint8_images()).nbytes == 5 * 72


# Files


def test_on_disk_is_known_of_maps(tmp_path):
    path = tmp_path / "rows.npy"
    np.save(path, uint8_images().numpy())
    view = np.load(path, mmap_mode="r").transpose(0, 2, 3, 1)[1:]
    assert ImageStore(view).on_disk
    assert "on disk" in repr(ImageStore(view))
    assert ImageStore(view).to("cpu").on_disk
    assert not ImageStore(view).select([0]).on_disk
    assert not ImageStore(np.load(path)).on_disk
    shared = torch.from_file(str(tmp_path / "raw"), shared=True, size=5 * 24, dtype=torch.float32).view(
        5, 4, 2, 3
    )
    assert ImageStore(shared).on_disk
    assert ImageStore(posterior()[0], std=shared, latents=True).on_disk
    assert ImageStore(shared, std=posterior()[1], latents=True).freeze().on_disk
    assert not ImageStore(shared, std=posterior()[1], latents=True).freeze(seed=1).on_disk
