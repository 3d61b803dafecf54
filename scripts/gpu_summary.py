"""summary.txt of the check of GPUs: one screen, made of what is on disk."""

from __future__ import annotations

import json
from pathlib import Path

SHOWN_JOBS = ("rows", "float32", "low 1/4")  # the others are in the files
MOST_FAILURES = 6
MOST_SLOW = 3


def render(found: dict, out: Path, device: str, started: float) -> str:
    """
    Args:
        found: what check.json says.
        out: the folder with the other files.
        device: as the benchmarks' files name it.
        started: seconds since the epoch; older files are an earlier run's.
    """
    versions = found["versions"]
    name = versions.get("gpu", "no GPU: a rehearsal, no number means anything")
    lines = [
        f"{name}, commit {versions.get('commit', 'unknown')}",
        ", ".join(f"{name} {version}" for name, version in versions.items() if name not in ("gpu", "commit")),
        f"{found['seconds']:.0f} of {found['budget']:.0f} s",
        "",
    ]
    for stage in found["stages"]:
        name = f"{stage['letter']}  {stage['stage']:<28}"
        lines.append(f"{name} {stage['outcome']:<48} {stage['seconds']:6.1f} s")
    ops, steps = (read_rows(out, kind, device, since=started) for kind in ("ops", "steps"))
    for part in (_tests(out / "tests.jsonl", started), _ops(ops), _steps(steps)):
        if part:
            lines += ["", *part]
    return "\n".join(lines) + "\n"


def read_rows(out: Path, kind: str, device: str, since: float = 0.0) -> list[dict]:
    """The benchmarks' rows on disk, "ops" or "steps", of one device; none from an older or a damaged file."""
    path = out / f"{kind}_{device}.json"
    try:
        return json.loads(path.read_text())["rows"] if path.stat().st_mtime >= since else []
    except (OSError, ValueError, KeyError):
        return []


def _tests(path: Path, started: float) -> list[str]:
    """Counts, the names of the first failures and of the slowest."""
    try:
        if path.stat().st_mtime < started:
            return []
        lines = path.read_text().splitlines()
    except OSError:
        return []
    found = [line for line in map(_parsed, lines) if line]
    tests = [line for line in found if "test" in line]
    kinds = ("passed", "failed", "skipped")
    by_outcome = {kind: [test for test in tests if test["outcome"] == kind] for kind in kinds}
    counts = ", ".join(f"{len(some)} {kind}" for kind, some in by_outcome.items())
    collected = next((line["collected"] for line in found if "collected" in line), 0)
    ended = len({test["test"] for test in tests if "seconds" in test})
    summary = [f"tests: {counts}" + (f", {collected - ended} had not ended" if ended < collected else "")]
    for test in by_outcome["failed"][:MOST_FAILURES]:
        summary.append(f"  failed: {test['test']}")
    timed = sorted((test for test in tests if "seconds" in test), key=lambda test: -test["seconds"])
    slowest = ", ".join(f"{test['seconds']:.0f} s {test['test']}" for test in timed[:MOST_SLOW])
    return summary + ([f"  slowest: {slowest}"] if slowest else [])


def _parsed(line: str) -> dict | None:
    """A line of JSON; None where it was cut off."""
    try:
        return json.loads(line)
    except ValueError:
        return None


def _ops(rows: list[dict]) -> list[str]:
    """Each op's kernel alone: time, share of a copy's bandwidth, times faster than papers and inductor."""
    heads = f"{'us':>8} {'of copy':>8} {'x papers':>9} {'x inductor':>10}"
    lines = [f"{'op':<18} {'shape':<18} {'job':<14} {heads}"]
    for row in rows:
        alone = "kernel" if "+" in row["op"] else "kernel alone"
        if row["contestant"] != alone or row["job"] not in SHOWN_JOBS or row["seconds"] is None:
            continue
        ratios = row["times_faster"] or {}
        cells = [f"{row['seconds'] * 1e6:8.1f}", f"{row['share']:8.0%}"]
        cells += [_ratio(ratios.get("papers"), 9), _ratio(ratios.get("compiled"), 10)]
        lines.append(f"{row['op']:<18} {row['shape']:<18} {row['job']:<14} {' '.join(cells)}")
    reasons = dict.fromkeys(row["reason"] for row in rows if row["reason"])
    return (lines if len(lines) > 1 else []) + [f"  {reason[:140]}" for reason in reasons][:MOST_FAILURES]


