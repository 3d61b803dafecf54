"""Forward pass and loss as one compiled graph. A cheap backend traces them; one test runs the real one."""

import copy
import gc
import logging
import weakref

import pytest
import torch
from every_selection import EVERYTHING, SCHEDULED, TOTAL_STEPS, WEIGHTS, fitting
from torch import nn
from torch._dynamo.backends.registry import lookup_backend

from fastunlearn import (
    SISS,
    EraseDiff,
    ImageStore,
    LowPass,
    NegGrad,
    ReTrack,
    Unlearner,
    Vanilla,
    siss_step,
    vanilla_step,
)
from fastunlearn.host.philox import Noise
from fastunlearn.host.precision import tf32
from fastunlearn.methods import Batch
from fastunlearn.objective.draws import CounterSource, Draws, complete
from fastunlearn.objective.selection import Selection
from fastunlearn.step import compilation
from fastunlearn.step.options import Settings
from fastunlearn.step.take import take_step
from fastunlearn.step.trained import look_at
from fastunlearn.testing.budgets import assert_within_budget, relative_l2
from fastunlearn.testing.checkpoints import tiny_unet
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule, redirect_inputs

SCHEDULE = linear_schedule()
METHODS = {  # method -> graphs of a step: one for each set of shapes and terms
    ReTrack(k=2): 1,
    ReTrack(k=2, lambd=1.0): 1,
    SISS(): 1,
    SISS(variant="no_is"): 2,
    SISS(variant="bernoulli"): 1,
    EraseDiff(): 2,
    NegGrad(): 1,
    Vanilla(): 1,
}


class CountingBackend:
    """`aot_eager` (or another cheap one): graphs are traced and split in forward and backward, nothing is
    generated.
    """

    def __init__(self, name="aot_eager"):
        self.graphs, self.backend = 0, lookup_backend(name)

    def __call__(self, module, inputs, **options):
        self.graphs += 1
        return self.backend(module, inputs, **options)


@pytest.fixture
def backend(monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", CountingBackend())
    return compilation.BACKEND


@pytest.fixture
def cheapest(monkeypatch):
    """Graphs are traced, and run as they are."""
    monkeypatch.setattr(compilation, "BACKEND", CountingBackend("eager"))
    return compilation.BACKEND


def gradients(
    method, model, *, compile, dtype=torch.float32, rows=3, conditioning=None, device="cpu", **options
):
    """Loss and combined gradient of a step, one vector, on the CPU."""
    inputs = redirect_inputs(rows, 2, dtype=dtype)
    retain = redirect_inputs(rows, 1, dtype=dtype, seed=1).forget
    drawn = complete(
        Draws(),
        method.draws(),
        CounterSource(torch.tensor([0, 5, 0])),
        inputs.forget.float(),
        retain.float(),
        len(SCHEDULE),
    )
    drawn = Draws(**{name: _numbers(value, dtype, device) for name, value in vars(drawn).items()})
    conditioning = {
        name: value.to(device) if isinstance(value, torch.Tensor) else value
        for name, value in (conditioning or {}).items()
    }
    batch = Batch(
        inputs.forget.to(device),
        retain.to(device),
        inputs.neighbors.to(device),
        None,
        conditioning,
        conditioning,
    )
    model = copy.deepcopy(model).to(device, dtype)
    trained = look_at(model, None, options.pop("grad_scaler", None), None)
    out = take_step(trained, method, SCHEDULE, batch, drawn, Settings(compile=compile, **options))
    return out.loss.cpu(), torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    ).cpu()


def _numbers(value, dtype, device):
    if value is None:
        return None
    if isinstance(value, Noise):
        value = value.numbers()
    return value.to(device, dtype if value.is_floating_point() else value.dtype)


def assert_as_eager(method, model, compile=True, **options):
    loss, gradient = gradients(method, model, compile=compile, **options)
    plain_loss, plain = gradients(method, model, compile=False, **options)
    exact = {name: value for name, value in options.items() if name != "autocast_dtype"}
    true_loss, truth = gradients(method, model, compile=False, dtype=torch.float64, **exact)
    assert_within_budget("gradient", gradient, plain, truth)
    assert_within_budget("loss", loss, plain_loss, true_loss)


@pytest.mark.parametrize(("method", "graphs"), METHODS.items(), ids=str)
def test_one_graph_and_the_eager_gradient(backend, method, graphs):
    """SISS goes back twice through its graph."""
    assert_as_eager(method, TinyDenoiser())
    assert backend.graphs == graphs


