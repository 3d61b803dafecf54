"""What a caller's own loop may do to a step without spoiling it silently: autocast, scalers, odd optimizers,
conditioning, other dtypes.
"""

import copy

import pytest
import torch
from torch import nn

from fastunlearn import (
    SISS,
    Draws,
    EraseDiff,
    ImageStore,
    ReTrack,
    Unlearner,
    Vanilla,
    erasediff_step,
    neggrad_step,
    retrack_step,
    siss_step,
    vanilla_step,
)
from fastunlearn import functional as F
from fastunlearn.host import say
from fastunlearn.methods import Batch
from fastunlearn.step.arrange import finish
from fastunlearn.testing.factories import Average, TinyDenoiser, linear_schedule, redirect_inputs

SCHEDULE = linear_schedule()
SHAPE = (4, 1, 8, 8)


def images(seed, dtype=torch.float32):
    return (torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1).to(dtype)


def flat(model):
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


class Conditioned(nn.Module):
    """A network with labels, a mask and twice the channels (a learned variance), which notes what it was
    given.
    """

    def __init__(self):
        super().__init__()
        self.network, self.embedding, self.seen = TinyDenoiser(), nn.Embedding(10, 1), []

    def forward(self, x, t, labels, extra):
        self.seen.append((labels.clone(), extra["mask"].clone(), x.dtype))
        prediction = self.network(x, t) + self.embedding(labels).view(-1, 1, 1, 1) * extra["mask"].view(
            -1, 1, 1, 1
        )
        return torch.cat([prediction, 1e6 * prediction.detach()], dim=1)


def conditions(first, count=4):
    return {"labels": torch.arange(first, first + count), "extra": {"mask": torch.linspace(0, 1, count)}}


# --- scalers and non-finite numbers


