"""Timesteps that a caller gives: refused where they can be read, else NaN, never those at the other end."""

import copy

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastunlearn import (
    Draws,
    ImageStore,
    NoiseSchedule,
    Unlearner,
    erasediff_step,
    neggrad_step,
    reference,
    retrack_step,
    siss_step,
    vanilla_step,
)
from fastunlearn import functional as F
from fastunlearn.engine.replay import Replay
from fastunlearn.host import check
from fastunlearn.methods import Pass
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.host_sync import TapeGraphs, no_host_sync
from fastunlearn.testing.methods import compared_with, every_method

T = 1000
SHAPE = (4, 1, 8, 8)
SCHEDULES = {
    "epsilon": linear_schedule(),
    "v": linear_schedule(prediction_type="v_prediction"),
    "flow": linear_schedule(prediction_type="flow"),
}
SCHEDULE = SCHEDULES["epsilon"]
OUTSIDE = {"-1": -1, "T": T, "far below": -(2**62), "far above": 2**62}
ENDS = {  # schedules of two timesteps, of which the named one cannot be trained at
    "sigma = 0": (NoiseSchedule(torch.tensor([1.0, 0.6]), torch.tensor([0.0, 0.8])), 0),
    "alpha = 0": (NoiseSchedule(torch.tensor([0.6, 0.0]), torch.tensor([0.8, 1.0])), 1),
}


@pytest.fixture
def unread(monkeypatch):
    """As on a GPU: what lies on the device is not read."""
    monkeypatch.setattr(check, "readable", lambda tensor: False)
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])


