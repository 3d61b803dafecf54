"""unlearn(): the loop around `Unlearner.step` with progress, metrics, trackers, checkpoints, resume and a clean end on a signal."""

from __future__ import annotations

import math
import signal
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from . import _check, checkpoint
from .resume import find_checkpoint, load_checkpoint, save_checkpoint
from .run_record import RUN_FILE, Metrics, describe_run, purge, read_metrics, read_run, update_run, write_run
from .step import StepOutput
from .trackers import ProgressBar, Report, Reporter, make_reporter

__all__ = ["History", "RunInterrupted", "TooManySkippedSteps", "purge", "unlearn"]


@dataclass(frozen=True)
class History:
    """What a finished run leaves."""

    records: list[dict[str, Any]]  # one dict a logged step: step, loss, ..., lr, skipped_steps, seconds
    checkpoint: Path  # the last one
    output_dir: Path


class RunInterrupted(SystemExit):
    """SIGINT or SIGTERM: the step was finished and a checkpoint written. Ends the process with 128 + the signal's number unless it is caught."""

    def __init__(self, signal_number: int, checkpoint_path: Path):
        super().__init__(128 + signal_number)
        self.signal_number, self.checkpoint = signal_number, checkpoint_path


class TooManySkippedSteps(RuntimeError):
    """More steps than allowed had a non-finite loss or gradient. The checkpoints written before are kept."""


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
    show_progress: bool = True,
    record: dict[str, Any] | None = None,
) -> History:
    """Takes steps until `unlearner.step_index` is `num_steps`; argument names as in diffusers' training scripts.

    `output_dir` receives `run.json` (versions, arguments, method, hashes of the data), `metrics.jsonl` and `checkpoint-<step>/`, the last of
    them at the end. All random numbers come from (seed, step), and a checkpoint holds model, optimizer, scheduler, EMA and torch's random
    state, so on a CPU a resumed run ends with the same bits as one that was never stopped.

    Args:
        unlearner: an `Unlearner` whose model is a `torch.nn.Module`; built anew, with the same arguments, for a resumed run.
        num_steps: steps of the whole run, those before a resume included.
        output_dir: made if missing. A new run refuses a folder that holds checkpoints.
        checkpointing_steps: also write a checkpoint every so many steps; None: at the end only.
        checkpoints_total_limit: keep so many checkpoints; None: all.
        resume_from_checkpoint: `"latest"` (the newest undamaged one in `output_dir`; the start if there is none) or the path of a checkpoint.
        report_to: `"tensorboard"`, `"wandb"` (through accelerate's trackers) or a callable `(step, metrics)`.
        logging_steps: log every so many steps, and the last. Logging reads the device.
        max_skipped_steps: with more skipped (non-finite) steps the run stops. Looked at when a step is logged or a checkpoint written.
        show_progress: a progress bar on standard output.
        record: more entries for `run.json`, such as the path of the model that the run starts from.

    Raises:
        TypeError, ValueError: before any step, naming the argument.
        TooManySkippedSteps: see `max_skipped_steps`; no checkpoint is written then.
        RunInterrupted: after SIGINT or SIGTERM (seen in the main thread only), when the running step is done and its checkpoint written.
            A second signal ends the process at once.
    """
    _check_arguments(unlearner, num_steps, checkpointing_steps, checkpoints_total_limit, logging_steps, max_skipped_steps)
    arguments = {name: value for name, value in locals().items() if name not in ("unlearner", "record")}
    output_dir = Path(output_dir)
    report = make_reporter(report_to, output_dir)
    found = find_checkpoint(resume_from_checkpoint, output_dir)
    if found is not None:
        load_checkpoint(unlearner, found)
    if unlearner.step_index > num_steps:
        raise ValueError(f"num_steps: expected at least the {unlearner.step_index} steps that {found or 'unlearner'} has taken, got {num_steps}")
    output_dir.mkdir(parents=True, exist_ok=True)
    checkpoint.clean(output_dir)
    record = describe_run(unlearner, arguments) | (record or {})
    if found is not None and (output_dir / RUN_FILE).exists():
        record |= {name: value for name, value in read_run(output_dir).items() if name in ("started", "private_files", "purged")}
    write_run(output_dir, record)
    metrics = Metrics(output_dir, unlearner.step_index)
    loop = _Loop(unlearner, output_dir, checkpoints_total_limit, metrics, report, max_skipped_steps, found)
    try:
        with _Signals() as signals, ProgressBar(num_steps, unlearner.step_index, show_progress) as advance:
            while unlearner.step_index < num_steps:
                output = unlearner.step()
                step = unlearner.step_index
                if step % logging_steps == 0 or step == num_steps:
                    advance(step, loop.log(output))
                if (checkpointing_steps is not None and step % checkpointing_steps == 0) or signals.received:
                    loop.save()
                if signals.received and step < num_steps:
                    raise RunInterrupted(signals.received, loop.saved)
        loop.save()
    except RunInterrupted as interrupted:
        update_run(output_dir, status="interrupted", steps=unlearner.step_index)
        name = signal.Signals(interrupted.signal_number).name
        print(f"{name}: stopped after step {unlearner.step_index} of {num_steps}. To go on, run again with resume_from_checkpoint='latest' "
              f"(--resume_from_checkpoint latest); the checkpoint is {interrupted.checkpoint}", file=sys.stderr)  # fmt: skip
        raise
    except BaseException as error:
        update_run(output_dir, status=f"failed: {type(error).__name__}", steps=unlearner.step_index)
        raise
    finally:
        metrics.close()
        report.finish()
    update_run(output_dir, status="complete", steps=unlearner.step_index)
    return History(read_metrics(output_dir), loop.saved, output_dir)


