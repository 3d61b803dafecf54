"""Some rows of a memory-mapped store: they stay on disk, too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property

import torch
from torch import Tensor

from .store import CHUNK_BYTES, ImageStore, Rows


def keep(store: ImageStore, rows: Tensor) -> ImageStore:
    """A store of the `rows` (int64 `[M]`, at least one) of `store`, with their labels.

    Those of a memory-mapped store stay on disk; of another they are copied, as by `select`.
    """
    if store.on_disk:
        return KeptRows(store, rows)
    return store.select(rows)


class KeptRows(ImageStore):
    """The rows `rows` of `whole`, which is memory-mapped: each is read when it is used.

    All methods of a store give what they give for `whole.select(rows)`. So do `images` and `std`, for which
    all rows are copied into memory, once.
    """

    def __init__(self, whole: ImageStore, rows: Tensor):
        self.whole, self.kept = whole, rows
        self.labels = None if whole.labels is None else whole.labels[rows]
        self.latents, self.sources, self.on_disk = whole.latents, whole.sources, whole.on_disk
        self._content_hash, self._hashed_versions = None, []

    @cached_property
    def images(self) -> Tensor:
        return self.whole.raw(self.kept)

    @cached_property
    def std(self) -> Tensor | None:
        return self.whole.raw_std(self.kept)

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.whole.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.whole.dtype

    @property
    def std_dtype(self) -> torch.dtype | None:
        return self.whole.std_dtype

    @property
    def device(self) -> torch.device:
        return self.whole.device

    @property
    def nbytes(self) -> int:
        return self.whole.nbytes // len(self.whole) * len(self)

    def raw(self, index: Tensor) -> Tensor:
        return self.whole.raw(self._of_whole(index))

    def raw_std(self, index: Tensor) -> Tensor | None:
        return self.whole.raw_std(self._of_whole(index))

    def gather(self, index: Tensor, out: Sequence[Tensor]) -> None:
        self.whole.gather(self._of_whole(index), out)

    def sample(self, index: Tensor, counter: Tensor, purpose: int) -> Tensor:
        return self.whole.sample(self._of_whole(index), counter, purpose)

    def freeze(self, seed: int | None = None) -> ImageStore:
        # The noise of a sample belongs to the number of its row here, not in `whole`.
        if seed is None:
            return self if self.std_dtype is None else KeptRows(self.whole.freeze(), self.kept)
        return super().freeze(seed)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
        row_bytes = self.whole.images[0].numel() * self.whole.images.element_size()
        count = max(1, max_bytes // row_bytes)
        for start in range(0, len(self), count):
            yield start, self.whole.raw(self.kept[start : start + count])

    def to(self, device: torch.device | str) -> ImageStore:
        if torch.device(device).type == "cpu":
            return self
        return self.whole.select(self.kept).to(device)

    def _located(self, index: Tensor) -> Rows:
        return self.whole.lazy(self._of_whole(index))

    def _versions(self) -> list[int]:
        return self.whole._versions()

    def _std_rows(self) -> ImageStore | None:
        of_whole = self.whole._std_rows()
        return None if of_whole is None else KeptRows(of_whole, self.kept)

    def _of_whole(self, index: Tensor) -> Tensor:
        """The rows of `whole` that the rows `index` of this store are."""
        return self.kept[index.to(self.kept.device)]
