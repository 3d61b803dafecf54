"""Densities, bands and weights in the steps of every method, against literal losses in float64."""

import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from fastunlearn import (
    SISS,
    Draws,
    EraseDiff,
    ImageStore,
    LogitNormal,
    LowPass,
    NegGrad,
    NoiseSchedule,
    ReTrack,
    Stratified,
    TimeWindow,
    Uniform,
    Unlearner,
    Vanilla,
    method_step,
    siss_step,
)
from fastunlearn import functional as F
from fastunlearn.host import say
from fastunlearn.objective import draws as draw
from fastunlearn.objective.draws import Time
from fastunlearn.objective.frequency import BandMask
from fastunlearn.objective.protocol import Pass, Term
from fastunlearn.objective.selection import Selection
from fastunlearn.objective.time import Density
from fastunlearn.reference.mixture import mixture
from fastunlearn.reference.redirect import neighbor_noise
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
T, B, SIZE = len(SCHEDULE), 5, 8
WINDOW = TimeWindow(250, 750)
WEIGHTED = TimeWindow(250, 750, outside=0.2, as_weight=True)
METHODS = {
    "retrack": ReTrack(k=3, lambd=0.3),
    "siss": SISS(0.4, 2.0),
    "siss without sampling": SISS(0.4, 2.0, "no_is"),
    "siss by chance": SISS(0.4, 2.0, "bernoulli"),
    "siss by ratio": SISS(0.4, 0.3, scaling="ratio"),
    "siss clipped": SISS(0.4, 2.0, scaling="clip"),
    "siss as printed": SISS(0.4, superfactor=1.5),
    "erasediff": EraseDiff(0.4),
    "neggrad": NegGrad(1.5),
    "vanilla": Vanilla(),
}
methods = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
that_forget = pytest.mark.parametrize("method", list(METHODS.values())[:-1], ids=list(METHODS)[:-1])
SIZES = {"forget": 3, "retain": 20}
GROWING = LowPass(schedule="linear_increase", start=0.2, stop=0.9)


class Watched(TinyDenoiser):
    """Keeps the timesteps that it is called with."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x_t, t):
        self.seen.append(t.clone())
        return super().forward(x_t, t)


# --- the literal losses -------------------------------------------------------------------------------------


def filtered(residual, band):
    """`F^-1(M o F r)` by torch's FFT, with M written out."""
    if band is None:
        return residual
    u, v = (torch.fft.fftfreq(size, dtype=torch.float64) * 2 for size in residual.shape[-2:])
    radius = (u[:, None].square() + v[None, :].square()).sqrt()
    within = (radius <= band.radius + 1e-12).double()
    mask = within + (1 - within) * band.high_frequency_weight
    return torch.fft.ifft2(torch.fft.fft2(residual) * mask).real


def losses(prediction, target, band=None):
    return filtered(prediction - target, band).square().flatten(1).sum(1)


def siss_factor(method, main, correction):
    """f in `main - f correction`."""
    if method.superfactor is not None:
        return method.superfactor * SIZES["forget"] / SIZES["retain"]
    factor = method.scaling_norm / correction.norm()
    if method.scaling == "ratio":
        return factor * main.norm()
    return factor.clamp(max=1) if method.scaling == "clip" else factor


def told(method):
    """What a loop says of the whole sets."""
    return {"sizes": SIZES} if "sizes" in method.needs else {}


