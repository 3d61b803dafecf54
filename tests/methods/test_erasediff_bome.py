"""EraseDiff in its original form against a loop of plain torch in float64, and what its inner steps leave."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastunlearn import (
    Anchor,
    Draws,
    ImageStore,
    LowPass,
    Mask,
    NegGrad,
    TimeWindow,
    Unlearner,
    erasediff_step,
    method_step,
)
from fastunlearn.methods import Pass, registry
from fastunlearn.methods.erasediff_bome import RULES, EraseDiffBome
from fastunlearn.objective.combine import Project
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.reference.lowpass_residual import lowpass_residual
from fastunlearn.step.accumulate import Accumulator
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.checkpoints import save_tiny_checkpoint
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import no_host_sync

SCHEDULE = linear_schedule()
ROWS, RETAIN_ROWS, STEPS = 6, 4, 4
LR, DECAY = 1e-3, 0.1
EXACT = 1e-10
# Above every c that the small network has, so that lambda is not 0 in any step.
ETA = {"cosine": 1.5, "norm": 400.0, "projection": 2.0}


class Conditional(TinyDenoiser):
    """With a label, which shifts and scales what it returns."""

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            self.label = nn.Embedding(4, 2)

    def forward(self, x_t, t, label):
        shift, scale = self.label(label).unsqueeze(2).unsqueeze(3).unsqueeze(4).unbind(1)
        return super().forward(x_t, t) * (1 + scale) + shift


def random_images(rows: int, seed: int, dtype=torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(rows, 1, 8, 8, generator=generator, dtype=dtype) * 2 - 1


def draws_of(step: int, method: EraseDiffBome, dtype=torch.float64, low: int = 0) -> Draws:
    generator = torch.Generator().manual_seed(100 + step)
    options = {"generator": generator, "dtype": dtype}
    uniform = torch.rand(ROWS, 1, 8, 8, **options)
    return Draws(
        forget_noise=torch.randn(ROWS, 1, 8, 8, **options),
        retain_noise=torch.randn(RETAIN_ROWS, 1, 8, 8, **options),
        forget_timesteps=torch.randint(low, 1000, (ROWS,), generator=generator),
        retain_timesteps=torch.randint(low, 1000, (RETAIN_ROWS,), generator=generator),
        uniform_target=uniform if method.target == "uniform" else None,
    )


def world(conditional: bool) -> SimpleNamespace:
    model = (Conditional() if conditional else TinyDenoiser()).double()
    labels = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([3, 3, 0, 2])
    return SimpleNamespace(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=DECAY),
        forget=random_images(ROWS, 1),
        retain=random_images(RETAIN_ROWS, 2),
        forget_kwargs={"label": labels[0]} if conditional else {},
        retain_kwargs={"label": labels[1]} if conditional else {},
    )


def weights_of(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


# --- the literal loop
# -----------------------------------------------------------------------------


class Literal:
    """The formulas in the docstring of the method, one after the other, on torch's own autograd and AdamW."""

    def __init__(self, given: SimpleNamespace, method: EraseDiffBome):
        self.given, self.method = given, method
        self.parameters = list(given.model.parameters())
        self.optimizer = given.optimizer
        # By the forget row: what its squared error counts, and how its residual is filtered.
        self.weight = lambda timesteps: torch.ones(len(timesteps), dtype=torch.float64)
        self.energy = lambda residual: residual.square().sum((1, 2, 3))

    def noised(self, images, noise, timesteps):
        alpha, sigma = (table[timesteps].view(-1, 1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
        return alpha * images + sigma * noise

    def forget_loss(self, draws: Draws) -> Tensor:
        given, t = self.given, draws.forget_timesteps
        x_t = self.noised(given.forget, draws.forget_noise, t)
        target = draws.uniform_target
        if self.method.target == "other_condition":
            labels = given.retain_kwargs["label"].tolist()
            others = torch.tensor([labels[row % len(labels)] for row in range(len(given.forget))])
            with torch.no_grad():
                target = given.model(x_t, t, label=others)
        residual = given.model(x_t, t, **given.forget_kwargs) - target
        return (self.weight(t) * self.energy(residual)).mean()

    def retain_loss(self, draws: Draws) -> Tensor:
        given, t = self.given, draws.retain_timesteps
        x_t = self.noised(given.retain, draws.retain_noise, t)
        residual = given.model(x_t, t, **given.retain_kwargs) - draws.retain_noise
        return residual.square().sum((1, 2, 3)).mean()

    def gradient(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, self.parameters))

    def descend(self, gradients: list[Tensor]) -> float:
        """One update of the optimizer along gradients of norm 1 at most; the norm that they had."""
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def inner_loss(self, draws: Draws) -> float:
        """L_f(theta^K); weights and moments are then loaded from copies."""
        before = copy.deepcopy((self.given.model.state_dict(), self.optimizer.state_dict()))
        for _ in range(self.method.inner_steps):
            self.descend(self.gradient(self.forget_loss(draws)))
        found = self.forget_loss(draws).item()
        self.given.model.load_state_dict(before[0])
        self.optimizer.load_state_dict(before[1])
        return found

    def multiplier(self, retain: list[Tensor], forget: list[Tensor]) -> float:
        if self.method.lambda_bome >= 0:
            return self.method.lambda_bome
        r = torch.cat([gradient.flatten() for gradient in retain])
        f = torch.cat([gradient.flatten() for gradient in forget])
        c = {
            "cosine": r @ f / (r.norm() * f.norm() + 1e-8),
            "norm": r @ f / (f.norm() + 1e-8),
            "projection": r @ f / (f @ f),
        }[self.method.rule]
        return max(self.method.eta - c.item(), 0.0)

    def step(self, draws: Draws) -> dict[str, float]:
        inner = self.inner_loss(draws) if self.method.inner_steps else None
        forget_loss, retain_loss = self.forget_loss(draws), self.retain_loss(draws)
        forget, retain = self.gradient(forget_loss), self.gradient(retain_loss)
        multiplier = self.multiplier(retain, forget)
        norm = self.descend([r + multiplier * f for r, f in zip(retain, forget, strict=True)])
        report = {
            "loss": retain_loss.item() + multiplier * (forget_loss.item() - (inner or 0.0)),
            "forget_loss": forget_loss.item(),
            "retain_loss": retain_loss.item(),
            "grad_norm": norm,
            "correction_norm": torch.cat([f.flatten() for f in forget]).norm().item(),
            "scaling_factor": -multiplier,
            "skipped": 0.0,
        }
        return report if inner is None else report | {"inner_loss": inner}


def assert_same_loops(method: EraseDiffBome, *, low: int = 0, literal=lambda loop: None, **options) -> None:
    """`STEPS` steps of the package are those of the literal loop, which `literal` may change before."""
    ours, theirs = (world(method.target == "other_condition") for _ in range(2))
    loop = Literal(theirs, method)
    literal(loop)
    multipliers = []
    for step in range(STEPS):
        draws = draws_of(step, method, low=low)
        expected = loop.step(draws)
        output = method_step(
            method,
            ours.model,
            ours.optimizer,
            SCHEDULE,
            forget=ours.forget,
            retain=ours.retain,
            forget_kwargs=ours.forget_kwargs,
            retain_kwargs=ours.retain_kwargs,
            draws=draws,
            **options,
        )
        found = {name: value.item() for name, value in output._asdict().items() if value is not None}
        assert found == {name: pytest.approx(value, rel=EXACT) for name, value in expected.items()}, step
        multipliers.append(-found["scaling_factor"])
    assert all(multiplier > 0 for multiplier in multipliers)
    assert relative_l2([weights_of(ours.model)], [weights_of(theirs.model)]) < EXACT


@pytest.mark.parametrize("inner_steps", [0, 2])
@pytest.mark.parametrize("target", ["uniform", "other_condition"])
@pytest.mark.parametrize("rule", RULES)
def test_it_is_the_literal_loop(rule, target, inner_steps):
    assert_same_loops(EraseDiffBome(ETA[rule], rule, target=target, inner_steps=inner_steps))


@pytest.mark.parametrize("options", [{"micro_batch_size": 4}, {"micro_batch_size": 1}], ids=str)
@pytest.mark.parametrize("target", ["uniform", "other_condition"])
def test_micro_batches(target, options):
    assert_same_loops(EraseDiffBome(ETA["norm"], "norm", target=target, inner_steps=2), **options)


@pytest.mark.parametrize("rule", RULES)
def test_a_loss_scale_cancels(rule):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
    assert_same_loops(EraseDiffBome(ETA[rule], rule, inner_steps=1), grad_scaler=scaler)
    assert scaler.get_scale() == 2.0**20


@pytest.mark.parametrize("inner_steps", [0, 2])
def test_a_multiplier_that_is_given(inner_steps):
    assert_same_loops(EraseDiffBome(lambda_bome=0.1, inner_steps=inner_steps))


def test_selections_hold_in_the_inner_loop_too():
    """A window as weights (1.6 within, 0.8 outside, 1 on average), and a band of the forget residual."""
    window, band = TimeWindow(250, 500, outside=0.5, as_weight=True), LowPass(0.4, high_frequency_weight=0.25)
    mask = band.mask_on(8, 8, torch.device("cpu"))
    # p(t) T for a density of 1 within the window and 1/2 outside.
    share = 1000 / (250 + 0.5 * 750)

    def selected(loop: Literal) -> None:
        loop.weight = lambda t: share * torch.where((t >= 250) & (t < 500), 1.0, 0.5).double()
        loop.energy = lambda residual: Filtered.apply(residual, mask)

    method = EraseDiffBome(ETA["cosine"], "cosine", inner_steps=2)
    assert_same_loops(method, literal=selected, time_window=window, lowpass=band, micro_batch_size=4)


class Filtered(torch.autograd.Function):
    """`||F^-1(M o F(residual))||^2`, `[B]`, by the reference."""

    @staticmethod
    def forward(ctx, residual, mask):
        ones = torch.ones(len(residual), dtype=residual.dtype)
        energy, gradient = lowpass_residual(
            residual, torch.zeros_like(residual), ones, mask.table, mask.inside, mask.outside
        )
        ctx.save_for_backward(gradient)
        return energy

    @staticmethod
    def backward(ctx, outer):
        return outer.view(-1, 1, 1, 1) * ctx.saved_tensors[0], None


def test_projection_is_erasediff_bit_for_bit():
    """With the rule that the papers compare, uniform noise and no inner steps."""
    one, two = world(False), world(False)
    method = EraseDiffBome(2.0, "projection")
    for step in range(STEPS):
        draws = draws_of(step, method)
        method_step(
            method, one.model, one.optimizer, SCHEDULE, forget=one.forget, retain=one.retain, draws=draws
        )
        erasediff_step(two.model, two.optimizer, SCHEDULE, two.forget, two.retain, eta=2.0, draws=draws)
    assert torch.equal(weights_of(one.model), weights_of(two.model))


# --- the combination alone
# -----------------------------------------------------------------------------


class Given(torch.autograd.Function):
    """A prediction whose backward pass brings each parameter its gradient."""

    @staticmethod
    def forward(ctx, gradients, *parameters):
        ctx.gradients = gradients
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx, outer):
        return None, *(gradient * outer for gradient in ctx.gradients)


