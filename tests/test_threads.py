"""What belongs to the process and is changed for a while: two threads that do so at once leave it as it was.

Threads are held where they are by events. None of this depends on how fast they run.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fastunlearn.metrics import inception
from fastunlearn.models.sampling import eval_mode
from fastunlearn.neighbors import uint8
from fastunlearn.neighbors.nearest import nearest_neighbors

PATIENCE = 60  # seconds, after which a test has failed


class Held:
    """A thread that runs `work(pause)`: `pause()` says that it is there, and waits to be told to go on."""

    def __init__(self, work: Callable):
        self.came, self.told, self.result, self.error = threading.Event(), threading.Event(), None, None
        self._thread = threading.Thread(target=self._run, args=(work,), daemon=True)
        self._thread.start()
        self.until_there()

    def _run(self, work: Callable) -> None:
        try:
            self.result = work(self._pause)
        except BaseException as error:
            self.error = error
            self.came.set()

    def _pause(self) -> None:
        if not self.told.is_set():
            self.came.set()
            assert self.told.wait(PATIENCE)

    def until_there(self) -> None:
        assert self.came.wait(PATIENCE)
        assert self.error is None, self.error

    def finish(self):
        self.told.set()
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        assert self.error is None, self.error
        return self.result


class AtProducts(TorchFunctionMode):
    """Calls `there` before every product of matrices in this thread."""

    def __init__(self, there: Callable):
        super().__init__()
        self.there = there

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in (torch.Tensor.matmul, torch.Tensor.__matmul__):
            self.there()
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rounding_allowed():
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision("highest")
    for operation in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):
        operation.fp32_precision = "none"


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.usefixtures("rounding_allowed")
def test_two_searches_leave_the_precision_of_products_as_it_was(first):
    """Both are held amid their products; the other one's must not be rounded when the first is done."""
    generator = torch.Generator().manual_seed(0)
    forget, retain = torch.randn(4, 16, generator=generator), torch.randn(64, 16, generator=generator)
    expected = nearest_neighbors(forget, retain, 3, backend="exact")

    def search(pause):
        with AtProducts(pause):
            return nearest_neighbors(forget, retain, 3, backend="exact")

    searches = [Held(search), Held(search)]
    for place in (first, 1 - first):
        assert torch.get_float32_matmul_precision() == "highest"
        found = searches[place].finish()
        assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
    assert torch.get_float32_matmul_precision() == "high"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


# --- threads of torch ---------------------------------------------------------------------------------------


@pytest.fixture
def two_threads():
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


def in_a_new_thread(function: Callable):
    """What `function` returns in a thread that torch has not seen before."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(PATIENCE)
    return found[0]


@pytest.mark.usefixtures("two_threads")
def test_the_threads_of_a_search_do_not_slow_others_down():
    """Each of its threads computes alone. What starts meanwhile finds the process's setting."""

    def search(pause):
        with uint8._workers(torch.device("cpu")) as (count, run):
            alone = []
            run(lambda part: alone.append(torch.get_num_threads()), [slice(0, 1)] * 8)
            pause()
            return count, alone, torch.get_num_threads()

    search = Held(search)
    assert in_a_new_thread(torch.get_num_threads) == 2
    assert search.finish() == (2, [1] * 8, 2)
    assert in_a_new_thread(torch.get_num_threads) == torch.get_num_threads() == 2


# --- random numbers -----------------------------------------------------------------------------------------


def test_a_score_leaves_torchs_random_numbers_as_they_were():
    """Two at once: the second waits, for it would find, and put back, what the first has seeded."""
    torch.manual_seed(5)
    before = torch.get_rng_state()
    drawn = []

    def score(pause):
        with inception._seeded(0):
            pause()
            drawn.append(torch.rand(3).tolist())

    first = Held(score)
    second = threading.Thread(target=score, args=(lambda: None,))
    second.start()
    first.finish()
    second.join(PATIENCE)
    assert torch.equal(torch.get_rng_state(), before)
    assert drawn == [torch.rand(3, generator=torch.Generator().manual_seed(0)).tolist()] * 2


def test_a_score_leaves_the_generators_of_gpus_alone(monkeypatch):
    seeded = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    monkeypatch.setattr(torch.cuda, "_is_in_bad_fork", lambda: False)
    with inception._seeded(0):
        pass
    assert seeded == []
    torch.random.manual_seed(0)  # what would have been found
    assert seeded == [0]


# --- modules ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1])
def test_a_model_that_two_threads_evaluate_is_in_training_mode_again(first):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model[1].eval()
    modes = [module.training for module in model.modules()]

    def evaluate(pause):
        with eval_mode(model):
            pause()

    threads = [Held(evaluate), Held(evaluate)]
    threads[first].finish()
    assert not any(module.training for module in model.modules())
    threads[1 - first].finish()
    assert [module.training for module in model.modules()] == modes == [True, True, False, False, False]


def test_a_part_of_a_model_that_is_evaluated_longer_keeps_its_mode():
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())

    def evaluate_part(pause):
        with eval_mode(model[1]):
            pause()

    with eval_mode(model):
        part = Held(evaluate_part)
    assert [module.training for module in model.modules()] == [True, True, False]
    part.finish()
    assert all(module.training for module in model.modules())
