"""Numbers that leave the device together, and a run that reads them a step late: it never waits for the step
that it has just queued."""

from __future__ import annotations

from contextlib import ExitStack, nullcontext

import pytest
import runs
import torch
from torch.overrides import TorchFunctionMode

from fastunlearn import SISS, ImageStore, Unlearner, Vanilla
from fastunlearn.host import check, packed
from fastunlearn.host.packed import Arriving, Packed
from fastunlearn.methods import Pass
from fastunlearn.runs import training
from fastunlearn.runs.run_record import read_metrics
from fastunlearn.runs.training import TooManySkippedSteps, unlearn
from fastunlearn.testing import host_sync
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

VALUES = {
    "small": torch.tensor(1.5, dtype=torch.bfloat16),
    "yes": torch.tensor(True),
    "exact": torch.tensor(0.1, dtype=torch.float64),
    "single": torch.tensor(0.1),
    "count": torch.tensor(2**40 + 1),
    "none": torch.tensor(float("nan")),
}


@pytest.mark.parametrize("names", [list(VALUES), list(VALUES)[::-1], ["yes"]], ids=str)
def test_every_dtype_comes_back_as_it_was(names):
    values = {name: VALUES[name] for name in names}
    found = Packed.of(values).unpacked()
    assert list(found) == names
    for name, value in values.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, ())
        assert torch.equal(found[name].view(1).view(torch.uint8), value.view(1).view(torch.uint8))


def test_what_was_unpacked_outlives_the_buffer():
    buffer = Packed.of(VALUES)
    found = buffer.unpacked()
    buffer.buffer.zero_()
    assert found["count"] == 2**40 + 1


def test_arriving_numbers_are_those_of_when_they_were_sent_for():
    total = torch.tensor(3)
    arriving = Arriving({"lr": 0.25, "total": total, "loss": torch.tensor(0.1)})
    total += 1
    assert arriving.read() == {"lr": 0.25, "total": 3, "loss": torch.tensor(0.1).item()}
    assert list(arriving.read()) == ["lr", "total", "loss"]
    assert type(arriving.read()["total"]) is int


# --- runs --------------------------------------------------------------------------------------------


class Watched(Unlearner):
    """Calls `before(step)` and `after(step)` around every step."""

    before = after = staticmethod(lambda step: None)

    def step(self, draws=None):
        step = self.step_index + 1
        self.before(step)
        output = super().step(draws)
        self.after(step)
        return output


def watched(device="cpu", method=None, **options) -> Watched:
    images = torch.randint(
        0, 256, (24, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8
    )
    model = TinyDenoiser().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(2.0**-10, device=device), fused=True)
    stores = {"forget": ImageStore(images[:4]), "retain": ImageStore(images[4:])}
    return Watched(
        model,
        optimizer,
        linear_schedule(),
        method or SISS(),
        **stores,
        batch_size=2,
        compile=False,
        **options,
    )


class Reads(TorchFunctionMode):
    """Notes whatever would wait for the device."""

    def __init__(self, log: list):
        super().__init__()
        self.log = log

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in host_sync._READS:
            self.log.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("logging_steps", [1, 2])
def test_one_copy_a_logged_step_read_when_the_next_is_queued(monkeypatch, tmp_path, logging_steps):
    log, last = [], 7

    class Logged(Arriving):
        def __init__(self, values):
            log.append("sent")
            super().__init__(values)

        def read(self):
            log.append("read")
            with torch._C.DisableTorchFunction():
                return super().read()

    monkeypatch.setattr(training, "Arriving", Logged)
    monkeypatch.setattr(Pass, "by_role", lambda self: [self])  # on a CPU alone a step reads weights
    monkeypatch.setattr(check, "readable", lambda tensor: False)  # and timesteps
    run, reads = watched(), ExitStack()
    run.before = lambda step: reads.enter_context(Reads(log)) if step == 2 else None
    run.after = lambda step: (log.append(f"queued {step}"), reads.close() if step == last else None)
    unlearn(run, num_steps=last, output_dir=tmp_path, logging_steps=logging_steps, show_progress=False)
    expected = []
    for step in range(1, last + 1):
        expected.append(f"queued {step}")
        expected += ["read"] if step > 1 and (step - 1) % logging_steps == 0 else []
        expected += ["sent"] if step % logging_steps == 0 or step == last else []
    assert log == [*expected, "read"]  # the last one, before its checkpoint


def test_one_step_makes_one_buffer(monkeypatch):
    """Whatever it holds: the outputs, the learning rate on the device, and the count of skipped steps."""
    run, made = watched(), []
    of = Packed.of
    monkeypatch.setattr(packed.Packed, "of", lambda values: made.append(list(values)) or of(values))
    loop = training._Loop(run, None, 1, None, training.SkipLimit(10, 0.5), training.Processes(None))
    loop.log(run.step())
    loop.pass_on()
    assert made == [
        [
            "loss",
            "forget_loss",
            "retain_loss",
            "grad_norm",
            "correction_norm",
            "scaling_factor",
            "skipped",
            "lr",
            "skipped_steps",
        ]
    ]


