"""The `*_step` functions against the literal objectives on a tiny network, in float64, and the promises of
their options.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastunlearn as fu
from fastunlearn import reference
from fastunlearn.objective.schedule import PREDICTION_TYPES
from fastunlearn.reference import combine, objectives
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule, mixture_inputs, redirect_inputs

DOUBLE, BATCH = torch.float64, 6
EXACT = 1e-10


class World:
    """A network, a batch of images and all random numbers of one step."""

    def __init__(self, seed: int = 0, prediction_type: str = "epsilon", dtype: torch.dtype = DOUBLE):
        self.model, self.schedule = (
            TinyDenoiser(seed=seed).to(dtype),
            linear_schedule(prediction_type=prediction_type),
        )
        self.forget, self.neighbors, self.forget_noise, self.forget_timesteps = redirect_inputs(
            BATCH, 3, seed=seed, dtype=dtype, num_timesteps=999
        )
        pairs = mixture_inputs(BATCH, seed=seed + 1, dtype=dtype, num_timesteps=999)
        self.retain_noise, self.retain_timesteps = pairs.noise, pairs.timesteps
        # near the forget images: both SISS weights matter
        self.retain = (self.forget + 0.02 * pairs.retain).clamp(-1, 1)
        self.from_forget = torch.arange(BATCH) % 2 == 0
        self.uniform = torch.rand(
            self.forget.shape, generator=torch.Generator().manual_seed(seed + 2), dtype=dtype
        )

    def draws(self, *names: str) -> fu.Draws:
        values = {"from_forget": self.from_forget, "uniform_target": self.uniform}
        return fu.Draws(**{name: values[name] if name in values else getattr(self, name) for name in names})

    def output(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self.model(x_t, self.schedule.model_input(timesteps))

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True))

    def taken(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.model.parameters()]


FORGET, RETAIN = ("forget_noise", "forget_timesteps"), ("retain_noise", "retain_timesteps")


def vanilla(world: World, optimizer=None, **options) -> fu.StepOutput:
    return fu.vanilla_step(
        world.model, optimizer, world.schedule, world.retain, draws=world.draws(*RETAIN), **options
    )


def neggrad(world: World, optimizer=None, **options) -> fu.StepOutput:
    return fu.neggrad_step(
        world.model,
        optimizer,
        world.schedule,
        world.forget,
        superfactor=0.25,
        draws=world.draws(*FORGET),
        **options,
    )


def erasediff(world: World, optimizer=None, **options) -> fu.StepOutput:
    draws = world.draws(*FORGET, *RETAIN, "uniform_target")
    return fu.erasediff_step(
        world.model, optimizer, world.schedule, world.forget, world.retain, eta=3.0, draws=draws, **options
    )


def retrack(world: World, optimizer=None, **options) -> fu.StepOutput:
    draws = world.draws(*FORGET, *RETAIN)
    return fu.retrack_step(
        world.model,
        optimizer,
        world.schedule,
        world.forget,
        world.neighbors,
        world.retain,
        lambd=0.3,
        draws=draws,
        **options,
    )


def _siss(variant: str, *more: str) -> Callable[..., fu.StepOutput]:
    def step(world: World, optimizer=None, **options) -> fu.StepOutput:
        draws = world.draws(*FORGET, *RETAIN, *more)
        settings = {"lambd": 0.4, "scaling_norm": 2.0, "variant": variant, "draws": draws}
        return fu.siss_step(
            world.model, optimizer, world.schedule, world.forget, world.retain, **settings, **options
        )

    return step


STEPS: dict[str, Callable[..., fu.StepOutput]] = {
    "vanilla": vanilla,
    "neggrad": neggrad,
    "erasediff": erasediff,
    "retrack": retrack,
    "siss": _siss("mixture", "from_forget"),
    "no_is": _siss("no_is"),
    "bernoulli": _siss("bernoulli", "from_forget"),
}
TWO_GRADIENTS = ("erasediff", "siss", "no_is", "bernoulli")


def literal(name: str, world: World) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The gradient by the papers' formulas and autograd, and what the step should report."""
    schedule, noisy = world.schedule, {}
    for branch in ("forget", "retain"):
        noisy[branch] = reference.noising(
            getattr(world, branch),
            getattr(world, f"{branch}_noise"),
            getattr(world, f"{branch}_timesteps"),
            schedule,
        )
    forget, retain = (
        world.output(noisy[branch], getattr(world, f"{branch}_timesteps")) for branch in ("forget", "retain")
    )
    if name == "vanilla":
        loss = objectives.vanilla_loss(retain, world.retain_noise)
        return world.gradients(loss), {"loss": loss, "retain_loss": loss}
    if name == "neggrad":
        loss = objectives.neggrad_loss(forget, world.forget_noise, 0.25)
        return world.gradients(loss), {"loss": loss, "forget_loss": -4 * loss}
    if name == "retrack":
        arguments = (forget, noisy["forget"], world.neighbors, world.forget_timesteps)
        unlearn = objectives.retrack_unlearn_loss(*arguments, schedule).mean()
        loss = objectives.retrack_loss(*arguments, retain, world.retain_noise, schedule, 0.3)
        return world.gradients(loss), {
            "loss": loss,
            "forget_loss": unlearn,
            "retain_loss": objectives.vanilla_loss(retain, world.retain_noise),
        }
    if name == "erasediff":
        main, correction = objectives.erasediff_losses(retain, world.retain_noise, forget, world.uniform)
    elif name == "siss":  # ReTrack's two forwards: the step makes one
        images, timesteps = (world.retain, world.forget), (world.retain_timesteps, world.forget_timesteps)
        pair = (noisy["retain"], noisy["forget"])
        main, correction = objectives.siss_two_forward_losses(
            (retain, forget), images, pair, timesteps, world.from_forget, schedule, 0.4
        )
    elif name == "no_is":
        main, correction = (
            objectives.vanilla_loss(retain, world.retain_noise),
            objectives.vanilla_loss(forget, world.forget_noise),
        )
    else:
        picked = world.from_forget.view(-1, 1, 1, 1)
        output, noise = (
            torch.where(picked, forget, retain),
            torch.where(picked, world.forget_noise, world.retain_noise),
        )
        main, correction = objectives.siss_bernoulli_losses(output, noise, world.from_forget, 0.4)
    pair = world.gradients(main), world.gradients(correction)
    combined = combine.project(*pair, 3.0) if name == "erasediff" else combine.rescale(*pair, 2.0)
    report = {
        "retain_loss": main,
        "forget_loss": correction,
        "correction_norm": combined.correction_norm,
        "scaling_factor": combined.factor,
    }
    return combined.gradients, report | {"loss": main - combined.factor * correction}


