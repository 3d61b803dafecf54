"""LowPass: which frequencies a mask holds, exactly, and what is refused."""

import copy
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn import functional as F
from fastunlearn.objective.frequency import BandMask, LowPass


def held(lowpass, height, width):
    """The frequencies in the table of the mask."""
    table, *_ = lowpass.mask(height, width)
    assert table.dtype == torch.float32
    assert table.shape[0] <= height // 2 + 1
    assert table.shape[1] <= width // 2 + 1
    assert set(table.unique().tolist()) <= {0.0, 1.0}
    return {(int(u), int(v)) for u, v in table.nonzero()}


def within(height, width, condition):
    return {(u, v) for u in range(height // 2 + 1) for v in range(width // 2 + 1) if condition(u, v)}


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    hundredths=st.integers(0, 150),
    kind=st.sampled_from(("disc", "box")),
    unit=st.sampled_from(("nyquist", "bins")),
)
def test_masks_hold_what_their_definition_says(height, width, hundredths, kind, unit):
    """Compared in integers, for radii of two decimals: (u / (H/2))^2 + (v / (W/2))^2 <= (h/100)^2, times (100
    H W)^2.
    """
    radius = hundredths / 100 if unit == "nyquist" else hundredths / 10
    rows, columns, square = (
        (200 * width, 200 * height, hundredths * height * width)
        if unit == "nyquist"
        else (10, 10, hundredths)
    )

    def condition(u, v):
        u, v = u * rows, v * columns
        return u <= square and v <= square if kind == "box" else u**2 + v**2 <= square**2

    assert held(LowPass(radius, kind=kind, unit=unit), height, width) == within(height, width, condition)


@pytest.mark.parametrize(
    ("radius", "size", "last"),
    [(0.3, 20, 3), (0.7, 20, 7), (0.1, 200, 10), (Fraction(1, 3), 6, 1), (0.29, 200, 29), (0.58, 100, 29)],
)
def test_a_frequency_on_the_radius_is_in(radius, size, last):
    """Where float arithmetic drops it: 0.3 lies below 3/10, and 0.58 * 50 below 29."""
    assert max(u for u, _ in held(LowPass(radius), size, size)) == last


def test_a_pythagorean_frequency_on_the_radius_is_in():
    assert {(3, 4), (4, 3), (0, 5)} <= held(LowPass(5, unit="bins"), 32, 32)
    assert {(3, 4), (4, 3), (0, 5)} <= held(LowPass(0.5), 20, 20)


def test_radius_counts_for_each_axis():
    assert held(LowPass(0.5, kind="box"), 16, 8) == within(16, 8, lambda u, v: u <= 4 and v <= 2)


def test_bands_share_out_the_frequencies():
    disc, ring, all_of_them = (
        held(mask, 32, 20) for mask in (LowPass(0.4), LowPass(0.8, band="mid", inner=0.4), LowPass(0.8))
    )
    assert disc & ring == set()
    assert disc | ring == all_of_them


def test_values_inside_and_outside():
    assert LowPass(0.5, high_frequency_weight=0.3).mask(8, 8)[1:] == (1.0, 0.3)
    assert LowPass(0.5, band="mid", inner=0.2, high_frequency_weight=0.3).mask(8, 8)[1:] == (1.0, 0.3)
    table, inside, outside = LowPass(0.5, band="high", high_frequency_weight=0.3).mask(8, 8)
    assert (inside, outside) == (0.3, 1.0)
    assert torch.equal(table, LowPass(0.5).mask(8, 8)[0])


def test_table_is_no_larger_than_its_ones():
    assert LowPass(0.5).mask(32, 16)[0].shape == (9, 5)
    assert LowPass(0).mask(32, 16)[0].shape == (1, 1)
    assert LowPass(2).mask(7, 4)[0].shape == (4, 3)


def test_a_mask_is_for_one_size_of_images():
    """Those of 16 and of 8 pixels have other frequencies; a mask without a size is taken at its word."""
    lowpass = LowPass(0.5)
    moving = LowPass(schedule="linear_increase", start=0.2, stop=0.9)
    small, large = torch.ones(1, 1, 8, 8), torch.zeros(1, 1, 8, 16)
    for mask in (lowpass.mask(8, 16), lowpass.mask_on(8, 16, small.device), moving.mask_at(8, 16, 3, 10)):
        assert mask.size == (8, 16)
        assert copy.deepcopy(mask).size == pickle.loads(pickle.dumps(mask)).size == (8, 16)
        assert len(mask) == 3
        table, inside, outside = mask
        assert (inside, outside) == (1, 0)
        F.denoising_loss(large, large, lowpass=mask)
        message = r"^lowpass: expected a mask for images of 8 x 8, got one for 8 x 16$"
        with pytest.raises(ValueError, match=message):
            F.denoising_loss(small, small, lowpass=mask)
        # The same table for these images.
        F.denoising_loss(small, small, lowpass=BandMask(table[:2, :2], inside, outside))


def test_is_a_key():
    assert LowPass(0.5) == LowPass(0.5)
    assert len({LowPass(0.5), LowPass(0.5), LowPass(0.25)}) == 2


@pytest.mark.parametrize(
    "of", [LowPass, lambda radius: LowPass(1, band="mid", inner=radius), lambda radius: growing(radius)]
)
def test_equal_bands_have_equal_masks(of):
    """0.3 is read as 3/10; the float itself, as a fraction, lies below, and has one frequency less of 20."""
    decimal, tenths, binary = of(0.3), of(Fraction(3, 10)), of(Fraction(0.3))
    assert decimal == tenths
    assert hash(decimal) == hash(tenths)
    assert decimal != binary
    assert len({decimal, tenths, binary}) == 2
    # In this order: tables are kept by the band.
    tables = [each.mask_at(20, 20, 0, 2).table for each in (decimal, tenths, binary)]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])


