"""Hooks used in ways that nobody planned: refused by name before any work, or right."""

import copy
from dataclasses import replace

import pytest
import runs
import torch
from small_methods import Mask, Pairs, Whole, both, gradient_of
from test_hooks import PAIRS, SCHEDULE, World
from torch import nn

from fastunlearn import Draws, ImageStore, Unlearner, Vanilla, method_step
from fastunlearn import functional as F
from fastunlearn.objective.combine import Project, Rescale
from fastunlearn.objective.draws import FORGET, RETAIN, Normal, Same
from fastunlearn.objective.parameters import ParameterRule
from fastunlearn.objective.protocol import Method, Pass, Predicted, Term
from fastunlearn.runs.training import unlearn
from fastunlearn.step import compilation
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser
from fastunlearn.testing.host_sync import no_host_sync


@pytest.fixture
def world():
    return World()


class Both(Method):
    """Forget and retain rows in one call; what else it is stands in the arguments."""

    name, needs = "both", frozenset({"forget", "retain"})

    def __init__(self, coupled="row", changed=None, drawn=None):
        self.coupled, self.changed = coupled, changed
        self.drawn = FORGET | RETAIN if drawn is None else drawn

    def draws(self):
        return self.drawn

    def compose(self, batch, draws, schedule):
        whole = both(batch, draws, schedule, self.coupled)[0]
        if self.changed is None:
            return [whole]
        return [replace(whole, terms=tuple(replace(term, **self.changed) for term in whole.terms))]


class Objective(Both):
    """`Both` with an objective."""

    def __init__(self, function, combination=None, **arguments):
        super().__init__(**arguments)
        self.function, self.combination = function, combination

    @property
    def combine(self):
        return super().combine if self.combination is None else self.combination

    def objective(self, losses, reference, elements):
        return self.function(losses)


class Several(Method):
    """Terms on the retain rows."""

    name, needs = "several", frozenset({"retain"})

    def __init__(self, *terms):
        self.terms = terms

    def draws(self):
        return RETAIN

    def compose(self, batch, draws, schedule):
        x_t, target = F.noised(batch.retain, draws.retain_noise, draws.retain_timesteps, schedule)
        terms = tuple(Term(**{"role": "retain", "target": target} | given) for given in self.terms)
        return [Pass(x_t, draws.retain_timesteps, terms)]


def every_loss(losses):
    return {"total": dict(losses)}


def of_role(losses, role):
    return {name: loss for name, loss in losses.items() if name == role}


def take(world, method, **options):
    return gradient_of(method, world.model, SCHEDULE, **{**world.images, "draws": world.own, **options})


def take_retain(world, method, **options):
    draws = Draws(None, world.own.retain_noise, None, world.own.retain_timesteps)
    return gradient_of(method, world.model, SCHEDULE, retain=world.retain, draws=draws, **options)


@pytest.mark.parametrize("rows", [None, 2])
def test_terms_of_one_role_are_all_in_the_loss(world, rows):
    """Each with its own scale: the last one's counted for all of them."""
    out, ours = take_retain(world, Several({"scale": 1.0}, {"scale": 0.5}), micro_batch_size=rows)
    loss = world.losses(world.model, world.own)["retain"].mean()
    assert relative_l2([ours], [world.literal(1.5 * loss)]) <= 1e-12
    torch.testing.assert_close(out.loss, 1.5 * loss.detach(), rtol=1e-12, atol=0)
    torch.testing.assert_close(out.retain_loss, 2 * loss.detach(), rtol=1e-12, atol=0)


class Divided(Several):
    """Terms of one role that belong to two gradients."""

    combine = Rescale(2.0)


