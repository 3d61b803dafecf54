"""`functional.redirect_to_all`: ReTrack's weights over a whole set of images, streamed."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunlearn import ImageStore
from fastunlearn import functional as F
from fastunlearn.host.philox import Noise
from fastunlearn.objective.schedule import PREDICTION_TYPES
from fastunlearn.ops import redirect_to_all as op
from fastunlearn.reference import noising
from fastunlearn.reference import redirect_to_all as literal
from fastunlearn.reference.redirect import log_kernel, neighbor_noise
from fastunlearn.testing.factories import linear_schedule

TIMESTEPS = torch.tensor([0, 10, 100, 500, 998])
ROWS, KEPT, FORGOTTEN, SHAPE = len(TIMESTEPS), 37, 6, (1, 8, 8)


def sets(dtype: torch.dtype = torch.float64, distance: float = 0.1):
    """All images to forget, all to keep, each about `distance` from one of them, and noise for some."""
    generator = torch.Generator().manual_seed(0)
    forget = torch.rand(FORGOTTEN, *SHAPE, generator=generator, dtype=torch.float64) * 2 - 1
    moved = distance * torch.randn(KEPT, *SHAPE, generator=generator, dtype=torch.float64)
    retain = (forget[torch.arange(KEPT) % FORGOTTEN] + moved).clamp(-1, 1)
    noise = torch.randn(ROWS, *SHAPE, generator=generator, dtype=torch.float64)
    if dtype == torch.uint8:
        as_bytes = [((images + 1) * 127.5).round().to(torch.uint8) for images in (forget, retain)]
        return *as_bytes, noise
    return forget.to(dtype), retain.to(dtype), noise


def rounding(schedule) -> torch.Tensor:
    """`[B]`: how far float64 roundings may move a logit, and with it the logarithm of a weight.

    Sums of D terms of `rho^2 ||x||^2`, with `||x||^2 <= 4 D` where bytes are counted from black, on both
    sides of a comparison.
    """
    rho = (schedule.alpha / schedule.sigma)[TIMESTEPS]
    elements = math.prod(SHAPE)
    return 2 * elements * 2.0**-53 * (rho.square() * 4 * elements + 100)


@pytest.mark.parametrize("values", [op.CPU_BLOCK, 64, 64 * 5])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_it_is_the_literal_formula(kind, values, monkeypatch):
    """In one block, row by row, and in blocks that do not divide the set."""
    monkeypatch.setattr(op, "CPU_BLOCK", values)
    schedule, (forget_set, retain, noise) = linear_schedule(prediction_type=kind), sets()
    given = forget_set[:ROWS], retain, noise, TIMESTEPS, schedule
    ours, expected = (f(*given, forget_set=forget_set) for f in (F.redirect_to_all, literal))
    slope = schedule.coefficients(TIMESTEPS)[:, 4].abs()

    torch.testing.assert_close(ours.x_t, expected.x_t, rtol=1e-14, atol=1e-14)
    # A weight that is off by a share moves the mean by at most that share of the largest distance, 2.
    error = (ours.target - expected.target).abs().flatten(1).amax(1)
    assert (error <= 2 * slope * rounding(schedule) + 1e-13 * slope).all()
    error = (ours.spread - expected.spread).abs()
    scale = slope.square() * 4 * math.prod(SHAPE)
    assert (error <= scale * (rounding(schedule) + 1e-14)).all()
    error = (ours.weight - expected.weight).abs()
    assert (error <= 2 * rounding(schedule) * expected.weight).all()
    assert ours.weight[0] == 0  # at t = 0 no image to keep can have made x_t
    assert ours.weight[-1] == pytest.approx(1, rel=0.1)


def test_bytes_are_not_rounded_before_the_weights():
    """Of uint8 rows the weights are those of the exact quotients, also where float32 would lose them."""
    schedule, (forget, retain, noise) = linear_schedule(), sets(torch.uint8)
    stores = ImageStore(forget), ImageStore(retain)
    rows = stores[0].lazy(torch.arange(ROWS))
    exact = [images.double() * (2 / 255) - 1 for images in (forget, retain)]
    ours = F.redirect_to_all(rows, retain, noise.float(), TIMESTEPS, schedule, forget_set=forget)
    same_noise = noise.float().double()
    expected = literal(exact[0][:ROWS], exact[1], same_noise, TIMESTEPS, schedule, forget_set=exact[0])
    assert ours.target.dtype == ours.spread.dtype == torch.float32
    # What is left is the rounding of x_t and of the target to float32.
    torch.testing.assert_close(ours.x_t.double(), expected.x_t, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.target.double(), expected.target, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ours.spread.double(), expected.spread, rtol=1e-6, atol=1e-6)
    error = (ours.weight - expected.weight).abs()
    assert (error <= 2 * rounding(schedule) * expected.weight).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_truncated_weights_tend_to_these(dtype):
    """The mean of the k nearest is off by at most the weight of the others, times the diameter of the set.

    That weight falls to 0 as k goes to M, where `redirect` and this are one.
    """
    schedule, (forget, retain, noise) = linear_schedule(), sets(dtype, distance=0.5)
    stores = [ImageStore(images) for images in (forget, retain)]
    rows = stores[0].lazy(torch.arange(ROWS)) if dtype == torch.uint8 else forget[:ROWS]
    noise = noise.to(rows.dtype)
    whole = F.redirect_to_all(rows, retain, noise, TIMESTEPS, schedule)
    assert whole.weight is None

    # In the scale of network input: distances, and weights over the whole set from their literal formula.
    images = [each.double() * (2 / 255) - 1 if dtype == torch.uint8 else each for each in (forget, retain)]
    everything = images[1].expand(ROWS, *images[1].shape)
    x_t = noising(images[0][:ROWS], noise.double(), TIMESTEPS, schedule)
    weights = log_kernel(neighbor_noise(x_t, everything, TIMESTEPS, schedule)).softmax(1)
    distances = (images[0][:ROWS, None] - everything).square().flatten(2).sum(2)
    order = distances.argsort(1)
    diameter = torch.cdist(images[1].flatten(1), images[1].flatten(1)).max()
    slope = schedule.coefficients(TIMESTEPS)[:, 4]

    # Of uint8 rows, `redirect` adds rho <eps, x - a> up in float32.
    error = 1e-9 if dtype == torch.float64 else 1e-3
    for k in (1, 5, 20, KEPT):
        nearest = order[:, :k]
        neighbors = stores[1].lazy(nearest) if dtype == torch.uint8 else retain[nearest]
        sqdist = distances.gather(1, nearest)
        found = F.redirect(rows, neighbors, noise, TIMESTEPS, schedule, sqdist=sqdist)
        off = (found.target - whole.target).double().flatten(1).norm(dim=1)
        others = 1 - weights.gather(1, nearest).sum(1)
        assert (off <= slope * diameter * others.clamp(min=0) + error).all()
        if k == 1:
            assert (off[-2:] > 0.01).all()  # where noise is strong, one neighbour is not all of them
    assert (off <= error).all()


@pytest.mark.parametrize("copies", [1, 3, 10])
@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_copies_of_one_image_have_no_spread(dtype, copies):
    """And none below 0 by rounding, whatever they weigh; their mean is the image."""
    schedule, (forget, retain, noise) = linear_schedule(), sets(dtype)
    rows = ImageStore(forget).lazy(torch.arange(ROWS)) if dtype == torch.uint8 else forget[:ROWS]
    slope = schedule.coefficients(TIMESTEPS)[:, 4]
    # Targets are sums of the noise, below 6, and slope times a difference of images, below 2.
    rounding_of_target = (6 + 2 * slope.abs()) * (1e-6 if dtype == torch.uint8 else 1e-14)
    for image in retain:
        same = image.expand(copies, *SHAPE).contiguous()
        found = F.redirect_to_all(rows, same, noise.to(rows.dtype), TIMESTEPS, schedule)
        assert (found.spread >= 0).all()
        assert (found.spread <= slope.square() * 4 * math.prod(SHAPE) * 1e-14).all()
        alone = F.redirect_to_all(rows, same[:1], noise.to(rows.dtype), TIMESTEPS, schedule)
        off = (found.target - alone.target).abs().flatten(1).amax(1)
        assert (off <= rounding_of_target).all()


def test_noise_that_is_a_counter_is_that_noise():
    schedule, (forget, retain, _) = linear_schedule(), sets(torch.uint8)
    noise = Noise(torch.tensor([3, 1, 0]), 5, (ROWS, *SHAPE))
    rows = ImageStore(forget).lazy(torch.arange(ROWS))
    drawn, given = (
        F.redirect_to_all(rows, retain, each, TIMESTEPS, schedule) for each in (noise, noise.numbers())
    )
    for one, other in zip(drawn[:3], given[:3], strict=True):
        assert torch.equal(one, other)


def test_neither_the_neighbours_nor_all_weights_are_held(monkeypatch):
    """Nothing has B M values, let alone B M D: what is made is a block of 4 images, or the 5 rows."""
    monkeypatch.setattr(op, "CPU_BLOCK", 4 * 64)
    forget, _, noise = sets(torch.uint8)
    retain = torch.randint(0, 256, (1000, *SHAPE), dtype=torch.uint8)
    largest = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = [each for each in tree_leaves(result) if isinstance(each, torch.Tensor)]
            own = retain.untyped_storage().data_ptr()
            largest.extend(t.numel() for t in made if t.untyped_storage().data_ptr() != own)
            return result

    rows, schedule = ImageStore(forget).lazy(torch.arange(ROWS)), linear_schedule(50)
    with Watch():
        F.redirect_to_all(rows, retain, noise.float(), TIMESTEPS // 20, schedule, forget_set=forget)
    assert max(largest) == ROWS * 64


@pytest.mark.parametrize("backend", ["reference", "eager"])
def test_a_backend_may_be_chosen(backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    forget_set, retain, noise = sets()
    given = forget_set[:ROWS], retain, noise, TIMESTEPS, linear_schedule()
    ours, expected = (f(*given, forget_set=forget_set) for f in (F.redirect_to_all, literal))
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_bad_input_is_refused_by_name():
    schedule, (forget, retain, noise) = linear_schedule(), sets()
    given = {"forget": forget[:ROWS], "retain_set": retain, "noise": noise, "timesteps": TIMESTEPS}
    for changed, error, expected in (
        ({"retain_set": None}, TypeError, "retain_set: expected uint8 or floating-point images, got None"),
        ({"retain_set": retain.long()}, TypeError, "retain_set: expected uint8 or floating-point images"),
        ({"retain_set": retain[:0]}, ValueError, "retain_set: expected images"),
        ({"retain_set": retain[..., :4]}, ValueError, "retain_set: expected images"),
        ({"retain_set": retain.to("meta")}, ValueError, "retain_set: expected the device of forget"),
        ({"forget_set": forget[0]}, ValueError, "forget_set: expected images"),
        ({"retain_set": retain.clone().requires_grad_()}, ValueError, "retain_set: expected no gradient"),
        ({"noise": noise[:2]}, ValueError, "noise: expected the shape of forget"),
    ):
        with pytest.raises(error, match=expected):
            F.redirect_to_all(**{**given, **changed}, schedule=schedule)


# --- which weights are unbiased -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "t"), [("epsilon", 200), ("epsilon", 600), ("v_prediction", 400)])
def test_only_importance_weights_give_the_vanilla_loss(kind, t):
    """The expected loss, over images and noise, on sets of two and three points of one element.

    By the trapezoidal rule over the noise, which errs by less than rounding: the integrands are analytic and
    end as a Gaussian does.
    """
    schedule = linear_schedule(prediction_type=kind)
    rho = schedule.alpha[t] / schedule.sigma[t]
    forget = torch.tensor([-0.6, 0.4], dtype=torch.float64).view(-1, 1, 1, 1) / rho
    retain = torch.tensor([-0.9, 0.1, 1.0], dtype=torch.float64).view(-1, 1, 1, 1) / rho
    noise = torch.linspace(-14, 14, 2001, dtype=torch.float64)
    density = (noise[1] - noise[0]) * (-noise.square() / 2).exp() / math.sqrt(2 * math.pi)
    images = noise.view(-1, 1, 1, 1)
    timesteps = torch.full((len(noise),), t)

    def network(x_t):
        return torch.tanh(0.7 * x_t + 0.2) - 0.1 * x_t

    vanilla = 0
    for x in retain:
        x_t, target = F.noised(x.expand_as(images).contiguous(), images, timesteps, schedule)
        vanilla += density @ (network(x_t) - target).square().flatten() / len(retain)

    means = {"importance": 0, "self_normalized": 0, "of the ratio": 0}
    for a in forget:
        given = a.expand_as(images).contiguous(), retain, images, timesteps, schedule
        found = F.redirect_to_all(*given, forget_set=forget)
        losses = (network(found.x_t) - found.target).square().flatten() + found.spread
        means["importance"] += density @ (found.weight * losses) / len(forget)
        means["self_normalized"] += density @ losses / len(forget)
        means["of the ratio"] += density @ found.weight / len(forget)
    assert means["importance"] == pytest.approx(vanilla.item(), rel=1e-11)
    assert means["of the ratio"] == pytest.approx(1, rel=1e-11)
    assert means["self_normalized"] != pytest.approx(vanilla.item(), rel=1e-2)
