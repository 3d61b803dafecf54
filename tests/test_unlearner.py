import copy

import pytest
import torch

from fastunlearn import (
    DPO,
    NPO,
    SISS,
    Draws,
    EraseDiff,
    ImageStore,
    NegGrad,
    ReTrack,
    Unlearner,
    Vanilla,
    nearest_neighbors,
    retrack_step,
)
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.methods import compared_with, every_variant

METHODS = every_variant(k=2)
SCHEDULE = linear_schedule()


def stores(dtype=torch.uint8):
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    if dtype != torch.uint8:
        images = images.to(dtype) * 2 / 255 - 1
    return ImageStore(images[:4]), ImageStore(images[4:])


def make(method, *, fused=False, **options):
    forget, retain = stores(options.pop("dtype", torch.uint8))
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=fused)
    options = {"batch_size": 6, **compared_with(method, TinyDenoiser(seed=1)), **options}
    return Unlearner(model, optimizer, SCHEDULE, method, forget=forget, retain=retain, **options)


def state(unlearner):
    return torch.cat([parameter.detach().flatten() for parameter in unlearner.model.parameters()])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_steps_are_a_function_of_the_seed(method):
    runs = {}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        unlearner = make(method, seed=seed)
        outputs = [unlearner.step() for _ in range(3)]
        assert all(torch.isfinite(output.loss) and not output.skipped for output in outputs)
        assert unlearner.step_index == 3
        runs[name] = state(unlearner)
    assert torch.equal(runs["one"], runs["again"])
    assert not torch.equal(runs["one"], runs["other"])


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_restored_run_takes_the_same_steps(method):
    whole, first, second = make(method), make(method), make(method)
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    second.model.load_state_dict(first.model.state_dict())
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    second.load_state_dict(first.state_dict())
    for _ in range(2):
        second.step()
    assert torch.equal(state(whole), state(second))


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("micro_batch_size", [1, 4, 5])
def test_micro_batches_add_up_to_the_batch(method, micro_batch_size):
    one, many = make(method), make(method, micro_batch_size=micro_batch_size)
    a, b = one.step(), many.step()
    for name in a._fields[:-1]:
        if getattr(a, name) is not None:
            torch.testing.assert_close(
                getattr(a, name),
                getattr(b, name),
                rtol=1e-4,
                atol=1e-6,
                msg=lambda text, name=name: f"{name}: {text}",
            )


def test_float_rows_take_the_same_step_as_uint8_rows():
    one, two = make(ReTrack(k=3)), make(ReTrack(k=3), dtype=torch.float32)
    torch.testing.assert_close(one.step().loss, two.step().loss, rtol=1e-4, atol=0)
    assert torch.equal(one.neighbors[0], two.neighbors[0])


