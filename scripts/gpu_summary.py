"""summary.txt of the check of GPUs: one screen, made of what is on disk."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

SHOWN_OPS = ("kernel", "kernel alone", "compiled")
MOST_FAILURES = 6


def render(found: dict, out: Path) -> str:
    """
    Args:
        found: what check.json says.
        out: the folder with the other files.
    """
    versions = found["versions"]
    lines = [
        f"{versions.get('gpu', 'no GPU: a rehearsal, no number means anything')}, commit {versions.get('commit', 'unknown')}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("gpu", "commit")),
        f"{found['seconds']:.0f} of {found['budget']:.0f} s",
        "",
    ]
    for stage in found["stages"]:
        lines.append(f"{stage['letter']}  {stage['stage']:<28} {stage['outcome']:<36} {stage['seconds']:6.1f} s")
    for part in (_tests(out / "tests.xml"), _ops(_rows(out, "ops")), _steps(_rows(out, "steps"))):
        if part:
            lines += ["", *part]
    return "\n".join(lines) + "\n"


def _rows(out: Path, kind: str) -> list[dict]:
    return [row for path in sorted(out.glob(f"{kind}_*.json")) for row in json.loads(path.read_text())["rows"]]


def _tests(path: Path) -> list[str]:
    """Counts, and the names of the first failures."""
    try:
        cases = list(ElementTree.parse(path).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return []
    failed = [case for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = sum(case.find("skipped") is not None for case in cases)
    lines = [f"tests: {len(cases) - len(failed) - skipped} passed, {len(failed)} failed, {skipped} skipped"]
    lines += [f"  failed: {case.get('classname')}::{case.get('name')}" for case in failed[:MOST_FAILURES]]
    return lines


def _ops(rows: list[dict]) -> list[str]:
    """Each op's kernel: time, share of the bandwidth of a copy, times faster than the papers' way and than inductor."""
    lines = [f"{'op':<18} {'shape':<18} {'job':<14} {'contestant':<14} {'us':>8} {'of copy':>8} {'x papers':>9} {'x inductor':>10}"]
    for row in rows:
        if row["contestant"] not in SHOWN_OPS or row["seconds"] is None:
            continue
        ratios = row["times_faster"] or {}
        cells = [f"{row['seconds'] * 1e6:8.1f}", f"{row['share']:8.0%}" if row["share"] else " " * 8]
        cells += [f"{ratios[name]:{width}.2f}" if name in ratios else " " * width for name, width in (("papers", 9), ("compiled", 10))]
        lines.append(f"{row['op']:<18} {row['shape']:<18} {row['job']:<14} {row['contestant']:<14} {' '.join(cells)}")
    reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
    return (lines if len(lines) > 1 else []) + [f"  {reason[:140]}" for reason in reasons][:MOST_FAILURES]


def _steps(rows: list[dict]) -> list[str]:
    """Each contestant of each comparison; the papers' way is float32 in all of them."""
    lines = []
    for row in rows:
        if row["contestant"] == "limit":
            lines += ["", f"{row['network']} {row['method']}, {row['precision']}, batch {row['batch']}, {row['layout']}; the papers' way: float32"]
            lines.append(f"  {'contestant':<30} {'ms':>8} {'x papers':>9} {'gate':>8} {'host ms':>8} {'launches':>8}")
        if row["seconds"] is None:
            lines.append(f"  {row['contestant']:<30} {row['reason'][:100]}")
            continue
        papers = next((value for name, value in row["times_faster"].items() if name.endswith("repo")), None)
        cells = [f"{row['seconds'] * 1e3:8.2f}", f"{papers:9.2f}" if papers else " " * 9]
        cells.append(f"{row['update_error']:8.0e}" if row["update_error"] is not None else " " * 8)
        cells.append(f"{row['host_seconds'] * 1e3:8.2f}" if row["host_seconds"] is not None else " " * 8)
        cells.append(f"{row['launches']:8d}" if row["launches"] is not None else "")
        lines.append(f"  {row['contestant']:<30} {' '.join(cells)}")
        if row["stages"]:
            lines.append("    stages: " + ", ".join(f"{name} {share:.0%}" for name, share in row["stages"].items()))
    return lines[1:]
