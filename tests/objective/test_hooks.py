"""Every hook of the protocol, by small methods, against their literal losses in float64."""

import copy
import functools

import pytest
import torch
from small_methods import Anchor, Mask, Pairs, Rows, Toward, Whole, gradient_of
from torch.nn import functional

from fastunlearn import (
    SISS,
    Draws,
    ImageStore,
    LowPass,
    ReTrack,
    Unlearner,
    Vanilla,
    method_step,
    neggrad_step,
    vanilla_step,
)
from fastunlearn import functional as F
from fastunlearn.objective.combine import Rescale
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.objective.protocol import Method, Pass, Term
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
PAIRS = 5


class Shifted(TinyDenoiser):
    """Takes a condition."""

    def forward(self, x_t, t, shift=None):
        moved = x_t if shift is None else x_t + shift.view(-1, 1, 1, 1)
        return super().forward(moved, t)


@pytest.fixture
def world():
    return World()


class World:
    """Pairs of images, their numbers, a network and another one."""

    def __init__(self):
        generator = torch.Generator().manual_seed(3)
        numbers = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.forget, self.retain = numbers(PAIRS, 1, 8, 8), numbers(PAIRS, 1, 8, 8)
        times = [torch.randint(100, 900, (PAIRS,), generator=generator) for _ in range(2)]
        self.noise = numbers(PAIRS, 1, 8, 8), numbers(PAIRS, 1, 8, 8)
        self.shared = Draws(forget_noise=self.noise[0], forget_timesteps=times[0])
        self.own = Draws(*self.noise, *times)
        self.model, self.reference = Shifted().double(), Shifted(seed=1).double()

    def losses(self, model, draws, other=None):
        """`{role: [B]}` by plain torch."""
        other = draws if other is None else other
        found = {}
        for role, images, noise, times in (
            ("forget", self.forget, draws.forget_noise, draws.forget_timesteps),
            ("retain", self.retain, other.retain_noise, other.retain_timesteps),
        ):
            x_t, target = F.noised(images, noise, times, SCHEDULE)
            found[role] = (model(x_t, times).sub(target)).square().flatten(1).sum(1)
        return found

    def literal(self, loss):
        """`[P]`, the gradient of `loss` by autograd."""
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in found])

    @property
    def images(self):
        return {"forget": self.forget, "retain": self.retain}


def shared_draws(draws):
    return Draws(draws.forget_noise, draws.forget_noise, draws.forget_timesteps, draws.forget_timesteps)


# 1 cannot hold a pair, 2 and 3 hold one, 4 two of five; 10 all.
@pytest.mark.parametrize("rows", [None, 1, 2, 3, 4, 10])
def test_pairs_may_be_split_at_will(world, rows):
    method = Pairs()
    out, ours = gradient_of(
        method, world.model, SCHEDULE, **world.images, draws=world.shared,
        reference_model=world.reference, micro_batch_size=rows,
    )  # fmt: skip
    losses = world.losses(world.model, shared_draws(world.shared))
    with torch.no_grad():
        reference = world.losses(world.reference, shared_draws(world.shared))
    change = {role: losses[role] - reference[role] for role in losses}
    loss = functional.softplus(method.beta * (change["retain"] - change["forget"])).mean()
    assert relative_l2([ours], [world.literal(loss)]) <= 1e-12
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.forget_loss, losses["forget"].mean().detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.retain_loss, losses["retain"].mean().detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [None, 1, 3, 4])
def test_a_batch_that_is_tied_together_may_be_split_at_will(world, rows):
    out, ours = gradient_of(
        Whole(), world.model, SCHEDULE, **world.images, draws=world.own, micro_batch_size=rows
    )
    losses = world.losses(world.model, world.own)
    middle = torch.cat([losses["forget"], losses["retain"]]).mean()
    loss = (
        functional.softplus(0.05 * (middle - losses["forget"])).mean()
        + functional.softplus(0.05 * (losses["retain"] - middle)).mean()
    )
    assert relative_l2([ours], [world.literal(loss)]) <= 1e-12
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [None, 1, 4])
def test_two_gradients_of_an_objective_are_combined(world, rows):
    method = Rows()
    out, ours = gradient_of(
        method, world.model, SCHEDULE, **world.images, draws=world.own,
        reference_model=world.reference, micro_batch_size=rows,
    )  # fmt: skip
    losses = world.losses(world.model, world.own)
    with torch.no_grad():
        reference = world.losses(world.reference, world.own)
    change = losses["forget"] - reference["forget"]
    bounded = (functional.softplus(method.beta * change) / method.beta).mean()
    correction, main = (
        world.literal(bounded),
        world.literal(world.losses(world.model, world.own)["retain"].mean()),
    )
    expected = main - 2.0 / correction.norm() * correction
    assert relative_l2([ours], [expected]) <= 1e-12
    torch.testing.assert_close(out.correction_norm, correction.norm(), rtol=1e-12, atol=0)


