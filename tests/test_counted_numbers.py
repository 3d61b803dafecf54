"""Counters, row numbers and seeds at the ends of their bits: refused by name, never wrapped around."""

import re

import pytest
import torch

from fastunlearn import SISS, ImageStore, Unlearner, Vanilla
from fastunlearn import functional as F
from fastunlearn.host import philox
from fastunlearn.host.philox import Noise
from fastunlearn.objective.draws import CounterSource, Purpose, rows_of_step
from fastunlearn.runs.pretraining import pretrain
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
SHAPE = (3, 1, 4, 4)
LAST_STEP = 2**32 - 1


def rows(count=8):
    """A store of `count` rows that are one row in memory, however many they are."""
    return ImageStore(torch.full((1, 1, 8, 8), 77, dtype=torch.uint8).expand(count, 1, 8, 8))


def unlearner(method=None, **options):
    model = TinyDenoiser()
    given = {"retain": rows(), "batch_size": 4, **options}
    return Unlearner(
        model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, method or Vanilla(), **given
    )


# --- row numbers --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("high", [1, 3, 2**24 + 1, 2**31 - 1, 2**31])
def test_integers_are_what_whole_numbers_make(high):
    counter = torch.tensor([7, 3, 0])
    words = philox.words((4096,), counter, Purpose.RETAIN_ROWS)[:, 0, 0].tolist()
    drawn = philox.integers(4096, high, counter, Purpose.RETAIN_ROWS).tolist()
    assert drawn == [word * high // 2**32 for word in words]
    assert 0 <= min(drawn) <= max(drawn) < high
    assert max(words) > 2**32 - 2**21  # such as overflow, if any do


@pytest.mark.parametrize("high", [0, -1, 2**31 + 1, 2**40])
def test_a_range_that_32_bits_do_not_reach_is_refused(high):
    """2^31 + 1 times the largest word is no int64: the rows were negative."""
    expected = rf"high: expected an integer in \[1, {2**31}\] .*, got {high}$"
    with pytest.raises(ValueError, match=expected):
        CounterSource(torch.tensor([0, 0, 0])).integers(5, high, Purpose.RETAIN_ROWS)
    with pytest.raises(ValueError, match=expected):
        rows_of_step(5, high, 0, 0, Purpose.RETAIN_ROWS, 0)


def test_a_store_of_2_to_the_31_rows_takes_a_step():
    run = unlearner(retain=rows(2**31), batch_size=64)
    index = run._rows("rows", None, run.retain, CounterSource(run._counter), Purpose.RETAIN_ROWS)
    assert index.min() >= 0
    assert 2**30 < index.max() < 2**31
    assert not run.step().skipped


@pytest.mark.parametrize("branch", ["forget", "retain"])
def test_a_store_of_more_rows_is_refused(branch):
    stores = {"forget": rows(), "retain": rows(), branch: rows(2**31 + 1)}
    with pytest.raises(ValueError, match=rf"{branch}: expected at most 2\^31 rows .*, got {2**31 + 1}$"):
        unlearner(SISS(), allow_overlap=True, **stores)


# --- steps --------------------------------------------------------------------------------------------------


def test_a_run_ends_before_its_numbers_repeat():
    run = unlearner()
    first = run.step()
    run.load_state_dict({"seed": 0, "step_index": LAST_STEP, "skipped_steps": 5})
    last = run.step()
    assert run.step_index == LAST_STEP + 1
    assert last.loss != first.loss
    before = [parameter.detach().clone() for parameter in run.model.parameters()]
    with pytest.raises(ValueError, match=rf"step: expected at most 2\^32 steps of a seed, got step {2**32}"):
        run.step()
    assert all(torch.equal(one, other) for one, other in zip(run.model.parameters(), before, strict=True))
    assert run.state_dict() == {"seed": 0, "step_index": 2**32, "skipped_steps": 5}
    unlearner().load_state_dict(run.state_dict())  # a run that is over can be looked at


def test_rows_that_are_brought_ahead_end_there_too():
    run = unlearner(residency="host")
    run.load_state_dict({"seed": 0, "step_index": LAST_STEP, "skipped_steps": 0})
    run.step()  # while the rows of the next one are asked for
    with pytest.raises(ValueError, match="step: expected at most"):
        run.step()
    with pytest.raises(ValueError, match=rf"step: expected an integer in \[0, {LAST_STEP}\], got {2**32}"):
        rows_of_step(5, 8, 0, 0, Purpose.RETAIN_ROWS, 2**32)


def test_more_steps_than_there_are_numbers_for_are_refused_at_once():
    unlearner(total_steps=2**32)
    with pytest.raises(ValueError, match=rf"total_steps: expected at most 2\^32 .*, got {2**32 + 1}"):
        unlearner(total_steps=2**32 + 1)


@pytest.mark.parametrize(
    ("name", "value", "error"),
    [
        ("step_index", -1, ValueError),
        ("step_index", 2**32 + 1, ValueError),
        ("step_index", 2.0, TypeError),
        ("step_index", True, TypeError),
        ("step_index", "2", TypeError),
        ("skipped_steps", -1, ValueError),
        ("skipped_steps", None, TypeError),
    ],
)
def test_a_state_with_numbers_that_no_run_counts_is_refused(name, value, error):
    run = unlearner()
    run.step()
    with pytest.raises(error, match=f"{name}: expected an integer"):
        run.load_state_dict({"seed": 0, "step_index": 3, "skipped_steps": 0, name: value})
    assert run.step_index == int(run._counter[1]) == 1


# --- noise --------------------------------------------------------------------------------------------------

WRAPPED = {
    "step 2^32": ([0, 2**32, 0], rf"noise.counter\[1\]: .* \(the step\), got {2**32}"),
    "step -1": ([0, -1, 0], r"noise.counter\[1\]: .* \(the step\), got -1"),
    "first row 2^32": ([0, 0, 2**32], r"noise.counter\[2\]: .* \(the first of its rows\)"),
    "last row 2^32": ([0, 0, 2**32 - 2], r"noise.counter\[2\]: .* \(the first of its rows\)"),
    "first row -1": ([0, 0, -1], r"noise.counter\[2\]: .* \(the first of its rows\), got -1"),
}


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize(("counter", "expected"), WRAPPED.values(), ids=WRAPPED)
def test_a_counter_that_wraps_around_is_refused(counter, expected, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    noise = Noise(torch.tensor(counter), Purpose.FORGET_NOISE, SHAPE)
    with pytest.raises(ValueError, match=expected):
        F.noised(torch.zeros(SHAPE), noise, torch.zeros(3, dtype=torch.int64), SCHEDULE)


def test_the_last_counter_is_none_of_the_first_ones():
    counters = (
        [0, 0, 0],
        [0, LAST_STEP, 0],
        [0, 0, 2**32 - 3],
        [2**63 - 1, 0, 0],
        [-1, 0, 0],
        [-(2**63), 0, 0],
        [2**32, 0, 0],
    )
    timesteps = torch.full((3,), 999)
    draws = []
    for counter in counters:
        noise = Noise(torch.tensor(counter), Purpose.FORGET_NOISE, SHAPE)
        draws.append(F.noised(torch.zeros(SHAPE), noise, timesteps, SCHEDULE).x_t.flatten())
    for first, one in enumerate(draws):
        for other in draws[first + 1 :]:
            assert not (one[:, None] == other).any()


@pytest.mark.parametrize("shape", [(2**32 + 1, 1), (1, 2**34 + 1)])
def test_more_numbers_than_a_counter_tells_apart_are_refused(shape):
    for draw in (philox.normal, philox.uniform):
        with pytest.raises(ValueError, match=r"shape: expected at most 2\^32 rows of 2\^34 random numbers"):
            draw(shape, torch.tensor([0, 0, 0]), Purpose.FORGET_NOISE)


# --- seeds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [-1, 2**63, 2**64])
def test_seeds_outside_64_bits_are_refused(seed):
    latents = torch.zeros(2, 1, 2, 2)
    for call in (
        lambda: unlearner(seed=seed),
        lambda: ImageStore(latents, std=latents, latents=True).freeze(seed),
    ):
        with pytest.raises(
            ValueError, match=re.escape(f"seed: expected an integer in [0, {2**63 - 1}], got {seed}")
        ):
            call()


def test_a_store_whose_rows_a_counter_does_not_tell_apart_is_not_sampled():
    latents = torch.zeros(1, 1, 2, 2)
    store = ImageStore(latents, std=latents, latents=True)
    many = store.like(latents.expand(2**32 + 1, 1, 2, 2), latents.expand(2**32 + 1, 1, 2, 2))
    with pytest.raises(ValueError, match=r"seed: expected None for a store of more than 2\^32 rows"):
        many.freeze(3)


@pytest.mark.parametrize(
    ("seed", "error"), [(-1, ValueError), (2**32, ValueError), (2**32 + 1, ValueError), (1.0, TypeError)]
)
def test_pretraining_takes_no_seed_of_which_torch_would_read_half(seed, error, tmp_path):
    """Seeds 1 and 2^32 + 1 are one to torch's generator on a CPU."""
    with pytest.raises(error, match=r"seed: expected an integer"):
        pretrain(rows(), None, tmp_path / "model", seed=seed)
