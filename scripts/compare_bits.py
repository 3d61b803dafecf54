"""Whether two trees of this repository compute the same bits, on this machine.

    python scripts/compare_bits.py OLD_TREE NEW_TREE [--quick] [-k WORD] [--list]

Every `*_step`, `Unlearner`, replay, two processes, runs that are stopped and resumed (also by the new tree
from the old one's checkpoints), the command, the ops and the search for neighbours run in both trees, each in
processes of its own, with the cases beside this script (`bits/`). What they return is hashed: dtype, shape,
bytes. The public names of the old tree must stand in the new one, with the same parameters in the same order;
new ones may be there. Hashes depend on the processor, so none are kept.

Ends with 0 only if everything is equal. A case that fails in both trees compares nothing, and counts as a
difference, but for those in "refusals", whose errors are compared. Build the extension of both trees first
(or copy it: fastunlearn/_C.abi3.so).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SHOWN = 40  # differences
PATIENCE = 900  # seconds for the cases of one process: only a defect reaches it


def environment_of(tree: Path, mode: str) -> dict[str, str]:
    """One thread, and nothing of the caller's that could set the package."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("FASTUNLEARN_", "TRITON_", "RANK", "WORLD_SIZE", "LOCAL_"))
    }
    fixed = {"PYTHONPATH": f"{tree}{os.pathsep}{HERE}", "PYTHONHASHSEED": "0", "PYTHONDONTWRITEBYTECODE": "1"}
    fixed |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return kept | fixed | ({"FASTUNLEARN_DRY": "1"} if mode == "rehearsal" else {})


def run_cases(tree: Path, mode: str, titles: list[str], scratch: Path, handed: Path) -> list[dict[str, Any]]:
    """What the processes of `mode` found in `tree`, by rank."""
    scratch.mkdir(exist_ok=True)
    chosen = scratch / f"{mode}.titles.json"
    chosen.write_text(json.dumps(titles))
    processes, outputs = [], []
    for rank in range(2 if mode == "pair" else 1):
        output = scratch / f"{mode}.{rank}.json"
        command = [
            sys.executable,
            "-P",
            "-m",
            "bits.child",
            "--tree",
            tree,
            "--mode",
            mode,
            "--titles",
            chosen,
        ]
        command += ["--scratch", scratch, "--handed", handed, "--output", output, "--rank", rank]
        processes.append(
            subprocess.Popen(list(map(str, command)), env=environment_of(tree, mode), cwd=scratch)
        )
        outputs.append(output)
    codes = [process.wait(PATIENCE) for process in processes]
    if any(codes):
        raise SystemExit(f"{tree}: the processes of {mode} ended with {codes}")
    return [json.loads(output.read_text()) for output in outputs]


def run_tree(tree: Path, cases: list, scratch: Path, handed: Path) -> tuple[dict[str, dict], dict[str, Any]]:
    """Case -> what came of it; and the public names."""
    from bits.registry import MODES

    found: dict[str, dict] = {}
    api: dict[str, Any] = {}
    for mode in MODES:
        titles = [case.title for case in cases if case.mode == mode]
        if not titles:
            continue
        start = time.perf_counter()
        answers = run_cases(tree, mode, titles, scratch, handed)
        print(f"{tree}: {len(titles)} cases, {mode}: {time.perf_counter() - start:.0f} s", file=sys.stderr)
        api |= answers[0]["api"]
        for title in titles:
            merged: dict[str, Any] = {"tensors": {}}
            for rank, answer in enumerate(answers):
                outcome = answer["cases"][title]
                before = f"rank {rank}: " if len(answers) > 1 else ""
                merged["tensors"] |= {
                    before + name: text for name, text in outcome.get("tensors", {}).items()
                }
                if "error" in outcome:
                    merged["error"] = before + outcome["error"]
            found[title] = merged
    return found, api


def difference(case, old: dict[str, Any], new: dict[str, Any]) -> str | None:
    """The first thing that differs between two outcomes of a case."""
    if old.get("error") != new.get("error"):
        return f"error: {old.get('error')} -> {new.get('error')}"
    if "error" in old:
        return None if case.refused else f"fails in both trees: {old['error']}"
    if case.refused:
        return "is refused in neither tree"
    if not old["tensors"]:
        return "returned nothing"
    for name in [*old["tensors"], *new["tensors"]]:
        before, after = (each["tensors"].get(name, "missing") for each in (old, new))
        if before != after:
            return f"{name}: {before} -> {after}"
    return None