def test_rows_that_go_through_a_network_twice_refuse_dropout(world):
    noisy = torch.nn.Sequential(torch.nn.Conv2d(1, 1, 3, padding=1), torch.nn.Dropout(0.1)).double()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = noisy

        def forward(self, x_t, t):
            return self.net(x_t)

    options = {**world.images, "draws": world.own, "micro_batch_size": 3}
    with pytest.raises(ValueError, match=r"^model: expected a network without active dropout"):
        method_step(Whole(), Net(), None, SCHEDULE, **options)
    method_step(Whole(), Net().eval(), None, SCHEDULE, **options)


def test_targets_that_networks_predict_and_a_band(world):
    out, ours = gradient_of(
        Toward(), world.model, SCHEDULE, forget=world.forget, draws=world.shared,
        reference_model=world.reference,
    )  # fmt: skip
    times = world.shared.forget_timesteps
    x_t, _ = F.noised(world.forget, world.shared.forget_noise, times, SCHEDULE)
    predicted = world.model(x_t, times, torch.zeros(PAIRS, dtype=torch.float64))
    with torch.no_grad():
        low = world.reference(x_t, times, torch.zeros(PAIRS, dtype=torch.float64))
        own = world.model(x_t, times, torch.ones(PAIRS, dtype=torch.float64))
    band, _, _ = LowPass(0.5).mask(8, 8)
    mask = torch.zeros(8, 8, dtype=torch.float64)
    for u in range(8):
        for v in range(8):
            row, column = min(u, 8 - u), min(v, 8 - v)
            if row < band.shape[0] and column < band.shape[1]:
                mask[u, v] = band[row, column]
    filtered = torch.fft.ifft2(mask * torch.fft.fft2(predicted - low)).real
    loss = filtered.square().sum() / PAIRS + 0.5 * (predicted - own).square().sum() / PAIRS
    assert relative_l2([ours], [world.literal(loss)]) <= 1e-11
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-11, atol=0)
    split = gradient_of(
        Toward(), world.model, SCHEDULE, forget=world.forget, draws=world.shared,
        reference_model=world.reference, micro_batch_size=2,
    )[1]  # fmt: skip
    assert relative_l2([split], [ours]) <= 1e-12