def test_terms_of_one_role_in_two_gradients_are_all_in_the_loss(world):
    method = Divided({"gradient": "retain"}, {"gradient": "forget", "scale": 0.25})
    out, ours = take_retain(world, method)
    loss = world.losses(world.model, world.own)["retain"].mean()
    gradient = world.literal(loss)
    factor = 2.0 / (0.25 * gradient).norm()
    assert relative_l2([ours], [gradient - factor * 0.25 * gradient]) <= 1e-12
    expected = (loss - factor * 0.25 * loss).detach()
    torch.testing.assert_close(out.loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"role": "forgot"}, r"^Term.role: expected one of forget, retain, got 'forgot'"),
        ({"weight": torch.ones(3)}, r"^Term.weight: expected a tensor of 5, one for each row"),
        ({"weight": [1.0] * PAIRS}, r"^Term.weight: expected a tensor of 5, .* got list"),
        ({"spread": torch.ones(1)}, r"^Term.spread: expected a tensor of 5, one for each row"),
        ({"rows": range(0, 6)}, r"^Term.rows: expected neighbouring rows of the 5 of the pass, got range"),
        ({"rows": range(0, 5, 2)}, r"^Term.rows: expected neighbouring rows"),
        ({"rows": range(0, 3)}, r"^Term.target: expected the shape \(3, 1, 8, 8\), got float64 of shape \(5"),
        ({"band": 0.5}, r"^Term.band: expected a LowPass or None, got 0.5"),
        ({"target": None, "rows": range(5)}, r"^Term.target: expected a tensor or Predicted, got None"),
        ({"target": Predicted("reference")}, r"^Predicted.by: expected 'model' where the method does not"),
        (
            {"target": Predicted("model", {"shift": torch.ones(1)})},
            r"^Predicted.kwargs: expected tensors of the 5 rows of the term, got .* for 'shift'",
        ),
    ],
)
def test_a_term_that_makes_no_sense_is_refused(world, changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        take_retain(world, Several(changed))


def test_a_weight_below_0_pushes_its_row_away(world):
    weight = torch.tensor([-1.0, 1.0, 0.5, -1e-30, 2.0], dtype=torch.float64)
    out, ours = take_retain(world, Several({"weight": weight}))
    loss = (weight * world.losses(world.model, world.own)["retain"]).mean()
    assert relative_l2([ours], [world.literal(loss)]) <= 1e-12
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)


def test_who_predicts_is_one_of_two():
    with pytest.raises(ValueError, match=r"^Predicted.by: expected one of model, reference, got 'refrence'"):
        Predicted("refrence")


@pytest.mark.parametrize(
    "changed", [{"weight": torch.ones(PAIRS)}, {"over": 7.0}, {"scale": 3.0}, {"gradient": "total"}]
)
def test_what_an_objective_does_not_read_is_refused(world, changed):
    (name,) = changed
    with pytest.raises(ValueError, match=rf"^Term.{name}: expected .* where the method has an objective of"):
        take(world, Objective(every_loss, changed=changed))


class Composes(Both):
    """Returns what it is given."""

    def __init__(self, made):
        super().__init__()
        self.made = made

    def compose(self, batch, draws, schedule):
        return self.made(super().compose(batch, draws, schedule)[0])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda whole: whole, r"^Composes.compose: expected a list of Pass, got Pass"),
        (lambda whole: [], r"^Composes.compose: expected at least one Pass, got none"),
        (lambda whole: [replace(whole, terms=())], r"^Pass.terms: expected at least one Term"),
        (lambda whole: [replace(whole, coupled="pairs")], r"^Pass.coupled: expected one of row, pair, batch"),
        (
            lambda whole: [replace(whole, timesteps=whole.timesteps[:1])],
            r"^Pass.timesteps: expected one for each of the 10 rows of x_t",
        ),
    ],
)
def test_a_composition_that_makes_no_sense_is_refused(world, made, message):
    with pytest.raises((TypeError, ValueError), match=message):
        take(world, Composes(made))


