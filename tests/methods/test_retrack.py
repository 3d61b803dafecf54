"""ReTrack's further forms, against literal losses in float64: weights of the whole retain set, a lambd that
balances gradients, neighbours of one label.
"""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

from fastunlearn import (
    Draws,
    ImageStore,
    LowPass,
    ReTrack,
    TimeWindow,
    Unlearner,
    method_step,
    nearest_neighbors,
    retrack_step,
)
from fastunlearn.methods import Batch
from fastunlearn.reference import noising, prediction_target
from fastunlearn.reference import redirect_to_all as literal_redirect
from fastunlearn.runs.identity import identity
from fastunlearn.step.options import Settings
from fastunlearn.step.take import take_step
from fastunlearn.step.trained import look_at
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

# Of gradients in float64: sums of some thousand terms, and weights that are off by 1e-10 at small timesteps.
EXACT = 1e-9
FORGET_ROWS, RETAIN_ROWS, BATCH = 6, 31, 5


class World:
    """Sets, a batch of them, its numbers and a network, in float64."""

    def __init__(self, prediction_type: str = "epsilon"):
        generator = torch.Generator().manual_seed(4)
        numbers = {"generator": generator, "dtype": torch.float64}
        self.schedule = linear_schedule(prediction_type=prediction_type)
        self.model = TinyDenoiser().double()
        self.forget = torch.rand(FORGET_ROWS, 1, 8, 8, **numbers) * 2 - 1
        moved = 0.2 * torch.randn(RETAIN_ROWS, 1, 8, 8, **numbers)
        self.retain = (self.forget[torch.arange(RETAIN_ROWS) % FORGET_ROWS] + moved).clamp(-1, 1)
        noise = torch.randn(2, BATCH, 1, 8, 8, **numbers)
        times = torch.tensor([[150, 400, 600, 800, 990], [3, 300, 999, 500, 77]])
        self.draws = Draws(noise[0], noise[1], times[0], times[1])
        self.stores = {"forget": ImageStore(self.forget), "retain": ImageStore(self.retain)}

    def step(self, method: ReTrack, **settings):
        """What a step on the first rows of each set reports, and the gradient that it leaves."""
        batch = Batch(self.forget[:BATCH], self.retain[:BATCH], stores=self.stores)
        if "neighbors" in method.needs:
            index, _ = nearest_neighbors(self.forget, self.retain, method.k)
            batch = dataclasses.replace(batch, neighbors=self.retain[index[:BATCH]])
        trained = look_at(self.model, None, None, None, keep_grad=False)
        output = take_step(trained, method, self.schedule, batch, self.draws, Settings(**settings))
        gradient = [parameter.grad for parameter in self.model.parameters()]
        for parameter in self.model.parameters():
            parameter.grad = None
        return output, gradient

    def losses(self, weights: str, k: int | None = None):
        """`L_unlearn`, `sum_x w(x|x_t) ||e - v_x||^2` with `[B, M, ...]` tensors, and `L_vanilla`."""
        draws, schedule = self.draws, self.schedule
        a, eps, t = self.forget[:BATCH], draws.forget_noise, draws.forget_timesteps
        x_t = noising(a, eps, t, schedule)
        alpha, sigma = (table[t].view(-1, 1, 1, 1, 1) for table in (schedule.alpha, schedule.sigma))

        def noise_and_kernel(images):  # [M, ...] -> v_x [B, M, ...], log q(x_t|x) [B, M]
            v = (x_t.unsqueeze(1) - alpha * images) / sigma
            return v, -v.square().flatten(2).sum(2) / 2

        v, kernel = noise_and_kernel(self.retain)
        if k is not None:
            index, _ = nearest_neighbors(self.forget, self.retain, k)
            kept = torch.zeros_like(kernel, dtype=torch.bool).scatter(1, index[:BATCH], True)
            kernel = kernel.masked_fill(~kept, -torch.inf)
        w = kernel.softmax(1)
        if weights == "importance":
            _, of_forget = noise_and_kernel(self.forget)
            w = (kernel.exp() / len(self.retain)) / (of_forget.exp().sum(1, keepdim=True) / len(self.forget))
        targets = v
        if schedule.prediction_type == "v_prediction":
            targets = alpha * v - sigma * self.retain
        prediction = self.model(x_t, schedule.model_input(t)).unsqueeze(1)
        unlearn = (w * (prediction - targets).square().flatten(2).sum(2)).sum(1).mean()

        given = self.retain[:BATCH], draws.retain_noise, draws.retain_timesteps, schedule
        x_t, target = noising(*given), prediction_target(*given)
        prediction = self.model(x_t, schedule.model_input(draws.retain_timesteps))
        return unlearn, (prediction - target).square().flatten(1).sum(1).mean()

    def gradient(self, loss):
        return list(torch.autograd.grad(loss, list(self.model.parameters()), retain_graph=True))


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("lambd", [0.3, 1.0])
@pytest.mark.parametrize("weights", ["self_normalized", "importance"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_weights_of_the_whole_set_are_the_literal_ones(kind, weights, lambd, rows):
    world = World(kind)
    output, gradient = world.step(ReTrack(lambd=lambd, weights=weights), micro_batch_size=rows)
    unlearn, vanilla = world.losses(weights)
    loss = lambd * unlearn + (1 - lambd) * vanilla
    assert relative_l2(gradient, world.gradient(loss)) < EXACT
    assert output.loss.item() == pytest.approx(loss.item(), rel=EXACT)
    assert output.forget_loss.item() == pytest.approx(unlearn.item(), rel=EXACT)


@pytest.mark.parametrize("rows", [None, 3])
@pytest.mark.parametrize("weights", ["truncated", "self_normalized", "importance"])
def test_lambd_auto_gives_both_gradients_one_norm(weights, rows):
    world = World()
    method = ReTrack(k=4, lambd="auto", weights=weights)
    output, gradient = world.step(method, micro_batch_size=rows)
    losses = world.losses(weights, k=4 if weights == "truncated" else None)
    of_unlearn, of_vanilla = (world.gradient(loss) for loss in losses)
    norms = [torch.cat([part.flatten() for part in own]).norm().item() for own in (of_unlearn, of_vanilla)]
    lambd = norms[1] / sum(norms)
    expected = [lambd * u + (1 - lambd) * r for u, r in zip(of_unlearn, of_vanilla, strict=True)]
    assert lambd * norms[0] == pytest.approx((1 - lambd) * norms[1])
    assert relative_l2(gradient, expected) < EXACT
    descended = lambd * losses[0] + (1 - lambd) * losses[1]
    assert output.loss.item() == pytest.approx(descended.item(), rel=EXACT)
    assert output.correction_norm.item() == pytest.approx(norms[0], rel=EXACT)
    assert output.scaling_factor.item() == pytest.approx(-lambd, rel=EXACT)


def test_truncated_weights_of_all_images_take_the_step_of_self_normalized_ones():
    world = World()
    whole, of_whole = world.step(ReTrack(lambd=0.3, weights="self_normalized"))
    found, gradient = world.step(ReTrack(k=RETAIN_ROWS, lambd=0.3))
    assert relative_l2(gradient, of_whole) < EXACT
    assert found.loss.item() == pytest.approx(whole.loss.item(), rel=EXACT)
    _, of_one = world.step(ReTrack(k=1, lambd=0.3))
    assert relative_l2(of_one, of_whole) > 1e-3


def test_a_ratio_that_vanishes_leaves_the_retain_term():
    """At t = 0 no image to keep can have made x_t: the weights are 0 in float64, not NaN."""
    world = World()
    world.draws = dataclasses.replace(world.draws, forget_timesteps=torch.zeros(BATCH, dtype=torch.int64))
    for lambd in (0.3, "auto"):
        output, gradient = world.step(ReTrack(lambd=lambd, weights="importance"))
        assert not output.skipped
        assert output.forget_loss == 0
        # Nothing is balanced against nothing.
        share = 0.7 if lambd == 0.3 else 1.0
        expected = [share * part for part in world.gradient(world.losses("importance")[1])]
        assert relative_l2(gradient, expected) < EXACT


# --- in an Unlearner
# -----------------------------------------------------------------------------

WHOLE = [ReTrack(lambd=0.3, weights="self_normalized"), ReTrack(lambd=0.3, weights="importance")]
FORMS = [*WHOLE, ReTrack(k=2, lambd="auto")]


def pictures(dtype=torch.uint8) -> dict[str, ImageStore]:
    generator = torch.Generator().manual_seed(0)
    forget = torch.randint(0, 256, (4, 1, 8, 8), generator=generator)
    moved = torch.randint(-20, 21, (20, 1, 8, 8), generator=generator)
    images = torch.cat([forget, (forget.repeat(5, 1, 1, 1) + moved).clamp(0, 255)]).to(torch.uint8)
    if dtype != torch.uint8:
        images = (images.double() * 2 / 255 - 1).to(dtype)
    return {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}


def unlearner(method, sets=None, **options) -> Unlearner:
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    given = {
        **(pictures() if sets is None else sets),
        "batch_size": 6,
        "warn_of_near_copies": False,
        **options,
    }
    return Unlearner(model, optimizer, linear_schedule(), method, **given)


def weights_of(run: Unlearner) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in run.model.parameters()]


SELECTIONS = {
    "plain": {},
    "window": {"time_window": TimeWindow(250, 750)},
    "weighted window": {"time_window": TimeWindow(250, 750, as_weight=True), "loss_weight": "min_snr"},
    "band": {"lowpass": LowPass(0.5)},
    "bfloat16": {"autocast_dtype": torch.bfloat16},
}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
def test_runs_truncated_at_all_images_are_self_normalized_ones(options, dtype):
    options = {"time_window": TimeWindow(20, 1000)} | options
    methods = ReTrack(k=20, lambd=0.3), ReTrack(lambd=0.3, weights="self_normalized")
    runs = [unlearner(method, pictures(dtype), max_grad_norm=None, **options) for method in methods]
    start = weights_of(runs[0])
    for _ in range(3):
        outputs = [run.step() for run in runs]
        # Float32 products make the logits of truncated weights: off by 1e-6 of a hundred at t = 20.
        for name in ("loss", "forget_loss", "retain_loss", "grad_norm"):
            one, other = (getattr(output, name) for output in outputs)
            torch.testing.assert_close(one, other, rtol=1e-3, atol=0)
    moved = [[end - begin for end, begin in zip(weights_of(run), start, strict=True)] for run in runs]
    assert relative_l2(*moved) < (1e-2 if "autocast_dtype" in options else 1e-3)


@pytest.mark.parametrize("options", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("method", FORMS, ids=str)
def test_micro_batches_and_sets_that_stay_on_the_host_change_nothing(method, options):
    runs = [
        unlearner(method, micro_batch_size=rows, residency=residency, **options)
        for rows, residency in ((None, "device"), (4, "device"), (None, "host"))
    ]
    for _ in range(2):
        outputs = [run.step() for run in runs]
        assert not any(output.skipped for output in outputs)
        for output in outputs[1:]:
            torch.testing.assert_close(output.loss, outputs[0].loss, rtol=1e-4, atol=1e-6)
    tolerance = 1e-2 if "autocast_dtype" in options else 1e-4
    for run in runs[1:]:
        assert relative_l2(weights_of(run), weights_of(runs[0])) < tolerance


def test_a_run_is_known_by_its_weights():
    runs = [identity(unlearner(method)) for method in (ReTrack(k=2), ReTrack(k=2, weights="importance"))]
    assert runs[0]["method"] == {
        "name": "ReTrack", "k": 2, "lambd": 0.005, "weights": "truncated", "within_condition": False,
    }  # fmt: skip
    assert runs[1]["method"]["weights"] == "importance"
    assert runs[0]["neighbors"] is not None
    assert runs[1]["neighbors"] is None


def test_what_has_no_meaning_is_refused_by_name():
    for given, error, expected in (
        ({"weights": "all"}, ValueError, "weights: expected one of truncated, self_normalized, importance"),
        ({"lambd": "half"}, ValueError, "lambd: expected one of auto, got 'half'"),
        ({"lambd": 1.5}, ValueError, "lambd: expected a finite number in"),
        ({"within_condition": 1}, TypeError, "within_condition: expected a bool, got 1"),
        (
            {"within_condition": True, "weights": "importance"},
            ValueError,
            "within_condition: expected False with weights 'importance'",
        ),
    ):
        with pytest.raises(error, match=f"^{expected}"):
            ReTrack(**given)


@pytest.mark.parametrize("method", WHOLE, ids=str)
def test_batches_alone_are_refused(method):
    world = World()
    with pytest.raises(ValueError, match=r"^method: expected one that works on batches alone, got ReTrack"):
        method_step(
            method, world.model, None, world.schedule, forget=world.forget, retain=world.retain[:FORGET_ROWS]
        )


@pytest.mark.parametrize("method", WHOLE, ids=str)
def test_sets_that_cannot_be_streamed_are_refused(method):
    latents = torch.zeros(4, 1, 8, 8)
    drawn = ImageStore(latents, std=torch.ones_like(latents), latents=True)
    fixed = ImageStore(latents + 1, latents=True)
    with pytest.raises(ValueError, match=r"^retain: expected a store of fixed rows \(freeze\(\) makes one\)"):
        unlearner(method, {"forget": fixed, "retain": drawn})
    if method.weights == "importance":
        with pytest.raises(ValueError, match=r"^forget: expected a store of fixed rows"):
            unlearner(method, {"forget": drawn, "retain": fixed})
    else:
        # Of the forget set nothing but the rows of the step is read, which may be drawn anew.
        run = unlearner(method, {"forget": drawn, "retain": fixed})
        assert [run.step().skipped.item() for _ in range(2)] == [False, False]
    expected = r"^retain: expected a set that fits on meta \(residency='device'\)"
    with pytest.raises(ValueError, match=expected):
        method.check_sets({"retain": fixed}, torch.device("meta"))
    ReTrack().check_sets({"retain": fixed}, torch.device("meta"))


def test_retrack_step_takes_auto():
    world = World()
    index, _ = nearest_neighbors(world.forget, world.retain, 4)
    output = retrack_step(
        world.model, None, world.schedule, world.forget[:BATCH], world.retain[index[:BATCH]],
        world.retain[:BATCH], lambd="auto", draws=world.draws,
    )  # fmt: skip
    expected, _ = World().step(ReTrack(k=4, lambd="auto"))
    assert output.loss.item() == pytest.approx(expected.loss.item(), rel=EXACT)


# --- neighbours of one label
# -----------------------------------------------------------------------------


def labelled(dtype=torch.uint8):
    sets = pictures(dtype)
    labels = {"forget": torch.tensor([7, 3, 7, 5]), "retain": torch.tensor([3, 5, 7, 7, 3] * 4)}
    return {name: ImageStore(store.images, labels=labels[name]) for name, store in sets.items()}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_neighbours_within_labels_are_the_nearest_that_have_it(dtype, tmp_path):
    sets = labelled(dtype)
    labels = sets["forget"].labels, sets["retain"].labels
    given = sets["forget"], sets["retain"], 3
    for _ in range(2):  # the second one comes from the cache
        index, sqdist = nearest_neighbors(*given, labels=labels, cache_dir=tmp_path)
    distances = (sets["forget"].images[:, None].double() - sets["retain"].images[None].double()).square()
    distances = distances.flatten(2).sum(2).masked_fill(labels[0][:, None] != labels[1], torch.inf)
    expected = distances.argsort(dim=1, stable=True)[:, :3]
    assert torch.equal(index, expected)
    torch.testing.assert_close(sqdist.double(), distances.gather(1, expected), rtol=1e-12, atol=0)

    free, _ = nearest_neighbors(*given, cache_dir=tmp_path)
    assert not torch.equal(free, index)
    other = labels[0], labels[1].roll(1)
    assert not torch.equal(nearest_neighbors(*given, labels=other, cache_dir=tmp_path)[0], index)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3


def test_ties_within_labels_go_to_the_lower_row():
    rows = torch.zeros(6, 1, 2, 2, dtype=torch.uint8)
    labels = torch.tensor([1]), torch.tensor([0, 1, 0, 1, 1, 1])
    index, _ = nearest_neighbors(rows[:1], rows, 3, labels=labels)
    assert index.tolist() == [[1, 3, 4]]


def test_labels_are_refused_by_name():
    sets = labelled()
    forget, retain = sets["forget"], sets["retain"]
    own, others = forget.labels, retain.labels
    for labels, k, error, expected in (
        (own, 2, TypeError, "labels: expected a pair"),
        ((own.float(), others), 2, TypeError, r"labels\[0\]: expected an integer tensor of 1 dimension"),
        ((own, others[:5]), 2, ValueError, r"labels\[1\]: expected one label a row, \[20\], got \(5,\)"),
        (
            (own, others),
            5,
            ValueError,
            r"labels: expected at least k = 5 retain rows with the label of every forget row, "
            r"got 4 with label 5 \(forget row 3\)",
        ),
        ((own + 1, others), 1, ValueError, r"labels: expected at least k = 1 .*, got 0 with label 4"),
    ):
        with pytest.raises(error, match=f"^{expected}"):
            nearest_neighbors(forget, retain, k, labels=labels)


def test_an_unlearner_redirects_within_conditions():
    sets, method = labelled(), ReTrack(k=3, within_condition=True)
    run = unlearner(method, sets)
    index, sqdist = nearest_neighbors(
        sets["forget"], sets["retain"], 3, labels=(sets["forget"].labels, sets["retain"].labels)
    )
    assert torch.equal(run.neighbor_rows, index)
    assert not run.step().skipped
    again = unlearner(method, sets, neighbors=(index, sqdist))
    assert torch.equal(again.neighbor_rows, index)

    free = nearest_neighbors(sets["forget"], sets["retain"], 3)
    expected = r"^neighbors: expected neighbours with the label of the forget row \(within_condition=True\)"
    with pytest.raises(ValueError, match=expected):
        unlearner(method, sets, neighbors=free)
    for name in sets:
        without = copy.copy(sets) | {name: pictures()[name]}
        with pytest.raises(ValueError, match=rf"^{name}: expected an ImageStore with labels"):
            unlearner(method, without)
    with pytest.raises(ValueError, match=r"^labels: expected at least k = 5 retain rows"):
        unlearner(ReTrack(k=5, within_condition=True), sets)


def test_the_literal_form_of_the_reference_is_that_of_the_tests():
    """`reference.redirect_to_all` against the sums of this file."""
    world = World()
    draws = world.draws
    found = literal_redirect(
        world.forget[:BATCH], world.retain, draws.forget_noise, draws.forget_timesteps, world.schedule,
        forget_set=world.forget,
    )  # fmt: skip
    prediction = world.model(found.x_t, draws.forget_timesteps)
    errors = (prediction - found.target).square().flatten(1).sum(1) + found.spread
    unlearn, _ = world.losses("importance")
    assert (found.weight * errors).mean().item() == pytest.approx(unlearn.item(), rel=EXACT)
