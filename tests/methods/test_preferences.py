"""DPO, KTO and NPO against their literal losses in float64: values, gradients, limits, what they refuse."""

from __future__ import annotations

import copy
import functools
import itertools
import math

import pytest
import torch
from small_methods import gradient_of
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastunlearn import DPO, KTO, NPO, Draws, LowPass, NegGrad, TimeWindow, Vanilla, method_step
from fastunlearn.step import compilation
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
PAIRS, ELEMENTS = 5, 64
EXACT = 1e-12
# Small enough for the rows to count differently, and none of them nothing.
BETA = 2.0
METHODS = [
    DPO(BETA),
    KTO(BETA),
    KTO(BETA, z0="class"),
    KTO(BETA, z0="zero"),
    NPO(BETA),
    NPO(BETA, retain_weight=0.3),
    NPO(BETA, retain_weight=0.0),
]


class Shifted(TinyDenoiser):
    """Takes a condition."""

    def forward(self, x_t, t, shift=None):
        moved = x_t if shift is None else x_t + shift.view(-1, 1, 1, 1)
        return super().forward(moved, t)


class World:
    """Images, their numbers, a network and the one that it is compared with.

    Args:
        better: whether the network's losses are smaller than the other's on average, so that the mean reward
            of all rows is above 0, and with it KTO's reference point.
        retain: images to keep.
    """

    def __init__(self, better: bool = True, retain: int = PAIRS):
        generator = torch.Generator().manual_seed(3)
        numbers = functools.partial(torch.randn, generator=generator, dtype=torch.float64)
        self.forget, self.retain = numbers(PAIRS, 1, 8, 8), numbers(retain, 1, 8, 8)
        self.noise = {"forget": numbers(PAIRS, 1, 8, 8), "retain": numbers(retain, 1, 8, 8)}
        self.times = {
            "forget": torch.randint(100, 900, (PAIRS,), generator=generator),
            "retain": torch.randint(100, 900, (retain,), generator=generator),
        }
        self.model, self.reference = Shifted(seed=0).double(), Shifted(seed=1).double()
        if (torch.cat(list(self.rewards(KTO()).values())).mean() > 0) != better:
            self.model, self.reference = self.reference, self.model

    def numbers_of(self, role, method):
        """Noise and timesteps of a branch; those of a pair are the forget branch's."""
        branch = "forget" if isinstance(method, DPO) else role
        return self.noise[branch], self.times[branch]

    def losses_of(self, network, role, method, mask=None, **kwargs):
        """`||eps - eps_theta||^2` `[B]` by plain torch; `mask` `[H, W]` is that of the residual's bins."""
        images = getattr(self, role)
        noise, times = self.numbers_of(role, method)
        noise, times = noise[: len(images)], times[: len(images)]
        alpha, sigma = (table[times].double().view(-1, 1, 1, 1) for table in (SCHEDULE.alpha, SCHEDULE.sigma))
        residual = noise - network(alpha * images + sigma * noise, times, **kwargs)
        if mask is not None:
            residual = torch.fft.ifft2(mask * torch.fft.fft2(residual)).real
        return residual.square().flatten(1).sum(1)

    def draws(self, method):
        wanted = {"forget_noise": self.noise["forget"], "forget_timesteps": self.times["forget"]}
        if not isinstance(method, DPO) and "retain" in method.needs:
            wanted |= {"retain_noise": self.noise["retain"], "retain_timesteps": self.times["retain"]}
        return Draws(**wanted)

    def images(self, method):
        return {role: getattr(self, role) for role in ("forget", "retain") if role in method.needs}

    def take(self, method, **options):
        """The output of a step, and the gradient `[P]` that it leaves."""
        given = {"draws": self.draws(method), "reference_model": self.reference, **options}
        return gradient_of(method, self.model, SCHEDULE, **self.images(method), **given)

    def literal(self, loss):
        """`[P]`, the gradient of `loss` by autograd."""
        found = torch.autograd.grad(loss, list(self.model.parameters()))
        return torch.cat([gradient.flatten() for gradient in found])

    def rewards(self, method, masks=None, conditions=None):
        """R by role, `[B]`."""
        masks, conditions = masks or {}, conditions or {}
        found = {}
        for role in ("forget", "retain"):
            options = {"mask": masks.get(role), **conditions.get(role, {})}
            with torch.no_grad():
                reference = self.losses_of(self.reference, role, method, **options)
            found[role] = reference - self.losses_of(self.model, role, method, **options)
        return found


