"""unlearn(): the loop around `Unlearner.step` with progress, metrics, trackers, checkpoints, resume and a
clean end on a signal.
"""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from ..host import check
from ..host.finite import not_finite
from ..host.packed import Arriving
from ..step.take import StepOutput
from ..step.trained import unwrapped
from . import checkpoint, launcher
from .identity import identity as describe_identity
from .identity import start_weights
from .optimizer_state import group_names
from .processes import Processes
from .resume import find_checkpoint, load_checkpoint, save_checkpoint
from .run_health import SkipLimit, TooManySkippedSteps, WeightsNotFinite, check_finite, remedy
from .run_record import (
    Metrics,
    describe_run,
    private_record,
    purge,
    read_metrics,
    resumed_record,
    update_run,
    write_run,
)
from .trackers import ProgressBar, Report, Reporter, make_reporter

__all__ = ["History", "RunInterrupted", "TooManySkippedSteps", "WeightsNotFinite", "purge", "unlearn"]


@dataclass(frozen=True)
class History:
    """What a finished run leaves."""

    records: list[dict[str, Any]]  # one dict a logged step: step, loss, ..., lr, skipped_steps, seconds
    checkpoint: Path  # the last one
    output_dir: Path


class RunInterrupted(SystemExit):
    """SIGINT or SIGTERM: the step was finished and a checkpoint written.

    Ends the process with 128 + the signal's number unless it is caught. It counts as SIGTERM that the
    launcher (torchrun, accelerate launch) has ended which started the process.
    """

    def __init__(self, signal_number: int, checkpoint_path: Path):
        super().__init__(128 + signal_number)
        self.signal_number, self.checkpoint = signal_number, checkpoint_path


