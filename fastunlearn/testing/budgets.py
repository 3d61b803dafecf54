"""How far a result may lie from the float64 truth, and how to say so.

The yardstick is never a hand-made tolerance: a low-precision result may err at most twice as much as the plain formula errs in the same precision, plus one
rounding of its largest entry.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNDERFLOW = 1e-20  # arrays whose largest entry is smaller are underflowed importance weights, not numbers to compare


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """`max |actual - truth|` in float64; inf where one of the two is NaN and the other is not, or shapes differ."""
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.shape != truth.shape:
        raise AssertionError(f"expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = torch.where((actual == truth) | (actual.isnan() & truth.isnan()), torch.zeros_like(truth), (actual - truth).abs())
    return difference.nan_to_num(nan=float("inf")).max().item()


def largest_entry(truth: Tensor) -> float:
    """`max |truth|` over the entries that are numbers."""
    return truth.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if truth.numel() else 0.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """`largest_error` in units of the largest entry of the truth; 0 for arrays below `UNDERFLOW`."""
    scale = largest_entry(truth)
    return 0.0 if scale < UNDERFLOW and largest_entry(actual) < UNDERFLOW else largest_error(actual, truth) / max(scale, UNDERFLOW)


def relative_l2(actual: list[Tensor], truth: list[Tensor]) -> float:
    """`||actual - truth|| / ||truth||` over a whole list of tensors: the distance of two gradients or two parameter updates."""
    difference = sum((a.detach().double() - t.detach().double()).square().sum() for a, t in zip(actual, truth, strict=True))
    return (difference / sum(t.detach().double().square().sum() for t in truth)).sqrt().item()


def budget(plain: Tensor, truth: Tensor) -> float:
    """The error allowed beside a plain implementation in the same dtype: twice its error plus one rounding of the largest entry of the truth."""
    return 2 * largest_error(plain, truth) + torch.finfo(plain.dtype).eps * largest_entry(truth)


def assert_within_budget(name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fail unless `actual` errs at most `budget(plain, truth)` from the truth; the message shows all three numbers."""
    if largest_entry(truth) < UNDERFLOW and largest_entry(actual) < UNDERFLOW:
        return
    error, allowed = largest_error(actual, truth), budget(plain, truth)
    yardstick = f"plain formula: {largest_error(plain, truth):.3g}, largest entry: {largest_entry(truth):.3g}"
    assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g} ({yardstick})"
