"""Mask and Anchor: literal gradients in float64, masked weights bit for bit, what changes no bit at all."""

import copy

import pytest
import runs
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastunlearn import Draws, ImageStore, Unlearner, method_step, neggrad_step, siss_step, vanilla_step
from fastunlearn.engine.replay import WARM_UP_STEPS
from fastunlearn.methods import SISS, EraseDiff, NegGrad, ReTrack, Vanilla
from fastunlearn.objective.anchor import Anchor
from fastunlearn.objective.mask import Mask, largest
from fastunlearn.objective.named_tensors import write_tensors
from fastunlearn.runs.training import unlearn
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import Average, TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import no_host_sync
from fastunlearn.testing.methods import every_variant

SCHEDULE = linear_schedule()
METHODS = every_variant(k=2)
LR = 2.0**-7  # the same number in float32, in which a replayed step reads it


def images(count: int = 12):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=generator)


def run_of(method, model=None, rules=(), optimizer=None, **options) -> Unlearner:
    model = TinyDenoiser() if model is None else model
    if optimizer is None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.5, fused=True)
    stores = {"forget": ImageStore(images()[:4]), "retain": ImageStore(images()[4:])}
    if "reference" in method.needs:
        options["reference_model"] = copy.deepcopy(model).requires_grad_(False)
    return Unlearner(
        model, optimizer, SCHEDULE, method, **stores, rules=rules, **{"batch_size": 4, **options}
    )


