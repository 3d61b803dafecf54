"""The redirect kernels, in one launch and split over the elements, against the papers' formula in float64."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastunlearn.host import philox
from fastunlearn.kernels import redirect as kernels
from fastunlearn.ops.redirect import redirect as op
from fastunlearn.reference.redirect import neighbor_targets, squared_norms
from fastunlearn.reference.redirect import redirect as papers_redirect
from fastunlearn.testing.budgets import assert_within_budget, in_several_orders, largest_error
from fastunlearn.testing.factories import linear_schedule

SCHEDULE = linear_schedule()
STORE = 9  # rows of a store


class Case(NamedTuple):
    k: int
    shape: tuple[int, int, int]
    rows: torch.dtype = torch.uint8
    indexed: bool = True  # rows of a store by index, else dense neighbours
    sqdist: bool = True  # squared distances given
    noise: torch.dtype = torch.float32
    x_t: torch.dtype = torch.float32
    channels_last: bool = False
    timesteps: tuple[int, ...] = (0, 400, 999)


class Inputs(NamedTuple):
    """The op's arguments, and what they mean: images and noise in float64 on the network's scale."""

    arguments: tuple
    forget: Tensor  # [B, C, H, W]
    neighbors: Tensor  # [B, K, C, H, W]
    noise: Tensor  # [B, C, H, W]
    timesteps: Tensor  # [B]


CASES = {
    "bytes": Case(5, (3, 16, 16)),
    "bytes, no distances": Case(5, (3, 16, 16), sqdist=False),
    "bytes, channels last": Case(3, (3, 5, 7), channels_last=True, x_t=torch.bfloat16),
    "bytes, dense, k = 1": Case(1, (1, 28, 28), indexed=False, timesteps=(300,)),
    "float32, dense, no distances": Case(20, (3, 7, 9), torch.float32, indexed=False, sqdist=False),
    "float32, channels last": Case(2, (4, 4, 4), torch.float32, channels_last=True),
    "bfloat16, dense": Case(
        4,
        (2, 8, 9),
        torch.bfloat16,
        indexed=False,
        noise=torch.bfloat16,
        x_t=torch.bfloat16,
        timesteps=(50, 900),
    ),
    "float16": Case(3, (4, 6, 6), torch.float16, noise=torch.float16, x_t=torch.float16, timesteps=(50, 900)),
    "one element": Case(3, (1, 1, 1)),
    "k = 64": Case(64, (1, 5, 5), timesteps=(999,)),
}
SPLIT_CASES = {
    "three parts, odd": Case(3, (3, 29, 29)),
    "three parts, odd, float32, no distances": Case(
        3, (3, 29, 29), torch.float32, sqdist=False, timesteps=(10, 990)
    ),
    "k = 65": Case(65, (1, 4, 4), timesteps=(400,)),
    "k = 130, two groups, no distances": Case(130, (1, 5, 5), sqdist=False, timesteps=(999,)),
    "k = 1000": Case(1000, (1, 2, 2), timesteps=(990,)),
}


@pytest.mark.parametrize("name", CASES)
def test_one_launch(name, device, output):
    check(make(CASES[name], device), CASES[name], output)


@pytest.mark.parametrize("name", [*CASES, *SPLIT_CASES])
def test_split(name, device, output, monkeypatch):
    monkeypatch.setattr(kernels, "_ONE_LAUNCH_K", 0)
    monkeypatch.setattr(kernels, "parts_of", lambda k: 2)  # more parts than are read at once
    case = {**CASES, **SPLIT_CASES}[name]
    check(make(case, device), case, output)


@pytest.mark.parametrize(
    ("elements", "k", "split"),
    [(1, 1, False), (4096, 64, False), (4097, 1, True), (1, 65, True), (196608, 10, True)],
)
def test_small_images_with_few_neighbours_take_one_launch(elements, k, split):
    assert kernels.tiles_of(64, elements, k, access=0)[1] == split


@pytest.mark.parametrize("tiles", ["_IMAGE", "_LARGE"])
def test_large_tiles(tiles, device, output, monkeypatch):
    """What sizes of image choose, on a small one."""
    monkeypatch.setattr(kernels, "_SMALL", getattr(kernels, tiles))
    monkeypatch.setattr(kernels, "_ONE_LAUNCH_K", 64 if tiles == "_IMAGE" else 0)
    case = Case(10, (3, 8, 8), timesteps=(0, 999))
    check(make(case, device), case, output)


@pytest.mark.parametrize("split", [False, True])
def test_philox(split, device, output, monkeypatch):
    """Both launches draw the same noise, that of `fastunlearn.host.philox`, at the positions of the global
    batch.
    """
    if split:
        monkeypatch.setattr(kernels, "_ONE_LAUNCH_K", 0)
    case = Case(4, (3, 19, 19), timesteps=(0, 500))
    inputs = make(case, device)
    *before, coefficients, sqdist, _, _, purpose, dtype, channels_last = inputs.arguments
    counter = torch.tensor([2**40 + 5, 17, 1000], device=device)

    only_noise = coefficients.new_tensor([0.0, 1.0, 1.0, 0.0, 0.0]).expand(2, 5).contiguous()
    noise, *_ = call((*before, only_noise, sqdist, None, counter, purpose, dtype, channels_last), output)
    torch.testing.assert_close(noise, philox.normal(noise.shape, counter, purpose), rtol=1e-6, atol=1e-6)

    drawn = inputs._replace(
        arguments=(*before, coefficients, sqdist, None, counter, purpose, dtype, channels_last),
        noise=noise.double(),
    )
    explicit = (*before, coefficients, sqdist, noise, None, purpose, dtype, channels_last)
    check(drawn, case, output, explicit)


@pytest.mark.parametrize("given", [True, False])
def test_weights_at_the_first_timestep_are_closer_to_float64_than_the_papers_formula(given, device, output):
    """Neighbours far away, at almost the same distance: rho^2 d_j / 2 is about 5e5, logits differ by 1."""
    generator = torch.Generator().manual_seed(1)
    shape, k = (3, 18, 18), 4
    away = torch.randn(k, 972, generator=generator, dtype=torch.float64)
    away *= (10 + 2e-5 * torch.arange(k)).unsqueeze(1) / away.norm(dim=1, keepdim=True)
    noise = torch.randn(972, generator=generator, dtype=torch.float64)
    basis = torch.linalg.qr((away[1:] - away[0]).T).Q
    noise -= basis @ (basis.T @ noise)
    forget = torch.rand(1, *shape, generator=generator) * 2 - 1
    neighbors = (forget.double() + away.view(k, *shape)).float().unsqueeze(0)
    inputs = dense(forget, neighbors, noise.float().view(1, *shape), torch.tensor([0]), device, sqdist=given)

    truth = papers_redirect(inputs.forget, inputs.neighbors, inputs.noise, inputs.timesteps, SCHEDULE).weights
    papers = papers_redirect(
        *(tensor.to(device) for tensor in (forget, neighbors)),
        inputs.noise.float(),
        inputs.timesteps,
        SCHEDULE,
    ).weights
    weights = call(inputs.arguments, output)[3]
    ours, theirs = largest_error(weights, truth), largest_error(papers, truth)
    assert truth.max() < 0.9, "one-hot weights show nothing"
    assert ours < theirs / 10, f"error of the kernel {ours:.2g}, of the papers' formula {theirs:.2g}"


@pytest.mark.parametrize("split", [False, True])
def test_duplicates_share_their_weight_and_have_no_spread(split, device, output, monkeypatch):
    if split:
        monkeypatch.setattr(kernels, "_ONE_LAUNCH_K", 0)
    inputs = make(Case(6, (1, 6, 6), timesteps=(0, 999)), device)
    neighbor_index = torch.full((2, 6), 3, device=device)
    arguments = (
        *inputs.arguments[:3],
        neighbor_index,
        inputs.arguments[4],
        inputs.arguments[5][:, :1].expand(2, 6).contiguous(),
        *inputs.arguments[6:],
    )
    _, _, spread, weights = call(arguments, output)
    torch.testing.assert_close(weights, torch.full_like(weights, 1 / 6))
    assert (spread == 0).all()


def test_neighbor_that_is_the_image_itself(device, output):
    """At t = 0 it takes all the weight, and the target is that of the image."""
    forget = torch.rand(2, 1, 6, 6, generator=torch.Generator().manual_seed(0)) * 2 - 1
    neighbors = torch.stack([-forget, forget, 0 * forget], dim=1)
    inputs = dense(forget, neighbors, torch.randn(2, 1, 6, 6), torch.tensor([0, 0]), device, sqdist=False)
    _, target, spread, weights = call(inputs.arguments, output)
    torch.testing.assert_close(weights.cpu(), torch.tensor([[0.0, 1.0, 0.0]]).expand(2, 3), rtol=0, atol=0)
    torch.testing.assert_close(target, inputs.noise.float(), rtol=0, atol=0)  # epsilon prediction
    assert (spread == 0).all()


@pytest.mark.parametrize("split", [False, True])
def test_a_number_that_is_none_stays_with_its_sample(split, device, output, monkeypatch):
    if split:
        monkeypatch.setattr(kernels, "_ONE_LAUNCH_K", 0)
    inputs = make(Case(3, (1, 5, 5), timesteps=(10, 400)), device)
    noise = inputs.arguments[6].clone()
    noise[0, 0, 2, 2] = torch.nan
    x_t, target, spread, weights = call((*inputs.arguments[:6], noise, *inputs.arguments[7:]), output)
    assert weights[0].isnan().all()
    assert spread[0].isnan()
    assert target[0, 0, 2, 2].isnan()
    assert x_t[0].isnan().sum() == 1
    for result in (x_t, target, spread, weights):
        assert result[1].isfinite().all()


def test_results_repeat(device, output, monkeypatch):
    monkeypatch.setattr(kernels, "_ONE_LAUNCH_K", 0)
    inputs = make(Case(5, (3, 29, 29), timesteps=(800,)), device)
    for one, two in zip(call(inputs.arguments, output), call(inputs.arguments, output), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


def test_float64_is_refused(device, output):
    inputs = make(Case(1, (1, 2, 2), torch.float32, timesteps=(1,)), device)
    with pytest.raises(TypeError, match="redirect: noise: expected float16"):
        call((*inputs.arguments[:6], inputs.arguments[6].double(), *inputs.arguments[7:]), output)


def make(case: Case, device: torch.device) -> Inputs:
    """Images at a distance of about 0.1 per element (bytes: 12 of 255) from a common one."""
    generator = torch.Generator().manual_seed(case.k)
    batch = len(case.timesteps)
    common = torch.rand(case.shape, generator=generator) * 1.6 - 0.8

    def images(*leading: int) -> Tensor:
        values = (common + 0.1 * torch.randn(*leading, *case.shape, generator=generator)).clamp(-1, 1)
        return (
            (values * 127.5 + 127.5).round().to(torch.uint8)
            if case.rows == torch.uint8
            else values.to(case.rows)
        )

    if case.indexed:
        stores = images(STORE), images(STORE)
        index, neighbor_index = (
            torch.randint(STORE, size, generator=generator) for size in ((batch,), (batch, case.k))
        )
        rows, indices = (stores[0][index], stores[1][neighbor_index]), (index, neighbor_index)
    else:
        stores = rows = images(batch), images(batch, case.k)
        indices = None, None
    noise = torch.randn(batch, *case.shape, generator=generator).to(case.noise)
    return assemble(
        stores,
        indices,
        rows,
        noise,
        torch.tensor(case.timesteps),
        device,
        case.sqdist,
        case.x_t,
        case.channels_last,
    )


def dense(
    forget: Tensor, neighbors: Tensor, noise: Tensor, timesteps: Tensor, device: torch.device, sqdist: bool
) -> Inputs:
    return assemble(
        (forget, neighbors),
        (None, None),
        (forget, neighbors),
        noise,
        timesteps,
        device,
        sqdist,
        torch.float32,
        False,
    )


def assemble(stores, indices, rows, noise, timesteps, device, sqdist, x_t, channels_last) -> Inputs:
    forget, neighbors = (
        row.double() / 127.5 - 1 if row.dtype == torch.uint8 else row.double() for row in rows
    )
    distances = (forget.unsqueeze(1) - neighbors).square().flatten(2).sum(2) if sqdist else None
    arguments = (
        stores[0],
        indices[0],
        stores[1],
        indices[1],
        SCHEDULE.coefficients(timesteps),
        distances,
        noise,
        None,
        5,
        x_t,
        channels_last,
    )
    arguments = tuple(value.to(device) if isinstance(value, Tensor) else value for value in arguments)
    return Inputs(arguments, *(value.to(device) for value in (forget, neighbors, noise.double(), timesteps)))


def call(arguments: tuple, output) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The kernel on outputs full of NaN."""
    images, _, neighbors, neighbor_index, *_, dtype, channels_last = arguments
    batch, k = neighbors.shape[:2] if neighbor_index is None else neighbor_index.shape
    shape = (batch, *images.shape[1:])
    outputs = (
        output(*shape, dtype=dtype, channels_last=channels_last),
        output(*shape, channels_last=channels_last),
        output(batch),
        output(batch, k),
    )
    kernels.redirect(*arguments, *outputs)
    return outputs