def combined(combination: Project, main: list, correction: list) -> tuple[list, Tensor]:
    """Gradients that `combination` makes of two (None: a parameter that has none), and lambda."""
    parameters = [nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in main]
    accumulator = Accumulator(parameters, combination)
    for role, gradients in (("forget", correction), ("retain", main)):
        there = [pair for pair in zip(parameters, gradients, strict=True) if pair[1] is not None]
        used, brought = zip(*there, strict=True)
        prediction = Given.apply(brought, *used)
        accumulator.backward(prediction, {role: torch.ones((), dtype=torch.float64)})
    report = accumulator.finish()
    return [parameter.grad for parameter in parameters], -report.scaling_factor


def test_the_cosine_counts_parameters_that_have_one_gradient():
    """||g_r|| is that of all retain gradients, ||g_f|| that of all forget gradients."""
    main = [torch.tensor([3.0, 0.0]).double(), torch.tensor([0.0, 4.0]).double(), None]
    correction = [torch.tensor([1.0, 2.0]).double(), None, torch.tensor([2.0, 0.0]).double()]
    # <g_r, g_f> = 3, ||g_r|| = 5, ||g_f|| = 3.
    gradients, multiplier = combined(Project(1.0, "cosine"), main, correction)
    expected = 1 - 3 / (15 + 1e-8)
    assert multiplier.item() == pytest.approx(expected, rel=1e-14)
    torch.testing.assert_close(gradients[0], main[0] + expected * correction[0], rtol=1e-14, atol=0)
    assert torch.equal(gradients[1], main[1])
    torch.testing.assert_close(gradients[2], expected * correction[2], rtol=1e-14, atol=0)


