"""accelerate around a step: what it prepared is seen through; what updates parameters elsewhere, refused."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
import runs
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
    retrack_step,
    siss_step,
    vanilla_step,
)
from fastunlearn.engine import replay
from fastunlearn.engine.replay import WARM_UP_STEPS, Replay
from fastunlearn.host import say
from fastunlearn.methods import Pass
from fastunlearn.reference import combine, objectives
from fastunlearn.reference import noising as literal_noising
from fastunlearn.runs.training import unlearn
from fastunlearn.step.update import _skips_on_device
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule, redirect_inputs
from fastunlearn.testing.host_sync import TapeGraphs

accelerate = pytest.importorskip("accelerate")
deepspeed = pytest.importorskip("accelerate.utils.deepspeed")  # DeepSpeed itself is not needed for it
SCHEDULE = linear_schedule()
ROWS = 4  # of a micro-batch
PARTS = 4  # micro-batches of an update


@pytest.fixture(autouse=True)
def fresh_state():
    """accelerate's state is the process's."""
    yield
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def images(count: int = ROWS, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def nan() -> Draws:
    return Draws(retain_noise=torch.full((ROWS, 1, 8, 8), float("nan")))


class Loop:
    """What a training script has after `accelerator.prepare`."""

    def __init__(
        self, *, accumulation: int = 1, fused: bool = True, scaler: bool = False, decay: float = 0.5
    ):
        self.accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
        if scaler:  # what mixed_precision="fp16" makes on a GPU
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        self.plain = torch.optim.AdamW((model := TinyDenoiser()).parameters(), lr=1e-2, fused=fused)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(self.plain, decay)
        self.model, self.optimizer, self.scheduler = self.accelerator.prepare(model, self.plain, scheduler)
        assert type(self.optimizer).__name__ == "AcceleratedOptimizer"

    @property
    def lr(self) -> float:
        return self.plain.param_groups[0]["lr"]


# --- the papers' loop ---------------------------------------------------------------------------------------


def siss_reference(model: nn.Module, batch: SimpleNamespace) -> list[torch.Tensor]:
    """SISS' own loop: both losses of each micro-batch, divided by their number, accumulated, combined."""
    parameters = list(model.parameters())
    sums = [[torch.zeros_like(parameter) for parameter in parameters] for _ in range(2)]
    for part in range(PARTS):
        own = slice(part * ROWS, (part + 1) * ROWS)
        retain, forget, noise, timesteps, chosen = (
            value[own]
            for value in (batch.retain, batch.forget, batch.noise, batch.timesteps, batch.from_forget)
        )
        noisy = tuple(literal_noising(rows, noise, timesteps, SCHEDULE) for rows in (retain, forget))
        outputs = tuple(model(x_t, SCHEDULE.model_input(timesteps)) for x_t in noisy)
        losses = objectives.siss_two_forward_losses(
            outputs, (retain, forget), noisy, (timesteps, timesteps), chosen, SCHEDULE, 0.5
        )
        for total, loss in zip(sums, losses, strict=True):
            for summed, gradient in zip(
                total, torch.autograd.grad(loss / PARTS, parameters, retain_graph=True), strict=True
            ):
                summed += gradient
    return combine.rescale(*sums, 2.0).gradients


