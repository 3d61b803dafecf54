"""Feeds: how the rows of a store reach the device of the step, see docs/data_path.md.

A `ResidentFeed` has the whole store on the device. A `HostFeed` leaves it in host memory or in a
memory-mapped file: while step s runs, a thread gathers the rows of step s + 1 into a staging buffer and
copies them to the device. It can, since which rows a step reads is a function of its number. Both give the
same numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from ..host import check
from ..host.store import ImageStore

RESIDENCIES = ("auto", "device", "host")
# Of the free device memory, what residency="auto" lets a store take: gradients, optimizer and activations
# need the rest.
DEVICE_SHARE = 0.25


def open_feed(
    store: ImageStore,
    device: torch.device | str,
    draw_rows: Callable[[int], Tensor],
    *,
    batch_size: int,
    residency: str = "auto",
) -> ResidentFeed | HostFeed:
    """The feed of `store` for steps on `device`.

    Args:
        draw_rows: the rows of a step by its number: int64 `[batch_size]` on the CPU. Called ahead of the
            step, in a thread; it must be a pure function. A feed keeps it, so it should not hold the owner of
            the feed.
        batch_size: rows of a step.
        residency: `"device"`: the store is copied to `device` (on a CPU it is read in place); `"host"`: it
            stays where it is, and the rows of a step are staged ahead. `"auto"`, on a GPU: `"device"` where
            the store takes at most a quarter (`DEVICE_SHARE`) of the free memory; on a CPU: `"device"`, but
            `"host"` for a memory-mapped store, whose pages would otherwise be waited for in the step.

    Raises:
        TypeError, ValueError: no store, another residency, or `"host"` for a store that lies on a GPU.
    """
    if not isinstance(store, ImageStore):
        raise TypeError(f"store: expected an ImageStore, got {check.describe(store)}")
    batch_size = check.integer("batch_size", batch_size, low=1)
    check.one_of("residency", residency, RESIDENCIES)
    device = torch.empty(0, device=device).device  # "cuda" becomes "cuda:0"
    if residency == "host" and store.device.type != "cpu":
        raise ValueError(f"residency: expected 'device' or 'auto' for a store on {store.device}, got 'host'")
    if residency == "auto":
        residency = "device" if _fits(store, device) else "host"
    if residency == "device":
        return ResidentFeed(store.to(device))
    return HostFeed(store, device, draw_rows, batch_size)


def _fits(store: ImageStore, device: torch.device) -> bool:
    """Whether residency="auto" is "device"."""
    if device.type == "cpu":
        return not store.on_disk
    if device.type != "cuda" or store.device.type != "cpu":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return store.nbytes <= DEVICE_SHARE * free


def compact_neighbors(store: ImageStore, index: Tensor) -> tuple[ImageStore, Tensor]:
    """The rows of `store` that `index` points to, each once, as a store of their own; and `index` into it.

    `index` is int64 `[N, K]`. ReTrack reads nothing else of the retain set as neighbours, so that these fit
    on a device where the set does not. The rows are frozen at their means: the distances between them and the
    forget rows were computed once.

    Raises:
        TypeError, ValueError: an index of another rank or dtype, empty, or outside the store.
    """
    check.tensor("index", index, ndim=2, floating=False)
    if index.numel() == 0:
        raise ValueError(f"index: expected at least one neighbour [N, K], got {check.describe(index)}")
    used, remapped = torch.unique(index, return_inverse=True)
    return store.freeze().select(used.cpu()), remapped


class ResidentFeed:
    """A store that lies on the device of the step: rows are gathered by the kernels that read them."""

    def __init__(self, store: ImageStore):
        self.store = store

    def take(self, step: int, index: Tensor, *, drawn: bool = True) -> tuple[ImageStore, Tensor]:
        """As `HostFeed.take`: here the store itself and `index`."""
        return self.store, index

    def neighbors(self, index: Tensor) -> tuple[ImageStore, Tensor]:
        """As `HostFeed.neighbors`: here the store itself, frozen, and `index`."""
        return self.store.freeze(), index.to(self.store.device)

    def close(self) -> None:
        """Nothing to end."""


class HostFeed:
    """A store in host memory or on disk, of which the rows of two steps lie on the device.

    They are those of this step and of the next. Not for several threads at once. `close()` ends the thread;
    so does dropping the feed.

    Args:
        store: on the CPU.
        device: of the step.
        draw_rows, batch_size: as in `open_feed`.
    """

    def __init__(
        self, store: ImageStore, device: torch.device, draw_rows: Callable[[int], Tensor], batch_size: int
    ):
        self.store, self.device = store, device
        self._draw_rows = draw_rows
        stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._buffers = tuple(_Staging(store, batch_size, device, stream) for _ in range(2))
        # What the latest take returned, and what the thread gathers for which step.
        self._in_use: _Staging | None = None
        self._next: tuple[int, Future[_Staging]] | None = None
        self._worker: ThreadPoolExecutor | None = ThreadPoolExecutor(1, thread_name_prefix="fastunlearn-feed")

    def take(self, step: int, index: Tensor, *, drawn: bool = True) -> tuple[ImageStore, Tensor]:
        """The rows of `step`: a store on the device and int64 `[B]`, which of its rows they are.

        They may be read until the next take.

        The first take, and one whose `step` does not follow the one before (a resumed run), waits for its
        rows to be gathered.

        Args:
            step: its number.
            index: `[B]` int64, rows of the whole store, on the device.
            drawn: `index` is what `draw_rows(step)` gives (with `FASTUNLEARN_CHECK=1` this is checked); it is
                not read, as that would wait for the device. Otherwise they are rows of the caller's choice,
                which are read, gathered and copied here and now.

        Raises:
            RuntimeError: the feed is closed, or the rows could not be read: the cause is named, and a later
                take tries again.
            IndexError: rows of the caller's choice outside the store.
        """
        if self._worker is None:
            raise RuntimeError("feed: expected an open feed, got one after close()")
        if self._in_use is not None:
            self._in_use.release()
            self._in_use = None

        # Rows of the caller's choice are gathered now; the thread goes on with those of the next step.
        if not drawn:
            chosen = _picked(self.store, index.cpu()).to(self.device)
            self._gather_ahead(step + 1)
            return chosen, torch.arange(len(index), device=self.device)

        # The thread has them, unless this step does not follow the one before.
        if self._next is None or self._next[0] != step:
            self._gather_ahead(step)
        _, gathered = self._next
        self._next = None
        try:
            staging = gathered.result()
        except Exception as error:
            failed = f"the rows of step {step} could not be read from {self.store}"
            raise RuntimeError(f"feed: {failed}: {type(error).__name__}: {error}") from error
        if check.values_enabled() and not torch.equal(index.cpu(), staging.rows):
            raise ValueError(f"index: expected the rows that draw_rows({step}) gives, got others")
        self._in_use = staging
        served = staging.acquire()
        self._gather_ahead(step + 1)
        return served

    def neighbors(self, index: Tensor) -> tuple[ImageStore, Tensor]:
        """The rows that `index` points to, as a store on the device; and `index` remapped to it.

        `index` is int64 `[N, K]`, rows of the whole store.
        """
        store, index = compact_neighbors(self.store, index)
        return store.to(self.device), index.to(self.device)

    def close(self) -> None:
        """Ends the thread, after what it is gathering. A second call does nothing."""
        if self._worker is not None:
            self._worker.shutdown()
            self._worker = self._in_use = self._next = None

    def _gather_ahead(self, step: int) -> None:
        """Has the thread gather the rows of `step`.

        What it gathers for another step is dropped: there is one thread, and the new rows are written after.
        """
        first, second = self._buffers
        free = second if first is self._in_use else first
        self._next = step, self._worker.submit(free.fill, self.store, self._draw_rows, step)


class _Staging:
    """Room for the rows of one step: pinned host memory and, off the CPU, the same on the device.

    Three parties use it: the thread fills the host memory and queues the copy on `stream`; the step reads the
    device memory on its own stream. `copied` tells the step, and the thread before it fills again, that the
    copy is done; `released` tells the copy that the step is.
    """

    def __init__(
        self, store: ImageStore, batch_size: int, device: torch.device, stream: torch.cuda.Stream | None
    ):
        stored = [dtype for dtype in (store.dtype, store.std_dtype) if dtype is not None]
        shape = batch_size, *store.shape
        self.host = [torch.empty(shape, dtype=dtype, pin_memory=stream is not None) for dtype in stored]
        self.on_device = self.host
        if device.type != "cpu":
            self.on_device = [torch.empty(shape, dtype=dtype, device=device) for dtype in stored]
        self.store = store.like(*self.on_device)
        self.index = torch.arange(batch_size, device=device)
        self.rows: Tensor | None = None  # [B] int64 on the CPU: what it was filled with
        self.stream = stream
        if stream is not None:
            self.copied, self.released = torch.cuda.Event(blocking=True), torch.cuda.Event()
            for rows in self.on_device:
                rows.record_stream(stream)
            # The memory may be that of a tensor whose last reader is still queued: the first copy waits.
            self.release()

    def fill(self, store: ImageStore, draw_rows: Callable[[int], Tensor], step: int) -> _Staging:
        """In the thread: gathers the rows of `step` and starts their copy."""
        self.rows = _check_drawn(draw_rows(step), len(self.index))
        if self.stream is not None:
            # The latest copy out of the pinned memory has to be done. The thread waits, the step does not.
            self.copied.synchronize()
        store.gather(self.rows, self.host)
        if self.stream is not None:
            # On the device, the copy waits for the step that read these rows last.
            with torch.cuda.stream(self.stream):
                self.stream.wait_event(self.released)
                self._copy()
                self.copied.record(self.stream)
        elif self.on_device is not self.host:
            self._copy()
        return self

    def acquire(self) -> tuple[ImageStore, Tensor]:
        """What the step reads. The device waits for the copy, the host does not."""
        if self.stream is not None:
            torch.cuda.current_stream(self.index.device).wait_event(self.copied)
        return self.store, self.index

    def release(self) -> None:
        """The step is queued: whatever comes after it on the current stream may overwrite."""
        if self.stream is not None:
            self.released.record(torch.cuda.current_stream(self.index.device))

    def _copy(self) -> None:
        for host, device in zip(self.host, self.on_device, strict=True):
            device.copy_(host, non_blocking=True)


def _picked(store: ImageStore, index: Tensor) -> ImageStore:
    """The rows `index`, copied, as a store in their order."""
    return store.like(store.raw(index), store.raw_std(index))


def _check_drawn(rows: Tensor, batch_size: int) -> Tensor:
    """`rows` as `draw_rows` gave them, refused where they are none."""
    fits = isinstance(rows, Tensor) and rows.dtype == torch.int64 and rows.device.type == "cpu"
    if not fits or rows.shape != (batch_size,):
        expected = f"int64 of shape ({batch_size},) on cpu"
        raise ValueError(f"draw_rows: expected {expected}, got {check.describe(rows)}")
    return rows