def growing(start):
    return LowPass(schedule="linear_increase", start=start, stop=0.9)


def test_bands_of_other_kinds_are_not_equal():
    several = [
        LowPass(0.5, **options) for options in (dict(kind="box"), dict(unit="bins"), dict(band="high"))
    ]
    several += [LowPass(0.5), LowPass(0.5, high_frequency_weight=0.5), LowPass(0.5, band="mid", inner=0.1)]
    several += [growing(0.5), LowPass(0.9, schedule="step_increase", start=0.5)]
    assert len(set(several)) == len(several)
    assert LowPass(0.5) != 0.5


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (dict(radius=-0.1), ValueError, r"radius: expected a finite number in \[0, inf\), got -0.1"),
        (dict(radius=float("nan")), ValueError, r"radius: expected a finite number in \[0, inf\), got nan"),
        (dict(radius="0.5"), TypeError, r"radius: expected a number, got '0.5'"),
        (dict(radius=True), TypeError, r"radius: expected a number, got True"),
        (dict(radius=0.5, kind="circle"), ValueError, r"kind: expected one of disc, box, got 'circle'"),
        (dict(radius=0.5, band="all"), ValueError, r"band: expected one of low, mid, high, got 'all'"),
        (dict(radius=0.5, unit="pixels"), ValueError, r"unit: expected one of nyquist, bins, got 'pixels'"),
        (
            dict(radius=0.5, high_frequency_weight=-1),
            ValueError,
            r"high_frequency_weight: expected a finite number in \[0, inf\), got -1",
        ),
        (dict(radius=0.5, inner=0.2), ValueError, r"inner: expected None with band='low', got 0.2"),
        (dict(radius=0.5, band="mid"), ValueError, r"inner: expected a number with band='mid', got None"),
        (
            dict(radius=0.5, band="mid", inner=0.5),
            ValueError,
            r"inner: expected a number below radius, 0.5, got 0.5",
        ),
        (
            dict(radius=0.5, band="mid", inner=-1.0),
            ValueError,
            r"inner: expected a finite number in \[0, inf\), got -1.0",
        ),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        LowPass(**arguments)


def test_bad_sizes():
    with pytest.raises(ValueError, match=r"height: expected an integer >= 1, got 0"):
        LowPass(0.5).mask(0, 8)
    with pytest.raises(TypeError, match=r"width: expected an integer, got 8.0"):
        LowPass(0.5).mask(8, 8.0)


def test_a_mask_of_nothing_is_refused():
    """The band that is refused is said in words."""
    message = r"^LowPass: expected a band with frequencies of images of 8 x 8, got none in the {}$"
    words = "mid band, disc of radius 0.45, in nyquist, without the radius 0.4"
    with pytest.raises(ValueError, match=message.format(words)):
        LowPass(0.45, band="mid", inner=0.4).mask(8, 8)
    with pytest.raises(ValueError, match=message.format("high band, disc of radius 1.5, in nyquist")):
        LowPass(1.5, band="high").mask(8, 8)
    assert not LowPass(0.45, band="mid", inner=0.4, high_frequency_weight=0.1).mask(8, 8)[0].any()