def test_a_diffusers_network_is_one_graph(cheapest):
    pytest.importorskip("diffusers")
    assert_as_eager(SISS(), tiny_unet())
    assert cheapest.graphs == 1


@pytest.mark.parametrize("method", [ReTrack(k=2), SISS(), EraseDiff()], ids=str)
def test_autocast(backend, method):
    assert_as_eager(method, TinyDenoiser(), autocast_dtype=torch.bfloat16)
    assert backend.graphs == METHODS[method]


@pytest.mark.parametrize(("method", "graphs"), {ReTrack(k=2): 3, SISS(): 2, Vanilla(): 2}.items(), ids=str)
def test_micro_batches(backend, method, graphs):
    """SISS and vanilla: 2, 2 and 1 of 5 rows. ReTrack: 4 forget rows, 1 with 3 retain rows, 2 retain rows."""
    assert_as_eager(
        method, TinyDenoiser(), rows=5, micro_batch_size=2 if not isinstance(method, ReTrack) else 4
    )
    assert backend.graphs == graphs


def test_conditioning(backend):
    class Conditioned(TinyDenoiser):
        def forward(self, x_t, t, *, shift, added):
            return super().forward(x_t + shift[:, None, None, None] * added["scale"][:, None, None, None], t)

    conditioning = {
        "shift": torch.tensor([0.1, 0.2, 0.3]),
        "added": {"scale": torch.tensor([1.0, -1.0, 2.0])},
    }
    model = Conditioned()
    _, gradient = gradients(ReTrack(k=2), model, compile=True, conditioning=conditioning)
    _, plain = gradients(ReTrack(k=2), model, compile=False, conditioning=conditioning)
    _, without = gradients(
        ReTrack(k=2), model, compile=False, conditioning={**conditioning, "shift": torch.zeros(3)}
    )
    torch.testing.assert_close(gradient, plain)
    assert not torch.allclose(plain, without)
    assert backend.graphs == 1


