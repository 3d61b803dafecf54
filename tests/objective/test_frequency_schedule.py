"""LowPass with a radius that moves: which frequencies are in at which step, exactly; nothing waits."""

import math
from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn import LowPass
from fastunlearn import functional as F
from fastunlearn.objective import frequency
from fastunlearn.objective.selection import check_band
from fastunlearn.ops.lowpass_residual import lowpass_residual
from fastunlearn.testing.host_sync import no_host_sync

SCHEDULES = {
    "linear_increase": dict(start=0.1, stop=0.7),
    "linear_decay": dict(start=0.7, stop=0.1),
    "step_increase": dict(start=0.1, stop=0.7),
    "step_decay": dict(start=0.7, stop=0.1),
}
RADII_TO_2 = {name: (0.1, 2) if name.endswith("increase") else (2, 0.1) for name in SCHEDULES}
schedules = pytest.mark.parametrize("schedule", SCHEDULES)


def scheduled(schedule, **options):
    return LowPass(schedule=schedule, **(SCHEDULES[schedule] | options))


def radius_of(schedule, start, stop, step, total_steps, stages):
    """The formula of the docs, of exact fractions."""
    start, stop = (Fraction(str(radius)) for radius in (start, stop))
    if schedule.startswith("linear"):
        return start + (stop - start) * Fraction(step, total_steps - 1)
    return start + (stop - start) * Fraction(step * stages // total_steps, stages - 1)


def padded(table, shape):
    """A table without its empty rows and columns has them again."""
    whole = torch.zeros(shape)
    whole[: table.shape[0], : table.shape[1]] = table
    return whole


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    schedule=st.sampled_from(sorted(SCHEDULES)),
    height=st.integers(1, 24),
    width=st.integers(1, 24),
    total_steps=st.integers(5, 40),
    stages=st.integers(2, 5),
    low=st.integers(0, 60),
    more=st.integers(1, 80),
    kind=st.sampled_from(("disc", "box")),
    unit=st.sampled_from(("nyquist", "bins")),
    band=st.sampled_from(("low", "high", "mid")),
)
def test_the_mask_of_every_step_is_that_of_its_radius(
    schedule, height, width, total_steps, stages, low, more, kind, unit, band
):
    """And it has one shape, and nothing but zeros where the largest radius ends."""
    scale = 100 if unit == "nyquist" else 8
    first, last = ((low + 1) / scale, (low + 1 + more) / scale)
    start, stop = (first, last) if schedule.endswith("increase") else (last, first)
    options = dict(kind=kind, unit=unit, band=band, high_frequency_weight=0.25)
    if band == "mid":
        options["inner"] = low / scale
    stepwise = schedule.startswith("step")
    lowpass = LowPass(
        schedule=schedule, start=start, stop=stop, stages=stages if stepwise else None, **options
    )
    shape = None
    for step in range(total_steps):
        table, *values = lowpass.mask_at(height, width, step, total_steps)
        radius = radius_of(schedule, start, stop, step, total_steps, stages)
        expected, *expected_values = LowPass(radius, **options).mask(height, width)
        assert table.dtype == torch.float32
        assert torch.equal(table, padded(expected, table.shape))
        assert values == expected_values
        assert shape in (None, table.shape)
        shape = table.shape
    assert shape == LowPass(last, **options).mask(height, width)[0].shape


@schedules
def test_radii_begin_with_start_and_end_with_stop(schedule):
    lowpass, total_steps = scheduled(schedule), 12
    start, stop = (Fraction(str(SCHEDULES[schedule][name])) for name in ("start", "stop"))
    radii = [lowpass.at(step, total_steps).radius for step in range(total_steps)]
    assert (radii[0], radii[-1]) == (start, stop)
    assert radii == sorted(radii, reverse=start > stop)
    if schedule.startswith("step"):  # four stages of three steps
        fourths = [start, start + (stop - start) / 3, stop - (stop - start) / 3, stop]
        assert radii == [radius for radius in fourths for _ in range(3)]
    else:
        assert {after - before for before, after in pairwise(radii)} == {(stop - start) / 11}
    assert lowpass.at(10**6, total_steps).radius == stop


@schedules
def test_frequencies_come_or_go_and_never_return(schedule):
    lowpass, total_steps = scheduled(schedule), 9
    tables = [lowpass.mask_at(20, 28, step, total_steps)[0] for step in range(total_steps)]
    pairs = list(pairwise(tables))
    assert all(((after >= before) if lowpass.grows else (after <= before)).all() for before, after in pairs)
    assert any(not torch.equal(before, after) for before, after in pairs)