@dataclass
class World:
    """Images, their numbers and a network."""

    def __post_init__(self):
        generator = torch.Generator().manual_seed(4)

        def numbers(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (B, 1, SIZE, SIZE)
        self.forget, self.retain = numbers(*shape), numbers(*shape)
        self.retain = self.forget + 0.1 * self.retain  # near enough for weights of both branches
        self.neighbors = self.forget[:, None] + 0.3 * numbers(B, 3, 1, SIZE, SIZE)
        self.noise = numbers(*shape)
        self.timesteps = torch.tensor([40, 300, 420, 700, 990])
        self.from_forget = torch.tensor([True, False, True, False, True])
        self.uniform = torch.rand(*shape, generator=generator, dtype=torch.float64)
        self.model = TinyDenoiser().double()

    def given(self, method):
        """One noise and one timestep for both branches: every method may be given them."""
        values = {}
        for branch in ("forget", "retain"):
            if branch in method.needs:
                values |= {f"{branch}_noise": self.noise, f"{branch}_timesteps": self.timesteps}
        if isinstance(method, SISS) and method.variant != "no_is":
            values["from_forget"] = self.from_forget
        if isinstance(method, EraseDiff):
            values["uniform_target"] = self.uniform
        return Draws(**values)

    def batch(self, method):
        images = {"forget": self.forget, "retain": self.retain, "neighbors": self.neighbors}
        return {name: images[name] for name in images if name in method.needs}

    def by_branch(self, method, band):
        """The losses of the rows of each branch, with importance weights: `{role: [B]}`."""
        forget_x_t, target = F.noised(self.forget, self.noise, self.timesteps, SCHEDULE)
        retain_x_t, _ = F.noised(self.retain, self.noise, self.timesteps, SCHEDULE)
        if isinstance(method, SISS) and method.variant != "no_is":
            return self.of_a_mixture(method, forget_x_t, retain_x_t, band)
        found = {}
        if "forget" in method.needs:
            if isinstance(method, ReTrack):
                target = self.redirected(forget_x_t)
            if isinstance(method, EraseDiff):
                target = self.uniform
            found["forget"] = losses(self.model(forget_x_t, self.timesteps), target, band)
        if "retain" in method.needs:
            found["retain"] = losses(self.model(retain_x_t, self.timesteps), self.noise)
        return found

    def redirected(self, x_t):
        v = neighbor_noise(x_t, self.neighbors, self.timesteps, SCHEDULE)
        weights = (-0.5 * v.square().flatten(2).sum(2)).softmax(1)
        return (weights[:, :, None, None, None] * v).sum(1)

    def of_a_mixture(self, method, forget_x_t, retain_x_t, band):
        picked = self.from_forget.view(-1, 1, 1, 1)
        x_t = torch.where(picked, forget_x_t, retain_x_t)
        prediction = self.model(x_t, self.timesteps)
        if method.variant == "bernoulli":
            loss = {"forget": losses(prediction, self.noise, band), "retain": losses(prediction, self.noise)}
            kept = (~self.from_forget).double() / (1 - method.lambd)
            return {"forget": loss["forget"] * self.from_forget, "retain": loss["retain"] * kept}
        rest = x_t, self.timesteps, SCHEDULE, method.lambd, self.from_forget
        sample = mixture(self.retain, self.forget, *rest, x_t=x_t)
        return {
            "forget": sample.forget_weight * losses(prediction, sample.forget_target, band),
            "retain": sample.retain_weight * losses(prediction, sample.retain_target),
        }

    def gradient(self, loss):
        parts = torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True)
        return torch.cat([part.flatten() for part in parts])

    def expected(self, method, band=None, weights=None):
        """Means of both branches, and the gradient that a step leaves."""
        by_branch = self.by_branch(method, band)
        weights = weights or {}
        means = {role: (loss * weights.get(role, 1)).mean() for role, loss in by_branch.items()}
        if isinstance(method, Vanilla):
            return means, self.gradient(means["retain"])
        if isinstance(method, NegGrad):
            return means, self.gradient(-method.superfactor * means["forget"])
        if isinstance(method, ReTrack):
            loss = method.lambd * means["forget"] + (1 - method.lambd) * means["retain"]
            return means, self.gradient(loss)
        main, correction = self.gradient(means["retain"]), self.gradient(means["forget"])
        if isinstance(method, SISS):
            return means, main - siss_factor(method, main, correction) * correction
        factor = (method.eta - main @ correction / correction.square().sum()).clamp(min=0)
        return means, main + factor * correction

    def step(self, method, **options):
        """What a step reports, and the gradient that it leaves."""
        for parameter in self.model.parameters():
            parameter.grad = None
        options = {"draws": self.given(method)} | told(method) | options
        out = method_step(method, self.model, None, SCHEDULE, **self.batch(method), **options)
        return out, torch.cat([parameter.grad.flatten() for parameter in self.model.parameters()])


@pytest.fixture
def world():
    return World()


def assert_equal(found, expected):
    (out, gradient), (means, expected_gradient) = found, expected
    assert relative_l2([gradient], [expected_gradient]) <= 1e-12
    for role, mean in means.items():
        torch.testing.assert_close(getattr(out, f"{role}_loss"), mean.detach(), rtol=1e-12, atol=0)


@methods
def test_the_literal_losses_are_those_of_the_methods(world, method):
    if isinstance(method, ReTrack):
        out, gradient = world.step(method)
        means, expected = world.expected(method)
        assert relative_l2([gradient], [expected]) <= 1e-12
        assert out.forget_loss > means["forget"]  # with the spread
    else:
        assert_equal(world.step(method), world.expected(method))


@pytest.mark.parametrize(
    "band", [LowPass(0.5), LowPass(0.3, high_frequency_weight=0.4)], ids=["hard", "soft"]
)
@that_forget
def test_the_forget_residual_alone_is_filtered(world, method, band):
    """And ReTrack's spread is left out of the loss."""
    found = world.step(method, lowpass=band)
    assert_equal(found, world.expected(method, band))
    unfiltered, _ = world.step(method)
    assert found[0].retain_loss is None or torch.equal(found[0].retain_loss, unfiltered.retain_loss)
    assert found[0].forget_loss < unfiltered.forget_loss


