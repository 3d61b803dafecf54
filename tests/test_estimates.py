"""What masks and anchors are made of, against literal gradients of literal losses in float64."""

import math

import pytest
import torch
from safetensors.torch import save_file

from fastunlearn import ImageStore, TimeWindow, Unlearner
from fastunlearn.engine.estimates import (
    checkpoint_moments,
    fisher,
    forget_gradients,
    swag_variance,
    vdu,
    vdu_l2,
    vdu_laplace,
    vdu_swag,
)
from fastunlearn.methods import Mask, NegGrad
from fastunlearn.runs import checkpoint
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()


class Recorded(TinyDenoiser):
    """Keeps what it is called with."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def forward(self, x_t, t):
        self.calls.append((x_t.detach().clone(), t.clone()))
        return super().forward(x_t, t)

    def literal(self, call, images):
        """The gradient of `mean ||eps - eps_theta(x_t, t)||^2` for the noise that `call` had."""
        x_t, t = call
        alpha = SCHEDULE.alpha.double()[t].view(-1, 1, 1, 1)
        sigma = SCHEDULE.sigma.double()[t].view(-1, 1, 1, 1)
        noise = (x_t - alpha * images) / sigma
        loss = (noise - TinyDenoiser.forward(self, x_t, t)).square().flatten(1).sum(1).mean()
        return torch.autograd.grad(loss, [own for own in self.parameters() if own.requires_grad])


def store(count: int = 5) -> ImageStore:
    generator = torch.Generator().manual_seed(0)
    return ImageStore(torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator))


def rows(count: int, *index: int):
    return store(count).rows(torch.tensor(index)).double()


def weights_of(model) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in model.parameters()]


@pytest.mark.parametrize("batch_norm", [None, 1.0, 1e3])
@pytest.mark.parametrize("micro_batch_size", [None, 2])
def test_saliency_is_the_signed_sum_of_clipped_gradients(batch_norm, micro_batch_size):
    """Rows in order, from the first again; timesteps of the window."""
    model = Recorded().double()
    model.time.requires_grad_(False)
    before = weights_of(model)
    found = forget_gradients(
        model, SCHEDULE, store(), num_batches=4, batch_size=3, batch_norm=batch_norm, seed=3,
        time_window=TimeWindow(400, 600), micro_batch_size=micro_batch_size,
    )  # fmt: skip
    calls, model.calls = model.calls, []
    if micro_batch_size:
        pairs = zip(calls[::2], calls[1::2], strict=True)
        calls = [tuple(map(torch.cat, zip(*pair, strict=True))) for pair in pairs]
    assert len(calls) == 4
    expected = 0
    for call, index in zip(calls, ((0, 1, 2), (3, 4, 0), (1, 2, 3), (4, 0, 1)), strict=True):
        assert ((call[1] >= 400) & (call[1] < 600)).all()
        flat = torch.cat([each.flatten() for each in model.literal(call, rows(5, *index))])
        if batch_norm is not None:
            flat = flat / max(1.0, (float(flat.norm()) + 1e-6) / batch_norm)
        expected = expected + flat
    assert list(found) == ["enter.weight", "enter.bias", "leave.weight", "leave.bias"]
    assert relative_l2([torch.cat([each.flatten() for each in found.values()])], [expected]) <= 1e-10
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(map(torch.equal, model.parameters(), before))


def test_fisher_is_the_mean_square_of_the_gradient_of_each_image():
    model = Recorded().double()
    found = fisher(model, SCHEDULE, store(3), samples=4, timesteps_per_sample=6, seed=1)
    calls, model.calls = model.calls, []
    expected = None
    for call, index in zip(calls, (0, 1, 2, 0), strict=True):
        assert len(call[1]) == 6
        assert len(call[1].unique()) > 1
        squares = [each.square() / 4 for each in model.literal(call, rows(3, *[index] * 6))]
        expected = squares if expected is None else list(map(torch.add, expected, squares))
    assert relative_l2(list(found.values()), expected) <= 1e-10
    again = fisher(model, SCHEDULE, store(3), samples=4, timesteps_per_sample=6, seed=1)
    other = fisher(model, SCHEDULE, store(3), samples=4, timesteps_per_sample=6, seed=2)
    assert all(torch.equal(found[name], again[name]) for name in found)
    assert not all(torch.equal(found[name], other[name]) for name in found)


def test_swag_is_the_variance_of_the_iterates():
    """Those of Adam's first steps by its formula, on the literal gradient; the network stays as it was."""
    model = Recorded().double()
    before, lr, seen = weights_of(model), 1e-3, []

    class Watched(Recorded):
        def forward(self, x_t, t):
            seen.append((x_t.detach().clone(), t.clone(), weights_of(self)))
            return TinyDenoiser.forward(self, x_t, t)

    model.__class__ = Watched
    found = swag_variance(model, SCHEDULE, store(), steps=3, lr=lr, batch_size=2, seed=0)
    assert all(map(torch.equal, model.parameters(), before))
    model.__class__ = Recorded

    flat = torch.cat([weight.flatten() for weight in before])
    first, second, iterates = torch.zeros_like(flat), torch.zeros_like(flat), []
    for step, (x_t, t, _) in enumerate(seen, start=1):
        torch.nn.utils.vector_to_parameters(flat, model.parameters())
        index = [(2 * (step - 1) + place) % 5 for place in range(2)]
        gradient = torch.cat([each.flatten() for each in model.literal((x_t, t), rows(5, *index))])
        gradient = gradient / max(1.0, float(gradient.norm()) + 1e-6)  # the step's own clipping
        first, second = 0.9 * first + 0.1 * gradient, 0.999 * second + 0.001 * gradient.square()
        scale = (second / (1 - 0.999**step)).sqrt() + 1e-8
        flat = flat - lr * (first / (1 - 0.9**step)) / scale
        iterates.append(flat)
    expected = torch.stack(iterates).var(dim=0)
    ours = torch.cat([each.flatten() for each in found.values()])
    # Adam divides by the root of a square: what is lost in the gradient's smallest entries is not small.
    assert relative_l2([ours], [expected]) <= 1e-6