@pytest.mark.parametrize(
    "scaler", [None, {"enabled": False}, {"init_scale": 1e-12}, {"init_scale": 2.0**10}], ids=str
)
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e25])
def test_what_is_reported_as_skipped_was_skipped(scaler, fused, bad):
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    grad_scaler = None if scaler is None else torch.amp.GradScaler("cpu", **scaler)
    before = flat(model).clone()
    out = vanilla_step(
        model,
        optimizer,
        SCHEDULE,
        images(0),
        draws=Draws(retain_noise=torch.full(SHAPE, bad)),
        grad_scaler=grad_scaler,
    )
    assert out.skipped
    assert torch.equal(flat(model), before)
    assert not vanilla_step(
        model,
        optimizer,
        SCHEDULE,
        images(0),
        draws=Draws(retain_timesteps=torch.full((4,), 500)),
        grad_scaler=grad_scaler,
    ).skipped
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize("step", [siss_step, erasediff_step])
def test_loss_scaling_changes_no_update(step):
    """By SGD, whose update is the gradient: AdamW's first one would hide a factor."""
    models = [TinyDenoiser() for _ in range(2)]
    for model, scaler in zip(models, (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)), strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        step(
            model,
            optimizer,
            SCHEDULE,
            images(0),
            images(1),
            generator=torch.Generator().manual_seed(0),
            grad_scaler=scaler,
            max_grad_norm=None,
        )
    start = flat(TinyDenoiser())
    torch.testing.assert_close(flat(models[0]) - start, flat(models[1]) - start, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("step", [siss_step, erasediff_step])
def test_what_is_left_to_the_caller_is_scaled_and_what_is_reported_is_not(step):
    reports, flats = [], []
    for scaler in (None, torch.amp.GradScaler("cpu", init_scale=2.0**12)):
        model = TinyDenoiser()
        reports.append(
            step(
                model,
                None,
                SCHEDULE,
                images(0),
                images(1),
                generator=torch.Generator().manual_seed(0),
                grad_scaler=scaler,
            )
        )
        flats.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    for name, value in reports[0]._asdict().items():
        torch.testing.assert_close(getattr(reports[1], name), value, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(flats[1], flats[0] * 2.0**12, rtol=1e-3, atol=1.0)


def test_weights_at_the_end_of_float64_make_a_step():
    """Forget weights of 1e-310: a factor for them overflows, their share of the loss does not."""
    noise, timesteps = torch.zeros(SHAPE), torch.full((4,), 300)
    draws = Draws(
        forget_noise=noise,
        retain_noise=noise,
        forget_timesteps=timesteps,
        retain_timesteps=timesteps,
        from_forget=torch.zeros(4, dtype=torch.bool),
    )
    rho = float(SCHEDULE.alpha[300] / SCHEDULE.sigma[300])
    offset = (2 * 712.0) ** 0.5 / rho / 8  # ||retain - forget||^2 over 64 elements makes u = -712
    retain = torch.zeros(SHAPE)
    method = SISS()
    composed = method.compose(Batch(retain + offset, retain), draws, SCHEDULE)
    _, unit = finish(composed, method.combine, None)
    assert 0 < unit.everyones < 1e-307
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    out = siss_step(model, optimizer, SCHEDULE, retain + offset, retain, draws=draws)
    assert not out.skipped
    assert torch.isfinite(out.loss)


# --- autocast and dtypes


def test_a_callers_autocast_reaches_the_network_and_not_the_weights():
    inputs = redirect_inputs(num_neighbors=5, timesteps=10)
    plain = F.redirect(*inputs, SCHEDULE)
    with torch.autocast("cpu", torch.bfloat16):
        inside = F.redirect(*inputs, SCHEDULE)
    for name, value in plain._asdict().items():
        assert torch.equal(value, getattr(inside, name)), name

    dtypes = []

    class Spy(TinyDenoiser):
        def forward(self, x_t, t):
            prediction = super().forward(x_t, t)
            dtypes.append(prediction.dtype)
            return prediction

    model = Spy()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for outer, autocast_dtype, expected in (
        (False, None, torch.float32),
        (True, None, torch.bfloat16),
        (False, torch.bfloat16, torch.bfloat16),
    ):
        with torch.autocast("cpu", torch.bfloat16, enabled=outer):
            vanilla_step(model, optimizer, SCHEDULE, images(0), autocast_dtype=autocast_dtype)
        assert dtypes.pop() == expected


@pytest.mark.parametrize("step", [siss_step, erasediff_step])
def test_bfloat16_parameters_have_float32_norms(step):
    reference, model = TinyDenoiser(), TinyDenoiser().bfloat16()
    results = []
    for network, dtype in ((reference, torch.float32), (model, torch.bfloat16)):
        optimizer = torch.optim.SGD(network.parameters(), lr=0.0)
        middle = torch.full((4,), 500)
        draws = Draws(
            forget_noise=images(2, dtype),
            retain_noise=images(3, dtype),
            forget_timesteps=middle,
            retain_timesteps=middle,
        )
        results.append(
            step(
                network,
                optimizer,
                SCHEDULE,
                images(0, dtype),
                images(1, dtype),
                draws=draws,
                generator=torch.Generator().manual_seed(0),
            )
        )
    assert results[1].grad_norm.dtype == torch.float32
    torch.testing.assert_close(results[1].grad_norm, results[0].grad_norm, rtol=0.05, atol=0)
    torch.testing.assert_close(
        results[1].correction_norm.float(), results[0].correction_norm.float(), rtol=0.05, atol=0
    )


def test_tiny_weights_survive_half_precision():
    """The gradient of the output is rounded to the prediction's dtype once, after weight, scale and loss
    scale.
    """
    model = nn.Conv2d(1, 1, 1).requires_grad_()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    network = lambda x, t: model(x).half()  # noqa: E731
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    arguments = dict(
        draws=Draws(forget_timesteps=torch.full((4,), 500)), generator=torch.Generator().manual_seed(0)
    )
    norms = [
        retrack_step(
            network, optimizer, SCHEDULE, images(0), images(1).unsqueeze(1), None, lambd=1.0, **arguments
        ).grad_norm
    ]
    arguments["generator"].manual_seed(0)
    norms.append(
        neggrad_step(
            network, optimizer, SCHEDULE, images(0), superfactor=1e-8, grad_scaler=scaler, **arguments
        ).grad_norm
    )
    arguments["generator"].manual_seed(0)
    norms.append(
        neggrad_step(network, optimizer, SCHEDULE, images(0), superfactor=1.0, **arguments).grad_norm
    )
    assert norms[0] > 0
    torch.testing.assert_close(norms[1] * 1e8, norms[2], rtol=0.01, atol=0)


def test_float64_runs_in_float64():
    model = TinyDenoiser().double()
    out = vanilla_step(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images(0, torch.float64))
    assert out.loss.dtype == out.grad_norm.dtype == torch.float64


# --- optimizers


@pytest.mark.parametrize(
    "step",
    [
        lambda *a: vanilla_step(*a, images(0)),
        lambda *a: siss_step(*a, images(0), images(1)),
        lambda *a: erasediff_step(*a, images(0), images(1)),
        lambda *a: retrack_step(*a, images(0), images(1).unsqueeze(1), images(2)),
    ],
)
def test_an_optimizer_of_another_copy_of_the_model_is_refused(step):
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(copy.deepcopy(model).parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"optimizer: expected parameters that the model's output depends on, got none"
    ):
        step(model, optimizer, SCHEDULE)


def test_an_optimizer_with_a_zero_grad_of_its_own():
    """Such as one from before `set_to_none`: an error after the update would have it taken twice."""

    class Old(torch.optim.SGD):
        def zero_grad(self):
            raise AssertionError

    model = TinyDenoiser()
    vanilla_step(model, Old(model.parameters(), lr=0.1), SCHEDULE, images(0))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("step", [siss_step, erasediff_step])
def test_an_optimizer_of_a_part_leaves_the_rest_alone(step):
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.leave.parameters(), lr=0.1)
    model.leave.bias.requires_grad_(False)
    model.enter.bias.grad = torch.ones_like(model.enter.bias)  # somebody else's
    before = copy.deepcopy(model.state_dict())
    step(model, optimizer, SCHEDULE, images(0), images(1))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved == {"leave.weight"}
    assert all(parameter.grad is None for parameter in model.leave.parameters())
    assert torch.equal(model.enter.bias.grad, torch.ones_like(model.enter.bias))


def test_ema_follows_the_model_not_the_order_of_the_optimizer():
    model = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(3)))
    groups = [
        {"params": [model[2].weight, model[2].bias]},
        {"params": [p for layer in model[:2] for p in layer.parameters()]},
    ]
    rows = ImageStore(torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8))
    ema = Average(model.parameters(), decay=0.0)  # the average is the last value
    unlearner = Unlearner(
        lambda x, t: model(x), torch.optim.SGD(groups, lr=0.1), SCHEDULE, Vanilla(), retain=rows, batch_size=4
    )
    unlearner.model = _Callable(model)
    unlearner.ema = ema
    unlearner.step()
    for average, parameter in zip(ema.shadow_params, model.parameters(), strict=True):
        assert torch.equal(average, parameter)


