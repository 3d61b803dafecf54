"""Every op: opcheck (dense and permuted inputs), full-graph compilation of the public function, gradients,
memory layout.
"""

from unittest import mock

import pytest
import torch

from fastunlearn import LowPass
from fastunlearn import functional as F
from fastunlearn.host.philox import Noise
from fastunlearn.host.store import Rows
from fastunlearn.ops._backends import build_command, extension
from fastunlearn.testing.budgets import assert_within_budget, in_several_orders
from fastunlearn.testing.factories import linear_schedule, mixture_inputs, redirect_inputs

SCHEDULE = linear_schedule()
pytestmark = pytest.mark.gpu
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
needs_kernels = pytest.mark.skipif(
    DEVICE.type == "cpu" and not extension("_C"),
    reason=f"the C++ extension is not built; build it with: {build_command()}",
)


def permuted(tensor):
    """The same values, laid out channels last (or strided, for tensors of other rank)."""
    if tensor.ndim == 4:
        return tensor.contiguous(memory_format=torch.channels_last)
    padded = tensor.new_zeros(*tensor.shape, 2)
    padded[..., 0] = tensor
    return padded[..., 0]


def on_device(arguments):
    """On the GPU where there is one: scripts/gpu_check.sh runs this file there."""
    moved = [value.detach().to(DEVICE) if isinstance(value, torch.Tensor) else value for value in arguments]
    return tuple(
        new.requires_grad_() if isinstance(old, torch.Tensor) and old.requires_grad else new
        for old, new in zip(arguments, moved, strict=True)
    )


def arguments(op, dtype=torch.float32, shape=(3, 5, 7)):
    a = redirect_inputs(shape=shape, dtype=dtype)
    m = mixture_inputs(batch=3, shape=shape, dtype=dtype)
    coefficients = SCHEDULE.coefficients(a.timesteps)
    prediction, weight = a.forget.clone().requires_grad_(), torch.rand(3)
    given = a.noise, None, 0
    inputs = {
        "noising": lambda: (a.forget, None, coefficients, *given, True, dtype, False),
        "redirect": lambda: (a.forget, None, a.neighbors, None, coefficients, None, *given, dtype, False),
        "mixture": lambda: (
            m.retain,
            None,
            m.forget,
            None,
            SCHEDULE.coefficients(m.timesteps),
            m.from_forget,
            0.3,
            None,
            *given,
            dtype,
            False,
        ),
        "residual": lambda: (prediction, a.noise, weight),
        "lowpass_residual": lambda: (prediction, a.noise, weight, torch.ones(2, 3), 1.0, 0.5),
    }[op]
    return on_device(inputs())


def from_store(op):
    """The same ops on rows of a uint8 store by index, with noise from a counter and results laid out channels
    last.
    """
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (6, 3, 5, 7), dtype=torch.uint8, generator=generator)
    index, many = torch.tensor([4, 0, 4]), torch.randint(6, (3, 2), generator=generator)
    coefficients, chosen = (
        SCHEDULE.coefficients(torch.tensor([0, 500, 999])),
        torch.tensor([True, False, True]),
    )
    drawn = None, torch.tensor([7, 3, 0]), 5
    inputs = {
        "noising": lambda: (images, index, coefficients, *drawn, True, torch.bfloat16, True),
        "redirect": lambda: (images, index, images, many, coefficients, None, *drawn, torch.float32, True),
        "mixture": lambda: (
            images,
            index,
            images,
            many[:, 0].contiguous(),
            coefficients,
            chosen,
            0.3,
            None,
            *drawn,
            torch.float32,
            True,
        ),
    }[op]
    return on_device(inputs())


