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
SHOWN = 5  # differences of a group
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


def extension(tree: Path) -> list[str]:
    """The names of the built libraries in `tree`."""
    return sorted(file.name for file in tree.glob("fastunlearn/**/_C*.so"))


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


def difference(case, old: dict[str, Any], new: dict[str, Any]) -> tuple[str, str] | None:
    """The first thing that differs between two outcomes of a case: where, and what."""
    if old.get("error") != new.get("error"):
        return "error", f"{old.get('error')} -> {new.get('error')}"
    if "error" in old:
        return None if case.refused else ("fails in both trees", old["error"])
    if case.refused:
        return "is refused in neither tree", "an error was expected"
    if not old["tensors"]:
        return "returned nothing", "there is nothing to compare"
    for name in [*old["tensors"], *new["tensors"]]:
        before, after = (each["tensors"].get(name, "missing") for each in (old, new))
        if before != after:
            return name, f"{before} -> {after}"
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


def report(cases: list, old: dict[str, dict], new: dict[str, dict], api: tuple[dict, dict]) -> bool:
    """Prints the table, and some of what differs; whether everything is equal."""
    counts = Counter(case.group for case in cases)
    found: dict[str, list[tuple[str, str]]] = {group: [] for group in counts}
    for case in cases:
        differing = difference(case, old[case.title], new[case.title])
        if differing is not None:
            where, what = differing
            found[case.group].append((f"{case.name}: {where}", what))
    if api[0]:
        counts["public names"] = len(api[0])
        found["public names"] = [(change, "") for change in api_changes(*api)]

    print(f"{'group':<14} {'cases':>5}  result")
    for group, lines in found.items():
        result = f"{len(lines)} differ, first {lines[0][0]}" if lines else "equal"
        print(f"{group:<14} {counts[group]:>5}  {result}")
    for group, lines in found.items():
        for where, what in lines[:SHOWN]:
            print(f"{group}: {where}" + (f"\n    {what}" if what else ""))
        if len(lines) > SHOWN:
            print(f"{group}: and {len(lines) - SHOWN} more")
    return not any(found.values())


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

    if extension(old) != extension(new):
        print(f"the extension is built in one tree only: {extension(old)}, {extension(new)}", file=sys.stderr)

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
    return 0 if report(cases, old_found, new_found, (old_api, new_api)) else 1


if __name__ == "__main__":
    sys.exit(main())