@pytest.mark.parametrize("rule", RULES)
def test_a_vanishing_forget_gradient_leaves_the_retain_gradient(rule):
    main, correction = [torch.ones(2).double()], [torch.zeros(2).double()]
    gradients, multiplier = combined(Project(1.0, rule), main, correction)
    assert multiplier == 0
    assert torch.equal(gradients[0], main[0])


# --- inner steps are taken back
# -----------------------------------------------------------------------------


class Hostile(TinyDenoiser):
    """Everything that a forward pass may leave behind: averages, random numbers, a buffer made anew."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm2d(1), nn.Dropout(0.2)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x_t, t):
        self.calls = self.calls + 1
        return self.drop(self.norm(super().forward(x_t, t)))


class OwnMomentum(torch.optim.Optimizer):
    """Keeps what it remembers beside `state`: a list of tensors, one tensor, and a number."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": LR})
        self.momentum = [torch.zeros_like(parameter) for parameter in parameters]
        self.longest, self.steps = torch.zeros(()), 0

    @torch.no_grad()
    def step(self, closure=None):
        self.steps += 1
        for parameter, momentum in zip(self.param_groups[0]["params"], self.momentum, strict=True):
            momentum.mul_(0.9).add_(parameter.grad)
            self.longest.copy_(torch.maximum(self.longest, momentum.norm()))
            parameter.sub_(LR / (1 + self.longest) / self.steps * momentum)