def retrack_reference(model: nn.Module, batch: SimpleNamespace) -> list[torch.Tensor]:
    parameters = list(model.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for part in range(PARTS):
        own = slice(part * ROWS, (part + 1) * ROWS)
        retain, forget, noise, timesteps, neighbors = (
            value[own]
            for value in (batch.retain, batch.forget, batch.noise, batch.timesteps, batch.neighbors)
        )
        noisy = [literal_noising(rows, noise, timesteps, SCHEDULE) for rows in (retain, forget)]
        kept, redirected = (model(x_t, SCHEDULE.model_input(timesteps)) for x_t in noisy)
        loss = objectives.retrack_loss(redirected, noisy[1], neighbors, timesteps, kept, noise, SCHEDULE, 0.3)
        for summed, gradient in zip(total, torch.autograd.grad(loss / PARTS, parameters), strict=True):
            summed += gradient
    return total


def whole_batch() -> SimpleNamespace:
    rows = ROWS * PARTS
    generator = torch.Generator().manual_seed(3)
    inputs = redirect_inputs(rows, 3, dtype=torch.float64, timesteps=300)
    retain = (
        inputs.forget + 0.02 * torch.randn(inputs.forget.shape, generator=generator, dtype=torch.float64)
    ).clamp(-1, 1)
    timesteps = torch.randint(150, 900, (rows,), generator=generator)
    return SimpleNamespace(
        forget=inputs.forget, neighbors=inputs.neighbors, retain=retain, noise=inputs.noise,
        timesteps=timesteps, from_forget=torch.arange(rows) % 2 == 0,
    )  # fmt: skip


def a_step(name: str, loop: Loop, batch: SimpleNamespace, own: slice = slice(None), **options):
    draws = {
        f"{branch}_{what}": value[own]
        for branch in ("forget", "retain")
        for what, value in (("noise", batch.noise), ("timesteps", batch.timesteps))
    }
    if name == "siss":
        draws = Draws(**draws, from_forget=batch.from_forget[own])
        more = {"lambd": 0.5, "scaling_norm": 2.0, "draws": draws} | options
        return siss_step(loop.model, loop.optimizer, SCHEDULE, batch.forget[own], batch.retain[own], **more)
    more = {"lambd": 0.3, "draws": Draws(**draws)} | options
    return retrack_step(
        loop.model,
        loop.optimizer,
        SCHEDULE,
        batch.forget[own],
        batch.neighbors[own],
        batch.retain[own],
        **more,
    )


@pytest.mark.parametrize("name", ["siss", "retrack"])
def test_the_papers_accumulation_is_refused_and_micro_batches_give_its_update(name):
    """In the papers' loop an iteration brings a part of the update's rows; here one call brings all."""
    batch = whole_batch()
    loop = Loop(accumulation=PARTS)
    loop.model.double()
    loop.plain = torch.optim.SGD(loop.model.parameters(), lr=1.0)
    loop.optimizer = loop.accelerator.prepare(loop.plain)
    before = flat(loop.model).clone()
    for part in range(PARTS - 1):
        with (
            loop.accelerator.accumulate(loop.model),
            pytest.raises(
                ValueError, match=r"optimizer: expected one call with all rows .* micro_batch_size"
            ),
        ):
            a_step(name, loop, batch, slice(part * ROWS, (part + 1) * ROWS))
    assert torch.equal(flat(loop.model), before)

    expected = torch.cat(
        [
            gradient.flatten()
            for gradient in {"siss": siss_reference, "retrack": retrack_reference}[name](loop.model, batch)
        ]
    )
    with loop.accelerator.accumulate(loop.model):  # the fourth iteration, which makes the update
        output = a_step(name, loop, batch, micro_batch_size=ROWS, max_grad_norm=None)
    assert not output.skipped
    assert relative_l2([before - flat(loop.model)], [expected]) <= 1e-9


def test_the_iteration_that_updates_is_taken():
    loop = Loop(accumulation=2)
    for iteration in range(4):
        with loop.accelerator.accumulate(loop.model):
            if iteration % 2:
                vanilla_step(loop.model, loop.optimizer, SCHEDULE, images())
            else:
                with pytest.raises(ValueError, match="sync_gradients is False"):
                    vanilla_step(loop.model, loop.optimizer, SCHEDULE, images())


def test_an_unprepared_optimizer_updates_and_says_so(caplog):
    """As in a loop of accelerate's own, which cannot hold it back either."""
    say.once.cache_clear()
    loop = Loop(accumulation=2)
    for _ in range(4):
        before = flat(loop.model).clone()
        with loop.accelerator.accumulate(loop.model), caplog.at_level(logging.WARNING, "fastunlearn"):
            vanilla_step(loop.model, loop.plain, SCHEDULE, images())
        assert not torch.equal(flat(loop.model), before)
    assert (
        len([record for record in caplog.records if "this optimizer is not prepared" in record.getMessage()])
        == 1
    )
    say.once.cache_clear()


# --- what is seen through -----------------------------------------------------------------------------------


STEPS = {
    "vanilla": lambda *a, **k: vanilla_step(*a, images(), **k),
    "siss": lambda *a, **k: siss_step(*a, images(), images(seed=1), **k),
    "erasediff": lambda *a, **k: erasediff_step(*a, images(), images(seed=1), **k),
}


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", STEPS)
def test_prepared_and_unprepared_take_the_same_steps(name, fused, scaler):
    """With a scaler given as `accelerator.scaler`, or found in the optimizer."""
    results = []
    for prepared, given in ((False, True), (True, True), (True, False)):
        loop = Loop(fused=fused, scaler=scaler)
        optimizer = loop.optimizer if prepared else loop.plain
        grad_scaler = loop.accelerator.scaler if given else None
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            assert not STEPS[name](
                loop.model, optimizer, SCHEDULE, generator=generator, grad_scaler=grad_scaler
            ).skipped
        if scaler:
            assert loop.accelerator.scaler._growth_tracker == 3  # it was used, and updated
        results.append(flat(loop.model))
    assert torch.equal(results[1], results[0])
    assert torch.equal(results[2], results[0])


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_a_scheduler_stands_still_after_a_skipped_step(fused, scaler):
    loop = Loop(fused=fused, scaler=scaler)
    rates = []
    for draws in (Draws(), nan(), Draws(), nan(), nan(), Draws()):
        output = vanilla_step(loop.model, loop.optimizer, SCHEDULE, images(), draws=draws)
        loop.scheduler.step()
        assert (
            bool(output.skipped)
            == loop.optimizer.step_was_skipped
            == loop.accelerator.optimizer_step_was_skipped
            == bool(draws.given())
        )
        rates.append(loop.lr)
    assert rates == [5e-3, 5e-3, 2.5e-3, 2.5e-3, 2.5e-3, 1.25e-3]


def test_whether_a_step_was_skipped_stays_on_the_device():
    """The step hands accelerate the tensor that it reports: nobody has read it yet."""
    loop = Loop()
    output = vanilla_step(loop.model, loop.optimizer, SCHEDULE, images())
    assert loop.optimizer.step_was_skipped is output.skipped


def test_the_rest_of_a_loop_changes_nothing():
    """What a training script does after its backward pass, left in place after a step that did it all."""
    loop, alone = Loop(), Loop()
    rates = []
    for seed, draws in enumerate((Draws(), nan(), Draws())):
        for each in (loop, alone):
            vanilla_step(
                each.model,
                each.optimizer,
                SCHEDULE,
                images(),
                draws=draws,
                generator=torch.Generator().manual_seed(seed),
            )
        loop.accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.optimizer.step()
        loop.scheduler.step()
        loop.optimizer.zero_grad()
        alone.scheduler.step()
        rates.append(loop.lr)
    assert rates == [5e-3, 5e-3, 2.5e-3]
    assert torch.equal(flat(loop.model), flat(alone.model))


@pytest.mark.parametrize("scaler", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_a_skipped_step_is_forgotten_when_the_loop_takes_one_of_its_own(fused, scaler):
    """Training goes on with accelerate alone: without a scaler it would say "skipped" for ever."""
    loop = Loop(fused=fused, scaler=scaler)
    vanilla_step(loop.model, loop.optimizer, SCHEDULE, images(), draws=nan())
    rates = []
    for _ in range(2):
        loop.accelerator.backward(sum(parameter.square().sum() for parameter in loop.model.parameters()))
        loop.optimizer.step()
        loop.optimizer.zero_grad()
        loop.scheduler.step()
        rates.append(loop.lr)
    assert rates == [5e-3, 2.5e-3]
    assert not loop.optimizer.step_was_skipped
    for draws in (nan(), Draws(), nan()):  # and the other way round
        vanilla_step(loop.model, loop.optimizer, SCHEDULE, images(), draws=draws)
        assert bool(loop.optimizer.step_was_skipped) == bool(draws.given())
    assert len(loop.plain._optimizer_step_post_hooks) == 1


def test_a_fused_optimizer_skips_on_the_device():
    """The host decides nothing: `found_inf` reaches the optimizer in the wrapper."""
    loop, seen = Loop(), []
    loop.plain.register_step_pre_hook(lambda optimizer, *_: seen.append(optimizer.found_inf.item()))
    before = flat(loop.model).clone()
    vanilla_step(loop.model, loop.optimizer, SCHEDULE, images(), draws=nan())
    assert torch.equal(flat(loop.model), before)
    vanilla_step(loop.model, loop.optimizer, SCHEDULE, images())
    assert seen == [1.0, 0.0]


def test_another_scaler_than_the_optimizers():
    loop = Loop(scaler=True)
    with pytest.raises(
        ValueError, match=r"grad_scaler: expected accelerator.scaler.*, got another GradScaler"
    ):
        vanilla_step(loop.model, loop.optimizer, SCHEDULE, images(), grad_scaler=torch.amp.GradScaler("cpu"))


def test_a_disabled_scaler_is_none():
    loop = Loop()
    loop.accelerator.scaler = accelerate.utils.modeling.get_grad_scaler(enabled=False)
    vanilla_step(loop.model, loop.optimizer, SCHEDULE, images(), grad_scaler=loop.accelerator.scaler)
    with pytest.raises(
        TypeError, match=r"grad_scaler: expected a torch.amp.GradScaler or None, got GradScalerKwargs"
    ):
        vanilla_step(
            loop.model, loop.optimizer, SCHEDULE, images(), grad_scaler=accelerate.GradScalerKwargs()
        )


def test_several_processes_need_a_way_to_each_other():
    """A prepared optimizer of two processes with the bare network: each process would train its own."""
    loop = Loop()
    loop.optimizer.accelerator_state = SimpleNamespace(num_processes=2, distributed_type=None)
    with pytest.raises(
        ValueError,
        match=r"process_group: expected torch.distributed.group.WORLD, or the model as .*, got None",
    ):
        vanilla_step(loop.model, loop.optimizer, SCHEDULE, images())
    with pytest.raises(ValueError, match="process_group: expected"):
        Unlearner(loop.model, loop.optimizer, SCHEDULE, Vanilla(), retain=store(), batch_size=ROWS)


def test_processes_that_do_not_know_of_each_other(monkeypatch, caplog):
    """DistributedDataParallel hidden in a function is one way to get there: it reduces nothing of a step."""
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    say.once.cache_clear()
    with caplog.at_level(logging.WARNING, "fastunlearn"):
        vanilla_step(model, optimizer, SCHEDULE, images())
        assert not caplog.records
        monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
        for _ in range(2):
            vanilla_step(lambda x, t: model(x, t), optimizer, SCHEDULE, images())
        vanilla_step(model, None, SCHEDULE, images())  # what is left in .grad, the caller may reduce
    (record,) = caplog.records
    assert "2 processes run together" in record.getMessage()
    say.once.cache_clear()


def test_xla_devices_are_refused():
    loop = Loop()
    loop.optimizer.accelerator_state = SimpleNamespace(
        num_processes=1, distributed_type=accelerate.DistributedType.XLA
    )
    with pytest.raises(
        TypeError, match="optimizer: expected a prepared optimizer on CPUs or GPUs, got one on XLA devices"
    ):
        vanilla_step(loop.model, loop.optimizer, SCHEDULE, images())


# --- Unlearner ----------------------------------------------------------------------------------------------


def store(count: int = 12, seed: int = 5) -> ImageStore:
    return ImageStore(
        torch.randint(
            0, 256, (count, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
        )
    )


def vanilla_run(model: nn.Module, **options) -> Unlearner:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=store(), batch_size=2, **options)


def unlearner(loop: Loop, method=None, *, prepared: bool = True, **options) -> Unlearner:
    optimizer = loop.optimizer if prepared else loop.plain
    scheduler = loop.scheduler if prepared else loop.scheduler.scheduler
    stores = {"forget": store(4, 6), "retain": store()}
    return Unlearner(
        loop.model,
        optimizer,
        SCHEDULE,
        method or Vanilla(),
        **stores,
        batch_size=ROWS,
        lr_scheduler=scheduler,
        **options,
    )


@pytest.mark.parametrize("method", [Vanilla(), SISS(), EraseDiff(), ReTrack(k=2)], ids=str)
def test_an_unlearner_takes_prepared_objects(method):
    results = []
    for prepared in (False, True):
        run = unlearner(Loop(scaler=True), method, prepared=prepared)
        assert type(run.optimizer) is torch.optim.AdamW  # what replay and checkpoints deal with
        assert type(run.lr_scheduler) is torch.optim.lr_scheduler.ExponentialLR
        assert (run.grad_scaler is not None) == prepared
        for _ in range(3):
            run.step()
        results.append((flat(run.model), run.last_lr))
    torch.testing.assert_close(
        results[1], results[0], rtol=1e-4, atol=1e-6
    )  # the scale is a power of two, and AdamW knows an eps


@pytest.mark.parametrize(("first", "second"), [(True, True), (True, False), (False, True)])
def test_a_run_is_resumed_prepared_or_not(tmp_path, first, second):
    whole, one, two = (
        unlearner(Loop(decay=0.9), SISS(), prepared=prepared) for prepared in (first, first, second)
    )
    unlearn(whole, num_steps=6, output_dir=tmp_path / "whole", show_progress=False)
    parts = {"output_dir": tmp_path / "parts", "show_progress": False}
    unlearn(one, num_steps=3, keep_checkpoints=True, **parts)
    runs.unfinish(tmp_path / "parts", 3)
    unlearn(two, num_steps=6, resume_from_checkpoint="latest", **parts)
    assert torch.equal(flat(two.model), flat(whole.model))
    assert two.last_lr == whole.last_lr


@pytest.mark.parametrize("optimizer", ["prepared", "unprepared"])
def test_a_prepared_scheduler_of_an_unlearner_stands_still_after_a_skipped_step(optimizer):
    loop = Loop()
    run = unlearner(loop)
    if optimizer == "unprepared":
        run = Unlearner(
            loop.model,
            loop.plain,
            SCHEDULE,
            Vanilla(),
            retain=store(),
            batch_size=ROWS,
            lr_scheduler=loop.scheduler,
        )
    rates = []
    for draws in (None, nan(), None):
        run.step(draws)
        rates.append(loop.lr)
    assert rates == [5e-3, 5e-3, 2.5e-3]
    plain = unlearner(Loop(), prepared=False)
    plain.step()
    plain.step(nan())
    assert plain.optimizer.param_groups[0]["lr"] == 2.5e-3  # as before: it goes on after every step


def test_a_prepared_optimizer_is_replayed(monkeypatch):
    """As a plain one; the wrapper hears of every replayed step."""
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])  # which reads, on CPUs only
    states = []
    for prepared in (False, True):
        loop = Loop()
        run = unlearner(loop, SISS(), prepared=prepared)
        for _ in range(2):  # the second time over an optimizer that has been used
            assert make_replay_obstacle(run) is None
            run._replay = Replay(TapeGraphs(), run.optimizer, [*run.model.parameters(), *run.model.buffers()])
            for _ in range(WARM_UP_STEPS + 3):
                output = run.step()
            assert run._replay.graphs.replays == 3
            assert not prepared or loop.optimizer.step_was_skipped is output.skipped
        states.append(flat(run.model))
    assert torch.equal(states[1], states[0])