def numbers_for(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """A random tensor for each parameter, in its dtype."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        for name, parameter in model.named_parameters()
    }


def mask_of(model: nn.Module, fraction: float = 0.4) -> Mask:
    return Mask.from_gradients(numbers_for(model, 9), fraction, model=model)


def anchor_of(model: nn.Module, gamma: float = 30.0) -> Anchor:
    mean = {name: value + 0.1 for name, value in model.named_parameters()}
    precision = {name: value.abs() for name, value in numbers_for(model, 5).items()}
    return Anchor(mean, precision, gamma, model=model)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return (
        tensor.detach().clone().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])
    )


def assert_masked_stay(mask: Mask, tensors: dict[str, torch.Tensor], before: dict[str, torch.Tensor]):
    """Masked ones have their bits, and some of the others do not."""
    moved = 0
    for name, tensor in tensors.items():
        stays = ~mask.masks[name]
        assert torch.equal(bits(tensor)[stays], bits(before[name])[stays]), name
        moved += int((bits(tensor) != bits(before[name])).sum())
    assert moved > 0


def copied(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in tensors}


# Anchor.


@pytest.mark.parametrize("precision", ["each", 2.5, "clamped"], ids=str)
def test_an_anchor_is_its_formula_in_float64(precision):
    """Loss and gradient of `gamma / n sum_i p_i (theta_i - mu_i)^2 / 2` by autograd, in two groups."""
    model = TinyDenoiser().double()
    mean, given_precision, gamma = numbers_for(model, 1), numbers_for(model, 2), 700.0
    given_precision = {name: value.abs() for name, value in given_precision.items()}
    count = sum(parameter.numel() for parameter in model.parameters())
    most = 0.5 if precision == "clamped" else 1e10
    if isinstance(precision, float):
        given_precision = precision
    rule = Anchor(mean, given_precision, gamma, model=model, max_precision=most)
    draws = Draws(torch.ones(6, 1, 8, 8, dtype=torch.float64), None, torch.arange(6) * 100)
    forget = torch.randn(6, 1, 8, 8, dtype=torch.float64)

    plain = neggrad_step(model, None, SCHEDULE, forget, draws=draws)
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    out = neggrad_step(model, None, SCHEDULE, forget, draws=draws, rules=[rule])
    ours = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()

    penalty = 0.0
    for name, parameter in model.named_parameters():
        own = given_precision if isinstance(precision, float) else given_precision[name].clamp(max=most)
        penalty = penalty + gamma / count * (own * (parameter - mean[name]) ** 2 / 2).sum()
    literal = torch.autograd.grad(penalty, list(model.parameters()))
    expected = [one + other for one, other in zip(gradients.values(), literal, strict=True)]
    assert relative_l2(ours, expected) <= 1e-14
    torch.testing.assert_close(out.loss, plain.loss + penalty.detach(), rtol=1e-13, atol=0)


@pytest.mark.parametrize("scale", [1.0, 2.0**10])
def test_an_anchor_is_as_large_as_the_gradients_that_are_left(scale):
    """With a scaler, and without an optimizer, they are still multiplied by the loss scale."""
    model = TinyDenoiser()
    rule = anchor_of(model, 1e4)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    x = torch.randn(6, 1, 8, 8)
    options = {"draws": Draws(None, torch.ones_like(x), None, torch.arange(6) * 100)}
    out = vanilla_step(model, None, SCHEDULE, x, rules=[rule], grad_scaler=scaler, **options)
    scaled = [parameter.grad / scale for parameter in model.parameters()]
    model.zero_grad()
    plain = vanilla_step(model, None, SCHEDULE, x, rules=[rule], **options)
    assert relative_l2(scaled, [parameter.grad for parameter in model.parameters()]) <= 1e-6
    torch.testing.assert_close(out.grad_norm, plain.grad_norm)
    torch.testing.assert_close(out.loss, plain.loss)


def test_an_anchor_pulls_a_parameter_that_the_loss_does_not_reach():
    model = TinyDenoiser()
    model.spare = nn.Parameter(torch.ones(3))
    mean = {name: torch.zeros_like(value) for name, value in model.named_parameters()}
    count = sum(parameter.numel() for parameter in model.parameters())
    vanilla_step(model, None, SCHEDULE, torch.randn(2, 1, 8, 8), rules=[Anchor(mean, 2.0, 5.0, model=model)])
    torch.testing.assert_close(model.spare.grad, torch.full((3,), 10.0 / count))


def test_bfloat16_weights_are_subtracted_from_the_mean_in_float32():
    model = TinyDenoiser().bfloat16()
    mean = {name: parameter.float() + 1e-4 for name, parameter in model.named_parameters()}
    rule = Anchor(mean, 1.0, 1.0, model=model)
    parameters = list(model.parameters())
    count = sum(parameter.numel() for parameter in parameters)
    penalty = rule.add(parameters, 1.0)
    torch.testing.assert_close(penalty, torch.tensor(1e-8 / 2), rtol=1e-3, atol=0)
    for parameter in parameters:
        assert parameter.grad.dtype == torch.bfloat16
        expected = torch.full_like(parameter, -1e-4 / count)
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_rules_that_do_nothing_change_no_bit(method):
    plain, ruled = TinyDenoiser(), TinyDenoiser()
    ones = {name: torch.ones_like(value, dtype=torch.bool) for name, value in ruled.named_parameters()}
    idle = [Mask(ones, model=ruled), anchor_of(ruled, 0.0)]
    without, with_rules = (
        run_of(method, plain, max_grad_norm=0.5),
        run_of(method, ruled, idle, max_grad_norm=0.5),
    )
    for _ in range(3):
        expected, found = without.step(), with_rules.step()
        for one, other in zip(expected, found, strict=True):
            assert (one is None) == (other is None)
            assert one is None or torch.equal(one, other)
    assert all(map(torch.equal, plain.parameters(), ruled.parameters()))


def test_an_anchor_holds_weights_that_gradient_ascent_carries_off():
    """NegGrad and a strong anchor at the weights as they are: VDU's form."""
    ends = []
    for gamma in (0.0, 1e6):
        model = TinyDenoiser()
        start = copied(model.named_parameters())
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
        run = run_of(NegGrad(), model, [Anchor(start, 1.0, gamma, model=model)], optimizer)
        for _ in range(20):
            run.step()
        gaps = [value.detach() - start[name] for name, value in model.named_parameters()]
        ends.append(torch.cat([gap.flatten() for gap in gaps]).norm())
    assert ends[1] < ends[0] / 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": -1.0}, r"^gamma: expected a finite number in \[0, inf\), got -1.0"),
        ({"precision": -1.0}, r"^precision: expected a finite number in \[0, inf\), got -1.0"),
        ({"max_precision": 0}, r"^max_precision: expected a finite number in \(0"),
        ({"mean": {"nobody": torch.zeros(1)}}, r"^mean: expected names of parameters of model, got 'nobody'"),
        ({"mean": {"time.bias": torch.zeros(1)}}, r"^mean\['time.bias'\]: expected .* of shape \(6,\), got"),
        ({"mean": {"time.bias": torch.full((6,), torch.nan)}}, r"^mean\['time.bias'\]: expected finite"),
        ({"mean": {}}, r"^mean: expected a tensor for each name of a parameter"),
        ({"precision": {"time.bias": torch.ones(6)}}, r"^precision: expected the names of mean"),
        ({"mean": {"time.bias": torch.ones(6)}, "precision": {"time.bias": -torch.ones(6)}},
         r"^precision\['time.bias'\]: expected numbers >= 0"),
        ({"model": None}, r"^model: expected a torch.nn.Module, got None"),
    ],
)  # fmt: skip
def test_anchors_that_make_no_sense_are_refused(change, message):
    model = TinyDenoiser()
    arguments = {"mean": dict(model.named_parameters()), "precision": 1.0, "gamma": 1.0, "model": model}
    with pytest.raises((TypeError, ValueError), match=message):
        Anchor(**arguments | change)