def images(seed):
    return torch.rand(SHAPE, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def one_is(timestep, count=4):
    timesteps = torch.arange(count) % 2
    timesteps[1] = timestep
    return timesteps


# --- the lookup ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int16])
@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_every_timestep_within_finds_its_own_numbers(schedule, dtype):
    timesteps = torch.arange(T, dtype=dtype)
    table = schedule.coefficients(timesteps)
    assert torch.equal(table[:, 0], schedule.alpha)
    assert torch.equal(table[:, 1], schedule.sigma)
    assert torch.equal(schedule.model_input(timesteps), schedule.model_timesteps)
    assert torch.equal(schedule.coefficients(timesteps.flip(0)), table.flip(0))


def test_bytes_are_numbers_and_no_mask():
    """torch takes an index of uint8 for a mask."""
    timesteps = torch.tensor([0, 1, 1, 255], dtype=torch.uint8)
    assert torch.equal(SCHEDULE.coefficients(timesteps), SCHEDULE.coefficients(timesteps.long()))
    assert SCHEDULE.model_input(timesteps).tolist() == [0, 1, 1, 255]


def numbers_of(schedule, timesteps):
    return schedule.coefficients(timesteps), schedule.model_input(timesteps)


def compiled(schedule, timesteps):
    return torch.compile(numbers_of, fullgraph=True, backend="aot_eager")(schedule, timesteps)


@pytest.mark.parametrize("look_up", [numbers_of, compiled])
@pytest.mark.parametrize("timestep", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("name", SCHEDULES)
def test_outside_is_nan_where_nothing_is_read(name, timestep, look_up, unread):
    schedule = SCHEDULES[name]
    table, model_input = look_up(schedule, one_is(timestep))
    assert table[1].isnan().all()
    within = torch.tensor([0, 2, 3])
    assert torch.equal(table[within, 0], schedule.alpha[one_is(0)[within]])
    if name == "flow":
        assert model_input[1].isnan()
    else:
        assert model_input.tolist() == [
            0,
            0,
            0,
            1,
        ]  # an integer cannot say NaN: some timestep of the network's


@pytest.mark.parametrize("schedule", ENDS.values(), ids=ENDS)
def test_where_the_loss_is_not_defined_is_nan_too(schedule, unread):
    schedule, end = schedule
    table = schedule.coefficients(torch.tensor([end, 1 - end]))
    assert table[0].isnan().all()
    assert table[1].isfinite().all()


def test_compiled_without_any_patch():
    """Under torch.compile nothing is read, on a CPU neither."""
    table, _ = compiled(SCHEDULE, one_is(-1))
    assert table[1].isnan().all()
    assert torch.equal(table[0], SCHEDULE.coefficients(torch.tensor([0]))[0])


def test_fake_tensors_have_shapes_and_leave_no_trace():
    schedule = linear_schedule()
    with FakeTensorMode(allow_non_fake_inputs=True):
        table, model_input = numbers_of(schedule, torch.empty(3, dtype=torch.int64))
        assert (table.shape, table.dtype, model_input.shape) == ((3, 5), torch.float64, (3,))
    assert torch.equal(schedule.coefficients(torch.arange(T)), SCHEDULE.coefficients(torch.arange(T)))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_nothing_waits(device):
    timesteps = torch.full((4,), 500, device=device)
    numbers_of(SCHEDULE, timesteps)  # the tables are made
    with no_host_sync(device):
        numbers_of(SCHEDULE, timesteps)


@pytest.mark.parametrize("timestep", OUTSIDE.values(), ids=OUTSIDE)
def test_on_a_cpu_the_schedule_refuses(timestep):
    for look_up in (SCHEDULE.coefficients, SCHEDULE.model_input):
        with pytest.raises(ValueError, match=rf"timesteps: expected indices in \[0, 999\], got .*{timestep}"):
            look_up(one_is(timestep))
    assert SCHEDULE.coefficients(torch.empty(0, dtype=torch.int64)).shape == (0, 5)


@pytest.mark.parametrize("name", ["prediction_type", "alpha", "sigma", "model_timesteps"])
def test_a_schedule_does_not_change(name):
    """Its tables would not know of it."""
    schedule = linear_schedule()
    with pytest.raises(AttributeError, match=f"{name}: expected a NoiseSchedule of its own"):
        setattr(schedule, name, "v_prediction")
    assert copy.deepcopy(schedule).prediction_type == "epsilon"


class OnAGpu:
    """What `readable` asks of a tensor."""

    device = torch.device("cuda")


@pytest.mark.parametrize(("asked", "read"), [(None, False), ("", False), ("0", False), ("1", True)])
def test_on_a_gpu_values_are_read_where_that_is_asked_for(monkeypatch, asked, read):
    monkeypatch.setattr(check, "Tensor", OnAGpu)
    monkeypatch.delenv("FASTUNLEARN_CHECK", raising=False)
    if asked is not None:
        monkeypatch.setenv("FASTUNLEARN_CHECK", asked)
    assert check.readable(OnAGpu()) is read


def test_a_switch_is_0_or_1(monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_CHECK", "yes")
    with pytest.raises(ValueError, match="FASTUNLEARN_CHECK: expected 0 or 1, got 'yes'"):
        check.values_enabled()
    for value, default, on in (("", True, True), ("", False, False), ("0", True, False), ("1", False, True)):
        monkeypatch.setenv("FASTUNLEARN_CHECK", value)
        assert check.switched_on("FASTUNLEARN_CHECK", default=default) is on


@pytest.mark.parametrize("asked", [None, "0", "1"])
@pytest.mark.parametrize("name", ["vanilla_step", "the schedule"])
def test_on_a_cpu_values_are_always_read(monkeypatch, asked, name):
    monkeypatch.delenv("FASTUNLEARN_CHECK", raising=False)
    if asked is not None:
        monkeypatch.setenv("FASTUNLEARN_CHECK", asked)
    model = TinyDenoiser()
    calls = {
        "the schedule": lambda: SCHEDULE.coefficients(one_is(-1)),
        "vanilla_step": lambda: vanilla_step(
            model, None, SCHEDULE, images(0), draws=Draws(retain_timesteps=one_is(-1))
        ),
    }
    with pytest.raises(ValueError, match=r"timesteps: expected indices in \[0, 999\]"):
        calls[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("timestep", OUTSIDE.values(), ids=OUTSIDE)
def test_on_this_gpu(gpu, monkeypatch, timestep):
    """Refused with `FASTUNLEARN_CHECK=1`; else the step is skipped, and no parameter moves."""
    device = gpu.device
    if device.type != "cuda":
        pytest.skip("cannot be rehearsed: on a CPU values are always read")
    model = TinyDenoiser().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=True)
    before = copy.deepcopy(model.state_dict())
    given = Draws(retain_timesteps=one_is(timestep).to(device))
    monkeypatch.delenv("FASTUNLEARN_CHECK", raising=False)
    assert vanilla_step(model, optimizer, SCHEDULE, images(0).to(device), draws=given).skipped
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    monkeypatch.setenv("FASTUNLEARN_CHECK", "1")
    with pytest.raises(ValueError, match=rf"draws.retain_timesteps: expected indices in .*{timestep}"):
        vanilla_step(model, optimizer, SCHEDULE, images(0).to(device), draws=given)


# --- functions and steps ------------------------------------------------------------------------------------

CHOSEN = torch.tensor([True, False, True, False])
FUNCTIONS = {
    "noised": lambda t, schedule, module: module.noised(images(0), images(1), t, schedule),
    "redirect": lambda t, schedule, module: module.redirect(
        images(0), images(1)[:, None], images(2), t, schedule
    ),
    "redirect of x_t": lambda t, schedule, module: module.redirect(
        images(0), images(1)[:, None], None, t, schedule, x_t=images(2)
    ),
    "mixture": lambda t, schedule, module: module.mixture(
        images(0), images(1), images(2), t, schedule, 0.5, CHOSEN
    ),
    "mixture of x_t": lambda t, schedule, module: module.mixture(
        images(0), images(1), None, t, schedule, 0.5, CHOSEN, x_t=images(2)
    ),
}


@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("timestep", OUTSIDE.values(), ids=OUTSIDE)
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_refuse(function, timestep, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    with pytest.raises(ValueError, match=rf"timesteps: expected indices in \[0, 999\], got .*{timestep}"):
        function(one_is(timestep), SCHEDULE, F)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
def test_functions_refuse_where_the_loss_is_not_defined(function):
    (clean, first), (noise, last) = ENDS.values()
    with pytest.raises(
        ValueError, match="timesteps: expected timesteps with sigma_t > 0, got t = 0, where sigma = 0"
    ):
        function(torch.full((4,), first), clean, F)
    with pytest.raises(
        ValueError, match=r"timesteps: expected timesteps with alpha_t > 0 .*, got t = 1, where alpha"
    ):
        function(torch.full((4,), last), noise, F)


def test_the_reference_refuses_too():
    with pytest.raises(
        ValueError, match=r"timesteps: expected indices in \[0, 999\], got values in \[-1, 1\]"
    ):
        reference.noising(images(0), images(1), one_is(-1), SCHEDULE)


@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("backend", ["auto", "eager", "reference"])
@pytest.mark.parametrize("timestep", OUTSIDE.values(), ids=OUTSIDE)
def test_where_nothing_is_read_the_row_is_nan(function, backend, timestep, monkeypatch, unread):
    """Of x_t, or of the target where x_t is given. The other rows are as they are without it."""
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    bad, good = function(one_is(timestep), SCHEDULE, F), function(one_is(0), SCHEDULE, F)
    assert bad.x_t[1].isnan().all() or bad[1][1].isnan().all()
    within = torch.tensor([0, 2, 3])
    for one, other in zip(bad, good, strict=True):
        assert torch.equal(one[within], other[within])


def both_branches(step, **more):
    return lambda *args, **options: step(*args, images(0), images(1), **more, **options)


BOTH = ("forget", "retain")
STEPS = {
    "retrack": (
        lambda *args, **options: retrack_step(*args, images(0), images(1)[:, None], images(2), **options),
        BOTH,
    ),
    "siss": (both_branches(siss_step), BOTH),
    "siss no_is": (both_branches(siss_step, variant="no_is"), BOTH),
    "siss bernoulli": (both_branches(siss_step, variant="bernoulli"), BOTH),
    "erasediff": (both_branches(erasediff_step), BOTH),
    "neggrad": (lambda *args, **options: neggrad_step(*args, images(0), **options), ("forget",)),
    "vanilla": (lambda *args, **options: vanilla_step(*args, images(0), **options), ("retain",)),
}
BRANCHES = [(name, branch) for name, (_, branches) in STEPS.items() for branch in branches]


class Untouched(TinyDenoiser):
    def forward(self, x_t, t):
        raise AssertionError("the network was called before the timesteps were looked at")


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
@pytest.mark.parametrize("timestep", [-1, T])
def test_steps_refuse_before_any_work(name, branch, timestep):
    model, generator = Untouched(), torch.Generator().manual_seed(0)
    before, draws = generator.get_state(), Draws(**{f"{branch}_timesteps": one_is(timestep)})
    expected = rf"draws.{branch}_timesteps: expected indices in \[0, 999\], got values in .*{timestep}"
    with pytest.raises(ValueError, match=expected):
        STEPS[name][0](model, torch.optim.SGD(model.parameters()), SCHEDULE, draws=draws, generator=generator)
    assert torch.equal(generator.get_state(), before)


@pytest.mark.parametrize(("name", "branch"), BRANCHES)
@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
def test_steps_refuse_where_the_loss_is_not_defined(name, branch, end):
    schedule, timestep = end
    model, draws = Untouched(), Draws(**{f"{branch}_timesteps": torch.full((4,), timestep)})
    with pytest.raises(ValueError, match=rf"draws.{branch}_timesteps: expected timesteps with .* > 0"):
        STEPS[name][0](model, torch.optim.SGD(model.parameters()), schedule, draws=draws)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("timestep", [-1, T])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.usefixtures("unread")
def test_where_nothing_is_read_the_step_is_skipped(name, timestep, fused):
    """Not taken at T - 1: the parameters stay as they are."""
    step, branches = STEPS[name]
    model = TinyDenoiser()
    before = copy.deepcopy(model.state_dict())
    draws = Draws(**{f"{branch}_timesteps": one_is(timestep) for branch in branches})
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)
    assert step(model, optimizer, SCHEDULE, draws=draws).skipped
    for parameter, value in model.state_dict().items():
        assert torch.equal(value, before[parameter]), parameter
    assert not step(
        model, optimizer, SCHEDULE, draws=Draws(**dict.fromkeys(draws.given(), one_is(500)))
    ).skipped


@pytest.mark.parametrize("end", ENDS.values(), ids=ENDS)
@pytest.mark.usefixtures("unread")
def test_where_the_loss_is_not_defined_the_step_is_skipped(end):
    """Where sigma = 0 x_t is the image itself, and finite: the noise to predict is nowhere in it."""
    schedule, timestep = end
    model = TinyDenoiser()
    draws = Draws(retain_timesteps=torch.full((4,), timestep))
    assert vanilla_step(
        model, torch.optim.SGD(model.parameters(), lr=0.1), schedule, images(0), draws=draws
    ).skipped


# --- Unlearner and its tape ---------------------------------------------------------------------------------


def unlearner(method, *, replayed=False, residency="device"):
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 256, (24, 1, 8, 8), generator=generator, dtype=torch.uint8)
    model = TinyDenoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2.0**-10, fused=True)
    stores = {"forget": ImageStore(rows[:4]), "retain": ImageStore(rows[4:])}
    options = {"batch_size": 4, "residency": residency, **compared_with(method, TinyDenoiser(seed=1))}
    run = Unlearner(model, optimizer, SCHEDULE, method, **stores, **options)
    if replayed:
        run._replay = Replay(TapeGraphs(), optimizer, [*model.parameters(), *model.buffers()])
    return run


METHODS = every_method(k=2)


def given(method, timestep):
    return Draws(**{name: one_is(timestep) for name in method.draws() if name.endswith("timesteps")})


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.parametrize("residency", ["device", "host"])
@pytest.mark.parametrize("timestep", [-1, T])
def test_an_unlearner_refuses_and_stays_where_it_is(method, timestep, residency):
    run, undisturbed = unlearner(method, residency=residency), unlearner(method)
    with pytest.raises(ValueError, match=r"draws.(forget|retain)_timesteps: expected indices in \[0, 999\]"):
        run.step(given(method, timestep))
    assert run.step_index == int(run._counter[1]) == 0
    assert run.step().loss == undisturbed.step().loss


@pytest.mark.parametrize("method", METHODS, ids=str)
@pytest.mark.usefixtures("unread")
def test_between_replays_a_given_step_is_skipped_and_counted(method):
    """A step with given draws is none that a tape holds; the tape then goes on with what it has recorded."""
    run, plain = unlearner(method, replayed=True), unlearner(method)
    for _ in range(5):
        run.step()
        plain.step()
    assert run.replayed
    for one in (run, plain):
        assert one.step(given(method, -1)).skipped
    assert not run.step().skipped
    plain.step()
    assert run.skipped_steps == plain.skipped_steps == 1
    for one, other in zip(run.model.parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)