def make_replay_obstacle(run: Unlearner) -> str | None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(replay.RECORDERS, "cpu", lambda device: TapeGraphs())
        return replay._obstacle(run.model, run.optimizer, run.device)


def test_an_unlearner_between_updates_is_refused():
    loop = Loop(accumulation=2)
    run = unlearner(loop)
    before = flat(loop.model).clone()
    with loop.accelerator.accumulate(loop.model), pytest.raises(ValueError, match="micro_batch_size"):
        run.step()
    assert torch.equal(flat(loop.model), before)
    assert run.step_index == 0
    with loop.accelerator.accumulate(loop.model):
        run.step()
    assert run.step_index == 1


@pytest.mark.parametrize(
    ("name", "value"),
    [("lr_scheduler", deepspeed.DummyScheduler(None)), ("lr_scheduler", 0.1), ("ema", 0.999)],
)
def test_what_has_no_step_is_refused_before_any(name, value):
    model = TinyDenoiser()
    text = (
        "lr_scheduler: expected"
        if name == "lr_scheduler"
        else r"ema: expected an object with .step\(parameters\) or None, got 0.999"
    )
    with pytest.raises(TypeError, match=text):
        vanilla_run(model, **{name: value})


# --- what updates elsewhere ---------------------------------------------------------------------------------


