"""SISS' rescaling and EraseDiff's projection, parameter by parameter."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastunlearn.reference.combine import project, rescale


def _gradients(seed: int, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [
        scale * torch.randn(shape, dtype=torch.float64, generator=generator) for shape in ((3, 2), (5,), ())
    ]


def _flat(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([g.flatten() for g in gradients])


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rescale_sets_the_forget_gradient_to_the_given_norm(scale):
    main, correction = _gradients(1), _gradients(2, scale)
    combined = rescale(main, correction, 5.0)
    removed = _flat(main) - _flat(combined.gradients)
    assert removed.norm().item() == pytest.approx(5.0, rel=1e-12)
    torch.testing.assert_close(
        removed / 5, _flat(correction) / _flat(correction).norm(), rtol=1e-9, atol=1e-12
    )
    assert combined.correction_norm.item() == pytest.approx(_flat(correction).norm().item(), rel=1e-12)


def test_rescale_ignores_a_forget_gradient_of_zero():
    main = _gradients(1)
    combined = rescale(main, [torch.zeros_like(g) for g in main], 5.0)
    assert combined.factor.item() == 0
    assert torch.equal(_flat(combined.gradients), _flat(main))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), eta=st.floats(0, 2), scale=st.floats(0.01, 100))
def test_project_leaves_at_least_eta_along_the_forget_gradient(seed, eta, scale):
    main, correction = _gradients(seed), _gradients(seed + 1, scale)
    combined = project(main, correction, eta)
    square = _flat(correction).square().sum().item()
    assert (_flat(combined.gradients) @ _flat(correction)).item() >= eta * square - 1e-9 * square
    assert combined.factor.item() <= 0
    if _flat(main) @ _flat(correction) > eta * square:
        assert torch.equal(_flat(combined.gradients), _flat(main))
