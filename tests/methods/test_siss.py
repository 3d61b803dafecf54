"""SISS' printed objective (superfactor) and the three scalings, against literal losses in float64."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import runs
import torch
from torch import Tensor

from fastunlearn import SISS, Draws, ImageStore, NoiseSchedule, TimeWindow, Uniform, Unlearner, method_step
from fastunlearn.methods import Pass, Vanilla, registry
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.reference import combine, noising, objectives
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
SIZES = {"forget": 3, "retain": 24}
VARIANTS = ("mixture", "no_is", "bernoulli")
variants = pytest.mark.parametrize("variant", VARIANTS)
EXACT = 1e-12

# --- a data set of two points, by quadrature through whole steps --------------------------------------------

KEPT, FORGOTTEN = 0.6, -0.3
LEVELS = NoiseSchedule(SCHEDULE.alpha[250::250], SCHEDULE.sigma[250::250])
NODES, NODE_WEIGHTS = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(120))
NODE_WEIGHTS = NODE_WEIGHTS / NODE_WEIGHTS.sum()  # of a standard normal number


class Waves(torch.nn.Module):
    """A network of two numbers, of which each row has its own copy: a step tells the gradient of each."""

    def __init__(self, rows):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.full((rows, 1, 1, 1), 2.0, dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.full((rows, 1, 1, 1), 0.3, dtype=torch.float64))

    def forward(self, x_t, t):
        return torch.sin(self.slope * x_t) + self.offset * (1 + t).view(-1, 1, 1, 1)


def exact_gradient(image, density):
    """Of `E_t E ||e(x_t) - eps||^2` over one point, `[2]`."""
    model, total = Waves(1), 0.0
    for timestep, probability in enumerate(density.table(len(LEVELS)).tolist()):
        x_t = LEVELS.alpha[timestep] * image + LEVELS.sigma[timestep] * NODES
        predicted = model(x_t.view(-1, 1, 1, 1), torch.full((len(NODES),), timestep)).flatten()
        total = total + probability * (NODE_WEIGHTS * (predicted - NODES).square()).sum()
    return torch.stack(torch.autograd.grad(total, list(model.parameters()))).flatten()


def expected_gradient(method, forget_density, retain_density):
    """Of a step of `method`, over branch, timestep and noise, `[2]`."""
    levels, nodes = len(LEVELS), len(NODES)
    share = method.lambd
    if method.variant == "no_is":  # whose rows have both branches
        share = 0
    # Every node of every level from the retain branch, then from the forget branch; what is never drawn is no
    # row.
    densities = (1 - share) * retain_density.drawn(levels), share * forget_density.drawn(levels)
    probability = torch.cat(densities).repeat_interleave(nodes) * NODE_WEIGHTS.repeat(2 * levels)
    at = torch.arange(levels).repeat_interleave(nodes).repeat(2)
    noise, from_forget = NODES.repeat(2 * levels), torch.arange(2 * levels * nodes) >= levels * nodes
    drawn = probability > 0
    noise, at, from_forget = noise[drawn].view(-1, 1, 1, 1), at[drawn], from_forget[drawn]
    draws = Draws(noise, noise, at, at, None if method.variant == "no_is" else from_forget)

    model, rows = Waves(len(at)), len(at)
    method_step(
        method, model, None, LEVELS, forget=torch.full_like(noise, FORGOTTEN),
        retain=torch.full_like(noise, KEPT), sizes=SIZES, draws=draws, time_window=forget_density,
        retain_density=retain_density,
    )  # fmt: skip
    # A step is a mean over rows, each of which counts as often as it is drawn.
    of_rows = torch.stack([parameter.grad.flatten() * rows for parameter in model.parameters()])
    return of_rows @ probability[drawn]


@pytest.fixture
def rows_in_order(monkeypatch):
    """On a CPU a step sorts rows by what they need, and these belong to numbers of their own."""
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])


EVERY_LAMBDA = [("mixture", lambd) for lambd in (0.0, 0.1, 0.5, 0.9, 1.0)]
EVERY_LAMBDA += [("bernoulli", lambd) for lambd in (0.1, 0.5, 0.9)] + [("no_is", 0.5)]


@pytest.mark.parametrize("superfactor", [0.0, 2.5])
@pytest.mark.parametrize(("variant", "lambd"), EVERY_LAMBDA)
@pytest.mark.usefixtures("rows_in_order")
def test_the_expected_gradient_is_that_of_the_printed_objective(variant, lambd, superfactor):
    """Naive deletion's less `s k / (n - k)` of NegGrad's, at every lambda: naive deletion's own at s = 0."""
    method = SISS(lambd, variant=variant, superfactor=superfactor)
    found = expected_gradient(method, Uniform(), Uniform())
    expected = exact_gradient(KEPT, Uniform()) - superfactor * 3 / 24 * exact_gradient(FORGOTTEN, Uniform())
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("variant", "lambd"), [("mixture", 0.3), ("mixture", 0.8), ("bernoulli", 0.3)])
@pytest.mark.usefixtures("rows_in_order")
def test_branches_with_timesteps_of_their_own_keep_the_objective(variant, lambd):
    """The forget term is that of its window, where the weights have the ratio of the densities."""
    window = TimeWindow(1, 3, outside=0.2)
    found = expected_gradient(SISS(lambd, variant=variant, superfactor=2.5), window, Uniform())
    expected = exact_gradient(KEPT, Uniform()) - 2.5 * 3 / 24 * exact_gradient(FORGOTTEN, window)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


