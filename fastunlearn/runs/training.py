"""unlearn(): the loop around `Unlearner.step`.

It adds progress, metrics, trackers, checkpoints, resume, and a clean end on a signal.
"""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..host import check
from ..host.finite import not_finite
from ..host.packed import Arriving
from ..step.take import StepOutput
from ..step.trained import unwrapped
from . import checkpoint
from .identity import identity as describe_identity
from .identity import start_weights
from .optimizer_state import group_names
from .private import PRIVATE_FOLDER, keyed, update_private
from .processes import Processes
from .resume import (
    NOTHING_LEFT,
    find_checkpoint,
    is_finished,
    load_checkpoint,
    save_checkpoint,
    save_model,
    tidy,
)
from .run_health import SkipLimit, TooManySkippedSteps, WeightsNotFinite, check_finite, remedy
from .run_record import (
    COMPLETE,
    Metrics,
    describe_run,
    earlier_record,
    purge,
    read_metrics,
    resumed_record,
    take_over_private,
    update_run,
    write_run,
)
from .signals import RunInterrupted, Signals, interruption
from .space import check_space
from .time_limit import TimeLimit, parse_time
from .trackers import ProgressBar, Report, Reporter, make_reporter

__all__ = ["History", "RunInterrupted", "TooManySkippedSteps", "WeightsNotFinite", "purge", "unlearn"]

# The arguments that have to be the same in all processes of a run.
DECISIVE = ("num_steps", "checkpointing_steps", "logging_steps", "max_skipped_steps", "max_skipped_share")
KEEPING = (
    "keep_checkpoints: the checkpoints that are kept hold the optimizer's moments, which are gradients on "
    "images to forget, and the seed: whoever reads them can get images back; purge removes them"
)