OPTIMIZERS = {
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=LR, weight_decay=DECAY),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=LR, fused=True),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=LR, momentum=0.9),
    "Adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=LR),
    "tensors of its own": lambda parameters: OwnMomentum(list(parameters)),
}
INNER = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 4},
    "band": {"lowpass": LowPass(0.5)},
    "float16": {"autocast_dtype": torch.float16},
}


def everything(given: SimpleNamespace) -> list:
    """All that a step may change, as copies; tensors are compared bit for bit."""
    optimizer, scaler = given.optimizer, given.scaler
    state = [sorted(entry.items()) for entry in (optimizer.state[p] for p in given.model.parameters())]
    groups = [{name: value for name, value in g.items() if name != "params"} for g in optimizer.param_groups]
    gradients = [parameter.grad for parameter in given.model.parameters()]
    random = torch.get_rng_state()
    scale = None if scaler is None else scaler.state_dict()
    own = [getattr(optimizer, name, None) for name in ("momentum", "longest", "steps")]
    return copy.deepcopy([given.model.state_dict(), state, groups, gradients, random, scale, own])


def assert_equal(one, two) -> None:
    if isinstance(one, Tensor):
        assert torch.equal(one, two)
        assert one.dtype == two.dtype
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_equal(one[name], two[name])
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_equal(left, right)
    else:
        assert one == two


def hostile(optimizer: str, *, scaled: bool = False) -> SimpleNamespace:
    model = Hostile()
    return SimpleNamespace(
        model=model,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        scaler=torch.amp.GradScaler("cpu", init_scale=2.0**4, growth_interval=2) if scaled else None,
        forget=random_images(ROWS, 1, torch.float32),
        retain=random_images(RETAIN_ROWS, 2, torch.float32),
    )


def take(given: SimpleNamespace, method, step: int = 0, **options):
    return method_step(
        method,
        given.model,
        given.optimizer,
        SCHEDULE,
        forget=given.forget,
        retain=given.retain,
        draws=draws_of(step, method, torch.float32),
        grad_scaler=given.scaler,
        **options,
    )


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("options", INNER.values(), ids=INNER)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "hyperparameters", [{"eta": ETA["norm"], "rule": "norm"}, {"lambda_bome": 0.1}], ids=str
)
def test_inner_steps_change_nothing_but_the_report(hyperparameters, optimizer, options, scaled):
    """The update does not depend on what they reach, so runs with and without them are one run."""
    plain, tried = (hostile(optimizer, scaled=scaled) for _ in range(2))
    reports = []
    for given, inner_steps in ((plain, 0), (tried, 3)):
        torch.manual_seed(7)
        method = EraseDiffBome(**hyperparameters, inner_steps=inner_steps)
        reports.append([take(given, method, step, **options) for step in range(3)])
        given.random = torch.rand(3)
    assert_equal(everything(plain), everything(tried))
    assert torch.equal(plain.random, tried.random)
    for without, found in zip(*reports, strict=True):
        assert without.inner_loss is None
        assert found.inner_loss.isfinite()
        expected = without.loss + without.scaling_factor * found.inner_loss
        assert torch.equal(found.loss, expected)
        assert not without.skipped
        assert without.scaling_factor < 0
        for name in ("forget_loss", "retain_loss", "grad_norm", "correction_norm", "scaling_factor"):
            assert torch.equal(getattr(without, name), getattr(found, name)), name