def test_moments_of_checkpoints_in_files_of_each_kind(tmp_path):
    """A safetensors file, a checkpoint of a run, a diffusers pipeline."""
    diffusers = pytest.importorskip("diffusers")
    from fastunlearn.models import save_checkpoint
    from fastunlearn.testing.checkpoints import save_tiny_checkpoint, tiny_unet

    networks = [tiny_unet(seed) for seed in range(4)]
    states = [network.state_dict() for network in networks]
    save_file(states[0], tmp_path / "first.safetensors")
    checkpoint.save(tmp_path / "run", 3, {"model": states[1]}, {})
    save_tiny_checkpoint(tmp_path / "pipeline", seed=2)
    save_checkpoint(tmp_path / "other", networks[3], diffusers.DDPMScheduler(num_train_timesteps=20))
    paths = [tmp_path / "first.safetensors", tmp_path / "run" / "checkpoint-3", tmp_path / "pipeline"]
    paths.append(tmp_path / "other" / "unet")
    model = tiny_unet(7)
    mean, variance = checkpoint_moments(model, paths[:3])
    for name, _ in model.named_parameters():
        stacked = torch.stack([state[name].double() for state in states[:3]])
        torch.testing.assert_close(mean[name].double(), stacked.mean(0), rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(variance[name].double(), stacked.var(0), rtol=1e-4, atol=1e-10)

    anchor = vdu(model, paths[:3], 3.0, max_precision=1e4)
    assert anchor.gamma == 3.0
    for name, own in variance.items():
        torch.testing.assert_close(anchor.precision[name], own.reciprocal().clamp(max=1e4))
        assert torch.equal(anchor.mean[name], mean[name])
    # Equal at the start in all of them (biases of 0): held as firmly as can be.
    assert (anchor.precision["conv_in.bias"] <= 1e4).all()
    assert any((own == 1e4).all() for own in anchor.precision.values())
    assert checkpoint_moments(model, paths)[0].keys() == mean.keys()


def test_checkpoints_that_do_not_fit_are_refused(tmp_path):
    model = TinyDenoiser()
    state = model.state_dict()
    save_file(state, tmp_path / "own.safetensors")
    save_file(TinyDenoiser(width=3).state_dict(), tmp_path / "narrow.safetensors")
    save_file({"enter.bias": state["enter.bias"]}, tmp_path / "part.safetensors")
    save_file({**state, "enter.bias": torch.full((6,), torch.nan)}, tmp_path / "nan.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"x")
    own = tmp_path / "own.safetensors"
    for given, message in (
        ([own], r"^checkpoints: expected at least two, .* got one"),
        (own, r"^checkpoints: expected at least two, .* got one"),
        ([], r"^checkpoints: expected at least two, .* got none"),
        ([own, own], r"^checkpoints: expected networks that were trained apart, got equal weights in all"),
        (
            [own, tmp_path / "narrow.safetensors"],
            r"narrow.safetensors: expected enter.weight of shape \(6, 1",
        ),
        ([own, tmp_path / "part.safetensors"], r"part.safetensors: expected enter.weight .* got None"),
        ([own, tmp_path / "nan.safetensors"], r"nan.safetensors: enter.bias: expected finite values"),
        ([own, tmp_path / "broken.safetensors"], r"broken.safetensors: expected a safetensors file"),
        ([own, tmp_path / "nowhere"], r"nowhere: expected a safetensors file"),
    ):
        with pytest.raises(ValueError, match=message):
            checkpoint_moments(model, given)


@pytest.mark.parametrize(
    "given",
    [None, 3, (path for path in "ab"), [1, 2], [{}, {}]],
    ids=["nothing", "number", "iterator", "numbers", "dicts"],
)
def test_checkpoints_are_paths(given):
    with pytest.raises(TypeError, match=r"^checkpoints: expected (paths|at least two, .*), got"):
        checkpoint_moments(TinyDenoiser(), given)


def test_estimates_that_are_not_finite_are_refused():
    """As a precision, infinity would count as that of a weight that never varied."""
    model = TinyDenoiser()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1e12)
    with pytest.raises(ValueError, match=r"^fisher\['enter.weight'\]: expected finite values, got"):
        vdu_laplace(model, SCHEDULE, store(), 1.0, samples=2)
    with torch.no_grad():
        model.leave.bias.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"^swag_variance\['enter.weight'\]: expected finite values, got"):
        vdu_swag(model, SCHEDULE, store(), 1.0, steps=2, batch_size=2)


