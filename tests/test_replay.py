"""Replay, on a CPU with tapes in place of CUDA graphs: the same ops on the same memory, and no Python between
them.
"""

import copy
import logging

import pytest
import torch
from every_selection import EVERYTHING, SCHEDULED, TOTAL_STEPS
from torch import nn

from fastunlearn import SISS, Draws, EraseDiff, ImageStore, ReTrack, Unlearner, Vanilla, frozen_copy
from fastunlearn.engine import replay
from fastunlearn.engine.replay import WARM_UP_STEPS, Replay, make_replay
from fastunlearn.methods import Pass
from fastunlearn.objective.selection import Selection
from fastunlearn.objective.time import TimeWindow
from fastunlearn.runs.identity import identity
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import TapeGraphs
from fastunlearn.testing.methods import compared_with, every_variant

METHODS = [ReTrack(k=1, lambd=1.0), *every_variant(k=2)]
SCHEDULE = linear_schedule()
LR = 2.0**-10  # the same number in float32, in which the device holds it


@pytest.fixture(autouse=True)
def as_on_an_accelerator(monkeypatch):
    """On a CPU the step reads weights, to leave out rows that count nothing; no other device does."""
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])


def make(method=None, *, replayed, model=None, optimizer=None, lr=LR, required=False, **options):
    """An Unlearner on a CPU, with a tape if `replayed`."""
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    model = TinyDenoiser() if model is None else model
    optimizer = (
        torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        if optimizer is None
        else optimizer(model.parameters())
    )
    method = SISS() if method is None else method
    run = Unlearner(
        model,
        optimizer,
        SCHEDULE,
        method,
        forget=ImageStore(images[:4]),
        retain=ImageStore(images[4:]),
        **{"batch_size": 6, **compared_with(method, TinyDenoiser(seed=1)), **options},
    )
    if replayed:
        run._replay = Replay(
            TapeGraphs(), optimizer, [*model.parameters(), *model.buffers()], required=required
        )
    return run


def pair(*args, **options):
    """The same run eagerly and replayed."""
    return make(*args, replayed=False, **options), make(*args, replayed=True, **options)


def state(run):
    moments = [value for entry in run.optimizer.state.values() for _, value in sorted(entry.items())]
    return torch.cat([tensor.detach().flatten() for tensor in (*run.model.parameters(), *moments)])


def assert_same_steps(eager, other, count=1):
    """`count` steps of both runs report and do the same, to the last bit."""
    # compared afterwards: a later step leaves them alone
    outputs = [(eager.step(), other.step()) for _ in range(count)]
    for one, two in outputs:
        for name, expected, got in zip(one._fields, one, two, strict=True):
            assert (expected is None) == (got is None), name
            if expected is not None:
                assert (got.dtype, got.shape) == (expected.dtype, expected.shape), name
                assert torch.equal(got, expected), f"{name}: expected {expected}, got {got}"
    assert torch.equal(state(eager), state(other))
    assert torch.equal(eager._counter, other._counter)
    assert (eager.step_index, eager.last_lr, eager.skipped_steps) == (
        other.step_index,
        other.last_lr,
        other.skipped_steps,
    )


def captured(*args, **options):
    """`pair`, at the point where the second has begun to replay."""
    eager, other = pair(*args, **options)
    assert_same_steps(eager, other, WARM_UP_STEPS + 2)
    assert other.replayed
    return eager, other


@pytest.mark.parametrize(
    "options",
    [{"micro_batch_size": 4}, {"autocast_dtype": torch.bfloat16}, {"max_grad_norm": None}],
    ids=str,
)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_replayed_steps_are_the_eager_ones(method, options):
    eager, other = pair(method, **options)
    assert_same_steps(eager, other, WARM_UP_STEPS)
    assert not other.replayed
    assert_same_steps(eager, other, 3)
    graphs = other._replay.graphs
    assert (graphs.warm_ups, graphs.captures, graphs.replays) == (WARM_UP_STEPS, 1, 3)


