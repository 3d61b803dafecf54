"""Rows that are picked out of a memory-mapped set stay on disk, and are those that `select` gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastunlearn.engine.feeds import open_feed
from fastunlearn.host import store as store_module
from fastunlearn.host.kept import KeptRows, keep
from fastunlearn.host.store import ImageStore, overlap, rows_also_in
from fastunlearn.neighbors.copies import near_copies
from fastunlearn.neighbors.nearest import check_neighbors, nearest_neighbors

ROWS = torch.tensor([1, 2, 5, 6, 7, 11, 12, 19])


def on_disk(folder, array: np.ndarray, name: str = "x") -> np.ndarray:
    np.save(folder / f"{name}.npy", array)
    return np.load(folder / f"{name}.npy", mmap_mode="r")


@pytest.fixture(params=["uint8", "float32", "latents"])
def whole(request, tmp_path) -> ImageStore:
    """Twenty rows on disk, with labels."""
    random = np.random.default_rng(0)
    labels = np.arange(20)
    if request.param == "uint8":
        # In NHWC, as many files are: the rows are a permuted view. Few values, so that distances tie.
        images = on_disk(tmp_path, random.integers(0, 3, (20, 6, 4, 3), dtype=np.uint8)).transpose(0, 3, 1, 2)
        return ImageStore(images, labels=labels)
    images = random.uniform(-1, 1, (20, 2, 4, 4)).astype(np.float32)
    if request.param == "float32":
        return ImageStore(on_disk(tmp_path, images), labels=labels)
    std = on_disk(tmp_path, np.abs(images) / 9, "std")
    return ImageStore(on_disk(tmp_path, 5 * images), std=std, labels=labels, latents=True)


def assert_on_disk(store: ImageStore) -> None:
    """Neither its images nor its standard deviations were copied as a whole."""
    assert isinstance(store, KeptRows)
    assert not {"images", "std"} & set(vars(store))


def assert_equal(store: ImageStore, other: ImageStore) -> None:
    assert torch.equal(store.images, other.images)
    assert store.std is None or torch.equal(store.std, other.std)
    assert torch.equal(store.labels, other.labels)


def test_they_are_the_rows_that_select_gives(whole):
    kept, selected = keep(whole, ROWS), whole.select(ROWS)
    assert len(kept) == 8
    for name in ("shape", "dtype", "std_dtype", "device", "nbytes", "is_uint8", "latents", "sources"):
        assert getattr(kept, name) == getattr(selected, name), name
    assert kept.on_disk
    assert kept.content_hash() == selected.content_hash()
    index = torch.tensor([7, 0, 0, 3])
    assert torch.equal(kept.raw(index), selected.raw(index))
    assert_equal(kept.select(index), selected.select(index))
    frozen, fixed = kept.freeze(), selected.freeze()
    assert torch.equal(frozen.rows(index), fixed.rows(index))
    assert torch.equal(frozen.lazy(index).gather(), fixed.lazy(index).gather())
    counter = torch.tensor([1, 2, 3])
    drawn, expected = (store.draw(index, counter, 4) for store in (kept, selected))
    if whole.std is None:
        drawn, expected = drawn.gather(), expected.gather()
    assert torch.equal(drawn, expected)
    assert kept.to("cpu") is kept
    assert "on disk" in repr(kept)
    assert_on_disk(kept)
    assert torch.equal(kept.freeze(3).images, selected.freeze(3).images)
    assert_equal(kept, selected)


def test_chunks_are_read_one_at_a_time(whole):
    kept = keep(whole, ROWS)
    row_bytes = whole.images[0].numel() * whole.images.element_size()
    chunks = list(kept.chunks(3 * row_bytes))
    assert [(start, len(rows)) for start, rows in chunks] == [(0, 3), (3, 3), (6, 2)]
    assert torch.equal(torch.cat([rows for _, rows in chunks]), whole.images[ROWS])


def test_rows_in_memory_are_selected():
    store = ImageStore(np.zeros((3, 1, 2, 2), np.uint8))
    assert not isinstance(keep(store, torch.tensor([1])), KeptRows)


def test_an_index_of_the_wrong_kind_is_refused(whole):
    with pytest.raises(TypeError, match="index: expected integers, got bool"):
        keep(whole, ROWS).freeze().lazy(torch.ones(8, dtype=torch.bool))


@pytest.mark.parametrize("residency", ["auto", "device"])
def test_a_feed_gives_the_rows_that_are_drawn(whole, residency):
    def draw_rows(step: int) -> torch.Tensor:
        return torch.tensor([step, 7, 0])

    stores = [keep(whole, ROWS), whole.select(ROWS)]
    feeds = [open_feed(store, "cpu", draw_rows, batch_size=3, residency=residency) for store in stores]
    for step in (0, 1):
        taken = [feed.take(step, draw_rows(step)) for feed in feeds]
        ours, expected = (store.freeze().rows(index) for store, index in taken)
        assert torch.equal(ours, expected)
    chosen = torch.tensor([5, 5])
    ours, expected = (feed.take(2, chosen, drawn=False) for feed in feeds)
    assert torch.equal(ours[0].freeze().rows(ours[1]), expected[0].freeze().rows(expected[1]))
    index = torch.tensor([[3, 4], [4, 1]])
    ours, expected = (feed.neighbors(index) for feed in feeds)
    assert torch.equal(ours[0].raw(ours[1].flatten()), expected[0].raw(expected[1].flatten()))
    for feed in feeds:
        feed.close()
    assert_on_disk(stores[0])


@pytest.mark.parametrize("backend", ["exact", "auto"])
def test_neighbours_are_the_same_in_chunks(whole, backend, tmp_path, monkeypatch):
    """Ties go to the lower row, also where another chunk has it."""
    row_bytes = whole.images[0].numel() * whole.images.element_size()
    monkeypatch.setattr(KeptRows.chunks, "__defaults__", (3 * row_bytes,))
    kept, selected, forget = keep(whole, ROWS), whole.select(ROWS), whole.select([0, 3, 4])
    found = nearest_neighbors(forget, kept, 5, backend=backend, cache_dir=tmp_path)
    expected = nearest_neighbors(forget, selected, 5, backend=backend)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])
    check_neighbors(forget, kept, *found)
    labels = torch.tensor([0, 1, 0]), torch.tensor([0, 1] * 4)
    found = nearest_neighbors(forget, kept, 2, labels=labels)
    assert torch.equal(found[0], nearest_neighbors(forget, selected, 2, labels=labels)[0])
    ours, theirs = (near_copies(forget, store, within=90.0) for store in (kept, selected))
    assert torch.equal(ours.retain_rows, theirs.retain_rows)
    assert_on_disk(kept)


def test_what_equals_another_set_is_found_in_blocks(whole, monkeypatch):
    """No more than a block of rows is held, of whatever store."""
    row_bytes = whole.images[0].numel() * whole.images.element_size()
    monkeypatch.setattr(store_module, "DIGEST_BYTES", 2 * row_bytes)
    held = []
    as_bytes = store_module._as_bytes
    monkeypatch.setattr(
        store_module, "_as_bytes", lambda rows, latents: held.append(len(rows)) or as_bytes(rows, latents)
    )
    others = whole.select([3, 12, 4, 12])
    assert rows_also_in(others, whole).tolist() == [3, 4, 12]
    assert rows_also_in(others, keep(whole, ROWS)).tolist() == [6]
    assert [rows.tolist() for rows in overlap(others, keep(whole, ROWS))] == [[1, 3], [6, 6]]
    assert max(held) == 2


def test_rows_of_another_shape_are_refused(whole):
    with pytest.raises(ValueError, match=r"store: expected rows of shape .*, as in others, got"):
        rows_also_in(ImageStore(np.zeros((1, 1, 2, 2), np.uint8)), whole)
