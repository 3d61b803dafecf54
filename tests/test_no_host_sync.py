"""No step waits for the device: on a CPU by looking at every op, on the meta device because it has no values
to wait for, on a GPU by asking CUDA.
"""

import copy

import pytest
import torch
from every_selection import EVERYTHING, SELECTIONS, fitting

from fastunlearn import (
    SISS,
    EraseDiff,
    ImageStore,
    LowPass,
    NegGrad,
    NoiseSchedule,
    ReTrack,
    Unlearner,
    Vanilla,
    erasediff_step,
    neggrad_step,
    retrack_step,
    siss_step,
    vanilla_step,
)
from fastunlearn.methods import Pass
from fastunlearn.testing.factories import Average, TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import HostSync, no_host_sync
from fastunlearn.testing.methods import compared_with, every_variant

SCHEDULE = linear_schedule()
METHODS = [ReTrack(k=1, lambd=1.0), *every_variant(k=2)]
OPTIONS = {
    "plain": {},
    "micro-batches": {"micro_batch_size": 4},
    "no clipping": {"max_grad_norm": None},
    "bf16": {"autocast_dtype": torch.bfloat16},
    "bf16 in micro-batches": {"autocast_dtype": torch.bfloat16, "micro_batch_size": 4, "max_grad_norm": 0.1},
    "loss scale": {"grad_scaler": torch.amp.GradScaler("cpu", init_scale=2.0**8)},
}
STEPS = {
    "retrack": lambda *args, images, **options: retrack_step(
        *args, images[0], images[1].unsqueeze(1).repeat(1, 2, 1, 1, 1), images[2], **options
    ),
    "siss": lambda *args, images, **options: siss_step(*args, *images[:2], **options),
    "siss no_is": lambda *args, images, **options: siss_step(*args, *images[:2], variant="no_is", **options),
    "siss bernoulli": lambda *args, images, **options: siss_step(
        *args, *images[:2], variant="bernoulli", **options
    ),
    "erasediff": lambda *args, images, **options: erasediff_step(*args, *images[:2], **options),
    "neggrad": lambda *args, images, **options: neggrad_step(*args, images[0], **options),
    "vanilla": lambda *args, images, **options: vanilla_step(*args, images[0], **options),
}

OF_STEP = {"retrack": ReTrack(), "erasediff": EraseDiff(), "neggrad": NegGrad(), "vanilla": Vanilla()}


class DeviceSGD(torch.optim.Optimizer):
    """Gradient descent that takes found_inf as fused AdamW does, on any device: torch's fused optimizers
    refuse the meta device.
    """

    _step_supports_amp_scaling = True

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                factor = (
                    group["lr"] * (1 - self.found_inf) / (1 if self.grad_scale is None else self.grad_scale)
                )
                parameter -= factor * parameter.grad


def stores():
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    return ImageStore(images[:4]), ImageStore(images[4:])


def unlearner(method, device="cpu", **options):
    forget, retain = stores()
    model = TinyDenoiser().to(device)
    optimizer = (
        DeviceSGD(model.parameters())
        if device == "meta"
        else torch.optim.AdamW(model.parameters(), fused=True)
    )
    if device == "meta" and "neighbors" in method.needs:  # a search among meta rows would find nothing
        options["neighbors"] = (
            torch.zeros(4, method.k, dtype=torch.int64),
            torch.ones(4, method.k, dtype=torch.int64),
        )
    options |= compared_with(method, TinyDenoiser(seed=1).to(device))
    return Unlearner(
        model,
        optimizer,
        SCHEDULE,
        method,
        forget=forget,
        retain=retain,
        **{"batch_size": 6, "compile": False, **copy.deepcopy(options)},
    )


@pytest.fixture
def as_on_an_accelerator(monkeypatch):
    """Steps on a CPU read weights, to leave out rows that count nothing; no other device does.

    What `check_usable` reads lies on the host anyway.
    """
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])
    monkeypatch.setattr(NoiseSchedule, "check_usable", lambda self: None)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.usefixtures("as_on_an_accelerator")
def test_unlearner(method, options):
    run = unlearner(method, **options)
    run.ema = Average(run.model.parameters())
    run.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 10)
    run.step()  # tables of the schedule and the optimizer's state are made
    with no_host_sync():
        outputs = [run.step() for _ in range(2)]
    assert not any(output.skipped for output in outputs)
    assert run.skipped_steps == 0


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_the_ema_of_diffusers_does_not_wait():
    ema_model = pytest.importorskip("diffusers.training_utils").EMAModel
    run = unlearner(SISS())
    run.ema = ema_model(run.model.parameters(), decay=0.9)
    run.step()
    with no_host_sync():
        run.step()


