"""Windows of time, bands of frequencies and weights of the loss in whole steps of every method: those of
plain torch, however the rows are split, scaled, stored or resumed.
"""

from __future__ import annotations

import copy
from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from every_selection import EVERYTHING, SELECTIONS, STRATA, TOTAL_STEPS, WEIGHTS, fitting
from literal_step import ROWS, SCHEDULE, Literal, literal_in_float64, selection_of
from small_methods import Whole
from test_step import EXACT, STEPS, World
from torch import Tensor

import fastunlearn as fu
from fastunlearn import ImageStore, LowPass, Unlearner
from fastunlearn.methods import SISS, EraseDiff, Method, NegGrad, ReTrack, Vanilla
from fastunlearn.objective.draws import CounterSource, Draws, Purpose
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.objective.protocol import has_own_objective
from fastunlearn.objective.schedule import NoiseSchedule
from fastunlearn.objective.selection import Selection
from fastunlearn.objective.time import LogitNormal, Stratified, TimeWindow
from fastunlearn.reference import combine
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.methods import compared_with, every_variant

# Where the forget term counts: EraseDiff's projection leaves it out while the retain gradient serves it.
METHODS = [ReTrack(k=2, lambd=1.0), *every_variant(k=2, lambd=0.3, eta=3.0, beta=2.0)]
# A mean alone would be a small difference of large numbers: float32 says little of it.
GROWING = {"lowpass": LowPass(schedule="linear_increase", start=0.3, stop=0.9), "total_steps": 2}


def assert_literal(literal: Literal, step: int) -> None:
    output, gradient = literal.taken(step)
    reported, expected = literal.expected(step)
    assert relative_l2(gradient, expected) <= EXACT
    for name, value in reported.items():
        torch.testing.assert_close(getattr(output, name).double(), value, rtol=EXACT, atol=EXACT)
    assert not output.skipped


