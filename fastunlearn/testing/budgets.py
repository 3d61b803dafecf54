"""How far a result may lie from the float64 truth, and how to say so.

The yardstick is never a hand-made tolerance: a low-precision result may err at most twice as much as the
plain formula errs in the same precision, plus one rounding of its largest entry.

Where all the error sits in one number (a sum over an image, the one weight of a batch that is neither 0 nor
1), a single run of the plain formula may be right by luck: on the processor whose vectors and
libraries add in one order, and not on the next. There the yardstick is the largest error of several
runs that differ in nothing but the order of the elements (`in_several_orders`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

# arrays whose largest entry is smaller are underflowed importance weights, not numbers to compare
UNDERFLOW = 1e-20


def largest_error(actual: Tensor, truth: Tensor) -> float:
    """`max |actual - truth|` in float64; inf where one of the two is NaN and the other is not, or shapes
    differ.
    """
    actual, truth = actual.detach().double(), truth.detach().double()
    if actual.shape != truth.shape:
        raise AssertionError(f"expected shape {tuple(truth.shape)}, got {tuple(actual.shape)}")
    if actual.numel() == 0:
        return 0.0
    difference = torch.where(
        (actual == truth) | (actual.isnan() & truth.isnan()), torch.zeros_like(truth), (actual - truth).abs()
    )
    return difference.nan_to_num(nan=float("inf")).max().item()


def largest_entry(truth: Tensor) -> float:
    """`max |truth|` over the entries that are numbers."""
    return truth.detach().double().nan_to_num(0.0, 0.0, 0.0).abs().max().item() if truth.numel() else 0.0


def relative_error(actual: Tensor, truth: Tensor) -> float:
    """`largest_error` in units of the largest entry of the truth; 0 for arrays below `UNDERFLOW`."""
    scale = largest_entry(truth)
    return (
        0.0
        if scale < UNDERFLOW and largest_entry(actual) < UNDERFLOW
        else largest_error(actual, truth) / max(scale, UNDERFLOW)
    )


def relative_l2(actual: list[Tensor], truth: list[Tensor]) -> float:
    """`||actual - truth|| / ||truth||` over a whole list of tensors: the distance of two gradients or two
    parameter updates.
    """
    difference = sum(
        (a.detach().double() - t.detach().double()).square().sum() for a, t in zip(actual, truth, strict=True)
    )
    return (difference / sum(t.detach().double().square().sum() for t in truth)).sqrt().item()


def budget(plain: Tensor | Sequence[Tensor], truth: Tensor) -> float:
    """The error allowed beside a plain implementation in the same dtype: twice its error plus one rounding of
    the largest entry of the truth.

    plain: what it computes, or the results of several runs, of which the one farthest from the truth counts.
    """
    results = [plain] if isinstance(plain, Tensor) else plain
    return max(
        2 * largest_error(value, truth) + torch.finfo(value.dtype).eps * largest_entry(truth)
        for value in results
    )


def assert_within_budget(name: str, actual: Tensor, plain: Tensor | Sequence[Tensor], truth: Tensor) -> None:
    """Fail unless `actual` errs at most `budget(plain, truth)` from the truth; the message shows all three
    numbers.
    """
    if largest_entry(truth) < UNDERFLOW and largest_entry(actual) < UNDERFLOW:
        return
    error, allowed = largest_error(actual, truth), budget(plain, truth)
    theirs = max(largest_error(value, truth) for value in ([plain] if isinstance(plain, Tensor) else plain))
    yardstick = f"plain formula: {theirs:.3g}, largest entry: {largest_entry(truth):.3g}"
    assert error <= allowed, f"{name}: error {error:.3g} exceeds {allowed:.3g} ({yardstick})"


def in_several_orders(
    formula: Callable[..., Sequence[Tensor]], images: Sequence[Tensor], orders: Iterable[Tensor] | None = None
) -> list[tuple[Tensor, ...]]:
    """Results of `formula(*images)` that add the elements of an image in different orders; a tuple of
    them for each of its results.

    Args:
        formula: a formula that does not change with the order, but for the roundings.
        images: `[..., C, H, W]`, all with the same elements; a result of that shape comes back in the order
            of the images.
        orders: permutations of the `C * H * W` elements, by default `shuffles` of them.
    """
    shape = images[0].shape[-3:]
    found = []
    for order in shuffles(shape.numel()) if orders is None else orders:
        results = formula(*(reordered(image, order) for image in images))
        back = order.argsort()
        found.append(
            [reordered(result, back) if result.shape[-3:] == shape else result for result in results]
        )
    return list(zip(*found, strict=True))


def shuffles(elements: int, count: int = 16) -> list[Tensor]:
    """`count` permutations of so many elements, the same in every run: first as they are, then at random."""
    generator = torch.Generator().manual_seed(0)
    return [
        torch.arange(elements),
        *(torch.randperm(elements, generator=generator) for _ in range(count - 1)),
    ]


def shifts(shape: Sequence[int], count: int = 16) -> list[Tensor]:
    """Permutations of the elements of an image `[C, H, W]` that move it around its edges; frequencies keep
    their energy.
    """
    places, generator = torch.arange(torch.Size(shape).numel()).view(*shape), torch.Generator().manual_seed(0)
    others = [
        [int(torch.randint(size, (), generator=generator)) for size in shape[1:]] for _ in range(count - 1)
    ]
    return [places.roll(shift, (1, 2)).flatten() for shift in [[0, 0], *others]]


def reordered(image: Tensor, order: Tensor) -> Tensor:
    """`image` `[..., C, H, W]` with its `C * H * W` elements permuted."""
    return image.flatten(-3)[..., order.to(image.device)].unflatten(-1, image.shape[-3:])