# --- batches, against the papers' formulas and autograd -----------------------------------------------------

B = 6
SCALINGS = {
    "norm": {"scaling_norm": 2.0},
    "ratio": {"scaling_norm": 0.3, "scaling": "ratio"},
    "all of it": {"scaling_norm": 1.0, "scaling": "ratio"},
    "clip": {"scaling_norm": 2.0, "scaling": "clip"},
    "a clip that does nothing": {"scaling_norm": 1e9, "scaling": "clip"},
    "superfactor": {"superfactor": 1.7},
    "superfactor 0": {"superfactor": 0.0},
}
settings = pytest.mark.parametrize("setting", SCALINGS.values(), ids=SCALINGS)


@dataclass
class World:
    """Pairs of one noise and one timestep, and a network."""

    dtype: torch.dtype = torch.float64
    timesteps: tuple[int, ...] = (40, 300, 420, 700, 990, 150)
    apart: float = 0.1  # how far a retain image is from its forget image

    def __post_init__(self):
        generator = torch.Generator().manual_seed(4)
        numbers = torch.randn(3, B, 1, 8, 8, generator=generator, dtype=torch.float64).to(self.dtype)
        self.forget, self.noise = numbers[0], numbers[2]
        self.retain = self.forget + self.apart * numbers[1]
        self.at = torch.tensor(self.timesteps)
        self.from_forget = torch.arange(B) % 2 == 0
        self.model = TinyDenoiser().to(self.dtype)

    def draws(self, method) -> Draws:
        choice = None if method.variant == "no_is" else self.from_forget
        return Draws(self.noise, self.noise, self.at, self.at, choice)

    def step(self, method, optimizer=None, **options):
        """What a step reports, and the gradient that it leaves `[P]`."""
        for parameter in self.model.parameters():
            parameter.grad = None
        options = {"draws": self.draws(method)} | options
        if method.superfactor is not None:
            options["sizes"] = SIZES
        images = {"forget": self.forget, "retain": self.retain}
        out = method_step(method, self.model, optimizer, SCHEDULE, **images, **options)
        if optimizer is not None:
            return out, None
        return out, torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])

    def gradients(self, method) -> tuple[list[Tensor], list[Tensor], Tensor, Tensor]:
        """Those of the two literal losses, and the losses."""
        noisy = {
            role: noising(getattr(self, role), self.noise, self.at, SCHEDULE) for role in ("forget", "retain")
        }
        output = {role: self.model(x_t, self.at) for role, x_t in noisy.items()}
        if method.variant == "no_is":
            main, correction = objectives.siss_no_is_losses(output["retain"], output["forget"], self.noise)
        else:
            picked = self.from_forget.view(-1, 1, 1, 1)
            chosen = torch.where(picked, output["forget"], output["retain"])
            x_t = torch.where(picked, noisy["forget"], noisy["retain"])
            rest = self.from_forget, SCHEDULE, method.lambd
            if method.variant == "mixture":
                main, correction = objectives.siss_mixture_losses(
                    chosen, self.retain, self.forget, x_t, self.at, *rest
                )
            else:
                main, correction = objectives.siss_bernoulli_losses(
                    chosen, self.noise, self.from_forget, method.lambd
                )
                if method.superfactor is not None:  # no rescaling makes up for the share
                    correction = correction / method.lambd
        parameters = list(self.model.parameters())
        of_main, of_correction = (
            torch.autograd.grad(loss, parameters, retain_graph=True) for loss in (main, correction)
        )
        return of_main, of_correction, main.detach(), correction.detach()

    def literal(self, method) -> tuple[Tensor, dict[str, Tensor]]:
        """The gradient `[P]` by the formulas, and what a step should report."""
        of_main, of_correction, main, correction = self.gradients(method)
        report = {"retain_loss": main, "forget_loss": correction}
        if method.superfactor is None:
            found = combine.rescale(of_main, of_correction, method.scaling_norm, method.scaling)
            factor, gradients = found.factor, found.gradients
            report |= {"correction_norm": found.correction_norm, "scaling_factor": factor}
        else:
            factor = method.superfactor * SIZES["forget"] / SIZES["retain"]
            gradients = [one - factor * other for one, other in zip(of_main, of_correction, strict=True)]
        report["loss"] = main - factor * correction
        return torch.cat([gradient.flatten() for gradient in gradients]), report