def test_a_weight_that_never_varied_has_the_largest_precision():
    model = TinyDenoiser()
    mean = dict(model.named_parameters())
    precision = {name: torch.full_like(value, torch.inf) for name, value in mean.items()}
    rule = Anchor(mean, precision, 1.0, model=model, max_precision=4.0)
    assert all((value == 4).all() for value in rule.precision.values())


# Mask: which weights.


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=30), st.integers(1, 30))
def test_the_largest_exactly_so_many_ties_by_index(values, count):
    count = min(count, len(values))
    sizes = torch.tensor(values, dtype=torch.float32).abs()
    order = sorted(range(len(values)), key=lambda index: (-abs(values[index]), index))
    assert largest(sizes, count).nonzero().flatten().tolist() == sorted(order[:count])


@pytest.mark.parametrize("fraction", [0.001, 0.29, 0.5, 1.0])
def test_a_mask_has_the_fraction_over_all_parameters(fraction):
    """Of equal gradients those of the first parameters; the decimal counts that was written."""
    model = nn.Sequential(nn.Linear(49, 10), nn.Linear(20, 25)).to(memory_format=torch.contiguous_format)
    gradients = {name: torch.ones_like(value) for name, value in model.named_parameters()}
    count = sum(value.numel() for value in gradients.values())
    assert count == 1025
    chosen = torch.cat(
        [m.flatten() for m in Mask.from_gradients(gradients, fraction, model=model).masks.values()]
    )
    expected = {0.001: 1, 0.29: 297, 0.5: 512, 1.0: 1025}[fraction]
    assert chosen.tolist() == [True] * expected + [False] * (count - expected)


def test_signs_do_not_count_and_all_parameters_are_ranked_together():
    model = nn.Linear(3, 1)
    gradients = {"weight": torch.tensor([[-5.0, 1.0, 0.1]]), "bias": torch.tensor([-2.0])}
    mask = Mask.from_gradients(gradients, 0.5, model=model)
    assert mask.masks["weight"].tolist() == [[True, False, False]]
    assert mask.masks["bias"].tolist() == [True]


