"""One comparison of whole steps: the gate, the turns, the row of numbers for each contestant."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field

import torch

from . import harness
from .steps import choices, memory, stages
from .steps.choices import LAYOUTS, synchronize
from .steps.contestants import COMPILED, GATE, GATE_ROWS, LIMIT, OFFICIAL_RETRACK, OFFICIAL_SISS, OURS, PAPERS, Gate, Setting, names
from .steps.job import Job
from .steps.networks import NETWORKS, Step

_BURST_SECONDS, _LONGEST_BURST = 0.2, 20  # on a GPU, a turn is that many steps
_MOST_ROUNDS = 50


@dataclass
class StepRow:
    """What one contestant's step took."""

    network: str
    method: str
    precision: str  # of all but the papers' way, which is float32
    contestant: str
    batch: int  # rows drawn from each set
    rows: int  # that the network learns from in a step: both batches, or the mixture of the two (`Job.rows`)
    layout: str
    seconds: float | None = None  # median; None: did not run
    best: float | None = None
    worst: float | None = None
    samples: int = 0
    reason: str = ""  # why it was not timed, or its memory not measured
    images_per_second: float | None = None  # rows / seconds
    times_faster: dict[str, float] = field(default_factory=dict)  # than each other contestant
    update_error: float | None = None  # relative L2 distance to the papers' update, at the gate; None: not gated
    first_call_seconds: float | None = None  # with compilation
    step_memory: int | None = None  # bytes at the peak, without the weights
    weights: int | None = None  # bytes
    stages: dict[str, float] = field(default_factory=dict)  # share of the step's time


@dataclass(frozen=True)
class StepOptions:
    full: bool
    smoke: bool
    memory: bool
    seconds: float
    official: dict[str, str]  # contestant -> checkout