def test_anchors_of_one_checkpoint():
    model, options = TinyDenoiser(), {"seed": 4}
    retain = store(5)
    laplace = vdu_laplace(
        model, SCHEDULE, retain, 2.0, prior_precision=0.5, samples=3, timesteps_per_sample=2, **options
    )
    information = fisher(model, SCHEDULE, retain, samples=3, timesteps_per_sample=2, **options)
    swag = vdu_swag(
        model, SCHEDULE, retain, 2.0, max_precision=1e7, steps=3, lr=1e-3, batch_size=2, **options
    )
    variance = swag_variance(model, SCHEDULE, retain, steps=3, lr=1e-3, batch_size=2, **options)
    same = vdu_l2(model, 2.0)
    assert same.precision == 1.0
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(laplace.precision[name], 5 * information[name] + 0.5)
        torch.testing.assert_close(swag.precision[name], variance[name].reciprocal().clamp(max=1e7))
        for anchor in (laplace, swag, same):
            assert torch.equal(anchor.mean[name], parameter)
            assert anchor.mean[name].data_ptr() != parameter.data_ptr()


def test_a_mask_of_the_forget_loss_on_a_run():
    model = TinyDenoiser()
    mask = Mask.from_gradients(
        forget_gradients(model, SCHEDULE, store(), num_batches=2, batch_size=4), model=model
    )
    before = dict(zip(mask.masks, weights_of(model), strict=True))
    moving = sum(int(each.sum()) for each in mask.masks.values())
    assert moving == math.floor(sum(each.numel() for each in mask.masks.values()) / 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5, fused=True)
    run = Unlearner(model, optimizer, SCHEDULE, NegGrad(), forget=store(), batch_size=4, rules=[mask])
    run.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter != before[name], mask.masks[name] & (parameter != before[name]))
        assert mask.masks[name].sum() == 0 or not torch.equal(parameter, before[name])


class Hostile(TinyDenoiser):
    """Whose calls move averages, and draw random numbers."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = torch.nn.BatchNorm2d(1), torch.nn.Dropout(0.3)

    def forward(self, x_t, t):
        return self.drop(self.norm(super().forward(x_t, t)))


SHORT = {
    forget_gradients: {"num_batches": 2, "batch_size": 3},
    fisher: {"samples": 2, "timesteps_per_sample": 3},
    swag_variance: {"steps": 2, "batch_size": 3},
}


@pytest.mark.parametrize("estimate", SHORT, ids=lambda estimate: estimate.__name__)
def test_an_estimate_is_a_function_of_its_seed_and_leaves_no_trace(estimate):
    """With averages and active dropout; torch's random numbers go on where they were."""
    model = Hostile()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    buffers = dict(model.named_buffers())
    found = []
    for start, seed in ((1, 3), (2, 3), (2, 4)):
        torch.manual_seed(start)
        state = torch.get_rng_state()
        found.append(estimate(model, SCHEDULE, store(), seed=seed, **SHORT[estimate]))
        assert torch.equal(torch.get_rng_state(), state)
    first, again, other = found
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())