class _Callable(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, t):
        return self.model(x)


# --- conditioning and learned variance


@pytest.mark.parametrize("micro_batch_size", [None, 3])
def test_conditioning_stays_with_its_rows(micro_batch_size):
    model = Conditioned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    options = dict(
        forget_kwargs=conditions(0),
        retain_kwargs=conditions(4),
        micro_batch_size=micro_batch_size,
        generator=torch.Generator().manual_seed(0),
    )
    retrack_step(model, optimizer, SCHEDULE, images(0), images(1).unsqueeze(1), images(2), **options)
    assert torch.cat([labels for labels, *_ in model.seen]).tolist() == list(range(8))
    model.seen.clear()
    siss_step(
        model,
        optimizer,
        SCHEDULE,
        images(0),
        images(1),
        draws=Draws(from_forget=torch.tensor([True, False, False, True])),
        **options,
    )
    # in groups of rows that need the same backward passes
    assert torch.cat([labels for labels, *_ in model.seen]).sort().values.tolist() == [0, 3, 5, 6]
    assert all(torch.equal(mask, torch.linspace(0, 1, 4)[labels % 4]) for labels, mask, _ in model.seen)
    model.seen.clear()
    erasediff_step(model, optimizer, SCHEDULE, images(0), images(1), **options)
    assert torch.cat([labels for labels, *_ in model.seen]).tolist() == list(range(8))