def test_a_learning_rate_is_rounded_to_float32_and_no_further():
    eager, other = pair(lr=1e-3)
    for _ in range(8):
        eager.step(), other.step()
    torch.testing.assert_close(state(other), state(eager), rtol=1e-5, atol=1e-7)


def test_python_does_not_run_any_more():
    class Counting(TinyDenoiser):
        calls = 0

        def forward(self, x_t, t):
            self.calls += 1
            return super().forward(x_t, t)

    other = make(Vanilla(), replayed=True, model=Counting())
    for _ in range(WARM_UP_STEPS + 1):
        other.step()
    calls = other.model.calls
    other.step()
    assert other.model.calls == calls


def test_a_step_that_reads_its_number_on_the_host_would_be_seen(monkeypatch):
    """The tape is as blind as a graph: a step that takes its number from Python repeats the captured one."""
    whole = Unlearner._step_on_device

    def from_the_host(self, draws=None):
        self._counter[1].fill_(self.step_index)
        return whole(self, draws)

    monkeypatch.setattr(Unlearner, "_step_on_device", from_the_host)
    other = make(Vanilla(), replayed=True, lr=0.0)
    losses = [other.step().loss.item() for _ in range(WARM_UP_STEPS + 3)]
    assert len(set(losses)) == WARM_UP_STEPS + 1
    assert losses[-1] == losses[-2] == losses[-3]


def test_a_gradient_that_the_caller_leaves_is_added_eagerly(caplog):
    """It lies in other memory each time. The graph stays, for the steps that find none."""
    eager, other = pair(keep_grad=True)
    assert_same_steps(eager, other, WARM_UP_STEPS + 2)
    for _ in range(2):
        for run in (eager, other):
            sum(parameter.square().sum() for parameter in run.model.parameters()).backward()
        with caplog.at_level(logging.INFO, "fastunlearn"):
            assert_same_steps(eager, other)
        assert_same_steps(eager, other)
    assert "gradients that the caller left in .grad: such steps run eagerly" in caplog.text
    assert (other._replay.graphs.captures, other._replay.graphs.replays) == (1, 4)


def test_a_gradient_that_the_caller_leaves_is_not_dropped_by_a_replay():
    other = make(replayed=True)
    for _ in range(WARM_UP_STEPS + 2):
        other.step()
    first = next(other.model.parameters())
    first.grad = torch.zeros_like(first)
    with pytest.raises(ValueError, match="keep_grad: expected"):
        other.step()
    first.grad = None
    other.step()


def test_outputs_outlive_later_steps():
    other = make(replayed=True)
    outputs = [other.step() for _ in range(WARM_UP_STEPS + 4)]
    before = [output.loss.clone() for output in outputs]
    other.step()
    assert len({loss.item() for loss in before}) == len(before)
    assert all(torch.equal(output.loss, loss) for output, loss in zip(outputs, before, strict=True))


def test_dropout_draws_anew_at_every_replay():
    other = make(
        Vanilla(),
        replayed=True,
        model=nn.Sequential(nn.Conv2d(1, 1, 1), nn.Dropout(0.5)).requires_grad_(True),
        lr=0.0,
    )
    forward = other.model.forward
    other.model.forward = lambda x_t, t: forward(x_t)
    drawn = other._draw(Draws())
    other._draw = lambda draws: drawn  # the same rows, timesteps and noise at every step
    assert len({other.step().loss.item() for _ in range(WARM_UP_STEPS + 4)}) == WARM_UP_STEPS + 4


# --- learning rates, checkpoints


@pytest.mark.parametrize("scheduler", [
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
    lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.25),
    lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 4)),
])  # fmt: skip
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_scheduler_moves_the_learning_rate_of_replayed_steps(kind, scheduler):
    eager, other = pair(
        Vanilla(),
        optimizer=lambda parameters: kind(
            parameters, lr=LR, fused=True, **({"momentum": 0.9} if kind is torch.optim.SGD else {})
        ),
    )
    for run in (eager, other):
        run.lr_scheduler = scheduler(run.optimizer)
    assert_same_steps(eager, other, 9)
    assert other._replay.graphs.captures == 1