@pytest.mark.parametrize("given", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_is_that_of_plain_torch(method, given):
    literal = literal_in_float64(method, given)
    for step in (0, 3, 20) if "total_steps" in given else (0,):
        assert_literal(literal, step)


@pytest.mark.parametrize("backend", ["reference", "eager"])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_other_backends_take_the_same_step(monkeypatch, method, backend):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    assert_literal(literal_in_float64(method, EVERYTHING), 3)


HOSTILE = {
    "odd": {"shape": (1, 7, 5)},
    "one pixel": {"shape": (3, 1, 1)},
    "a line": {"shape": (1, 1, 6)},
    "channels-last": {"shape": (3, 7, 5), "layout": torch.channels_last},
    "one row": {"rows": 1},
    "flow": {"schedule": linear_schedule(prediction_type="flow")},
    "v": {"schedule": linear_schedule(prediction_type="v_prediction")},
    "one timestep": {"schedule": NoiseSchedule.from_alphas_cumprod(torch.tensor([0.5]))},
}


@pytest.mark.parametrize("world", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_on_what_nobody_planned(method, world):
    last = len(world.get("schedule", SCHEDULE))
    window = TimeWindow(last // 4, last, outside=0.5, as_weight=True)
    given = EVERYTHING | {"time_window": Stratified(window), "retain_density": Stratified(LogitNormal())}
    # The one row of this variant is of either branch: the other's gradient is 0, and rescaled it is NaN.
    if isinstance(method, SISS) and method.variant == "bernoulli" and world == HOSTILE["one row"]:
        pytest.skip("a batch of one has one of the two gradients")
    assert_literal(literal_in_float64(method, given, **world), 2)


WEIGHTED = [each for each in METHODS if each != Vanilla() and not has_own_objective(each)]


@pytest.mark.parametrize("method", WEIGHTED, ids=str)
def test_weights_that_are_all_zero_leave_what_the_other_branch_learns(method):
    """No row is in the window: the step is that of the retain term, or moves nothing. None is skipped."""
    literal = literal_in_float64(method, {"time_window": TimeWindow(0, 1, as_weight=True)})
    names = [name for name in literal.draws.given() if name.endswith("_timesteps")]
    literal.draws = replace(literal.draws, **dict.fromkeys(names, torch.arange(ROWS) + 300))
    output, gradient = literal.taken(0)
    assert (output.forget_loss, output.skipped) == (0, False)
    _, terms = literal.terms(0)
    if "retain" in method.needs:
        assert relative_l2(gradient, literal.gradient(terms["retain"])) <= EXACT
    else:
        assert not any(each.any() for each in gradient)


# --- the doors ----------------------------------------------------------------------------------------------

OF_STEP = {"vanilla": Vanilla(), "neggrad": NegGrad(), "erasediff": EraseDiff(), "retrack": ReTrack()}


def drawn_step(name: str, given: dict[str, Any], **options) -> tuple[fu.StepOutput, list[Tensor]]:
    """A `*_step` in float64 that draws everything itself: its report and its gradient."""
    world = World(3)
    world.draws = lambda *names: Draws()
    given = fitting(OF_STEP.get(name, SISS()), given)
    output = STEPS[name](world, generator=torch.Generator().manual_seed(5), step=5, **given, **options)
    return output, world.taken()


@pytest.mark.parametrize("name", STEPS)
def test_every_argument_reaches_the_step(name):
    """What is left out changes the gradient."""
    everything = EVERYTHING | {"snr_gamma": 0.01}
    changes = [{"time_window": None}, {"retain_density": None}, {"lowpass": None}, {"snr_gamma": None}]
    changes.append({"loss_weight": None, "snr_gamma": None})
    _, whole = drawn_step(name, everything)
    for change in changes:
        if change == fitting(OF_STEP.get(name, SISS()), change):
            _, without = drawn_step(name, everything | change)
            assert relative_l2(without, whole) > 1e-3, change


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8])
def test_a_step_is_a_number_or_a_tensor(dtype):
    """Of any integer dtype, also where the run has more steps than it can count."""
    lowpass = LowPass(schedule="linear_increase", start=0.1, stop=0.9)
    for total_steps in (TOTAL_STEPS, 1000):
        gradients = []
        for step in (5, torch.tensor(5, dtype=dtype)):
            literal = literal_in_float64(NegGrad(), {"lowpass": lowpass, "total_steps": total_steps})
            gradients.append(literal.taken(step)[1])
        assert relative_l2(*gradients) == 0


# --- an Unlearner -------------------------------------------------------------------------------------------


def make(method: Method, given: dict[str, Any], *, dtype=torch.uint8, shape=(1, 8, 8), **options):
    """An Unlearner on a CPU; `given` as far as it fits the method."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (24, *shape), generator=generator, dtype=torch.uint8)
    latents = options.pop("latents", False)
    if dtype != torch.uint8:
        images = images.to(dtype) * 2 / 255 - 1
    layout = options.pop("layout", torch.contiguous_format)
    model = TinyDenoiser(shape[0]).to(memory_format=layout)
    options |= compared_with(method, TinyDenoiser(shape[0], seed=1))
    stores = {
        "forget": ImageStore(images[:4], latents=latents),
        "retain": ImageStore(images[4:], latents=latents),
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    options = {"batch_size": 6} | options | fitting(method, given)
    return Unlearner(model, optimizer, SCHEDULE, method, **stores, **options)


def weights_of(run: Unlearner) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])


class Seen(ParameterRule):
    """Keeps the combined gradient of a step, before it is clipped."""

    def add(self, parameters, loss_scale):
        self.gradient = [parameter.grad / loss_scale for parameter in parameters]


def assert_as_accurate(run: Unlearner, given: dict[str, Any], steps: int = 2) -> None:
    """Steps of `run` have the gradients of plain torch at the numbers of these steps.

    They are as far from float64 as those of plain torch in the same precision, within a factor of two and a
    rounding.
    """
    seen, errors, plain_errors = Seen(), [], []
    run.rules = (seen,)
    for step in range(steps):
        batch, draws = run._draw(Draws())
        own = Literal(
            run.method, given, copy.deepcopy(run.model), batch, draws,
            reference=run.reference_model, autocast_dtype=run.autocast_dtype,
        )  # fmt: skip
        networks = [copy.deepcopy(each) for each in (run.model, run.reference_model)]
        model, reference = (None if each is None else each.double() for each in networks)
        exact = Literal(run.method, given, model, batch, draws, reference=reference)
        truth = exact.expected(step)[1]
        assert not run.step().skipped
        errors.append(relative_l2(seen.gradient, truth))
        plain_errors.append(relative_l2(own.expected(step)[1], truth))
    rounding = torch.finfo(run.autocast_dtype or torch.float32).eps
    assert max(errors) <= 2 * max(plain_errors) + rounding


# Rows in several calls, processes and scalers: test_every_combination.py.
UNLEARNERS = {
    "whole": {},
    "odd": {"shape": (1, 7, 5)},
    "float32 rows": {"dtype": torch.float32},
    "on the host": {"residency": "host"},
    "latents": {"latents": True, "dtype": torch.float32, "shape": (4, 4, 4)},
    "channels-last": {"shape": (3, 7, 5), "layout": torch.channels_last},
    "bfloat16": {"autocast_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", UNLEARNERS.values(), ids=UNLEARNERS)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_of_an_unlearner_are_those_of_plain_torch(method, options):
    assert_as_accurate(make(method, EVERYTHING, **copy.deepcopy(options)), EVERYTHING)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_of_an_unlearner_with_a_growing_band_are_those_of_plain_torch(method):
    given = STRATA | GROWING
    assert_as_accurate(make(method, given), given)


# Of SISS' branches: the density of the one, relative to within its window, outside of it.
UNLIKE = {"now and then": (0.5, 0.2), "never": (0.0, 0.0), "one never": (0.5, 0.0)}


@pytest.mark.parametrize("step", [0, 2])
@pytest.mark.parametrize("outside", UNLIKE.values(), ids=UNLIKE)
def test_siss_mixes_times_as_its_densities_do(outside, step):
    """A step of an Unlearner, from counters and tables alone: nothing that it draws or computes is asked for.

    Eq. 6 of arXiv 2503.01034 for samples (t, x_t): `w_a = q_a / ((1 - lambd) q_x + lambd q_a)`, `q = p(t)
    q(x_t | t, image)`, and `w_x` alike.
    """
    method, rows = SISS(lambd=0.4, scaling_norm=2.0), 32
    windows = TimeWindow(100, 600, outside[0]), TimeWindow(400, 900, outside[1])
    images = close_images()
    run, seen = unlearner_of(method, images, *windows, rows=rows), Seen()
    run.rules = (seen,)
    for _ in range(step):
        run.step()
    model = copy.deepcopy(run.model).double()
    output = run.step()

    # What is drawn.
    source = CounterSource(torch.tensor([0, step, 0]))
    a, x = (
        images[name][source.integers(rows, len(images[name]), Purpose[f"{name.upper()}_ROWS"])].double()
        for name in ("forget", "retain")
    )
    picked = source.uniform((rows,), Purpose.FROM_FORGET) <= method.lambd
    forget_t = windows[0].draw(source, Purpose.FORGET_TIMESTEPS, rows, len(SCHEDULE))
    retain_t = windows[1].draw(source, Purpose.RETAIN_TIMESTEPS, rows, len(SCHEDULE))
    t = torch.where(picked, forget_t, retain_t)
    noise = source.noise(a.shape, Purpose.FORGET_NOISE).numbers().double()

    # What it is made to, and by which image it may have been made.
    alpha, sigma = (table[t].double().view(-1, 1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
    x_t = alpha * torch.where(picked.view(-1, 1, 1, 1), a, x) + sigma * noise
    targets = [(x_t - alpha * image) / sigma for image in (a, x)]
    # Both likelihoods over the larger of the two, which would vanish by themselves.
    logs = torch.stack([-target.square().flatten(1).sum(1) / 2 for target in targets])
    q_a, q_x = (logs - logs.max(0).values).exp()
    q_a, q_x = literal_table(windows[0])[t] * q_a, literal_table(windows[1])[t] * q_x
    mixture = (1 - method.lambd) * q_x + method.lambd * q_a
    predicted = model(x_t, t)
    terms = [
        (weight * (predicted - target).square().flatten(1).sum(1)).mean()
        for weight, target in zip((q_a / mixture, q_x / mixture), targets, strict=True)
    ]
    gradients = [torch.autograd.grad(term, list(model.parameters()), retain_graph=True) for term in terms]
    expected = combine.rescale(gradients[1], gradients[0], method.scaling_norm).gradients
    found = torch.stack([output.forget_loss, output.retain_loss]).double()
    torch.testing.assert_close(found, torch.stack(terms).detach(), rtol=ROUNDED, atol=0)
    assert relative_l2(seen.gradient, expected) <= ROUNDED


# float32 against float64. Without the ratio of the densities they are apart by more than 0.005.
ROUNDED = 1e-4


def close_images() -> dict[str, Tensor]:
    """Of either set; so near each other that every one of them may have made a noisy image."""
    generator = torch.Generator().manual_seed(0)
    images = 0.5 * torch.rand(1, 1, 4, 4, generator=generator)
    images = images + 0.02 * torch.randn(24, 1, 4, 4, generator=generator)
    return {"forget": images[:4], "retain": images[4:]}


def unlearner_of(
    method: Method, images: dict[str, Tensor], time_window: TimeWindow, retain_density: TimeWindow, rows: int
) -> Unlearner:
    model = TinyDenoiser(1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    stores = {name: ImageStore(each) for name, each in images.items()}
    options = {"time_window": time_window, "retain_density": retain_density, "batch_size": rows}
    return Unlearner(model, optimizer, SCHEDULE, method, **stores, **options)


def literal_table(window: TimeWindow) -> Tensor:
    """Eq. 7 of arXiv 2510.17917, `[T]`."""
    table = torch.full((len(SCHEDULE),), window.outside, dtype=torch.float64)
    table[window.start : window.stop] = 1
    return table / table.sum()


@pytest.mark.parametrize("method", [method for method in METHODS if method != Vanilla()], ids=str)
def test_a_band_moves_over_the_length_of_the_run(method):
    """At the same steps a run of twice the length has other radii, and comes to other weights."""
    run, longer = (
        make(method, EVERYTHING | {"total_steps": length}) for length in (TOTAL_STEPS, 2 * TOTAL_STEPS)
    )
    for _ in range(4):
        run.step()
        longer.step()
    assert not torch.equal(weights_of(longer), weights_of(run))


# --- a selection that is replaced between steps -------------------------------------------------------------


@pytest.mark.parametrize("name", [each.name for each in fields(Selection)])
def test_a_part_of_a_selection_is_read_and_not_set(name):
    """Set, it would be an attribute that nobody asks for."""
    run = make(SISS(), EVERYTHING)
    assert getattr(run, name) == EVERYTHING[name]
    with pytest.raises(
        AttributeError, match=rf"^{name}: expected another selection \(unlearner.selection = "
    ):
        setattr(run, name, None)
    assert run.selection == selection_of(EVERYTHING)
    run.selection = Selection()
    assert getattr(run, name) is None


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_selection_may_be_replaced(method):
    """From then on the run is one that had it from the beginning, at the same weights."""
    run, other = make(method, STRATA), make(method, EVERYTHING)
    run.step()
    other.step()
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    run.total_steps, run.selection = other.total_steps, other.selection
    for _ in range(2):
        assert torch.equal(run.step().loss, other.step().loss)
    assert torch.equal(weights_of(run), weights_of(other))


@pytest.mark.parametrize(
    ("method", "schedule", "message"),
    [
        (Whole(), SCHEDULE, r"^time_window: expected a density that is drawn from \(Whole makes more of"),
        (Vanilla(), SCHEDULE, r"^time_window: expected None \(Vanilla reads no forget images\)"),
        (SISS(), linear_schedule(100), r"^time_window: stop: expected at most the 100 timesteps"),
    ],
)
def test_a_method_or_schedule_that_is_replaced_has_to_fit_the_selection(method, schedule, message):
    """Whole has no use for weights, and would learn from all timesteps alike."""
    run = make(SISS(), WEIGHTS)
    run.step()
    before = weights_of(run).clone()
    first = run.method, run.schedule
    run.method, run.schedule = method, schedule
    for _ in range(2):
        with pytest.raises(ValueError, match=message):
            run.step()
    assert torch.equal(weights_of(run), before)
    run.method, run.schedule = first
    assert not run.step().skipped
