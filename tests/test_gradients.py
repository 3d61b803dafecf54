import math

import pytest
import torch
from torch import nn

from fastunlearn import gradients
from fastunlearn.reference import combine as reference


def parameters_with(main, correction):
    """Parameters whose buffers hold the given gradients; None: no gradient."""
    parameters = [nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in main]
    buffers = gradients.GradientBuffers(parameters)
    for role, values in (("forget", correction), ("retain", main)):
        buffers.select(role)
        for parameter, value in zip(parameters, values, strict=True):
            parameter.grad = value
    return parameters, buffers


@pytest.fixture
def pair():
    generator = torch.Generator().manual_seed(0)
    return [[torch.randn(3, 2, generator=generator, dtype=torch.float64) for _ in range(4)] for _ in range(2)]


@pytest.mark.parametrize("scale", [1.0, 1e-12, 1e12])
def test_rescale_is_the_paper(pair, scale):
    main, correction = pair[0], [scale * g for g in pair[1]]
    expected = reference.rescale(main, correction, 5.0)
    parameters, buffers = parameters_with([g.clone() for g in main], [g.clone() for g in correction])
    combined = gradients.rescale(5.0)(buffers, torch.ones(()), 1.0)
    torch.testing.assert_close([p.grad for p in parameters], expected.gradients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined.scaling_factor, expected.factor, rtol=1e-12, atol=0)
    torch.testing.assert_close(combined.correction_norm, expected.correction_norm, rtol=1e-12, atol=0)


@pytest.mark.parametrize("eta", [0.0, 1e-3, 0.1, 10.0])
def test_project_is_the_paper_and_does_what_it_promises(pair, eta):
    main, correction = pair
    expected = reference.project(main, correction, eta)
    parameters, buffers = parameters_with([g.clone() for g in main], [g.clone() for g in correction])
    combined = gradients.project(eta)(buffers, torch.ones(()), 1.0)
    torch.testing.assert_close([p.grad for p in parameters], expected.gradients, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(combined.scaling_factor, expected.factor, rtol=1e-10, atol=1e-14)
    inner = sum((p.grad * g).sum() for p, g in zip(parameters, correction, strict=True))
    assert inner >= eta * combined.correction_norm**2 * (1 - 1e-9)


def test_rescale_reports_the_norm_with_its_unit_and_without_the_loss_scale(pair):
    """Both gradients carry the loss scale, the correction is divided by its unit: the combined gradient is the same, times the loss scale."""
    unit, loss_scale = torch.tensor(1e-3, dtype=torch.float64), 1024.0
    plain, plain_buffers = parameters_with([g.clone() for g in pair[0]], [g * unit for g in pair[1]])
    scaled, scaled_buffers = parameters_with([g * loss_scale for g in pair[0]], [g * loss_scale for g in pair[1]])
    expected = gradients.rescale(5.0)(plain_buffers, torch.ones(()), 1.0)
    combined = gradients.rescale(5.0)(scaled_buffers, unit, loss_scale)
    torch.testing.assert_close(combined.correction_norm, expected.correction_norm)
    torch.testing.assert_close(combined.scaling_factor, expected.scaling_factor)
    torch.testing.assert_close([p.grad / loss_scale for p in scaled], [p.grad for p in plain])


@pytest.mark.parametrize("combination", [gradients.rescale(5.0), gradients.project(1e-3)])
def test_a_zero_correction_changes_nothing(pair, combination):
    parameters, buffers = parameters_with([g.clone() for g in pair[0]], [torch.zeros_like(g) for g in pair[0]])
    assert combination(buffers, torch.ones(()), 1.0).scaling_factor == 0
    torch.testing.assert_close([p.grad for p in parameters], pair[0], rtol=0, atol=0)


def test_parameters_without_a_gradient_stay_without(pair):
    """Frozen layers and LoRA: a parameter may have the main gradient only, the correction only, or none."""
    main, correction = [pair[0][0].clone(), pair[0][1].clone(), None, None], [pair[1][0].clone(), None, pair[1][2].clone(), None]
    parameters, buffers = parameters_with(main, correction)
    factor = gradients.rescale(5.0)(buffers, torch.ones(()), 1.0).scaling_factor
    assert math.isclose(factor.item(), 5 / torch.stack([pair[1][0], pair[1][2]]).norm().item(), rel_tol=1e-9)
    torch.testing.assert_close(parameters[0].grad, pair[0][0] - factor * pair[1][0])
    torch.testing.assert_close(parameters[1].grad, pair[0][1])
    torch.testing.assert_close(parameters[2].grad, -factor * pair[1][2])
    assert parameters[3].grad is None


@pytest.mark.parametrize("max_norm", [None, 0.1, 1e9])
def test_clip_is_torchs(pair, max_norm):
    ours, theirs = ([nn.Parameter(torch.zeros(3, 2, dtype=torch.float64)) for _ in pair[0]] for _ in range(2))
    for parameters in (ours, theirs):
        for parameter, gradient in zip(parameters, pair[0], strict=True):
            parameter.grad = gradient.clone()
    norm = gradients.clip(ours, max_norm)
    expected = nn.utils.clip_grad_norm_(theirs, math.inf if max_norm is None else max_norm)
    torch.testing.assert_close(norm, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close([p.grad for p in ours], [p.grad for p in theirs], rtol=1e-12, atol=0)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("finite", [True, False])
def test_a_non_finite_step_is_not_made(fused, finite):
    parameter = nn.Parameter(torch.ones(4))
    optimizer = torch.optim.AdamW([parameter], lr=0.1, fused=fused)
    parameter.grad = torch.full((4,), 1.0 if finite else float("nan"))
    gradients.guarded_step(optimizer, torch.tensor(finite))
    assert torch.isfinite(parameter).all()
    assert torch.equal(parameter, torch.ones(4)) == (not finite)