@pytest.mark.parametrize("rows", [None, 2, 4])
@pytest.mark.parametrize("count", [1, 3])
def test_pairs_are_equally_many(world, rows, count):
    """One row would be broadcast to all, and of three pairs the last two retain rows would be left out."""
    draws = Draws(
        world.noise[0][:count], world.noise[1], world.own.forget_timesteps[:count], world.own.retain_timesteps
    )

    def preferred(losses):
        return {"total": {"retain": losses["retain"] - losses["forget"]}}

    with pytest.raises(
        ValueError, match=rf"^Pass.terms: expected as many rows of each role in pairs, got {count} f"
    ):
        take(
            world,
            Objective(preferred, coupled="pair"),
            forget=world.forget[:count],
            draws=draws,
            micro_batch_size=rows,
        )


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_an_objective_may_ignore_a_role(world, rows):
    """In a call that has rows of that role alone, it has nothing to say."""
    out, ours = take(
        world, Objective(lambda losses: {"total": of_role(losses, "forget")}), micro_batch_size=rows
    )
    loss = world.losses(world.model, world.own)["forget"].mean()
    assert relative_l2([ours], [world.literal(loss)]) <= 1e-12
    torch.testing.assert_close(out.loss, loss.detach(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_an_objective_may_count_a_role_as_a_constant(world, rows):
    def half(losses):
        return {"total": {role: loss if role == "forget" else loss.detach() for role, loss in losses.items()}}

    out, ours = take(world, Objective(half), micro_batch_size=rows)
    losses = world.losses(world.model, world.own)
    assert relative_l2([ours], [world.literal(losses["forget"].mean())]) <= 1e-12
    both_means = (losses["forget"].mean() + losses["retain"].mean()).detach()
    torch.testing.assert_close(out.loss, both_means, rtol=1e-12, atol=0)


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_projection_of_an_objective_split_at_will(world, rows):
    def apart(losses):
        return {role: of_role(losses, role) for role in ("forget", "retain")}

    _, ours = take(world, Objective(apart, Project(0.5)), micro_batch_size=rows)
    gradients = {
        role: world.literal(world.losses(world.model, world.own)[role].mean())
        for role in ("forget", "retain")
    }
    share = gradients["retain"] @ gradients["forget"] / gradients["forget"].square().sum()
    expected = gradients["retain"] + (0.5 - share).clamp(min=0) * gradients["forget"]
    assert relative_l2([ours], [expected]) <= 1e-12


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize(
    ("answer", "combination", "message"),
    [
        (lambda losses: {"forget": losses}, None, r"expected gradients of Sum, total, got 'forget'"),
        (lambda losses: {"retain": losses}, Rescale(1.0), r"contributions to forget, retain .* none to f"),
        (lambda losses: {"forget": losses}, Project(1.0), r"contributions to forget, retain .* none to r"),
        (lambda losses: None, None, r"expected {gradient: {role: contributions}}, got None"),
        (lambda losses: {"total": 1.0}, None, r"expected {gradient: {role: contributions}}, got dict"),
        (lambda losses: {"total": dict.fromkeys(losses, 1.0)}, None, r"one contribution for each .*got 1.0"),
        (
            lambda losses: {"total": {role: loss.half() for role, loss in losses.items()}},
            None,
            r"expected contributions in float32 or better, got torch.float16",
        ),
    ],
)  # fmt: skip
def test_an_answer_that_makes_no_sense_is_refused(world, answer, combination, message, rows):
    with pytest.raises((TypeError, ValueError), match=message):
        take(world, Objective(answer, combination), micro_batch_size=rows)
    assert all(parameter.grad is None for parameter in world.model.parameters())


def test_the_same_numbers_in_any_order(world):
    """A field that is to be the same as a later one had nothing."""
    drawn = {"retain_noise": Same("forget_noise")} | FORGET | {"retain_timesteps": Same("forget_timesteps")}
    seen = []

    class Looks(Both):
        def compose(self, batch, draws, schedule):
            seen.append(draws)
            return super().compose(batch, draws, schedule)

    take(world, Looks(drawn=drawn), draws=None)
    assert torch.equal(seen[0].retain_noise, seen[0].forget_noise)
    assert torch.equal(seen[0].retain_timesteps, seen[0].forget_timesteps)


@pytest.mark.parametrize(
    ("drawn", "message"),
    [
        ({"extra": Normal("forget")}, r"^Method.draws: expected fields of Draws, got 'extra'"),
        ({"forget_noise": Same("nothing")}, r"expected .* the same as another field .*Same\('nothing'\)"),
        ({"uniform_target": Normal("both")}, r"branches that the method needs, got 'uniform_target'"),
    ],
)  # fmt: skip
def test_draws_that_make_no_sense_are_refused(world, drawn, message):
    with pytest.raises(ValueError, match=message):
        take(world, Both(drawn=FORGET | RETAIN | drawn), draws=None)


def test_draws_for_a_set_that_is_not_needed_are_refused(world):
    class Retains(Both):
        needs = frozenset({"retain"})

    with pytest.raises(
        ValueError, match=r"^Method.draws: expected numbers for branches that the method needs"
    ):
        gradient_of(Retains(), world.model, SCHEDULE, retain=world.retain)


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        (
            frozenset({"forget", "retain", "refrence"}),
            r"^Both.needs: expected some of forget, .*got 'refrence'",
        ),
        (("forget", "retain"), r"^Both.needs: expected a frozenset of forget, retain, .* got tuple"),
        (frozenset(), r"^Both.needs: expected 'forget' or 'retain', .* got none"),
        (frozenset({"retain", "neighbors"}), r"^Both.needs: expected .*'forget' where there is 'neighbors'"),
    ],
)
def test_needs_that_there_is_no_word_for_are_refused(world, monkeypatch, needs, message):
    monkeypatch.setattr(Both, "needs", needs)
    with pytest.raises((TypeError, ValueError), match=message):
        take(world, Both())
    with pytest.raises((TypeError, ValueError), match=message):
        run_of(Both())