def assert_literal(world, method, **options):
    out, gradient = world.step(method, **options)
    expected, report = world.literal(method)
    assert relative_l2([gradient], [expected]) <= EXACT
    for name, value in report.items():
        torch.testing.assert_close(getattr(out, name), value, rtol=EXACT, atol=0, msg=name)
    assert (out.correction_norm is None) == (method.superfactor is not None)
    assert not out.skipped


# 1 and 4 leave more than one call that needs both gradients: nothing is finished in place.
@pytest.mark.parametrize("rows", [None, 1, 4])
@settings
@variants
def test_a_step_is_the_literal_formula(variant, setting, rows):
    assert_literal(World(), SISS(0.4, variant=variant, **setting), micro_batch_size=rows)


def test_these_rows_tell_the_scalings_apart():
    """So that none of them could stand in for another in the test above."""
    world, lengths = World(), {}
    for name, setting in SCALINGS.items():
        method = SISS(0.4, **setting)
        if method.superfactor is None:
            out, _ = world.step(method)
            lengths[name] = float(out.scaling_factor * out.correction_norm)
    main = torch.cat([gradient.flatten() for gradient in world.gradients(SISS(0.4))[0]]).norm().item()
    correction = lengths["a clip that does nothing"]
    assert lengths["norm"] == pytest.approx(2)
    assert lengths["clip"] == pytest.approx(2)
    assert lengths["ratio"] == pytest.approx(0.3 * main)
    assert lengths["all of it"] == pytest.approx(main)
    assert correction > 2
    assert not math.isclose(correction, main, rel_tol=0.1)


@settings
def test_a_mask_comes_before_all_norms(setting):
    """The ratio is of the restricted gradients."""

    class Half(ParameterRule):
        def restrict(self, parameters, gradients):
            for number, gradient in enumerate(gradients):
                gradient.mul_(number % 2)

    world, method = World(), SISS(0.4, **setting)
    of_main, of_correction, *_ = world.gradients(method)
    mains, corrections = (
        [number % 2 * g for number, g in enumerate(side)] for side in (of_main, of_correction)
    )
    if method.superfactor is None:
        expected = combine.rescale(mains, corrections, method.scaling_norm, method.scaling).gradients
    else:
        factor = method.superfactor * SIZES["forget"] / SIZES["retain"]
        expected = [main - factor * other for main, other in zip(mains, corrections, strict=True)]
    for rows in (None, 1):
        _, gradient = world.step(method, rules=[Half()], micro_batch_size=rows)
        assert relative_l2([gradient], [torch.cat([each.flatten() for each in expected])]) <= EXACT


