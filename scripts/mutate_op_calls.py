"""Calls every op with arguments that were changed at random, and counts what comes of it.

    python scripts/mutate_op_calls.py [--calls 20000] [--seed 0] [--first 0]

A call of the C++ kernel is right where plain torch gives the same answer, or where both refuse. It is wrong
where they differ, where one of them refuses alone, or where the process dies. Each wrong one is printed with
its number: `--first N --calls 1` repeats it. Exit status: 0 where none is.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import fastunlearn.functional  # noqa: F401 (defines the ops)
from fastunlearn.testing.factories import linear_schedule

BATCH, STORED, NEIGHBORS, SHAPE, WIDTH = 3, 6, 4, (3, 5, 7), 11
DTYPES = (
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
    torch.complex64,
    torch.float8_e4m3fn,
)
INTEGERS = (0, 1, -1, 2, 2**31, 2**32, 2**63 - 1, -(2**63))
FLOATS = (0.0, 1.0, -1.0, 0.5, 1e-300, 1e15, float("inf"), float("nan"))
SCHEDULE = linear_schedule()
Call = tuple[str, list]


# --- calls as they should be --------------------------------------------------------------------------------


def right_call(op: str, rng: random.Random) -> list:
    """Arguments that `fastunlearn::<op>` takes."""
    dtype = rng.choice((torch.float16, torch.bfloat16, torch.float32, torch.float64))
    stored = rng.choice((torch.uint8, dtype))
    images = _images(STORED, stored)
    rows, many = torch.randint(STORED, (BATCH,)), torch.randint(STORED, (BATCH, NEIGHBORS))
    coefficients = SCHEDULE.coefficients(torch.randint(1000, (BATCH,)))
    drawn = rng.choice(
        ([torch.randn(BATCH, *SHAPE), None, 0], [None, torch.randint(99, (3,)), rng.randrange(9)])
    )
    layout = [dtype, rng.random() < 0.5]
    if op == "noising":
        return [images, rows, coefficients, *drawn, rng.random() < 0.5, *layout]
    if op == "redirect":
        return [images, rows, images, many, coefficients, None, *drawn, *layout]
    if op == "mixture":
        chosen = torch.rand(BATCH) < 0.5
        others = torch.randint(STORED, (BATCH,))
        return [images, rows, images, others, coefficients, chosen, rng.random(), None, *drawn, *layout]
    prediction, target, weight = (
        torch.randn(BATCH, *SHAPE).to(dtype),
        torch.randn(BATCH, *SHAPE),
        torch.rand(BATCH),
    )
    if op == "residual":
        return [prediction, target, weight]
    if op == "lowpass_residual":
        return [prediction, target, weight, torch.rand(2, 3), rng.random(), rng.random()]
    return [torch.randint(256, (rows_of, WIDTH), dtype=torch.uint8) for rows_of in (BATCH, STORED)]


def _images(count: int, dtype: torch.dtype) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(256, (count, *SHAPE), dtype=dtype)
    return (2 * torch.rand(count, *SHAPE) - 1).to(dtype)


OPS = ("noising", "redirect", "mixture", "residual", "lowpass_residual", "sqdist")


# --- and as they should not be ------------------------------------------------------------------------------


def mutated(value: object, rng: random.Random) -> object:
    """`value`, changed in one way."""
    if isinstance(value, Tensor):
        return rng.choice(CHANGES)(value, rng)
    if isinstance(value, bool):
        return rng.choice((not value, None, 2))
    if isinstance(value, (int, float)):
        return rng.choice((*(INTEGERS if isinstance(value, int) else FLOATS), None))
    if isinstance(value, torch.dtype):
        return rng.choice((*DTYPES, None))
    return rng.choice((torch.zeros(BATCH), torch.zeros(BATCH, dtype=torch.int64), torch.zeros(()), 1))


def _other_dtype(value: Tensor, rng: random.Random) -> Tensor:
    return value.to(rng.choice(DTYPES))


def _other_shape(value: Tensor, rng: random.Random) -> Tensor:
    """One axis more or less, or one of another length."""
    axis = rng.randrange(value.ndim) if value.ndim else 0
    kinds: list[Callable[[], Tensor]] = [lambda: value.unsqueeze(axis), lambda: value.flatten()]
    if value.ndim:
        kinds += [
            lambda: value.select(axis, 0) if value.shape[axis] else value,
            lambda: value.narrow(axis, 0, rng.randrange(value.shape[axis] + 1)),
            lambda: torch.cat([value, value], axis),
        ]
    return rng.choice(kinds)()


def _other_strides(value: Tensor, rng: random.Random) -> Tensor:
    """The same shape over other memory: transposed, with gaps, not aligned, or one number for all."""
    kinds: list[Callable[[], Tensor]] = [lambda: value.mT.contiguous().mT if value.ndim > 1 else value]
    kinds.append(lambda: torch.stack([value, value], -1)[..., 1])
    kinds.append(lambda: torch.cat([value.flatten()[:1], value.flatten()])[1:].view(value.shape))
    kinds.append(
        lambda: value.flatten()[:1].expand(value.numel()).view(value.shape) if value.numel() else value
    )
    return rng.choice(kinds)()


def _other_number(value: Tensor, rng: random.Random) -> Tensor:
    """One element that is not finite, negative, or as large as the dtype has."""
    if value.numel() == 0 or value.dtype == torch.bool or value.is_complex():
        return value
    changed = value.clone()
    if value.is_floating_point():
        number = rng.choice((float("nan"), float("inf"), -float("inf"), 0.0, -1.0))
    else:
        limits = torch.iinfo(value.dtype)
        number = rng.choice((limits.min, limits.max, max(limits.min, -1), STORED, 2**20 & limits.max))
    try:
        changed.view(-1)[rng.randrange(value.numel())] = number
    except RuntimeError:  # a dtype that takes no such number
        return value
    return changed


def _none(value: Tensor, rng: random.Random) -> None:
    return None


def _another_kind(value: Tensor, rng: random.Random) -> object:
    return rng.choice(
        (value.to("meta"), value.to_sparse() if value.ndim else value, value.tolist(), "text", 3)
    )


CHANGES = (_other_dtype, _other_shape, _other_strides, _other_number, _none, _another_kind)


def call_of(number: int, seed: int) -> Call:
    """The call of this number: one to three arguments of a right one are changed."""
    rng = random.Random(f"{seed} {number}")
    torch.manual_seed(rng.randrange(2**31))
    op = rng.choice(OPS)
    arguments = right_call(op, rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(arguments))
        try:
            arguments[place] = mutated(arguments[place], rng)
        except (RuntimeError, NotImplementedError):  # torch cannot make such a tensor
            continue
    return op, arguments


# --- what comes of them -------------------------------------------------------------------------------------


def outcome(op: str, arguments: list, backend: str) -> tuple[Tensor, ...] | Exception:
    os.environ["FASTUNLEARN_BACKEND"] = backend
    try:
        found = getattr(torch.ops.fastunlearn, op).default(*arguments)
    except Exception as error:  # what an op may raise is looked at by `verdict`
        return error
    return found if isinstance(found, tuple) else (found,)


def verdict(op: str, arguments: list) -> str:
    """`same`, `refused` (the kernel refuses; plain torch may know more dtypes), or what is wrong."""
    ours, plain = outcome(op, arguments, "kernels"), outcome(op, arguments, "eager")
    if isinstance(ours, Exception):
        return "refused"
    if isinstance(plain, Exception):
        return f"only plain torch refuses: {type(plain).__name__}: {str(plain).splitlines()[0][:160]}"
    # Infinity times zero is NaN: where one is given, which sums have the product is not the same for both.
    all_finite = all(_is_finite(argument) for argument in arguments)
    for one, two in zip(ours, plain, strict=True):
        if (one.dtype, one.shape) != (two.dtype, two.shape):
            return f"{one.dtype} {tuple(one.shape)} and {two.dtype} {tuple(two.shape)}"
        if one.is_meta:
            continue
        if not _close(one, two, all_finite):
            return f"values differ: {one.flatten()[:4].tolist()} and {two.flatten()[:4].tolist()}"
    return "same"


def _is_finite(argument: object) -> bool:
    if isinstance(argument, Tensor):
        if argument.is_meta or not argument.is_floating_point():
            return True
        return bool(argument.float().isfinite().all())
    return not isinstance(argument, float) or math.isfinite(argument)


def _close(one: Tensor, two: Tensor, all_finite: bool) -> bool:
    """Whether two answers differ by rounding alone, beside the largest finite number among them."""
    one, two = one.double(), two.double()
    if all_finite and not torch.equal(one.isfinite(), two.isfinite()):
        return False
    finite = one.isfinite() & two.isfinite()
    if not finite.any():
        return True
    # Sums that cancel, such as the spread of equal neighbours, are as exact as what they are sums of.
    return bool(((one - two)[finite].abs() <= 2e-2 * two[finite].abs().max() + 1e-6).all())


def shown(arguments: list) -> str:
    def one(value: object) -> str:
        if isinstance(value, Tensor):
            special = "".join(
                f" {word}"
                for word in (value.layout, value.device.type)
                if str(word) not in ("torch.strided", "cpu")
            )
            return f"{str(value.dtype)[6:]}{list(value.shape)}{special}"
        return str(value)[:24]

    return ", ".join(map(one, arguments))


def run(first: int, calls: int, seed: int, progress: Path) -> Counter[str]:
    """Looks at calls in this process; `progress` has the number of the present one."""
    counts: Counter[str] = Counter()
    for number in range(first, first + calls):
        progress.write_text(str(number))
        op, arguments = call_of(number, seed)
        found = verdict(op, arguments)
        if found not in ("same", "refused"):
            print(f"{number} {op}({shown(arguments)}): {found}", flush=True)
            found = "wrong"
        counts[found] += 1
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--calls", type=int, default=20_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--inside", type=Path, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    if flags.inside is not None:
        torch.set_num_threads(1)
        counts = run(flags.first, flags.calls, flags.seed, flags.inside)
        flags.inside.write_text(json.dumps(counts))
        return 0

    # In a process of its own, so that one which dies is counted, and the rest go on after it.
    counts, first, end = Counter[str](), flags.first, flags.first + flags.calls
    with tempfile.TemporaryDirectory() as scratch:
        progress = Path(scratch) / "progress"
        while first < end:
            part = min(1000, end - first)
            command = [sys.executable, __file__, "--first", str(first), "--calls", str(part)]
            command += ["--seed", str(flags.seed), "--inside", str(progress)]
            status = subprocess.run(command).returncode
            said = progress.read_text()
            if status == 0:
                counts.update(json.loads(said))
                first += part
                continue
            print(f"{said}: the process died ({status}): {call_of(int(said), flags.seed)[0]}", flush=True)
            counts["died"] += 1
            first = int(said) + 1
    print(", ".join(f"{count} {name}" for name, count in counts.items()))
    return int(bool(counts["wrong"] or counts["died"]))


if __name__ == "__main__":
    sys.exit(main())