def unlearn(
    unlearner,
    *,
    num_steps: int,
    output_dir: str | Path,
    checkpointing_steps: int | None = None,
    checkpoints_total_limit: int | None = None,
    resume_from_checkpoint: str | Path | None = None,
    report_to: str | Report | None = None,
    logging_steps: int = 1,
    max_skipped_steps: int = 10,
    max_skipped_share: float = 0.5,
    show_progress: bool = True,
    record: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
) -> History:
    """Takes steps until `unlearner.step_index` is `num_steps`; argument names as in diffusers' training
    scripts.

    `output_dir` receives `run.json` (versions, arguments, method, hashes of the data), `metrics.jsonl` and
    `checkpoint-<step>/`, the last of them at the end. All random numbers come from (seed, step), and a
    checkpoint holds model, optimizer, scheduler, EMA and torch's random state, so on a CPU a resumed run ends
    with the same bits as one that was never stopped.

    Several processes (an `Unlearner` with a process group) all call it with the same arguments. They start
    with the weights of process 0, which alone writes and shows; every process reads the checkpoint that it
    resumes from. A signal to any stops all after the same step (docs/several_processes.md).

    Args:
        unlearner: an `Unlearner` whose model is a `torch.nn.Module`; built anew, with the same arguments, for
            a resumed run.
        num_steps: steps of the whole run, those before a resume included.
        output_dir: made if missing. A new run refuses a folder that holds checkpoints; every run refuses one
            that another run, or `purge`, writes to.
        checkpointing_steps: also write a checkpoint every so many steps; None: at the end only.
        checkpoints_total_limit: keep so many checkpoints; None: all.
        resume_from_checkpoint: `"latest"` (the newest undamaged one in `output_dir`; the start if there is
            none) or the path of a checkpoint.
        report_to: `"tensorboard"`, `"wandb"` (through accelerate's trackers) or a callable `(step, metrics)`.
        logging_steps: log every so many steps, and the last. Numbers are read when the next step is queued,
            so that the device never runs out of work.
        max_skipped_steps: with more skipped (non-finite) steps the run stops. Looked at when the numbers of a
            logged step are read, and before a checkpoint is written.
        max_skipped_share: the same for a share of `num_steps`; it counts over the whole run, the steps before
            a resume included.
        show_progress: a progress bar on standard output.
        record: more entries for `run.json`, such as the path of the model that the run starts from
            (`base_model`, which a resumed run leaves as it is).
        identity: more of what makes the run this run and no other (docs/resume.md), such as the configuration
            of a scheduler; a checkpoint of a run with another one is not resumed.

    Raises:
        TypeError, ValueError: before any step, naming the argument.
        FolderLocked: another process, or another thread, writes to `output_dir`; naming it.
        TooManySkippedSteps: see `max_skipped_steps` and `max_skipped_share`; no checkpoint is written then.
        WeightsNotFinite: the weights, or the EMA, hold NaN or Inf when a checkpoint is due (it is not
            written).
        RunInterrupted: after SIGINT or SIGTERM (seen in the main thread only), when the running step is done
            and its checkpoint written. A second signal ends the process at once.
        OtherProcessFailed: process 0 could not write, or another one not read, what this one waited for.
    """
    _check_unlearner(unlearner)
    num_steps = check.integer("num_steps", num_steps, low=0)
    logging_steps = check.integer("logging_steps", logging_steps, low=1)
    max_skipped_steps = check.integer("max_skipped_steps", max_skipped_steps, low=0)
    max_skipped_share = check.number("max_skipped_share", max_skipped_share, low=0, high=1)
    if checkpointing_steps is not None:
        checkpointing_steps = check.integer("checkpointing_steps", checkpointing_steps, low=1)
    if checkpoints_total_limit is not None:
        checkpoints_total_limit = check.integer("checkpoints_total_limit", checkpoints_total_limit, low=1)
    arguments = {
        name: value for name, value in locals().items() if name not in ("unlearner", "record", "identity")
    }
    limit = SkipLimit(max_skipped_steps, max_skipped_share)
    output_dir = Path(output_dir)
    with Processes(unlearner.process_group) as processes, processes.alone_in(output_dir, "unlearn"):
        loop = _Loop(unlearner, output_dir, num_steps, checkpoints_total_limit, limit, processes)
        decisive = {"num_steps": num_steps, "checkpointing_steps": checkpointing_steps}
        decisive |= {"logging_steps": logging_steps, "max_skipped_steps": max_skipped_steps}
        decisive |= {"max_skipped_share": max_skipped_share}
        settings = {
            name: getattr(unlearner, name, None)
            for name in ("seed", "step_index", "micro_batch_size", "max_grad_norm", "compile")
        }
        settings |= {
            "autocast_dtype": str(getattr(unlearner, "autocast_dtype", None)),
            "grad_scaler": getattr(unlearner, "grad_scaler", None) is not None,
        }
        group_names(unlearner.optimizer, unlearner.model)  # refuses what no checkpoint would hold
        loop.identity = describe_identity(unlearner, identity)
        processes.check_same("unlearner", loop.identity | settings | decisive)
        found = processes.by_first(lambda: loop.prepare(report_to, resume_from_checkpoint))
        loop.start_from(found)
        if unlearner.step_index > num_steps:
            raise ValueError(
                f"num_steps: expected at least the {unlearner.step_index} steps that {found or 'unlearner'} has taken, got {num_steps}"
            )
        described_run = describe_run(unlearner, arguments, loop.identity) | (record or {})
        processes.by_first(lambda: loop.open(described_run, resumed=found is not None))
        try:
            _run(loop, num_steps, checkpointing_steps, logging_steps, show_progress)
        except RunInterrupted as interrupted:
            loop.note(status="interrupted")
            if processes.rank == 0:
                name = signal.Signals(interrupted.signal_number).name
                print(f"{name}: stopped after step {unlearner.step_index} of {num_steps}. To go on, run again with resume_from_checkpoint='latest' "
                      f"(--resume_from_checkpoint latest); the checkpoint is {interrupted.checkpoint}", file=sys.stderr)  # fmt: skip
            raise
        except BaseException as error:
            with suppress(Exception):  # `error` ended the run; a device that failed can be read no more
                loop.pass_on()
            with suppress(Exception):  # on a full disk, say: `error` is the one to be told
                loop.note(status=f"failed: {type(error).__name__}")
            raise
        finally:
            loop.close()
        loop.note(status="complete")
        return History(processes.by_first(lambda: read_metrics(output_dir)), loop.saved, output_dir)