def test_a_mask_does_not_depend_on_the_layout_in_memory():
    flat, last = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    gradients = {name: torch.randn(value.shape).round() for name, value in flat.named_parameters()}
    masks = [Mask.from_gradients(gradients, 0.3, model=model).masks for model in (flat, last)]
    assert all(torch.equal(masks[0][name], masks[1][name]) for name in gradients)
    assert masks[1]["weight"].stride() == last.weight.stride()


@pytest.mark.parametrize(
    ("gradients", "fraction", "message"),
    [
        ({"bias": torch.zeros(1)}, 0.5, r"^gradients: expected some that are not 0, got none"),
        ({"bias": torch.tensor([torch.nan])}, 0.5, r"^gradients\['bias'\]: expected finite"),
        ({"bias": torch.ones(1)}, 0.5, r"^fraction: expected at least one of 1 weights, got 0.5 of them"),
        ({"bias": torch.ones(1)}, 0, r"^fraction: expected a finite number in \(0, 1\], got 0"),
        ({"bias": torch.ones(2)}, 1.0, r"^masks\['bias'\]: expected a tensor of shape \(1,\), got"),
        ({"bias": 1.0}, 1.0, r"^gradients\['bias'\]: expected a floating-point tensor"),
        ({}, 1.0, r"^gradients: expected a tensor for each name"),
    ],
)  # fmt: skip
def test_gradients_that_make_no_mask_are_refused(gradients, fraction, message):
    with pytest.raises((TypeError, ValueError), match=message):
        Mask.from_gradients(gradients, fraction, model=nn.Linear(1, 1))


def test_masks_are_booleans():
    with pytest.raises(TypeError, match=r"^masks\['bias'\]: expected a tensor of booleans, got float32"):
        Mask({"bias": torch.ones(1)}, model=nn.Linear(1, 1))


# Mask: what stays.


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "method", [Vanilla(), NegGrad(), SISS(), SISS(variant="no_is"), ReTrack(k=2), EraseDiff()], ids=str
)
def test_masked_weights_stay_bit_for_bit(method, fused):
    """With weight decay and momentum, zeros of both signs, an average, and groups in another order."""
    model = TinyDenoiser()
    with torch.no_grad():
        model.enter.bias.copy_(torch.tensor([0.0, -0.0, 1e-40, -0.0, 0.0, 1.0]))
    mask, before = mask_of(model), copied(model.named_parameters())
    late, early = list(model.leave.parameters()), [*model.enter.parameters(), *model.time.parameters()]
    groups = [{"params": late, "weight_decay": 0.1}, {"params": early, "lr": 1e-3}]
    optimizer = torch.optim.AdamW(groups, lr=1e-2, weight_decay=0.5, fused=fused)
    # Momentum from before there was a mask.
    warm = run_of(method, model, optimizer=optimizer)
    warm.step()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    average = Average(model.parameters())
    run = run_of(method, model, [mask], optimizer, ema=average)
    for _ in range(3):
        run.step()
    assert_masked_stay(mask, dict(model.named_parameters()), before)
    shadows = dict(zip(before, average.shadow_params, strict=True))
    for name, shadow in shadows.items():
        stays = ~mask.masks[name]
        assert torch.equal(shadow[stays], before[name][stays])


