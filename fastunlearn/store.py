"""ImageStore: the rows of a data set as they are on disk, uint8 or float, turned into network input only when drawn."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

DTYPES = (torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64)
CHUNK_BYTES = 64 << 20  # what the streamed checks and hashes hold at a time
RANGE_ROUNDING = 1e-6  # how far a float image may exceed [-1, 1]: resizing and rescaling in float32 round


class ImageStore:
    """`[N, C, H, W]` rows on one device: images or latents, kept in the dtype they came in.

    Values are checked once, here and in chunks, so that nothing has to look at them during a run.

    Args:
        images: `[N, C, H, W]`: a tensor, a numpy array (a memory-mapped one stays on disk; rows are read when drawn) or any object with
            `__dlpack__`. None is copied. uint8 images are served as `u * 2 / 255 - 1`; float16, bfloat16, float32 and float64 rows as they are.
        labels: `[N]` integers, or None.
        latents: the rows are latents: float, of any finite value. Otherwise float rows must lie within [-1, 1].
        sources: the files that the rows came from; kept as strings.

    Raises:
        TypeError: `images` is no array, or its dtype is not one of those above; `labels` are not integers.
        ValueError: wrong rank, an axis of length 0, NaN or Inf, float images outside [-1, 1], uint8 latents, labels of another length.
    """

    def __init__(self, images, *, labels=None, latents: bool = False, sources: Iterable[str | os.PathLike] = ()):
        images = _as_tensor("images", images)
        if images.dtype not in DTYPES:
            raise TypeError(f"images: expected dtype {', '.join(map(_name, DTYPES[:-1]))} or {_name(DTYPES[-1])}, got {_name(images.dtype)}")
        if images.ndim != 4:
            raise ValueError(f"images: expected shape [N, C, H, W], got {list(images.shape)}")
        if images.numel() == 0:
            raise ValueError(f"images: expected at least one row and no axis of length 0, got shape {list(images.shape)}")
        if latents and images.dtype == torch.uint8:
            raise ValueError("latents: expected float rows for latents=True, got uint8 images")
        self.images = images
        self.latents = bool(latents)
        self.labels = None if labels is None else _as_labels(labels, len(images))
        self.sources = tuple(os.fspath(source) for source in ([sources] if isinstance(sources, (str, os.PathLike)) else sources))
        self._content_hash: str | None = None
        if images.is_floating_point():
            self._check_values()

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"ImageStore({len(self)} rows of {list(self.shape)}, {_name(self.dtype)}, {self.device})"

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
        return self.images.dtype == torch.uint8

    def rows(self, index: Tensor) -> Tensor:
        """Rows `index` (`[B]` int64) as network input: float32 `[B, C, H, W]`, images in [-1, 1].

        On a CPU the values of uint8 rows are bit-equal to torchvision's `ToTensor` followed by `Normalize(0.5, 0.5)`.
        """
        return network_input(self.raw(index))

    def lazy(self, index: Tensor) -> Rows:
        """Rows `index` (`[B]` or `[B, K]` int64) for an op to read: nothing is gathered yet."""
        return Rows(self.images, index.to(self.device))

    def raw(self, index: Tensor) -> Tensor:
        """Rows `index` (`[B]` int64) as stored, `[B, C, H, W]`, contiguous."""
        return self.images.index_select(0, index.to(self.device))

    def chunks(self, max_bytes: int = CHUNK_BYTES) -> Iterator[tuple[int, Tensor]]:
        """All rows as stored, in order, as `(start, rows [n, C, H, W])`: views, to be read only, of at most `max_bytes` (at least one row) each."""
        row_bytes = self.images[0].numel() * self.images.element_size()
        count = max(1, max_bytes // row_bytes)
        for start in range(0, len(self), count):
            yield start, self.images[start : start + count]

    def select(self, index) -> ImageStore:
        """A store of the rows `index` (`[M]` int64, not empty), copied, with their labels."""
        index = torch.as_tensor(index, dtype=torch.int64)
        if index.ndim != 1 or len(index) == 0:
            raise ValueError(f"index: expected shape [M] with M >= 1, got {list(index.shape)}")
        if index.min() < 0 or index.max() >= len(self):
            raise ValueError(f"index: expected rows in [0, {len(self) - 1}], got rows in [{index.min()}, {index.max()}]")
        return self._replace(self.raw(index), None if self.labels is None else self.labels[index])

    def to(self, device: torch.device | str) -> ImageStore:
        """The same store on `device`; labels stay on the CPU."""
        moved = self._replace(self.images.to(device), self.labels)
        moved._content_hash = self._content_hash
        return moved

    def content_hash(self) -> str:
        """SHA-256 (hex) over dtype, shape and the rows' bytes; computed once, streamed."""
        if self._content_hash is None:
            digest = hashlib.sha256(f"{_name(self.dtype)} {list(self.images.shape)}\n".encode())
            for _, rows in self.chunks():
                digest.update(_bytes(rows))
            self._content_hash = digest.hexdigest()
        return self._content_hash

    def _replace(self, images: Tensor, labels: Tensor | None) -> ImageStore:
        """A store with the same sources and other rows that need no check."""
        store = object.__new__(ImageStore)
        store.images, store.labels, store.latents, store.sources, store._content_hash = images, labels, self.latents, self.sources, None
        return store

    def _check_values(self) -> None:
        for start, rows in self.chunks():
            low, high = (bound.item() for bound in torch.aminmax(rows))
            if not (np.isfinite(low) and np.isfinite(high)):  # aminmax propagates NaN
                bad = start + torch.isfinite(rows).flatten(1).all(1).logical_not().nonzero()[0].item()
                raise ValueError(f"images: expected finite values, got NaN or Inf in row {bad}")
            if not self.latents and max(-low, high) > 1 + RANGE_ROUNDING:
                hint = "uint8 images, float images within [-1, 1], or latents=True"
                raise ValueError(f"images: expected {hint}, got float values in [{low:.6g}, {high:.6g}] (rows {start} to {start + len(rows) - 1})")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a store in place of images: `images[index]` as network input, gathered and dequantised by the op that reads them.

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
        return network_input(self.images[self.index])