def test_a_method_with_neighbors_says_how_many(monkeypatch):
    monkeypatch.setattr(Both, "needs", frozenset({"forget", "retain", "neighbors"}))
    with pytest.raises(TypeError, match=r"^k: expected"):
        run_of(Both())


def stores():
    images = torch.randint(
        0, 256, (12, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}


def run_of(method, model=None, optimizer=None, **options):
    """An `Unlearner` on a small network."""
    model = TinyDenoiser() if model is None else model
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    return Unlearner(model, optimizer, SCHEDULE, method, **stores(), **{"batch_size": 4, **options})


class Around(nn.Module):
    """Another network in it."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x_t, t):
        return self.network(x_t, t)


def test_a_reference_that_is_trained_along_is_refused(world):
    given = {**world.images, "draws": world.shared, "reference_model": Around(world.model)}
    expected = r"^reference_model: expected weights of its own .*got network.enter.weight, which is trained"
    with pytest.raises(ValueError, match=expected):
        method_step(Pairs(), world.model, None, SCHEDULE, **given)
    model = TinyDenoiser()
    with pytest.raises(ValueError, match=expected):
        run_of(Pairs(), model, reference_model=Around(model))


class Counts(nn.Module):
    """With batch norm, whose averages each call moves, or dropout."""

    def __init__(self, *more):
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), *more)

    def forward(self, x_t, t):
        return self.net(x_t)


@pytest.mark.parametrize("more", [nn.BatchNorm2d(1), nn.Dropout(0.5)], ids=str)
def test_a_reference_that_changes_is_refused(world, more):
    reference = Counts(more).double()
    given = {**world.images, "draws": world.shared, "reference_model": reference}
    with pytest.raises(ValueError, match=r"^reference_model: expected a network without .*\(net.1\)"):
        method_step(Pairs(), world.model, None, SCHEDULE, **given)
    reference.eval()
    method_step(Pairs(), world.model, None, SCHEDULE, **given)


def test_rows_that_go_through_a_network_twice_refuse_batch_norm(world):
    given = {**world.images, "draws": world.own, "micro_batch_size": 3}
    model = Counts(nn.BatchNorm2d(1)).double()
    with pytest.raises(ValueError, match=r"^model: expected a network without averages that each call moves"):
        method_step(Whole(), model, None, SCHEDULE, **given)


def test_a_reference_elsewhere_is_refused(world):
    given = {**world.images, "draws": world.shared, "reference_model": TinyDenoiser().to("meta")}
    with pytest.raises(ValueError, match=r"^reference_model: expected weights on cpu, got meta"):
        method_step(Pairs(), world.model, None, SCHEDULE, **given)


def test_a_reference_may_be_any_callable_beside_a_compiled_network(world, monkeypatch):
    """A function has no parameters, and is not compiled."""
    monkeypatch.setattr(compilation, "BACKEND", "eager")
    compiled, whole = [], compilation.whole

    def remembered(network, *arguments, **options):
        compiled.append(network)
        return whole(network, *arguments, **options)

    monkeypatch.setattr(compilation, "whole", remembered)
    given = {"draws": world.shared, "compile": True}
    _, ours = take(world, Pairs(), reference_model=lambda x_t, t: world.reference(x_t, t), **given)
    assert set(compiled) == {world.model}
    _, expected = take(world, Pairs(), reference_model=world.reference, draws=world.shared)
    assert relative_l2([ours], [expected]) <= 1e-12
    replayed = Unlearner._not_replayable
    assert replayed(run_of(Pairs(), reference_model=lambda x_t, t: x_t)) is not None
    assert replayed(run_of(Pairs(), reference_model=TinyDenoiser(seed=1))) is None


@pytest.mark.parametrize("rows", [2, 4])
def test_pairs_are_split_on_the_device(world, rows):
    """Indices made on the host would be copied, which a device waits for and a graph cannot hold."""
    with torch.device("meta"):
        model, images = TinyDenoiser(), torch.zeros(PAIRS, 1, 8, 8)
    options = {"forget": images, "retain": images, "micro_batch_size": rows, "compile": False}
    options["draws"] = Draws(images, None, torch.zeros(PAIRS, dtype=torch.long, device="meta"))
    reference = copy.deepcopy(model)

    def step():
        method_step(Pairs(), model, None, SCHEDULE, reference_model=reference, keep_grad=True, **options)

    step()  # what is copied once and kept: tables of the schedule
    with no_host_sync("meta"):
        step()


class Counting(ParameterRule):
    """An anchor at zero whose strength grows with the steps: it has a state."""

    def __init__(self):
        self.steps = torch.zeros(())

    def add(self, parameters, loss_scale):
        self.steps += 1
        for parameter in parameters:
            parameter.grad += self.steps * parameter.detach()
        return self.steps

    def state_dict(self):
        return {"steps": self.steps}

    def load_state_dict(self, state):
        self.steps = state["steps"].clone()


def test_a_run_goes_on_with_the_state_of_its_rules(tmp_path):
    whole, first, second = (run_of(Vanilla(), rules=[Counting()]) for _ in range(3))
    unlearn(whole, num_steps=5, output_dir=tmp_path / "whole")
    unlearn(first, num_steps=3, output_dir=tmp_path / "run", keep_checkpoints=True)
    runs.unfinish(tmp_path / "run", 3)
    unlearn(second, num_steps=5, output_dir=tmp_path / "run", resume_from_checkpoint="latest")
    assert second.rules[0].steps == 5
    for own, expected in zip(second.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_a_run_is_not_resumed_with_other_rules_or_another_reference(tmp_path):
    weights = [parameter.detach() for parameter in TinyDenoiser().parameters()]
    frozen = Mask(weights, weights)
    options = {"output_dir": tmp_path, "resume_from_checkpoint": "latest"}
    reference = TinyDenoiser(seed=1)
    run = run_of(Pairs(), reference_model=reference, rules=[frozen])
    unlearn(run, num_steps=2, output_dir=tmp_path, keep_checkpoints=True)
    runs.unfinish(tmp_path, 2)
    with pytest.raises(ValueError, match=r"a run with rules nothing of this name, got .*Mask'"):
        unlearn(run_of(Pairs(), reference_model=reference), num_steps=3, **options)
    with pytest.raises(ValueError, match=r"^resume_from_checkpoint: expected .* with reference_model"):
        unlearn(run_of(Pairs(), reference_model=TinyDenoiser(seed=2), rules=[frozen]), num_steps=3, **options)


class Returns(ParameterRule):
    """Adds what it is given to the loss."""

    def __init__(self, value):
        self.value = value

    def add(self, parameters, loss_scale):
        return self.value


def test_what_a_rule_adds_to_the_loss_is_a_number(world):
    out, _ = take(world, Both(), rules=[Returns(torch.ones((), requires_grad=True))])
    assert not out.loss.requires_grad
    for value in (torch.zeros(1), 1.0):
        with pytest.raises(TypeError, match=r"^Returns.add: expected a 0-d tensor or None, got"):
            take(world, Both(), rules=[Returns(value)])
    assert all(parameter.grad is None for parameter in world.model.parameters())


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_rule_that_adds_nan_is_a_skipped_step(fused, scaled):
    model = TinyDenoiser()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    rules = [Returns(torch.tensor(float("nan")))]
    out = run_of(Vanilla(), model, optimizer, rules=rules, grad_scaler=scaler).step()
    assert out.skipped
    assert all(map(torch.equal, model.parameters(), before))


def test_a_graph_is_captured_anew_where_the_reference_has_moved():
    run = run_of(Pairs(), reference_model=TinyDenoiser(seed=1))
    before = run._settings()
    assert run._settings() == before
    for parameter in run.reference_model.parameters():
        parameter.data = parameter.data.clone()
    assert run._settings() != before
    before = run._settings()
    run.reference_model.eval()
    assert run._settings() != before


class FailsOnce(ParameterRule):
    """Raises at its first step."""

    failed = False

    def add(self, parameters, loss_scale):
        if not self.failed:
            self.failed = True
            raise RuntimeError("once")


def test_a_step_may_be_taken_again_after_a_rule_has_failed():
    """With a scaler, which had unscaled the gradients of the step that failed."""
    run = run_of(Vanilla(), rules=[FailsOnce()], grad_scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(RuntimeError, match="once"):
        run.step()
    plain = run_of(Vanilla(), grad_scaler=torch.amp.GradScaler("cpu"))
    assert torch.equal(run.step().loss, plain.step().loss)
    for own, expected in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(own, expected)


def test_a_mask_that_is_not_in_place_is_refused(world):
    class Halves(ParameterRule):
        def restrict(self, parameters, gradients):
            return [gradient / 2 for gradient in gradients]

    class Replaces(ParameterRule):
        def restrict(self, parameters, gradients):
            gradients[0] = torch.zeros_like(gradients[0])

    with pytest.raises(TypeError, match=r"^Halves.restrict: expected gradients changed in place"):
        take(world, Both(), rules=[Halves()])
    with pytest.raises(TypeError, match="item assignment"):
        take(world, Both(), rules=[Replaces()])