def test_norms_are_those_of_the_weights_that_move():
    """The norm that is reported and clipped, SISS' rescaled one, and the momentum."""
    model = TinyDenoiser().double()
    mask, x = mask_of(model), torch.randn(4, 1, 8, 8, dtype=torch.float64)
    draws = Draws(None, torch.ones_like(x), None, torch.arange(4) * 200)
    vanilla_step(model, None, SCHEDULE, x, draws=draws)
    masked = {name: value.grad * mask.masks[name] for name, value in model.named_parameters()}
    model.zero_grad()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    out = vanilla_step(model, optimizer, SCHEDULE, x, draws=draws, rules=[mask], max_grad_norm=None)
    norm = torch.cat([gradient.flatten() for gradient in masked.values()]).norm()
    torch.testing.assert_close(out.grad_norm, norm, rtol=1e-13, atol=0)
    momentum = [optimizer.state[parameter]["momentum_buffer"] for parameter in model.parameters()]
    assert relative_l2(momentum, list(masked.values())) <= 1e-14

    draws = Draws(torch.ones_like(x), None, torch.arange(4) * 200, None, torch.arange(4) % 2 == 0)
    options = {"draws": draws, "scaling_norm": 3.0}
    plain = siss_step(copy.deepcopy(model), None, SCHEDULE, x, x.flip(0), **options)
    out = siss_step(model, optimizer, SCHEDULE, x, x.flip(0), **options, rules=[mask])
    assert out.correction_norm < plain.correction_norm
    torch.testing.assert_close(float(out.correction_norm * out.scaling_factor), 3.0, rtol=1e-13, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("method", [Vanilla(), SISS(), EraseDiff()], ids=str)
def test_what_an_anchor_or_the_caller_adds_to_masked_weights_counts_in_no_norm(method, scaled):
    """Clipping would shorten the steps of the others by weights that cannot move."""
    model = TinyDenoiser().double()
    mask, anchor = mask_of(model), anchor_of(model, 1e5)
    images = {"forget": torch.randn(4, 1, 8, 8).double(), "retain": torch.randn(4, 1, 8, 8).double()}
    images = {name: value for name, value in images.items() if name in method.needs}
    free = copy.deepcopy(model)
    anchors = [Anchor(anchor.mean, anchor.precision, 1e5, model=free)]
    norms = []
    for network, rules in ((free, anchors), (model, [anchor, mask])):
        # So little that nothing moves; momentum is the gradient that the optimizer sees.
        optimizer = torch.optim.SGD(network.parameters(), lr=1e-300, momentum=0.9)
        for parameter in network.parameters():
            parameter.grad = torch.full_like(parameter, 7.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
        options = {"rules": rules, "keep_grad": True, "max_grad_norm": None, "grad_scaler": scaler}
        generator = torch.Generator().manual_seed(0)
        out = method_step(method, network, optimizer, SCHEDULE, **images, generator=generator, **options)
        momentum = [optimizer.state[each]["momentum_buffer"].flatten() for each in network.parameters()]
        norms.append((out.grad_norm, torch.cat(momentum)))
    moves = torch.cat([each.flatten() for each in mask.masks.values()])
    (_, whole), (norm, restricted) = norms
    assert not restricted[~moves].any()
    torch.testing.assert_close(norm, restricted.norm(), rtol=1e-12, atol=0)
    if method == Vanilla():
        torch.testing.assert_close(restricted[moves], whole[moves], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_masked_weights_of_other_dtypes_stay_bit_for_bit(dtype):
    model = TinyDenoiser().to(dtype)
    mask, before = mask_of(model), copied(model.named_parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.3)
    x = torch.randn(4, 1, 8, 8).to(dtype)
    for _ in range(3):
        neggrad_step(model, optimizer, SCHEDULE, x, rules=[mask])
    assert_masked_stay(mask, dict(model.named_parameters()), before)


def test_diffusers_average_of_masked_weights_stays_bit_for_bit():
    training_utils = pytest.importorskip("diffusers.training_utils")
    model = TinyDenoiser()
    mask, before = mask_of(model), copied(model.named_parameters())
    average = training_utils.EMAModel(model.parameters(), decay=0.9999)
    run = run_of(NegGrad(), model, [mask], ema=average)
    for _ in range(12):
        run.step()
    assert_masked_stay(mask, dict(zip(before, average.shadow_params, strict=True)), before)


def test_weights_that_somebody_loads_between_steps_are_the_ones_that_stay():
    """Nothing is put back but what the update did."""
    model = TinyDenoiser()
    mask = mask_of(model)
    run = run_of(Vanilla(), model, [mask])
    run.step()
    model.load_state_dict(TinyDenoiser(seed=4).state_dict())
    before = copied(model.named_parameters())
    run.step()
    assert_masked_stay(mask, dict(model.named_parameters()), before)


@pytest.mark.parametrize("scaled", [False, True])
def test_a_skipped_step_moves_nothing(scaled):
    model = TinyDenoiser()
    before = copied(model.named_parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8) if scaled else None
    run = run_of(Vanilla(), model, [mask_of(model), anchor_of(model)], grad_scaler=scaler)
    out = run.step(Draws(None, torch.full((4, 1, 8, 8), torch.inf)))
    assert out.skipped
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert not run.step().skipped
    assert_masked_stay(run.rules[0], dict(model.named_parameters()), before)


def test_rules_are_refused_before_any_work():
    """For a parameter without a mask; and a mask cannot be held where the caller makes the update."""
    model = TinyDenoiser()
    part = Mask({"enter.bias": torch.ones(6, dtype=torch.bool)}, model=model)
    other = anchor_of(TinyDenoiser())
    expected = (
        r"^{}: expected one for each parameter that is trained, got none for a parameter of shape \(6, 1"
    )
    for rule, name in ((part, "masks"), (other, "mean")):
        with pytest.raises(ValueError, match=expected.format(name)):
            run_of(Vanilla(), model, [rule])
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with pytest.raises(ValueError, match=expected.format(name)):
            vanilla_step(model, optimizer, SCHEDULE, torch.zeros(2, 1, 8, 8), rules=[rule])
    with pytest.raises(ValueError, match=r"^rules: expected none that acts after the update .*got Mask"):
        vanilla_step(model, None, SCHEDULE, torch.zeros(2, 1, 8, 8), rules=[mask_of(model)])
    assert all(parameter.grad is None for parameter in model.parameters())


# In the step, replayed and resumed.


def test_rules_do_not_wait_for_the_device():
    run = run_of(SISS(), rules=())
    run.rules = (mask_of(run.model), anchor_of(run.model))
    run.step()
    with no_host_sync():
        for rule in run.rules:
            gradients = [torch.ones_like(parameter) for parameter in run.parameters]
            rule.restrict(run.parameters, gradients)
            rule.add(run.parameters, torch.ones(()))
            rule.after_update(run.parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Vanilla(), SISS()], ids=str)
def test_rules_in_a_cuda_graph(gpu, method):
    """Masked weights stay as they are, and what moves goes where a strong anchor pulls it."""
    model = TinyDenoiser().to(gpu.device)
    mask, before = mask_of(model), copied(model.named_parameters())
    mean = {name: value + 0.1 for name, value in before.items()}
    anchor = Anchor(mean, 1.0, 1e6, model=model)
    run = run_of(method, model, [mask, anchor], compile=False, autocast_dtype=None)
    losses = [float(run.step().loss) for _ in range(WARM_UP_STEPS + 4)]
    assert run.replayed
    assert losses[-1] < losses[0]
    assert_masked_stay(mask, dict(model.named_parameters()), before)


def ruled(seed: int = 9, gamma: float = 30.0, **options) -> Unlearner:
    model = TinyDenoiser()
    mask = Mask.from_gradients(numbers_for(model, seed), 0.4, model=model)
    return run_of(SISS(), model, [mask, anchor_of(model, gamma)], **options)


def test_a_run_with_a_mask_and_an_anchor_goes_on_to_the_bit(tmp_path):
    whole, first, second = ruled(), ruled(), ruled()
    unlearn(whole, num_steps=5, output_dir=tmp_path / "whole")
    unlearn(first, num_steps=3, output_dir=tmp_path / "run", keep_checkpoints=True)
    saved = runs.saved_in(runs.unfinish(tmp_path / "run", 3), 3)
    found = sorted(path.name for path in saved.iterdir())
    assert {"rule_0.safetensors", "rule_1.safetensors"} <= set(found)
    unlearn(second, num_steps=5, output_dir=tmp_path / "run", resume_from_checkpoint="latest")
    assert all(map(torch.equal, whole.model.parameters(), second.model.parameters()))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"seed": 8}, r"rules .*0.state.masks.hmac_sha256"),
        ({"gamma": 31.0}, r"rules .*1.state.gamma"),
    ],
)  # fmt: skip
def test_a_run_is_not_resumed_under_another_mask_or_anchor(tmp_path, changed, message):
    unlearn(ruled(), num_steps=1, output_dir=tmp_path, keep_checkpoints=True)
    runs.unfinish(tmp_path, 1)
    with pytest.raises(ValueError, match=message):
        unlearn(ruled(**changed), num_steps=2, output_dir=tmp_path, resume_from_checkpoint="latest")