def test_steps_of_a_run_compile_once(backend):
    eager, compiled = unlearner(compile=False), unlearner(compile=True)
    for _ in range(3):
        one, two = eager.step(), compiled.step()
        torch.testing.assert_close(two.loss, one.loss, rtol=1e-5, atol=1e-7)
    for one, two in zip(eager.model.parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
    assert backend.graphs == 1
    assert compiled.compile_seconds > 0
    assert eager.compile_seconds == 0


def unlearner(method=None, **options):
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    stores = {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}
    method = SISS(scaling_norm=0.1) if method is None else method
    return Unlearner(model, optimizer, SCHEDULE, method, **stores, batch_size=6, **options)


# --- windows of time and bands of frequency


@pytest.mark.parametrize("method", [ReTrack(k=2), SISS(), NegGrad()], ids=str)
def test_a_band_and_weights_are_part_of_the_graph(backend, method):
    weights = fitting(method, WEIGHTS)
    selection = Selection(**weights, lowpass=LowPass(0.5), loss_weight="min_snr")
    assert_as_eager(method, TinyDenoiser(), selection=selection)
    assert backend.graphs == METHODS[method]


@pytest.mark.parametrize("method", [ReTrack(k=2), SISS(), EraseDiff(), NegGrad(), Vanilla()], ids=str)
def test_a_band_that_moves_needs_no_other_graph(cheapest, method):
    """Neither do windows and weights: what changes from step to step are numbers on the device."""
    given = fitting(method, EVERYTHING)
    eager, compiled = (unlearner(method, compile=compile, **given) for compile in (False, True))
    for _ in range(TOTAL_STEPS + 2):
        one, two = eager.step(), compiled.step()
        torch.testing.assert_close(two.loss, one.loss, rtol=1e-5, atol=1e-6)
    assert cheapest.graphs == METHODS[method]


@pytest.mark.parametrize("lowpass", SCHEDULED.values(), ids=SCHEDULED)
def test_no_number_of_a_step_is_compiled_again(cheapest, lowpass):
    """A number and a tensor are one graph, and torch would raise where it began another."""
    model, images = TinyDenoiser(), torch.rand(2, 3, 1, 8, 8)
    given = {"lowpass": lowpass, "total_steps": TOTAL_STEPS}
    losses = {}
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(TOTAL_STEPS + 1):
            for number in (step, torch.tensor(step), torch.tensor(step, dtype=torch.int32)):
                generator = torch.Generator().manual_seed(0)
                out = siss_step(
                    model, None, SCHEDULE, *images, generator=generator, step=number, compile=True, **given
                )
                losses.setdefault(step, set()).add(float(out.forget_loss))
                model.zero_grad()
    assert cheapest.graphs == 1
    # All three of a step, and another one for another band.
    assert all(len(found) == 1 for found in losses.values())
    assert len(set.union(*losses.values())) >= 3


def test_more_networks_and_shapes_than_torch_allows_a_function(cheapest):
    """TorchDynamo gives up on a function that it has compiled eight times: one network may need more, and so
    may a process with several.
    """
    model = TinyDenoiser()
    for rows in range(1, 10):
        vanilla_step(model, None, SCHEDULE, torch.zeros(rows, 1, 8, 8), compile=True)
        model.zero_grad()
    for width in range(2, 11):
        vanilla_step(TinyDenoiser(width=width), None, SCHEDULE, torch.zeros(2, 1, 8, 8), compile=True)
    assert cheapest.graphs == 18


class Read(nn.Module):
    """A network with texts of any length."""

    def __init__(self):
        super().__init__()
        self.network = TinyDenoiser()

    def forward(self, x_t, t, text):
        return self.network(x_t, t) + text.mean()


@pytest.mark.parametrize("compile", [True, "try"])
def test_conditioning_of_more_lengths_than_torch_allows_a_function(cheapest, compile):
    model = Read()
    for length in range(1, 12):
        vanilla_step(
            model,
            None,
            SCHEDULE,
            torch.zeros(2, 1, 8, 8),
            retain_kwargs={"text": torch.zeros(2, length)},
            compile=compile,
        )
        model.zero_grad()
    assert cheapest.graphs == 11


@pytest.mark.usefixtures("backend")
def test_a_compiled_network_can_be_freed():
    model = TinyDenoiser()
    vanilla_step(model, None, SCHEDULE, torch.zeros(2, 1, 8, 8), compile=True)
    assert compilation.compile_seconds(model) > 0
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# --- what cannot be compiled


class Breaks(TinyDenoiser):
    """A graph cannot hold what depends on a value."""

    def forward(self, x_t, t):
        return super().forward(x_t, t) * (2 if float(x_t.sum()) > 1e9 else 1)


@pytest.mark.usefixtures("backend")
def test_a_failure_names_the_network():
    with pytest.raises(
        RuntimeError, match=r"compile: torch\.compile failed on Breaks with \(2, 1, 8, 8\)"
    ) as failure:
        vanilla_step(Breaks(), None, SCHEDULE, torch.zeros(2, 1, 8, 8), compile=True)
    assert "compile='try'" in str(failure.value)
    assert failure.value.__cause__ is not None


def test_try_goes_on_eagerly(monkeypatch, caplog, backend):
    attempts = []
    compile = torch.compile

    def counted(function, **options):
        compiled = compile(function, **options)
        return lambda *args: (attempts.append(1), compiled(*args))[1]

    monkeypatch.setattr(torch, "compile", counted)
    model = Breaks()
    images = torch.rand(2, 1, 8, 8)
    with caplog.at_level(logging.WARNING, "fastunlearn"):
        for _ in range(3):
            model.zero_grad()
            vanilla_step(
                model, None, SCHEDULE, images, compile="try", generator=torch.Generator().manual_seed(0)
            )
    gradient = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    vanilla_step(model, None, SCHEDULE, images, compile=False, generator=torch.Generator().manual_seed(0))
    assert all(
        torch.equal(one, parameter.grad) for one, parameter in zip(gradient, model.parameters(), strict=True)
    )
    assert len(attempts) == 1
    assert (
        len([record for record in caplog.records if "torch.compile failed on Breaks" in record.getMessage()])
        == 1
    )
    assert backend.graphs == 0
    model.zero_grad()
    with pytest.raises(RuntimeError, match=r"torch\.compile failed on Breaks"):  # True still asks for it
        vanilla_step(model, None, SCHEDULE, images, compile=True)


def test_only_modules_are_compiled():
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(TypeError, match=r"compile: expected a torch\.nn\.Module as model, got function"):
        vanilla_step(lambda x_t, t: model(x_t, t), optimizer, SCHEDULE, torch.zeros(2, 1, 8, 8), compile=True)


# --- blocks only


def conditional_unet():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(8, 16),
        norm_num_groups=4,
        attention_head_dim=4,
        cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def test_regional(backend):
    """SISS goes back twice through the graph of every block."""
    conditioning = {"encoder_hidden_states": torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))}
    model = conditional_unet()
    _, gradient = gradients(SISS(), model, compile="regional", conditioning=conditioning)
    _, plain = gradients(SISS(), model, compile=False, conditioning=conditioning)
    torch.testing.assert_close(gradient, plain, rtol=1e-4, atol=1e-5 * plain.abs().max().item())
    assert backend.graphs == 2  # two levels of blocks, four blocks


