"""The public functions on tensors against the literal formulas: values, gradients, precision, limits."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn import functional as F
from fastunlearn import reference
from fastunlearn.objective.schedule import PREDICTION_TYPES
from fastunlearn.testing.budgets import assert_within_budget, largest_error, relative_error
from fastunlearn.testing.factories import linear_schedule, mixture_inputs, redirect_inputs

few = settings(max_examples=25, deadline=None, derandomize=True)
shapes = st.sampled_from([(1, 8, 8), (3, 5, 7), (4, 1, 9)])


@few
@given(
    k=st.sampled_from([1, 2, 7, 30]),
    shape=shapes,
    seed=st.integers(0, 1000),
    kind=st.sampled_from(PREDICTION_TYPES),
    given_x_t=st.booleans(),
)
def test_redirect_equals_the_literal_formula(k, shape, seed, kind, given_x_t):
    schedule = linear_schedule(prediction_type=kind)
    # flow: sigma at 999 leaves no signal
    inputs = redirect_inputs(
        batch=3, num_neighbors=k, shape=shape, seed=seed, dtype=torch.float64, num_timesteps=999
    )
    truth = reference.redirect(*inputs, schedule)
    x_t = truth.x_t if given_x_t else None
    for name, value in F.redirect(*inputs, schedule, x_t=x_t)._asdict().items():
        assert largest_error(value, getattr(truth, name)) <= 1e-8 * max(
            1, getattr(truth, name).abs().max().item()
        ), name


@few
@given(
    shape=shapes,
    seed=st.integers(0, 1000),
    kind=st.sampled_from(PREDICTION_TYPES),
    lambd=st.floats(0.01, 0.99),
    timed=st.booleans(),
)
def test_mixture_equals_the_literal_formula(shape, seed, kind, lambd, timed):
    schedule = linear_schedule(prediction_type=kind)
    retain, forget, noise, t, from_forget = mixture_inputs(
        shape=shape, distance=0.02, seed=seed, dtype=torch.float64, num_timesteps=999
    )
    ratio = torch.linspace(-2, 2, 4, dtype=torch.float64) if timed else None
    truth = reference.mixture(retain, forget, noise, t, schedule, lambd, from_forget, time_log_ratio=ratio)
    draw = F.mixture(retain, forget, noise, t, schedule, lambd, from_forget, time_log_ratio=ratio)
    for name, value in draw._asdict().items():
        assert largest_error(value, getattr(truth, name)) <= 1e-8 * max(
            1, getattr(truth, name).abs().max().item()
        ), name
    torch.testing.assert_close(
        (1 - lambd) * draw.retain_weight + lambd * draw.forget_weight,
        torch.ones(4, dtype=torch.float64),
        rtol=1e-12,
        atol=0,
    )


@pytest.mark.parametrize("t", [0, 10, 250, 700, 999])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 32, 32)])
def test_float32_stays_within_the_error_budget(t, shape):
    """Three seeds together: with three rows alone, the plain formula is sometimes right by chance."""
    schedule, draws = linear_schedule(), []
    for seed in range(3):
        inputs = redirect_inputs(num_neighbors=10, shape=shape, distance=0.003, timesteps=t, seed=seed)
        exact = [value.double() if value.is_floating_point() else value for value in inputs]
        draws.append(
            (
                F.redirect(*inputs, schedule),
                reference.redirect(*inputs, schedule),
                reference.redirect(*exact, schedule),
            )
        )
    for name in ("target", "spread", "weights"):
        closed, plain, truth = (
            torch.cat([getattr(draw, name) for draw in column]) for column in zip(*draws, strict=True)
        )
        assert_within_budget(f"t={t} {name}", closed, plain, truth)


@pytest.mark.parametrize("exact", [True, False], ids=["given sqdist", "own sqdist"])
def test_weights_at_t0_are_closer_to_float64_than_the_papers_formula(exact, record_property):
    """Near-duplicates far from the forget image, at t = 0: float32 squares of `v_j` reach 1e7 and lose
    differences of order one.
    """
    schedule = linear_schedule()
    for seed in range(3):
        pixels = _near_duplicates(seed)
        images = pixels.double() * 2 / 255 - 1
        rows, noise = images.float(), torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(seed))
        t = torch.zeros(2, dtype=torch.int64)
        sqdist = (
            (pixels[:, :1] - pixels[:, 1:]).square().flatten(2).sum(2).double() * (2 / 255) ** 2
            if exact
            else None
        )
        truth = reference.redirect(images[:, 0], images[:, 1:], noise.double(), t, schedule).weights
        closed = largest_error(
            F.redirect(rows[:, 0], rows[:, 1:], noise, t, schedule, sqdist=sqdist).weights, truth
        )
        papers = largest_error(reference.redirect(rows[:, 0], rows[:, 1:], noise, t, schedule).weights, truth)
        record_property(
            f"seed {seed}: error of the closed form, of the papers' float32 formula", (closed, papers)
        )
        print(f"weights at t = 0: closed form {closed:.2g}, papers' float32 formula {papers:.2g}")
        assert truth.max() < 0.99  # no one-hot weights, which any formula would find
        assert closed < 0.1 * papers


def _near_duplicates(seed: int) -> torch.Tensor:
    """Grey values `[2, 1 + 6, 3, 64, 64]`: an image, and six others that differ from it in half of their
    pixels but from each other in four only, by one.
    """
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(1, 255, (2, 1, 3 * 64 * 64), generator=generator).repeat(1, 7, 1)
    half = pixels.shape[2] // 2
    pixels[:, 1:, :half] = torch.randint(0, 256, (2, 1, half), generator=generator)
    changed = half + torch.randint(half, (2, 6, 4), generator=generator)
    pixels[:, 1:].scatter_add_(2, changed, torch.randint(0, 2, changed.shape, generator=generator) * 2 - 1)
    return pixels.view(2, 7, 3, 64, 64)


@pytest.mark.parametrize("lambd", [0.0, 1.0])
@pytest.mark.parametrize("t", [0, 400])
def test_mixture_has_finite_weights_at_lambda_zero_and_one(lambd, t):
    """Where the printed formula is `0 * inf`: the branch that is always drawn weighs 1.

    The other weight is a plain likelihood ratio.
    """
    inputs = mixture_inputs(shape=(1, 28, 28), distance=0.5, timesteps=t)
    from_forget = torch.full((4,), lambd == 1.0)
    draw = F.mixture(*inputs[:4], linear_schedule(), lambd, from_forget)
    drawn, other = (
        (draw.forget_weight, draw.retain_weight) if lambd == 1 else (draw.retain_weight, draw.forget_weight)
    )
    assert torch.equal(drawn, torch.ones_like(drawn))
    assert (other >= 0).all()
    assert (other < 1).all()  # x_t lies nearer to the image it was made from


def test_x_t_given_equals_x_t_made():
    schedule, inputs = linear_schedule(), redirect_inputs(dtype=torch.float64)
    made = F.redirect(*inputs, schedule)
    forget, neighbors, _, timesteps = inputs
    for name, value in (
        F.redirect(forget, neighbors, None, timesteps, schedule, x_t=made.x_t)._asdict().items()
    ):
        torch.testing.assert_close(value, getattr(made, name), rtol=1e-9, atol=1e-9)


def test_duplicate_neighbors_share_their_weight():
    schedule, inputs = linear_schedule(), redirect_inputs(num_neighbors=3, distance=0.02, timesteps=600)
    twice = inputs._replace(neighbors=torch.cat([inputs.neighbors, inputs.neighbors], dim=1))
    once, doubled = F.redirect(*inputs, schedule), F.redirect(*twice, schedule)
    torch.testing.assert_close(doubled.weights, torch.cat([once.weights, once.weights], dim=1) / 2)
    torch.testing.assert_close(doubled.target, once.target)
    torch.testing.assert_close(doubled.spread, once.spread, rtol=1e-4, atol=1e-6)


def test_memory_layout_does_not_matter():
    schedule, inputs = linear_schedule(), redirect_inputs(shape=(3, 6, 5))
    wide = torch.randn(3, 4, 3, 6, 10)
    wide[..., ::2] = inputs.neighbors
    forget, noise = (
        inputs.forget.contiguous(memory_format=torch.channels_last),
        inputs.noise.transpose(2, 3).contiguous().transpose(2, 3),
    )
    strided = F.redirect(forget, wide[..., ::2], noise, inputs.timesteps, schedule)
    for name, value in F.redirect(*inputs, schedule)._asdict().items():
        torch.testing.assert_close(getattr(strided, name), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weighted", [True, False])
def test_denoising_loss_and_its_gradient(dtype, weighted):
    """Sums are float32 or better whatever the prediction is.

    The gradient is `2 w (prediction - target)` in the dtype of the prediction.
    """
    generator = torch.Generator().manual_seed(3)
    prediction = torch.randn(3, 2, 9, 9, generator=generator).to(dtype).requires_grad_()
    target, weight = (
        torch.randn(3, 2, 9, 9, generator=generator),
        torch.tensor([0.0, 0.3, 7.0], dtype=torch.float64) if weighted else None,
    )
    loss = F.denoising_loss(prediction, target, weight)
    upstream = torch.tensor([1.0, -2.0, 0.5])
    (gradient,) = torch.autograd.grad((loss * upstream).sum(), prediction)

    exact = prediction.detach().double().requires_grad_()
    exact_loss = reference.denoising_loss(exact, target.double(), weight)
    (exact_gradient,) = torch.autograd.grad((exact_loss * upstream).sum(), exact)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    assert relative_error(loss, exact_loss) <= 1e-6
    assert relative_error(gradient, exact_gradient) <= 2 * torch.finfo(dtype).eps


def test_weights_carry_no_gradient():
    schedule, inputs = linear_schedule(), redirect_inputs()
    assert not any(value.requires_grad for value in F.redirect(*inputs, schedule))


@pytest.mark.parametrize("op", ["redirect", "mixture", "noised"])
def test_reference_backend_gives_the_same(op, monkeypatch):
    schedule, redirect, mixture = linear_schedule(), redirect_inputs(), mixture_inputs(distance=0.02)
    call = {
        "redirect": lambda: F.redirect(*redirect, schedule),
        "mixture": lambda: F.mixture(*mixture[:4], schedule, 0.5, mixture.from_forget),
        "noised": lambda: F.noised(mixture.retain, mixture.noise, mixture.timesteps, schedule),
    }[op]
    eager = call()
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "reference")
    for value, literal in zip(eager, call(), strict=True):
        torch.testing.assert_close(value, literal, rtol=1e-3, atol=1e-3, check_dtype=False)