@pytest.mark.parametrize("backend", ["eager", "auto"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
@pytest.mark.usefixtures("as_on_an_accelerator")
def test_functional_steps(monkeypatch, step, options, backend):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    model, images = TinyDenoiser(), torch.rand(3, 6, 1, 8, 8) * 2 - 1
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    options = copy.deepcopy(options)
    step(model, optimizer, SCHEDULE, images=images, **options)
    with no_host_sync():
        output = step(model, optimizer, SCHEDULE, images=images, **options)
    assert not output.skipped


@pytest.mark.parametrize("micro_batch_size", [None, 4])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_on_a_device_without_values(method, micro_batch_size):
    """Everything but the optimizer and autocast takes the branches of an accelerator here: nothing is
    patched, and no value could be read.
    """
    run = unlearner(method, "meta", micro_batch_size=micro_batch_size)
    run.step()
    with no_host_sync("meta"):
        output = run.step()
    assert output.loss.device.type == "meta"
    assert run.step_index == 2


@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_functional_steps_on_a_device_without_values(step):
    model, images = TinyDenoiser().to("meta"), torch.empty(3, 6, 1, 8, 8, device="meta")
    optimizer = DeviceSGD(model.parameters())
    step(model, optimizer, SCHEDULE, images=images, compile=False)
    with no_host_sync("meta"):
        assert step(model, optimizer, SCHEDULE, images=images, compile=False).loss.device.type == "meta"


# --- windows of time and bands of frequency


@pytest.mark.parametrize(
    ("method", "given"),
    [
        *((SISS(), given) for given in SELECTIONS.values()),
        *((method, EVERYTHING) for method in METHODS if method != SISS()),
    ],
    ids=[*SELECTIONS, *(str(method) for method in METHODS if method != SISS())],
)
@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_selection_of_an_unlearner(method, given):
    run = unlearner(method, **fitting(method, given))
    run.step()  # tables of densities and bands are made
    with no_host_sync():
        outputs = [run.step() for _ in range(2)]
    assert not any(output.skipped for output in outputs)


@pytest.mark.parametrize("method", METHODS, ids=str)
def test_a_selection_on_a_device_without_values(method):
    run = unlearner(method, "meta", micro_batch_size=4, **fitting(method, EVERYTHING))
    run.step()
    with no_host_sync("meta"):
        assert run.step().loss.device.type == "meta"


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.usefixtures("as_on_an_accelerator")
def test_a_selection_of_a_functional_step(name, device):
    """The number of the step lies on the device, and nobody reads it."""
    method = OF_STEP.get(name.split()[0], SISS())
    model = TinyDenoiser().to(device)
    images = torch.rand(3, 6, 1, 8, 8, device=device) * 2 - 1
    optimizer = DeviceSGD(model.parameters())
    given = fitting(method, EVERYTHING) | {"compile": False, "step": torch.zeros((), device=device).long()}
    STEPS[name](model, optimizer, SCHEDULE, images=images, **given)
    with no_host_sync(device):
        for _ in range(2):
            given["step"] += 1
            STEPS[name](model, optimizer, SCHEDULE, images=images, **given)


def test_a_band_that_asks_for_the_number_of_the_step_is_found(monkeypatch):
    """What the tests above would find."""
    mask_at = LowPass.mask_at

    def reads(self, height, width, step, *arguments):
        return mask_at(self, height, width, int(step), *arguments)

    monkeypatch.setattr(LowPass, "mask_at", reads)
    run = unlearner(SISS(), **EVERYTHING)
    run.step()
    with pytest.raises(HostSync), no_host_sync():
        run.step()


# --- that the check can fail


class ReadsGradient(torch.autograd.Function):
    """Looks at a value in the backward pass."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * (grad.sum().item() + 1)


class Reader(TinyDenoiser):
    """Waits for the device where it is told to."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x_t, t):
        return self.read(super().forward(x_t, t))


READS = {
    "backward": ReadsGradient.apply,
    "item": lambda x: x * x.detach().sum().item(),
    "float": lambda x: x * float(x.detach().sum()),
    "branch": lambda x: x if x.detach().sum() > 0 else 2 * x,
    "tolist": lambda x: x * x.detach().sum().tolist(),
    "numpy": lambda x: x * float(x.detach().numpy().sum()),
    "to the host": lambda x: x * x.detach().sum().cpu(),
    "from the host": lambda x: x * torch.tensor([2.0]),
    "nonzero": lambda x: x + len(x.detach().nonzero()),
    "mask": lambda x: x + x[x.detach() > 0].sum(),
    "mask written": lambda x: x.index_put((x.detach() > 0,), x.new_zeros(())),
    "equal": lambda x: x if torch.equal(x, 2 * x) else 2 * x,
    "unique": lambda x: x + len(torch.unique(x.detach())),
    "masked_select": lambda x: x + x.masked_select(x.detach() > 0).sum(),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_a_step_that_waits_is_found(read):
    model = Reader(read)
    run = Unlearner(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        SCHEDULE,
        Vanilla(),
        retain=stores()[1],
        batch_size=4,
    )
    run.step()
    with pytest.raises(HostSync), no_host_sync():
        run.step()


def test_an_optimizer_that_waits_is_found():
    run = unlearner(Vanilla())
    # neither fused nor capturable: reads its step count, and the step reads `finite`
    run.optimizer = torch.optim.AdamW(run.model.parameters())
    run.step()
    with pytest.raises(HostSync), no_host_sync():
        run.step()


def test_splitting_rows_by_their_weights_is_found():
    """What SISS does on a CPU, where it is no wait, is what the other tests would find on an accelerator."""
    run = unlearner(SISS())
    run.step()
    with pytest.raises(HostSync, match="tolist"), no_host_sync():
        run.step()


def test_own_ops_are_looked_into(monkeypatch):
    from fastunlearn.ops import _library

    monkeypatch.setenv("FASTUNLEARN_BACKEND", "eager")
    monkeypatch.setattr(
        _library,
        "_one_or_all",
        lambda outputs: (outputs[0].sum().item(), outputs if len(outputs) > 1 else outputs[0])[1],
    )
    run = unlearner(Vanilla())
    run.step()
    with pytest.raises(HostSync), no_host_sync():
        run.step()


def test_a_copy_between_devices_is_found():
    with no_host_sync():
        torch.ones(2, device="meta").to(torch.float16)
        with pytest.raises(HostSync):
            torch.ones(2).to("meta")
        with pytest.raises(HostSync):
            torch.ones(2, device="meta").copy_(torch.ones(2))
        torch.ones(2, device="meta").copy_(torch.ones(2), non_blocking=True)


def test_last_lr_is_read_when_it_is_asked_for():
    run = unlearner(Vanilla())
    run.optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
    run.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(run.optimizer, lambda step: 0.5**step)
    assert run.last_lr is None
    run.step()
    assert (run.last_lr, run.optimizer.param_groups[0]["lr"]) == (0.25, 0.125)


# --- on a GPU

ON_GPU = [(method, "plain") for method in reversed(METHODS)]  # the cheapest first: it is rehearsed on CPUs
ON_GPU += [
    (method, name)
    for method in (ReTrack(k=2), SISS())
    for name in OPTIONS
    if name not in ("plain", "loss scale")
]


def assert_never_waits(gpu, run, replay):
    for _ in range(5):  # with replay: warm-up and capture, which waits
        run.step()
    assert run.replayed == replay
    with gpu.waiting_raises():
        for _ in range(3):
            run.step()
    assert run.skipped_steps == 0


@pytest.mark.gpu
@pytest.mark.parametrize("replay", [True, False])
@pytest.mark.parametrize(("method", "options"), ON_GPU, ids=str)
def test_cuda_says_so_too(gpu, method, options, replay):
    run = unlearner(method, gpu.device, replay=replay, **OPTIONS[options])
    run.ema = Average(run.model.parameters())
    run.lr_scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(run.optimizer, 10)
    assert_never_waits(gpu, run, replay)


@pytest.mark.gpu
@pytest.mark.parametrize("replay", [True, False])
def test_cuda_says_so_of_a_selection_too(gpu, replay):
    assert_never_waits(gpu, unlearner(SISS(), gpu.device, replay=replay, **EVERYTHING), replay)


@pytest.mark.gpu
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_functional_steps_on_a_gpu(gpu, step):
    model, images = TinyDenoiser().to(gpu.device), torch.rand(3, 6, 1, 8, 8, device=gpu.device) * 2 - 1
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    step(model, optimizer, SCHEDULE, images=images, compile=False)
    with gpu.waiting_raises():
        output = step(model, optimizer, SCHEDULE, images=images, compile=False)
    assert not output.skipped


@pytest.mark.gpu
def test_a_step_that_waits_is_found_on_a_gpu(gpu):
    """CUDA's own check can fail, too."""
    model = Reader(READS["item"]).to(gpu.device)
    run = Unlearner(
        model,
        torch.optim.AdamW(model.parameters(), fused=True),
        SCHEDULE,
        Vanilla(),
        retain=stores()[1],
        batch_size=2,
        compile=False,
        replay=False,
    )
    run.step()
    with pytest.raises((HostSync, RuntimeError)), gpu.waiting_raises():
        run.step()
    gpu.synchronize()
    run.step()
