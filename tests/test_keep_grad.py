"""Gradients that stand in `.grad` before a step: refused, or added to the step's. Values are not read."""

from __future__ import annotations

import copy

import pytest
import torch
from test_step import EXACT, STEPS, World
from torch import nn

from fastunlearn import Draws, ImageStore, Unlearner, Vanilla, vanilla_step
from fastunlearn.methods import Pass
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import no_host_sync

SCHEDULE = linear_schedule()


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def pull(model: nn.Module, scale: float = 1.0) -> None:
    """A penalty beside the step's loss, as EWC's: `scale * sum (theta - 1)^2`, gone back already."""
    (scale * sum((parameter - 1).square().sum() for parameter in model.parameters())).backward()


def grads(model: nn.Module) -> list[torch.Tensor]:
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("micro_batch_size", [None, 4])
def test_what_stands_is_added_to_the_combined_gradient(name, micro_batch_size):
    """After rescaling and projection, whose norms are those of the step alone; before the reported norm."""
    alone, world = World(2), World(2)
    reported = STEPS[name](alone)
    pull(world.model)
    standing = [gradient.clone() for gradient in grads(world.model)]
    expected = [own + other for own, other in zip(alone.taken(), standing, strict=True)]
    output = STEPS[name](world, keep_grad=True, micro_batch_size=micro_batch_size)
    assert relative_l2(world.taken(), expected) <= EXACT
    torch.testing.assert_close(
        output.grad_norm, torch.cat([gradient.flatten() for gradient in expected]).norm(), rtol=EXACT, atol=0
    )
    for field in ("loss", "forget_loss", "retain_loss", "correction_norm", "scaling_factor"):
        if getattr(reported, field) is not None:
            torch.testing.assert_close(
                getattr(output, field), getattr(reported, field), rtol=EXACT, atol=EXACT, msg=field
            )


@pytest.mark.parametrize("name", STEPS)
def test_the_sum_is_clipped_and_updates(name):
    free, world = World(4), World(4)
    for each in (free, world):
        pull(each.model)
    STEPS[name](free, keep_grad=True)
    before = copy.deepcopy(world.model)
    output = STEPS[name](
        world, torch.optim.SGD(world.model.parameters(), lr=1.0), keep_grad=True, max_grad_norm=0.5
    )
    moved = [
        start - parameter
        for start, parameter in zip(before.parameters(), world.model.parameters(), strict=True)
    ]
    assert (
        relative_l2(moved, [0.5 / output.grad_norm.item() * gradient for gradient in free.taken()]) <= 1e-5
    )  # clip_grad_norm_'s 1e-6
    assert all(gradient is None for gradient in grads(world.model))


@pytest.mark.parametrize("fused", [False, True])
def test_under_a_scaler_what_stands_is_scaled(fused):
    """As `scaler.scale(loss).backward()` leaves it."""
    moved = []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**8)):
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0, fused=fused)
        pull(model, 1.0 if scaler is None else scaler.scale(torch.ones(())).item())
        draws = Draws(retain_noise=images(1), retain_timesteps=torch.full((4,), 500))
        vanilla_step(
            model,
            optimizer,
            SCHEDULE,
            images(),
            draws=draws,
            grad_scaler=scaler,
            keep_grad=True,
            max_grad_norm=None,
        )
        moved.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(moved[1], moved[0], rtol=1e-5, atol=1e-5)


def test_a_gradient_that_is_not_finite_skips_the_step():
    model = TinyDenoiser()
    before = copy.deepcopy(model.state_dict())
    model.leave.bias.grad = torch.full((1,), float("inf"))
    for fused in (False, True):
        optimizer = torch.optim.AdamW(model.parameters(), fused=fused)
        model.leave.bias.grad = torch.full((1,), float("inf"))
        assert vanilla_step(model, optimizer, SCHEDULE, images(), keep_grad=True).skipped
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("optimizer", [None, torch.optim.SGD])
def test_the_callers_tensors_are_not_written_to(optimizer):
    """Assigned before every step, to parameters that the step has a gradient for and to some it has not."""
    model = TinyDenoiser()
    model.unused = nn.Linear(2, 2)
    always = {name: torch.ones_like(parameter) for name, parameter in model.named_parameters()}
    for _ in range(2):
        for name, parameter in model.named_parameters():
            parameter.grad = always[name]
        vanilla_step(
            model,
            optimizer and optimizer(model.parameters(), lr=0.1),
            SCHEDULE,
            images(),
            keep_grad=True,
            max_grad_norm=0.1,
        )
    assert all(torch.equal(value, torch.ones_like(value)) for value in always.values())


def test_a_gradient_with_a_graph_of_its_own():
    model = TinyDenoiser()
    sum(parameter.square().sum() for parameter in model.parameters()).backward(create_graph=True)
    vanilla_step(model, None, SCHEDULE, images(), keep_grad=True)
    assert not any(gradient.requires_grad for gradient in grads(model))


def test_nothing_is_read(monkeypatch):
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])  # which reads, on CPUs only
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    draws = Draws(retain_noise=images(1), retain_timesteps=torch.full((4,), 500))
    pull(model)
    with no_host_sync():
        vanilla_step(lambda x, t: model(x, t), optimizer, SCHEDULE, images(), draws=draws, keep_grad=True)
    model.leave.bias.grad = torch.zeros(1)
    with no_host_sync(), pytest.raises(ValueError, match="keep_grad"):
        vanilla_step(model, optimizer, SCHEDULE, images(), draws=draws)