def _steps(rows: list[dict]) -> list[str]:
    """The first job's contestants, one precision beside the other, and a line for every comparison."""
    comparisons: list[list[dict]] = []
    for row in rows:
        if row["contestant"] == "limit":
            comparisons.append([])
        comparisons[-1].append(row)
    if not comparisons:
        return []
    first = [found for found in comparisons if _job(found) == _job(comparisons[0])]
    lines = [*_side_by_side(first), ""]
    for found in comparisons:
        lines.append(_verdict(found))
    reasons = dict.fromkeys(said for row in rows for said in (row.get("note"), row["reason"]) if said)
    return lines + [f"  {reason[:140]}" for reason in reasons][:MOST_FAILURES]


def _job(found: list[dict]) -> tuple[str, str]:
    return found[0]["network"], found[0]["method"]


def _side_by_side(comparisons: list[list[dict]]) -> list[str]:
    """Contestants of one job, a block of columns for each precision; the papers' way is float32 in all."""
    network, method = _job(comparisons[0])
    width = 44
    heads = [f"{found[0]['precision']}, {found[0]['layout']}".ljust(width) for found in comparisons]
    columns = f"{'ms':>8} {'x papers':>9} {'gate':>7} {'host ms':>8} {'launches':>8}".ljust(width)
    lines = [f"{network} {method}, batch {comparisons[0][0]['batch']:<18} {''.join(heads)}".rstrip()]
    lines.append(f"{'':<32} {columns * len(comparisons)}".rstrip())
    by_name = [{row["contestant"]: row for row in found} for found in comparisons]
    for name in by_name[0]:
        cells = [_numbers(found.get(name)).ljust(width) for found in by_name]
        lines.append(f"{name:<32} {''.join(cells)}".rstrip())
    for found in comparisons:
        for row in found:
            if row["stages"]:
                shares = ", ".join(f"{stage} {share:.0%}" for stage, share in row["stages"].items())
                lines.append(f"stages of {row['contestant']}, {row['precision']}: {shares}")
    return lines


def _numbers(row: dict | None) -> str:
    if row is None:
        return ""
    if row["seconds"] is None:
        return "not timed"
    error, host, launches = row["update_error"], row["host_seconds"], row["launches"]
    cells = [f"{row['seconds'] * 1e3:8.2f}", _ratio(_over_papers(row), 9)]
    cells.append(" " * 7 if error is None else f"{error:7.0e}")
    cells.append(" " * 8 if host is None else f"{host * 1e3:8.2f}")
    return " ".join([*cells, " " * 8 if launches is None else f"{launches:8d}"])


def _verdict(found: list[dict]) -> str:
    """The quickest of ours against the papers' way, and the quickest of strongest and limit."""
    label = f"{found[0]['network']} {found[0]['method']}, {found[0]['precision']}: "
    ours = _quickest(found, "fastunlearn", "Unlearner")
    strongest, limit = _quickest(found, "strongest"), _quickest(found, "limit")
    if ours is None:
        return f"{label}none of ours was timed"
    parts = [f"{ours['contestant']} {ours['seconds'] * 1e3:.2f} ms"]
    over_papers = _over_papers(ours)
    if over_papers is not None:
        parts.append(f"{over_papers:.2f}x the papers' (float32)")
    if strongest is not None:
        parts.append(f"{strongest['seconds'] / ours['seconds']:.2f}x {strongest['contestant']}")
    if limit is not None:
        parts.append(f"{ours['seconds'] / limit['seconds']:.2f} of {limit['contestant']}")
    return label + "; ".join(parts)


def _quickest(found: list[dict], *names: str) -> dict | None:
    timed = [row for row in found if row["seconds"] is not None and row["contestant"].startswith(names)]
    return min(timed, key=lambda row: row["seconds"], default=None)


def _over_papers(row: dict) -> float | None:
    """How many times faster than the papers' way, as the method's own repository takes it."""
    return next((value for name, value in row["times_faster"].items() if name.endswith("repo")), None)


def _ratio(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:{width}.2f}"