class Empty(torch.optim.SGD):
    def step(self, closure=None):
        """The backward pass has made the update."""


def of_module(module: str, base: type = torch.optim.SGD) -> type:
    """A class as a library that is not installed would have it, under a subclass of the caller's."""
    return type("Mine", (type("Theirs", (base,), {"__module__": module}),), {"__module__": __name__})


def test_deepspeeds_scheduler():
    model = TinyDenoiser()
    scheduler = object.__new__(deepspeed.DeepSpeedSchedulerWrapper)
    with pytest.raises(
        TypeError,
        match=r"lr_scheduler: expected one whose step\(\) .*, got DeepSpeedSchedulerWrapper of DeepSpeed",
    ):
        vanilla_run(model, lr_scheduler=scheduler)


def refused_optimizers(parameters):
    plain = torch.optim.SGD(parameters, lr=0.1)
    return {
        "accelerate's DeepSpeed": lambda: deepspeed.DeepSpeedOptimizerWrapper(plain),
        "accelerate's Megatron": lambda: of_module("accelerate.utils.megatron_lm")(parameters, lr=0.1),
        "DeepSpeed": lambda: of_module("deepspeed.runtime.zero.stage_1_and_2")(parameters, lr=0.1),
        "prepared DeepSpeed": lambda: accelerate.optimizer.AcceleratedOptimizer(
            of_module("deepspeed")(parameters, lr=0.1)
        ),
        "Horovod": lambda: of_module("horovod.torch.optimizer")(parameters, lr=0.1),
        "LOMO": lambda: of_module("lomo_optim.lomo")(parameters, lr=0.1),
        "an empty step": lambda: Empty(parameters, lr=0.1),
        "a prepared empty step": lambda: accelerate.optimizer.AcceleratedOptimizer(Empty(parameters, lr=0.1)),
    }


