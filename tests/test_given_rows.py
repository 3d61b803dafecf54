"""Rows that a caller gives: refused where they can be read, never counted from the end, no step on a GPU."""

import copy

import pytest
import torch

from fastunlearn import Draws, ImageStore, Unlearner
from fastunlearn import functional as F
from fastunlearn.host import check
from fastunlearn.host.store import Rows
from fastunlearn.methods import Pass
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.methods import compared_with, every_variant

SCHEDULE = linear_schedule()
METHODS = every_variant(k=2)
CASES = [(method, branch) for method in METHODS for branch in ("forget", "retain") if branch in method.needs]
GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.randint(0, 256, (24, 1, 8, 8), generator=GENERATOR, dtype=torch.uint8)


def unlearner(method, **options):
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    stores = {"forget": ImageStore(IMAGES[:4]), "retain": ImageStore(IMAGES[4:])}
    options |= compared_with(method, TinyDenoiser(seed=1))
    return Unlearner(model, optimizer, SCHEDULE, method, **stores, batch_size=3, **options)


def given(branch, row, dtype=torch.int64):
    return Draws(**{f"{branch}_rows": torch.tensor([0, row, 2], dtype=dtype)})


@pytest.mark.parametrize(("method", "branch"), CASES, ids=str)
@pytest.mark.parametrize("row", [-1, 20])
def test_an_unlearner_refuses_rows_outside_its_store(method, branch, row):
    expected = rf"draws.{branch}_rows: expected rows in \[0, (3|19)\], got rows in "
    with pytest.raises(ValueError, match=expected):
        unlearner(method).step(given(branch, row))


@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize(("method", "branch"), CASES, ids=str)
@pytest.mark.parametrize("row", [-1, 20, 2**62])
def test_where_nobody_looks_the_step_is_skipped(method, branch, row, residency, monkeypatch):
    """As on a GPU, where a kernel would read beside the store: no update comes of it."""
    monkeypatch.setattr(check, "readable", lambda tensor: False)
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])
    run = unlearner(method, residency=residency)
    before = copy.deepcopy(run.model.state_dict())
    assert run.step(given(branch, row)).skipped
    assert all(torch.equal(value, before[name]) for name, value in run.model.state_dict().items())
    assert not run.step(given(branch, 1)).skipped


@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize(("method", "branch"), CASES, ids=str)
def test_bytes_are_rows_and_no_mask(method, branch, backend, residency, monkeypatch):
    """torch takes an index of uint8 for a mask."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    losses = [
        unlearner(method, residency=residency).step(given(branch, 1, dtype)).loss
        for dtype in (torch.int64, torch.int32, torch.uint8)
    ]
    assert losses[0] == losses[1] == losses[2]


INSIDE, OUTSIDE = torch.tensor([0, 2]), [torch.tensor([0, -1]), torch.tensor([0, 24])]
NOISE, TIMESTEPS = torch.zeros(2, 1, 8, 8), torch.tensor([3, 500])
FUNCTIONS = {
    "images": lambda rows: F.noised(rows, NOISE, TIMESTEPS, SCHEDULE),
    "forget": lambda rows: F.redirect(rows, rows_of(INSIDE[:, None]), NOISE, TIMESTEPS, SCHEDULE),
    "neighbors": lambda rows: F.redirect(
        rows_of(INSIDE), Rows(rows.images, rows.index[:, None]), NOISE, TIMESTEPS, SCHEDULE
    ),
    "retain": lambda rows: F.mixture(rows, rows_of(INSIDE), NOISE, TIMESTEPS, SCHEDULE, 0.5, TIMESTEPS > 5),
}


def rows_of(index):
    return Rows(IMAGES, index)


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("index", OUTSIDE, ids=["-1", "24"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions_refuse_rows_outside_their_store(name, index, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    FUNCTIONS[name](rows_of(INSIDE))
    with pytest.raises(ValueError, match=rf"{name}.index: expected rows in \[0, 23\], got rows in "):
        FUNCTIONS[name](rows_of(index))
