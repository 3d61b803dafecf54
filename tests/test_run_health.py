"""What makes a run fail that came to its end."""

from __future__ import annotations

import math

import pytest
import torch

from fastunlearn.runs.run_health import SkipLimit, TooManySkippedSteps, WeightsNotFinite, check_finite
from fastunlearn.testing.host_sync import HostSync, no_host_sync

LAYOUTS = {
    "contiguous": lambda: torch.ones(3, 5, 7, 6),
    "channels-last": lambda: torch.ones(3, 5, 7, 6).to(memory_format=torch.channels_last),
    "a view": lambda: torch.ones(6, 5, 7, 12)[::2, :, :, 3:9],
    "many": lambda: torch.ones(70_000),
    "one": lambda: torch.ones(()),
}
DTYPES = torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.complex64


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_number_anywhere_is_found(layout: str, dtype: torch.dtype):
    weights = LAYOUTS[layout]().to(dtype)
    state = {"model": {"other": torch.ones(2)}, "ema": {"shadow_params": [torch.ones(2), weights]}}
    check_finite("step 3", state, "end")
    places = {0, weights.numel() // 2, weights.numel() - 1}
    for value in (math.nan, math.inf, -math.inf):
        for place in places:
            index = [int(i) for i in torch.unravel_index(torch.tensor(place), weights.shape)]
            weights[tuple(index)] = value
            with pytest.raises(WeightsNotFinite, match=r"^step 3: .* in ema\.shadow_params\.1 \(of 3.* end$"):
                check_finite("step 3", state, "end")
            weights[tuple(index)] = 1


def test_the_largest_numbers_are_finite_and_what_holds_no_numbers_is_passed_over():
    real = [dtype for dtype in DTYPES if dtype.is_floating_point]
    largest = [torch.full((9,), torch.finfo(dtype).max, dtype=dtype) for dtype in real]
    others = {"step": 3, "name": "AdamW", "none": None, "count": torch.tensor(2**62)}
    others |= {"flag": torch.tensor(True), "empty": torch.full((0,), math.nan)}
    check_finite("weights", {"largest": largest, "signs": [-tensor for tensor in largest]} | others, "")
    check_finite("weights", {}, "")


def test_more_than_three_are_counted():
    state = {name: torch.tensor(math.nan) for name in "abcde"}
    with pytest.raises(WeightsNotFinite, match=r"in a, b, c and 2 more \(of 5 tensors\)"):
        check_finite("weights", state, "")


def test_it_waits_for_the_device_once():
    reads = []
    original = torch.Tensor.tolist
    state = {str(number): torch.ones(4) for number in range(20)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "tolist", lambda tensor: reads.append(len(tensor)) or original(tensor))
        check_finite("weights", state, "")
    assert reads == [20]
    with pytest.raises(HostSync, match="tolist"), no_host_sync():  # nothing before that waits
        check_finite("weights", state, "")


@pytest.mark.parametrize(
    ("skipped", "share", "fails"),
    [(29, 0.29, False), (30, 0.29, True), (7, 0.07, False), (0, 0.0, False), (1, 0.0, True)],
)
def test_a_share_is_compared_as_written(skipped: int, share: float, fails: bool):
    limit = SkipLimit(steps=1000, share=share)
    if not fails:
        limit.check(skipped, 100, 100, None)
        return
    with pytest.raises(TooManySkippedSteps, match=f"{skipped} of 100 steps"):
        limit.check(skipped, 100, 100, None)


def test_a_run_of_no_steps_has_no_share():
    SkipLimit(steps=0, share=0.0).check(0, 0, 0, None)
