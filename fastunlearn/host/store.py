"""ImageStore: the rows of a data set as they are on disk, uint8 or float.

They are turned into network input only when drawn.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from . import check, philox
from .arrays import as_labels, as_tensor, is_memory_mapped, name, tensor_bytes

log = logging.getLogger("fastunlearn")

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK_BYTES = 64 << 20  # what the streamed checks and hashes hold at a time
DIGEST_BYTES = 4 << 20  # the same of the comparison of sets, which holds float rows as float64 several times
LOOKED_AT_ONCE, LOOKED_AT_MOST = 1 << 16, 1 << 14  # bytes, and such chunks, for a warning
RANGE_ROUNDING = 1e-6  # how far a float image may exceed [-1, 1]: resizing and rescaling in float32 round
# 1 / 127.5 in two parts, as in csrc/numeric.h and kernels/images.py. `x / 127.5` would not be one number: on
# CUDA, torch multiplies by the rounded reciprocal, which is off for 111 of 256 bytes. The upper part has 9
# bits, so that a byte times it is exact, and the sum of both products is the correctly rounded quotient,
# whether or not a compiler makes a fused multiply-add of them.
UPPER_PART = float.fromhex("0x1.01p-7")
LOWER_PART = float.fromhex("0x1.010102p-23")  # float32(1 / 127.5 - UPPER_PART)
# By how much of a grey level a byte may be off as a float: half of the last bit near 1, and a little.
BYTE_ROUNDING = {torch.float16: 0.07, torch.bfloat16: 0.26}
LEAST_BYTE_ROUNDING = 1e-3
FREEZE_PURPOSE = 0xFFFF  # the last word of the counters of `ImageStore.freeze`: no draw of a step has it


class ImageStore:
    """`[N, C, H, W]` rows on one device: images or latents, kept in the dtype they came in.

    Values are checked once, here and in chunks, so that nothing has to look at them during a run.

    Latents may come as a distribution, the posterior of a VAE: its means and, in `std`, its standard
    deviations, both already multiplied by the VAE's scaling factor. A step then draws them anew (`sample`,
    `draw`), as ReTrack's loader of retain rows does. Everything else reads the means: `images`, `raw`,
    `chunks`, `overlap` and `nearest_neighbors`. `rows` and `lazy` refuse such a store; `freeze` makes one of
    fixed rows.

    Args:
        images: `[N, C, H, W]`: a tensor, a numpy array (a memory-mapped one stays on disk; rows are read when
            drawn) or any object with `__dlpack__`. None is copied. uint8 images are served as `u * 2 / 255 -
            1`; float16, bfloat16, float32 and float64 rows as they are.
        std: the posterior's standard deviations: of the shape and device of `images`, floating, finite, not
            negative. For latents only.
        labels: `[N]` integers, or None.
        latents: the rows are latents: float, of any finite value. Otherwise float rows must lie within [-1,
            1].
        sources: the files that the rows came from; kept as strings.

    Raises:
        TypeError: `images` or `std` is no array, or its dtype is not one of those above; `labels` are not
            integers.
        ValueError: wrong rank, an axis of length 0, NaN or Inf, float images outside [-1, 1], uint8 latents,
            `std` that is negative, of another shape or device, or given without `latents=True`; labels of
            another length.
    """

    def __init__(
        self,
        images,
        *,
        std=None,
        labels=None,
        latents: bool = False,
        sources: Iterable[str | os.PathLike] = (),
    ):
        self.images = as_tensor("images", images)
        self.on_disk = is_memory_mapped(images)  # rows are read from a file when they are used
        images = self.images
        if images.dtype not in DTYPES:
            *first, last = map(name, DTYPES)
            expected = f"{', '.join(first)} or {last}"
            raise TypeError(f"images: expected dtype {expected}, got {name(images.dtype)}")
        if images.ndim != 4:
            raise ValueError(f"images: expected shape [N, C, H, W], got {list(images.shape)}")
        if images.numel() == 0:
            expected = "at least one row and no axis of length 0"
            raise ValueError(f"images: expected {expected}, got shape {list(images.shape)}")
        if latents and images.dtype == torch.uint8:
            raise ValueError("latents: expected float rows for latents=True, got uint8 images")
        self.std = None
        if std is not None:
            self.std = _as_std(std, images, latents)
            self.on_disk |= is_memory_mapped(std)
        self.latents = bool(latents)
        self.labels = None if labels is None else as_labels(labels, len(images))
        if isinstance(sources, (str, os.PathLike)):
            sources = [sources]
        self.sources = tuple(os.fspath(source) for source in sources)
        self._content_hash: str | None = None
        self._hashed_versions: list[int] = []
        if images.is_floating_point():
            self._check_values()
        # Of a file of bytes nothing is read before it is drawn.
        if not latents and not (self.is_uint8 and self.on_disk):
            self._warn_of_another_range()

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        kind = name(self.dtype)
        if self.std_dtype is not None:
            kind += f" means with {name(self.std_dtype)} standard deviations"
        where = f"{self.device}, on disk" if self.on_disk else f"{self.device}"
        return f"ImageStore({len(self)} rows of {list(self.shape)}, {kind}, {where})"

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(C, H, W)` of one row."""
        return tuple(self.images.shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """The dtype the rows are kept in."""
        return self.images.dtype

    @property
    def device(self) -> torch.device:
        """Where the rows lie; a memory-mapped store is on the CPU."""
        return self.images.device

    @property
    def is_uint8(self) -> bool:
        """Whether rows are uint8 images, whose squared distances are integers."""
        return self.dtype == torch.uint8

    @property
    def std_dtype(self) -> torch.dtype | None:
        """The dtype of the standard deviations; None: the store has none."""
        return None if self.std is None else self.std.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of all rows as stored."""
        return sum(rows.numel() * rows.element_size() for rows in (self.images, self.std) if rows is not None)

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` (`[B]` int64) as network input: float32 `[B, C, H, W]`, images in [-1, 1].

        On a CPU the values of uint8 rows are bit-equal to torchvision's `ToTensor` followed by
        `Normalize(0.5, 0.5)`.

        Raises:
            ValueError: the store has standard deviations.
        """
        self._refuse_std("rows")
        return network_input(self.raw(index))

    def lazy(self, index: Tensor) -> Rows:
        """Rows `index` (`[B]` or `[B, K]` int64) for an op to read: nothing is gathered yet.

        Raises:
            TypeError: `index` holds no integers: a mask would be taken for rows 0 and 1.
            ValueError: the store has standard deviations.
        """
        self._refuse_std("lazy")
        if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
            raise TypeError(f"index: expected integers, got {name(index.dtype)}")
        return self._located(index)

    def sample(self, index: Tensor, counter: Tensor, purpose: int) -> Tensor:
        """Draws of the latents `index` (`[B]` int64): `mean + std xi`, float32 `[B, C, H, W]`.

        Here `xi = philox.normal(shape, counter, purpose)`. It belongs to the place in the batch, not to the
        row: one drawn twice in a batch gives two samples.

        Raises:
            ValueError: the store has no standard deviations.
        """
        if self.std is None:
            expected = "a store with standard deviations, ImageStore(mean, std=std, latents=True)"
            raise ValueError(f"std: expected {expected}, got one without")
        index = index.to(self.device)
        mean, std = self.images.index_select(0, index).float(), self.std.index_select(0, index).float()
        return torch.addcmul(mean, std, philox.normal(mean.shape, counter, purpose))

    def draw(self, index: Tensor, counter: Tensor, purpose: int) -> Rows | Tensor:
        """Rows `index` (`[B]` int64) as a step reads them.

        They are sampled here where the store has standard deviations, gathered by the ops where not.
        """
        if self.std_dtype is None:
            return self.lazy(index)
        return self.sample(index, counter, purpose)

    def freeze(self, seed: int | None = None) -> ImageStore:
        """A store of fixed rows: the means or, with a `seed`, one sample of every row.

        Means are not copied; samples are float32 in memory. What is compared across steps needs fixed rows:
        forget rows and their neighbours, whose distances are computed once (ReTrack's code keeps one sample
        of each).
        """
        if self.std_dtype is None:
            return self
        if seed is None:
            return self.like(self.images, labels=self.labels, on_disk=self.on_disk)
        seed = check.integer("seed", seed, low=0, high=2**63 - 1)
        if len(self) > philox.ROWS:
            expected = "None for a store of more than 2^32 rows"
            raise ValueError(f"seed: expected {expected}, got {seed} and {len(self)} rows")
        samples = torch.empty((len(self), *self.shape), dtype=torch.float32, device=self.device)
        for start, mean in self.chunks():
            # Counters begin at `start`: every row has noise of its own, whatever the chunks.
            counter = torch.tensor([seed, 0, start], device=self.device)
            index = torch.arange(start, start + len(mean), device=self.device)
            samples[start : start + len(mean)] = self.sample(index, counter, FREEZE_PURPOSE)
        return self.like(samples, labels=self.labels)

    def raw(self, index: Tensor) -> Tensor:
        """Rows `index` (`[B]` int64) as stored, `[B, C, H, W]`, contiguous; of a distribution, the means."""
        return self.images.index_select(0, index.to(self.device))

    def raw_std(self, index: Tensor) -> Tensor | None:
        """The standard deviations of the rows `index`, as stored; None: the store has none."""
        return None if self.std is None else self.std.index_select(0, index.to(self.device))

    def gather(self, index: Tensor, out: Sequence[Tensor]) -> None:
        """Writes the rows `index` (`[B]` int64) as stored into `out`: images and, if there are any, `std`."""
        for stored, rows in zip((self.images, self.std), out, strict=False):
            torch.index_select(stored, 0, index, out=rows)

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """All rows as stored, in order, as `(start, rows [n, C, H, W])`: views, to be read only.

        Each is of at most `max_bytes`, or one row.
        """
        row_bytes = self.images[0].numel() * self.images.element_size()
        count = max(1, max_bytes // row_bytes)
        for start in range(0, len(self), count):
            yield start, self.images[start : start + count]

    def select(self, index) -> ImageStore:
        """A store of the rows `index`, copied, with their labels.

        Args:
            index: integers `[M]`, not empty, or a mask, bool `[N]`.

        Raises:
            TypeError, ValueError: neither of these, or rows that there are none of.
        """
        index = torch.as_tensor(index)
        if index.dtype == torch.bool:
            if index.shape != (len(self),):
                raise ValueError(f"index: expected a mask of shape [{len(self)}], got {list(index.shape)}")
            index = index.nonzero().flatten()
        if index.numel() and (index.is_floating_point() or index.is_complex()):
            raise TypeError(f"index: expected integers or a mask, got {name(index.dtype)}")
        index = index.to(torch.int64)
        if index.ndim != 1 or len(index) == 0:
            raise ValueError(f"index: expected shape [M] with M >= 1, got {list(index.shape)}")
        if index.min() < 0 or index.max() >= len(self):
            found = f"[{index.min()}, {index.max()}]"
            raise ValueError(f"index: expected rows in [0, {len(self) - 1}], got rows in {found}")
        labels = None if self.labels is None else self.labels[index]
        return self.like(self.raw(index), self.raw_std(index), labels=labels)

    def to(self, device: torch.device | str) -> ImageStore:
        """The same store on `device`; labels stay on the CPU."""
        images = self.images.to(device)
        std = None if self.std is None else self.std.to(device)
        on_disk = self.on_disk and images.device.type == "cpu"
        moved = self.like(images, std, labels=self.labels, on_disk=on_disk)
        # The rows are the same: what was hashed is not hashed again.
        if self._content_hash is not None:
            moved._content_hash, moved._hashed_versions = self.content_hash(), moved._versions()
        return moved

    def content_hash(self) -> str:
        """SHA-256 (hex) over dtype, shape and the rows' bytes, and those of `std` where there is one.

        The rows are streamed. It is computed anew where torch has seen the rows change in place; what numpy
        or another process changes, it does not see.
        """
        if self._content_hash is None or self._hashed_versions != self._versions():
            digest = hashlib.sha256()
            for store in (self, self._std_rows()):
                if store is not None:
                    shape = [len(store), *store.shape]
                    digest.update(f"{name(store.dtype)} {shape}\n".encode())
                    for _, rows in store.chunks():
                        digest.update(tensor_bytes(rows))
            self._content_hash, self._hashed_versions = digest.hexdigest(), self._versions()
        return self._content_hash

    def like(
        self,
        images: Tensor,
        std: Tensor | None = None,
        *,
        labels: Tensor | None = None,
        on_disk: bool = False,
    ) -> ImageStore:
        """A store of the same kind and sources over other rows, which are not checked.

        They are a part of this one's, or a buffer that rows are copied to.
        """
        store = object.__new__(ImageStore)
        store.images, store.std, store.labels, store.on_disk = images, std, labels, on_disk
        store.latents, store.sources, store._content_hash = self.latents, self.sources, None
        store._hashed_versions = []
        return store

    def _located(self, index: Tensor) -> Rows:
        return Rows(self.images, index.to(self.device))

    def _versions(self) -> list[int]:
        """How often torch has changed the rows in place."""
        tensors = [rows for rows in (self.images, self.std) if rows is not None]
        # A tensor made in inference mode has no counter.
        return [0 if rows.is_inference() else rows._version for rows in tensors]

    def _std_rows(self) -> ImageStore | None:
        """The standard deviations as the rows of a store."""
        return None if self.std is None else self.like(self.std)

    def _refuse_std(self, method: str) -> None:
        if self.std_dtype is not None:
            found = "one with standard deviations, whose rows are drawn anew at every step"
            remedy = "use sample(index, counter, purpose), or freeze() for the means"
            raise ValueError(f"{method}: expected a store of fixed rows, got {found}: {remedy}")

    def _check_values(self) -> None:
        for start, low, high, rows in _bounds("images", self):
            if not self.latents and max(-low, high) > 1 + RANGE_ROUNDING:
                expected = "uint8 images, float images within [-1, 1], or latents=True"
                found = f"float values in [{low:.6g}, {high:.6g}] (rows {start} to {start + rows - 1})"
                raise ValueError(f"images: expected {expected}, got {found}")
        if self.std is None:
            return
        for start, low, _, rows in _bounds("std", self._std_rows()):
            if low < 0:
                found = f"{low:.6g} (rows {start} to {start + rows - 1})"
                expected = "expected standard deviations >= 0"
                raise ValueError(f"std: {expected}, got {found}; exp(log_var / 2) is one")

    def _warn_of_another_range(self) -> None:
        """Warns of pictures in [0, 1]: nothing else would say so.

        They are half as contrasted as what networks are trained on.
        """
        # Of usual pictures this reads one chunk.
        looked_at = itertools.islice(self.chunks(LOOKED_AT_ONCE), LOOKED_AT_MOST)
        for _, rows in looked_at:
            usual = rows.max() > 1 if self.is_uint8 else rows.min() < 0
            if usual:
                return
        named = ", ".join(self.sources) or "images"
        if self.is_uint8:
            doubt = "rows of uint8 have no value above 1; uint8 is [0, 255]: masks, or pictures in [0, 1]?"
        else:
            doubt = "rows have no value below 0; floats are [-1, 1]: pictures in [0, 1] are 2 * x - 1"
        log.warning("%s: %d %s", named, len(self), doubt)


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a store in place of images: `images[index]` as network input.

    They are gathered and dequantised by the op that reads them.

    Args:
        images: `[N, C, H, W]` as stored, uint8 or floating.
        index: int64 `[B]`, or `[B, K]` for K neighbours of each row.
    """

    images: Tensor
    index: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the images: `(B, C, H, W)` or `(B, K, C, H, W)`."""
        return (*self.index.shape, *self.images.shape[1:])

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of the network input."""
        return torch.float32

    @property
    def device(self) -> torch.device:
        return self.images.device

    def __len__(self) -> int:
        return len(self.index)

    def gather(self) -> Tensor:
        """The images, float32."""
        return network_input(self.images[self.index.long()])


def network_input(rows: Tensor) -> Tensor:
    """Stored rows as the network sees them, float32: uint8 `u` as `u * 2 / 255 - 1`, float rows unchanged.

    A byte gives the same bits on every device and in every kernel: `u / 127.5`, correctly rounded, minus 1.
    """
    if rows.dtype != torch.uint8:
        return rows.float()
    return rows.float().mul_(UPPER_PART).add_(rows, alpha=LOWER_PART).sub_(1)


def overlap(forget: ImageStore, retain: ImageStore) -> tuple[Tensor, Tensor]:
    """Forget rows that also stand in the retain set, equal in every pixel (latents: in every mean).

    Images are equal if their bytes are: float rows that came from bytes count as those, however `x / 127.5 -
    1` was rounded on the way. All other rows are compared as they are stored, or, in different dtypes, as
    float32 network input. The retain set is streamed; what is kept in memory is one 16-byte digest for each
    distinct forget row.

    Returns:
        `(forget_rows [M], retain_rows [M])`, int64 on the CPU: the forget rows concerned, ascending, and for
        each the first retain row it equals.

    Raises:
        ValueError: rows of different shape.
    """
    as_stored = _comparable("retain", retain, "forget", forget)

    # Which retain row has the digest of a forget row first; None: none so far.
    first_retain_row: dict[bytes, int | None] = dict.fromkeys(_row_digests(forget, as_stored))
    missing = len(first_retain_row)
    for row, digest in enumerate(_row_digests(retain, as_stored)):
        if first_retain_row.get(digest, row) is None:
            first_retain_row[digest] = row
            missing -= 1
            if missing == 0:
                break

    # Usually there is no overlap, and no need for a second pass over the forget rows.
    if missing == len(first_retain_row):
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    pairs = []
    for row, digest in enumerate(_row_digests(forget, as_stored)):
        if first_retain_row[digest] is not None:
            pairs.append((row, first_retain_row[digest]))
    forget_rows, retain_rows = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return forget_rows, retain_rows


def rows_also_in(others: ImageStore, store: ImageStore) -> Tensor:
    """The rows of `store` that equal a row of `others`, as `overlap` compares them.

    `store` is streamed; what is kept in memory is one 16-byte digest for each distinct row of `others`.

    Returns:
        int64 `[M]` on the CPU, ascending.

    Raises:
        ValueError: rows of different shape.
    """
    as_stored = _comparable("store", store, "others", others)
    wanted = set(_row_digests(others, as_stored))
    digests = _row_digests(store, as_stored)
    return torch.tensor([row for row, digest in enumerate(digests) if digest in wanted], dtype=torch.int64)


def _comparable(name: str, store: ImageStore, other_name: str, other: ImageStore) -> bool:
    """Whether rows of both are compared as they are stored, not as network input.

    Raises:
        ValueError: rows of different shape.
    """
    if store.shape != other.shape:
        expected = f"rows of shape {list(other.shape)}, as in {other_name}"
        raise ValueError(f"{name}: expected {expected}, got {list(store.shape)}")
    return store.dtype == other.dtype


def _row_digests(store: ImageStore, as_stored: bool) -> Iterator[bytes]:
    """16 bytes for each row, equal where `overlap` calls rows equal."""
    for kind, row in row_contents(store, as_stored):
        yield hashlib.blake2b(row, digest_size=16, person=kind).digest()


def row_contents(store: ImageStore, as_stored: bool) -> Iterator[tuple[bytes, np.ndarray]]:
    """What `overlap` compares of each row: `b"bytes"` or `b"values"`, and uint8 `[bytes]` of that kind.

    Args:
        as_stored: compared with rows of the same dtype; otherwise as float32 network input.
    """
    for _, rows in store.chunks(DIGEST_BYTES):
        from_bytes, nearest = _as_bytes(rows, store.latents)
        values = rows if as_stored or store.is_uint8 else network_input(rows)
        if values.is_floating_point():
            values = values + 0.0  # -0.0 equals 0.0
        columns = from_bytes.tolist(), tensor_bytes(nearest.flatten(1)), tensor_bytes(values.flatten(1))
        for is_bytes, as_bytes, as_values in zip(*columns, strict=True):
            yield (b"bytes", as_bytes) if is_bytes else (b"values", as_values)


def _as_bytes(rows: Tensor, latents: bool) -> tuple[Tensor, Tensor]:
    """Which of the rows `[n, C, H, W]` are bytes, or came from bytes; and the bytes nearest to all of them.

    Returns:
        bool `[n]` and uint8 `[n, C, H, W]`.
    """
    if latents or rows.dtype == torch.uint8:
        return torch.full((len(rows),), not latents), rows
    scaled = (rows.double() + 1) * 127.5
    nearest = scaled.round()
    off = (scaled - nearest).abs().flatten(1).amax(1)
    from_bytes = off <= BYTE_ROUNDING.get(rows.dtype, LEAST_BYTE_ROUNDING)
    return from_bytes, nearest.clamp(0, 255).to(torch.uint8)


def _bounds(argument: str, store: ImageStore) -> Iterator[tuple[int, float, float, int]]:
    """`(start, lowest value, highest value, rows)` of every chunk.

    Raises:
        ValueError: NaN or Inf.
    """
    for start, rows in store.chunks():
        low, high = (bound.item() for bound in torch.aminmax(rows))
        if not (np.isfinite(low) and np.isfinite(high)):  # aminmax propagates NaN
            bad = start + torch.isfinite(rows).flatten(1).all(1).logical_not().nonzero()[0].item()
            raise ValueError(f"{argument}: expected finite values, got NaN or Inf in row {bad}")
        yield start, low, high, len(rows)


def _as_std(std, images: Tensor, latents: bool) -> Tensor:
    """`std` as a tensor, refused where it does not fit `images`."""
    if not latents:
        expected = "none, or latents=True (the standard deviations of latents)"
        raise ValueError(f"std: expected {expected}, got latents=False")
    std = as_tensor("std", std)
    if std.dtype not in DTYPES or not std.is_floating_point():
        raise TypeError(f"std: expected a floating dtype, got {name(std.dtype)}")
    if std.shape != images.shape:
        raise ValueError(f"std: expected the shape of images, {list(images.shape)}, got {list(std.shape)}")
    if std.device != images.device:
        raise ValueError(f"std: expected the device of images, {images.device}, got {std.device}")
    return std