def test_regional_reports_its_first_call(cheapest):
    model = conditional_unet()
    images, hidden = torch.rand(2, 2, 1, 8, 8), {"encoder_hidden_states": torch.randn(2, 4, 8)}
    for _ in range(2):
        siss_step(
            model, None, SCHEDULE, *images, compile="regional", forget_kwargs=hidden, retain_kwargs=hidden
        )
        model.zero_grad()
        seconds, graphs = compilation.compile_seconds(model), cheapest.graphs
        assert seconds > 0
    assert (compilation.compile_seconds(model), cheapest.graphs) == (seconds, graphs)


def test_regional_leaves_the_network_as_it_was(cheapest):
    """Sampling with the unlearned network, in any batch size, is not the step's affair."""
    model, images, hidden = (
        conditional_unet(),
        torch.rand(2, 1, 8, 8),
        {"encoder_hidden_states": torch.randn(2, 4, 8)},
    )
    vanilla_step(model, None, SCHEDULE, images, compile="regional", retain_kwargs=hidden)
    model.zero_grad()
    graphs = cheapest.graphs
    assert all(module._compiled_call_impl is None for module in model.modules())
    for rows in range(1, 12):
        model(torch.rand(rows, 1, 8, 8), 1, encoder_hidden_states=torch.randn(rows, 4, 8))
    assert cheapest.graphs == graphs
    vanilla_step(model, None, SCHEDULE, images, compile="regional", retain_kwargs=hidden)
    assert cheapest.graphs == graphs > 0


def test_regional_says_what_failed(monkeypatch):
    def fails(module, inputs):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(compilation, "BACKEND", fails)
    with pytest.raises(
        RuntimeError,
        match=r"(?s)compile: torch.compile failed on the blocks of UNet2DConditionModel: .*no compiler",
    ):
        vanilla_step(
            conditional_unet(),
            None,
            SCHEDULE,
            torch.rand(2, 1, 8, 8),
            compile="regional",
            retain_kwargs={"encoder_hidden_states": torch.randn(2, 4, 8)},
        )


def test_regional_needs_a_network_that_repeats_blocks():
    with pytest.raises(
        ValueError,
        match="compile: expected a diffusers network that names its repeated blocks for 'regional', got "
        "TinyDenoiser",
    ):
        vanilla_step(TinyDenoiser(), None, SCHEDULE, torch.zeros(2, 1, 8, 8), compile="regional")


# --- what None means


def test_by_default_gpus_compile_and_cpus_do_not(monkeypatch):
    cpu, gpu, model = torch.device("cpu"), torch.device("cuda", 0), TinyDenoiser()
    assert compilation.resolve_compile(None, model, cpu) is False
    assert compilation.resolve_compile(None, model, gpu) is True
    assert compilation.resolve_compile(None, lambda x_t, t: x_t, gpu) is False
    assert compilation.resolve_compile("try", model, cpu) == "try"


def test_by_default_big_networks_compile_by_blocks_on_gpus(monkeypatch):
    gpu = torch.device("cuda", 0)
    big, small = conditional_unet(), conditional_unet()
    assert compilation.resolve_compile(None, small, gpu) is True
    monkeypatch.setattr(compilation, "REGIONAL_FROM", 1000)
    assert compilation.resolve_compile(None, big, gpu) == "regional"
    assert compilation.resolve_compile(None, nn.Linear(40, 40), gpu) is True  # names no blocks


