"""Compiles every configuration of every Triton kernel for sm_80 and sm_90, without a GPU.

    python scripts/aot_check.py           write registers and shared memory into docs/kernels.md
    python scripts/aot_check.py --check   fail if docs/kernels.md says something else
    python scripts/aot_check.py --only redirect    compile one op and print its rows

Fails on local memory, on accesses narrower than the layout allows (`vectors` of a configuration), and on too
much shared memory. Runs with every Triton that pyproject.toml allows; beside it, torch and numpy are all that
it needs. The table is that of the pinned one. Others allot other registers: `--check` then compares all but
the table.

What the launcher of `kernels/<op>.py` can choose stands in `configurations()` of
`fastunlearn/testing/kernel_variants/<op>.py`; a kernel that no configuration names fails.
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
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

if os.environ.get("TRITON_INTERPRET", "0") == "1":
    sys.exit("aot_check: TRITON_INTERPRET=1 replaces the compiler: unset it")

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed

import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime import JITFunction

from fastunlearn.kernels.launch import COMPILE_OPTIONS
from fastunlearn.testing import kernel_variants
from fastunlearn.testing.kernel_variants import Variant

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- aot_check: begin -->", "<!-- aot_check: end -->"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a block may have on A100, H100/H200
WIDEST = 16  # bytes of one access of a thread
PROCESSES = 2
# modules of kernels/ without a launcher
HELPERS = {"images", "launch", "partial_sums", "philox", "redirect_parts"}


class Usage(NamedTuple):
    """What one block of a compiled kernel takes."""

    registers: int  # per thread
    stack: int  # bytes per thread in local memory: spills or indexed arrays
    shared: int  # bytes
    accesses: Counter  # (instruction, bytes) -> how many stand in the code, see `accesses`


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--check", action="store_true", help="compare with docs/kernels.md in place of writing it"
    )
    parser.add_argument("--only", metavar="OP", help="one op; prints its rows")
    arguments = parser.parse_args()

    variants = {op: configurations(op) for op in operations(arguments.only)}
    problems = [problem for op in variants for problem in unnamed(op, variants[op])]
    jobs = []
    for op in variants:
        jobs += [(op, position, arch) for position in range(len(variants[op])) for arch in SHARED_LIMIT]
    with ProcessPoolExecutor(PROCESSES, mp_context=multiprocessing.get_context("fork")) as pool:
        usages = dict(zip(jobs, pool.map(compile_one, jobs), strict=True))
    for (op, position, arch), usage in usages.items():
        problems += complaints(f"sm_{arch}", variants[op][position], usage, SHARED_LIMIT[arch])
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
    """The ops with a kernel module; `only` that one, if it is given."""
    names = sorted(path.stem for path in (ROOT / "kernels").glob("*.py") if path.stem not in HELPERS)
    if only and only not in names:
        sys.exit(f"--only: expected one of {', '.join(names)}, got {only!r}")
    return [only] if only else names


def configurations(op: str) -> list[Variant]:
    """What the launcher of `op` can choose."""
    path = Path(kernel_variants.__file__).with_name(f"{op}.py")
    if not path.exists():
        sys.exit(f"kernels/{op}.py: expected its configurations in {path.relative_to(ROOT)}, got none")
    return importlib.import_module(f"fastunlearn.testing.kernel_variants.{op}").configurations()


def unnamed(op: str, variants: list) -> list[str]:
    """Complaints about kernels of `op` that no configuration names, and about labels that stand for two."""
    module = importlib.import_module(f"fastunlearn.kernels.{op}")
    kernels = {
        name
        for name, value in vars(module).items()
        if isinstance(value, JITFunction) and name.endswith("_kernel")
    }
    labels = [(variant.kernel.__name__, variant.label) for variant in variants]
    missing = [f"{op}: no configuration of {name}" for name in sorted(kernels - {name for name, _ in labels})]
    return missing + [
        f"{op}: {labels.count(label)} configurations {label}"
        for label in sorted(set(labels))
        if labels.count(label) > 1
    ]


def compile_one(job: tuple[str, int, int]) -> Usage | str:
    """Compile one configuration for one architecture: `(op, position in configurations(op), arch)`."""
    op, position, arch = job
    return compile_variant(configurations(op)[position], arch)


def compile_variant(variant: Variant, arch: int) -> Usage | str:
    """What a block of `variant` takes on `arch` (80 or 90); the message of what went wrong, if it did."""
    names = variant.kernel.arg_names
    signature = {name: variant.signature.get(name, "constexpr") for name in names}
    undefined = [name for name in names if (name in variant.signature) == (name in variant.constants)]
    if undefined or len(variant.signature) + len(variant.constants) != len(names):
        wrong = undefined or sorted({*variant.signature, *variant.constants} - {*names})
        return f"signature and constants do not name every argument once: {wrong}"
    # Attributes of all arguments, written out as the JIT does it: so Triton's cache takes both for the same.
    attributes = {(position,): [] for position in range(len(names))}
    for name in variant.aligned():
        attributes[names.index(name),] = [["tt.divisibility", 16]]
    source = ASTSource(fn=variant.kernel, signature=signature, constexprs=variant.constants, attrs=attributes)
    options = {
        "num_warps": variant.num_warps,
        "num_stages": variant.num_stages,
        "maxnreg": variant.max_registers,
        **COMPILE_OPTIONS,
    }
    try:
        compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:  # the compiler raises many kinds; each is a row that fails
        return f"{type(error).__name__}: {error}"
    return resources(compiled)


def resources(compiled: CompiledKernel) -> Usage | str:
    """What a block of `compiled` takes; the message of what went wrong, if it did."""
    found = registers_and_local_memory(compiled.asm["cubin"])
    if isinstance(found, str):
        return found
    return Usage(*found, compiled.metadata.shared, accesses(compiled.asm["ptx"]))


def registers_and_local_memory(cubin: bytes) -> tuple[int, int] | str:
    """Registers and bytes of local memory of a thread, as the assembler recorded them, or what went wrong."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", report.stdout)
    if found is None:
        return f"cuobjdump says nothing of registers: {report.stdout}{report.stderr}"
    registers, stack, local = map(int, found.groups())
    return registers, stack + local