def test_in_an_autocast_context_of_the_caller():
    """There torch keeps the weights in half precision: neither inner steps nor the step may see old ones."""
    within, around = hostile("momentum"), hostile("momentum")
    method = EraseDiffBome(lambda_bome=0.1, inner_steps=3)
    torch.manual_seed(7)
    expected = take(within, method, autocast_dtype=torch.bfloat16, max_grad_norm=1e3)
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16):
        found = take(around, method, max_grad_norm=1e3)
    assert torch.equal(found.inner_loss, expected.inner_loss)
    assert_equal(everything(within), everything(around))


def test_inner_steps_bring_the_forget_loss_down():
    """That they are taken at all: more of them reach less."""
    found = []
    for inner_steps in (1, 4, 16):
        given = world(False)
        method = EraseDiffBome(lambda_bome=0.1, inner_steps=inner_steps)
        images = {"forget": given.forget, "retain": given.retain}
        draws = draws_of(0, method)
        output = method_step(method, given.model, given.optimizer, SCHEDULE, **images, draws=draws)
        found += [output.forget_loss.item()] if not found else []
        found.append(output.inner_loss.item())
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == 4


@pytest.mark.parametrize("fails_at", [1, 2, 4])
@pytest.mark.parametrize("scaled", [False, True])
def test_after_an_error_everything_is_as_before(scaled, fails_at):
    """In the first and second inner step, and in the call for their loss."""
    given = hostile("AdamW", scaled=scaled)
    method = EraseDiffBome(lambda_bome=0.1, inner_steps=3)
    take(given, method)
    for parameter in given.model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    gradients = [parameter.grad for parameter in given.model.parameters()]
    before, calls, forward = everything(given), [], given.model.drop.forward

    def failing(x):
        calls.append(x)
        if len(calls) == fails_at:
            raise RuntimeError("out of memory")
        return forward(x)

    given.model.drop.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        take(given, method, 1, keep_grad=True)
    assert len(calls) == fails_at
    assert_equal(before, everything(given))
    for parameter, gradient in zip(given.model.parameters(), gradients, strict=True):
        assert parameter.grad is gradient
    # And the step can be taken again.
    given.model.drop.forward = forward
    assert not take(given, method, 1, keep_grad=True).skipped


def test_the_loss_of_inner_steps_takes_no_graph():
    """Three inner steps, the forward pass of their loss, and the step itself with its two sets."""
    given, graphs = hostile("AdamW"), []
    given.model.register_forward_hook(lambda module, images, output: graphs.append(output.requires_grad))
    take(given, EraseDiffBome(lambda_bome=0.1, inner_steps=3))
    assert graphs == [True] * 3 + [False] + [True] * 2


class Sharing(torch.optim.SGD):
    """An optimizer whose state has everything that is not copied tensor by tensor."""

    def __init__(self, parameters):
        super().__init__(parameters, lr=0.1)
        whole = torch.arange(4.0)
        marked = torch.ones(2)
        marked.note = "mine"
        self.state["shared"] = {"whole": whole, "part": whole[1:3], "again": whole, "marked": marked}
        self.state["plain"] = [torch.ones(3).t(), torch.ones(2, 3).t(), torch.empty(0)]

    @torch.no_grad()
    def step(self, closure=None):
        super().step(closure)
        shared = self.state["shared"]
        shared["part"].add_(1)
        # What shares memory does so in the copy, too.
        assert shared["again"] is shared["whole"]
        assert shared["whole"][1] == shared["part"][0]
        assert shared["marked"].note == "mine"
        for tensor in self.state["plain"]:
            tensor.add_(1)


