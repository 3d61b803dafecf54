"""Feeds: the rows of every step, whatever memory the store lies in; threads, buffers, jumps, errors."""

from __future__ import annotations

import gc
import signal
import subprocess
import sys
import threading
import weakref
from contextlib import nullcontext
from functools import partial

import numpy as np
import pytest
import torch

from fastunlearn import EraseDiff, Unlearner
from fastunlearn.engine import feeds
from fastunlearn.engine.feeds import HostFeed, ResidentFeed, compact_neighbors, open_feed
from fastunlearn.host import philox
from fastunlearn.host.store import ImageStore
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

CPU = torch.device("cpu")
BATCH, SEED, PURPOSE, POSTERIOR = 6, 5, 1, 9
PATIENCE = 300  # seconds: only a defect reaches it, on any machine


def counter(step: int, device=CPU) -> torch.Tensor:
    return torch.tensor([SEED, step, 0], device=device)


def draw(count: int, step: int) -> torch.Tensor:
    return philox.integers(BATCH, count, counter(step), PURPOSE)


def images(count: int = 40, shape: tuple[int, ...] = (3, 4, 6)) -> torch.Tensor:
    return torch.randint(
        0, 256, (count, *shape), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )


def latents(dtype: torch.dtype = torch.float32) -> ImageStore:
    mean = images().sub(128).float() / 16
    return ImageStore(mean.to(dtype), std=(images().float().flip(0) / 64).to(dtype), latents=True)


def file_of(folder, rows: torch.Tensor) -> ImageStore:
    np.save(folder / "rows.npy", rows.numpy())
    return ImageStore(np.load(folder / "rows.npy", mmap_mode="r"))


def host_feed(store: ImageStore, draw_rows=None, device=CPU) -> HostFeed:
    return HostFeed(store, torch.device(device), draw_rows or partial(draw, len(store)), BATCH)


def served(feed, step: int, index: torch.Tensor | None = None, device=CPU) -> torch.Tensor:
    """What the network would see, read when the step reads it."""
    drawn = index is None
    store, rows = feed.take(step, (draw(40, step) if drawn else index).to(device), drawn=drawn)
    found = store.draw(rows, counter(step, device), POSTERIOR)
    return found.gather() if store.std is None else found


def expected(store: ImageStore, step: int, index: torch.Tensor | None = None) -> torch.Tensor:
    return served(ResidentFeed(store), step, index)


def idle(feed: HostFeed) -> None:
    """Waits until the thread has gathered the next rows."""
    feed._next[1].exception(timeout=PATIENCE)


def threads() -> set[threading.Thread]:
    return {thread for thread in threading.enumerate() if thread.name.startswith("fastunlearn-feed")}


def ended(found: set[threading.Thread]) -> bool:
    for thread in found:
        thread.join(PATIENCE)
    return not any(thread.is_alive() for thread in found)


