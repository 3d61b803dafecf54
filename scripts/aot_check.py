"""Compiles every configuration of every Triton kernel for sm_80 and sm_90, without a GPU: fails on spills and on too much shared memory.

    python scripts/aot_check.py           write registers and shared memory into docs/kernels.md
    python scripts/aot_check.py --check   fail if docs/kernels.md says something else
    python scripts/aot_check.py --only redirect    compile one op and print its rows

A kernel module `kernels/<op>.py` lists in `configurations()` what its launcher can choose (kernels/variant.py); a kernel that no configuration names fails.
"""

from __future__ import annotations

import argparse
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("aot_check: TRITON_INTERPRET=1 replaces the compiler: unset it")

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from fastunlearn.kernels.variant import COMPILE_OPTIONS

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- aot_check: begin -->", "<!-- aot_check: end -->"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have on A100, H100/H200
PROCESSES = 2
HELPERS = {"images", "partial_sums", "philox", "redirect_parts", "variant"}  # modules of kernels/ without a launcher


class Usage(NamedTuple):
    """What one block of a compiled kernel takes."""

    registers: int  # per thread
    stack: int  # bytes per thread in local memory: spills or indexed arrays
    shared: int  # bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with docs/kernels.md in place of writing it")
    parser.add_argument("--only", metavar="OP", help="one op; prints its rows")
    arguments = parser.parse_args()

    variants = {op: configurations(op) for op in operations(arguments.only)}
    problems = [problem for op in variants for problem in unnamed(op, variants[op])]
    jobs = [(op, position, arch) for op in variants for position in range(len(variants[op])) for arch in SHARED_LIMIT]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("fork")) as pool:
        usages = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    for (op, position, arch), usage in usages.items():
        problems += complaints(f"{op}: {variants[op][position].label} (sm_{arch})", usage, SHARED_LIMIT[arch])
    if problems:
        sys.exit("\n".join(problems))

    table = "\n".join(markdown(variants, usages))
    if arguments.only:
        print(table)
    elif arguments.check:
        sys.exit(difference(table))
    else:
        before, after = sections()
        TABLE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}")


def operations(only: str | None) -> list[str]:
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem not in HELPERS)
    if only and only not in names:
        sys.exit(f"--only: expected one of {', '.join(names)}, got {only!r}")
    return [only] if only else names


def configurations(op: str) -> list:
    module = importlib.import_module(f"fastunlearn.kernels.{op}")
    return module.configurations() if hasattr(module, "configurations") else sys.exit(f"kernels/{op}.py: expected a function configurations(), got none")


def unnamed(op: str, variants: list) -> list[str]:
    """Complaints about kernels of `op` that no configuration names, and about labels that stand for two."""
    module = importlib.import_module(f"fastunlearn.kernels.{op}")
    kernels = {name for name, value in vars(module).items() if isinstance(value, JITFunction) and name.endswith("_kernel")}
    labels = [(variant.kernel.__name__, variant.label) for variant in variants]
    missing = [f"{op}: no configuration of {name}" for name in sorted(kernels - {name for name, _ in labels})]
    return missing + [f"{op}: {labels.count(label)} configurations {label}" for label in sorted(set(labels)) if labels.count(label) > 1]


def compile_one(job: tuple[str, int, int]) -> Usage | str:
    """Compile one variant for one architecture; the message of what went wrong, if it did."""
    op, position, arch = job
    variant = configurations(op)[position]
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    undefined = [name for name in names if (name in variant.signature) == (name in variant.constants)]
    if undefined or len(variant.signature) + len(variant.constants) != len(names):
        return f"signature and constants do not name every argument once: {undefined or sorted({*variant.signature, *variant.constants} - {*names})}"
    aligned = [n for n, kind in variant.signature.items() if n in variant.divisible or (kind.startswith("*") and n not in variant.unaligned)]
    source = ASTSource(
        fn=variant.kernel,
        signature=signature,
        constexprs=variant.constants,
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "maxnreg": variant.max_registers, **COMPILE_OPTIONS}
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler raises many kinds; each is a row that fails
        return f"{type(error).__name__}: {error}"
    return resources(compiled.asm["cubin"], compiled.metadata.shared)


def resources(cubin: bytes, shared: int) -> Usage | str:
    """Registers and local memory as the assembler recorded them; `shared` is what Triton asks for at launch."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run([knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    if found is None:
        return f"cuobjdump says nothing of registers: {report.stdout}{report.stderr}"
    registers, stack, local = map(int, found.groups())
    return Usage(registers, stack + local, shared)


def complaints(name: str, usage: Usage | str, shared_limit: int) -> list[str]:
    if isinstance(usage, str):
        return [f"{name}: {usage}"]
    found = [f"{name}: {usage.stack} bytes of local memory a thread (spills)"] if usage.stack else []
    return found + ([f"{name}: {usage.shared} bytes of shared memory, {shared_limit} allowed"] if usage.shared > shared_limit else [])


def markdown(variants: dict[str, list], usages: dict) -> list[str]:
    lines = [
        f"Compiled by triton {triton.__version__}; registers per thread and shared memory per block (bytes), sm_80 / sm_90; no variant spills.",
        "",
        "| kernel | configuration | warps | stages | registers | shared memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, records in variants.items():
        for position, variant in enumerate(records):
            a, b = (usages[op, position, arch] for arch in SHARED_LIMIT)
            cells = (f"`{variant.kernel.__name__}`", variant.label, variant.num_warps, variant.num_stages, f"{a.registers} / {b.registers}")
            lines.append("| " + " | ".join(map(str, cells)) + f" | {a.shared} / {b.shared} |")
    return lines


def sections() -> tuple[str, str]:
    """What stands before and after the table in docs/kernels.md."""
    text = TABLE.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        sys.exit(f"{TABLE}: expected the lines {BEGIN} and {END} once each")
    before, rest = text.split(BEGIN)
    return before, rest.split(END)[1]


def difference(table: str) -> str | None:
    """What is wrong with the table in docs/kernels.md; None if nothing is. Another triton than the pinned one allots other registers: no comparison."""
    before, after = sections()
    text = TABLE.read_text()
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    if f"Compiled by triton {pinned};" not in text:
        return f"{TABLE}: not made by the pinned triton {pinned}: run scripts/aot_check.py"
    if triton.__version__ != pinned:
        print(f"triton {triton.__version__} is not the pinned {pinned}: everything compiles, the table was not compared")
        return None
    return None if text == f"{before}{BEGIN}\n{table}\n{END}{after}" else f"{TABLE}: not what was compiled: run scripts/aot_check.py\n{table}"


if __name__ == "__main__":
    main()
