"""What a capture leaves behind, above all one that fails: the order of events with a stand-in for torch.cuda,
and on a GPU."""

from __future__ import annotations

import gc
import logging
from contextlib import contextmanager
from itertools import combinations, count
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fastunlearn import ImageStore, Unlearner, Vanilla
from fastunlearn.engine import replay
from fastunlearn.engine.replay import WARM_UP_STEPS, CudaGraphs
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

DEVICE = torch.device("cuda", 1)


class Cuda:
    """What torch (2.11) keeps while it captures, and what it leaves undone where a call fails."""

    def __init__(self, monkeypatch, fails: tuple[str, ...]):
        self.fails, self.log = fails, []
        self.streams, self.devices = ["the caller's"], [0]
        self.recording: set[tuple[int, int]] = set()  # pools that the allocator serves
        self.pools: dict[tuple[int, int], int] = {}  # with how often they are held
        self.generator_captures = False
        cuda, handles = self, count(1)

        class Graph:
            pool = None

            def capture_begin(self, pool, capture_error_mode):
                cuda.log.append(("begin", cuda.streams[-1], cuda.devices[-1], capture_error_mode))
                cuda.generator_captures = True
                if "begin before the pool" in cuda.fails:
                    raise RuntimeError("begin")
                cuda.recording.add(pool)
                cuda.pools[pool] = cuda.pools.get(pool, 0) + 1
                if "begin" in cuda.fails:
                    raise RuntimeError("begin")
                self.pool = pool

            def capture_end(self):
                cuda.log.append(("end", cuda.streams[-1]))
                if "end" in cuda.fails:
                    raise RuntimeError("end")
                cuda.recording.remove(self.pool)
                cuda.generator_captures = False
                if "instantiate" in cuda.fails:
                    raise RuntimeError("instantiate")

            def replay(self):
                cuda.log.append(("replay",))

        class Generator:
            def clone_state(self):
                assert not cuda.recording
                return "a fresh one"

            def graphsafe_set_state(self, state):
                assert state == "a fresh one"
                cuda.generator_captures = False

        @contextmanager
        def entered(places, place):
            places.append(place)
            try:
                yield
            finally:
                places.pop()

        def end_allocate(device, pool):
            if pool not in self.recording:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.recording.remove(pool)

        def release(device, pool):
            self.pools[pool] -= 1

        stand_ins = {
            "Stream": lambda device: SimpleNamespace(device=DEVICE),
            "CUDAGraph": Graph,
            "stream": lambda stream: entered(self.streams, "the graph's"),
            "device": lambda device: entered(self.devices, device.index),
            "synchronize": lambda device: self.log.append(("synchronize", device.index)),
            "empty_cache": lambda: self.log.append(("empty cache",)),
            "graph_pool_handle": lambda: (0, next(handles)),
            "default_generators": (None, Generator()),
        }
        for name, value in stand_ins.items():
            monkeypatch.setattr(torch.cuda, name, value)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", release, raising=False)
        monkeypatch.setattr(replay, "_UNFINISHED", [])

    def assert_left(self) -> None:
        assert self.streams == ["the caller's"]
        assert self.devices == [0]
        assert not self.recording
        assert not self.generator_captures


@pytest.fixture
def cuda(monkeypatch):
    return lambda *fails: Cuda(monkeypatch, fails)


def test_a_capture_that_succeeds(cuda):
    torch_cuda = cuda()
    again = CudaGraphs(DEVICE).capture(lambda: torch_cuda.log.append(("function", torch_cuda.streams[-1])))
    again()
    assert torch_cuda.log == [
        ("synchronize", 1),
        ("empty cache",),
        ("begin", "the graph's", 1, "thread_local"),
        ("function", "the graph's"),
        ("end", "the graph's"),
        ("replay",),
    ]
    torch_cuda.assert_left()
    assert list(torch_cuda.pools.values()) == [1]  # the graph's
    assert not replay._UNFINISHED


FAILURES = {  # what raises -> the error that comes out, and whether the pool is given back by us
    ("function",): ("ValueError: function", False),
    ("function", "end"): ("ValueError: function", True),
    ("function", "instantiate"): ("ValueError: function", False),
    ("begin",): ("RuntimeError: begin", True),
    ("end",): ("RuntimeError: end", True),
    ("instantiate",): ("RuntimeError: instantiate", False),
}


@pytest.mark.parametrize(("fails", "expected"), FAILURES.items(), ids=map(" and ".join, FAILURES))
def test_a_capture_that_fails_leaves_nothing_behind(cuda, fails, expected):
    torch_cuda, (message, ours) = cuda(*fails), expected

    def function():
        if "function" in fails:
            raise ValueError("function")

    with pytest.raises((ValueError, RuntimeError)) as caught:
        CudaGraphs(DEVICE).capture(function)
    assert f"{caught.type.__name__}: {caught.value}" == message
    torch_cuda.assert_left()
    assert list(torch_cuda.pools.values()) == [0 if ours else 1]  # what torch ended goes with the graph
    assert len(replay._UNFINISHED) == ours


def test_a_capture_that_fails_before_it_has_a_pool(cuda):
    torch_cuda = cuda("begin before the pool")
    with pytest.raises(RuntimeError, match="begin"):
        CudaGraphs(DEVICE).capture(lambda: None)
    torch_cuda.assert_left()
    assert not torch_cuda.pools


def test_an_interrupt_leaves_nothing_behind(cuda):
    torch_cuda = cuda()

    def function():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CudaGraphs(DEVICE).capture(function)
    torch_cuda.assert_left()