STORES = {
    "uint8": lambda folder: ImageStore(images()),
    "on-disk": lambda folder: file_of(folder, images()),
    "nhwc-view": lambda folder: ImageStore(images().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
    "float16": lambda folder: ImageStore(images().half() / 128 - 1),
    "bfloat16-latents": lambda folder: latents(torch.bfloat16),
    "float32-latents": lambda folder: latents(),
    "latents-of-two-dtypes": lambda folder: ImageStore(
        latents().images, std=latents().std.half(), latents=True
    ),
}


@pytest.mark.parametrize("kind", STORES)
def test_twenty_steps_are_those_of_the_resident_feed(kind, tmp_path):
    store = STORES[kind](tmp_path)
    feed = host_feed(store)
    for step in range(20):
        assert torch.equal(served(feed, step), expected(store, step)), step
    feed.close()


def test_rows_are_served_as_stored():
    feed = host_feed(ImageStore(images()))
    store, index = feed.take(3, draw(40, 3))
    assert store.dtype == torch.uint8
    assert torch.equal(store.images, images()[draw(40, 3)])
    assert index.tolist() == list(range(BATCH))


# Order, buffers


def test_next_rows_are_gathered_while_the_step_runs():
    asked = []
    feed = host_feed(
        ImageStore(images()),
        lambda step: asked.append((step, threading.current_thread().name)) or draw(40, step),
    )
    served(feed, 0)
    idle(feed)  # no take in between
    assert [step for step, _ in asked] == [0, 1]
    assert all(name.startswith("fastunlearn-feed") for _, name in asked)
    served(feed, 1)
    idle(feed)
    assert [step for step, _ in asked] == [0, 1, 2]


def test_a_take_waits_for_its_rows_and_not_for_the_next():
    gates = {step: threading.Event() for step in range(4)}
    feed = host_feed(ImageStore(images()), lambda step: gates[step].wait(PATIENCE) and draw(40, step))
    gates[0].set()
    served(feed, 0)  # returns although the rows of step 1 are not there
    _, gathered = feed._next
    wait = gathered.result
    gathered.result = lambda: (gates[1].set(), wait())[1]  # they come when they are waited for, not before
    assert torch.equal(served(feed, 1), expected(ImageStore(images()), 1))
    gates[2].set()
    gates[3].set()
    feed.close()


def test_two_buffers_take_turns():
    feed = host_feed(ImageStore(images()))
    places = [feed.take(step, draw(40, step))[0].images.data_ptr() for step in range(6)]
    assert places[0::2] == [places[0]] * 3
    assert places[1::2] == [places[1]] * 3
    assert places[0] != places[1]


@pytest.mark.parametrize("make", [lambda: ImageStore(images()), latents], ids=["images", "latents"])
def test_a_buffer_is_the_steps_own_until_the_next_take(make):
    """What a step has read is poisoned: no later step may read it before it is written anew, and none may
    write while a step reads.
    """
    store, feed = make(), None
    feed = host_feed(store)
    for step in range(12):
        buffers, _ = feed.take(step, draw(40, step))
        rows = [buffers.images] if buffers.std is None else [buffers.images, buffers.std]
        wanted = [stored[draw(40, step)] for stored in (store.images, store.std)[: len(rows)]]
        idle(feed)  # the rows of the next step are there
        assert all(torch.equal(*pair) for pair in zip(rows, wanted, strict=True)), step
        for buffer in rows:
            buffer.fill_(77)


# Jumps


@pytest.mark.parametrize(
    "steps", [[5, 6, 7], [0, 1, 9, 10, 11], [4, 5, 2, 3], [3, 3, 3, 4], [0, 2, 4, 6]], ids=str
)
def test_jumps_give_the_rows_of_the_step(steps):
    store = ImageStore(images())
    feed = host_feed(store)
    for step in steps:
        assert torch.equal(served(feed, step), expected(store, step))


def test_a_jump_drops_what_is_being_gathered():
    """The thread is held in the rows of step 1 when step 8 is asked for: its buffer is written twice, and
    only the second counts.
    """
    gate = threading.Event()
    feed = host_feed(ImageStore(images()), lambda step: (step != 1 or gate.wait(PATIENCE)) and draw(40, step))
    served(feed, 0)
    gather_ahead = feed._gather_ahead
    feed._gather_ahead = lambda step: (gather_ahead(step), gate.set())  # it goes on when step 8 was asked for
    assert torch.equal(served(feed, 8), expected(ImageStore(images()), 8))
    assert torch.equal(served(feed, 9), expected(ImageStore(images()), 9))


@pytest.mark.parametrize("make", [lambda: ImageStore(images()), latents], ids=["images", "latents"])
def test_rows_of_the_callers_choice(make):
    store, asked = make(), []
    feed = host_feed(store, lambda step: asked.append(step) or draw(40, step))
    for step in range(9):
        index = torch.tensor([39, 0, 39, step]) if step in (0, 3, 4) else None  # another number of rows, too
        assert torch.equal(served(feed, step, index), expected(store, step, index)), step
        idle(feed)
        assert asked[-1] == step + 1  # what follows is gathered ahead all the same


def test_the_callers_rows_must_exist():
    feed = host_feed(ImageStore(images()))
    for wrong in (40, -1):
        with pytest.raises(IndexError):
            feed.take(0, torch.tensor([wrong]), drawn=False)
    assert torch.equal(served(feed, 0), expected(ImageStore(images()), 0))


# Errors, end


def test_an_error_in_the_thread_is_that_of_the_take_that_needs_the_rows():
    broken = {3}

    def rows(step):
        if step in broken:
            raise OSError("the disk is gone")
        return draw(40, step)

    feed = host_feed(ImageStore(images()), rows)
    for step in range(3):
        served(feed, step)
    for _ in range(2):
        with pytest.raises(
            RuntimeError,
            match=r"the rows of step 3 could not be read from ImageStore\(40 rows .*: OSError: the disk is "
            r"gone",
        ) as caught:
            served(feed, 3)
        assert isinstance(caught.value.__cause__, OSError)
    broken.clear()
    for step in (3, 4):
        assert torch.equal(served(feed, step), expected(ImageStore(images()), step))


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            torch.zeros(BATCH + 1, dtype=torch.int64),
            r"expected int64 of shape \(6,\) on cpu, got int64 of shape \(7,\) on cpu",
        ),
        (torch.zeros(BATCH), r"expected int64 of shape \(6,\) on cpu, got float32"),
        ([0] * BATCH, r"expected int64 of shape \(6,\) on cpu, got list"),
        (torch.full((BATCH,), 40), "IndexError: index out of range"),
    ],
    ids=["length", "dtype", "list", "outside"],
)
def test_what_draw_rows_must_give(wrong, text):
    with pytest.raises(RuntimeError, match=text):
        served(host_feed(ImageStore(images()), lambda step: wrong), 0)