def test_states_are_taken_back_in_place():
    model = TinyDenoiser()
    mask, other = mask_of(model), mask_of(model, 1.0)
    held = mask.masks["enter.weight"]
    mask.load_state_dict(other.state_dict())
    assert mask.idle
    assert mask.masks["enter.weight"] is held
    anchor, other_mean = anchor_of(model, 2.0), anchor_of(TinyDenoiser(seed=5)).mean
    another = Anchor(other_mean, anchor.precision, 3.0, model=model, max_precision=7.0)
    anchor.load_state_dict(another.state_dict())
    assert anchor.gamma == 3.0
    assert anchor.state_dict()["max_precision"] == another.state_dict()["max_precision"] == 7.0
    assert all(torch.equal(value, another.mean[name]) for name, value in anchor.mean.items())
    with pytest.raises(ValueError, match=r"^masks: expected \(6, 1, 3, 3\) for enter.weight, got none"):
        mask.load_state_dict({"masks": {}})
    alike = Anchor(anchor.mean, 2.0, 1.0, model=TinyDenoiser())
    with pytest.raises(ValueError, match=r"^precision: expected a tensor for each parameter, got 2.0"):
        anchor.load_state_dict(alike.state_dict())
    with pytest.raises(ValueError, match=r"^precision: expected one number for all, got"):
        alike.load_state_dict(anchor.state_dict())


