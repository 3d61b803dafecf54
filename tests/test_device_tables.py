"""Tables kept on devices: made once, no more than a number of them, and those of a CUDA graph for good."""

import pytest
import torch

from fastunlearn import LowPass, TimeWindow, neggrad_step
from fastunlearn.host import tables
from fastunlearn.host.tables import MOST, on_device
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def none_kept(monkeypatch):
    monkeypatch.setattr(tables, "_TABLES", {})
    monkeypatch.setattr(tables, "_CAPTURED", {})


class Maker:
    """Makes tables of one number, and counts them."""

    def __init__(self):
        self.made = []

    def __call__(self, number):
        self.made.append(number)
        return torch.tensor([number])


def test_a_table_is_made_once():
    make = Maker()
    first = on_device(make, (1,), CPU)
    assert on_device(make, (1,), CPU) is first
    assert on_device(make, (2,), CPU).tolist() == [2]
    assert make.made == [1, 2]


def test_the_table_that_was_asked_for_longest_ago_goes():
    make = Maker()
    for number in range(MOST):
        on_device(make, (number,), CPU)
    on_device(make, (0,), CPU)
    on_device(make, (MOST,), CPU)
    assert len(tables._TABLES) == MOST
    # 0 was asked for after 1.
    make.made.clear()
    on_device(make, (0,), CPU)
    assert make.made == []
    assert on_device(make, (1,), CPU).tolist() == [1]
    assert make.made == [1]


def test_steps_that_select_something_else_each_time_do_not_grow():
    images = torch.rand(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model, schedule = TinyDenoiser(), linear_schedule()
    for start in range(MOST // 2 + 20):
        selection = {"time_window": TimeWindow(start, start + 100), "lowpass": LowPass(0.5 + start / 1000)}
        neggrad_step(model, None, schedule, images, keep_grad=True, **selection)
    assert len(tables._TABLES) == MOST
    assert not tables._CAPTURED


def test_what_a_graph_reads_stays(monkeypatch):
    """Whether it was made before the capture or in it; and it is what is found after it."""
    make = Maker()
    before = on_device(make, (1,), CPU)
    with monkeypatch.context() as during:
        during.setattr(tables, "_captures", lambda device: True)
        captured = [on_device(make, (1,), CPU), on_device(make, (2,), CPU)]
    assert captured[0] is before
    make_others = Maker()
    for number in range(2 * MOST):
        on_device(make_others, (number,), CPU)
    for number, table in zip((1, 2), captured, strict=True):
        assert on_device(make, (number,), CPU) is table
    assert make.made == [1, 2]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_a_replayed_graph_reads_its_table():
    make, device = Maker(), torch.device("cuda", torch.cuda.current_device())
    out = torch.zeros(1, dtype=torch.int64, device=device)
    on_device(make, (7,), device)  # a capture copies nothing from the host
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out.copy_(on_device(make, (7,), device))
    make_others = Maker()
    for number in range(100, 100 + 2 * MOST):
        on_device(make_others, (number,), device)
    graph.replay()
    assert out.item() == 7