def test_checked_runs_compare_the_rows_of_device_and_thread(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_CHECK", "1")
    feed = host_feed(ImageStore(images()))
    feed.take(0, draw(40, 0))
    with pytest.raises(ValueError, match=r"index: expected the rows that draw_rows\(1\) gives, got others"):
        feed.take(1, draw(40, 2))


def test_close_ends_the_thread():
    before = threads()
    feed = host_feed(ImageStore(images()))
    served(feed, 0)
    started = threads() - before
    assert len(started) == 1
    feed.close()
    assert not any(thread.is_alive() for thread in started)
    feed.close()
    with pytest.raises(RuntimeError, match="expected an open feed"):
        feed.take(1, draw(40, 1))


def test_a_dropped_feed_ends_its_thread_and_frees_its_buffers():
    before = threads()
    feed = host_feed(ImageStore(images()))
    served(feed, 0)
    idle(feed)
    started, buffer = threads() - before, weakref.ref(feed._buffers[1])
    del feed
    gc.collect()
    assert ended(started)
    assert buffer() is None


# Files

# Only the pages of the rows that are asked for may be read: touching another one ends the process.
GUARDED = """
import ctypes, mmap, sys
import numpy as np
import torch
from fastunlearn.engine.feeds import open_feed
from fastunlearn.host.store import ImageStore

file, count, batch = sys.argv[1], int(sys.argv[2]), 6
rows = np.memmap(file, np.uint8, "r", shape=(count, 1, 256, 256))
libc = ctypes.CDLL(None)
libc.mprotect.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int

def rows_of(step):
    return torch.arange(batch) * 7 + step % 16 * 50

def allow(row, number, access):
    assert libc.mprotect(rows.ctypes.data + row * rows[0].nbytes, number * rows[0].nbytes, access) == 0

allow(0, count, 0)  # PROT_NONE
for step in range(16):
    for row in rows_of(step).tolist():
        allow(row, 1, mmap.PROT_READ)
store = ImageStore(rows)
for residency in ("host", "device"):
    feed = open_feed(store, "cpu", rows_of, batch_size=batch, residency=residency)
    for step in range(16):
        found, local = feed.take(step, rows_of(step))
        assert found.raw(local)[:, 0, 0, 0].tolist() == (rows_of(step) % 251).tolist()
    feed.close()
print("fed", flush=True)
store.images.sum()
print("read as a whole")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="mprotect")
def test_a_file_is_never_read_as_a_whole(tmp_path):
    count = 1024
    file = np.memmap(tmp_path / "rows", np.uint8, "w+", shape=(count, 1, 256, 256))
    file[:, 0, 0, 0] = np.arange(count) % 251
    file.flush()
    command = [sys.executable, "-c", GUARDED, str(tmp_path / "rows"), str(count)]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.stdout == "fed\n", run.stderr
    assert run.returncode == -signal.SIGSEGV  # it is when the whole is read that the process ends


# The choice


def test_auto_on_a_cpu_stages_files_and_reads_memory_in_place(tmp_path):
    store = ImageStore(images())
    feed = open_feed(store, "cpu", partial(draw, 40), batch_size=BATCH)
    assert isinstance(feed, ResidentFeed)
    assert feed.store.images.data_ptr() == store.images.data_ptr()
    on_disk = open_feed(file_of(tmp_path, images()), "cpu", partial(draw, 40), batch_size=BATCH)
    assert isinstance(on_disk, HostFeed)
    assert torch.equal(served(on_disk, 0), expected(store, 0))
    in_place = open_feed(
        file_of(tmp_path, images()), "cpu", partial(draw, 40), batch_size=BATCH, residency="device"
    )
    assert in_place.store.on_disk


@pytest.mark.parametrize(("free", "fits"), [(4 * 40 * 72, True), (4 * 40 * 72 - 4, False)])
def test_auto_on_a_gpu_asks_for_a_quarter_of_the_free_memory(free, fits, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
    assert feeds._fits(ImageStore(images()), torch.device("cuda", 0)) is fits


def on_gpu():
    return ImageStore(images()).like(images().to("meta"))  # any device that is not the CPU


CASES = [
    (
        "store",
        lambda: open_feed(images(), "cpu", draw, batch_size=1),
        TypeError,
        r"store: expected an ImageStore, got uint8 of shape \(40, 3, 4, 6\)",
    ),
    (
        "batch-size",
        lambda: open_feed(ImageStore(images()), "cpu", draw, batch_size=0),
        ValueError,
        r"batch_size: expected an integer >= 1, got 0",
    ),
    (
        "residency",
        lambda: open_feed(ImageStore(images()), "cpu", draw, batch_size=1, residency="disk"),
        ValueError,
        r"residency: .* auto, device, host",
    ),
    (
        "host",
        lambda: open_feed(on_gpu(), "cpu", draw, batch_size=1, residency="host"),
        ValueError,
        r"residency: .* for a store on meta, got 'host'",
    ),
    (
        "rank",
        lambda: compact_neighbors(ImageStore(images()), torch.zeros(3, dtype=torch.int64)),
        ValueError,
        r"index: .* 2 dimensions",
    ),
    (
        "float",
        lambda: compact_neighbors(ImageStore(images()), torch.zeros(3, 2)),
        TypeError,
        r"index: expected an integer tensor",
    ),
    (
        "no-neighbors",
        lambda: compact_neighbors(ImageStore(images()), torch.zeros(3, 0, dtype=torch.int64)),
        ValueError,
        r"at least one neighbour",
    ),
    (
        "outside",
        lambda: compact_neighbors(ImageStore(images()), torch.tensor([[0, 40]])),
        ValueError,
        r"index: expected rows in \[0, 39\]",
    ),
]


@pytest.mark.parametrize(("call", "error", "text"), [pytest.param(*case[1:], id=case[0]) for case in CASES])
def test_refuses(call, error, text):
    with pytest.raises(error, match=text):
        call()


# Neighbours


@pytest.mark.parametrize(
    "make", [lambda: ImageStore(images(), labels=range(40)), latents], ids=["images", "latents"]
)
def test_compact_neighbors_are_the_same_rows(make):
    store, index = make(), torch.tensor([[7, 39, 0], [39, 7, 11]])
    compact, remapped = compact_neighbors(store, index)
    assert len(compact) == 4
    assert torch.equal(compact.lazy(remapped).gather(), store.freeze().lazy(index).gather())
    for feed in (ResidentFeed(store), host_feed(store)):
        neighbors, rows = feed.neighbors(index)
        assert torch.equal(neighbors.lazy(rows).gather(), store.freeze().lazy(index).gather())


# The order of streams and events, with stand-ins for CUDA's


class Clock:
    """Records what the host and the streams were told, in order."""

    def __init__(self, monkeypatch):
        self.log: list[tuple] = []
        clock = self

        class Stream:
            def __init__(self, name):
                self.name = name

            def wait_event(self, event):
                clock.log.append((self.name, "waits", event.name))

            def __enter__(self):
                return self

            def __exit__(self, *error):
                return None

        class Event:
            def __init__(self, blocking=False):
                self.name = "copied" if blocking else "released"

            def record(self, stream):
                clock.log.append((stream.name, "records", self.name))

            def synchronize(self):
                clock.log.append(("thread", "waits", self.name))

        compute, self.copy = Stream("compute"), Stream("copy")
        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device: compute)
        monkeypatch.setattr(
            torch.Tensor,
            "record_stream",
            lambda rows, stream: clock.log.append((stream.name, "uses", rows.device.type)),
        )
        monkeypatch.setattr(
            feeds._Staging,
            "_copy",
            lambda staging: clock.log.append(("copy", "copies", tuple(staging.rows.tolist()))),
        )
        empty = torch.empty

        def unpinned(*args, pin_memory=False, **options):
            clock.log.append(("host", "pins", pin_memory))
            return empty(*args, **options)

        monkeypatch.setattr(torch, "empty", unpinned)


def test_streams_and_events_are_ordered(monkeypatch):
    clock, store = Clock(monkeypatch), ImageStore(images())
    staging = feeds._Staging(store, BATCH, torch.device("meta"), clock.copy)
    assert ("host", "pins", True) in clock.log
    # the first copy waits for the memory's last reader
    assert clock.log[-2:] == [("copy", "uses", "meta"), ("compute", "records", "released")]
    clock.log.clear()
    staging.fill(store, partial(draw, 40), 4)
    assert torch.equal(staging.host[0], images()[draw(40, 4)])
    staging.acquire()
    staging.release()
    assert clock.log == [
        ("thread", "waits", "copied"),  # before it writes the pinned memory
        ("copy", "waits", "released"),  # before it writes what a step may still read
        ("copy", "copies", tuple(draw(40, 4).tolist())),
        ("copy", "records", "copied"),
        ("compute", "waits", "copied"),  # before the step reads
        ("compute", "records", "released"),
    ]


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("make", [lambda: ImageStore(images()), latents], ids=["images", "latents"])
def test_on_a_gpu_the_rows_are_those_of_the_cpu(gpu, make):
    """The device is kept behind the host, so that a buffer that is overwritten early, or read before its
    copy, would be seen.
    """
    store = make()
    feed, found = host_feed(store, device=gpu.device), []
    indices = [
        draw(40, step).to(gpu.device) for step in range(20)
    ]  # a copy from pageable memory would wait for the device
    for step in range(20):
        rows, index = feed.take(step, indices[step])
        gpu.wait(0.01)
        found.append([stored[index] for stored in (rows.images, rows.std) if stored is not None])
    for step, rows in enumerate(found):
        wanted = [stored[draw(40, step)] for stored in (store.images, store.std) if stored is not None]
        assert all(torch.equal(row.cpu(), want) for row, want in zip(rows, wanted, strict=True)), step
    given = torch.tensor([39, 0], device=gpu.device)
    rows, index = feed.take(20, given, drawn=False)
    assert torch.equal(rows.raw(index).cpu(), store.images[[39, 0]])
    feed.close()


@pytest.mark.gpu
def test_on_a_gpu_a_take_does_not_wait_for_the_device(gpu):
    feed = host_feed(ImageStore(images()), device=gpu.device)
    indices = [draw(40, step).to(gpu.device) for step in range(7)]
    feed.take(0, indices[0])
    gpu.synchronize()
    with gpu.waiting_raises():
        for step in range(1, 6):
            feed.take(step, indices[step])
        idle(feed)
        gpu.wait(2.0)
        feed.take(6, indices[6])
        assert gpu.busy()
    feed.close()


@pytest.mark.gpu
def test_on_a_gpu_steps_with_rows_from_the_host_are_those_with_rows_on_the_device(gpu):
    """A whole run: the buffers take turns beside the network, and no step waits."""

    def run(residency):
        model = TinyDenoiser(channels=3).to(gpu.device)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-10, fused=True)
        stores = {"forget": ImageStore(images(8)), "retain": ImageStore(images(40).flip(0))}
        options = {
            "batch_size": 2,
            "compile": False,
            "autocast_dtype": None,
            "replay": False,
            "allow_overlap": True,
        }
        return Unlearner(
            model, optimizer, linear_schedule(), EraseDiff(), **stores, residency=residency, **options
        )

    host, device = run("host"), run("device")
    for step in range(6):
        with gpu.waiting_raises() if step > 1 else nullcontext():
            gpu.wait(0.005)
            one, two = host.step(), device.step()
        torch.testing.assert_close(one.loss, two.loss, rtol=1e-3, atol=1e-5)
        device.model.load_state_dict(host.model.state_dict())


@pytest.mark.gpu
@pytest.mark.parametrize("residency", ["auto", "device", "host"])
def test_on_a_gpu_open_feed_chooses(gpu, residency):
    feed = open_feed(
        ImageStore(images()), gpu.device, partial(draw, 40), batch_size=BATCH, residency=residency
    )
    assert isinstance(feed, HostFeed if residency == "host" else ResidentFeed)
    assert torch.equal(served(feed, 0, device=gpu.device).cpu(), expected(ImageStore(images()), 0))
    feed.close()