def test_state_that_shares_memory_is_put_back():
    one, two = hostile("AdamW"), hostile("AdamW")
    for given, inner_steps in ((one, 0), (two, 2)):
        optimizer = Sharing(given.model.parameters())
        given.optimizer = optimizer
        take(given, EraseDiffBome(lambda_bome=0.1, inner_steps=inner_steps))
        assert optimizer.state["shared"]["whole"].tolist() == [0.0, 2.0, 3.0, 3.0]
        assert [tensor.unique().tolist() for tensor in optimizer.state["plain"]] == [[2.0], [2.0], []]


def test_what_stood_in_grad_is_added_to_the_step_alone():
    one, two = hostile("momentum"), hostile("momentum")
    for given, inner_steps in ((one, 0), (two, 2)):
        for parameter in given.model.parameters():
            parameter.grad = torch.full_like(parameter, 0.5)
        torch.manual_seed(3)
        take(given, EraseDiffBome(lambda_bome=0.1, inner_steps=inner_steps), keep_grad=True)
    assert_equal(everything(one), everything(two))


def test_inner_steps_that_leave_float_range_ruin_no_update():
    models = TinyDenoiser(), TinyDenoiser()
    for model, inner_steps in zip(models, (0, 8), strict=True):
        given = hostile("momentum")
        given.model, given.optimizer = model, torch.optim.SGD(model.parameters(), lr=1e15)
        output = take(given, EraseDiffBome(lambda_bome=0.1, inner_steps=inner_steps), max_grad_norm=None)
        assert not output.skipped
    assert not output.inner_loss.isfinite()
    assert torch.equal(weights_of(models[0]), weights_of(models[1]))


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}], ids=str)
def test_inner_steps_do_not_wait_for_the_device(options, monkeypatch):
    # On a CPU the step reads weights, to leave out rows that count nothing; no other device does.
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])
    run = unlearner(EraseDiffBome(inner_steps=2), fused=True, **options)
    run.step()
    with no_host_sync():
        run.step()


# --- Unlearner
# -----------------------------------------------------------------------------


def unlearner(method, *, fused=False, **options) -> Unlearner:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=fused)
    stores = {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}
    return Unlearner(model, optimizer, SCHEDULE, method, **stores, **{"batch_size": 6} | options)


def test_a_scheduler_and_a_skipped_step():
    """A learning rate in effect is that of the step; a step that is skipped is so with inner steps, too."""
    runs = [unlearner(EraseDiffBome(lambda_bome=0.1, inner_steps=steps)) for steps in (0, 2)]
    for run in runs:
        run.lr_scheduler = torch.optim.lr_scheduler.ExponentialLR(run.optimizer, 0.5)
        run.step()
        assert run.last_lr == LR
        assert run.lr_scheduler.get_last_lr() == [LR / 2]
        nowhere = torch.full((6, 1, 8, 8), torch.inf)
        before = weights_of(run.model)
        output = run.step(Draws(retain_noise=nowhere))
        assert output.skipped
        assert run.skipped_steps == 1
        assert torch.equal(weights_of(run.model), before)
        assert (output.inner_loss is not None) == (run is runs[1])


# --- what is refused
# -----------------------------------------------------------------------------


class Nothing(ParameterRule):
    pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"eta": -0.1}, r"eta: expected a finite number in \[0, inf\), got -0.1"),
        ({"rule": "angle"}, "rule: expected one of cosine, norm, projection, got 'angle'"),
        ({"lambda_bome": float("nan")}, "lambda_bome: expected a finite number in .*, got nan"),
        ({"target": "noise"}, "target: expected one of uniform, other_condition, got 'noise'"),
        ({"inner_steps": -1}, "inner_steps: expected an integer >= 0, got -1"),
    ],
)
def test_hyperparameters_that_make_no_sense(given, message):
    with pytest.raises(ValueError, match=message):
        EraseDiffBome(**given)


def test_another_condition_where_there_is_none():
    given = hostile("AdamW")
    before = everything(given)
    message = r"target: expected 'uniform' where .* no conditions \(retain_kwargs\), got 'other_condition'"
    with pytest.raises(ValueError, match=message):
        take(given, EraseDiffBome(target="other_condition"))
    assert_equal(before, everything(given))