def network_input(rows: Tensor) -> Tensor:
    """Stored rows as the network sees them, float32: uint8 `u` as `u * 2 / 255 - 1`, float rows unchanged."""
    return rows.float().div_(127.5).sub_(1) if rows.dtype == torch.uint8 else rows.float()


def overlap(forget: ImageStore, retain: ImageStore) -> tuple[Tensor, Tensor]:
    """Forget rows that also stand in the retain set, exactly equal in every pixel.

    Rows of one dtype are compared as stored, others as float32 network input. The retain set is streamed; what is kept in memory is
    one 16-byte digest for each distinct forget row.

    Returns:
        `(forget_rows [M], retain_rows [M])`, int64 on the CPU: the forget rows concerned, ascending, and for each the first retain row it equals.

    Raises:
        ValueError: rows of different shape.
    """
    if forget.shape != retain.shape:
        raise ValueError(f"retain: expected rows of shape {list(forget.shape)}, as in forget, got {list(retain.shape)}")
    as_stored = forget.dtype == retain.dtype
    first_retain_row: dict[bytes, int | None] = dict.fromkeys(_row_digests(forget, as_stored))
    missing = len(first_retain_row)
    for row, digest in enumerate(_row_digests(retain, as_stored)):
        if first_retain_row.get(digest, row) is None:
            first_retain_row[digest] = row
            missing -= 1
            if missing == 0:
                break
    if missing == len(first_retain_row):  # the usual case: no second pass
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    pairs = [(row, first_retain_row[digest]) for row, digest in enumerate(_row_digests(forget, as_stored)) if first_retain_row[digest] is not None]
    forget_rows, retain_rows = torch.tensor(pairs, dtype=torch.int64).unbind(1)
    return forget_rows, retain_rows


def _row_digests(store: ImageStore, as_stored: bool) -> Iterator[bytes]:
    for _, rows in store.chunks():
        rows = rows if as_stored else network_input(rows)
        if rows.is_floating_point():
            rows = rows + 0.0  # -0.0 equals 0.0
        for row in _bytes(rows.flatten(1)):
            yield hashlib.blake2b(row, digest_size=16).digest()


def _bytes(rows: Tensor) -> np.ndarray:
    """The bytes of `rows` in C order, uint8 of the same leading axes."""
    return rows.cpu().contiguous().view(torch.uint8).numpy()


def _as_tensor(argument: str, array) -> Tensor:
    """`array` as a tensor that shares its memory."""
    if isinstance(array, Tensor):
        if array.layout != torch.strided:
            raise TypeError(f"{argument}: expected a dense tensor, got layout {_name(array.layout)}")
        return array.detach()
    if isinstance(array, np.ndarray):
        if array.dtype.kind not in "buif" or array.dtype.itemsize > 8 or not array.dtype.isnative:
            raise TypeError(f"{argument}: expected an array of uint8 or of floats in native byte order, got dtype {array.dtype}")
        if any(stride < 0 for stride in array.strides):
            raise ValueError(f"{argument}: expected an array without negative strides (numpy.ascontiguousarray copies one), got strides {array.strides}")
        with warnings.catch_warnings():  # a read-only array is fine: rows are only read
            warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
            return torch.from_numpy(array)
    if hasattr(array, "__dlpack__"):
        return torch.from_dlpack(array).detach()
    raise TypeError(f"{argument}: expected a tensor, a numpy array or an object with __dlpack__, got {type(array).__name__}")


def _as_labels(labels, count: int) -> Tensor:
    try:
        labels = torch.as_tensor(labels.copy() if isinstance(labels, np.ndarray) else labels)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"labels: expected integers of shape [{count}], got {type(labels).__name__} that is no such array ({error})") from None
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers, got {_name(labels.dtype)}")
    if labels.shape != (count,):
        raise ValueError(f"labels: expected shape [{count}], one for each row of images, got {list(labels.shape)}")
    return labels.to("cpu", torch.int64)


def _name(dtype) -> str:
    return str(dtype).removeprefix("torch.")