def test_the_step_is_the_functional_step():
    unlearner = make(ReTrack(k=2, lambd=0.3))
    model, generator = copy.deepcopy(unlearner.model), torch.Generator().manual_seed(0)
    forget_rows, retain_rows = torch.tensor([0, 3, 3, 1, 2, 0]), torch.tensor([5, 0, 19, 7, 7, 1])
    noise = [torch.randn(6, 1, 8, 8, generator=generator) for _ in range(2)]
    timesteps = [torch.randint(1000, (6,), generator=generator) for _ in range(2)]
    draws = Draws(
        forget_noise=noise[0],
        retain_noise=noise[1],
        forget_timesteps=timesteps[0],
        retain_timesteps=timesteps[1],
    )
    out = unlearner.step(Draws(**{**vars(draws), "forget_rows": forget_rows, "retain_rows": retain_rows}))
    forget, retain = stores()
    neighbors = retain.rows(unlearner.neighbors[0][forget_rows].flatten()).view(6, 2, 1, 8, 8)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    expected = retrack_step(
        model,
        optimizer,
        SCHEDULE,
        forget.rows(forget_rows),
        neighbors,
        retain.rows(retain_rows),
        lambd=0.3,
        draws=draws,
    )
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=0)
    torch.testing.assert_close(
        list(unlearner.model.parameters()), list(model.parameters()), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("fused", [True, False])
def test_a_non_finite_step_is_skipped_and_counted(fused):
    unlearner = make(ReTrack(k=2), fused=fused)
    before = state(unlearner).clone()
    bad = torch.full((6, 1, 8, 8), float("nan"))
    assert unlearner.step(Draws(retain_noise=bad)).skipped
    assert torch.equal(state(unlearner), before)
    assert unlearner.skipped_steps == 1
    assert not unlearner.step().skipped
    assert unlearner.skipped_steps == 1
    assert torch.isfinite(state(unlearner)).all()
    assert not torch.equal(state(unlearner), before)


def test_ema_and_lr_scheduler_move_with_the_steps():
    class Average:
        count = 0

        def step(self, parameters):
            self.count += len(list(parameters)) > 0

    unlearner = make(Vanilla())
    unlearner.ema = Average()
    unlearner.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(unlearner.optimizer, lambda step: 0.5**step)
    for _ in range(3):
        unlearner.step()
    assert unlearner.ema.count == 3
    assert unlearner.optimizer.param_groups[0]["lr"] == pytest.approx(1e-3 / 8)


def test_the_redirected_loss_falls():
    """On one fixed draw at middle timesteps (at t = 0 single losses are huge), before and after forty steps
    on other draws.
    """
    unlearner = make(ReTrack(k=1, lambd=0.5))
    probe = Draws(
        forget_rows=torch.tensor([0, 1, 2, 3, 0, 1]),
        forget_noise=torch.randn(6, 1, 8, 8),
        forget_timesteps=torch.full((6,), 400),
    )
    before = copy.deepcopy(unlearner).step(probe).forget_loss
    for group in unlearner.optimizer.param_groups:
        group["lr"] = 1e-2
    for _ in range(40):
        unlearner.step()
    assert unlearner.step(probe).forget_loss < 0.7 * before


@pytest.mark.parametrize("method", [ReTrack(k=2), SISS(), EraseDiff()], ids=str)
def test_loss_scaling_changes_no_number(method):
    """float16 training scales the loss: norms and factors are those of the unscaled gradients, and the update
    is the same.
    """
    plain, scaled = make(method), make(method, grad_scaler=torch.amp.GradScaler("cpu", init_scale=2.0**12))
    one, two = plain.step(), scaled.step()
    for name in ("loss", "grad_norm", "correction_norm", "scaling_factor"):
        if getattr(one, name) is not None:
            torch.testing.assert_close(
                getattr(one, name),
                getattr(two, name),
                rtol=1e-4,
                atol=1e-7,
                msg=lambda text, name=name: f"{name}: {text}",
            )
    torch.testing.assert_close(state(plain), state(scaled), rtol=0, atol=1e-5)


def test_an_ema_that_fails_once_does_not_shift_the_draws():
    class FailsOnce:
        failures = 1

        def step(self, parameters):
            if self.failures:
                self.failures -= 1
                raise KeyboardInterrupt

    plain, interrupted = make(ReTrack(k=2)), make(ReTrack(k=2), ema=FailsOnce(), residency="host")
    with pytest.raises(KeyboardInterrupt):
        interrupted.step()
    plain.step()
    for _ in range(2):
        assert plain.step().loss == interrupted.step().loss
    assert plain.step_index == interrupted.step_index == 3
    assert int(interrupted._counter[1]) == 3


def test_images_and_latents_do_not_mix():
    images = torch.rand(8, 1, 8, 8)
    model = TinyDenoiser()
    stores = {"forget": ImageStore(images[:2]), "retain": ImageStore(images[2:], latents=True)}
    with pytest.raises(ValueError, match="forget: expected latents, as in retain, got images"):
        Unlearner(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, EraseDiff(), **stores)


def swapped(index, sqdist):
    return index[[1, 0, 2, 3]], sqdist[[1, 0, 2, 3]]


def of_other_rows(index, sqdist):
    return index, sqdist + 1


def descending(index, sqdist):
    return index.flip(1), sqdist.flip(1)


def not_finite(index, sqdist):
    return index, sqdist.double().fill_(float("nan"))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("spoil", [swapped, of_other_rows, descending, not_finite])
def test_neighbours_of_other_images_are_refused(dtype, spoil):
    forget, retain = stores(dtype)
    found = nearest_neighbors(forget, retain, 2)
    make(ReTrack(k=2), dtype=dtype, neighbors=found)  # as they were found: accepted
    if spoil is not_finite and dtype == torch.uint8:
        pytest.skip("integers have no NaN")
    with pytest.raises(ValueError, match="neighbors: expected"):
        make(ReTrack(k=2), dtype=dtype, neighbors=spoil(*found))


class Prompted(TinyDenoiser):
    def forward(self, x, t, prompt):
        raise AssertionError("called")


@pytest.mark.parametrize(
    "wrap", [lambda model: model, torch.nn.DataParallel, lambda model: torch.compile(model, backend="eager")]
)
@pytest.mark.parametrize("needs", ["prompt", "class_labels"])
def test_a_network_that_needs_more_than_images_is_refused_before_neighbours_are_searched(
    monkeypatch, needs, wrap
):
    monkeypatch.setattr("fastunlearn.engine.neighborhood.nearest_neighbors", None)
    if needs == "class_labels":
        pytest.importorskip("diffusers")
        from fastunlearn.testing.checkpoints import tiny_unet

        model = tiny_unet(num_class_embeds=10)
    else:
        model = Prompted()
    rows = torch.randint(0, 256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    stores = {"forget": ImageStore(rows[:2]), "retain": ImageStore(rows[2:])}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError,
        match=rf"model: expected a network of images and timesteps alone .*, got a .* that needs {needs}",
    ):
        Unlearner(wrap(model), optimizer, linear_schedule(), ReTrack(k=2), **stores, batch_size=2)


# --- a method, or a reference, in place of another


def test_a_method_that_reads_more_is_refused_before_its_step():
    for first, then, missing in (
        (NegGrad(), SISS(), "retain"),
        (Vanilla(), NegGrad(), "forget"),
        (NPO(retain_weight=0), NPO(), "retain"),
        (SISS(), ReTrack(k=2), "neighbors"),
    ):
        run = make(first)
        run.step()
        run.method = then
        expected = rf"^method: expected one that reads what is here \(.*, which needs {missing} \(of a new"
        with pytest.raises(ValueError, match=expected):
            run.step()
        run.method = first
        assert not run.step().skipped


@pytest.mark.parametrize(
    ("then", "message"),
    [
        (ReTrack(k=3), "expected k 2, by which neighbours were searched, got 3"),
        (
            ReTrack(k=2, within_condition=True),
            "expected within_condition False, by which neighbours were searched, got True",
        ),
    ],
    ids=str,
)
def test_a_method_of_other_neighbours_is_refused(then, message):
    """It would be taught by those of the first."""
    run = make(ReTrack(k=2))
    before = state(run)
    run.method = then
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"^method: {message} \(of a new Unlearner\)"):
            run.step()
    assert torch.equal(state(run), before)
    run.method = ReTrack(k=2, lambd=0.3)
    assert not run.step().skipped


