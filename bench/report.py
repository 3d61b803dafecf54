"""The table at the end of a run."""

from __future__ import annotations

import io
import shutil

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from .comparison import COMPILED, EAGER, FILL, KERNEL, PAPERS, PAPERS_ROWS, Row
from .devices import DEVICES, find

# What the kernels are to reach: op, start of the shape's name, job, device, what is compared, least value.
GOALS = (
    ("redirect+residual", "cifar", "tensors", "cpu", f"times_faster:{PAPERS}", 15),
    ("redirect+residual", "celeba", "rows", "cpu", f"times_faster:{PAPERS}", 30),
    ("lowpass_residual", "cifar", "low 1/4", "cpu", f"times_faster:{PAPERS}", 10),
    ("lowpass_residual", "sd", "low 1/4", "cpu", f"times_faster:{PAPERS}", 10),
    ("lowpass_residual", "celeba", "low 1/4", "cpu", f"times_faster:{PAPERS}", 10),
    ("noising", "celeba", "tensors", "cpu", "share", 0.6),
    ("mixture", "celeba", "tensors", "cpu", "share", 0.6),
    ("residual", "celeba", "float32", "cpu", "share", 0.6),
    ("noising", "celeba", "rows", "cuda", "share", 0.9),
    ("mixture", "celeba", "rows", "cuda", "share", 0.9),
    ("residual", "celeba", "float32", "cuda", "share", 0.9),
    ("redirect", "celeba", "rows", "cuda", "share", 0.8),
    ("lowpass_residual", "celeba", "low 1/4", "cuda", f"times_faster:{PAPERS}", 4),
    ("lowpass_residual", "celeba", "low 1/4", "cuda", "share", 0.75),
    ("lowpass_residual", "celeba", "low 1/4 s=0.1", "cuda", "share", 0.6),
    ("lowpass_residual", "celeba", "high 1/4", "cuda", "share", 0.6),
)
_STYLE = {"box": SIMPLE, "padding": (0, 1, 0, 0)}
SMALL_SHAPES, LAUNCH_GOAL = ("mnist", "cifar", "sd"), 8e-6  # seconds a launch


def render(rows: list[Row], device: str, gpu: str | None) -> str:
    """All tables as text, for a terminal or a log.

    Args:
        device: `"cpu"` or `"cuda"`.
        gpu: the name of the GPU, as torch gives it.
    """
    console = Console(
        file=io.StringIO(), width=max(172, shutil.get_terminal_size().columns), force_terminal=False
    )
    console.print(_times(rows))
    for reason in dict.fromkeys(row.reason for row in rows if row.reason):
        console.print(reason, style=None, soft_wrap=True, markup=False)
    goals = _goals(rows, device)
    if goals.row_count:
        console.print(goals)
    console.print(_floors(rows, gpu))
    return console.file.getvalue()


def _times(rows: list[Row]) -> Table:
    title = (
        "medians of alternating rounds; share: of the bandwidth of copy_ in the same rounds, counting the "
        "bytes of the floor (MB)"
    )
    table = Table(title=title, **_STYLE)
    for name in ("op, shape", "job", "contestant", "backend"):
        table.add_column(name, no_wrap=True)
    for name in (
        "ms",
        "x papers",
        "x +rows",
        "x eager",
        "x comp.",
        "floor",
        "moved",
        "GB/s",
        "share",
        "graph us",
        "compile s",
    ):
        table.add_column(name, justify="right", no_wrap=True)
    previous = None
    for row in rows:
        label = (f"{row.op} {row.shape}", row.job)
        if previous not in (None, label):
            table.add_section()
        cells = ("", "") if previous == label else label
        previous = label
        if row.seconds is None:
            table.add_row(*cells, row.contestant, "not run")
            continue
        numbers = [
            f"{row.seconds * 1e3:.3f}",
            *(_ratio(row, other) for other in (PAPERS, PAPERS_ROWS, EAGER, COMPILED)),
        ]
        numbers += [f"{size / 1e6:.2f}" if size else "" for size in (row.floor, row.moved)]
        numbers += ["", ""] if row.gbps is None else [f"{row.gbps:.1f}", f"{row.share:.0%}"]
        numbers += [
            f"{row.launch_seconds * 1e6:.1f}" if row.launch_seconds else "",
            f"{row.compile_seconds:.1f}" if row.compile_seconds else "",
        ]
        table.add_row(*cells, row.contestant, row.backend, *numbers)
    return table


def _ratio(row: Row, other: str) -> str:
    return f"{row.times_faster[other]:.2f}" if other in row.times_faster else ""


def _goals(rows: list[Row], device: str) -> Table:
    table = Table("op", "shape", "job", "what", "goal", "measured", "", title="goals", **_STYLE)
    for op, shape, job, where, what, least in GOALS:
        for row in rows:
            asked = row.seconds is not None and row.contestant == (FILL if what == "share" else KERNEL)
            if asked and where == device and (row.op, row.job) == (op, job) and row.shape.startswith(shape):
                value = row.share if what == "share" else row.times_faster[what.partition(":")[2]]
                label = "share of copy" if what == "share" else f"times faster than {what.partition(':')[2]}"
                table.add_row(
                    op,
                    row.shape,
                    job,
                    label,
                    f">= {least:g}",
                    f"{value:.2f}",
                    "met" if value >= least else "missed",
                )
    for row in rows:
        if (
            row.contestant == FILL
            and row.launch_seconds is not None
            and row.shape.startswith(SMALL_SHAPES)
            and _few_neighbors(row)
        ):
            met = "met" if row.launch_seconds <= LAUNCH_GOAL else "missed"
            table.add_row(
                row.op,
                row.shape,
                row.job,
                "us a launch",
                f"<= {LAUNCH_GOAL * 1e6:g}",
                f"{row.launch_seconds * 1e6:.1f}",
                met,
            )
    return table


def _few_neighbors(row: Row) -> bool:
    _, _, count = row.shape.partition(" K")
    return not count or int(count) <= 10


def _floors(rows: list[Row], gpu: str | None) -> Table:
    """The predicted floor on the GPUs of the device table, and how near the kernel came to it on the one that
    is there.
    """
    here = find(gpu) if gpu else None
    title = (
        "predicted floor in us at the shapes of this run, by the vendor's numbers; share of it that the "
        "kernel reached (-: not yet measured)"
    )
    table = Table(title=title, **_STYLE)
    for name in ("op", "shape", "job", "floor MB"):
        table.add_column(name, no_wrap=True)
    for device in DEVICES:
        table.add_column(device.name, justify="right")
        table.add_column("share", justify="right")
    for row in rows:
        if row.predicted is None or row.contestant != (
            KERNEL if "+" in row.op or row.seconds is None else FILL
        ):
            continue
        cells = []
        for device in DEVICES:
            floor = row.predicted[device.name]
            measured = f"{floor / row.seconds:.0%}" if device == here and row.seconds else "-"
            cells += [f"{floor * 1e6:.1f}", measured]
        table.add_row(row.op, row.shape, row.job, f"{row.floor / 1e6:.2f}", *cells)
    return table
