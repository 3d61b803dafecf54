"""ImageStore: values, views, hashes, overlap, and what it refuses."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch

from fastunlearn.store import ImageStore, overlap

FLOAT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def uint8_images(count: int = 5, shape: tuple[int, ...] = (3, 4, 6), seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def with_value(value: float, row: int = 3) -> torch.Tensor:
    images = torch.zeros(5, 1, 2, 2)
    images[row, 0, 1, 0] = value
    return images


# (id, what to call with a temporary folder, type, text)
CASES = [
    ("list", lambda _: ImageStore([[1.0]]), TypeError, r"images: expected a tensor, a numpy array or an object with __dlpack__, got list"),
    ("none", lambda _: ImageStore(None), TypeError, r"images: expected a tensor.* got NoneType"),
    ("int64", lambda _: ImageStore(torch.zeros(2, 1, 4, 4, dtype=torch.int64)), TypeError, r"images: expected dtype uint8, .* or float64, got int64"),
    ("bool", lambda _: ImageStore(np.zeros((2, 1, 4, 4), bool)), TypeError, r"images: expected dtype uint8, .* got bool"),
    ("complex", lambda _: ImageStore(torch.zeros(2, 1, 4, 4, dtype=torch.complex64)), TypeError, r"images: expected dtype .* got complex64"),
    ("object-array", lambda _: ImageStore(np.empty((2, 1, 4, 4), object)), TypeError, r"images: expected an array of uint8 or of floats .* got dtype object"),
    ("strings", lambda _: ImageStore(np.array([["a"]])), TypeError, r"images: expected an array of uint8 or of floats .* got dtype <U1"),
    ("big-endian", lambda _: ImageStore(np.zeros((2, 1, 4, 4), ">f4")), TypeError, r"images: .* native byte order, got dtype >f4"),
    ("sparse", lambda _: ImageStore(torch.zeros(2, 1, 4, 4).to_sparse()), TypeError, r"images: expected a dense tensor, got layout sparse_coo"),
    ("negative-stride", lambda _: ImageStore(np.zeros((2, 1, 4, 4), np.uint8)[::-1]), ValueError, r"images: expected an array without negative strides"),
    ("rank-3", lambda _: ImageStore(torch.zeros(2, 4, 4)), ValueError, r"images: expected shape \[N, C, H, W\], got \[2, 4, 4\]"),
    ("rank-5", lambda _: ImageStore(torch.zeros(2, 1, 1, 4, 4)), ValueError, r"images: expected shape \[N, C, H, W\], got \[2, 1, 1, 4, 4\]"),
    ("no-rows", lambda _: ImageStore(torch.zeros(0, 1, 4, 4)), ValueError, r"images: expected at least one row .* got shape \[0, 1, 4, 4\]"),
    ("no-columns", lambda _: ImageStore(torch.zeros(2, 1, 4, 0)), ValueError, r"images: .* no axis of length 0, got shape \[2, 1, 4, 0\]"),
    ("nan", lambda _: ImageStore(with_value(float("nan"))), ValueError, r"images: expected finite values, got NaN or Inf in row 3"),
    ("inf", lambda _: ImageStore(with_value(float("inf"))), ValueError, r"images: expected finite values, got NaN or Inf in row 3"),
    ("minus-inf-latent", lambda _: ImageStore(with_value(-float("inf"), 1), latents=True), ValueError, r"images: expected finite values, .* in row 1"),
    ("above-1", lambda _: ImageStore(with_value(1.01)), ValueError, r"images: .*float images within \[-1, 1\], or latents=True, got .*\[0, 1.01\]"),
    ("0-to-255", lambda _: ImageStore(uint8_images().float()), ValueError, r"images: expected .* within \[-1, 1\].* got float values in \[\d+, 25\d\]"),
    ("below-minus-1", lambda _: ImageStore(with_value(-3.0).half()), ValueError, r"images: .* got float values in \[-3, 0\]"),
    ("uint8-latents", lambda _: ImageStore(uint8_images(), latents=True), ValueError, r"latents: expected float rows for latents=True, got uint8"),
    ("labels-length", lambda _: ImageStore(uint8_images(5), labels=[1, 2]), ValueError, r"labels: expected shape \[5\], one for each row of images, got \[2\]"),
    ("labels-rank", lambda _: ImageStore(uint8_images(2), labels=torch.zeros(2, 1, dtype=torch.int64)), ValueError, r"labels: .*\[2\].* got \[2, 1\]"),
    ("labels-float", lambda _: ImageStore(uint8_images(2), labels=[0.5, 1.0]), TypeError, r"labels: expected integers, got float32"),
    ("labels-text", lambda _: ImageStore(uint8_images(2), labels=["a", "b"]), TypeError, r"labels: expected integers of shape \[2\], got list"),
    ("labels-one", lambda _: ImageStore(uint8_images(2), labels=1), ValueError, r"labels: expected shape \[2\].* got \[\]"),
    ("select-none", lambda _: ImageStore(uint8_images(2)).select([]), ValueError, r"index: expected shape \[M\] with M >= 1, got \[0\]"),
    ("select-outside", lambda _: ImageStore(uint8_images(2)).select([0, 2]), ValueError, r"index: expected rows in \[0, 1\], got rows in \[0, 2\]"),
    ("overlap-shape", lambda _: overlap(ImageStore(uint8_images()), ImageStore(uint8_images(5, (1, 4, 6)))), ValueError,
     r"retain: expected rows of shape \[3, 4, 6\], as in forget, got \[1, 4, 6\]"),
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
    assert torch.equal(served, ((every_value.float() / 255 - 0.5) / 0.5)[[3, 0]])  # torchvision's ToTensor, Normalize(0.5, 0.5)
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


@pytest.mark.parametrize("wrap", [torch.clone, torch.Tensor.numpy, lambda t: np.lib.stride_tricks.as_strided(t.numpy(), writeable=False)],
                         ids=["tensor", "numpy", "read-only"])
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
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": (count, *row.shape)})
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
    expected = hashlib.sha256(f"{str(dtype)[6:]} [7, 3, 4, 6]\n".encode() + images.view(torch.uint8).numpy().tobytes()).hexdigest()
    monkeypatch.setattr(ImageStore.chunks, "__defaults__", (100,))
    assert ImageStore(images).content_hash() == expected
    assert ImageStore(images.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)).content_hash() == expected  # strides do not matter
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


def test_overlap_is_streamed(monkeypatch):
    monkeypatch.setattr(ImageStore.chunks, "__defaults__", (100,))
    retain = uint8_images(20, seed=1)
    forget_rows, retain_rows = overlap(ImageStore(retain[[19, 0]]), ImageStore(retain))
    assert (forget_rows.tolist(), retain_rows.tolist()) == ([0, 1], [19, 0])