@pytest.mark.parametrize("estimate", SHORT, ids=lambda estimate: estimate.__name__)
def test_an_estimate_after_an_error_leaves_no_trace(estimate):
    model = Hostile()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state, calls, forward = torch.get_rng_state(), [], model.drop.forward

    def failing(x):
        calls.append(x)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return forward(x)

    model.drop.forward = failing
    with pytest.raises(RuntimeError, match="out of memory"):
        estimate(model, SCHEDULE, store(), **SHORT[estimate])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("estimate", SHORT, ids=lambda estimate: estimate.__name__)
def test_estimates_of_half_precision(estimate):
    """Rows of a store are float32, which such a network takes under autocast alone."""
    model = TinyDenoiser().bfloat16()
    with pytest.raises(TypeError, match=r"^model: expected float32 parameters, or autocast_dtype .*bfloat16"):
        estimate(model, SCHEDULE, store(), **SHORT[estimate])
    found = estimate(model, SCHEDULE, store(), autocast_dtype=torch.bfloat16, **SHORT[estimate])
    assert {each.dtype for each in found.values()} == {torch.float32}


@pytest.mark.parametrize(
    ("estimate", "change", "message"),
    [
        (forget_gradients, {"num_batches": 0}, r"^num_batches: expected an integer >= 1, got 0"),
        (forget_gradients, {"batch_size": 0}, r"^batch_size: expected an integer >= 1, got 0"),
        (forget_gradients, {"batch_norm": 0}, r"^batch_norm: expected a finite number in \(0"),
        (forget_gradients, {"seed": -1}, r"^seed: expected an integer in"),
        (forget_gradients, {"time_window": 3}, r"^time_window: expected a density of timesteps"),
        (fisher, {"samples": 0}, r"^samples: expected an integer >= 1, got 0"),
        (fisher, {"timesteps_per_sample": 0}, r"^timesteps_per_sample: expected an integer >= 1"),
        (swag_variance, {"steps": 1}, r"^steps: expected an integer >= 2, got 1"),
        (swag_variance, {"lr": 0.0}, r"^lr: expected a finite number in \(0"),
    ],
)
def test_estimates_that_make_no_sense_are_refused(estimate, change, message):
    with pytest.raises((TypeError, ValueError), match=message):
        estimate(TinyDenoiser(), SCHEDULE, store(), **change)


@pytest.mark.parametrize(
    ("estimate", "name"), [(forget_gradients, "forget"), (fisher, "retain"), (swag_variance, "retain")]
)
def test_estimates_refuse_other_sets_and_networks(estimate, name):
    with pytest.raises(TypeError, match=rf"^{name}: expected an ImageStore, got float32"):
        estimate(TinyDenoiser(), SCHEDULE, torch.zeros(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"^model: expected parameters with requires_grad=True, got none"):
        estimate(TinyDenoiser().requires_grad_(False), SCHEDULE, store())
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got function"):
        estimate(lambda x_t, t: x_t, SCHEDULE, store())


def test_an_option_that_there_is_not_is_refused_by_the_anchor_that_was_asked_for():
    model = TinyDenoiser()
    with pytest.raises(TypeError, match=r"^vdu_laplace: expected options samples, .*, got num_samples$"):
        vdu_laplace(model, SCHEDULE, store(), 1.0, num_samples=2)
    with pytest.raises(TypeError, match=r"^vdu_swag: expected options steps, lr, .*, got samples$"):
        vdu_swag(model, SCHEDULE, store(), 1.0, samples=2)


def test_weights_that_no_mean_is_taken_of(tmp_path):
    model = TinyDenoiser()
    for dtype in (torch.float8_e4m3fn, torch.complex64, torch.bool):
        save_file(
            {name: own.to(dtype) for name, own in model.state_dict().items()}, tmp_path / "x.safetensors"
        )
        with pytest.raises(ValueError, match=r"x.safetensors: .*expected .*floats"):
            vdu(model, [tmp_path / "x.safetensors", tmp_path / "y.safetensors"], 1.0)