def literal_loss(method, world, **options):
    """The formulas of the docstrings."""
    reward = world.rewards(method, **options)
    retain, forget, beta = reward["retain"], reward["forget"], method.beta / ELEMENTS
    if isinstance(method, DPO):
        return -torch.log(torch.sigmoid(beta * (retain - forget))).mean()
    if isinstance(method, KTO):
        z0 = {
            "batch": max(0, torch.cat([retain, forget]).mean().item()),
            "class": max(0, (retain.mean().item() + forget.mean().item()) / 2),
            "zero": 0,
        }[method.z0]
        wanted = 1 - torch.sigmoid(beta * (retain - z0))
        unwanted = 1 - torch.sigmoid(beta * (z0 - forget))
        return wanted.mean() + unwanted.mean()
    masks, conditions = options.get("masks", {}), options.get("conditions", {})
    kept = world.losses_of(world.model, "retain", method, masks.get("retain"), **conditions.get("retain", {}))
    left = -(2 / beta) * torch.log(torch.sigmoid(-beta * forget)).mean()
    return left + method.retain_weight * kept.mean()


# 1 cannot hold a pair, 3 holds one, 4 two of five; 10 all.
@pytest.mark.parametrize("rows", [None, 1, 3, 4, 10])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_is_the_gradient_of_the_literal_loss(method, rows):
    world = World()
    out, ours = world.take(method, micro_batch_size=rows)
    loss = literal_loss(method, world)
    assert relative_l2([ours], [world.literal(loss)]) <= EXACT
    torch.testing.assert_close(out.loss, loss.detach(), rtol=EXACT, atol=0)
    forget = world.losses_of(world.model, "forget", method).mean().detach()
    torch.testing.assert_close(out.forget_loss, forget, rtol=EXACT, atol=0)
    if "retain" in method.needs:
        retain = world.losses_of(world.model, "retain", method).mean().detach()
        torch.testing.assert_close(out.retain_loss, retain, rtol=EXACT, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_step_is_the_slope_of_its_own_loss(method):
    """Central differences along a direction: their error falls as the square of the step."""
    # The reference point is a constant to the gradient, and 0 where the network is worse than the other.
    world = World(better=False)
    _, gradient = world.take(method)
    generator = torch.Generator().manual_seed(1)
    weights = nn.utils.parameters_to_vector(world.model.parameters()).detach()
    direction = torch.randn(len(weights), generator=generator, dtype=torch.float64)
    direction /= direction.norm()

    def loss_at(distance):
        nn.utils.vector_to_parameters(weights + distance * direction, world.model.parameters())
        return world.take(method)[0].loss.item()

    slopes = [(loss_at(size) - loss_at(-size)) / (2 * size) for size in (2e-3, 1e-3)]
    errors = [slope - (gradient @ direction).item() for slope in slopes]
    assert 3.9 < errors[0] / errors[1] < 4.1
    # Without its leading part the error is that of the fourth power, and rounding.
    extrapolated = (4 * slopes[1] - slopes[0]) / 3
    assert extrapolated == pytest.approx((gradient @ direction).item(), rel=1e-8)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_conditions_reach_both_networks(method):
    world = World()
    conditions = {
        role: {"shift": torch.linspace(start, 1, PAIRS, dtype=torch.float64)}
        for role, start in (("forget", -1), ("retain", 0))
    }
    given = {f"{role}_kwargs": conditions[role] for role in conditions if role in method.needs}
    _, ours = world.take(method, **given)
    loss = literal_loss(method, world, conditions=conditions)
    assert relative_l2([ours], [world.literal(loss)]) <= EXACT


# --- the reference


class Seen:
    """A method whose objective remembers what it was asked."""

    def __init__(self, method, monkeypatch):
        self.calls, own = [], type(method).objective

        def objective(method, losses, reference, elements):
            self.calls.append((losses, reference))
            return own(method, losses, reference, elements)

        monkeypatch.setattr(type(method), "objective", objective)


PATHS = {
    "plain": {},
    "bfloat16": {"autocast_dtype": torch.bfloat16},
    "compiled": {"compile": True},
    "compiled in bfloat16": {"compile": True, "autocast_dtype": torch.bfloat16},
}


def assert_equal_at_first(method, monkeypatch, network, **options):
    """The step of a network beside its copy: the losses of both are equal to the bit."""
    seen, world = Seen(method, monkeypatch), World()
    images = {role: images.float() for role, images in world.images(method).items()}
    method_step(
        method, network, None, SCHEDULE, **images, reference_model=copy.deepcopy(network),
        generator=torch.Generator().manual_seed(0), **options,
    )  # fmt: skip
    compared = [reference for _, reference in seen.calls if reference]
    assert compared
    for losses, reference in seen.calls:
        for role, loss in reference.items():
            assert torch.equal(losses[role], loss)


@pytest.mark.parametrize("rows", [None, 1, 4])
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", [DPO(), KTO(), KTO(z0="zero"), NPO()], ids=str)
def test_an_equal_reference_has_equal_losses_to_the_bit(method, path, rows, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    assert_equal_at_first(method, monkeypatch, TinyDenoiser(), micro_batch_size=rows, **PATHS[path])


@pytest.mark.slow
@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_an_equal_reference_has_equal_losses_under_inductor(method, monkeypatch):
    assert_equal_at_first(method, monkeypatch, TinyDenoiser(), compile=True)


class Recorded(nn.Module):
    """Says when it is called, and whether a graph is made."""

    def __init__(self, name, network, calls):
        super().__init__()
        self.name, self.network, self.calls = name, network, calls

    def forward(self, x_t, t):
        output = self.network(x_t, t)
        self.calls.append((self.name, len(x_t), output.requires_grad))
        return output


def calls_of(method, rows=None):
    """The network calls of a step, each with its rows and whether it made a graph.

    The weights of both networks could have gradients.
    """
    world, calls = World(), []
    model = Recorded("model", world.model, calls)
    reference = Recorded("reference", world.reference, calls)
    options = {"draws": world.draws(method), "reference_model": reference, "micro_batch_size": rows}
    method_step(method, model, None, SCHEDULE, **world.images(method), **options)
    assert all(weight.grad is None for weight in reference.parameters())
    return calls


def test_the_reference_comes_first_and_holds_no_graph():
    both = [("reference", 10, False), ("model", 10, True)]
    assert calls_of(DPO()) == calls_of(KTO()) == calls_of(KTO(z0="zero")) == both
    # Pairs stay whole, and no graph is there while the reference runs.
    small = [("reference", 4, False), ("model", 4, True)]
    last = [("reference", 2, False), ("model", 2, True)]
    assert calls_of(DPO(), rows=4) == small + small + last
    # A batch that is tied together: all losses, and then the calls that learn.
    without = [(name, rows, False) for name in ("reference", "model") for rows in (4, 4, 2)]
    assert calls_of(KTO(), rows=4) == without + [("model", rows, True) for rows in (4, 4, 2)]


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_a_reference_that_makes_a_graph_has_none_in_the_step(method, rows, monkeypatch):
    """A function may call its network with gradients enabled: the graph goes when the call returns."""
    seen, world = Seen(method, monkeypatch), World()

    @torch.enable_grad()
    def reference(x_t, t):
        return world.reference(x_t, t)

    world.take(method, reference_model=reference, micro_batch_size=rows)
    compared = [loss for _, reference in seen.calls for loss in reference.values()]
    assert compared
    assert not any(loss.requires_grad for loss in compared)


@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_an_answer_of_another_shape_is_the_references(method):
    expected = r"^reference_model: expected an output .* of shape \(\d+, 1, 8, 8\), .* got float64 of shape"
    with pytest.raises(ValueError, match=expected):
        World().take(method, reference_model=lambda x_t, t: x_t[..., :4])


def test_npo_compares_forget_images_alone():
    assert calls_of(NPO()) == [("reference", 5, False), ("model", 5, True), ("model", 5, True)]
    assert calls_of(NPO(retain_weight=0)) == [("reference", 5, False), ("model", 5, True)]


class LiveBytes(TorchDispatchMode):
    """The most bytes of results that lived at once, those that a graph keeps included.

    Args:
        before: tensors that were there before; views of them are no new memory.
    """

    def __init__(self, before):
        super().__init__()
        self.peak, self._alive = 0, {}
        self._before = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        results = function(*arguments, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, torch.Tensor):
                memory = result.untyped_storage()
                if memory._cdata not in self._before:
                    self._alive[memory._cdata] = StorageWeakRef(memory), memory.nbytes()
        self._alive = {key: own for key, own in self._alive.items() if not own[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self._alive.values()))
        return results


class Hoarder(nn.Module):
    """Makes a graph of its own, and keeps it."""

    def __init__(self, network):
        super().__init__()
        self.network, self.kept = network, []

    def forward(self, x_t, t):
        with torch.enable_grad():
            output = self.network(x_t, t)
        self.kept.append(output)
        return output.detach()


def peak_of_a_step(method, reference, rows, before=()):
    world = World()
    options = {"draws": world.draws(method), "reference_model": reference, "micro_batch_size": rows}
    with LiveBytes(before) as live:
        method_step(method, world.model, None, SCHEDULE, **world.images(method), **options)
    return live.peak


# KTO splits a batch that is tied together: there the reference sees all rows before the network sees any.
@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("method", [DPO(), KTO(), KTO(z0="zero"), NPO(), NPO(retain_weight=0)], ids=str)
def test_a_reference_adds_nothing_to_the_peak_of_memory(method, rows):
    """To that of a step whose reference knows what to answer, and computes nothing."""
    network, answers = World().reference, []

    def remembering(x_t, t):
        answers.append(network(x_t, t))
        return answers[-1]

    peak_of_a_step(method, remembering, rows)
    known = iter(answers)
    without = peak_of_a_step(method, lambda x_t, t: next(known), rows, answers)
    assert peak_of_a_step(method, network, rows, network.parameters()) == without
    # A graph would be seen: its activations alone are more than the rows.
    row = network(torch.zeros(1, 1, 8, 8).double(), torch.zeros(1, dtype=torch.int64)).nbytes
    assert peak_of_a_step(method, Hoarder(network), rows) > without + PAIRS * row


# --- limits


@pytest.mark.parametrize("retain_weight", [0.0, 0.7])
def test_npo_tends_to_neggrad_in_the_gradient(retain_weight):
    """Its error is proportional to beta; the loss is 2 ln 2 D / beta and NegGrad's, up to a constant."""
    world, betas = World(), [2.0**-power for power in (4, 5, 6)]
    limit, expected = world.take(NegGrad(), reference_model=None)
    if retain_weight:
        draws = Draws(retain_noise=world.noise["retain"], retain_timesteps=world.times["retain"])
        kept, gradient = gradient_of(Vanilla(), world.model, SCHEDULE, retain=world.retain, draws=draws)
        expected = expected + retain_weight * gradient
    errors, losses = [], []
    for beta in betas:
        out, ours = world.take(NPO(beta, retain_weight))
        errors.append(relative_l2([ours], [expected]))
        losses.append(out.loss.item() - 2 * math.log(2) * ELEMENTS / beta)
    for first, second in itertools.pairwise(errors):
        assert first / second == pytest.approx(2, rel=0.05)
    reference = world.losses_of(world.reference, "forget", NPO()).mean().item()
    tended = limit.loss.item() + reference + (retain_weight * kept.loss.item() if retain_weight else 0)
    apart = [abs(loss - tended) for loss in losses]
    for first, second in itertools.pairwise(apart):
        assert first / second == pytest.approx(2, rel=0.05)


def test_the_smallest_temperature_of_npo_is_neggrad_in_float32():
    world = World()
    model, reference = world.model.float(), world.reference.float()
    images = {role: getattr(world, role).float() for role in ("forget", "retain")}
    draws = {
        "draws": Draws(forget_timesteps=world.times["forget"], forget_noise=world.noise["forget"].float())
    }
    method = NPO(1e-24, retain_weight=0)
    out, ours = gradient_of(
        method, model, SCHEDULE, forget=images["forget"], reference_model=reference, **draws
    )
    _, expected = gradient_of(NegGrad(), model, SCHEDULE, forget=images["forget"], **draws)
    assert relative_l2([ours], [expected]) <= 1e-5  # float32
    assert not out.skipped


@pytest.mark.parametrize("better", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [DPO, KTO, NPO])
def test_no_margin_makes_nan(kind, dtype, better):
    """Networks whose losses are thousands apart, at a temperature that makes it millions."""
    world = World(better)
    with torch.no_grad():
        for weight in (world.reference if better else world.model).parameters():
            weight.mul_(30)
    model, reference = world.model.to(dtype), world.reference.to(dtype)
    images = {role: getattr(world, role).to(dtype) for role in ("forget", "retain")}
    out, gradient = gradient_of(
        kind(1e6), model, SCHEDULE, **images, reference_model=reference,
        generator=torch.Generator().manual_seed(0),
    )  # fmt: skip
    assert gradient.isfinite().all()
    assert out.loss.isfinite()
    assert not out.skipped


# --- reference points of KTO


def test_reference_points_of_kto():
    """Batches of different sizes: the mean of the rows is not that of the classes."""
    world = World(retain=2)
    rewards = list(world.rewards(KTO()).values())
    assert torch.cat(rewards).mean() > 0
    assert sum(own.mean() for own in rewards) > 0
    gradients = {}
    for z0 in ("batch", "class", "zero"):
        method = KTO(BETA, z0=z0)
        for rows in (None, 3):
            out, gradients[z0] = world.take(method, micro_batch_size=rows)
            loss = literal_loss(method, world)
            assert relative_l2([gradients[z0]], [world.literal(loss)]) <= EXACT
            torch.testing.assert_close(out.loss, loss.detach(), rtol=EXACT, atol=0)
    assert relative_l2([gradients["batch"]], [gradients["class"]]) > 1e-3
    assert relative_l2([gradients["batch"]], [gradients["zero"]]) > 1e-3
    # Where the network is worse than the other, all of them are 0.
    worse = World(better=False, retain=2)
    found = [worse.take(KTO(BETA, z0=z0))[1] for z0 in ("batch", "class", "zero")]
    assert all(torch.equal(each, found[0]) for each in found)


# --- selections


def full_mask(lowpass: LowPass) -> torch.Tensor:
    """`[8, 8]` of all bins, from that of the half spectrum in frequencies' sizes."""
    table, _, _ = lowpass.mask(8, 8)
    mask = torch.zeros(8, 8, dtype=torch.float64)
    for row in range(8):
        for column in range(8):
            at = min(row, 8 - row), min(column, 8 - column)
            if at[0] < table.shape[0] and at[1] < table.shape[1]:
                mask[row, column] = table[at]
    return mask


@pytest.mark.parametrize("rows", [None, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_band_filters_the_forget_losses_of_both_networks(method, rows):
    world, lowpass = World(), LowPass(0.5)
    _, ours = world.take(method, lowpass=lowpass, micro_batch_size=rows)
    loss = literal_loss(method, world, masks={"forget": full_mask(lowpass)})
    assert relative_l2([ours], [world.literal(loss)]) <= 1e-11


class Times(Shifted):
    """Remembers the timesteps of its rows."""

    def forward(self, x_t, t):
        self.seen = t
        return super().forward(x_t, t)


def test_a_window_unshares_the_timestep_of_a_pair():
    world, model = World(), Times().double()
    options = {**world.images(DPO()), "reference_model": world.reference}
    method_step(DPO(), model, None, SCHEDULE, **options, keep_grad=True)
    forget, retain = model.seen.chunk(2)
    assert torch.equal(forget, retain)
    window = TimeWindow(250, 260)
    for _ in range(2):
        method_step(DPO(), model, None, SCHEDULE, **options, time_window=window, keep_grad=True)
        forget, retain = model.seen.chunk(2)
        assert ((forget >= 250) & (forget < 260)).all()
        assert not torch.equal(forget, retain)
    # The pair shares it again where both branches have the window.
    both = {"time_window": window, "retain_density": window}
    method_step(DPO(), model, None, SCHEDULE, **options, **both, keep_grad=True)
    forget, retain = model.seen.chunk(2)
    assert torch.equal(forget, retain)


@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_what_would_weight_losses_is_refused(method):
    world = World()
    why = f"{type(method).__name__} makes more of its losses than a weighted sum"
    with pytest.raises(ValueError, match=rf"^loss_weight: expected None \({why}\)"):
        world.take(method, loss_weight="min_snr")
    weighted = TimeWindow(250, 750, as_weight=True)
    with pytest.raises(ValueError, match=rf"^time_window: expected a density that is drawn from \({why}\)"):
        world.take(method, time_window=weighted)


# --- refusals


@pytest.mark.parametrize("kind", [DPO, KTO, NPO])
@pytest.mark.parametrize("beta", [0, -1, float("nan"), float("inf")])
def test_a_temperature_is_positive(kind, beta):
    least = r"\[1e-24" if kind is NPO else r"\(0"
    with pytest.raises(ValueError, match=rf"^beta: expected a finite number in {least}, inf\), got"):
        kind(beta)


def test_hyperparameters_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"^z0: expected one of batch, class, zero, got 'mean'"):
        KTO(z0="mean")
    with pytest.raises(ValueError, match=r"^retain_weight: expected a finite number in \[0, inf\), got -1"):
        NPO(retain_weight=-1)


def test_pairs_are_of_one_shape():
    world = World(retain=2)
    expected = r"^forget: expected the shape of retain, \(2, 1, 8, 8\) \(DPO works on pairs\)"
    with pytest.raises(ValueError, match=expected):
        world.take(DPO(), draws=None)


@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_a_reference_is_asked_for(method):
    expected = rf"^reference_model: expected a callable .* {type(method).__name__} compares with, got None"
    with pytest.raises(TypeError, match=expected):
        World().take(method, reference_model=None)


@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_a_copy_in_another_dtype_needs_autocast(method):
    world = World()
    expected = r"^reference_model: expected weights in float64, as those of model, or an autocast_dtype, got"
    with pytest.raises(TypeError, match=rf"{expected} float32$"):
        world.take(method, reference_model=copy.deepcopy(world.reference).float())
    model, reference = Shifted(seed=0), Shifted(seed=1).bfloat16()
    images = {role: getattr(world, role).float() for role in ("forget", "retain")}
    options = {"reference_model": reference, "autocast_dtype": torch.bfloat16}
    assert not method_step(method, model, None, SCHEDULE, **images, **options).skipped


def test_npo_without_a_retain_term_takes_no_retain_images():
    with pytest.raises(ValueError, match=r"^retain_density: expected None \(NPO reads no retain images\)"):
        World().take(NPO(retain_weight=0), retain_density=TimeWindow(0, 10))