def test_a_method_that_reads_whole_sets_looks_at_them_where_it_takes_the_place_of_another():
    forget, _ = stores()
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"forget": forget, "retain": forget, "allow_overlap": True, "batch_size": 2}
    run = Unlearner(model, optimizer, SCHEDULE, SISS(), **options)
    run.method = SISS(superfactor=1.0)
    with pytest.raises(ValueError, match=r"^forget: expected images that are not in retain, got 4 that are"):
        run.step()

    latents = torch.zeros(4, 1, 8, 8)
    drawn = ImageStore(latents, std=torch.ones_like(latents), latents=True)
    options = {"forget": ImageStore(latents + 1, latents=True), "retain": drawn, "batch_size": 2}
    run = Unlearner(model, optimizer, SCHEDULE, SISS(), **options)
    run.method = ReTrack(weights="self_normalized")
    with pytest.raises(ValueError, match=r"^retain: expected a store of fixed rows \(freeze\(\) makes one\)"):
        run.step()


def test_a_reference_in_place_of_another_is_looked_at():
    run = make(SISS())
    run.method = DPO()
    with pytest.raises(
        TypeError, match=r"^reference_model: expected a callable .* DPO compares with, got None"
    ):
        run.step()
    run.reference_model = run.model
    with pytest.raises(ValueError, match=r"^reference_model: expected another network than model"):
        run.step()
    run.reference_model = TinyDenoiser(seed=1)
    assert not run.step().skipped
    # One that stays where nobody compares with it any more does no harm.
    run.method = SISS()
    assert not run.step().skipped