class StepComparison:
    """The fixture `compare_steps`."""

    def __init__(self, benchmark, device: torch.device, options: StepOptions, threads: int, rows: list[StepRow], chosen: dict):
        self.benchmark, self.device, self.options, self.threads, self.rows, self.chosen = benchmark, device, options, threads, rows, chosen
        self._round = 0
        self._bursts: dict[str, int] = {}

    def __call__(self, network: str, method: str, precision: str = "float32") -> None:
        """Checks, then times."""
        job = Job(NETWORKS[network], method, self.device, precision)
        setting = self._setting(job)
        weights = sum(parameter.numel() * parameter.element_size() for parameter in setting.models[setting.layout].parameters())
        rows = {name: self._row(setting, name) for name in names(job, compiled=self.options.full, official=self.options.official)}
        self._gate(setting, rows)
        steps: dict[str, Step] = {}
        for name, row in rows.items():
            row.weights = weights
            if not row.reason:
                self._start(setting, name, row, steps)
        seconds = self._time(f"{network}, {method}", steps)
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        for name, median in medians.items():
            row = rows[name]
            row.seconds, row.best, row.worst, row.samples = median, min(seconds[name]), max(seconds[name]), len(seconds[name])
            row.images_per_second = row.rows / median
            row.times_faster = {other: value / median for other, value in medians.items() if other != name}
        if OURS in steps:
            rows[OURS].stages = stages.shares(steps[OURS], self.device)
        self._measure_memory(setting, rows)
        self.rows.extend(rows.values())
        self.benchmark.extra_info.update(device=str(self.device), threads=self.threads, steps=[asdict(row) for row in rows.values()], chosen=self.chosen)

    def _setting(self, job: Job) -> Setting:
        """With the faster layout, measured once for a network and precision, and, for ReTrack, the faster of one call and two."""
        key = f"{job.network.name} {job.precision}"
        if key not in self.chosen:
            layout, seconds = choices.faster_layout(job)
            self.chosen[key] = {"layout": next(name for name, value in LAYOUTS.items() if value == layout), "layout_seconds": seconds}
        chosen = self.chosen[key]
        setting = Setting(job, LAYOUTS[chosen["layout"]], joined=True, official=self.options.official)
        if job.method == "retrack":
            if "joined" not in chosen:
                chosen["joined"], chosen["joined_seconds"] = choices.faster_joined(job, setting.models[setting.layout], setting.layout)
            setting.joined = chosen["joined"]
        return setting

    def _row(self, setting: Setting, name: str) -> StepRow:
        job = setting.job
        layout = torch.contiguous_format if name in PAPERS else setting.layout
        precision = "float32" if name in PAPERS else job.precision
        return StepRow(job.network.name, job.method, precision, name, job.batch, job.rows, next(key for key, value in LAYOUTS.items() if value == layout))

    def _gate(self, setting: Setting, rows: dict[str, StepRow]) -> None:
        gate = Gate(setting, None if self.options.full or self.device.type == "cuda" else GATE_ROWS)
        for name, row in rows.items():
            if name.startswith(LIMIT) or name in (OFFICIAL_RETRACK, OFFICIAL_SISS):
                continue  # the one learns nothing, the others draw by themselves
            if COMPILED in name and setting.job.precision != "float32":
                continue  # the float32 comparison of the same run has it; compiling the network once more takes minutes
            try:
                row.update_error, seconds = gate.error(name)
            except Exception as error:
                row.reason = f"{name}: {type(error).__name__}: {_first_line(error)}"
                continue
            if COMPILED in name:
                row.first_call_seconds = seconds
            if not row.update_error <= GATE:
                row.reason = f"{name}: its update differs from the papers' by {row.update_error:.2g} (relative L2, float32), more than {GATE:g}"

    def _start(self, setting: Setting, name: str, row: StepRow, steps: dict[str, Step]) -> None:
        """Builds a contestant and takes its first step, the warm-up; on a GPU a second one, for its memory and the length of its turns."""
        gpu = self.device.type == "cuda"
        if gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            step = setting.build(name)
            step()
            if gpu:
                seconds = self._seconds(step, 1)
                row.step_memory = torch.cuda.max_memory_allocated() - before
                self._bursts[name] = max(1, min(_LONGEST_BURST, int(_BURST_SECONDS / seconds)))
        except Exception as error:
            row.reason = f"{name}: {type(error).__name__}: {_first_line(error)}"
            return
        steps[name] = step

    def _time(self, group: str, steps: dict[str, Step]) -> dict[str, list[float]]:
        """The turns, as one benchmark: what pytest-benchmark itself sees is the whole of them."""
        least = 7 if self.options.smoke else 3
        self.benchmark.group = group
        arguments = (steps, self._clock, 0.0 if self.options.smoke else self.options.seconds, least, _MOST_ROUNDS)
        return self.benchmark.pedantic(harness.take_turns, args=arguments, rounds=1, iterations=1)

    def _clock(self, steps: dict[str, Step]) -> dict[str, float]:
        """One round. Every contestant starts it from the same seed; on a GPU a turn is a step that is not timed, for the memory that another one's
        `empty_cache` gave back, and then a burst of them."""
        self._round += 1
        taken = {}
        for name, step in steps.items():
            torch.manual_seed(self._round)
            if self.device.type == "cuda":
                step()
            taken[name] = self._seconds(step, self._bursts.get(name, 1))
        return taken

    def _seconds(self, step: Step, count: int) -> float:
        synchronize(self.device)
        began = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(self.device)
        return (time.perf_counter() - began) / count

    def _measure_memory(self, setting: Setting, rows: dict[str, StepRow]) -> None:
        """On a CPU, in a process for each contestant that is not compiled and not an official one."""
        if self.device.type != "cpu" or not self.options.memory:
            return
        for name, row in rows.items():
            if row.seconds is not None and COMPILED not in name and name not in self.options.official:
                try:
                    row.step_memory = memory.measure(setting, name, self.threads)["step"]
                except RuntimeError as error:
                    row.reason = f"memory of {error}"


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "")