def parameter_changes(old: list, new: list) -> list[str]:
    """What a caller of the old parameters would stumble over."""
    positional = [
        [each for each in parameters if each[1].startswith("POSITIONAL")] for parameters in (old, new)
    ]
    found = []
    if positional[1][: len(positional[0])] != positional[0]:
        found.append(f"positional parameters {positional[0]} -> {positional[1]}")
    kept = [tuple(each) for each in new]
    found += [
        f"parameter {each} is gone"
        for each in map(tuple, old)
        if each[1].startswith(("KEYWORD", "VAR")) and each not in kept
    ]
    known = {each[0] for each in old}
    optional = ("VAR_POSITIONAL", "VAR_KEYWORD")
    found += [
        f"parameter {each[0]} is new and has no default"
        for each in new
        if each[0] not in known and not each[2] and each[1] not in optional
    ]
    return found


def api_changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """Public names that are gone or changed; what is new may be."""
    found = []
    for name, before in old.items():
        after = new.get(name)
        if after is None:
            found.append(f"{name} is gone")
            continue
        changes = parameter_changes(before["parameters"], after["parameters"])
        if after["fields"][: len(before["fields"])] != before["fields"]:
            changes.append(f"fields {before['fields']} -> {after['fields']}")
        for method, parameters in before["methods"].items():
            if method not in after["methods"]:
                changes.append(f"{method} is gone")
            else:
                changes += [
                    f"{method}: {change}"
                    for change in parameter_changes(parameters, after["methods"][method])
                ]
        found += [f"{name}: {change}" for change in changes]
    return found


def report(cases: list, old: dict[str, dict], new: dict[str, dict], changes: list[str] | None) -> bool:
    """Prints the table; whether everything is equal."""
    differing = {
        case.title: text for case in cases if (text := difference(case, old[case.title], new[case.title]))
    }
    counts, first = Counter(case.group for case in cases), {}
    for case in cases:
        if case.title in differing:
            first.setdefault(case.group, []).append(case.title)
    print(f"{'group':<16} {'cases':>5}  result")
    for group, count in counts.items():
        told = first.get(group)
        print(f"{group:<16} {count:>5}  {f'{len(told)} differ' if told else 'equal'}")
    if changes is not None:
        print(f"{'public names':<16} {'':>5}  {f'{len(changes)} differ' if changes else 'equal'}")
    lines = [f"{title}\n    {text}" for title, text in differing.items()] + [
        f"public names: {change}" for change in changes or ()
    ]
    for line in lines[:SHOWN]:
        print(line)
    if len(lines) > SHOWN:
        print(f"... and {len(lines) - SHOWN} more")
    return not lines


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", type=Path, help="the tree to compare with")
    parser.add_argument("new", type=Path, help="the tree that is compared")
    parser.add_argument("--quick", action="store_true", help="leave out what takes long")
    parser.add_argument("-k", dest="word", default="", help="only cases with this in their title")
    parser.add_argument("--list", action="store_true", help="only print the titles of the cases")
    options = parser.parse_args()
    old, new = options.old.resolve(), options.new.resolve()
    for tree in (old, new):
        if not (tree / "fastunlearn/__init__.py").is_file():
            parser.error(f"{tree}: expected a tree of this repository, found no fastunlearn in it")

    sys.path[:0] = [str(old), str(HERE)]
    from bits import all_cases

    cases = [case for case in all_cases() if options.word in case.title and (case.quick or not options.quick)]
    if options.list or not cases:
        print("\n".join(case.title for case in cases) or f"no case has {options.word!r} in its title")
        return 0 if options.list else 1
    with tempfile.TemporaryDirectory(prefix="compare_bits_") as folder:
        handed = Path(folder) / "old"
        old_found, old_api = run_tree(old, cases, handed, handed)
        new_found, new_api = run_tree(new, cases, Path(folder) / "new", handed)
    changes = api_changes(old_api, new_api) if old_api else None
    return 0 if report(cases, old_found, new_found, changes) else 1


if __name__ == "__main__":
    sys.exit(main())