def test_a_learned_variance_is_left_alone():
    """Of 2C output channels the first C count: the loss does not see the other half, which is a million times
    larger.
    """
    model = Conditioned()
    out = vanilla_step(
        model, torch.optim.SGD(model.parameters(), lr=0.0), SCHEDULE, images(0), retain_kwargs=conditions(0)
    )
    assert out.loss < 1e4


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda *a: vanilla_step(*a, images(0), forget_kwargs=conditions(0)),
            r"forget_kwargs: expected none \(Vanilla reads no forget images\), got labels",
        ),
        (
            lambda *a: neggrad_step(*a, images(0), retain_kwargs=conditions(0)),
            r"retain_kwargs: expected none \(NegGrad reads no retain images\)",
        ),
        (
            lambda *a: vanilla_step(*a, images(0), retain_kwargs=conditions(0, 9)),
            r"retain_kwargs: expected tensors with the batch of 4 first, got .*9",
        ),
        (
            lambda *a: vanilla_step(*a, images(0), compile="yes"),
            r"compile: expected None, True, False, 'try' or 'regional', got 'yes'",
        ),
        (
            lambda *a: vanilla_step(*a, images(0), retain_kwargs=conditions(0), compile="regional"),
            r"names its repeated blocks for 'regional', got Conditioned",
        ),
    ],
)
def test_refused(call, text):
    model = Conditioned()
    with pytest.raises(ValueError, match=text):
        call(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda *a: vanilla_step(*a, images(0), draws=Draws(retain_noise=images(0, torch.float64))),
            r"draws.retain_noise: expected the dtype of retain",
        ),
        (lambda *a: neggrad_step(*a, images(0), lowpass=3), r"lowpass: expected a LowPass or None, got 3"),
        (
            lambda *a: siss_step(*a, images(0, torch.float64), images(0)),
            r"forget: expected the dtype of retain, torch.float32, got torch.float64",
        ),
        (
            lambda *a: vanilla_step(*a, images(0), grad_scaler=1024.0),
            r"grad_scaler: expected a torch.amp.GradScaler or None, got 1024.0",
        ),
        (
            lambda *a: vanilla_step(*a, images(0), process_group="world"),
            r"process_group: expected a torch.distributed.ProcessGroup or None, got 'world'",
        ),
    ],
)
def test_mixed_dtypes_are_refused_before_the_network(call, text):
    model = TinyDenoiser()
    with pytest.raises(TypeError, match=text):
        call(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE)


def test_half_precision_masters_and_closures_are_refused():
    half, model = TinyDenoiser().half(), TinyDenoiser()
    with pytest.raises(TypeError, match=r"model: expected float32 \(or bfloat16\) parameters, got float16"):
        vanilla_step(half, torch.optim.SGD(half.parameters(), lr=0.1), SCHEDULE, images(0, torch.float16))
    with pytest.raises(
        TypeError, match=r"optimizer: expected one whose step\(\) needs no closure, got LBFGS"
    ):
        vanilla_step(model, torch.optim.LBFGS(model.parameters()), SCHEDULE, images(0))


def test_distances_of_uint8_rows_are_integers():
    rows = ImageStore(torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8))
    model = TinyDenoiser()
    neighbors = torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)
    with pytest.raises(
        TypeError, match=r"neighbors\[1\]: expected an integer tensor of 2 dimensions, got float32"
    ):
        Unlearner(
            model,
            torch.optim.SGD(model.parameters(), lr=0.1),
            SCHEDULE,
            ReTrack(k=1),
            forget=rows.select([0, 1]),
            retain=rows.select([2, 3]),
            neighbors=neighbors,
        )