# --- on a GPU ---------------------------------------------------------------------------------------


class Drops(TinyDenoiser):
    """A network whose steps need the generator, which a failed capture would leave unusable."""

    def forward(self, x_t, t):
        return nn.functional.dropout(super().forward(x_t, t), 0.1)


class Reads(Drops):
    """CUDA ends a capture in which a tensor is read."""

    def forward(self, x_t, t):
        return super().forward(x_t, t) * (1 + 0 * t[0].item())


class Raises(Drops):
    """Has an error of its own, in the step that is captured only."""

    calls = 0

    def forward(self, x_t, t):
        self.calls += 1
        if self.calls == WARM_UP_STEPS + 1:
            raise MemoryError("no more")
        return super().forward(x_t, t)


class Outgrows(Drops):
    """Takes `needs` bytes in every step, and asks for `asks` more, too many, in the one that is captured."""

    def __init__(self, needs: int = 1 << 20, asks: int = 1 << 48):
        super().__init__()
        self.needs, self.asks, self.calls = needs, asks, 0

    def forward(self, x_t, t):
        self.calls += 1
        kept = torch.zeros(self.needs, dtype=torch.uint8, device=x_t.device)
        if self.calls == WARM_UP_STEPS + 1:
            x_t = x_t + torch.empty(self.asks, dtype=torch.uint8, device=x_t.device)[0]
        return super().forward(x_t + kept[0], t)


def unlearner(model, device, **options):
    generator = torch.Generator().manual_seed(0)
    retain = ImageStore(torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8))
    model = model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    options = {"retain": retain, "batch_size": 2, "compile": False} | options
    return Unlearner(model, optimizer, linear_schedule(), Vanilla(), **options)


def current_stream(gpu):
    return torch.cuda.current_stream(gpu.device) if gpu.device.type == "cuda" else None


def assert_steps_go_on(run, gpu, caplog, error: str) -> None:
    """A step whose capture fails with `error`, and more after it; then the GPU is as usable as before."""
    stream = current_stream(gpu)
    with caplog.at_level(logging.WARNING, "fastunlearn"):
        outputs = [run.step() for _ in range(4)]
    assert f"could not be captured in a CUDA graph ({error}" in caplog.text
    assert run._replay.failed
    assert all(torch.isfinite(output.loss) for output in outputs)
    assert run.step_index == int(run._counter[1]) == WARM_UP_STEPS + 4
    assert int(run.skipped_steps) == 0
    assert current_stream(gpu) == stream
    assert_usable(gpu)


def assert_usable(gpu) -> None:
    """Memory is served and taken back, dropout draws, and others can capture, in torch's own way, too."""
    allocated = gpu.allocated()
    fresh = torch.zeros(1 << 20, device=gpu.device)
    del fresh
    assert gpu.allocated() == allocated
    ones, drawn = torch.ones(1000, device=gpu.device), torch.zeros(1000, device=gpu.device)
    assert not torch.equal(nn.functional.dropout(ones), nn.functional.dropout(ones))

    def function():
        drawn.copy_(nn.functional.dropout(ones))

    graphs = gpu.graphs()
    graphs.warm_up(function)
    seen = [drawn.clone()]
    again = graphs.capture(function)
    assert torch.equal(drawn, seen[0])
    for _ in range(2):
        again()
        seen.append(drawn.clone())
    if gpu.device.type == "cuda":
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            function()
        graph.replay()
        seen.append(drawn.clone())
    assert not any(torch.equal(*two) for two in combinations(seen, 2))


@pytest.mark.gpu
@pytest.mark.parametrize(("model", "error"), [(Reads, ""), (Raises, "MemoryError: no more"), (Outgrows, "")])
def test_steps_go_on_after_a_failed_capture(gpu, caplog, model, error):
    run = unlearner(model(), gpu.device)
    for _ in range(WARM_UP_STEPS):
        run.step()
    assert_steps_go_on(run, gpu, caplog, error)


@pytest.mark.gpu
def test_steps_go_on_where_memory_is_short(gpu, caplog):
    """The process may have little more than an eager step takes: it needs what the failed capture took."""
    if gpu.device.type != "cuda":
        pytest.skip("cannot be rehearsed: on a CPU no process is kept to a share of the memory")
    mib = 1 << 20
    unlearner(Drops(), gpu.device, replay=False).step()  # libraries keep some memory for every stream
    run = unlearner(Outgrows(64 * mib, 128 * mib), gpu.device)
    for _ in range(WARM_UP_STEPS):
        run.step()
    gc.collect()
    torch.cuda.empty_cache()
    allowed = torch.cuda.memory_reserved(gpu.device) + (64 + 48) * mib
    total = torch.cuda.get_device_properties(gpu.device).total_memory
    torch.cuda.set_per_process_memory_fraction(allowed / total, gpu.device)
    try:
        assert_steps_go_on(run, gpu, caplog, "OutOfMemoryError")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, gpu.device)


@pytest.mark.gpu
def test_a_failed_capture_may_be_followed_by_one_that_succeeds(gpu):
    """Of another run in the same process; the first one goes on eagerly beside it."""
    first, second = unlearner(Reads(), gpu.device), unlearner(Drops(), gpu.device)
    for _ in range(WARM_UP_STEPS + 2):
        first.step(), second.step()
    assert first._replay.failed
    assert second.replayed
    outputs = [run.step() for run in (first, second, first, second)]
    assert all(torch.isfinite(output.loss) for output in outputs)