OPS = ["noising", "redirect", "mixture", "residual", "lowpass_residual"]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("op", OPS[:3])
def test_opcheck_from_a_store(op, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    torch.library.opcheck(getattr(torch.ops.fastunlearn, op).default, from_store(op))


@needs_kernels
@pytest.mark.parametrize("inputs", [arguments, from_store], ids=["tensors", "store"])
@pytest.mark.parametrize("op", OPS)
def test_kernel_agrees_with_the_closed_form(op, inputs, monkeypatch):
    """Through schema, preparation and choice of backend.

    How well each kernel agrees with float64 is for the tests of that op.
    """
    if inputs is from_store and op not in OPS[:3]:
        pytest.skip("reads no store")
    call, given, results = getattr(torch.ops.fastunlearn, op), inputs(op), []
    for name in ("kernels", "eager"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", name)
        results.append(_tuple(call(*given)))
    for one, two in zip(*results, strict=True):
        assert (one.dtype, one.shape, one.stride(), one.device) == (
            two.dtype,
            two.shape,
            two.stride(),
            two.device,
        )
        torch.testing.assert_close(one, two, rtol=1e-2 if one.dtype == torch.bfloat16 else 1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("layout", ["dense", "permuted"])
@pytest.mark.parametrize("op", OPS)
def test_opcheck(op, layout, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    inputs = arguments(op)
    if layout == "permuted":
        inputs = [
            permuted(value.detach()).requires_grad_(value.requires_grad)
            if isinstance(value, torch.Tensor)
            else value
            for value in inputs
        ]
    torch.library.opcheck(getattr(torch.ops.fastunlearn, op).default, tuple(inputs))


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("op", OPS)
def test_layout_does_not_change_values(op, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    inputs = [
        value.detach() if isinstance(value, torch.Tensor) else value for value in arguments(op, torch.float64)
    ]
    other = [permuted(value) if isinstance(value, torch.Tensor) else value for value in inputs]
    call = getattr(torch.ops.fastunlearn, op)
    for one, two in zip(_tuple(call(*inputs)), _tuple(call(*other)), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def _tuple(value):
    return value if isinstance(value, tuple) else (value,)


PUBLIC = {
    "noised": lambda: (F.noised, redirect_inputs()[:1] + redirect_inputs()[2:]),
    "redirect": lambda: (F.redirect, redirect_inputs()),
    "mixture": lambda: (
        lambda retain, forget, noise, t, chosen: F.mixture(retain, forget, noise, t, SCHEDULE, 0.5, chosen),
        mixture_inputs(),
    ),
}


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function_compiles_in_one_graph(name):
    function, inputs = PUBLIC[name]()
    call = function if name == "mixture" else lambda *values: function(*values, SCHEDULE)
    for one, two in zip(
        torch.compile(call, fullgraph=True, backend="aot_eager")(*inputs), call(*inputs), strict=True
    ):
        torch.testing.assert_close(one, two)


def test_denoising_loss_compiles_in_one_graph_with_its_gradient():
    prediction, target, weight = arguments("residual")
    compiled = torch.compile(
        lambda p: F.denoising_loss(p, target, weight).mean(), fullgraph=True, backend="aot_eager"
    )
    compiled(prediction).backward()
    gradient, prediction.grad = prediction.grad, None
    F.denoising_loss(prediction, target, weight).mean().backward()
    torch.testing.assert_close(gradient, prediction.grad)


def test_a_band_of_the_loss_is_in_the_graph():
    """A fixed one is a constant of it, the mask of a step an argument: the next step is the same graph."""
    prediction, target, weight = arguments("residual")
    graphs = []

    def counted(module, inputs):
        graphs.append(module)
        return module.forward

    @torch.compile(fullgraph=True, backend=counted)
    def loss(prediction, lowpass):
        return F.denoising_loss(prediction, target, weight, lowpass)

    fixed = LowPass(0.5, high_frequency_weight=0.25)
    torch.testing.assert_close(loss(prediction, fixed), F.denoising_loss(prediction, target, weight, fixed))
    assert len(graphs) == 1
    moving = LowPass(schedule="linear_decay", start=0.9, stop=0.1)
    found = []
    for step in range(4):
        mask = moving.mask_at(*prediction.shape[-2:], torch.tensor(step, device=DEVICE), 4)
        found.append(loss(prediction, mask))
        torch.testing.assert_close(found[-1], F.denoising_loss(prediction, target, weight, mask))
    assert len(graphs) == 2
    assert not torch.equal(found[0], found[3])


@pytest.mark.parametrize("kind", ["band", "mask"])
def test_a_band_of_the_loss_compiles_in_one_graph_with_its_gradient(kind):
    prediction, target, weight = arguments("residual")
    lowpass = LowPass(0.5)
    if kind == "mask":
        lowpass = lowpass.mask_on(*prediction.shape[-2:], DEVICE)
    compiled = torch.compile(
        lambda p, mask: F.denoising_loss(p, target, weight, mask).mean(), fullgraph=True, backend="aot_eager"
    )
    compiled(prediction, lowpass).backward()
    gradient, prediction.grad = prediction.grad, None
    F.denoising_loss(prediction, target, weight, lowpass).mean().backward()
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
    if dtype == torch.float64:
        torch.testing.assert_close(loss, exact, rtol=1e-14, atol=0)
    else:
        images = prediction.float(), target.float()
        (plain,) = in_several_orders(lambda one, two: ((one - two).square().flatten(1).sum(1),), images)
        assert_within_budget("loss", loss, plain, exact)
    torch.testing.assert_close(gradient, (2 * (prediction.double() - target.double())).to(dtype))


@pytest.mark.parametrize("lowpass", [None, LowPass(0.5, high_frequency_weight=0.3)])
def test_second_derivatives_are_those_of_the_formula(lowpass):
    generator = torch.Generator().manual_seed(1)
    layer = torch.randn(6, 105, generator=generator, dtype=torch.float64)
    parameters = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    target, weight = (
        torch.randn(3, 1, 5, 7, generator=generator, dtype=torch.float64),
        torch.rand(3, generator=generator, dtype=torch.float64),
    )
    assert torch.autograd.gradgradcheck(
        lambda parameters: F.denoising_loss(
            torch.tanh(parameters @ layer).view(3, 1, 5, 7), target, weight, lowpass
        ).sum(),
        parameters,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("weight", "scale"), [(1e-3, 65536.0), (1.0, 65536.0), (1 / (8 * 3 * 64 * 64), 1024.0), (1e-7, 1.0)]
)
def test_a_loss_scale_meets_half_precision_once(dtype, weight, scale):
    """As in plain torch, factors multiply before the gradient is rounded to half precision.

    A scale that alone overflows float16 does no harm.
    """
    generator = torch.Generator().manual_seed(0)
    start, target = (torch.randn(4, 3, 16, 16, generator=generator) for _ in range(2))
    weights = torch.full((4,), weight)

    def gradient(loss):
        prediction = start.to(dtype).requires_grad_()
        (scale * loss(prediction).sum()).backward()
        return prediction.grad

    ours = gradient(lambda prediction: F.denoising_loss(prediction, target, weights))
    plain = gradient(lambda prediction: weights * (prediction.float() - target).square().flatten(1).sum(1))
    truth = 2 * weight * scale * (start.to(dtype).double() - target.double())
    finite = truth.abs() < 6e4
    assert_within_budget("gradient", ours[finite], plain[finite], truth[finite])


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_a_prediction_with_the_batch_inside(backend, monkeypatch):
    """Tokens first, as a transformer may return them: neither layout of images, so the gradient is
    contiguous.
    """
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    prediction = torch.randn(32 * 4, 3, 4).permute(1, 2, 0).unflatten(2, (16, 8))
    target = torch.randn(prediction.shape)
    loss, gradient = F.weighted_residual(prediction, target)
    torch.testing.assert_close(loss, (prediction - target).square().flatten(1).sum(1))
    assert torch.equal(gradient, 2 * (prediction - target))


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_integers_and_floats_of_other_sizes_are_converted(backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    inputs = redirect_inputs()
    distance = (inputs.forget.unsqueeze(1) - inputs.neighbors).flatten(2).square().sum(2)
    for one, two in zip(
        F.redirect(*inputs, SCHEDULE, sqdist=distance),
        F.redirect(*inputs, SCHEDULE, sqdist=distance.double()),
        strict=True,
    ):
        assert torch.equal(one, two)
    images, index = (inputs.forget * 127 + 128).byte(), torch.tensor([2, 0, 2])
    noise = Noise(torch.tensor([5, 6, 7]), 5, (3, *images.shape[1:]))
    wide = F.noised(Rows(images, index), noise, inputs.timesteps, SCHEDULE).x_t
    narrow = F.noised(
        Rows(images, index.int()), Noise(noise.counter.int(), 5, noise.shape), inputs.timesteps, SCHEDULE
    ).x_t
    assert torch.equal(wide, narrow)
    weight = torch.tensor([0.5, 0.25, 1.0])
    assert torch.equal(
        F.denoising_loss(inputs.forget, inputs.noise, weight.bfloat16()),
        F.denoising_loss(inputs.forget, inputs.noise, weight),
    )


def test_one_meta_tensor_among_others_is_refused():
    """torch asks the fake kernel then, whose outputs nobody fills."""
    with pytest.raises(ValueError, match="residual: expected all tensors on one device, got cpu and meta"):
        torch.ops.fastunlearn.residual(
            torch.rand(3, 1, 2, 2), torch.rand(3, 1, 2, 2), torch.rand(3, device="meta")
        )


def test_weights_of_bytes_do_not_wrap(monkeypatch):
    prediction, target, weight = torch.ones(1, 1, 2, 2), torch.zeros(1, 1, 2, 2), torch.tensor([200])
    for backend in ("auto", "eager"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
        loss, gradient = torch.ops.fastunlearn.residual(prediction, target, weight.byte())
        assert loss.item() == 800, backend
        assert gradient.unique().tolist() == [400], backend


@pytest.mark.parametrize("purpose", [-1, 2**32])
@pytest.mark.parametrize("op", OPS[:3])
def test_a_purpose_that_no_counter_holds_is_refused(op, purpose):
    given = [purpose if type(value) is int else value for value in from_store(op)]
    with pytest.raises(ValueError, match=rf"purpose: expected an integer in \[0, 2\^32\), got {purpose}"):
        getattr(torch.ops.fastunlearn, op)(*given)


def test_tensors_on_two_devices_are_refused():
    elsewhere = torch.rand(3, device="meta")
    with pytest.raises(ValueError, match="residual: expected all tensors on one device, got cpu and meta"):
        torch.ops.fastunlearn.residual.default._op_dk(
            torch._C.DispatchKey.CompositeExplicitAutograd,
            torch.rand(3, 1, 2, 2),
            torch.rand(3, 1, 2, 2),
            elsewhere,
        )


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_float64_rows_with_drawn_noise(backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    inputs = redirect_inputs(dtype=torch.float64)
    noise = Noise(torch.tensor([5, 6, 7]), 5, tuple(inputs.forget.shape))
    drawn = F.redirect(inputs.forget, inputs.neighbors, noise, inputs.timesteps, SCHEDULE)
    given = F.redirect(
        inputs.forget, inputs.neighbors, noise.numbers(torch.float64), inputs.timesteps, SCHEDULE
    )
    for one, two in zip(drawn, given, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)  # the numbers are float32


def test_gradients_of_noising_are_those_of_the_formula():
    """It is linear in images and noise.

    The importance weights of the other two are constants, and refuse to lose a gradient in silence.
    """
    inputs = redirect_inputs(dtype=torch.float64, shape=(1, 3, 4))
    images, noise = inputs.forget.requires_grad_(), inputs.noise.requires_grad_()
    schedule = linear_schedule(prediction_type="v_prediction")
    assert torch.autograd.gradcheck(
        lambda images, noise: tuple(F.noised(images, noise, inputs.timesteps, schedule)), (images, noise)
    )
    rows = Rows(images, torch.tensor([2, 0, 2]))
    (gradient,) = torch.autograd.grad(
        F.noised(rows, noise.detach(), inputs.timesteps, schedule).x_t.sum(), images
    )
    alpha = schedule.coefficients(inputs.timesteps)[:, 0]
    torch.testing.assert_close(
        gradient[:, 0, 0, 0],
        torch.stack([alpha[1], torch.zeros_like(alpha[0]), alpha[0] + alpha[2]]),
        rtol=1e-6,
        atol=0,
    )
    with pytest.raises(ValueError, match="forget: expected no gradient"):
        F.redirect(images, inputs.neighbors, inputs.noise.detach(), inputs.timesteps, SCHEDULE)


@pytest.mark.parametrize("k", [1, 2, 40])
def test_redirect_in_several_parts_of_neighbours_is_redirect_in_one(k, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "eager")
    inputs = redirect_inputs(num_neighbors=k, dtype=torch.float64)
    whole = F.redirect(*inputs, SCHEDULE)
    monkeypatch.setattr("fastunlearn.ops.redirect._CHUNK_ELEMENTS", 3 * 64 * 3)  # three neighbours at a time
    for one, two in zip(whole, F.redirect(*inputs, SCHEDULE), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("backend", "called"), [("eager", "ops.redirect._parts"), ("reference", "functional._literal_redirect")]
)
def test_backend_can_be_forced(backend, called, monkeypatch):
    inputs, expected = (
        redirect_inputs(dtype=torch.float64),
        F.redirect(*redirect_inputs(dtype=torch.float64), SCHEDULE),
    )
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    # it is that code that runs
    with mock.patch(f"fastunlearn.{called}", side_effect=ZeroDivisionError), pytest.raises(ZeroDivisionError):
        F.redirect(*inputs, SCHEDULE)
    for one, two in zip(F.redirect(*inputs, SCHEDULE), expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9)


def test_unknown_backend_is_refused(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", "tritn")
    with pytest.raises(
        ValueError, match=r"FASTUNLEARN_BACKEND: expected one of auto, kernels, eager, reference, got 'tritn'"
    ):
        F.redirect(*redirect_inputs(), SCHEDULE)