def test_after_another_mask_is_loaded_its_weights_stay():
    model = TinyDenoiser()
    mask, other = mask_of(model), Mask.from_gradients(numbers_for(model, 8), 0.4, model=model)
    run = run_of(NegGrad(), model, [mask])
    run.step()
    mask.load_state_dict(other.state_dict())
    before = copied(model.named_parameters())
    run.step()
    assert_masked_stay(other, dict(model.named_parameters()), before)


def test_weights_of_a_step_that_failed_are_not_put_back_by_a_later_one():
    model = TinyDenoiser()
    mask, images = mask_of(model), torch.randn(4, 1, 8, 8)

    class Broken(Anchor):
        def add(self, parameters, loss_scale):
            raise RuntimeError("out of memory")

    broken = Broken(dict(model.named_parameters()), 1.0, 1.0, model=model)
    draws = Draws(None, torch.ones_like(images), None, torch.arange(4) * 200)
    options = {"draws": draws, "rules": [mask]}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    with pytest.raises(RuntimeError, match="out of memory"):
        vanilla_step(model, optimizer, SCHEDULE, images, draws=draws, rules=[mask, broken])

    # Nor by the same mask, if somebody loads other weights.
    model.load_state_dict(TinyDenoiser(seed=4).state_dict())
    vanilla_step(model, optimizer, SCHEDULE, images, **options)
    assert_masked_stay(mask, dict(model.named_parameters()), copied(TinyDenoiser(seed=4).named_parameters()))

    with pytest.raises(RuntimeError, match="out of memory"):
        vanilla_step(model, optimizer, SCHEDULE, images, draws=draws, rules=[mask, broken])
    mask.load_state_dict(mask_of(model, 1.0).state_dict())
    free = copy.deepcopy(model)
    vanilla_step(model, optimizer, SCHEDULE, images, **options)
    vanilla_step(free, torch.optim.SGD(free.parameters(), lr=1e-3), SCHEDULE, images, draws=draws)
    assert all(map(torch.equal, model.parameters(), free.parameters()))