def test_a_tensor_as_learning_rate():
    eager, other = captured(
        Vanilla(), optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=torch.tensor(LR), fused=True)
    )
    for run in (eager, other):
        run.optimizer.param_groups[0]["lr"].fill_(LR / 4)
    assert_same_steps(eager, other, 2)
    assert other._replay.graphs.captures == 1
    assert other.last_lr == LR / 4


def test_param_groups_have_rates_of_their_own():
    def groups(parameters):
        first, *rest = parameters
        return torch.optim.AdamW([{"params": [first], "lr": LR}, {"params": rest, "lr": LR / 8}], fused=True)

    eager, other = captured(optimizer=groups)
    for run in (eager, other):
        run.optimizer.param_groups[1]["lr"] = LR / 2
    assert_same_steps(eager, other, 2)


def test_the_optimizer_looks_as_it_did():
    """What checkpoints, schedulers and the run record see does not tell whether steps were replayed."""
    eager, other = captured()
    assert other.optimizer.state_dict()["param_groups"] == eager.optimizer.state_dict()["param_groups"]
    assert identity(other) == identity(eager)


@pytest.mark.parametrize(("first", "second"), [(True, False), (False, True), (True, True)])
def test_a_run_goes_on_replayed_or_not(first, second):
    whole, one, two = make(replayed=False), make(replayed=first), make(replayed=second)
    for _ in range(12):
        whole.step()
    for _ in range(6):
        one.step()
    for name in ("model", "optimizer"):
        getattr(two, name).load_state_dict(copy.deepcopy(getattr(one, name).state_dict()))
    two.load_state_dict(one.state_dict())
    for _ in range(6):
        two.step()
    assert torch.equal(state(two), state(whole))


# --- what makes a graph invalid, and what does not


def swap_memory(run):
    first = next(run.model.parameters())
    first.data = first.data.clone()


def load_optimizer(run):
    run.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))