class _Loop:
    """What a run does beside stepping: logging, the limit on skipped steps, checkpoints."""

    def __init__(self, unlearner, output_dir: Path, keep: int | None, metrics: Metrics, report: Reporter, max_skipped: int, resumed: Path | None):
        self.unlearner, self.output_dir, self.keep = unlearner, output_dir, keep
        self.metrics, self.report, self.max_skipped = metrics, report, max_skipped
        self.saved, self.saved_step = resumed, None if resumed is None else unlearner.step_index
        self.started = time.perf_counter() - metrics.seconds

    def log(self, output: StepOutput) -> dict[str, float]:
        """Reads a step's numbers, all at once, and passes them on. JSON has no NaN: what is not finite is left out, and `skipped` says so."""
        tensors = {name: value for name, value in output._asdict().items() if value is not None}
        values = dict(zip(tensors, torch.stack([value.double() for value in tensors.values()]).tolist(), strict=True))
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        lr, step = self.unlearner.last_lr, self.unlearner.step_index
        values |= {"skipped": bool(values["skipped"]), "lr": lr, "skipped_steps": int(self.unlearner.skipped_steps)}
        self.metrics.append({"step": step, **values, "seconds": round(time.perf_counter() - self.started, 3)})
        self.report(step, values)
        self.check_skipped()
        return values

    def check_skipped(self) -> None:
        skipped = int(self.unlearner.skipped_steps)
        if skipped > self.max_skipped:
            last = f"the last good checkpoint is {self.saved}" if self.saved is not None else "no checkpoint was written yet"
            raise TooManySkippedSteps(
                f"{skipped} of {self.unlearner.step_index} steps had a loss or gradient that is not finite (max_skipped_steps={self.max_skipped}); {last}. "
                "A lower learning rate, max_grad_norm, or float32 instead of float16 are what usually helps."
            )

    def save(self) -> None:
        """Writes the checkpoint of the present step, unless it stands already."""
        if self.saved_step == self.unlearner.step_index:
            return
        self.check_skipped()
        self.metrics.sync()
        self.saved = save_checkpoint(self.unlearner, self.output_dir, keep=self.keep)
        self.saved_step = self.unlearner.step_index


def _check_arguments(unlearner, num_steps, checkpointing_steps, checkpoints_total_limit, logging_steps, max_skipped_steps) -> None:
    if not isinstance(getattr(unlearner, "model", None), torch.nn.Module):
        raise TypeError(f"unlearner: expected an Unlearner whose model is a torch.nn.Module (its state is saved), got {_check.describe(unlearner)}")
    _check.integer("num_steps", num_steps, low=0)
    _check.integer("logging_steps", logging_steps, low=1)
    _check.integer("max_skipped_steps", max_skipped_steps, low=0)
    if checkpointing_steps is not None:
        _check.integer("checkpointing_steps", checkpointing_steps, low=1)
    if checkpoints_total_limit is not None:
        _check.integer("checkpoints_total_limit", checkpoints_total_limit, low=1)


class _Signals:
    """Within the block SIGINT and SIGTERM only set `received`; the second one acts as before."""

    NUMBERS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self):
        self.received = 0
        self._before: dict[int, Any] = {}

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