# --- refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("given", ["optimizer", "None"])
def test_what_stands_is_not_dropped(name, given):
    """Nothing is drawn, computed or cleared before the error."""
    world, generator = World(), torch.Generator().manual_seed(0)
    optimizer = torch.optim.SGD(world.model.parameters(), lr=0.1) if given == "optimizer" else None
    world.draws = lambda *names: Draws()
    pull(world.model)
    standing, before, state = (
        grads(world.model),
        copy.deepcopy(world.model.state_dict()),
        generator.get_state(),
    )
    names = "enter.weight, enter.bias, time.weight and 3 more"
    text = rf"\.grad.*None.*zero_grad\(set_to_none=True\).*keep_grad=True.*got a gradient in {names}"
    with pytest.raises(ValueError, match=text):
        STEPS[name](world, optimizer, generator=generator)
    assert all(one is other for one, other in zip(grads(world.model), standing, strict=True))
    assert all(torch.equal(value, before[key]) for key, value in world.model.state_dict().items())
    assert torch.equal(generator.get_state(), state)


def test_zeros_are_a_gradient():
    """What `zero_grad(set_to_none=False)` leaves: that they are zeros, only reading them would tell."""
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    pull(model)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(ValueError, match="set_to_none=True"):
        vanilla_step(model, optimizer, SCHEDULE, images())
    optimizer.zero_grad(set_to_none=True)
    vanilla_step(model, optimizer, SCHEDULE, images())


def test_two_results_in_grad():
    """With `optimizer=None` the combined gradient is the result: a second call would drop it."""
    model = TinyDenoiser()
    vanilla_step(model, None, SCHEDULE, images(), generator=torch.Generator().manual_seed(0))
    first = [gradient.clone() for gradient in grads(model)]
    with pytest.raises(ValueError, match="keep_grad"):
        vanilla_step(model, None, SCHEDULE, images())
    vanilla_step(model, None, SCHEDULE, images(), generator=torch.Generator().manual_seed(0), keep_grad=True)
    assert relative_l2(grads(model), [2 * gradient for gradient in first]) <= 1e-6


@pytest.mark.parametrize("keep_grad", [False, True])
def test_a_frozen_parameter_of_the_optimizer(keep_grad):
    """The optimizer would move it by what stands there."""
    model = TinyDenoiser()
    model.leave.bias.requires_grad_(False)
    model.leave.bias.grad = torch.ones(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"keep_grad: expected .*, got .* leave.bias"):
        vanilla_step(model, optimizer, SCHEDULE, images(), keep_grad=keep_grad)


def test_other_bad_values():
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match="keep_grad: expected True or False, got 1"):
        vanilla_step(model, optimizer, SCHEDULE, images(), keep_grad=1)
    with pytest.raises(TypeError, match="keep_grad: expected True or False, got 'yes'"):
        Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=store(), batch_size=2, keep_grad="yes")
    model.leave.bias.grad = torch.ones(1).to_sparse()
    with pytest.raises(
        TypeError, match=r"keep_grad: expected dense gradients, got sparse ones in leave.bias"
    ):
        vanilla_step(model, optimizer, SCHEDULE, images(), keep_grad=True)


class Fails(TinyDenoiser):
    """Memory that does not suffice, say, for the second call."""

    calls = 0

    def forward(self, x_t, t):
        self.calls += 1
        if self.calls == 2:
            raise MemoryError
        return super().forward(x_t, t)


@pytest.mark.parametrize("keep_grad", [False, True])
def test_after_an_error_what_stood_stands_again(keep_grad):
    """The caller takes the same step again, in smaller parts."""
    expected, model = TinyDenoiser(), Fails()
    standing = []
    for network in (expected, model):
        if keep_grad:
            pull(network)
        options = {
            "draws": Draws(retain_noise=images(1), retain_timesteps=torch.full((4,), 500)),
            "keep_grad": keep_grad,
            "micro_batch_size": 2,
        }
        if network is model:
            standing = grads(model)
            with pytest.raises(MemoryError):
                vanilla_step(network, None, SCHEDULE, images(), **options)
            assert all(one is other for one, other in zip(grads(model), standing, strict=True))
        vanilla_step(network, None, SCHEDULE, images(), **options)
    assert relative_l2(grads(model), grads(expected)) == 0


# --- Unlearner ----------------------------------------------------------------------------------------------


def store() -> ImageStore:
    return ImageStore(
        torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )


def test_an_unlearner():
    moved = []
    for keep_grad in (False, True):
        model = TinyDenoiser()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        run = Unlearner(
            model,
            optimizer,
            SCHEDULE,
            Vanilla(),
            retain=store(),
            batch_size=4,
            keep_grad=keep_grad,
            max_grad_norm=None,
        )
        pull(model)
        standing = [gradient.clone() for gradient in grads(model)]
        if not keep_grad:
            with pytest.raises(ValueError, match="keep_grad"):
                run.step()
            assert run.step_index == 0
            optimizer.zero_grad()
        run.step()
        moved.append(
            [
                start - parameter
                for start, parameter in zip(TinyDenoiser().parameters(), model.parameters(), strict=True)
            ]
        )
    assert relative_l2(moved[1], [own + other for own, other in zip(moved[0], standing, strict=True)]) <= 1e-5