@schedules
def test_the_table_holds_the_steps_of_changes(schedule):
    lowpass, total_steps = scheduled(schedule), 9
    steps = lowpass.steps(20, 28, total_steps)
    assert steps.dtype == torch.int32
    assert int(steps.min()) == 0
    assert int(steps.max()) == total_steps  # what never comes, or what stays
    assert steps[0, 0] == (0 if lowpass.grows else total_steps)  # the mean is always in
    for step in range(total_steps):
        within = steps <= step if lowpass.grows else steps > step
        assert torch.equal(within.float(), lowpass.mask_at(20, 28, step, total_steps)[0])


def test_a_frequency_on_the_radius_is_in_at_that_step():
    """In bins: radius 5 at step 5 of 11 exactly, and (3, 4) with it, which a rounded 4.999... would miss."""
    growing = LowPass(schedule="linear_increase", start=0, stop=10, unit="bins").steps(32, 32, 11)
    assert [int(growing[place]) for place in ((3, 4), (5, 0), (0, 5), (1, 1), (6, 8))] == [5, 5, 5, 2, 10]
    shrinking = LowPass(schedule="linear_decay", start=10, stop=0, unit="bins").steps(32, 32, 11)
    # 10 - s >= 5 up to s = 5: without it from step 6 on.
    assert [int(shrinking[place]) for place in ((3, 4), (5, 0), (0, 0), (6, 8))] == [6, 6, 11, 1]
    # 0.1 + 0.6 s / 6: three tenths at s = 2, the third frequency of 20 of an axis.
    tenths = LowPass(schedule="linear_increase", start=0.1, stop=0.7).steps(20, 20, 7)
    assert tenths[0].tolist() == [0, 0, 1, 2, 3, 4, 5, 6]


def test_a_schedule_of_one_step_has_its_start():
    assert LowPass(schedule="linear_increase", start=0.2, stop=0.5).at(0, 1).radius == Fraction(1, 5)
    assert LowPass(schedule="linear_decay", start=0.5, stop=0.2).at(0, 1).radius == Fraction(1, 2)
    for schedule in ("linear_increase", "linear_decay"):
        lowpass = scheduled(schedule)
        first = LowPass(lowpass.start).mask(20, 20).table
        for step in (0, 1, 10):  # and later ones
            table = lowpass.mask_at(20, 20, step, 1).table
            assert torch.equal(table, padded(first, table.shape))


def test_the_radius_stands_for_the_larger_one():
    for schedule, smaller, larger in (("linear_increase", "start", "stop"), ("step_decay", "stop", "start")):
        lowpass = LowPass(0.5, schedule=schedule, **{smaller: 0.2})
        assert getattr(lowpass, larger) == 0.5
        assert lowpass == LowPass(schedule=schedule, **{smaller: 0.2, larger: 0.5})
        assert lowpass == LowPass(0.5, schedule=schedule, **{smaller: 0.2, larger: 0.5})
    assert len({scheduled("step_decay"), scheduled("step_decay", stages=4), scheduled("linear_decay")}) == 2


def test_a_fixed_radius_is_as_it_was():
    lowpass = LowPass(0.5, high_frequency_weight=0.3)
    assert not lowpass.scheduled
    assert lowpass.at(3, 10) is lowpass
    for found, expected in zip(lowpass.mask_at(12, 9, 3, 10), lowpass.mask(12, 9), strict=True):
        assert torch.equal(torch.as_tensor(found), torch.as_tensor(expected))


@schedules
def test_each_radius_is_looked_up_once(schedule, monkeypatch):
    """Of 33 x 33 frequencies many have one radius."""
    looked_up = []
    root = frequency._root
    monkeypatch.setattr(frequency, "_root", lambda *square: looked_up.append(square) or root(*square))
    scheduled(schedule, **dict(zip(("start", "stop"), RADII_TO_2[schedule], strict=True))).steps(64, 64, 9)
    assert len(looked_up) == len({u**2 + v**2 for u in range(33) for v in range(33)}) < 33 * 33 / 2


@schedules
def test_a_check_and_its_masks_share_one_table(schedule, monkeypatch):
    made = []
    steps = LowPass.steps
    monkeypatch.setattr(LowPass, "steps", lambda self, *size: made.append(size) or steps(self, *size))
    lowpass = scheduled(schedule, high_frequency_weight=0.0625)  # of no other test
    check_band(lowpass, 18, 14, 0, 9)
    for device in ("cpu", "meta"):
        for step in range(3):
            lowpass.mask_at(18, 14, step, 9, torch.device(device))
    assert made == [(18, 14, 9)]