def test_a_run_goes_on_with_rules_from_their_files(tmp_path):
    """Whatever order their names have there, and in the dicts that they were made of: that of the network."""
    model = TinyDenoiser()
    mask, anchor = mask_of(model), anchor_of(model)
    mask.save(tmp_path / "mask.safetensors")
    anchor.save(tmp_path / "anchor.safetensors")
    first = run_of(SISS(), model, [mask, anchor])
    unlearn(first, num_steps=1, output_dir=tmp_path / "run", keep_checkpoints=True)
    runs.unfinish(tmp_path / "run", 1)
    second = TinyDenoiser()
    rules = [
        Mask.load(tmp_path / "mask.safetensors", model=second),
        Anchor.load(tmp_path / "anchor.safetensors", anchor.gamma, model=second),
    ]
    again = run_of(SISS(), second, rules)
    unlearn(again, num_steps=2, output_dir=tmp_path / "run", resume_from_checkpoint="latest")
    assert again.step_index == 2
    backwards = Mask(dict(reversed(mask.masks.items())), model=model)
    assert list(backwards.masks) == list(mask.masks) == [name for name, _ in model.named_parameters()]


def test_files_of_rules_come_back(tmp_path):
    model = TinyDenoiser()
    mask, anchor = mask_of(model), anchor_of(model)
    mask.save(tmp_path / "mask.safetensors")
    anchor.save(tmp_path / "anchor.safetensors")
    assert (tmp_path / "mask.safetensors").stat().st_mode & 0o777 == 0o600
    found = Mask.load(tmp_path / "mask.safetensors", model=model)
    assert all(torch.equal(value, found.masks[name]) for name, value in mask.masks.items())
    read = Anchor.load(tmp_path / "anchor.safetensors", 3.0, model=model)
    for kind in ("mean", "precision"):
        own, others = getattr(anchor, kind), getattr(read, kind)
        assert all(torch.equal(value, others[name]) for name, value in own.items())
    Anchor(dict(model.named_parameters()), 2.5, 1.0, model=model).save(tmp_path / "same.safetensors")
    assert Anchor.load(tmp_path / "same.safetensors", 3.0, model=model).precision == 2.5
    (tmp_path / "mask.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match=r"mask.safetensors: expected a safetensors file, got"):
        Mask.load(tmp_path / "mask.safetensors", model=model)


def test_a_file_of_which_a_byte_has_changed_is_refused(tmp_path):
    """In the tensors themselves, of which safetensors knows no hash; also one that is no boolean."""
    model = TinyDenoiser()
    path = tmp_path / "rule.safetensors"
    for rule, kind in ((mask_of(model), Mask), (anchor_of(model), Anchor)):
        options = {"model": model} | ({} if kind is Mask else {"gamma": 1.0})
        rule.save(path)
        whole = path.read_bytes()
        for place, value in ((-1, whole[-1] ^ 1), (-9, 7)):
            damaged = bytearray(whole)
            damaged[place] = value
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"rule.safetensors: expected the content .*\(damaged\)"):
                kind.load(path, **options)
        path.write_bytes(whole)
        kind.load(path, **options)


def test_a_file_with_a_precision_that_is_no_number_is_refused(tmp_path):
    tensors = {"mean/enter.bias": torch.zeros(6), "precision/": torch.ones(3)}
    write_tensors(tmp_path / "anchor.safetensors", tensors, "anchor")
    expected = r"anchor.safetensors: expected one precision for all, got float32 of shape \(3,\)"
    with pytest.raises(ValueError, match=expected):
        Anchor.load(tmp_path / "anchor.safetensors", 1.0, model=TinyDenoiser())
