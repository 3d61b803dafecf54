import math

import pytest
import torch
from torch import nn

from fastunlearn.host import tensor_lists
from fastunlearn.objective import combine
from fastunlearn.reference import combine as reference
from fastunlearn.step import accumulate, update


class Sum(torch.autograd.Function):
    """A prediction whose backward pass adds given gradients to the parameters (None: none)."""

    @staticmethod
    def forward(ctx, values, *parameters):
        ctx.values = values
        return torch.zeros((), dtype=torch.float64)

    @staticmethod
    def backward(ctx, gradient):
        return None, *(None if value is None else value * gradient for value in ctx.values)


def combined(
    main, correction, combination, *, in_place, passes=1, unit=1.0, loss_scale=1.0, dtype=torch.float64
):
    """Parameters of `dtype` with the combined gradient of `main` and `correction` (lists of gradients; None:
    none) in `.grad`, and what was reported.
    """
    parameters = [nn.Parameter(torch.zeros(3, 2, dtype=dtype)) for _ in main]
    accumulator = accumulate.Accumulator(
        parameters, combination, in_place=in_place, unit=unit, loss_scale=loss_scale
    )
    for role, values in (("forget", correction), ("retain", main)):
        for _ in range(passes):
            used = [
                parameter for parameter, value in zip(parameters, values, strict=True) if value is not None
            ]
            if used:
                accumulator.backward(
                    Sum.apply([value for value in values if value is not None], *used),
                    {role: torch.tensor(1 / passes, dtype=torch.float64)},
                )
    return parameters, accumulator.finish()


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(4)] for _ in range(2)]


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_rescale_is_the_paper(pair, scale, in_place, passes):
    main, correction = pair[0], [scale * g for g in pair[1]]
    expected = reference.rescale(main, correction, 5.0)
    parameters, report = combined(main, correction, combine.Rescale(5.0), in_place=in_place, passes=passes)
    torch.testing.assert_close([p.grad for p in parameters], expected.gradients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.scaling_factor, expected.factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(report.correction_norm, expected.correction_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("unit", [1.0, 1e-3, 1e-250], ids="unit {}".format)
@pytest.mark.parametrize(("scaling", "scaling_norm"), [
    ("norm", 2.0), ("ratio", 0.1), ("ratio", 3.0), ("clip", 2.0), ("clip", 1e9),
])  # fmt: skip
def test_every_scaling_is_its_formula(pair, scaling, scaling_norm, unit, in_place, micro_batches):
    """Whatever unit the correction is computed in, and however small it is; the loss scale cancels.

    A ratio waits for the main gradient, even where a correction could be finished in place.
    """
    main, in_units = pair
    expected = reference.rescale(main, [gradient * unit for gradient in in_units], scaling_norm, scaling)
    scaled = [[gradient * 1024.0 for gradient in side] for side in pair]
    combination = combine.Rescale(scaling_norm, scaling)
    parameters, report = combined(
        *scaled, combination, in_place=in_place, passes=micro_batches, loss_scale=1024.0,
        unit=torch.tensor(unit, dtype=torch.float64),
    )  # fmt: skip
    # Squares of 1e-250, as the reference takes them, leave float64.
    norm = torch.stack([gradient.square().sum() for gradient in in_units]).sum().sqrt()
    factor = {"norm": scaling_norm / norm, "clip": (scaling_norm / norm).clamp(max=unit)}
    factor["ratio"] = scaling_norm * torch.cat([g.flatten() for g in main]).norm() / norm
    by_formula = [m - factor[scaling] * c for m, c in zip(main, in_units, strict=True)]
    gradients = [parameter.grad / 1024.0 for parameter in parameters]
    torch.testing.assert_close(gradients, by_formula, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.scaling_factor, factor[scaling] / unit, rtol=1e-12, atol=0)
    torch.testing.assert_close(report.correction_norm, norm * unit, rtol=1e-12, atol=0)
    if unit > 1e-100:
        torch.testing.assert_close(gradients, expected.gradients, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(report.scaling_factor, expected.factor, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scaling", ["ratio", "clip"])
def test_a_ratio_is_of_all_of_the_main_gradient(pair, scaling):
    """Parameters that have one gradient alone count in its norm; those of both are no more than these."""
    main, correction = [pair[0][0], pair[0][1], None], [pair[1][0], None, pair[1][2]]
    filled = [
        [torch.zeros(3, 2, dtype=torch.float64) if g is None else g for g in side]
        for side in (main, correction)
    ]
    expected = reference.rescale(*filled, 0.3, scaling)
    copies = ([None if g is None else g.clone() for g in side] for side in (main, correction))
    parameters, report = combined(*copies, combine.Rescale(0.3, scaling), in_place=False)
    torch.testing.assert_close([p.grad for p in parameters], expected.gradients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.scaling_factor, expected.factor, rtol=1e-12, atol=0)


def test_an_unknown_scaling_is_refused():
    with pytest.raises(ValueError, match=r"^scaling: expected one of norm, ratio, clip, got 'half'"):
        combine.Rescale(1.0, "half")


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.1, 10.0])
def test_project_is_the_paper_and_does_what_it_promises(pair, eta):
    main, correction = pair
    expected = reference.project(main, correction, eta)
    # in vain: the projection needs both
    parameters, report = combined(main, correction, combine.Project(eta), in_place=True)
    torch.testing.assert_close([p.grad for p in parameters], expected.gradients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(report.scaling_factor, expected.factor, rtol=1e-10, atol=1e-14)
    inner = sum((p.grad * g).sum() for p, g in zip(parameters, correction, strict=True))
    assert inner >= eta * report.correction_norm**2 * (1 - 1e-9)


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("loss_scale", [1.0, 1024.0])
def test_balance_gives_both_gradients_one_norm(pair, scale, loss_scale):
    main, correction = pair[0], [scale * g for g in pair[1]]
    expected = reference.balance(main, correction)
    scaled = ([loss_scale * g for g in side] for side in (main, correction))
    parameters, report = combined(*scaled, combine.Balance(), in_place=True, loss_scale=loss_scale)
    found = [p.grad / loss_scale for p in parameters]
    torch.testing.assert_close(found, expected.gradients, rtol=1e-12, atol=1e-12 * min(scale, 1))
    torch.testing.assert_close(report.scaling_factor, expected.factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(report.correction_norm, expected.correction_norm, rtol=1e-12, atol=0)
    sizes = report.correction_norm * -report.scaling_factor, torch.cat(main).norm() * report.main_factor
    torch.testing.assert_close(*sizes, rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [1e-20, 1e-9, 1e-6, 1.0, 1e9])
def test_balance_keeps_a_far_larger_gradient_in_float32(pair, scale):
    """Also where lambd rounds to 1: the retain gradient is made as short as the other, not left out."""
    main, correction = [g.float() for g in pair[0]], [scale * g.float() for g in pair[1]]
    options = {"in_place": True, "dtype": torch.float32}
    parameters, report = combined(main, correction, combine.Balance(), **options)
    norms = [torch.cat(side).double().norm() for side in (main, correction)]
    shares = norms[1] / sum(norms), norms[0] / sum(norms)
    expected = [
        shares[0] * m.double() + shares[1] * c.double() for m, c in zip(main, correction, strict=True)
    ]
    # Two products and a sum of float32, of numbers of one size; norms of some hundred.
    size = (shares[0] * norms[0]).item()
    for parameter, right in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad.double(), right, rtol=0, atol=2e-6 * size)
    assert report.main_factor.item() == pytest.approx(shares[0].item(), rel=1e-6)


def test_balance_of_nothing_leaves_the_other_gradient(pair):
    """One that vanishes has no share, and takes none from the other."""
    zeros = [torch.zeros_like(g) for g in pair[0]]
    for main, correction, left in (
        (pair[0], zeros, pair[0]),
        (pair[0], [None] * 4, pair[0]),
        (zeros, pair[1], pair[1]),
        (zeros, zeros, zeros),
    ):
        parameters, _ = combined(main, correction, combine.Balance(), in_place=False)
        torch.testing.assert_close([p.grad for p in parameters], left, rtol=0, atol=0)


def test_balance_counts_parameters_that_have_one_gradient_alone(pair):
    """Frozen layers: both norms are over all that there is, and what stands alone has its factor, too."""
    main = [pair[0][0].clone(), pair[0][1].clone(), None, None]
    correction = [pair[1][0].clone(), None, pair[1][2].clone(), None]
    parameters, report = combined(main, correction, combine.Balance(), in_place=False)
    norms = [torch.cat([g for g in side if g is not None]).norm() for side in (correction, main)]
    lambd = norms[1] / (norms[0] + norms[1])
    torch.testing.assert_close(report.scaling_factor, -lambd)
    torch.testing.assert_close(parameters[0].grad, (1 - lambd) * pair[0][0] + lambd * pair[1][0])
    torch.testing.assert_close(parameters[1].grad, (1 - lambd) * pair[0][1])
    torch.testing.assert_close(parameters[2].grad, lambd * pair[1][2])
    assert parameters[3].grad is None


@pytest.mark.parametrize("limit", [1, 100, 1 << 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inner_products_on_accelerators(pair, limit, dtype, monkeypatch):
    """The way of GPUs, here on a CPU: products in portions, the two signs summed apart."""
    monkeypatch.setattr(tensor_lists, "MULTIPLIED_AT_ONCE", limit)
    left, right = ([g.to(dtype) for g in side] for side in pair)
    expected = sum((a.double() * b.double()).sum() for a, b in zip(left, right, strict=True))
    for device in (torch.device("cpu"), torch.device("meta")):  # the device only chooses the way
        error = abs(tensor_lists.inner_product(left, right, device).double() - expected)
        assert error <= 1e-5 * sum((a * b).abs().sum() for a, b in zip(left, right, strict=True))


def test_rescale_reports_the_norm_with_its_unit_and_without_the_loss_scale(pair):
    """Both gradients carry the loss scale, the correction is divided by its unit: the combined gradient is
    the same, times the loss scale.
    """
    unit, loss_scale = torch.tensor(1e-3, dtype=torch.float64), 1024.0
    for in_place in (True, False):
        plain, expected = combined(
            pair[0], [g * unit for g in pair[1]], combine.Rescale(5.0), in_place=in_place
        )
        both = ([g * loss_scale for g in side] for side in pair)
        scaled, report = combined(
            *both, combine.Rescale(5.0), in_place=in_place, unit=unit, loss_scale=loss_scale
        )
        torch.testing.assert_close(report.correction_norm, expected.correction_norm)
        torch.testing.assert_close(report.scaling_factor, expected.scaling_factor)
        torch.testing.assert_close([p.grad / loss_scale for p in scaled], [p.grad for p in plain])


@pytest.mark.parametrize("in_place", [True, False])
@pytest.mark.parametrize("nothing", [torch.zeros_like, lambda g: None])
@pytest.mark.parametrize(("combination", "factor"), [
    (combine.Rescale(5.0), 0),
    (combine.Rescale(0.1, "ratio"), 0),
    (combine.Rescale(5.0, "clip"), 1),  # it is not too long
    (combine.Project(1e-3), 0),
])  # fmt: skip
def test_a_zero_correction_changes_nothing(pair, combination, factor, nothing, in_place):
    parameters, report = combined(pair[0], [nothing(g) for g in pair[0]], combination, in_place=in_place)
    assert report.scaling_factor == factor
    torch.testing.assert_close([p.grad for p in parameters], pair[0], rtol=0, atol=0)


@pytest.mark.parametrize("in_place", [True, False])
def test_parameters_without_a_gradient_stay_without(pair, in_place):
    """Frozen layers and LoRA: a parameter may have the main gradient only, the correction only, or none."""
    main, correction = (
        [pair[0][0].clone(), pair[0][1].clone(), None, None],
        [pair[1][0].clone(), None, pair[1][2].clone(), None],
    )
    parameters, report = combined(main, correction, combine.Rescale(5.0), in_place=in_place)
    factor = report.scaling_factor
    assert math.isclose(factor.item(), 5 / torch.stack([pair[1][0], pair[1][2]]).norm().item(), rel_tol=1e-9)
    torch.testing.assert_close(parameters[0].grad, pair[0][0] - factor * pair[1][0])
    torch.testing.assert_close(parameters[1].grad, pair[0][1])
    torch.testing.assert_close(parameters[2].grad, -factor * pair[1][2])
    assert parameters[3].grad is None


def test_a_correction_after_the_main_gradient_is_refused(pair):
    parameters = [nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in pair[0]]
    accumulator = accumulate.Accumulator(parameters, combine.Rescale(5.0), in_place=True)
    one = torch.ones((), dtype=torch.float64)
    accumulator.backward(Sum.apply(pair[0], *parameters), {"retain": one})
    with pytest.raises(RuntimeError, match="its passes come first"):
        accumulator.backward(Sum.apply(pair[1], *parameters), {"forget": one})


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e9])
def test_clip_is_torchs(pair, max_norm):
    ours, theirs = (
        [gradient.clone() for gradient in pair[0]],
        [nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in pair[0]],
    )
    for parameter, gradient in zip(theirs, pair[0], strict=True):
        parameter.grad = gradient.clone()
    norm = tensor_lists.total_norm(ours, torch.device("cpu"))
    tensor_lists.divide(ours, update.clipping(norm, max_norm))
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(ours, [p.grad for p in theirs], rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("finite", [True, False])
def test_a_non_finite_step_is_not_made(fused, finite):
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    parameter.grad = torch.full((4,), 1.0 if finite else float("nan"))
    update.update(optimizer, None, torch.tensor(finite), [parameter.grad])
    assert torch.isfinite(parameter).all()
    assert torch.equal(parameter, torch.ones(4)) == (not finite)


def test_a_fused_optimizer_divides_in_its_own_pass(pair):
    parameters = [[nn.Parameter(torch.ones(3, 2)) for _ in pair[0]] for _ in range(2)]
    for fused, own in zip((True, False), parameters, strict=True):
        optimizer = torch.optim.AdamW(own, lr=0.1, fused=fused)
        for step in range(1, 4):
            for parameter, gradient in zip(own, pair[0], strict=True):
                parameter.grad = gradient.float() * step
            update.update(
                optimizer, torch.tensor(7.0), torch.tensor(True), [parameter.grad for parameter in own]
            )
    torch.testing.assert_close(*parameters, rtol=1e-5, atol=1e-6)


@pytest.fixture
def unwritten_memory_is_nan():
    """Otherwise it is whatever was there, often zeros."""
    torch.use_deterministic_algorithms(True)  # fills it, too
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("scaler", [None, {"init_scale": 2.0**10}])
@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),
], ids=["momentum", "momentum, not fused", "SGD", "AdamW", "Adagrad"])  # fmt: skip
@pytest.mark.usefixtures("unwritten_memory_is_nan")
def test_a_skipped_first_step_leaves_no_trace(make, scaler):
    """torch's fused SGD makes its momentum of unwritten memory in its first step."""
    results = []
    for skip in (True, False):
        parameter = nn.Parameter(torch.ones(4096))
        optimizer, scaled = (
            make([parameter]),
            None if scaler is None else torch.amp.GradScaler("cpu", **scaler),
        )
        for finite in ([False] * skip) + [True, True]:
            parameter.grad = torch.full((4096,), 1.0 if finite else float("nan"))
            if scaled is not None:
                parameter.grad *= scaled.scale(torch.ones(()))
                scaled.unscale_(optimizer)
            update.update(optimizer, torch.tensor(2.0), torch.tensor(finite), [parameter.grad], scaled)
        results.append(parameter.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=0)


def test_an_optimizer_that_is_fused_in_part_is_not_fused():
    parameters = [nn.Parameter(torch.ones(4)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:1]}, {"params": parameters[1:], "fused": False}], lr=0.1, fused=True
    )
    for parameter in parameters:
        parameter.grad = torch.ones(4)
    update.update(
        optimizer, torch.tensor(2.0), torch.tensor(True), [parameter.grad for parameter in parameters]
    )
    assert not torch.equal(parameters[0], torch.ones(4))


@pytest.mark.parametrize("order", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)])
def test_a_factor_is_not_rounded_to_the_dtype_of_another_gradient(order):
    values = [torch.ones(3, dtype=dtype) for dtype in order]
    tensor_lists.divide(values, torch.tensor(3.0))
    for value in values:
        torch.testing.assert_close(
            value,
            (torch.ones(3) / 3).to(value.dtype),
            rtol=0 if value.dtype == torch.bfloat16 else 1e-7,
            atol=0,
        )
