"""Every op: opcheck (dense and permuted inputs), full-graph compilation of the public function, gradients, memory layout."""

import pytest
import torch

from fastunlearn import functional as F
from fastunlearn.testing.factories import linear_schedule, mixture_inputs, redirect_inputs

SCHEDULE = linear_schedule()


def permuted(tensor):
    """The same values, laid out channels last (or strided, for tensors of other rank)."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    padded = tensor.new_zeros(*tensor.shape, 2)
    padded[..., 0] = tensor
    return padded[..., 0]


def arguments(op, dtype=torch.float32, shape=(3, 5, 7)):
    a = redirect_inputs(shape=shape, dtype=dtype)
    m = mixture_inputs(batch=3, shape=shape, dtype=dtype)
    coefficients = SCHEDULE.coefficients(a.timesteps)
    prediction, weight = a.forget.clone().requires_grad_(), torch.rand(3)
    given = a.noise, None, 0
    return {
        "noising": lambda: (a.forget, None, coefficients, *given, True, dtype, False),
        "redirect": lambda: (a.forget, None, a.neighbors, None, coefficients, None, *given, dtype, False),
        "mixture": lambda: (m.retain, None, m.forget, None, SCHEDULE.coefficients(m.timesteps), m.from_forget, 0.3, None, *given, dtype, False),
        "residual": lambda: (prediction, a.noise, weight),
        "lowpass_residual": lambda: (prediction, a.noise, weight, torch.ones(2, 3), 1.0, 0.5),
    }[op]()


def from_store(op):
    """The same ops on rows of a uint8 store by index, with noise from a counter and results laid out channels last."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 5, 7), dtype=torch.uint8, generator=generator)
    index, many = torch.tensor([4, 0, 4]), torch.randint(6, (3, 2), generator=generator)
    coefficients, chosen = SCHEDULE.coefficients(torch.tensor([0, 500, 999])), torch.tensor([True, False, True])
    drawn = None, torch.tensor([7, 3, 0]), 5
    return {
        "noising": lambda: (images, index, coefficients, *drawn, True, torch.bfloat16, True),
        "redirect": lambda: (images, index, images, many, coefficients, None, *drawn, torch.float32, True),
        "mixture": lambda: (images, index, images, many[:, 0].contiguous(), coefficients, chosen, 0.3, None, *drawn, torch.float32, True),
    }[op]()


OPS = ["noising", "redirect", "mixture", "residual", "lowpass_residual"]


@pytest.mark.parametrize("op", OPS[:3])
def test_opcheck_from_a_store(op):
    torch.library.opcheck(getattr(torch.ops.fastunlearn, op).default, from_store(op))


@pytest.mark.parametrize("layout", ["dense", "permuted"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, layout):
    inputs = arguments(op)
    if layout == "permuted":
        inputs = [permuted(value.detach()).requires_grad_(value.requires_grad) if isinstance(value, torch.Tensor) else value for value in inputs]
    torch.library.opcheck(getattr(torch.ops.fastunlearn, op).default, tuple(inputs))


@pytest.mark.parametrize("layout", ["dense", "permuted"])
@pytest.mark.parametrize("op", OPS)
def test_layout_does_not_change_values(op, layout):
    inputs = [value.detach() if isinstance(value, torch.Tensor) else value for value in arguments(op, torch.float64)]
    other = [permuted(value) if isinstance(value, torch.Tensor) else value for value in inputs]
    call = getattr(torch.ops.fastunlearn, op)
    for one, two in zip(_tuple(call(*inputs)), _tuple(call(*other)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


PUBLIC = {
    "noised": lambda: (F.noised, redirect_inputs()[:1] + redirect_inputs()[2:]),
    "redirect": lambda: (F.redirect, redirect_inputs()),
    "mixture": lambda: (lambda retain, forget, noise, t, chosen: F.mixture(retain, forget, noise, t, SCHEDULE, 0.5, chosen), mixture_inputs()),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_compiles_in_one_graph(name):
    function, inputs = PUBLIC[name]()
    call = function if name == "mixture" else lambda *values: function(*values, SCHEDULE)
    for one, two in zip(torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs), strict=True):
        torch.testing.assert_close(one, two)


def test_denoising_loss_compiles_in_one_graph_with_its_gradient():
    prediction, target, weight = arguments("residual")
    compiled = torch.compile(lambda p: F.denoising_loss(p, target, weight).mean(), fullgraph=True, backend="aot_eager")
    compiled(prediction).backward()
    gradient, prediction.grad = prediction.grad, None
    F.denoising_loss(prediction, target, weight).mean().backward()
    torch.testing.assert_close(gradient, prediction.grad)


def test_residual_passes_gradcheck():
    prediction, target, weight = arguments("residual", torch.float64, shape=(2, 3, 2))
    assert torch.autograd.gradcheck(lambda p: F.denoising_loss(p, target, weight.double()), prediction)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_residual_accumulates_in_float32_or_better_and_answers_in_the_dtype_of_the_prediction(dtype):
    generator = torch.Generator().manual_seed(0)
    prediction, target = (torch.randn(2, 3, 64, 64, generator=generator).to(dtype) for _ in range(2))
    loss, gradient = F.weighted_residual(prediction, target)
    assert loss.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.dtype == dtype
    exact = (prediction.double() - target.double()).square().flatten(1).sum(1)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5 if dtype != torch.float64 else 1e-12, atol=0)
    torch.testing.assert_close(gradient, (2 * (prediction.double() - target.double())).to(dtype))


@pytest.mark.parametrize("k", [1, 2, 40])
def test_redirect_in_several_parts_of_neighbours_is_redirect_in_one(k, monkeypatch):
    inputs = redirect_inputs(num_neighbors=k, dtype=torch.float64)
    whole = F.redirect(*inputs, SCHEDULE)
    monkeypatch.setattr("fastunlearn.ops.redirect._CHUNK_ELEMENTS", 3 * 64 * 3)  # three neighbours at a time
    for one, two in zip(whole, F.redirect(*inputs, SCHEDULE), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_backend_can_be_forced(backend, monkeypatch):
    inputs, expected = redirect_inputs(dtype=torch.float64), F.redirect(*redirect_inputs(dtype=torch.float64), SCHEDULE)
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    for one, two in zip(F.redirect(*inputs, SCHEDULE), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "tritn")
    with pytest.raises(ValueError, match=r"FASTUNLEARN_BACKEND: expected one of auto, kernels, eager, reference, got 'tritn'"):
        F.redirect(*redirect_inputs(), SCHEDULE)