@pytest.mark.parametrize("seed", [0, 7])
@pytest.mark.parametrize("name", STEPS)
def test_step_equals_the_literal_formula(name, seed):
    world = World(seed)
    gradient, report = literal(name, world)
    output = STEPS[name](world)
    assert relative_l2(world.taken(), gradient) <= EXACT
    for key, value in report.items():
        torch.testing.assert_close(getattr(output, key), value.detach(), rtol=EXACT, atol=EXACT, msg=key)
    torch.testing.assert_close(
        output.grad_norm, torch.cat([g.flatten() for g in gradient]).norm(), rtol=EXACT, atol=0
    )
    assert not any(value.requires_grad for value in output if value is not None)
    assert not output.skipped
    assert (output.correction_norm is not None) == (name in TWO_GRADIENTS)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("name", ["vanilla", "retrack"])
def test_other_prediction_types(name, kind):
    """The loss in the model's own prediction space, from the literal targets of every neighbour."""
    world = World(1, kind)
    x_t = reference.noising(world.retain, world.retain_noise, world.retain_timesteps, world.schedule)
    target = reference.prediction_target(
        world.retain, world.retain_noise, world.retain_timesteps, world.schedule
    )
    loss = reference.denoising_loss(world.output(x_t, world.retain_timesteps), target).mean()
    if name == "retrack":
        draw = reference.redirect(
            world.forget, world.neighbors, world.forget_noise, world.forget_timesteps, world.schedule
        )
        unlearn = (
            reference.denoising_loss(world.output(draw.x_t, world.forget_timesteps), draw.target)
            + draw.spread
        )
        loss = 0.3 * unlearn.mean() + 0.7 * loss
    output = STEPS[name](world)
    assert relative_l2(world.taken(), world.gradients(loss)) <= 1e-9
    torch.testing.assert_close(output.loss, loss.detach(), rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", STEPS)
@settings(max_examples=6, deadline=None, derandomize=True)
@given(size=st.integers(1, 2 * BATCH + 1))
def test_micro_batches_equal_one_batch(name, size):
    """Norms, rescaling and projection are those of the whole batch, however it is split."""
    whole, parts = World(3), World(3)
    expected, output = STEPS[name](whole), STEPS[name](parts, micro_batch_size=size)
    assert relative_l2(parts.taken(), whole.taken()) <= EXACT
    for key, value in expected._asdict().items():
        if value is not None:
            torch.testing.assert_close(getattr(output, key), value, rtol=EXACT, atol=EXACT, msg=key)


@pytest.mark.parametrize("name", STEPS)
def test_no_network_call_exceeds_the_micro_batch(name):
    world, sizes = World(), []
    world.model.register_forward_hook(lambda model, inputs, output: sizes.append(len(inputs[0])))
    STEPS[name](world, micro_batch_size=4)
    assert max(sizes) <= 4
    assert sum(sizes) == (2 * BATCH if name in ("retrack", "erasediff", "no_is") else BATCH)


@pytest.mark.parametrize("name", STEPS)
def test_optimizer_gets_the_clipped_gradient(name):
    """SGD with lr 1 moves by the gradient itself.

    The reported norm is the one before clipping, and gradients are cleared.
    """
    free, clipped = World(4), World(4)
    STEPS[name](free)
    before = [parameter.detach().clone() for parameter in clipped.model.parameters()]
    output = STEPS[name](clipped, torch.optim.SGD(clipped.model.parameters(), lr=1.0), max_grad_norm=0.5)
    moved = [
        start - parameter.detach()
        for start, parameter in zip(before, clipped.model.parameters(), strict=True)
    ]
    shrink = min(1.0, 0.5 / output.grad_norm.item())
    # clip_grad_norm_ divides by norm + 1e-6
    assert relative_l2(moved, [shrink * g for g in free.taken()]) <= 1e-5
    assert all(parameter.grad is None for parameter in clipped.model.parameters())


@pytest.mark.parametrize("name", STEPS)
def test_a_non_finite_step_changes_nothing(name):
    world = World(5)
    optimizer = torch.optim.AdamW(world.model.parameters(), lr=0.1)
    STEPS[name](world, optimizer)
    before = [parameter.detach().clone() for parameter in world.model.parameters()]
    for noise in (world.forget_noise, world.retain_noise):
        noise[:2] = torch.nan
    output = STEPS[name](world, optimizer)
    assert output.skipped
    assert all(
        torch.equal(start, parameter)
        for start, parameter in zip(before, world.model.parameters(), strict=True)
    )


def test_retrack_without_a_retain_batch():
    world = World(6)
    draw = reference.redirect(
        world.forget, world.neighbors, world.forget_noise, world.forget_timesteps, world.schedule
    )
    loss = (
        reference.denoising_loss(world.output(draw.x_t, world.forget_timesteps), draw.target) + draw.spread
    ).mean()
    expected = world.gradients(loss)
    output = fu.retrack_step(
        world.model,
        None,
        world.schedule,
        world.forget,
        world.neighbors,
        lambd=1.0,
        draws=world.draws(*FORGET),
    )
    assert relative_l2(world.taken(), expected) <= EXACT
    assert output.retain_loss is None


def test_each_branch_is_a_mean_over_its_own_batch():
    """Unlike the papers' EraseDiff, which divides both terms by the forget batch: with two retain rows for
    six forget rows its main term is a third of ours.
    """
    world = World(8)
    world.retain, world.retain_noise, world.retain_timesteps = (
        world.retain[:2],
        world.retain_noise[:2],
        world.retain_timesteps[:2],
    )
    _, papers = literal("erasediff", world)
    output = erasediff(world)
    torch.testing.assert_close(output.retain_loss, 3 * papers["retain_loss"].detach())
    torch.testing.assert_close(output.forget_loss, papers["forget_loss"].detach())


def test_forget_gradient_is_not_obtained_by_subtraction():
    """A tiny forget term has the direction of its own gradient.

    The difference of two accumulated float32 buffers would be rounding.
    """
    exact, single = World(9), World(9, dtype=torch.float32)
    for world in (exact, single):
        world.from_forget[:] = False
        world.retain_timesteps[:] = 80
        world.retain = (world.forget + 0.6 * (world.forget > 0) - 0.3).clamp(-1, 1)
    gradient, report = literal("siss", exact)
    assert report["forget_loss"] < 1e-8 * report["retain_loss"]
    output = STEPS["siss"](single)
    assert relative_l2(single.taken(), gradient) <= 1e-4
    assert output.correction_norm.item() == pytest.approx(report["correction_norm"].item(), rel=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_what_is_not_given_is_drawn_from_the_generator(name):
    """Two steps with the same generator seed agree, another seed differs, and torch's global generator is
    left alone.
    """
    results = []
    for seed in (1, 1, 2):
        world = World(10)
        world.draws = lambda *names: fu.Draws()
        state = torch.get_rng_state()
        STEPS[name](world, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(state, torch.get_rng_state())
        results.append(torch.cat([g.flatten() for g in world.taken()]))
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])