# --- on the device ------------------------------------------------------------------------------------------


@schedules
@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("counted", [True, False])
def test_nothing_is_read(schedule, device, counted):
    """After a first call that makes the table: for a counter on the device, and for a number of the host."""
    lowpass, device = scheduled(schedule), torch.device(device)
    step = torch.tensor(3, device=device) if counted else 3
    lowpass.mask_at(16, 12, step, 10, device)
    with no_host_sync(device.type):
        table, *_ = lowpass.mask_at(16, 12, step, 10, device)
    assert table.device == device
    assert table.shape == lowpass.steps(16, 12, 10).shape


@schedules
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_counter_is_a_number(schedule, dtype):
    lowpass, counter = scheduled(schedule), torch.zeros((), dtype=dtype)
    for step in range(14):  # beyond the last of the ten: as the last
        counter.fill_(step)
        found, expected = (lowpass.mask_at(16, 12, which, 10)[0] for which in (counter, step))
        assert torch.equal(found, expected)
        assert torch.equal(found, lowpass.mask_at(16, 12, min(step, 9), 10)[0])
    last = lowpass.mask_at(16, 12, torch.tensor(2**32 + 1), 10)[0]
    assert torch.equal(last, lowpass.mask_at(16, 12, 9, 10)[0])


@pytest.mark.parametrize("backend", ["eager", "auto", "reference"])
@pytest.mark.parametrize("weight", [0.0, 0.3])
def test_losses_are_those_of_the_radius_of_the_step(backend, weight, monkeypatch):
    """The op takes a table with empty rows and columns for what it is."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, 3, 2, 12, 16, generator=generator, dtype=torch.float64)
    lowpass = scheduled("linear_increase", high_frequency_weight=weight)
    for step in (0, 2, 4):
        mask = lowpass.mask_at(12, 16, torch.tensor(step), 5)
        assert step == 4 or not mask[0][-1].any()
        found = lowpass_residual(prediction, target, torch.ones(3), *mask)
        expected = F.weighted_residual(prediction, target, None, lowpass.at(step, 5))
        for one, two in zip(found, expected, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)


# --- what is refused ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(), TypeError, r"^radius: expected a number, got None"),
        (
            dict(radius=0.5, schedule="cosine"),
            ValueError,
            r"^schedule: expected one of fixed, linear_increase, ",
        ),
        (dict(radius=0.5, start=0.1), ValueError, r"^start: expected None with schedule='fixed', got 0.1"),
        (dict(radius=0.5, stop=0.1), ValueError, r"^stop: expected None with schedule='fixed', got 0.1"),
        (dict(radius=0.5, stages=3), ValueError, r"^stages: expected None with schedule='fixed', got 3"),
        (dict(radius=0.5, schedule="step_decay"), TypeError, r"^stop: expected a number, got None"),
        (dict(schedule="linear_increase", start=0.1), TypeError, r"^stop: expected a number, got None"),
        (dict(schedule="linear_increase", stop=0.1), TypeError, r"^start: expected a number, got None"),
        (
            dict(schedule="linear_increase", start=-0.1, stop=0.5),
            ValueError,
            r"^start: expected a finite number in \[0, inf\), got -0.1",
        ),
        (
            dict(schedule="linear_increase", start=0.5, stop=0.1),
            ValueError,
            r"^stop: expected a radius above start, 0.5, with linear_increase, got 0.1",
        ),
        (
            dict(schedule="step_decay", start=0.5, stop=0.5),
            ValueError,
            r"^start: expected a radius above stop, 0.5, with step_decay, got 0.5",
        ),
        (
            dict(radius=0.3, schedule="linear_decay", start=0.5, stop=0.1),
            ValueError,
            r"^radius: expected None, or start, 0.5, with linear_decay, got 0.3",
        ),
        (
            dict(schedule="linear_decay", start=0.5, stop=0.1, stages=3),
            ValueError,
            r"^stages: expected None with schedule='linear_decay', got 3",
        ),
        (
            dict(schedule="step_decay", start=0.5, stop=0.1, stages=1),
            ValueError,
            r"^stages: expected an integer >= 2, got 1",
        ),
        (
            dict(schedule="step_decay", start=0.5, stop=0.1, stages=2.0),
            TypeError,
            r"^stages: expected an integer, got 2.0",
        ),
        (
            dict(schedule="linear_decay", start=0.5, stop=0.1, band="mid", inner=0.1),
            ValueError,
            r"^inner: expected a number below every radius of the schedule, 0.1, got 0.1",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LowPass(**arguments)


@schedules
def test_a_schedule_without_its_steps_is_refused(schedule):
    lowpass = scheduled(schedule)
    message = rf"^schedule: expected a step and total_steps with {schedule} \(see mask_at\), got neither"
    with pytest.raises(ValueError, match=message):
        lowpass.mask(8, 8)
    with pytest.raises(ValueError, match=message):
        F.denoising_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), lowpass=lowpass)
    for total_steps in (None, 7.0, 0):
        for call in (
            lambda given: lowpass.steps(8, 8, given),
            lambda given: lowpass.at(0, given),
            lambda given: lowpass.mask_at(8, 8, 0, given),
        ):
            with pytest.raises((TypeError, ValueError), match=r"^total_steps: expected an integer"):
                call(total_steps)


def test_bad_steps():
    lowpass = scheduled("step_decay")
    with pytest.raises(
        ValueError, match=r"^total_steps: expected an integer in \[4, .*one for each stage.* got 3"
    ):
        lowpass.steps(8, 8, 3)
    for step, error in ((-1, ValueError), (1.0, TypeError), (None, TypeError)):
        with pytest.raises(error, match=r"^step: expected an integer"):
            lowpass.mask_at(8, 8, step, 10)
        with pytest.raises(error, match=r"^step: expected an integer"):
            lowpass.at(step, 10)
    with pytest.raises(TypeError, match=r"^step: expected an integer tensor of 0 dimensions"):
        lowpass.mask_at(8, 8, torch.tensor(1.0), 10)
    with pytest.raises(ValueError, match=r"^step: expected an? integer tensor of 0 dimensions"):
        lowpass.mask_at(8, 8, torch.tensor([1]), 10)
    with pytest.raises(ValueError, match=r"^schedule: expected one that moves the radius, got 'fixed'"):
        LowPass(0.5).steps(8, 8, 10)


def test_a_mask_of_nothing_at_any_step_is_refused():
    refused = r"^LowPass: expected a band with frequencies of images of 8 x 8, got none in the "
    message = refused + "mid band, disc of radius 0.45, in nyquist, without the radius 0.4$"
    for schedule, radii in (("linear_increase", (0.45, 0.9)), ("linear_decay", (0.9, 0.45))):
        start, stop = radii
        with pytest.raises(ValueError, match=message):
            LowPass(schedule=schedule, start=start, stop=stop, band="mid", inner=0.4).steps(8, 8, 10)
    message = refused + "high band, disc of radius 1.5, in nyquist$"
    for schedule, (start, stop) in (("step_increase", (0.5, 1.5)), ("step_decay", (1.5, 0.5))):
        with pytest.raises(ValueError, match=message):
            LowPass(schedule=schedule, start=start, stop=stop, band="high").steps(8, 8, 10)
        soft = LowPass(schedule=schedule, start=start, stop=stop, band="high", high_frequency_weight=0.1)
        assert soft.steps(8, 8, 10).shape == (5, 5)
    assert math.isclose(soft.mask_at(8, 8, 0, 10)[1], 0.1)


def test_a_step_below_zero_is_refused_or_makes_a_mask_of_nan(monkeypatch):
    """Off the CPU nobody reads it: a loss of NaN skips the step, and one of an empty band would not."""
    lowpass = LowPass(schedule="linear_increase", start=0.2, stop=0.9)
    with pytest.raises(ValueError, match=r"^step: expected an integer >= 0, got -1"):
        lowpass.mask_at(8, 8, torch.tensor(-1), 10)
    monkeypatch.setattr("fastunlearn.host.check.readable", lambda tensor: False)
    assert lowpass.mask_at(8, 8, torch.tensor(-1), 10).table.isnan().all()
    assert not lowpass.mask_at(8, 8, torch.tensor(0), 10).table.isnan().any()


def test_a_step_of_a_small_dtype_in_a_long_run():
    lowpass = LowPass(schedule="linear_increase", start=0.2, stop=0.9)
    for dtype in (torch.uint8, torch.int8):
        table = lowpass.mask_at(8, 8, torch.tensor(100, dtype=dtype), 1000).table
        assert torch.equal(table, lowpass.mask_at(8, 8, 100, 1000).table)