def test_what_was_logged_before_an_error_is_in_the_metrics(tmp_path):
    def fail(step):
        if step == 4:
            raise MemoryError

    run = watched()
    run.before = fail
    with pytest.raises(MemoryError):
        unlearn(run, num_steps=9, output_dir=tmp_path, show_progress=False)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2, 3]


def test_an_error_of_the_device_is_not_hidden_by_numbers_that_cannot_be_read(tmp_path, monkeypatch):
    class Lost(Arriving):
        def read(self):
            if self.lost:
                raise RuntimeError("cannot read")
            return super().read()

    def fail(step):
        if step == 3:
            Lost.lost = True
            raise MemoryError("the device is lost")

    Lost.lost = False
    monkeypatch.setattr(training, "Arriving", Lost)
    run = watched()
    run.before = fail
    with pytest.raises(MemoryError, match="the device is lost"):
        unlearn(run, num_steps=9, output_dir=tmp_path, show_progress=False)


def test_metrics_are_written_before_their_checkpoint(tmp_path):
    seen = {}
    run = watched()
    run.before = lambda step: seen.update(
        {step: (len(read_metrics(tmp_path)), len(list(tmp_path.glob("private/checkpoint-*"))))}
    )
    unlearn(run, num_steps=6, output_dir=tmp_path, checkpointing_steps=2, show_progress=False)
    assert seen == {1: (0, 0), 2: (0, 0), 3: (2, 1), 4: (2, 1), 5: (4, 2), 6: (4, 2)}
    assert len(read_metrics(tmp_path)) == 6


def test_too_many_skipped_steps_are_those_of_the_step_that_is_named(tmp_path):
    run = watched(method=Vanilla())
    with torch.no_grad():
        next(run.model.parameters()).fill_(float("nan"))
    with pytest.raises(TooManySkippedSteps, match="1 of 1 steps"):
        unlearn(run, num_steps=6, output_dir=tmp_path, max_skipped_steps=0, show_progress=False)
    assert [record["step"] for record in read_metrics(tmp_path)] == [1]


@pytest.mark.gpu
def test_a_logged_step_does_not_wait_for_the_device(gpu, tmp_path):
    run, inside = watched(gpu.device, Vanilla()), ExitStack()
    # The stand-in's memory is the host's: what may be read cannot be told from what may not.
    waiting_raises = gpu.waiting_raises if gpu.device.type == "cuda" else nullcontext
    run.before = lambda step: inside.enter_context(waiting_raises()) if step == 6 else None
    run.after = lambda step: inside.close() if step == 9 else None
    history = unlearn(run, num_steps=9, output_dir=tmp_path, show_progress=False)
    assert run.replayed
    assert [record["step"] for record in history.records] == list(range(1, 10))
    assert all(record["lr"] == 2.0**-10 and record["loss"] > 0 for record in history.records)


@pytest.mark.gpu
def test_arriving_numbers_of_a_gpu(gpu):
    """While the device is kept busy the copy is queued; what changes a number behind it is not seen."""
    total = torch.zeros((), dtype=torch.int64, device=gpu.device)
    arriving = []
    with gpu.waiting_raises():
        for _ in range(3):
            gpu.wait(0.02)
            total += 1
            arriving.append(Arriving({"total": total, "half": total / 2}))
            total += 10
    assert [numbers.read() for numbers in arriving] == [
        {"total": 1, "half": 0.5},
        {"total": 12, "half": 6.0},
        {"total": 23, "half": 11.5},
    ]


@pytest.mark.gpu
@pytest.mark.parametrize("replay", [False, True])
def test_a_run_on_a_gpu_resumes_where_it_was(gpu, tmp_path, replay):
    """The state that comes back is the one that was saved, to the bit; the step from it is so to rounding."""

    def run(folder, num_steps, **options):
        unlearner = watched(gpu.device, Vanilla(), replay=replay)
        seen = []
        unlearner.before = lambda step: seen.append(
            (step, torch.cat([p.detach().flatten() for p in unlearner.model.parameters()]))
        )
        history = unlearn(unlearner, num_steps=num_steps, output_dir=folder, show_progress=False, **options)
        return history.records, dict(seen)

    whole, weights = run(tmp_path / "whole", 8, checkpointing_steps=5, keep_checkpoints=True)
    runs.unfinish(tmp_path / "whole", 5)
    records, resumed = run(tmp_path / "whole", 8, resume_from_checkpoint="latest")
    assert list(resumed) == [6, 7, 8]
    assert torch.equal(resumed[6], weights[6])
    assert [record["step"] for record in records] == list(range(1, 9))
    assert records[5]["loss"] == pytest.approx(
        whole[5]["loss"], rel=1e-3
    )  # one step apart: TF32 and the order of sums
    assert [record["lr"] for record in records] == [record["lr"] for record in whole]
