"""Launchers in a CUDA graph: captured once, replayed on new numbers in the same memory."""

import pytest
import torch

from fastunlearn.kernels.mixture import mixture
from fastunlearn.kernels.noising import noising
from fastunlearn.kernels.residual import residual
from fastunlearn.testing.factories import linear_schedule

PURPOSE = 5
SHAPE = (3, 64, 64)  # more than one program a sample


def launches(images, counter, coefficients, index, filled):
    """Every launcher once, as a step would call them."""
    x_t, target, retain_target, forget_target, retain_weight, forget_weight, loss, gradient = filled
    chosen = index % 2 == 0
    noising(images, index, coefficients, None, counter, PURPOSE, True, torch.float32, False, x_t, target)
    residual(x_t, target, coefficients[:, 1].contiguous(), loss, gradient)
    mixture(
        images,
        index,
        images,
        index.flip(0),
        coefficients,
        chosen,
        0.5,
        None,
        None,
        counter,
        PURPOSE,
        torch.float32,
        False,
        x_t,
        retain_target,
        forget_target,
        retain_weight,
        forget_weight,
    )


def test_replay_sees_new_numbers(gpu):
    if gpu.device.type != "cuda":
        pytest.skip("cannot be rehearsed: a tape records torch's ops, and Triton launches past torch")
    device, graphs = gpu.device, gpu.graphs()
    images = torch.randint(256, (8, *SHAPE), device=device).to(torch.uint8)
    counter, index = torch.tensor([1, 0, 0], device=device), torch.tensor([0, 3, 5], device=device)
    coefficients = linear_schedule().coefficients(torch.tensor([10, 500, 999], device=device))
    pictures = [torch.full((3, *SHAPE), torch.nan, device=device) for _ in range(5)]
    x_t, target, retain_target, forget_target, gradient = pictures
    weights = [torch.full((3,), torch.nan, device=device, dtype=torch.float64) for _ in range(2)]
    filled = (
        x_t,
        target,
        retain_target,
        forget_target,
        *weights,
        torch.full((3,), torch.nan, device=device),
        gradient,
    )

    def launch():
        launches(images, counter, coefficients, index, filled)

    graphs.warm_up(launch)  # compiles: that is not allowed during capture
    replay = graphs.capture(launch)

    counter.add_(torch.tensor([0, 1, 3], device=device))
    index.copy_(torch.tensor([7, 1, 2], device=device))
    for tensor in filled:
        tensor.fill_(torch.nan)
    replay()
    replayed = [tensor.clone() for tensor in filled]
    launch()
    for one, two in zip(replayed, filled, strict=True):
        assert torch.equal(one, two)