def test_a_channels_last_network_on_a_cpu_is_warned_of(monkeypatch, caplog):
    """Inductor of torch 2.13 loses gradients of channels-last convolutions there, and makes contiguous ones
    channels-last unless told otherwise.
    """
    monkeypatch.setattr(torch, "compile", lambda function, **options: asked.append(options) or function)
    asked, images = [], torch.zeros(2, 1, 8, 8)
    for model, warned in (
        (TinyDenoiser(), False),
        (TinyDenoiser().to(memory_format=torch.channels_last), True),
    ):
        with caplog.at_level(logging.WARNING, "fastunlearn"):
            vanilla_step(model, None, SCHEDULE, images, compile=True)
        assert asked.pop()["options"] == {"layout_optimization": False}
        assert ("gave wrong gradients for a network in channels-last" in caplog.text) == warned


# --- the real backend


@pytest.mark.slow
@pytest.mark.parametrize("method", [ReTrack(k=2), SISS(), EraseDiff()], ids=str)
def test_inductor(method):
    assert_as_eager(method, TinyDenoiser())


@pytest.mark.slow
def test_inductor_by_blocks():
    assert_blocks_as_eager("cpu")


def assert_blocks_as_eager(device):
    conditioning = {"encoder_hidden_states": torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))}
    model = conditional_unet()
    _, gradient = gradients(SISS(), model, compile="regional", conditioning=conditioning, device=device)
    _, plain = gradients(SISS(), model, compile=False, conditioning=conditioning, device=device)
    torch.testing.assert_close(gradient, plain, rtol=1e-3, atol=1e-4 * plain.abs().max().item())


# --- on a GPU ---------------------------------------------------------------------------------------


class Upsampling(nn.Module):
    """What UNets are made of, small: a stride, an upsampling, a skip connection, a group norm.

    Inductor has lost gradients of such networks on CPUs.
    """

    def __init__(self):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.enter, self.down = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1)
            self.time, self.norm = nn.Linear(2, 16), nn.GroupNorm(4, 16)
            self.up, self.leave = nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, x_t, t):
        angle = t.to(x_t.dtype) / 1000
        entered = nn.functional.silu(self.enter(x_t))
        inner = (
            self.norm(self.down(entered))
            + self.time(torch.stack([angle.sin(), angle.cos()], dim=1))[:, :, None, None]
        )
        upsampled = nn.functional.interpolate(nn.functional.silu(inner), scale_factor=2.0, mode="nearest")
        return self.leave(torch.cat([self.up(upsampled), entered], dim=1))


def assert_as_accurate_as_eager(method, model, gpu, *, layout=torch.contiguous_format, **options):
    """Gradients are as far from float64 as eager ones, within a factor of 2 and a rounding.

    TF32, whose rounding would hide much, is off.
    """
    model, dtype = model.to(memory_format=layout), options.get("autocast_dtype", torch.float32)
    with tf32(False):
        loss, gradient = gradients(method, model, compile=True, device=gpu.device, **options)
        plain_loss, plain = gradients(method, model, compile=False, device=gpu.device, **options)
    _, truth = gradients(method, model, compile=False, dtype=torch.float64, device=gpu.device)
    assert relative_l2([gradient], [truth]) <= 2 * relative_l2([plain], [truth]) + torch.finfo(dtype).eps
    torch.testing.assert_close(loss.to(dtype), plain_loss.to(dtype))


LAYOUTS = pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)


@pytest.mark.gpu
@LAYOUTS
def test_inductor_on_a_gpu(gpu, layout):
    assert_as_accurate_as_eager(SISS(), Upsampling(), gpu, layout=layout)


@pytest.mark.gpu
@LAYOUTS
def test_inductor_on_a_diffusers_network_on_a_gpu(gpu, layout):
    pytest.importorskip("diffusers")
    assert_as_accurate_as_eager(SISS(), tiny_unet(), gpu, layout=layout)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Vanilla(), ReTrack(k=2), EraseDiff()], ids=str)
def test_inductor_on_a_gpu_with_every_kind_of_method(gpu, method):
    assert_as_accurate_as_eager(method, TinyDenoiser(), gpu)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [Vanilla(), ReTrack(k=2), SISS()], ids=str)
def test_inductor_under_autocast_on_a_gpu(gpu, method):
    """What an Unlearner does by default there."""
    assert_as_accurate_as_eager(
        method, Upsampling(), gpu, layout=torch.channels_last, autocast_dtype=torch.bfloat16
    )


@pytest.mark.gpu
def test_inductor_by_blocks_on_a_gpu(gpu):
    pytest.importorskip("diffusers")
    assert_blocks_as_eager(gpu.device)