@pytest.mark.parametrize("name", list(refused_optimizers([nn.Parameter(torch.zeros(1))])))
def test_an_optimizer_whose_step_is_elsewhere(name):
    accelerate.Accelerator(cpu=True)
    model = TinyDenoiser()
    optimizer = refused_optimizers(list(model.parameters()))[name]()
    before = flat(model).clone()
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    with pytest.raises(
        TypeError, match=r"optimizer: expected .* update[sd] .*, got (Mine|Empty|DeepSpeedOptimizerWrapper)"
    ):
        vanilla_step(model, optimizer, SCHEDULE, images(), generator=generator)
    with pytest.raises(TypeError, match="optimizer: expected"):
        Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=store(), batch_size=2)
    assert torch.equal(flat(model), before)
    assert torch.equal(generator.get_state(), state)


@pytest.mark.parametrize(
    "module",
    ["deepspeed.runtime.engine", "megatron.core.distributed", "fairscale.nn", "accelerate.utils.megatron_lm"],
)
def test_a_model_that_is_spread_over_processes(module):
    model = of_module(module, TinyDenoiser)()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for call in (
        lambda: vanilla_step(model, optimizer, SCHEDULE, images()),
        lambda: vanilla_step(model, None, SCHEDULE, images()),
        lambda: Unlearner(model, optimizer, SCHEDULE, Vanilla(), retain=store(), batch_size=2),
    ):
        with pytest.raises(
            TypeError,
            match=r"model: expected whole parameters in every process, updated from .grad, got Mine of",
        ):
            call()