@settings
@variants
def test_a_loss_scale_changes_nothing(variant, setting):
    """Half precision needs one; norms, ratio and clip are those of the unscaled gradients."""
    method = SISS(0.4, variant=variant, **setting)
    plain, expected = World(torch.float32).step(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for rows in (None, 2):
        out, gradient = World(torch.float32).step(method, grad_scaler=scaler, micro_batch_size=rows)
        # Of the two gradients, whose difference may be much smaller than either.
        size = float(plain.grad_norm)
        if method.superfactor is None:
            size += 2 * float(plain.scaling_factor * plain.correction_norm)
        assert (gradient / 2.0**10 - expected).norm() <= 1e-6 * size
        for name in ("retain_loss", "forget_loss", "correction_norm", "scaling_factor"):
            value = getattr(plain, name)
            if value is not None:
                torch.testing.assert_close(getattr(out, name), value, rtol=1e-5, atol=1e-6)


@settings
def test_in_half_precision(setting):
    """float16 rounds activations to 11 bits; a scale that overflows skips the step and goes down."""
    method = SISS(0.4, **setting)
    world = World(torch.float32, timesteps=(300, 320, 420, 700, 990, 600))
    _, expected = world.step(method)
    scaler = torch.amp.GradScaler("cpu", init_scale=16.0)
    options = {"autocast_dtype": torch.float16, "grad_scaler": scaler}
    _, gradient = world.step(method, **options)
    assert relative_l2([gradient / 16], [expected]) <= 2e-2
    optimizer = torch.optim.AdamW(world.model.parameters(), fused=True)
    before = [parameter.detach().clone() for parameter in world.model.parameters()]
    overflowing = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    out, _ = world.step(method, optimizer, autocast_dtype=torch.float16, grad_scaler=overflowing)
    assert out.skipped
    assert overflowing.get_scale() == 2.0**39
    assert all(map(torch.equal, before, world.model.parameters()))


# --- limits -------------------------------------------------------------------------------------------------


def test_lambda_0_keeps_what_naive_deletion_keeps():
    """At the same draws: all rows are retain images, of weight 1."""
    world = World()
    world.from_forget = torch.zeros(B, dtype=torch.bool)
    vanilla = method_step(
        Vanilla(), world.model, None, SCHEDULE, retain=world.retain,
        draws=Draws(retain_noise=world.noise, retain_timesteps=world.at),
    )  # fmt: skip
    kept = torch.cat([parameter.grad.flatten() for parameter in world.model.parameters()])
    for setting in SCALINGS.values():
        method = SISS(0.0, **setting)
        out, gradient = world.step(method)
        torch.testing.assert_close(out.retain_loss, vanilla.retain_loss, rtol=EXACT, atol=0)
        # What a scaling, or the superfactor, takes away is the forget gradient.
        factor = out.scaling_factor
        if factor is None:
            factor = method.superfactor * SIZES["forget"] / SIZES["retain"]
        correction = torch.cat([each.flatten() for each in world.gradients(method)[1]])
        assert relative_l2([gradient + factor * correction], [kept]) <= 1e-10
        if method.superfactor == 0:
            assert relative_l2([gradient], [kept]) <= EXACT
            torch.testing.assert_close(out.loss, vanilla.loss, rtol=EXACT, atol=0)


@pytest.mark.parametrize("rows", [None, 1])
@pytest.mark.parametrize("scaling", ["ratio", "clip", "superfactor"])
def test_forget_weights_below_float32(scaling, rows):
    """All rows are retain images far from their forget image: the forget weights lie about 1e-100.

    A ratio is kept, since their unit cancels. A clip, and a superfactor, subtract what there is, which is
    nothing; the norm is reported with its unit, and no number leaves float32 on the way.
    """
    world = World(torch.float32, timesteps=(40,) * B, apart=0.5)
    world.from_forget = torch.zeros(B, dtype=torch.bool)
    exact = World(torch.float64, timesteps=(40,) * B, apart=0.5)
    exact.from_forget = world.from_forget
    for name in ("forget", "retain", "noise"):
        setattr(exact, name, getattr(world, name).double())
    exact.model.load_state_dict(world.model.state_dict())
    method = {
        "ratio": SISS(0.4, 0.3, scaling="ratio"),
        "clip": SISS(0.4, 2.0, scaling="clip"),
        "superfactor": SISS(0.4, superfactor=1.7),
    }[scaling]
    _, of_correction, _, loss = exact.gradients(method)
    norm = torch.cat([gradient.flatten() for gradient in of_correction]).abs().amax()
    assert 1e-250 < norm < 1e-45  # no float32 number is smaller, and its square is no float64
    out, gradient = world.step(method, micro_batch_size=rows)
    assert not out.skipped
    kept, _ = exact.literal(SISS(0.4, superfactor=0.0))
    if scaling == "ratio":
        torch.testing.assert_close(
            out.correction_norm * out.scaling_factor, 0.3 * kept.norm(), rtol=1e-4, atol=0
        )
        in_units = torch.cat([gradient.flatten() / norm for gradient in of_correction])
        kept = kept - 0.3 * kept.norm() / in_units.norm() * in_units
    if scaling == "clip":
        assert out.scaling_factor == 1
        torch.testing.assert_close(
            out.correction_norm / norm, torch.cat([g.flatten() / norm for g in of_correction]).norm(),
            rtol=1e-4, atol=0,
        )  # fmt: skip
    if scaling != "superfactor":
        torch.testing.assert_close(out.forget_loss.double(), loss, rtol=1e-4, atol=0)
    assert relative_l2([gradient], [kept]) <= 1e-4


@pytest.mark.parametrize("scaling", ["norm", "ratio", "clip"])
def test_forget_weights_below_float64_leave_the_retain_term(scaling):
    """There is nothing to scale: the factor is 0, or, of a gradient that is short enough, 1."""
    world = World(timesteps=(0,) * B)
    world.from_forget = torch.zeros(B, dtype=torch.bool)
    out, gradient = world.step(SISS(0.4, 1.0, scaling=scaling))
    assert out.forget_loss == 0
    assert out.scaling_factor == (1 if scaling == "clip" else 0)
    kept, _ = world.literal(SISS(0.4, superfactor=0.0))
    assert relative_l2([gradient], [kept]) <= EXACT


# --- runs ---------------------------------------------------------------------------------------------------


def stores(forget=4, retain=20):
    return {"forget": ImageStore(runs.images(forget, 1)), "retain": ImageStore(runs.images(retain, 2))}


def test_an_unlearner_knows_the_sizes():
    """A step of one is the step of a caller's loop that is told them."""
    method, found = SISS(superfactor=30.0), []

    class Noted(torch.optim.SGD):
        def step(self):
            found.append([parameter.grad.clone() for parameter in self.param_groups[0]["params"]])

    for forget, retain in ((4, 20), (2, 20)):
        model = TinyDenoiser()
        run = Unlearner(
            model, Noted(model.parameters(), lr=1.0), SCHEDULE, method, **stores(forget, retain),
            batch_size=6, max_grad_norm=None, autocast_dtype=None,
        )  # fmt: skip
        batch, draws = run._draw(Draws())
        images = {"forget": batch.forget.gather(), "retain": batch.retain.gather()}
        noise, at = draws.forget_noise.numbers(), draws.forget_timesteps
        run.step()
        method_step(
            method, model, None, SCHEDULE, **images, sizes={"forget": forget, "retain": retain},
            draws=Draws(noise, noise, at, at, draws.from_forget),
        )  # fmt: skip
        taken = [parameter.grad for parameter in model.parameters()]
        assert relative_l2(taken, found[-1]) <= 1e-5
    assert relative_l2(found[0], found[1]) > 0.01


def test_sets_that_are_counted_are_disjoint():
    """With the whole training set as images to keep, `k / (n - k)` would not be what it says."""
    forget = runs.images(4, 1)
    sets = {
        "forget": ImageStore(forget),
        "retain": ImageStore(torch.cat([runs.images(20, 2), forget[:2]])),
    }
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {**sets, "allow_overlap": True, "batch_size": 4}
    expected = (
        r"^forget: expected images that are not in retain, got 2 that are \(rows 0, 1\); SISS counts both"
    )
    with pytest.raises(ValueError, match=expected):
        Unlearner(model, optimizer, SCHEDULE, SISS(superfactor=1.0), **options)
    Unlearner(model, optimizer, SCHEDULE, SISS(), **options)


@settings
def test_a_run_is_not_resumed_under_another_setting(tmp_path, setting):
    method = SISS(0.4, **setting)
    runs.stop(runs.make(method=method), tmp_path)
    other = SISS(0.4, superfactor=0.9) if method.superfactor is None else SISS(0.4)
    with pytest.raises(
        ValueError, match=r"^resume_from_checkpoint: expected a checkpoint of a run with method"
    ):
        runs.run(runs.make(method=other), tmp_path, resume_from_checkpoint="latest")


@pytest.mark.parametrize("method", [SISS(0.4, 2.0), SISS(0.4, 0.1, scaling="ratio")], ids=str)
def test_a_checkpoint_of_before_there_were_scalings_goes_on_as_it_was(tmp_path, method):
    """Under the papers' scaling, which it had; under no other."""
    runs.stop(runs.make(method=SISS(0.4, 2.0)), tmp_path)

    def forget_later_ones(metadata):
        for name in ("scaling", "superfactor"):
            del metadata["metadata"]["identity"]["method"][name]

    runs.change_json(runs.saved_in(tmp_path, runs.SAVED_AT), forget_later_ones)
    resumed = runs.make(method=method)
    if method.scaling == "norm":
        runs.run(resumed, tmp_path, resume_from_checkpoint="latest")
        assert resumed.step_index == runs.STEPS
    else:
        with pytest.raises(ValueError, match=r"a run with method .*scaling \('ratio' here"):
            runs.run(resumed, tmp_path, resume_from_checkpoint="latest")


# --- what is refused ----------------------------------------------------------------------------------------


REFUSED = [
    (lambda: SISS(superfactor=-1.0), ValueError, r"^superfactor: expected a finite number in \[0, inf\)"),
    (lambda: SISS(superfactor=math.inf), ValueError, r"^superfactor: expected a finite number"),
    (lambda: SISS(superfactor="3"), TypeError, r"^superfactor: expected a number, got '3'"),
    (lambda: SISS(scaling="half"), ValueError, r"^scaling: expected one of norm, ratio, clip, got 'half'"),
    (lambda: SISS(scaling=None), ValueError, r"^scaling: expected one of norm, ratio, clip, got None"),
    (lambda: SISS(scaling_norm=0.0, scaling="ratio"), ValueError, r"^scaling_norm: expected .*\(0, inf\)"),
    (
        lambda: SISS(scaling_norm=5.0, superfactor=1.0),
        ValueError,
        r"^scaling_norm: expected None with a superfactor, where nothing is rescaled, got 5.0",
    ),
    (
        lambda: SISS(scaling="clip", superfactor=1.0),
        ValueError,
        r"^scaling: expected 'norm' with a superfactor, where nothing is rescaled, got 'clip'",
    ),
]


@pytest.mark.parametrize(("make", "error", "message"), REFUSED)
def test_bad_hyperparameters(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize("recipe", ["mnist-tshirt", "celeba-hq", "cifar-10", "sd-1.4"])
def test_the_norm_of_a_recipe_is_no_ratio(recipe):
    """A norm of 5 or 500 would make the forget gradient that many times as long as the retain gradient."""
    method = registry.get("siss").recipes[recipe].method
    expected = r"^scaling_norm: expected a share of the retain gradient's norm, in \(0, 1\], with the scaling"
    with pytest.raises(ValueError, match=expected):
        replace(method, scaling="ratio")
    assert replace(method, scaling="ratio", scaling_norm=None).scaling_norm == 0.1
    assert replace(method, scaling="clip").scaling_norm == method.scaling_norm


def test_norms_that_are_not_given():
    assert SISS() == SISS(scaling_norm=5.0)
    assert SISS(scaling="clip").scaling_norm == 5.0
    assert SISS(scaling="ratio").scaling_norm == 0.1
    assert SISS(superfactor=1.0).scaling_norm is None


@pytest.mark.parametrize(("sizes", "error", "message"), [
    (None, TypeError, r"^sizes: expected how many images each whole set has, a dict of forget, r"),
    ((3, 24), TypeError, r"^sizes: expected .*a dict of forget, retain .*got tuple"),
    ({"forget": 3}, ValueError, r"^sizes: expected .*got one of forget"),
    ({}, ValueError, r"^sizes: expected .*got one of nothing"),
    ({"forget": 3, "retain": 0}, ValueError, r"^sizes\['retain'\]: expected an integer >= 1, got 0"),
    ({"forget": 3.0, "retain": 4}, TypeError, r"^sizes\['forget'\]: expected an integer, got 3.0"),
])  # fmt: skip
def test_bad_sizes(sizes, error, message):
    world = World()
    images = {"forget": world.forget, "retain": world.retain}
    with pytest.raises(error, match=message):
        method_step(SISS(superfactor=1.0), world.model, None, SCHEDULE, **images, sizes=sizes)


def test_sizes_that_nobody_asks_for():
    world = World()
    images = {"forget": world.forget, "retain": world.retain}
    with pytest.raises(
        ValueError, match=r"^sizes: expected None \(SISS does not ask how large the sets are\)"
    ):
        method_step(SISS(), world.model, None, SCHEDULE, **images, sizes=SIZES)