def test_an_equal_reference_changes_nothing_to_the_bit():
    """At step 0 of a run the reference takes the model's path, so its losses are the model's."""
    world, seen = World(), {}

    class Looks(Pairs):
        def objective(self, losses, reference, elements):
            seen.update({role: torch.equal(losses[role], reference[role]) for role in losses})
            return super().objective(losses, reference, elements)

    model = Shifted()
    images = {role: images.float() for role, images in world.images.items()}
    method_step(
        Looks(), model, None, SCHEDULE, **images, reference_model=copy.deepcopy(model),
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert seen == {"forget": True, "retain": True}


def test_a_reference_is_asked_for_and_refused(world):
    given = {**world.images, "draws": world.shared}
    with pytest.raises(TypeError, match=r"^reference_model: expected a callable"):
        method_step(Pairs(), world.model, None, SCHEDULE, **given)
    with pytest.raises(ValueError, match=r"^reference_model: expected another network than model"):
        method_step(Pairs(), world.model, None, SCHEDULE, **given, reference_model=world.model)
    with pytest.raises(ValueError, match=r"^reference_model: expected another network than model"):
        method_step(Pairs(), world.model, None, SCHEDULE, **given, reference_model=world.model.forward)
    with pytest.raises(ValueError, match=r"^reference_model: expected None \(Vanilla"):
        method_step(
            Vanilla(), world.model, None, SCHEDULE, retain=world.retain, reference_model=world.reference
        )


class Once(Method):
    """One term, of a gradient that is asked for."""

    name, needs = "once", frozenset({"retain"})

    def __init__(self, gradient):
        self.gradient = gradient

    def draws(self):
        return Vanilla().draws()

    def compose(self, batch, draws, schedule):
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        return [Pass(x_t, draws.retain_timesteps, (Term("retain", target, gradient=self.gradient),))]


def test_a_gradient_that_the_combination_has_not_is_refused(world):
    with pytest.raises(ValueError, match=r"^Term.gradient: expected one of total \(Sum\), got 'forget'"):
        method_step(Once("forget"), world.model, None, SCHEDULE, retain=world.retain)
    method_step(Once("total"), world.model, None, SCHEDULE, retain=world.retain)


def masks_of(model):
    generator = torch.Generator().manual_seed(9)
    return [(torch.rand(p.shape, generator=generator) < 0.4).to(p.dtype) for p in model.parameters()]


@pytest.mark.parametrize("method", [SISS(), SISS(variant="no_is"), ReTrack(k=2)], ids=str)
def test_a_mask_acts_on_each_gradient_before_its_norm(world, method):
    parameters, masks = list(world.model.parameters()), masks_of(world.model)
    rule = Mask(parameters, masks)
    rule.after_update = ParameterRule.after_update.__get__(rule)
    flat = torch.cat([mask.flatten() for mask in masks])
    neighbors = world.retain[:, None].expand(-1, 2, -1, -1, -1).contiguous()

    class Restricts(ParameterRule):
        def restrict(self, parameters, gradients):
            rule.restrict(parameters, gradients)

    options = {
        **world.images,
        "generator": None,
        "draws": world.shared if isinstance(method, SISS) else world.own,
    }
    if isinstance(method, ReTrack):
        options["neighbors"] = neighbors
    if method == SISS():
        options["draws"] = Draws(
            world.noise[0], None, world.shared.forget_timesteps, None, torch.arange(PAIRS) % 2 == 0
        )
    out, masked = gradient_of(method, world.model, SCHEDULE, **options, rules=[Restricts()])
    assert torch.equal(masked[flat == 0], torch.zeros_like(masked[flat == 0]))
    plain, whole = gradient_of(method, world.model, SCHEDULE, **options)
    if isinstance(method, ReTrack):
        assert relative_l2([masked], [whole * flat]) <= 1e-12
    else:  # the masked correction has the norm that is asked for
        scaled = out.correction_norm * out.scaling_factor
        torch.testing.assert_close(scaled, torch.tensor(5.0, dtype=torch.float64), rtol=1e-12, atol=0)
        assert out.correction_norm < plain.correction_norm
    ones = [torch.ones_like(mask) for mask in masks]
    masks[:] = ones
    _, unmasked = gradient_of(method, world.model, SCHEDULE, **options, rules=[Restricts()])
    assert relative_l2([unmasked], [whole]) <= 1e-13


@pytest.mark.parametrize("method", [SISS(), Vanilla()], ids=str)
def test_masked_weights_stay_bit_for_bit(method):
    """With weight decay and momentum, which move weights that have no gradient."""
    model = TinyDenoiser()
    parameters, masks = list(model.parameters()), masks_of(model)
    before = [parameter.detach().clone() for parameter in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.5, fused=True)
    images = torch.randint(
        0, 256, (12, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    stores = {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}
    unlearner = Unlearner(
        model, optimizer, SCHEDULE, method, **stores, batch_size=4, rules=[Mask(parameters, masks)]
    )
    for _ in range(3):
        unlearner.step()
    for parameter, mask, old in zip(parameters, masks, before, strict=True):
        assert torch.equal(parameter[mask == 0], old[mask == 0])
        assert (mask == 0).all() or not torch.equal(parameter[mask == 1], old[mask == 1])


def test_a_rule_after_the_update_needs_an_optimizer(world):
    rule = Mask(list(world.model.parameters()), masks_of(world.model))
    with pytest.raises(ValueError, match=r"^rules: expected none that acts after the update .*got Mask"):
        vanilla_step(world.model, None, SCHEDULE, world.retain, rules=[rule])
    with pytest.raises(TypeError, match=r"^rules: expected a sequence of ParameterRule, got"):
        vanilla_step(world.model, None, SCHEDULE, world.retain, rules=[Mask])


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("updates", [False, True])
def test_an_anchor_is_added_once_unscaled_and_unclipped(scaled, updates):
    """As NegGrad with `strength / 2 ||theta - mean||^2` beside it, whose sum is clipped."""
    model = TinyDenoiser()
    start = [parameter.detach().clone() for parameter in model.parameters()]
    means = [parameter + 0.1 for parameter in start]
    forget = torch.randn(6, 1, 8, 8, generator=torch.Generator().manual_seed(2))
    options = {"draws": Draws(torch.ones(6, 1, 8, 8), None, torch.arange(6) * 100), "micro_batch_size": 2}
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None

    plain = neggrad_step(model, None, SCHEDULE, forget, **options)
    expected = [p.grad + 3.0 * (p.detach() - mean) for p, mean in zip(model.parameters(), means, strict=True)]
    norm = torch.linalg.vector_norm(torch.cat([gradient.flatten() for gradient in expected]))
    for parameter in model.parameters():
        parameter.grad = None

    optimizer = torch.optim.SGD(model.parameters(), lr=1.0) if updates else None
    rules = [Anchor(means, 3.0)]
    out = neggrad_step(model, optimizer, SCHEDULE, forget, **options, rules=rules, grad_scaler=scaler)
    anchored = sum((parameter - mean).square().sum() for parameter, mean in zip(start, means, strict=True))
    torch.testing.assert_close(out.loss, plain.loss + 1.5 * anchored, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.grad_norm, norm, rtol=1e-5, atol=0)
    for parameter, old, gradient in zip(model.parameters(), start, expected, strict=True):
        if updates:
            torch.testing.assert_close(old - parameter, gradient / norm.clamp(min=1), rtol=1e-4, atol=1e-6)
        else:
            scale = 2.0**10 if scaled else 1.0
            torch.testing.assert_close(parameter.grad, gradient * scale, rtol=1e-4, atol=1e-3)


def test_what_a_method_needs_of_whole_sets(world):
    class Sizes(Once):
        needs = frozenset({"retain", "sizes", "stores"})

        def compose(self, batch, draws, schedule):
            found.append((dict(batch.sizes), {name: len(store) for name, store in batch.stores.items()}))
            return super().compose(batch, draws, schedule)

    found = []
    with pytest.raises(ValueError, match=r"^method: expected one that works on batches alone, got Sizes"):
        method_step(Sizes(None), world.model, None, SCHEDULE, retain=world.retain)
    model = TinyDenoiser()
    store = ImageStore(torch.zeros(7, 1, 8, 8, dtype=torch.uint8))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    Unlearner(model, optimizer, SCHEDULE, Sizes(None), retain=store, batch_size=3).step()
    assert found == [({"retain": 7}, {"retain": 7})]


def test_rescale_takes_a_unit_out_of_importance_weights_alone():
    weights = [torch.tensor([1e-300, 3e-300], dtype=torch.float64)]
    assert Rescale(1.0).unit(weights) == 3e-300
    assert Rescale(1.0).unit([*weights, torch.tensor([2.0], dtype=torch.float64)]) == 2
    assert Rescale(1.0).unit([]) is None


@pytest.mark.parametrize("rows", [None, 1])
def test_an_objective_is_told_the_elements_of_an_image(world, rows):
    """In the call that learns from the rows, and where rows of several calls are tied together."""
    told = []

    class Told(Whole):
        def objective(self, losses, reference, elements):
            told.append(elements)
            return super().objective(losses, reference, elements)

    method_step(Told(), world.model, None, SCHEDULE, **world.images, draws=world.own, micro_batch_size=rows)
    assert told == [1 * 8 * 8]


@pytest.mark.parametrize("rows", [None, 2])
def test_a_reference_sees_the_passes_that_are_compared_alone(world, rows):
    seen = []

    class ForgetAlone(Rows):
        compared = frozenset({"forget"})

        def compose(self, batch, draws, schedule):
            (whole,) = super().compose(batch, draws, schedule)
            return [whole.only(term.rows) for term in whole.terms]

        def objective(self, losses, reference, elements):
            seen.append((set(losses), set(reference)))
            return super().objective(losses, reference, elements)

    options = {"draws": world.own, "reference_model": world.reference}
    _, ours = gradient_of(
        ForgetAlone(), world.model, SCHEDULE, **world.images, **options, micro_batch_size=rows
    )
    parts = 1 if rows is None else 3
    assert seen == parts * [({"forget"}, {"forget"})] + parts * [({"retain"}, set())]
    _, expected = gradient_of(Rows(), world.model, SCHEDULE, **world.images, **options)
    assert relative_l2([ours], [expected]) <= 1e-12
