"""One comparison of whole steps: the gate, the turns, the row of numbers for each contestant."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass, field

import torch

from fastunlearn.testing.accelerator import Accelerator

from . import harness
from .journal import Journal
from .ready import EVERYTHING, Ready
from .steps import choices, memory, stages
from .steps.choices import LAYOUTS, synchronize
from .steps.contestants import (
    BOTH,
    COMPILED,
    EAGERLY,
    GATE_ROWS,
    LIMIT,
    OFFICIAL_RETRACK,
    OFFICIAL_SISS,
    OURS,
    PAPERS,
    REPLAYED,
    RETRACK_REPO,
    SISS_REPO,
    STRONGEST,
    UNLEARNER,
    Gate,
    Setting,
    base_of,
    mode_of,
    names,
    papers_baseline,
)
from .steps.job import Job
from .steps.networks import NETWORKS, Step

_BURST_SECONDS, _LONGEST_BURST = 0.2, 20  # on a GPU, a turn is that many steps
_MOST_ROUNDS = 50
_HOST_SAMPLES = 5
_PROFILED = (RETRACK_REPO, SISS_REPO, STRONGEST, OURS, UNLEARNER)  # whose launches are counted
_GATE_ELEMENTS = 1 << 20  # of the images of one branch, on a GPU


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
    reason: str = ""  # why it was not timed, or something about it not measured
    note: str = ""  # what a reader of its time must know
    images_per_second: float | None = None  # rows / seconds
    times_faster: dict[str, float] = field(default_factory=dict)  # than each other contestant
    # relative L2 distance to the papers' update, at the gate; None: not gated
    update_error: float | None = None
    first_call_seconds: float | None = None  # with compilation
    step_memory: int | None = None  # bytes at the peak, without the weights
    weights: int | None = None  # bytes
    stages: dict[str, float] = field(default_factory=dict)  # share of the step's time
    # that a step occupies the host, on a GPU; where that is slower, its full queue holds the host back
    host_seconds: float | None = None
    launches: int | None = None  # calls of the GPU by the host in a step: kernels, and graphs of them


@dataclass(frozen=True)
class StepOptions:
    full: bool
    smoke: bool
    memory: bool
    seconds: float
    official: dict[str, str]  # contestant -> checkout
    layout: str | None = None  # None: the faster one
    contestants: tuple[str, ...] = ()  # by their eager names; (): all
    compile_only: bool = False  # nothing is timed
    ready: Ready = EVERYTHING  # what inductor has compiled beforehand


class StepComparison:
    """The fixture `compare_steps`.

    Args:
        accelerator: where the steps run; None: on the CPU.
        chosen: what was chosen by measurement in this run, by network and precision; filled.
    """

    def __init__(
        self,
        benchmark,
        accelerator: Accelerator | None,
        options: StepOptions,
        threads: int,
        journal: Journal,
        chosen: dict,
    ):
        self.benchmark, self.accelerator, self.options, self.threads = (
            benchmark,
            accelerator,
            options,
            threads,
        )
        self.journal, self.chosen = journal, chosen
        self._round = 0
        self._bursts: dict[str, int] = {}

    def __call__(self, network: str, method: str, precision: str = "float32") -> None:
        """Checks, then times. What a contestant cannot do is said in its row; the others stand."""
        device = torch.device("cpu") if self.accelerator is None else self.accelerator.device
        job = Job(NETWORKS[network], method, device, precision)
        if self.options.compile_only:
            self._compile(job)
            return
        setting = self._setting(job)
        rows = {name: self._row(setting, name) for name in self._names(job)}
        self._leave_out(setting, rows)
        self._check(setting, rows)
        steps: dict[str, Step] = {}
        for name, row in rows.items():
            if not row.reason:
                self._start(setting, name, row, steps)
        samples: dict[str, list[float]] = {name: [] for name in steps}
        try:
            self._time(f"{network}, {method}", steps, samples, rows)
        finally:
            # Also where the run is stopped in the middle: the rounds that were timed count.
            self._complete(rows, samples)
            self.journal.add(rows.values())
        for measure in (self._measure_host, self._measure_stages, self._measure_memory):
            measure(setting, rows, steps)
            self.journal.write()
        self.benchmark.extra_info.update(
            device=str(device),
            threads=self.threads,
            steps=[asdict(row) for row in rows.values()],
            chosen=self.chosen,
        )

    def _names(self, job: Job) -> list[str]:
        gpu = self.accelerator is not None
        every = names(job, compiled=self.options.full or gpu, replayed=gpu, official=self.options.official)
        return [
            name
            for name in every
            if not self.options.contestants or base_of(name) in self.options.contestants
        ]

    # --- what is chosen, and what is compiled
    # -----------------------------------------------------------------------------

    def _setting(self, job: Job) -> Setting:
        """With the faster layout, measured once for a network and precision, and, where a call has the rows
        of both branches (ReTrack's), the faster of one call and two.
        """
        key = f"{job.network.name} {job.precision}"
        chosen = self.chosen.setdefault(key, {})
        only = self.options.layout or chosen.get("layout")
        settings = choices.by_layout(job, self.accelerator, self.options.official, only)
        if only is None:
            self._choose_layout(settings, chosen, job)
        setting = settings[only or chosen["layout"]]
        # On a GPU one call of all rows, as this package makes it; two would have to be compiled apart.
        if self.accelerator is None and any(call.rows > job.batch for call in job.calls):
            if "joined" not in chosen:
                chosen["joined"], chosen["joined_seconds"] = choices.faster_joined(setting)
            setting.joined = chosen["joined"]
        return setting

    def _choose_layout(self, settings: dict[str, Setting], chosen: dict, job: Job) -> None:
        """Under the fastest mode that is timed; where that fails, under the next one, as `chosen` says."""
        modes = [EAGERLY]
        if self.accelerator is not None:
            compiled = all(
                self.options.ready.missing(self._label(job, layout, LIMIT)) is None for layout in LAYOUTS
            )
            modes = [BOTH] * compiled + [REPLAYED, EAGERLY]
        for mode in modes:
            try:
                chosen["layout"], chosen["layout_seconds"] = choices.faster_layout(settings, mode)
            except Exception as error:
                chosen.setdefault("layout_failures", []).append(_failure(mode.of(LIMIT), error))
            else:
                chosen["layout_mode"] = mode.of(LIMIT)
                return
        chosen["layout"] = "contiguous" if self.accelerator is None else "channels_last"

    def _compile(self, job: Job) -> None:
        """Every compiled contestant takes its first steps, in the layout that was asked for."""
        for layout, setting in choices.by_layout(job, self.accelerator, {}, self.options.layout).items():
            for name in self._names(job):
                if mode_of(name) != COMPILED:
                    continue
                with self.options.ready.compiling(self._label(job, layout, base_of(name))):
                    step = setting.build(name)
                    step()
                    step()

    @staticmethod
    def _label(job: Job, layout: str, base: str) -> str:
        return f"{job.network.name}, {job.method}, {job.precision}, {layout}, {base}"

    def _leave_out(self, setting: Setting, rows: dict[str, StepRow]) -> None:
        for name, row in rows.items():
            missing = self.options.ready.missing(self._label(setting.job, row.layout, base_of(name)))
            if mode_of(name).compiled and missing is not None:
                row.reason = f"{name}: {missing}"

    # --- the contestants
    # -----------------------------------------------------------------------------

    def _row(self, setting: Setting, name: str) -> StepRow:
        job = setting.job
        layout = torch.contiguous_format if name in PAPERS else setting.layout
        precision = "float32" if name in PAPERS else job.precision
        layout_name = next(key for key, value in LAYOUTS.items() if value == layout)
        row = StepRow(job.network.name, job.method, precision, name, job.batch, job.rows, layout_name)
        row.weights = sum(
            parameter.numel() * parameter.element_size() for parameter in setting.models[layout].parameters()
        )
        return row

    def _check(self, setting: Setting, rows: dict[str, StepRow]) -> None:
        """The gate. Where the papers' way itself cannot be run there is none, and every row says so."""
        try:
            gate = Gate(setting, self._gate_rows(setting.job))
        except Exception as error:
            for name, row in rows.items():
                row.note = f"{name}: not checked, for the papers' way failed: {_failure('', error)}"
            return
        if papers_baseline(setting.job.method) is None:
            for name, row in rows.items():
                row.note = f"{name}: the papers have no such method, so it is checked against {OURS} alone"
        for name, row in rows.items():
            # The limit learns nothing, and the official code draws by itself.
            if row.reason or base_of(name) == LIMIT or name in (OFFICIAL_RETRACK, OFFICIAL_SISS):
                continue
            try:
                found = gate.check(name)
            except Exception as error:
                row.reason = _failure(name, error)
                continue
            row.update_error = found.error
            if mode_of(name).compiled:
                row.first_call_seconds = found.seconds
            if not found.error <= found.allowed:  # NaN, too
                differs = f"differs from the papers' by {found.error:.2g} (relative L2)"
                row.reason = f"{name}: its update {differs}, more than {found.allowed:.2g}"

    def _gate_rows(self, job: Job) -> int | None:
        """Rows of the gate's batch; None: all."""
        if self.accelerator is None:
            return None if self.options.full else GATE_ROWS
        large = job.batch * job.images.forget[0].numel() > _GATE_ELEMENTS
        return max(GATE_ROWS, _GATE_ELEMENTS // job.images.forget[0].numel()) if large else None

    def _start(self, setting: Setting, name: str, row: StepRow, steps: dict[str, Step]) -> None:
        """Builds a contestant and takes its first steps, the warm-up; on a GPU their peak memory, and the
        length of its turns.
        """
        made: list[Step] = []

        def first_steps() -> None:
            made.append(setting.build(name))
            # A step that is replayed is warmed up and captured first.
            for _ in range(6 if mode_of(name).replayed else 2):
                made[0]()

        try:
            if self.accelerator is None:
                made.append(setting.build(name))
                made[0]()
            else:
                before = self.accelerator.allocated()
                row.step_memory = self.accelerator.peak_of(first_steps) - before
                seconds = self._seconds(made[0], 1)
                self._bursts[name] = max(1, min(_LONGEST_BURST, int(_BURST_SECONDS / seconds)))
            self._expect_to_learn(setting, name, made[0])
        except Exception as error:
            row.reason = _failure(name, error)
            return
        steps[name] = made[0]

    def _expect_to_learn(self, setting: Setting, name: str, step: Step) -> None:
        """What is timed was built anew after the gate: it must at least change the weights.

        Raises:
            RuntimeError: it does not.
        """
        parameters = list(setting.model(name).parameters())
        before = [parameter.detach().clone() for parameter in parameters]
        step()
        if all(torch.equal(one, two) for one, two in zip(before, parameters, strict=True)):
            raise RuntimeError("its step changes no weights")

    # --- the turns
    # -----------------------------------------------------------------------------

    def _time(
        self, group: str, steps: dict[str, Step], samples: dict[str, list[float]], rows: dict[str, StepRow]
    ) -> None:
        """The turns, as one benchmark: what pytest-benchmark itself sees is the whole of them."""
        least = 7 if self.options.smoke else 3
        self.benchmark.group = group
        seconds = 0.0 if self.options.smoke else self.options.seconds

        def clock(turns: dict[str, Step]) -> dict[str, float]:
            return self._clock(turns, samples, rows)

        self.benchmark.pedantic(
            harness.take_turns, args=(steps, clock, seconds, least, _MOST_ROUNDS), rounds=1, iterations=1
        )

    def _clock(
        self, steps: dict[str, Step], samples: dict[str, list[float]], rows: dict[str, StepRow]
    ) -> dict[str, float]:
        """One round.

        Every contestant starts it from the same seed; on a GPU a turn is a step that is not timed, for the
        memory that another one's `empty_cache` gave back, and then a burst of them. Who fails takes no turn
        any more.
        """
        self._round += 1
        for name, step in steps.items():
            if rows[name].reason:
                continue
            torch.manual_seed(self._round)
            try:
                if self.accelerator is not None:
                    step()
                samples[name].append(self._seconds(step, self._bursts.get(name, 1)))
            except Exception as error:
                rows[name].reason = _failure(name, error)
        return dict.fromkeys(steps, 0.0)  # `samples` has them

    def _seconds(self, step: Step, count: int) -> float:
        synchronize(self.accelerator)
        began = time.perf_counter()
        for _ in range(count):
            step()
        synchronize(self.accelerator)
        return (time.perf_counter() - began) / count

    @staticmethod
    def _complete(rows: dict[str, StepRow], samples: dict[str, list[float]]) -> None:
        medians = {
            name: statistics.median(values)
            for name, values in samples.items()
            if values and not rows[name].reason
        }
        for name, median in medians.items():
            row = rows[name]
            row.seconds, row.best, row.worst, row.samples = (
                median,
                min(samples[name]),
                max(samples[name]),
                len(samples[name]),
            )
            row.images_per_second = row.rows / median
            row.times_faster = {other: value / median for other, value in medians.items() if other != name}

    # --- what else is worth knowing, once the times are on disk
    # -----------------------------------------------------------------------------

    def _measure_host(self, setting: Setting, rows: dict[str, StepRow], steps: dict[str, Step]) -> None:
        """On a GPU: how long a step occupies the host, and how often it calls the device."""
        if self.accelerator is None:
            return
        for name, step in steps.items():
            row = rows[name]
            if row.seconds is None:
                continue
            try:
                row.host_seconds = self._host_seconds(step)
                if base_of(name) in _PROFILED:
                    row.launches = stages.launches(step, self.accelerator)
            except Exception as error:
                row.reason = f"profile of {_failure(name, error)}"
            self.journal.write()

    def _host_seconds(self, step: Step) -> float:
        taken = []
        for _ in range(_HOST_SAMPLES):
            synchronize(self.accelerator)
            began = time.perf_counter()
            step()
            taken.append(time.perf_counter() - began)
        synchronize(self.accelerator)
        return statistics.median(taken)

    def _measure_stages(self, setting: Setting, rows: dict[str, StepRow], steps: dict[str, Step]) -> None:
        if OURS in steps and rows[OURS].seconds is not None:
            try:
                rows[OURS].stages = stages.shares(steps[OURS], self.accelerator)
            except Exception as error:
                rows[OURS].reason = f"stages of {_failure(OURS, error)}"

    def _measure_memory(self, setting: Setting, rows: dict[str, StepRow], steps: dict[str, Step]) -> None:
        """On a CPU, in a process for each contestant that is not compiled and not an official one."""
        if self.accelerator is not None or not self.options.memory:
            return
        for name, row in rows.items():
            if row.seconds is not None and not mode_of(name).compiled and name not in self.options.official:
                try:
                    row.step_memory = memory.measure(setting, name, self.threads)["step"]
                except RuntimeError as error:
                    row.reason = f"memory of {error}"


def _failure(name: str, error: Exception) -> str:
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{name}: {type(error).__name__}: {first_line}"
