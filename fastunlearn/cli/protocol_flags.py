"""The flags of a deletion protocol, and its table."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from .unlearn import Unlearn


@dataclass(kw_only=True)
class ProtocolFlags:
    """How many images are forgotten at a time, and from which network."""

    protocol: Literal["together", "separate", "continual"] = "together"
    """together: all images to forget in one run. separate: each in a run of its own, from --model. \
continual: one after another, each from the network that the last one left, with a new optimizer; the \
earlier ones are measured again after each. The last two write a folder request-<number> for every run, with \
its model/, and protocol.json."""
    images_per_request: int = 1
    """Images of --forget in each run of separate and continual, in their order."""

    def check(self, command: Unlearn) -> None:
        """Whether they fit the other flags; before anything is read.

        Raises:
            TypeError, ValueError: naming the flag.
        """
        from ..host import check
        from ..runs.protocols import FILE
        from ..runs.run_record import RUN_FILE

        check.integer("--images_per_request", self.images_per_request, low=1)
        # The files of one would be taken for those of the other.
        other = FILE if self.protocol == "together" else RUN_FILE
        if (command.output / other).exists():
            expected = f"expected a folder without {other} with --protocol {self.protocol}"
            raise ValueError(f"--output: {expected}, got {command.output}")
        if self.protocol == "together":
            if self.images_per_request != 1:
                expected = "expected --protocol separate or continual beside it"
                raise ValueError(f"--images_per_request: {expected}, got together")
            return
        beside = f"with --protocol {self.protocol}"
        if not command.forget:
            raise ValueError(f"--forget: expected at least one path {beside}, got none")
        if command.allow_overlap and self.protocol == "continual":
            expected = f"expected --drop_overlap {beside} (later requests would learn the image again)"
            raise ValueError(f"--allow_overlap: {expected}, got --allow_overlap")
        resume = command.bookkeeping.resume_from_checkpoint
        if resume not in (None, "latest"):
            expected = f"expected latest {beside}, whose requests have checkpoints of their own"
            raise ValueError(f"--resume_from_checkpoint: {expected}, got {resume}")


def show(content: dict[str, Any], output: Path) -> None:
    """Prints the table of a finished protocol.

    Args:
        content: that of protocol.json.
    """
    from rich.console import Console
    from rich.table import Table

    from ..runs.protocols import FILE

    summary, continual = content["summary"], content["protocol"] == "continual"
    columns = ["request", "rows", "its loss", "its distance"]
    if continual:
        columns += ["loss of the earlier", "distance of the earlier"]
    table = Table(*columns, "loss of what stays")
    originally = content["before"]["retain"].get("loss")
    for row, request in zip(summary["requests"], content["requests"], strict=True):
        cells = [str(row["request"]), _rows(request["rows"])]
        cells += [_change(row["own"]["before"], row["own"]["after"], name) for name in ("loss", "distance")]
        if continual and row["earlier"] is None:
            cells += ["", ""]
        elif continual:
            earlier = row["earlier"]["when_deleted"], row["earlier"]["now"]
            cells += [_change(*earlier, name) for name in ("loss", "distance")]
        table.add_row(*cells, _change({"loss": originally}, row["retain"], "loss"))
    table.add_section()
    means, spreads = summary["mean"], summary["std"]
    own, retain = (
        {name: _with_spread(mean, spreads[of][name]) for name, mean in means[of].items()}
        for of in ("own", "retain")
    )
    cells = ["mean", "", own["loss"], own["distance"], *["", ""] * continual]
    table.add_row(*cells, retain.get("loss", ""))
    Console().print(table)
    earlier = "; of the earlier ones: right after their own deletion -> now" if continual else ""
    print(f"before -> after{earlier}. Losses and distances of a forgotten image grow.")
    print(f"protocol: {output / FILE}")


def _rows(rows: list[int]) -> str:
    return str(rows[0]) if len(rows) == 1 else f"{rows[0]}-{rows[-1]}"


def _change(before: dict[str, Any], after: dict[str, Any], name: str) -> str:
    if name not in after:
        return ""
    return f"{_number(before[name])} -> {_number(after[name])}"


def _with_spread(value: float | None, spread: float | None) -> str:
    return _number(value) if spread is None else f"{_number(value)} ± {_number(spread)}"


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4g}"
