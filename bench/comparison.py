"""One comparison: the gate, the turns, the row of numbers for each contestant."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from types import ModuleType

import pytest
import torch
from torch import Tensor

from fastunlearn.testing.budgets import assert_within_budget

from . import devices, harness
from .cases import SMOKE, Shape, on_device
from .journal import Journal
from .ready import EVERYTHING, Ready

Call = Callable[[], Sequence[Tensor]]
PAPERS, PAPERS_ROWS, EAGER, COMPILED = "papers", "papers+rows", "eager", "compiled"
KERNEL, FILL = "kernel", "kernel alone"  # through the op; into outputs that exist already
KERNEL_BY_AUTOGRAD = "kernel, autograd"  # where the caller asks for the loss and calls backward()
OURS = (KERNEL, FILL, KERNEL_BY_AUTOGRAD)
# under torch.compile, in a default run on a GPU
_COMPILED_SHAPES, _COMPILED_JOBS = ("cifar", "celeba"), ("tensors", "float32", "low 1/4")


@dataclass
class Row:
    """What one contestant took.

    Bandwidths count `floor`, the bytes below which no implementation gets.
    """

    op: str
    shape: str
    job: str
    contestant: str
    backend: str
    seconds: float | None = None  # median; None: did not run
    best: float | None = None  # seconds of the quickest
    reason: str = ""  # why it did not run
    samples: int = 0
    floor: int = 0  # bytes
    # bytes that the kernel reads and writes, counted from its loads and stores; 0: not counted
    moved: int = 0
    gbps: float | None = None  # floor / seconds / 1e9
    copy_gbps: float | None = None  # of copy_, reads and writes, in the same rounds
    share: float | None = None  # of the copy's bandwidth
    times_faster: dict[str, float] | None = None  # than each other contestant
    launch_seconds: float | None = None  # on a GPU, by graph replay
    compile_seconds: float | None = None
    # seconds of the floor on each GPU of the device table, at this shape
    predicted: dict[str, float] | None = None


@dataclass(frozen=True)
class Options:
    full: bool
    smoke: bool
    seconds: float
    compile_only: bool = False  # nothing is timed
    ready: Ready = EVERYTHING  # what inductor has compiled beforehand


class Comparison:
    """The fixture `compare` of every benchmark of an op."""

    def __init__(
        self, benchmark, yardstick: harness.Yardstick, options: Options, threads: int, journal: Journal
    ):
        self.benchmark, self.yardstick, self.options, self.threads, self.journal = (
            benchmark,
            yardstick,
            options,
            threads,
            journal,
        )

    @property
    def device(self) -> torch.device:
        return self.yardstick.device

    @property
    def on_gpu(self) -> bool:
        return self.yardstick.accelerator is not None

    def _compiles(self, shape: str, job: str) -> bool:
        """Inductor takes seconds a case, too long for all of them in a default run, and for any of them on a
        few CPU cores.
        """
        return self.options.full or (
            self.on_gpu and shape.startswith(_COMPILED_SHAPES) and job in _COMPILED_JOBS
        )

    def shape(self, shape: Shape, neighbors: int = 0) -> Shape:
        """`shape` as this run times it."""
        return (
            replace(SMOKE, store_dtype=shape.store_dtype)
            if self.options.smoke
            else on_device(shape, self.device, neighbors)
        )

    def only_in_full(self, unless: bool = False) -> None:
        """Skips a case in a default run, `unless` it belongs there."""
        if not (self.options.full or self.options.smoke or unless):
            pytest.skip("runs with --full")

    def __call__(
        self,
        op: str,
        shape: Shape | str,
        job: str,
        calls: dict[str, Call],
        *,
        kernels: Sequence[str],
        floor: int,
        moved: int,
        gate: Callable[[str, Call], None],
        flops: int = 0,
        closed_form: ModuleType | Callable[..., Sequence[Tensor]],
        arguments: tuple,
    ) -> None:
        """Checks, then times.

        A contestant that fails is left out and its row says why; if it is one of ours, the benchmark fails in
        the end.

        Args:
            calls: the contestants.
            kernels: the ops that the contestant `KERNEL` consists of; where one has no kernel it does not
                run, and its row says why.
            floor, moved: bytes, see `Row`.
            gate: raises where a contestant's results are wrong.
            flops: of matrix products, if they can be the bottleneck.
            closed_form, arguments: what the contestants `EAGER` and `COMPILED` call; or the module of the op,
                whose kernel is then timed alone, too.
        """
        calls, failed, missing = dict(calls), {}, {}
        module = closed_form if isinstance(closed_form, ModuleType) else None
        formula = module._eager if module else closed_form
        calls[EAGER] = lambda: formula(*arguments)
        took = self._add_compiled(op, str(shape), job, calls, failed, formula, arguments)
        if self.options.compile_only:
            for name in {KERNEL, KERNEL_BY_AUTOGRAD} & calls.keys():  # Triton compiles, too
                calls[name]()
            return

        try:
            backend = "+".join(dict.fromkeys(harness.kernel_name(kernel, self.device) for kernel in kernels))
        except LookupError as error:
            backend, missing[KERNEL] = "none", str(error)
            for name in (KERNEL, KERNEL_BY_AUTOGRAD):
                calls.pop(name, None)
        else:
            calls[KERNEL] = calls.pop(KERNEL)  # the last row of the table
            if module:
                calls[FILL] = lazily(lambda: harness.filling(op, module, arguments))

        for name in list(calls):
            try:
                calls[name]()
                # The papers' way was run in float64 against the reference, see `expect_equal`.
                if name not in (PAPERS, PAPERS_ROWS):
                    gate(name, calls[name])
            except Exception as error:
                failed[name] = f"{type(error).__name__}: {error}"
                del calls[name]

        seconds = self._time_the_others(f"{op}, {job}", calls, failed)
        copy_gbps = self.yardstick.bandwidth(statistics.median(seconds.pop("copy"))) / 1e9
        medians = {name: statistics.median(values) for name, values in seconds.items()}
        predicted = {device.name: device.floor_seconds(floor, flops) for device in devices.DEVICES}
        rows = []
        for name, median in medians.items():
            gbps = floor / median / 1e9
            rows.append(
                Row(
                    *(op, str(shape), job, name, backend if name in OURS else "torch"),
                    seconds=median,
                    best=min(seconds[name]),
                    samples=len(seconds[name]),
                    floor=floor,
                    moved=moved if name in (KERNEL, FILL) else 0,
                    gbps=gbps,
                    copy_gbps=copy_gbps,
                    share=gbps / copy_gbps,
                    times_faster={other: value / median for other, value in medians.items() if other != name},
                    compile_seconds=took.get("seconds") if name == COMPILED else None,
                    predicted=predicted if name in (KERNEL, FILL) else None,
                )
            )
        rows += [
            Row(op, str(shape), job, name, backend, reason=reason, floor=floor, predicted=predicted)
            for name, reason in missing.items()
        ]
        rows += [
            Row(op, str(shape), job, name, "none", reason=f"{name}: {reason}")
            for name, reason in failed.items()
        ]
        self.journal.add(rows)
        self._measure_launches(rows, calls)
        self.benchmark.extra_info.update(
            device=str(self.device), threads=self.threads, rows=[asdict(row) for row in rows]
        )
        if wrong := [f"{name}: {failed[name]}" for name in OURS if name in failed]:
            pytest.fail("; ".join(wrong))

    def _add_compiled(
        self,
        op: str,
        shape: str,
        job: str,
        calls: dict[str, Call],
        failed: dict[str, str],
        formula: Callable,
        arguments: tuple,
    ) -> dict[str, float]:
        """`COMPILED`, where it takes part; a dict that gets the `seconds` of its first call."""
        if not self._compiles(shape, job):
            return {}
        label = f"{op}, {shape}, {job}"
        reason = self.options.ready.missing(label)
        if reason is not None:
            failed[COMPILED] = reason
            return {}
        inductor, took = harness.compiled(formula)
        calls[COMPILED] = lambda: inductor(*arguments)
        if self.options.compile_only:
            with self.options.ready.compiling(label):
                calls[COMPILED]()
        return took

    def _measure_launches(self, rows: list[Row], calls: dict[str, Call]) -> None:
        """On a GPU, after everything is on disk: a capture that fails costs nothing else."""
        if self.yardstick.accelerator is None:
            return
        for row in rows:
            if row.contestant in (KERNEL, FILL) and row.seconds is not None:
                try:
                    row.launch_seconds = harness.launch_seconds(
                        calls[row.contestant], self.yardstick.accelerator
                    )
                except Exception as error:
                    row.reason = f"{row.contestant} in a graph: {type(error).__name__}: {error}"
        self.journal.write()

    def _time(self, group: str, calls: dict[str, Call]) -> dict[str, list[float]]:
        """The turns, as one benchmark: what pytest-benchmark itself sees is the whole of them."""
        least, seconds = (1, 0.0) if self.options.smoke else (5, self.options.seconds)
        turns = {**calls, "copy": self.yardstick.copy}
        self.benchmark.group = group
        return self.benchmark.pedantic(
            harness.alternate, args=(turns, self.yardstick, seconds, least), rounds=1, iterations=1
        )

    def _time_the_others(
        self, group: str, calls: dict[str, Call], failed: dict[str, str]
    ) -> dict[str, list[float]]:
        """The turns of all contestants; of the others anew, where one fails in the middle."""
        while True:
            running: list[str] = []
            try:
                return self._time(group, {name: _noted(name, call, running) for name, call in calls.items()})
            except Exception as error:
                if not running or running[-1] not in calls:
                    raise
                failed[running[-1]] = f"{type(error).__name__}: {error}"
                del calls[running[-1]]


def _noted(name: str, call: Call, running: list[str]) -> Call:
    """`call`, whose name stands last in `running` from its start on."""

    def noted() -> Sequence[Tensor]:
        running.append(name)
        return call()

    return noted


def lazily(make: Callable[[], Call]) -> Call:
    """A contestant that is built at its first call, so that what hinders it costs nobody else."""
    built: list[Call] = []

    def call() -> Sequence[Tensor]:
        if not built:
            built.append(make())
        return built[0]()

    return call


def from_tensors_and_rows(
    by_papers: Callable[..., Sequence[Tensor]], images: Callable[[], tuple[Tensor, ...]], job: str
) -> dict[str, Call]:
    """The papers' way from the float tensors that a DataLoader hands over, and, in jobs with rows, from the
    store: the gathering and converting timed too.

    Args:
        by_papers: of those tensors.
        images: makes them from the store.
    """
    ready = images()
    calls = {PAPERS: lambda: by_papers(*ready)}
    return calls if job == "tensors" else calls | {PAPERS_ROWS: lambda: by_papers(*images())}


def check(
    names: Sequence[str | None],
    rows: Tensor,
    plain: dict[str, Tensor | Sequence[Tensor]],
    truth: dict[str, Tensor],
) -> Callable[[str, Call], None]:
    """A gate: the named results, at `rows` of the batch, err at most twice as much as `plain`, the literal
    formula in float32, does.

    Args:
        names: what each result of a call is; None: not compared.
        plain, truth: the literal formula in float32 (or several evaluations of it) and in float64, at `rows`.
    """

    def gate(contestant: str, call: Call) -> None:
        for name, value in zip(names, call(), strict=True):
            if name is not None:
                assert_within_budget(f"{contestant}: {name}", value.detach()[rows], plain[name], truth[name])

    return gate


def expect_equal(actual: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    """The papers' way, run in float64, computes what the reference does: the baseline is no other formula."""
    for name, value in actual.items():
        torch.testing.assert_close(
            value, truth[name], rtol=1e-9, atol=1e-9, msg=lambda text, name=name: f"papers' {name}: {text}"
        )


def parametrize_shapes(shapes: dict[str, Shape]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("shape", shapes.values(), ids=shapes)