CHANGES = {
    "max_grad_norm": lambda run: setattr(run, "max_grad_norm", 1e-3),
    "micro_batch_size": lambda run: setattr(run, "micro_batch_size", 2),
    "method": lambda run: setattr(run, "method", SISS(scaling_norm=0.1)),
    "eval()": lambda run: run.model.eval(),
    "eval() of a part": lambda run: next(run.model.children()).eval(),
    "weight_decay": lambda run: run.optimizer.param_groups[0].update(weight_decay=0.5),
    "requires_grad": lambda run: next(run.model.parameters()).requires_grad_(False),
    "selection": lambda run: setattr(run, "selection", Selection(TimeWindow(0, 100))),
    "total_steps": lambda run: setattr(run, "total_steps", 3),
    "memory of a parameter": swap_memory,
    "state of the optimizer": load_optimizer,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_what_the_graph_holds_as_a_constant_is_captured_anew(caplog, change):
    eager, other = captured()
    for run in (eager, other):
        change(run)
    with caplog.at_level(logging.INFO, "fastunlearn"):
        assert_same_steps(eager, other)
    assert "captured anew" in caplog.text
    assert not other.replayed
    assert_same_steps(eager, other, WARM_UP_STEPS + 2)
    assert other.replayed
    assert other._replay.graphs.captures == 2


def test_settings_that_never_stand_still_are_never_captured():
    eager, other = pair()
    for run in (eager, other):
        # cycles betas, too
        run.lr_scheduler = torch.optim.lr_scheduler.OneCycleLR(run.optimizer, max_lr=LR, total_steps=20)
    for _ in range(10):
        eager.step(), other.step()
    torch.testing.assert_close(state(other), state(eager), rtol=1e-5, atol=1e-7)
    assert other._replay.graphs.captures == 0


def test_another_place_in_the_run_needs_no_capture():
    eager, other = captured()
    for run in (eager, other):
        run.load_state_dict({"seed": 0, "step_index": 1000, "skipped_steps": 7})
    assert_same_steps(eager, other, 3)
    assert other.step_index == 1003
    assert other._replay.graphs.captures == 1


def test_weights_written_in_place_are_seen():
    eager, other = captured()
    for run in (eager, other):
        with torch.no_grad():
            for parameter in run.model.parameters():
                parameter.mul_(0.5)
    assert_same_steps(eager, other, 2)
    assert other._replay.graphs.captures == 1


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    _, other = captured()
    with torch.no_grad():
        next(other.model.parameters()).fill_(float("inf"))
    before = state(other).clone()
    assert other.step().skipped
    assert torch.equal(state(other), before)
    assert other.skipped_steps == 1
    assert other.replayed


def test_given_draws_are_taken_eagerly(caplog):
    eager, other = captured(Vanilla())
    draws = Draws(retain_timesteps=torch.full((6,), 300))
    with caplog.at_level(logging.INFO, "fastunlearn"):
        for _ in range(2):
            one, two = eager.step(draws), other.step(draws)
            assert torch.equal(one.loss, two.loss)
    assert len(caplog.records) == 1
    assert "draws that the caller gives" in caplog.text
    assert_same_steps(eager, other, 2)
    assert other._replay.graphs.captures == 1


def test_a_step_within_autocast_is_taken_eagerly(caplog):
    """Autocast keeps converted weights until it ends; a graph would go on reading them."""
    eager, other = captured(Vanilla())
    with caplog.at_level(logging.INFO, "fastunlearn"), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(eager.step().loss, other.step().loss)
    assert "an autocast context around the step" in caplog.text
    assert_same_steps(eager, other, 2)
    assert other._replay.graphs.captures == 1


def test_given_draws_are_an_error_where_replay_is_required():
    other = make(Vanilla(), replayed=True, required=True)
    with pytest.raises(
        ValueError, match="replay: expected a step that can be replayed, got draws that the caller gives"
    ):
        other.step(Draws(retain_timesteps=torch.full((6,), 300)))


# --- windows of time and bands of frequency


def test_replayed_steps_with_a_selection_are_the_eager_ones():
    """Before, at and after the last step of a band's schedule; all methods: test_every_combination.py."""
    eager, other = captured(SISS(), **EVERYTHING)
    assert_same_steps(eager, other, TOTAL_STEPS)
    assert (other._replay.graphs.captures, other._replay.graphs.replays) == (1, TOTAL_STEPS + 2)


@pytest.mark.parametrize("lowpass", SCHEDULED.values(), ids=SCHEDULED)
def test_the_band_of_a_replayed_step_is_that_of_its_number(lowpass):
    """Weights stand still, and the band of the captured step, which a graph could have kept, is another."""
    total_steps = 2 * TOTAL_STEPS
    other = make(ReTrack(k=2), replayed=True, lr=0.0, lowpass=lowpass, total_steps=total_steps)
    fixed, kept = (make(ReTrack(k=2), replayed=False, lr=0.0) for _ in range(2))
    moved = []
    for step in range(total_steps + 2):
        fixed.selection = Selection(lowpass=lowpass.at(step, total_steps))
        kept.selection = Selection(lowpass=lowpass.at(min(step, WARM_UP_STEPS), total_steps))
        loss, expected, stale = (run.step().forget_loss for run in (other, fixed, kept))
        torch.testing.assert_close(loss, expected)
        moved.append(not torch.isclose(loss, stale))
    assert other._replay.graphs.replays == total_steps + 2 - WARM_UP_STEPS
    assert not any(moved[: WARM_UP_STEPS + 1])
    assert all(moved[-total_steps // 2 :])


def test_a_band_of_another_length_is_captured_anew_and_followed():
    eager, other = captured(SISS(), **EVERYTHING)
    for run in (eager, other):
        run.total_steps = 3 * TOTAL_STEPS
    assert_same_steps(eager, other, WARM_UP_STEPS + 6)
    assert (other._replay.graphs.captures, other.replayed) == (2, True)
    for run in (eager, other):
        run.selection = Selection(lowpass=SCHEDULED["step_increase"], loss_weight="sigma_squared")
    assert_same_steps(eager, other, WARM_UP_STEPS + 6)
    assert (other._replay.graphs.captures, other.replayed) == (3, True)


def test_a_run_resumed_in_the_middle_of_a_band_is_replayed_from_there():
    eager, other = captured(ReTrack(k=2), **EVERYTHING)
    for run in (eager, other):
        run.load_state_dict({"seed": 0, "step_index": 2, "skipped_steps": 0})
    assert_same_steps(eager, other, 3)
    assert other._replay.graphs.captures == 1


# --- a capture that fails


class Waits(TinyDenoiser):
    def forward(self, x_t, t):
        return super().forward(x_t, t) * (1 + 0 * t[0].item())


def test_a_failed_capture_leaves_the_run_as_it_was(caplog):
    eager, other = (
        make(Vanilla(), replayed=False, model=Waits()),
        make(Vanilla(), replayed=True, model=Waits()),
    )
    with caplog.at_level(logging.WARNING, "fastunlearn"):
        assert_same_steps(eager, other, WARM_UP_STEPS + 3)
    assert len(caplog.records) == 1
    assert "could not be captured" in caplog.text
    assert "HostSync" in caplog.text
    assert not other.replayed
    assert other._replay.graphs.captures == 1  # not tried again
    assert other.optimizer.param_groups[0]["lr"] == LR


def test_a_failed_capture_is_an_error_where_replay_is_required():
    other = make(Vanilla(), replayed=True, required=True, model=Waits())
    for _ in range(WARM_UP_STEPS):
        other.step()
    with pytest.raises(RuntimeError, match="replay: the step could not be captured"):
        other.step()
    assert other.optimizer.param_groups[0]["lr"] == LR


# --- when there is replay


@pytest.fixture
def on_cuda(monkeypatch):
    """`make_replay` for a model that seems to lie on a GPU."""
    monkeypatch.setitem(replay.RECORDERS, "cuda", lambda device: TapeGraphs())
    monkeypatch.setattr(replay, "_elsewhere", lambda model, device: False)
    device = torch.device("cuda", 0)

    def choose(requested, model=None, optimizer=None, **options):
        model = TinyDenoiser() if model is None else model
        optimizer = (
            torch.optim.AdamW(TinyDenoiser().parameters(), fused=True) if optimizer is None else optimizer
        )
        return make_replay(requested, model, optimizer, device, **options)

    return choose


def test_on_by_default_on_a_gpu(on_cuda):
    assert isinstance(on_cuda(None), Replay)
    assert not on_cuda(None).required
    assert on_cuda(True).required
    assert on_cuda(False) is None


def hooked(register):
    model = TinyDenoiser()
    getattr(model.enter, register)(lambda *args: None)
    return model


def optimizer_with_hook():
    optimizer = torch.optim.AdamW(TinyDenoiser().parameters(), fused=True)
    optimizer.register_step_post_hook(lambda *args: None)
    return optimizer


class Derived(torch.optim.AdamW):
    pass


OBSTACLES = {
    "not fused": (
        {"optimizer": torch.optim.AdamW(TinyDenoiser().parameters())},
        "the optimizer AdamW, which is none of Adam",
    ),
    "another optimizer": (
        {"optimizer": torch.optim.RMSprop(TinyDenoiser().parameters())},
        "the optimizer RMSprop",
    ),
    "a subclass": ({"optimizer": Derived(TinyDenoiser().parameters(), fused=True)}, "the optimizer Derived"),
    "hooks of the optimizer": ({"optimizer": optimizer_with_hook()}, "an optimizer with hooks"),
    "a function": ({"model": lambda x_t, t: x_t}, "a model that is no torch.nn.Module, but function"),
    "forward hooks": ({"model": hooked("register_forward_hook")}, r"a model with hooks \(enter\)"),
    "backward hooks": ({"model": hooked("register_full_backward_hook")}, r"a model with hooks \(enter\)"),
    "what the caller knows": ({"forbidden": "several processes"}, "several processes"),
}


@pytest.mark.parametrize(("arguments", "reason"), OBSTACLES.values(), ids=OBSTACLES)
def test_what_stands_against_it_is_said(on_cuda, caplog, arguments, reason):
    with caplog.at_level(logging.INFO, "fastunlearn"):
        assert on_cuda(None, **arguments) is None
    assert len(caplog.records) == 1
    assert caplog.records[0].getMessage().startswith("replay: the step runs eagerly: ")
    with pytest.raises(ValueError, match=f"replay: expected a step that a CUDA graph can hold, got {reason}"):
        on_cuda(True, **arguments)
    caplog.clear()
    assert on_cuda(False, **arguments) is None
    assert not caplog.records


def test_checks_of_values_stand_against_it(on_cuda, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_CHECK", "1")
    with pytest.raises(ValueError, match="FASTUNLEARN_CHECK=1"):
        on_cuda(True)


def test_a_model_on_several_devices_stands_against_it(monkeypatch):
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with pytest.raises(ValueError, match="not on one device"):
        make_replay(True, model, optimizer, torch.device("cuda", 0))


def test_on_a_cpu_there_is_none(caplog):
    with caplog.at_level(logging.INFO, "fastunlearn"):
        assert make(replayed=False)._replay is None
    assert not caplog.records
    with pytest.raises(
        ValueError, match="replay: expected a step that a CUDA graph can hold, got parameters on cpu"
    ):
        make(replayed=False, replay=True)
    with pytest.raises(TypeError, match="replay: expected None, True or False, got 'yes'"):
        make(replayed=False, replay="yes")


def test_what_an_unlearner_knows_to_stand_against_it():
    assert make(replayed=False)._not_replayable() is None
    assert "grad_scaler" in make(replayed=False, grad_scaler=torch.amp.GradScaler("cpu"))._not_replayable()
    assert (
        make(replayed=False, grad_scaler=torch.amp.GradScaler("cpu", enabled=False))._not_replayable() is None
    )
    assert "forget, retain" in make(replayed=False, residency="host")._not_replayable()
    several = make(replayed=False)
    several.process_group = object()
    assert "several processes" in several._not_replayable()


def test_a_replayed_step_is_one_range(monkeypatch):
    from contextlib import nullcontext

    ranges = []
    _, other = captured()
    monkeypatch.setattr(replay, "stage", lambda name: (ranges.append(name), nullcontext())[1])
    other.step()
    assert ranges == ["step (replayed)"]


# --- on a GPU

ALSO = [{"micro_batch_size": 2}, {"autocast_dtype": torch.bfloat16}, {"max_grad_norm": None}]
CASES = [
    *((method, {}) for method in reversed(METHODS)),  # the cheapest first: it is rehearsed on CPUs
    *((method, options) for method in (ReTrack(k=2), SISS()) for options in ALSO),
    (EraseDiff(), {"micro_batch_size": 2, "autocast_dtype": torch.bfloat16}),
    *((method, EVERYTHING) for method in (ReTrack(k=2), SISS(), EraseDiff())),
]


def on_gpu(gpu, method=None, *, model=None, **options):
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    model = (TinyDenoiser() if model is None else model).to(gpu.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    options = {"batch_size": 3, "compile": False, "autocast_dtype": None} | options
    method = SISS() if method is None else method
    if "reference" in method.needs:
        options["reference_model"] = frozen_copy(model)
    return Unlearner(
        model,
        optimizer,
        SCHEDULE,
        method,
        forget=ImageStore(images[:4]),
        retain=ImageStore(images[4:]),
        **options,
    )


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "options"), CASES, ids=str)
def test_cuda_graphs_take_the_eager_steps(gpu, method, options):
    assert_replayed_as_eager(gpu, method, options)


@pytest.mark.gpu
@pytest.mark.parametrize("method", [ReTrack(k=2), SISS()], ids=str)
def test_cuda_graphs_of_compiled_steps_take_the_same(gpu, method):
    if gpu.device.type != "cuda":
        pytest.skip("cannot be rehearsed: TorchDynamo traces nothing under the mode of a tape")
    assert_replayed_as_eager(gpu, method, {"compile": True})


def assert_replayed_as_eager(gpu, method, options):
    """To rounding: a capture may choose other algorithms and orders of atomic sums.

    One step apart at most: chaos would hide an error otherwise.

    An update that is missing, made twice or of another step is off by as much as its own length.
    """
    eager, other = on_gpu(gpu, method, replay=False, **options), on_gpu(gpu, method, replay=True, **options)
    for step in range(WARM_UP_STEPS + 4):
        before = [parameter.detach().clone() for parameter in eager.model.parameters()]
        one, two = eager.step(), other.step()
        assert other.replayed == (step >= WARM_UP_STEPS)
        torch.testing.assert_close(
            two.loss, one.loss, rtol=2e-2 if "autocast_dtype" in options else 1e-3, atol=1e-5
        )
        updates = [
            [after.detach() - old for after, old in zip(run.model.parameters(), before, strict=True)]
            for run in (other, eager)
        ]
        assert relative_l2(*updates) < 0.5
        eager.model.load_state_dict(other.model.state_dict())
        eager.optimizer.load_state_dict(copy.deepcopy(other.optimizer.state_dict()))
    assert eager.step_index == other.step_index == int(other._counter[1])
    assert type(other._replay.graphs) is type(gpu.graphs())


@pytest.mark.gpu
def test_a_new_graph_takes_the_memory_of_the_old_one(gpu):
    if gpu.device.type != "cuda":
        pytest.skip("cannot be rehearsed: a tape has no pool of memory")
    other = on_gpu(gpu)
    reserved = []
    for norm in (1.0, 0.5, 0.25, 0.125):
        other.max_grad_norm = norm
        for _ in range(WARM_UP_STEPS + 2):
            other.step()
        assert other.replayed
        reserved.append(torch.cuda.memory_reserved(gpu.device))
    assert reserved[-1] <= reserved[1]


@pytest.mark.gpu
def test_dropout_of_a_cuda_graph(gpu):
    class Drops(TinyDenoiser):
        def forward(self, x_t, t):
            return nn.functional.dropout(super().forward(x_t, t), 0.5)

    other = on_gpu(gpu, Vanilla(), model=Drops())
    drawn = other._draw(Draws())
    other._draw = lambda draws: drawn
    other.optimizer.param_groups[0]["lr"] = 0.0
    assert len({other.step().loss.item() for _ in range(WARM_UP_STEPS + 4)}) == WARM_UP_STEPS + 4
    assert other.replayed


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD])
def test_a_scheduler_moves_the_learning_rate_of_a_cuda_graph(gpu, kind):
    """The last steps have rate 0: an update would be seen if the graph had kept the rate of its capture."""
    other = on_gpu(gpu, Vanilla())
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {"weight_decay": 0.0}
    optimizer = kind(other.model.parameters(), lr=LR, fused=True, **extra)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step < WARM_UP_STEPS + 3))
    run = Unlearner(
        other.model,
        optimizer,
        SCHEDULE,
        Vanilla(),
        retain=other.retain,
        batch_size=2,
        compile=False,
        replay=True,
        lr_scheduler=schedule,
    )
    for step in range(WARM_UP_STEPS + 5):
        before = torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()])
        run.step()
        moved = not torch.equal(
            torch.cat([parameter.detach().flatten() for parameter in run.model.parameters()]), before
        )
        assert moved == (step < WARM_UP_STEPS + 3)
    assert run.replayed


@pytest.mark.gpu
def test_a_step_of_a_cuda_graph_that_is_not_finite_is_skipped(gpu):
    other = on_gpu(gpu, Vanilla())
    for _ in range(WARM_UP_STEPS + 2):
        other.step()
    with torch.no_grad():
        next(other.model.parameters()).fill_(float("inf"))
    before = state(other).clone()
    assert other.step().skipped
    assert other.replayed
    assert torch.equal(state(other), before)
    assert other.skipped_steps == 1