def _run(
    loop: _Loop, num_steps: int, checkpointing_steps: int | None, logging_steps: int, show_progress: bool
) -> None:
    """The steps, what is logged and saved in between, and the last checkpoint."""
    unlearner, processes = loop.unlearner, loop.processes
    with (
        _Signals(processes) as signals,
        ProgressBar(num_steps, unlearner.step_index, show_progress and processes.rank == 0) as advance,
    ):
        loop.show = advance
        while unlearner.step_index < num_steps:
            signals.tell()
            output = unlearner.step()
            loop.pass_on()  # the numbers of the step before: they are there, or soon, and the device has work
            step, received = unlearner.step_index, signals.agreed()
            if step % logging_steps == 0 or step == num_steps:
                loop.log(output)
            if (checkpointing_steps is not None and step % checkpointing_steps == 0) or received:
                loop.save()
            if received and step < num_steps:
                raise RunInterrupted(received, loop.saved)
    loop.save()


class _Loop:
    """What a run does beside stepping: logging, the limit on skipped steps, checkpoints.

    Of several processes only process 0 writes.
    """

    def __init__(
        self,
        unlearner,
        output_dir: Path,
        num_steps: int,
        keep: int | None,
        limit: SkipLimit,
        processes: Processes,
    ):
        self.unlearner, self.output_dir, self.num_steps = unlearner, output_dir, num_steps
        self.keep, self.limit, self.processes = keep, limit, processes
        self.identity: dict[str, Any] = {}  # of the run, as it is before its first step
        self.metrics: Metrics | None = None  # of process 0
        self.report = Reporter()
        self.show: Report = lambda step, values: None
        self._logged: tuple[int, Arriving] | None = None
        self._masks: set[str] = set()  # buffers that are not finite before the first step
        self.saved: Path | None = None
        self.saved_step: int | None = None
        self.started = 0.0

    def prepare(self, report_to: str | Report | None, resume: str | Path | None) -> Path | None:
        """The checkpoint to start from, if there is one."""
        self.report = make_reporter(report_to, self.output_dir)
        return find_checkpoint(resume, self.output_dir)

    def start_from(self, found: Path | None) -> None:
        """Gives every process the same state: that of the checkpoint `found`, or the weights of process 0."""
        self._masks = self.buffers() & set(not_finite(self.weights()))
        if found is None:
            self.processes.share_weights(unwrapped(self.unlearner.model))
        # Of process 0, whose weights the others take over, in a new run as at the beginning of one that is
        # resumed.
        self.identity["start_weights"] = self.processes.by_first(lambda: start_weights(self.unlearner))
        if found is not None:
            self.processes.by_all(
                lambda: load_checkpoint(self.unlearner, found, self.processes, self.identity)
            )
            self.saved, self.saved_step = found, self.unlearner.step_index

    def open(self, record: dict[str, Any], *, resumed: bool) -> None:
        """Makes the run folder ready to be written to."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        checkpoint.clean(self.output_dir)
        if resumed:
            record = resumed_record(self.output_dir, record, self.unlearner.step_index)
        else:
            record |= private_record(self.output_dir)
        write_run(self.output_dir, record)
        self.metrics = Metrics(self.output_dir, self.unlearner.step_index)
        self.started = time.perf_counter() - self.metrics.seconds

    def close(self) -> None:
        if self.metrics is not None:
            self.metrics.close()
        self.report.finish()

    def note(self, *, status: str) -> None:
        """In `run.json`: how the run ended, and where."""
        if self.processes.rank == 0:
            update_run(self.output_dir, status=status, steps=self.unlearner.step_index)

    def log(self, output: StepOutput) -> None:
        """Sends for the numbers of the present step; `pass_on` reads them."""
        numbers = {name: value for name, value in output._asdict().items() if value is not None}
        numbers |= {"lr": self.unlearner.lr_of_step, "skipped_steps": self.unlearner.skipped_steps}
        self._logged = self.unlearner.step_index, Arriving(numbers)

    def pass_on(self) -> None:
        """Tells metrics, trackers and progress bar what was logged last, if that is still to be done.

        JSON has no NaN: what is not finite is left out, and `skipped` says so.
        """
        if self._logged is None:
            return
        step, arriving = self._logged
        values = {name: value for name, value in arriving.read().items() if math.isfinite(value)}
        self._logged = None
        if self.metrics is not None:
            self.metrics.append({"step": step, **values, "seconds": round(arriving.since - self.started, 3)})
        self.report(step, values)
        self.show(step, values)
        self.check_skipped(values["skipped_steps"], step)

    def check_skipped(self, skipped: int, step: int) -> None:
        self.limit.check(skipped, step, self.num_steps, self.saved)

    def weights(self) -> dict[str, Any]:
        """The states of model and average."""
        states = {"model": unwrapped(self.unlearner.model).state_dict()}
        if self.unlearner.ema is not None:
            states["ema"] = self.unlearner.ema.state_dict()
        return states

    def buffers(self) -> set[str]:
        """The names in `weights()` of what no step trains."""
        modules = {"model": unwrapped(self.unlearner.model), "ema": self.unlearner.ema}
        return {
            f"{key}.{name}"
            for key, module in modules.items()
            if isinstance(module, torch.nn.Module)
            for name, _ in module.named_buffers()
        }

    def check_weights(self, name: str, what_now: str) -> None:
        """That weights and average are finite, in every process; a mask of -inf is none of them."""
        self.processes.by_all(lambda: check_finite(name, self.weights(), what_now, but=self._masks))

    def save(self) -> None:
        """Passes on what was logged; writes the checkpoint of the present step, unless it stands already."""
        self.pass_on()
        self.check_skipped(int(self.unlearner.skipped_steps), self.unlearner.step_index)
        if self.saved_step == self.unlearner.step_index:
            return
        self.check_weights(f"step {self.unlearner.step_index}", remedy(self.saved))
        if self.metrics is not None:
            self.metrics.sync()
        self.saved = save_checkpoint(
            self.unlearner, self.output_dir, self.processes, self.identity, keep=self.keep
        )
        self.saved_step = self.unlearner.step_index


def _check_unlearner(unlearner) -> None:
    if not isinstance(getattr(unlearner, "model", None), torch.nn.Module):
        raise TypeError(
            f"unlearner: expected an Unlearner whose model is a torch.nn.Module (its state is saved), got {check.describe(unlearner)}"
        )


class _Signals:
    """Within the block SIGINT and SIGTERM only set `received`; the second one acts as before.

    A launcher sends them to all processes, but not at the same step, so the processes agree on one: each
    tells the others before a step what it has received, and all look at it after that step. What is told
    travels while the step is taken.
    """

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, processes: Processes):
        self.received = 0
        self._before: dict[int, Any] = {}
        self._processes = processes
        self._told: Callable[[], int] = lambda: 0

    def tell(self) -> None:
        """Before a step."""
        if not self.received and launcher.is_gone():
            launcher.notice()
            self.received = signal.SIGTERM
        self._told = self._processes.begin_largest(self.received)

    def agreed(self) -> int:
        """After it: the number of the signal to stop for, the same in all processes; 0: none."""
        return self.received if self._processes.count == 1 else self._told()

    def __enter__(self) -> _Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers only there
            self._before = {number: signal.signal(number, self._receive) for number in self.NUMBERS}
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def __exit__(self, *exception) -> None:
        self._restore()