@pytest.mark.parametrize("moment", [0, 3, 9, 50, torch.tensor(3)], ids=str)
def test_a_schedule_has_the_band_of_the_step(world, moment):
    method, at = METHODS["neggrad"], int(moment)
    found = world.step(method, lowpass=GROWING, step=moment, total_steps=10)
    band = LowPass(0.2 + 0.7 * min(at, 9) / 9)
    assert_equal(found, world.expected(method, band))
    fixed = world.step(method, lowpass=GROWING.at(at, 10))
    assert torch.equal(found[1], fixed[1])


def test_the_log_says_once_what_is_left_out(world, caplog):
    say.once.cache_clear()
    for _ in range(2):
        world.step(METHODS["retrack"], lowpass=LowPass(0.5))
    assert caplog.text.count("without the spread") == 1
    world.step(METHODS["siss"], lowpass=LowPass(0.5))
    assert caplog.text.count("without the spread") == 1


@methods
def test_weights_multiply_the_loss_of_each_row(world, method):
    """A window as a weight, in the forget terms; min-SNR in all terms."""
    options, weights = {"loss_weight": "min_snr", "snr_gamma": 3.0}, {}
    snr = (SCHEDULE.alpha / SCHEDULE.sigma).square()[world.timesteps]
    of_loss = snr.clamp(max=3) / snr
    for role in ("forget", "retain"):
        weights[role] = of_loss
    if "forget" in method.needs:
        options["time_window"] = WEIGHTED
        weights["forget"] = of_loss * WEIGHTED.table(T)[world.timesteps] * T
    found = world.step(method, **options)
    means, expected = world.expected(method, weights=weights)
    if isinstance(method, ReTrack):  # whose loss has its spread, weighted
        unweighted = world.step(method)[0].forget_loss
        assert relative_l2([found[1]], [expected]) <= 1e-12
        assert found[0].forget_loss != unweighted
    else:
        assert_equal(found, (means, expected))


def test_the_spread_is_weighted_like_its_row(world):
    method = METHODS["retrack"]
    out, _ = world.step(method, time_window=WEIGHTED)
    per_row = []
    weight = WEIGHTED.table(T)[world.timesteps] * T
    for row in range(B):
        one = Draws(world.noise[row : row + 1], None, world.timesteps[row : row + 1], None)
        images = {"forget": world.forget[row : row + 1], "neighbors": world.neighbors[row : row + 1]}
        alone = ReTrack(k=3, lambd=1)
        per_row.append(method_step(alone, world.model, None, SCHEDULE, draws=one, keep_grad=True, **images))
    expected = (weight * torch.stack([each.forget_loss for each in per_row])).mean()
    torch.testing.assert_close(out.forget_loss, expected, rtol=1e-12, atol=0)


def test_a_method_may_weigh_and_filter_by_itself(world):
    """Its band is that of its term; a second one is refused."""

    class Low(NegGrad):
        def compose(self, batch, draws, schedule):
            x_t, target = F.noised(batch.forget, draws.forget_noise, draws.forget_timesteps, schedule)
            terms = (Term("forget", target, scale=-1.0, band=GROWING),)
            return [Pass(x_t, draws.forget_timesteps, terms)]

    method = Low()
    found = world.step(method, step=9, total_steps=10)
    assert_equal(found, world.expected(NegGrad(), LowPass(0.9)))
    with pytest.raises(ValueError, match=r"^lowpass: expected None \(Low has a band of its own\)"):
        world.step(method, lowpass=LowPass(0.5), step=9, total_steps=10)
    with pytest.raises(ValueError, match=r"^step: expected a number with the schedule 'linear_increase'"):
        world.step(method)


# --- what is drawn ------------------------------------------------------------------------------------------


def images(count, seed=0, neighbors=None):
    generator = torch.Generator().manual_seed(seed)
    shape = (count,) if neighbors is None else (count, neighbors)
    return torch.rand(*shape, 1, 4, 4, generator=generator) * 2 - 1


def batch_of(method, count):
    found = {"forget": images(count), "retain": images(count, 1), "neighbors": images(count, 2, 3)}
    return {name: found[name] for name in found if name in method.needs}


def drawn_in_a_step(method, count=64, schedule=SCHEDULE, **options):
    """The timesteps that the network was called with in one step."""
    model = Watched()
    generator = torch.Generator().manual_seed(0)
    batch = batch_of(method, count) | told(method)
    method_step(method, model, None, schedule, **batch, generator=generator, **options)
    return torch.cat(model.seen)


def within(timesteps):
    return (timesteps >= 250) & (timesteps < 750)