def accesses(ptx: str) -> Counter:
    """How many loads (`"ld"`) and stores (`"st"`) of global memory there are, by `(instruction, bytes)`.

    Several narrow elements are accessed as a vector, one number of 8 bytes is not. The latter is counted
    under `(instruction, 0)`, so that a float64 coefficient or int64 index is not taken for four bfloat16
    elements.
    """
    found = Counter()
    for instruction, modifiers in re.findall(r"\b(ld|st)\.global\.([.\w:]+)", ptx):
        parts = modifiers.split(".")
        lanes = next((int(part[1:]) for part in parts if re.fullmatch(r"v\d", part)), 1)
        size = lanes * int(re.sub(r"\D", "", parts[-1])) // 8
        found[instruction, 0 if size >= 8 and lanes == 1 else size] += 1
    return found


def complaints(arch: str, variant: Variant, usage: Usage | str, shared_limit: int) -> list[str]:
    """What is wrong with a compiled variant, one line each."""
    name = f"{variant.kernel.__name__}: {variant.label} ({arch})"
    if isinstance(usage, str):
        return [f"{name}: {usage}"]
    found = narrow_accesses(variant, usage.accesses)
    if usage.stack:
        found.append(f"{usage.stack} bytes of local memory a thread (spills)")
    if usage.shared > shared_limit:
        found.append(f"{usage.shared} bytes of shared memory, {shared_limit} allowed")
    return [f"{name}: {complaint}" for complaint in found]


def narrow_accesses(variant: Variant, found: Counter) -> list[str]:
    """Complaints about planes that are not accessed in the vectors that `variant.vectors` promises."""
    if variant.vectors is None:
        return []
    writes = dict.fromkeys(variant.vectors.writes, 1)
    complaints = []
    for instruction, planes in (("ld", variant.vectors.reads), ("st", writes)):
        given = {name: rows for name, rows in planes.items() if name in variant.signature}
        if not given:
            continue
        for size, count in wanted_accesses(variant, given).items():
            got = found[instruction, size]
            if got < count:
                complaints.append(
                    f"{', '.join(given)}: expected {count} {instruction} of {size} bytes, got {got}"
                )

        # A plane of bytes or half precision that loses its vectors is accessed one element at a time. Few
        # scalars are so narrow; words are too many to tell, for an int32 is as wide as four bytes.
        for size in (1, 2):
            scalars = narrow_scalars(variant, size)
            got = found[instruction, size]
            if got > scalars:
                complaints.append(
                    f"{', '.join(given)}: expected {scalars} {instruction} of {size} bytes, got {got}"
                )
    return complaints


def narrow_scalars(variant: Variant, size: int) -> int:
    """How many pointers to elements of `size` bytes are no planes that are accessed in vectors."""
    planes = {*variant.vectors.reads, *variant.vectors.writes}
    others = [name for name, kind in variant.signature.items() if kind.startswith("*") and name not in planes]
    return sum(variant.itemsize(name) == size for name in others)


def wanted_accesses(variant: Variant, planes: dict[str, int]) -> Counter:
    """Bytes of an access -> how many a thread makes at least, for argument -> rows in `planes`."""
    block = variant.constants["BLOCK"] if "BLOCK" in variant.constants else variant.constants["BLOCK_D"]
    elements = block // (32 * variant.num_warps)
    wanted = Counter()
    for name, rows in planes.items():
        itemsize = variant.itemsize(name)
        size = min(WIDEST, itemsize * variant.vectors.run)
        wanted[size] += rows * elements * itemsize // size
    return wanted


def markdown(variants: dict[str, list], usages: dict) -> list[str]:
    """The table of docs/kernels.md, line by line."""
    numbers = "registers per thread and shared memory per block (bytes), sm_80 / sm_90"
    lines = [
        f"Compiled by triton {triton.__version__}; {numbers}; no variant spills.",
        "",
        "| kernel | configuration | warps | stages | registers | shared memory |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for op, records in variants.items():
        for position, variant in enumerate(records):
            a, b = (usages[op, position, arch] for arch in SHARED_LIMIT)
            cells = (
                f"`{variant.kernel.__name__}`",
                variant.label,
                variant.num_warps,
                variant.num_stages,
                f"{a.registers} / {b.registers}",
            )
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
    """What is wrong with the table in docs/kernels.md; None if nothing is.

    Another triton than the pinned one allots other registers: no comparison.
    """
    before, after = sections()
    text = TABLE.read_text()
    pinned = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.M).group(1)
    if f"Compiled by triton {pinned};" not in text:
        return f"{TABLE}: not made by the pinned triton {pinned}: run scripts/aot_check.py"
    if triton.__version__ != pinned:
        unchecked = "everything compiles, the table was not compared"
        print(f"triton {triton.__version__} is not the pinned {pinned}: {unchecked}")
        return None
    if text == f"{before}{BEGIN}\n{table}\n{END}{after}":
        return None
    return f"{TABLE}: not what was compiled: run scripts/aot_check.py\n{table}"


if __name__ == "__main__":
    main()