@pytest.mark.parametrize(
    "method",
    [SISS(lambd=0.0), SISS(lambd=1.0), EraseDiff(eta=0.0), ReTrack(k=1, lambd=0.0), ReTrack(k=1, lambd=1.0)],
    ids=str,
)
def test_the_ends_of_the_ranges_take_finite_steps(method):
    rows = ImageStore(
        torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    )
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    unlearner = Unlearner(
        model,
        optimizer,
        SCHEDULE,
        method,
        forget=rows.select([0, 1]),
        retain=rows.select(range(2, 9)),
        batch_size=5,
    )
    assert not any(bool(unlearner.step().skipped) for _ in range(5))


def test_a_parameter_that_the_optimizer_has_twice_is_refused():
    """torch only warns: its gradient would count twice in the norm, in clipping and in the update."""
    model = TinyDenoiser()
    first = next(model.parameters())
    with pytest.warns(UserWarning, match="duplicate parameters"):
        optimizer = torch.optim.SGD([*model.parameters(), first], lr=0.1)
    images = torch.zeros(2, 1, 8, 8)
    with pytest.raises(ValueError, match="optimizer: expected every parameter once, got 1 a second time"):
        vanilla_step(model, optimizer, linear_schedule(), images)


@pytest.mark.parametrize(
    ("spoken_of", "dtype", "options"),
    [
        ("bfloat16 parameters: an update", torch.bfloat16, {}),
        ("none with autocast_dtype=torch.float16", torch.float32, {"autocast_dtype": torch.float16}),
    ],
)
def test_what_is_rounded_away_is_spoken_of_once(caplog, spoken_of, dtype, options):
    say.once.cache_clear()
    model = TinyDenoiser().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        vanilla_step(model, optimizer, linear_schedule(), torch.zeros(2, 1, 8, 8, dtype=dtype), **options)
    assert [spoken_of in record.message for record in caplog.records] == [True]


def test_images_of_bytes_are_spoken_of_once(caplog):
    say.once.cache_clear()
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    latents = torch.linspace(-9, 9, 2 * 64).view(2, 1, 8, 8)
    for images in (latents, 20 * latents, 20 * latents):
        vanilla_step(model, optimizer, linear_schedule(), images)
    assert ["retain: values above 32" in record.message for record in caplog.records] == [True]


class Checkpointed(nn.Module):
    """Its middle is in an activation checkpoint, whose input no parameter has touched."""

    def __init__(self, *, use_reentrant: bool):
        super().__init__()
        self.middle, self.last = TinyDenoiser(), nn.Conv2d(1, 1, 1)
        self.use_reentrant = use_reentrant

    def forward(self, x, t):
        x = torch.utils.checkpoint.checkpoint(self.middle, x, t, use_reentrant=self.use_reentrant)
        return self.last(x)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize(("use_reentrant", "said"), [(True, [True]), (False, [])])
def test_parameters_that_no_gradient_comes_to_are_spoken_of_once(caplog, use_reentrant, said):
    say.once.cache_clear()
    model = Checkpointed(use_reentrant=use_reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = flat(model.middle).clone()
    for seed in range(2):
        siss_step(model, optimizer, SCHEDULE, images(seed), images(2))
    text = "6 of 8 parameters get no gradient, and stay as they are (middle.enter.weight"
    assert [text in record.message for record in caplog.records] == said
    assert torch.equal(flat(model.middle), before) == use_reentrant


def test_a_group_without_parameters():
    """The first one may be empty: parameters that a filter left out, say."""
    model, rows = TinyDenoiser(), ImageStore(images(0))
    optimizer = torch.optim.SGD([{"params": []}, {"params": list(model.parameters())}], lr=0.1)
    before = flat(model).clone()
    unlearner = Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=rows, batch_size=2)
    assert not unlearner.step().skipped
    assert not torch.equal(flat(model), before)
    optimizer = torch.optim.SGD([{"params": []}], lr=0.1)
    with pytest.raises(ValueError, match="optimizer: expected at least one parameter, got none"):
        Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=rows, batch_size=2)