@dataclass(frozen=True)
class History:
    """What a finished run leaves."""

    records: list[dict[str, Any]]  # one dict a logged step: step, loss, ..., lr, skipped_steps, seconds
    checkpoint: Path | None  # the model alone; the last of those kept; None: `leave` wrote the model
    output_dir: Path


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
    max_time: float | str | None = None,
    show_progress: bool = True,
    record: dict[str, Any] | None = None,
    private: dict[str, Any] | None = None,
    identity: dict[str, Any] | None = None,
    keep_checkpoints: bool = False,
    leave: Callable[[], dict[str, Any]] | None = None,
) -> History:
    """Takes steps until `unlearner.step_index` is `num_steps`.

    Arguments are named as in diffusers' training scripts. `output_dir` receives `run.json` (versions,
    arguments, method, sizes of the data), `metrics.jsonl`, and `private/`, for its owner's eyes alone: the
    seed (`record.json`) and `checkpoint-<step>/`. All random numbers come from (seed, step), and a checkpoint
    holds model, optimizer, scheduler, EMA and torch's random state, so on a CPU a resumed run ends with the
    same bits as one that was never stopped.

    From an optimizer's state images to forget can be computed. So a finished run leaves `checkpoint-<step>/`
    in `output_dir`, which has the model alone, with its EMA, and removes the others. Its `run.json` says
    "complete" then: no new run begins there, and to resume it does nothing, and says so.

    Several processes (an `Unlearner` with a process group) all call it with the same arguments. They start
    with the weights of process 0, which alone writes and shows; every process reads the checkpoint that it
    resumes from. A signal to any stops all after the same step (docs/several_processes.md).

    Args:
        unlearner: an `Unlearner` whose model is a `torch.nn.Module`; built anew, with the same arguments, for
            a resumed run.
        num_steps: steps of the whole run, those before a resume included.
        output_dir: made if missing. A new run refuses a folder that holds checkpoints or a finished run;
            every run refuses one that another run, or `purge`, writes to.
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
        max_time: seconds, or text (`"02:55:00"`, `"1-12:00:00"`), that the process may take from its start.
            When another step and a checkpoint would not end in time, a checkpoint is written and the run
            stops. How long both take is measured: the first step is followed by a checkpoint, too.
        show_progress: a progress bar on standard output.
        record: more entries for `run.json`, such as the path of the model that the run starts from
            (`base_model`, which a resumed run leaves as it is).
        private: the same for `private/record.json`: what names images, such as paths.
        identity: more of what makes the run this run and no other (docs/resume.md), such as the configuration
            of a scheduler; a checkpoint of a run with another one is not resumed.
        keep_checkpoints: a finished run keeps its checkpoints, which a warning says once more.
        leave: writes what a finished run leaves, in place of `checkpoint-<step>/`, and returns entries for
            `run.json`. Process 0 calls it after the last step, while the run does not count as finished; it
            may be called again.

    Raises:
        TypeError, ValueError: before any step, naming the argument.
        FolderLocked: another process, or another thread, writes to `output_dir`; naming it.
        TooManySkippedSteps: see `max_skipped_steps` and `max_skipped_share`; no checkpoint is written then.
        WeightsNotFinite: the weights, or the EMA, hold NaN or Inf when a checkpoint is due (it is not
            written).
        RunInterrupted: after SIGINT, SIGTERM, SIGHUP or SIGUSR1 (seen in the main thread only), when the
            running step is done and its checkpoint written. A second SIGINT or a third SIGTERM acts at once
            (`signals`).
        OutOfTime: a RunInterrupted, because of `max_time`.
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
    time_limit = TimeLimit(parse_time("max_time", max_time), logging_steps)
    if leave is not None and not callable(leave):
        raise TypeError(f"leave: expected a function or None, got {check.describe(leave)}")
    # What `run.json` says this run was called with.
    arguments = {
        "num_steps": num_steps,
        "output_dir": output_dir,
        "checkpointing_steps": checkpointing_steps,
        "checkpoints_total_limit": checkpoints_total_limit,
        "resume_from_checkpoint": resume_from_checkpoint,
        "report_to": report_to,
        "logging_steps": logging_steps,
        "max_skipped_steps": max_skipped_steps,
        "max_skipped_share": max_skipped_share,
        "max_time": max_time,
        "show_progress": show_progress,
        "keep_checkpoints": bool(keep_checkpoints),
    }
    output_dir = Path(output_dir)
    limit = SkipLimit(max_skipped_steps, max_skipped_share)
    with Processes(unlearner.process_group) as processes, processes.alone_in(output_dir, "unlearn"):
        finished = processes.by_first(lambda: is_finished(resume_from_checkpoint, output_dir, num_steps))
        if not finished:
            processes.by_all(time_limit.check_begun)
            if keep_checkpoints and processes.rank == 0:
                warnings.warn(KEEPING, stacklevel=2)
            loop = _Loop(unlearner, output_dir, num_steps, checkpoints_total_limit, limit, processes)
            _start(loop, arguments, identity, record or {}, private or {})
            with _noting_its_end(loop):
                _run(loop, num_steps, checkpointing_steps, logging_steps, time_limit, show_progress)
                loop.leave(leave, keep_checkpoints)
        elif processes.rank == 0:
            print(
                f"{output_dir}: the run {NOTHING_LEFT}",
                file=sys.stderr,
            )
        return processes.by_first(lambda: _history(output_dir))


def _history(output_dir: Path) -> History:
    """What the finished run in `output_dir` leaves, once everything else is gone."""
    # Here, and not before the end is noted: a run that is killed now goes on, or is swept when it is resumed.
    return History(read_metrics(output_dir), tidy(output_dir), output_dir)


def _start(
    loop: _Loop,
    arguments: dict[str, Any],
    identity: dict[str, Any] | None,
    record: dict[str, Any],
    private: dict[str, Any],
) -> None:
    """Brings every process to where the run begins or goes on, and opens the run folder."""
    unlearner, processes = loop.unlearner, loop.processes
    # Parameters of the optimizer that are none of the model would be in no checkpoint. They are refused here,
    # not after hours.
    group_names(unlearner.optimizer, unlearner.model)
    # Taken before a checkpoint is loaded: an identity is that of new objects.
    loop.identity = describe_identity(unlearner, identity)
    # Processes that disagree in one of these would take different steps, or wait for each other forever.
    decisive = {name: arguments[name] for name in DECISIVE}
    processes.check_same("unlearner", loop.identity | _settings(unlearner) | decisive)

    report_to, resume = arguments["report_to"], arguments["resume_from_checkpoint"]
    found = processes.by_first(lambda: loop.prepare(report_to, resume))
    loop.start_from(found)
    if unlearner.step_index > loop.num_steps:
        expected = f"at least the {unlearner.step_index} steps that {found or 'unlearner'} has taken"
        raise ValueError(f"num_steps: expected {expected}, got {loop.num_steps}")
    processes.by_first(lambda: loop.open(arguments, record, private, resumed=found is not None))


def _settings(unlearner) -> dict[str, Any]:
    """What of an `Unlearner` the identity of a run leaves out, and has to be the same in all processes."""
    names = ("seed", "step_index", "micro_batch_size", "max_grad_norm", "compile")
    settings = {name: getattr(unlearner, name, None) for name in names}
    settings["autocast_dtype"] = str(getattr(unlearner, "autocast_dtype", None))
    settings["grad_scaler"] = getattr(unlearner, "grad_scaler", None) is not None
    return settings


@contextmanager
def _noting_its_end(loop: _Loop) -> Iterator[None]:
    """The block is the run: `run.json` says how it ended, and what was opened for it is closed."""
    try:
        yield
    except RunInterrupted as interrupted:
        loop.note(status="interrupted")
        if loop.processes.rank == 0 and interrupted.checkpoint is not None:
            _tell_how_to_go_on(interrupted, loop)
        raise
    except BaseException as error:
        # `error` ended the run and is the one to be told, whatever else fails now: the numbers of a device
        # that failed can be read no more, and a full disk takes no note.
        with suppress(Exception):
            loop.pass_on()
        with suppress(Exception):
            loop.note(status=f"failed: {type(error).__name__}")
        raise
    finally:
        loop.close()
    loop.note(status=COMPLETE, **loop.left)


def _tell_how_to_go_on(interrupted: RunInterrupted, loop: _Loop) -> None:
    done = f"{interrupted.reason}: stopped after step {loop.unlearner.step_index} of {loop.num_steps}."
    go_on = "To go on, run again with resume_from_checkpoint='latest' (--resume_from_checkpoint latest)"
    print(f"{done} {go_on}; the checkpoint is {interrupted.checkpoint}", file=sys.stderr)


def _run(
    loop: _Loop,
    num_steps: int,
    checkpointing_steps: int | None,
    logging_steps: int,
    time_limit: TimeLimit,
    show_progress: bool,
) -> None:
    """The steps, what is logged and saved in between, and the last checkpoint."""
    unlearner, processes = loop.unlearner, loop.processes
    processes.by_first(
        lambda: check_space(unlearner, loop.output_dir, num_steps, checkpointing_steps, loop.keep)
    )
    show = show_progress and processes.rank == 0
    with (
        Signals(processes, time_limit) as signals,
        ProgressBar(num_steps, unlearner.step_index, show) as advance,
    ):
        loop.show = advance
        while unlearner.step_index < num_steps:
            with time_limit.step():
                signals.tell()
                output = unlearner.step()
                # The numbers of the logged step before this one: they are there, or will be soon, and the
                # device has the work of this step meanwhile.
                loop.pass_on()
            step, received = unlearner.step_index, signals.agreed()
            if step % logging_steps == 0 or step == num_steps:
                loop.log(output)
            due = checkpointing_steps is not None and step % checkpointing_steps == 0
            if due or received or time_limit.lacks_a_save:
                with time_limit.save():
                    loop.save()
            # A signal during the last step interrupts nothing: the run is complete.
            if received and step < num_steps:
                raise interruption(received, time_limit, loop.saved)
        # Nor does one while the last checkpoint is written.
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
        self.left: dict[str, Any] = {}  # for run.json: what the finished run leaves
        self.saved: Path | None = None
        self.saved_step: int | None = None
        self.started = 0.0

    def prepare(self, report_to: str | Report | None, resume: str | Path | None) -> Path | None:
        """The checkpoint to start from, if there is one."""
        self.report = make_reporter(report_to, self.output_dir)
        return find_checkpoint(resume, self.output_dir)

    def start_from(self, found: Path | None) -> None:
        """Gives every process the same state: that of the checkpoint `found`, or the weights of process 0."""
        unlearner, processes = self.unlearner, self.processes
        self._masks = self.buffers() & set(not_finite(self.weights()))
        if found is None:
            processes.share_weights(unwrapped(unlearner.model))
        # Those of process 0 make the identity: it is they that the others take over in a new run, and that a
        # run which is resumed began with.
        self.identity["start_weights"] = processes.by_first(lambda: start_weights(unlearner))
        if found is not None:
            processes.by_all(lambda: load_checkpoint(unlearner, found, processes, self.identity))
            self.saved, self.saved_step = found, unlearner.step_index

    def open(
        self, arguments: dict[str, Any], more: dict[str, Any], private: dict[str, Any], *, resumed: bool
    ) -> None:
        """Makes the run folder ready to be written to."""
        self.output_dir.mkdir(parents=True, exist_ok=True)
        secret = update_private(self.output_dir, **private, seed=self.unlearner.seed)
        for folder in (self.output_dir, self.output_dir / PRIVATE_FOLDER):
            checkpoint.clean(folder)
        take_over_private(self.output_dir)
        # What may be read by others has neither the seed nor a hash that could be compared.
        public = {name: value for name, value in self.identity.items() if name != "seed"}
        public = keyed(public, secret["identifiers_key"])
        record = describe_run(self.unlearner, arguments, public) | more
        if resumed:
            record = resumed_record(self.output_dir, record, self.unlearner.step_index)
        else:
            record |= earlier_record(self.output_dir)
        write_run(self.output_dir, record)
        self.metrics = Metrics(self.output_dir, self.unlearner.step_index)
        # As if the run had not been stopped: its seconds go on from those of the last line kept.
        self.started = time.perf_counter() - self.metrics.seconds

    def close(self) -> None:
        """Closes `metrics.jsonl` and the tracker."""
        if self.metrics is not None:
            self.metrics.close()
        self.report.finish()

    def note(self, *, status: str, **more: Any) -> None:
        """In `run.json`: how the run ended, and where."""
        if self.processes.rank == 0:
            update_run(self.output_dir, status=status, steps=self.unlearner.step_index, **more)

    def log(self, output: StepOutput) -> None:
        """Sends for the numbers of the present step; `pass_on` reads them."""
        numbers = {name: value for name, value in output._asdict().items() if value is not None}
        numbers |= {"lr": self.unlearner.lr_of_step, "skipped_steps": self.unlearner.skipped_steps}
        self._logged = self.unlearner.step_index, Arriving(numbers)

    def pass_on(self) -> None:
        """Tells metrics, trackers and progress bar what was logged last, if that is still to be done."""
        if self._logged is None:
            return
        step, arriving = self._logged
        # JSON has no NaN: what is not finite is left out, and `skipped` says so.
        values = {name: value for name, value in arriving.read().items() if math.isfinite(value)}
        self._logged = None
        if self.metrics is not None:
            self.metrics.append({"step": step, **values, "seconds": round(arriving.since - self.started, 3)})
        self.report(step, values)
        self.show(step, values)
        self.check_skipped(values["skipped_steps"], step)

    def check_skipped(self, skipped: int, step: int) -> None:
        """That the run may go on after `step`, though `skipped` steps were skipped."""
        self.limit.check(skipped, step, self.num_steps, self.saved)

    def weights(self) -> dict[str, Any]:
        """The states of model and average."""
        states = {"model": unwrapped(self.unlearner.model).state_dict()}
        if self.unlearner.ema is not None:
            states["ema"] = self.unlearner.ema.state_dict()
        return states

    def buffers(self) -> set[str]:
        """The names in `weights()` of what no step trains."""
        names = set()
        for key, module in (("model", unwrapped(self.unlearner.model)), ("ema", self.unlearner.ema)):
            if isinstance(module, torch.nn.Module):  # diffusers' EMA is none
                names |= {f"{key}.{name}" for name, _ in module.named_buffers()}
        return names

    def check_weights(self, name: str, what_now: str) -> None:
        """That weights and average are finite, in every process.

        Buffers that were not finite at the start are left out: an attention mask holds -inf.
        """
        self.processes.by_all(lambda: check_finite(name, self.weights(), what_now, but=self._masks))

    def save(self) -> None:
        """Passes on what was logged; writes the checkpoint of the present step, unless it stands already."""
        step = self.unlearner.step_index
        self.pass_on()
        self.check_skipped(int(self.unlearner.skipped_steps), step)
        if self.saved_step == step:
            return
        # In this order: what is not finite is never written, and no checkpoint is ahead of its metrics.
        self.check_weights(f"step {step}", remedy(self.saved))
        if self.metrics is not None:
            self.metrics.sync()
        self.saved = save_checkpoint(
            self.unlearner, self.output_dir, self.processes, self.identity, keep=self.keep
        )
        self.saved_step = step

    def leave(self, write: Callable[[], dict[str, Any]] | None, keep: bool) -> None:
        """Writes what the finished run leaves, beside the checkpoints that are still there."""

        def left() -> dict[str, Any]:
            if write is not None:
                return write()
            folder, saved = self.output_dir.resolve(), self.saved.resolve()
            if keep and saved.is_relative_to(folder):
                return {"checkpoint": str(saved.relative_to(folder))}
            return {"checkpoint": save_model(self.unlearner, self.output_dir).name}

        self.left = self.processes.by_first(left)


def _check_unlearner(unlearner) -> None:
    if not isinstance(getattr(unlearner, "model", None), torch.nn.Module):
        expected = "an Unlearner whose model is a torch.nn.Module (its state is saved)"
        raise TypeError(f"unlearner: expected {expected}, got {check.describe(unlearner)}")