def test_an_unlearner_refuses_at_once_what_its_first_step_would():
    with pytest.raises(
        ValueError, match=r"^target: expected 'uniform' in an Unlearner, whose images have no"
    ):
        unlearner(EraseDiffBome(target="other_condition"))
    with pytest.raises(ValueError, match=r"^inner_steps: expected 0 here, got 2 with rules \(Nothing\)"):
        unlearner(EraseDiffBome(inner_steps=2), rules=[Nothing()])


class Around(torch.optim.AdamW):
    """An optimizer that keeps another one."""

    def __init__(self, parameters):
        parameters = list(parameters)
        super().__init__(parameters)
        self.inner = torch.optim.SGD(parameters)


def hooked(parameters):
    optimizer = torch.optim.AdamW(parameters)
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.parametrize(
    ("optimizer", "options", "message"),
    [
        (lambda parameters: None, {}, "optimizer None: there is no update to try out"),
        (torch.optim.AdamW, {"rules": [Nothing()]}, r"rules \(Nothing\), whose state could not be taken"),
        (Around, {}, "Around around another optimizer, whose state could not be taken back"),
        (hooked, {}, "an optimizer with hooks, which would see steps that are taken back"),
    ],
)
def test_inner_steps_that_could_not_be_taken_back(optimizer, options, message):
    given = hostile("AdamW")
    given.optimizer = optimizer(given.model.parameters())
    before = weights_of(given.model)
    with pytest.raises(ValueError, match=f"inner_steps: expected 0 here, got 2 with {message}"):
        take(given, EraseDiffBome(inner_steps=2), **options)
    assert torch.equal(weights_of(given.model), before)
    assert given.model.calls == 0
    # Without inner steps the same is welcome.
    take(given, EraseDiffBome(), **options)


def test_rules_that_do_nothing_may_stand_beside_inner_steps():
    one, two = hostile("momentum"), hostile("momentum")
    ones = {name: torch.ones_like(each, dtype=torch.bool) for name, each in two.model.named_parameters()}
    mean = dict(two.model.named_parameters())
    idle = [Mask(ones, model=two.model), Anchor(mean, 1.0, 0.0, model=two.model)]
    for given, rules in ((one, ()), (two, idle)):
        torch.manual_seed(3)
        take(given, EraseDiffBome(lambda_bome=0.1, inner_steps=2), rules=rules)
    assert_equal(everything(one), everything(two))


def test_inner_steps_of_a_method_with_one_gradient():
    class Ascent(NegGrad):
        inner_steps = 2

    given = hostile("AdamW")
    with pytest.raises(ValueError, match="got 2 with Ascent, which is no sum of losses with the forget grad"):
        method_step(Ascent(), given.model, given.optimizer, SCHEDULE, forget=given.forget)


def test_replay_is_refused_by_name():
    found = unlearner(EraseDiffBome(inner_steps=1))._not_replayable()
    assert found == "inner steps, which are taken back"
    run = unlearner(EraseDiffBome())
    assert run._not_replayable() is None
    run.method = EraseDiffBome(inner_steps=1)
    assert run._not_replayable_now(None) == found


# --- the command line
# -----------------------------------------------------------------------------


def test_the_command_line(tmp_path):
    pytest.importorskip("tyro")
    pytest.importorskip("diffusers")
    from fastunlearn.cli import main

    images = np.random.default_rng(0).integers(0, 256, (22, 1, 8, 8), dtype=np.uint8)
    np.save(tmp_path / "forget.npy", images[:2])
    np.save(tmp_path / "retain.npy", images[2:])
    save_tiny_checkpoint(tmp_path / "model")
    command = ["unlearn", "--method", "erasediff_bome", "--model", tmp_path / "model"]
    command += ["--forget", tmp_path / "forget.npy", "--retain", tmp_path / "retain.npy"]
    command += ["--rule", "norm", "--eta", 2, "--inner_steps", 1, "--output", tmp_path / "run"]
    command += ["--steps", 2, "--batch-size", 4, "--device", "cpu"]
    assert main([str(argument) for argument in command]) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["method"] == {
        "name": "EraseDiffBome",
        "eta": 2.0,
        "rule": "norm",
        "lambda_bome": -1.0,
        "target": "uniform",
        "inner_steps": 1,
    }
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2]
    assert all(line["inner_loss"] > 0 for line in lines)


def test_it_is_registered():
    assert registry.get("erasediff_bome").method is EraseDiffBome