def test_a_name_that_only_begins_alike_is_not_refused():
    model = of_module("deepspeeder", TinyDenoiser)()
    vanilla_step(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images())


def test_deepspeeds_plain_optimizers_are_taken():
    """Its FusedAdam and CPUAdam, where no engine has them."""
    model = TinyDenoiser()
    optimizer = of_module("deepspeed.ops.adam.fused_adam")(model.parameters(), lr=0.1)
    before = flat(model).clone()
    assert not vanilla_step(model, optimizer, SCHEDULE, images()).skipped
    assert not torch.equal(flat(model), before)


@pytest.mark.parametrize(
    "mark", ["ds_id", "_is_flat_param", "_fsdp_flattened", "tensor_model_parallel", "_in_backward_optimizers"]
)
def test_marked_parameters(mark):
    """A part of a network may be spread where its outermost module is plain."""
    model = TinyDenoiser()
    setattr(model.leave.weight, mark, 0)  # DeepSpeed's first id
    with pytest.raises(TypeError, match="model: expected whole parameters, updated by the optimizer, got"):
        vanilla_step(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images())
    with pytest.raises(TypeError, match="model: expected whole parameters, updated by the optimizer, got"):
        vanilla_run(model)
    setattr(model.leave.weight, mark, False)  # Megatron says so of parameters that are whole
    vanilla_step(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images())