def check(inputs: Inputs, case: Case, output, plain_arguments: tuple | None = None) -> None:
    """Within the budget that plain torch's closed form in float32 sets.

    Few weights of a batch are neither 0 nor 1: hence in several orders.
    """
    images, index, neighbors, neighbor_index, coefficients, sqdist, noise, *rest = (
        plain_arguments or inputs.arguments
    )

    def closed_form(images, neighbors, noise):
        return op(images, index, neighbors, neighbor_index, coefficients, sqdist, noise, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTUNLEARN_BACKEND", "eager")
        plain = in_several_orders(closed_form, (images, neighbors, noise))
    names = ("x_t", "target", "spread", "weights")
    for name, actual, by_torch, exact in zip(
        names, call(inputs.arguments, output), plain, truth(inputs), strict=True
    ):
        assert actual.dtype == by_torch[0].dtype
        assert_within_budget(name, actual, by_torch, exact)


def truth(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The papers' formula in float64.

    In mean and spread, neighbours of a weight below 2^-32 leave it to the heaviest.
    """
    x_t, _, _, weights = papers_redirect(
        inputs.forget, inputs.neighbors, inputs.noise, inputs.timesteps, SCHEDULE
    )
    p = torch.where(weights < 2**-32, 0, weights)
    p = p.scatter_add(1, weights.argmax(1, keepdim=True), 1 - p.sum(1, keepdim=True))
    targets = neighbor_targets(x_t, inputs.neighbors, inputs.timesteps, SCHEDULE)
    target = torch.einsum("bk,bk...->b...", p, targets)
    return x_t, target, (p * squared_norms(target, targets)).sum(1), weights