@that_forget
def test_forget_rows_have_the_timesteps_of_the_window_and_retain_rows_any(method):
    timesteps = drawn_in_a_step(method, time_window=WINDOW)
    if isinstance(method, NegGrad):
        assert within(timesteps).all()
    else:
        # Of 64 retain rows (about 38 of SISS' mixtures), each lies in the window with probability 1/2.
        rows = 64 if "siss" in method.name and method.variant != "no_is" else 128
        assert len(timesteps) == rows
        assert rows / 2 < within(timesteps).sum() < rows


def test_a_window_of_the_retain_branch(caplog):
    outside = TimeWindow(0, 250)
    timesteps = drawn_in_a_step(ReTrack(k=3), time_window=WINDOW, retain_density=outside)
    assert within(timesteps).sum() == (timesteps < 250).sum() == 64
    assert within(drawn_in_a_step(Vanilla(), retain_density=WINDOW)).all()


def test_stratified_rows_have_a_stratum_each():
    timesteps = drawn_in_a_step(NegGrad(), 50, time_window=Stratified(TimeWindow(500, 600)))
    assert sorted(((timesteps - 500) // 2).tolist()) == list(range(50))


def test_siss_released_code_trains_at_the_last_timestep_alone():
    """A pair then shares it, and has no ratio."""
    last = TimeWindow.last(SCHEDULE)
    timesteps = drawn_in_a_step(SISS(), time_window=last, retain_density=last)
    assert (timesteps == 999).all()
    wanted = unlearner(SISS(), time_window=last, retain_density=last).selection.draws_of(SISS(), SCHEDULE)
    assert isinstance(wanted["retain_timesteps"], draw.Same)


def unlearner(method, schedule=SCHEDULE, count=8, model=None, **options):
    model = Watched() if model is None else model
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    forget, retain = ImageStore(images(3, 3)), ImageStore(images(20, 4))
    return Unlearner(
        model, optimizer, schedule, method, forget=forget, retain=retain, batch_size=count,
        autocast_dtype=None, warn_of_near_copies=False, **options,
    )  # fmt: skip


@that_forget
def test_an_unlearner_draws_in_the_window(method):
    """The forget rows do, the retain rows need not; and the network is called at what is drawn."""
    run = unlearner(method, count=64, time_window=WINDOW)
    _, draws = run._draw(Draws())
    run.step()
    drawn = [draws.forget_timesteps]
    if "retain" in method.needs:
        drawn.append(draws.retain_timesteps)
    assert [within(timesteps).all().item() for timesteps in drawn] == [True, False][: len(drawn)]
    # A row of a mixture is made from one of its two images.
    if draws.from_forget is not None:
        drawn = [torch.where(draws.from_forget, *drawn)]
    assert torch.equal(torch.cat(run.model.seen).sort().values, torch.cat(drawn).sort().values)


@methods
def test_uniform_densities_change_no_bit(method):
    options = {}
    if "forget" in method.needs:
        options["time_window"] = Uniform()
    if "retain" in method.needs:
        options["retain_density"] = Uniform()
    runs = [unlearner(method), unlearner(method, **options), unlearner(method, loss_weight="none")]
    for _ in range(3):
        for run in runs:
            run.step()
    for run in runs[1:]:
        assert all(map(torch.equal, run.parameters, runs[0].parameters))
    plain = drawn_in_a_step(method)
    assert torch.equal(drawn_in_a_step(method, **options), plain)


@methods
def test_flow_matching_draws_logit_normal_timesteps_unless_it_is_told(method):
    flow = NoiseSchedule.flow(T)
    count = 2000

    def indices(**options):
        received = drawn_in_a_step(method, count, flow, **options)
        return received.double() - 1  # the network gets T sigma, index t has sigma (t + 1) / T

    expected = LogitNormal().table(T)
    middle = float(expected[250:750].sum())  # .73, where uniform has .5
    share = within(indices()).double().mean()
    assert abs(share - middle) < 5 * math.sqrt(middle * (1 - middle) / count)
    options = {}
    if "forget" in method.needs:
        options["time_window"] = Uniform()
    if "retain" in method.needs:
        options["retain_density"] = Uniform()
    assert abs(within(indices(**options)).double().mean() - 0.5) < 5 * 0.5 / math.sqrt(count)


def test_a_timestep_without_a_loss_is_refused_only_where_it_is_drawn():
    """Zero terminal SNR, with a network that predicts epsilon."""
    alphas_cumprod = torch.linspace(1, 0, T + 1, dtype=torch.float64)[1:]
    schedule = NoiseSchedule.from_alphas_cumprod(alphas_cumprod)
    text = r"^schedule: expected alpha_t > 0 for a network that predicts epsilon, got alpha = 0 at t = 999"
    for make in (drawn_in_a_step, unlearner):
        with pytest.raises(ValueError, match=text):
            make(NegGrad(), schedule=schedule)
        with pytest.raises(ValueError, match=text):
            make(ReTrack(k=3), schedule=schedule, time_window=WINDOW)
        make(NegGrad(), schedule=schedule, time_window=WINDOW)
        make(ReTrack(k=3), schedule=schedule, time_window=WINDOW, retain_density=TimeWindow(0, 999))


# --- SISS with two densities --------------------------------------------------------------------------------


KEPT, FORGOTTEN, LAMBD = 0.2, -0.1, 0.3
LEVELS = NoiseSchedule(SCHEDULE.alpha[250::100], SCHEDULE.sigma[250::100])
PAIRS = {
    "window": (TimeWindow(4, 8), Uniform()),
    "soft window": (TimeWindow(4, 8, outside=0.2), Uniform()),
    "two windows": (TimeWindow(1, 5), TimeWindow(3, 8)),
    "stratified": (Stratified(TimeWindow(4, 8)), LogitNormal()),
}


class Waves(torch.nn.Module):
    """A network of two numbers."""

    def __init__(self):
        super().__init__()
        self.slope = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
        self.offset = torch.nn.Parameter(torch.tensor(0.3, dtype=torch.float64))

    def forward(self, x_t, t):
        return torch.sin(self.slope * x_t) + self.offset * (1 + t).view(-1, 1, 1, 1)


def exact(image, density):
    """`E_t E ||e(x_t) - eps||^2` of one point, by quadrature."""
    nodes, weights = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(120))
    weights, model, total = weights / weights.sum(), Waves(), 0.0
    for timestep, probability in enumerate(density.table(len(LEVELS)).tolist()):
        x_t = LEVELS.alpha[timestep] * image + LEVELS.sigma[timestep] * nodes
        error = model(x_t.view(-1, 1, 1, 1), torch.full((len(nodes),), timestep)).flatten() - nodes
        total += probability * float((weights * error.detach().square()).sum())
    return total


def estimated(forget, retain, variant, batches=40, rows=5000):
    """Both losses that SISS' steps report: means over batches and their standard errors, `[2]`."""
    kept = torch.full((rows, 1, 1, 1), KEPT, dtype=torch.float64)
    forgotten, generator = torch.full_like(kept, FORGOTTEN), torch.Generator().manual_seed(0)
    found = []
    for _ in range(batches):
        out = siss_step(
            Waves(), None, LEVELS, forgotten, kept, lambd=LAMBD, variant=variant,
            generator=generator, time_window=forget, retain_density=retain,
        )  # fmt: skip
        found.append(torch.stack([out.forget_loss, out.retain_loss]))
    found = torch.stack(found)
    return found.mean(0), found.std(0) / math.sqrt(batches)


def deviations(pair, variant="mixture"):
    """How many standard errors both terms are off the loss of their own point over their own density."""
    mean, error = estimated(*pair, variant)
    truth = torch.tensor([exact(FORGOTTEN, pair[0]), exact(KEPT, pair[1])], dtype=torch.float64)
    if variant == "bernoulli":
        truth[0] *= LAMBD  # its factor is left to the rescaling
    return (mean - truth) / error


@pytest.mark.parametrize("variant", ["mixture", "no_is", "bernoulli"])
@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_siss_with_two_densities_is_unbiased(pair, variant):
    assert deviations(pair, variant).abs().max() < 5


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_siss_would_be_biased_without_the_ratio(pair, monkeypatch):
    monkeypatch.setattr(draw.TimeLogRatio, "of", lambda *_: None)
    assert deviations(pair).abs().max() > 10


def test_a_ratio_may_be_given_with_timesteps_and_belongs_to_a_window_that_is_given_with_them(world):
    method, ratio = SISS(0.4, 2.0), torch.tensor([0.3, -1.0, 2.0, 0.0, -math.inf], dtype=torch.float64)
    draws = world.given(method)
    given = Draws(**{name: getattr(draws, name) for name in draws.given()} | {"time_log_ratio": ratio})
    rest = world.retain, world.forget, world.noise, world.timesteps, SCHEDULE, 0.4, world.from_forget
    of_window = WINDOW.table(T).log()[world.timesteps] + math.log(T)
    for numbers, options, expected in ((given, {}, ratio), (draws, {"time_window": WINDOW}, of_window)):
        sample = F.mixture(*rest, time_log_ratio=expected)
        loss = sample.forget_weight * losses(world.model(sample.x_t, world.timesteps), sample.forget_target)
        out, _ = world.step(method, draws=numbers, **options)
        torch.testing.assert_close(out.forget_loss, loss.mean().detach(), rtol=1e-12, atol=0)
    plain, _ = world.step(method)
    assert plain.forget_loss != out.forget_loss


def test_a_ratio_and_conditions_that_differ(world):
    """The condition decides: a row of another condition can only be that of its own image."""

    class Conditioned(TinyDenoiser):
        def forward(self, x_t, t, label):
            return super().forward(x_t, t) + 0.1 * label.view(-1, 1, 1, 1)

    model = Conditioned().double()
    labels = {"forget_kwargs": {"label": torch.arange(B)}, "retain_kwargs": {"label": torch.arange(B) // 3}}
    method = SISS(0.4, 2.0)
    # t = 40 and 990 lie outside of the window, where the forget branch never draws: -inf against +inf.
    out = method_step(
        method, model, None, SCHEDULE, forget=world.forget, retain=world.retain,
        draws=world.given(method), time_window=WINDOW, **labels,
    )  # fmt: skip
    assert not out.skipped
    assert out.forget_loss.isfinite()
    assert out.retain_loss.isfinite()


# --- what is refused ----------------------------------------------------------------------------------------


REFUSED = {
    "a window for vanilla": (
        Vanilla(), {"time_window": WINDOW},
        r"^time_window: expected None \(Vanilla reads no forget images\), got TimeWindow\(start=250",
    ),
    "a band for vanilla": (
        Vanilla(), {"lowpass": LowPass(0.5)},
        r"^lowpass: expected None \(Vanilla reads no forget images\), got LowPass",
    ),
    "a retain density for neggrad": (
        NegGrad(), {"retain_density": WINDOW},
        r"^retain_density: expected None \(NegGrad reads no retain images\), got TimeWindow",
    ),
    "a retain density for retrack without": (
        ReTrack(k=3, lambd=1), {"retain_density": WINDOW},
        r"^retain_density: expected None \(ReTrack reads no retain images\), got TimeWindow",
    ),
    "a window beyond the schedule": (
        NegGrad(), {"time_window": TimeWindow(900, 1001)},
        r"^time_window: stop: expected at most the 1000 timesteps of the schedule, got 1001",
    ),
    "a band of nothing": (
        NegGrad(), {"lowpass": LowPass(0.2, band="mid", inner=0.1)},
        r"^lowpass: LowPass: expected a band with frequencies of images of 4 x 4, got none",
    ),
    "an unknown weight": (
        NegGrad(), {"loss_weight": "snr"},
        r"^loss_weight: expected one of none, min_snr, sigma_squared, sigma_sqrt, cosmap, got 'snr'",
    ),
    "gamma of nothing": (
        NegGrad(), {"snr_gamma": 5}, r"^snr_gamma: expected None without loss_weight='min_snr'",
    ),
    "gamma of another": (
        NegGrad(), {"snr_gamma": 5, "loss_weight": "cosmap"}, r"^snr_gamma: expected None without",
    ),
    "no gamma": (
        NegGrad(), {"snr_gamma": 0, "loss_weight": "min_snr"},
        r"^snr_gamma: expected a finite number in \(0, inf\), got 0",
    ),
    "a schedule of no length": (
        NegGrad(), {"lowpass": GROWING},
        r"^total_steps: expected a number with the schedule 'linear_increase' of lowpass, got None",
    ),
    "a schedule with more stages than steps": (
        NegGrad(), {"lowpass": LowPass(schedule="step_decay", start=0.9, stop=0.3), "total_steps": 3},
        r"^lowpass: total_steps: expected an integer in \[4, .*\(one for each stage\), got 3",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("method", "options", "text"), REFUSED.values(), ids=REFUSED)
def test_what_makes_no_sense_is_refused_by_name_and_before_any_work(method, options, text):
    step = {"step": 0} if "lowpass" in options else {}
    model = Watched()
    with pytest.raises(ValueError, match=text):
        method_step(method, model, None, SCHEDULE, **batch_of(method, 3), **options, **step)
    with pytest.raises(ValueError, match=text):
        unlearner(method, model=model, **options)
    assert model.seen == []


@pytest.mark.parametrize("name", ["time_window", "retain_density"])
def test_what_is_no_density_is_refused(name):
    for make in (drawn_in_a_step, unlearner):
        with pytest.raises(TypeError, match=rf"^{name}: expected a density of timesteps .*, got tuple"):
            make(ReTrack(k=3), **{name: (250, 750)})


def test_steps_that_are_none_are_refused():
    for step, error, text in (
        (-1, ValueError, r"^step: expected an integer >= 0, got -1"),
        (1.5, TypeError, r"^step: expected an integer, got 1.5"),
        (torch.tensor([1]), ValueError, r"^step: expected .*, got .*1"),
        (
            torch.tensor(1, device="meta"),
            ValueError,
            r"^step: expected a tensor on the device of the images, cpu",
        ),
        (
            None,
            ValueError,
            r"^step: expected a number with the schedule 'linear_increase' of lowpass, got None",
        ),
    ):
        with pytest.raises(error, match=text):
            drawn_in_a_step(NegGrad(), lowpass=GROWING, step=step, total_steps=10)
    with pytest.raises(ValueError, match=r"^total_steps: expected an integer >= 1, got 0"):
        drawn_in_a_step(NegGrad(), lowpass=GROWING, step=0, total_steps=0)


def test_a_method_that_chooses_its_timesteps_is_not_overruled():
    class Late(NegGrad):
        def draws(self):
            return draw.FORGET | {"forget_timesteps": Time("forget", TimeWindow(750, 1000))}

    assert (drawn_in_a_step(Late()) >= 750).all()
    text = r"^time_window: expected None \(Late draws its forget timesteps from TimeWindow\(start=750"
    with pytest.raises(ValueError, match=text):
        drawn_in_a_step(Late(), time_window=WINDOW)


def test_another_selection_is_looked_at_before_it_holds():
    run = unlearner(NegGrad(), count=16)
    run.step()
    run.selection = Selection(time_window=WINDOW)
    run.step()
    assert within(run.model.seen[-1]).all()
    for selection, text in (
        (
            Selection(time_window=TimeWindow(0, 1001)),
            r"^time_window: stop: expected at most the 1000 timesteps",
        ),
        (
            Selection(retain_density=WINDOW),
            r"^retain_density: expected None \(NegGrad reads no retain images\)",
        ),
        (Selection(lowpass=GROWING), r"^total_steps: expected a number with the schedule"),
    ):
        with pytest.raises(ValueError, match=text):
            run.selection = selection
    with pytest.raises(TypeError, match=r"^selection: expected a Selection, got TimeWindow"):
        run.selection = WINDOW
    assert run.selection == Selection(time_window=WINDOW)


def test_a_mask_elsewhere_is_refused():
    """A kernel would read it at an address of the host."""
    mask = BandMask(torch.ones(3, 3, device="meta"), 1.0, 0.0)
    with pytest.raises(ValueError, match=r"^lowpass.table: expected the device of prediction, cpu, got meta"):
        F.denoising_loss(torch.zeros(1, 1, 8, 8), torch.zeros(1, 1, 8, 8), lowpass=mask)


@pytest.mark.parametrize("branch", ["time_window", "retain_density"])
def test_a_pair_is_drawn_in_strata_where_either_branch_has_them(branch):
    timesteps = drawn_in_a_step(SISS(), 50, **{branch: Stratified(Uniform())})
    assert sorted((timesteps // 20).tolist()) == list(range(50))
    timesteps = drawn_in_a_step(SISS(variant="no_is"), 50, **{branch: Stratified(Uniform())})
    assert torch.equal(timesteps[:50], timesteps[50:])
    assert sorted((timesteps[:50] // 20).tolist()) == list(range(50))


# --- densities that cannot be right -------------------------------------------------------------------------


@pytest.mark.parametrize("lambd", [0, 1])
def test_a_mixture_of_one_branch_alone_covers_the_timesteps_of_the_other(lambd):
    """No weight makes up for what is never drawn."""
    alone, other = ("retain_density", "time_window") if lambd == 0 else ("time_window", "retain_density")
    branch = "retain" if lambd == 0 else "forget"
    method, text = (
        SISS(lambd),
        rf"^{other}: expected timesteps that the {branch} branch draws, too, from which alone .*, got t = 0$",
    )
    for options in ({alone: WINDOW}, {alone: WINDOW, other: TimeWindow(0, 100)}):
        with pytest.raises(ValueError, match=text):
            drawn_in_a_step(method, **options)
        with pytest.raises(ValueError, match=text):
            unlearner(method, **options)
    drawn_in_a_step(method, **{other: WINDOW})
    drawn_in_a_step(method, **{alone: TimeWindow(0, T, 0.5), other: WINDOW})


@pytest.mark.parametrize("lambd", [0.0, 1.0])
def test_a_mixture_of_one_branch_alone_is_unbiased_where_it_covers_both(lambd, monkeypatch):
    monkeypatch.setattr(f"{__name__}.LAMBD", lambd)
    covered, covering = TimeWindow(4, 8), Uniform()
    assert deviations((covered, covering) if lambd == 0 else (covering, covered)).abs().max() < 5


@dataclass(frozen=True)
class Own(Density):
    """A density of a user's."""

    numbers: tuple[float, ...]

    def table(self, num_timesteps):
        return torch.tensor(self.numbers, dtype=torch.float64)


EVEN = (1 / T,) * T
BAD_TABLES = {
    "too large": ((1.0,) * T, r"table: expected probabilities that add up to 1, got 1000 of Own"),
    "too short": (EVEN[:10], r"table: expected float64 of shape \(1000,\), got .* of Own"),
    "below zero": ((-1 / T, 2 / T, *EVEN[2:]), r"table: expected finite numbers >= 0"),
    "nothing": ((0.0,) * T, r"table: expected probabilities that add up to 1, got 0 of Own"),
    "no numbers": ((math.nan, *EVEN[1:]), r"table: expected finite numbers >= 0"),
}


@pytest.mark.parametrize(("numbers", "text"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_tables_that_are_no_probabilities_are_refused(numbers, text):
    for make in (drawn_in_a_step, unlearner):
        with pytest.raises(ValueError, match=f"^time_window: {text}"):
            make(NegGrad(), time_window=Own(numbers))
    assert len(drawn_in_a_step(NegGrad(), time_window=Own(EVEN))) == 64


def test_a_window_whose_numbers_overflow_is_refused():
    with pytest.raises(ValueError, match=r"^time_window: table: expected "):
        drawn_in_a_step(NegGrad(), time_window=TimeWindow(0, 10, outside=1e308))


def test_what_cannot_be_told_apart_by_its_numbers_is_no_density():
    @dataclass
    class Changing(Density):
        numbers: list

    with pytest.raises(TypeError, match=r"^time_window: expected a density that is hashable"):
        drawn_in_a_step(NegGrad(), time_window=Changing([1]))

    class Wrong(NegGrad):
        def draws(self):
            return draw.FORGET | {"forget_timesteps": Time("forget", (750, 1000))}

    with pytest.raises(TypeError, match=r"^Wrong.draws: expected a density of timesteps .*, got tuple"):
        drawn_in_a_step(Wrong())


def test_a_pair_shares_what_its_method_draws_a_timestep_from():
    class Late(SISS):
        def draws(self):
            return super().draws() | {"forget_timesteps": Time("forget", TimeWindow(750, 1000))}

    assert (drawn_in_a_step(Late()) >= 750).all()
    timesteps = drawn_in_a_step(Late(variant="no_is"))
    assert torch.equal(timesteps[:64], timesteps[64:])
    apart = drawn_in_a_step(Late(variant="no_is"), retain_density=Uniform())
    assert (apart < 750).any()


@pytest.mark.parametrize("branch", ["time_window", "retain_density"])
def test_a_pair_that_is_tied_the_other_way_round_has_its_strata(branch):
    class Turned(SISS):
        def draws(self):
            tied = {"forget_timesteps": draw.Same("retain_timesteps"), "retain_timesteps": Time("retain")}
            return super().draws() | tied

    timesteps = drawn_in_a_step(Turned(), 50, **{branch: Stratified(Uniform())})
    assert sorted((timesteps // 20).tolist()) == list(range(50))


def test_given_timesteps_that_are_never_drawn_are_refused(world):
    for method, options, text in (
        (NegGrad(), {"time_window": WINDOW}, r"^draws.forget_timesteps: expected timesteps of TimeWindow"),
        (Vanilla(), {"retain_density": WINDOW}, r"^draws.retain_timesteps: expected timesteps of TimeWindow"),
        (
            SISS(), {"time_window": WINDOW, "retain_density": TimeWindow(300, 700)},
            r"^draws: expected timesteps that a branch draws .*, got t = 40",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=text):
            world.step(method, **options)


def test_a_weight_that_is_nothing_at_every_timestep_is_refused():
    """Zero terminal SNR, at the last timestep alone."""
    levels = torch.linspace(1, 0, T + 1, dtype=torch.float64)[1:]
    schedule = NoiseSchedule.from_alphas_cumprod(levels, prediction_type="v_prediction")
    text = r"^loss_weight: expected one that is above 0 at a timestep of time_window, TimeWindow\(start=999"
    options = {"schedule": schedule, "loss_weight": "min_snr", "time_window": TimeWindow.last(schedule)}
    for make in (drawn_in_a_step, unlearner):
        with pytest.raises(ValueError, match=text):
            make(NegGrad(), **options)


@pytest.mark.parametrize(
    ("band", "said"),
    [
        (LowPass(4), True), (LowPass(400, unit="bins"), True), (LowPass(0.5, high_frequency_weight=1), True),
        (LowPass(1.4), False), (LowPass(0.5), False), (LowPass(0.5, band="high"), False),
    ],
)  # fmt: skip
def test_a_band_that_filters_nothing_is_said(band, said, caplog):
    say.once.cache_clear()
    drawn_in_a_step(NegGrad(), 3, lowpass=band)
    assert ("keeps every frequency of images of 4 x 4" in caplog.text) == said