def test_fsdp(tmp_path):
    """The real one, of one process: as the model, and as a part of it."""
    fsdp = pytest.importorskip("torch.distributed.fsdp").FullyShardedDataParallel
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        for original in (False, True):
            model = fsdp(TinyDenoiser(), use_orig_params=original, device_id=torch.device("cpu"))
            for network in (model, lambda x, t, model=model: model(x, t)):
                with pytest.raises(TypeError, match=r"model: expected whole parameters.* FSDP"):
                    vanilla_step(network, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images())
    finally:
        torch.distributed.destroy_process_group()


def test_optimizer_in_the_backward_pass():
    model = TinyDenoiser()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.enter.weight.register_post_accumulate_grad_hook(lambda parameter: None)
    for given in (optimizer, None):
        text = r"model: expected .* hooks after accumulation.*several backward.*, got them on enter.weight"
        with pytest.raises(TypeError, match=text):
            vanilla_step(model, given, SCHEDULE, images())
    run = Unlearner(lambda x, t: model(x, t), optimizer, SCHEDULE, Vanilla(), retain=store(), batch_size=2)
    with pytest.raises(
        TypeError, match=r"hooks after accumulation.*, got them on a parameter of shape \(6, 1, 3, 3\)"
    ):
        run.step()


def test_hooks_of_tensors_and_optimizers_are_called():
    """A tensor's hook sees each backward pass on its own; what is linear in it (a mask) is right."""
    model, masked = TinyDenoiser(), TinyDenoiser()
    mask = (torch.arange(6) % 2).view(6, 1, 1, 1).float()
    masked.enter.weight.register_hook(lambda gradient: gradient * mask)
    seen = []
    for network in (model, masked):
        optimizer = torch.optim.SGD(network.parameters(), lr=1.0)
        optimizer.register_step_pre_hook(lambda *_: seen.append(1))
        vanilla_step(
            network,
            optimizer,
            SCHEDULE,
            images(),
            generator=torch.Generator().manual_seed(0),
            max_grad_norm=None,
            micro_batch_size=2,
        )
    start = TinyDenoiser().enter.weight
    torch.testing.assert_close(
        masked.enter.weight - start, (model.enter.weight - start) * mask, rtol=1e-5, atol=1e-6
    )
    assert seen == [1, 1]


def test_a_wrapper_that_looks_like_a_fused_optimizer():
    """As Lightning's: an AdamW by class and attributes, whose step() is another's, blind to `found_inf`."""
    model = TinyDenoiser()
    inner = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)

    def step(self, closure=None):
        return inner.step(closure)

    outer = object.__new__(type("Outer", (torch.optim.AdamW,), {"step": step}))
    outer.__dict__ = vars(inner) | {"_optimizer": inner}
    assert _skips_on_device(inner)
    assert not _skips_on_device(outer)
    before = flat(model).clone()
    for scaler in (None, torch.amp.GradScaler("cpu")):
        assert vanilla_step(model, outer, SCHEDULE, images(), draws=nan(), grad_scaler=scaler).skipped
        assert torch.equal(flat(model), before)
    vanilla_step(model, outer, SCHEDULE, images())
    assert not torch.equal(flat(model), before)


class Blind(torch.optim.AdamW):
    """Says that it takes `found_inf`, as it inherits from an optimizer that does; its step() never looks."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter -= group["lr"] * parameter.grad


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_a_fused_optimizer_with_a_step_of_its_own(scaler):
    model = TinyDenoiser()
    optimizer = Blind(model.parameters(), lr=0.1, fused=True)
    before = flat(model).clone()
    assert vanilla_step(model, optimizer, SCHEDULE, images(), draws=nan(), grad_scaler=scaler).skipped
    assert torch.equal(flat(model), before)
    vanilla_step(model, optimizer, SCHEDULE, images(), grad_scaler=scaler)
    assert not torch.equal(flat(model), before)


def test_accelerate_is_not_imported_for_it(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "accelerate"]:
        monkeypatch.delitem(sys.modules, name)
    model = TinyDenoiser()
    vanilla_step(model, torch.optim.SGD(model.parameters(), lr=0.1), SCHEDULE, images())
    assert not any(name.partition(".")[0] == "accelerate" for name in sys.modules)
