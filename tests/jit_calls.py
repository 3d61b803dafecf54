"""Every launcher of kernels/ through Triton's whole JIT path, for GPUs that are not there.

python tests/jit_calls.py [80|90 ...]

tests/test_jit.py runs this in a process of its own. The calls below are what the package asks of the
launchers, one for each configuration of `configurations()`. What the JIT makes of them must be these
configurations, all of them and nothing else: then what scripts/aot_check.py has checked is what runs.
"""

from __future__ import annotations

import importlib.util
import math
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["TRITON_INTERPRET"] = "0"  # the interpreter would take the place of the compiler

import torch

from fastunlearn.kernels.mixture import mixture
from fastunlearn.kernels.noising import noising
from fastunlearn.kernels.redirect import redirect
from fastunlearn.kernels.residual import residual
from fastunlearn.testing.compile_only import SHARED_MEMORY, Launch, compile_only

ROOT = Path(__file__).resolve().parents[1]
U8, F16, BF16, F32, F64 = torch.uint8, torch.float16, torch.bfloat16, torch.float32, torch.float64
MNIST, CIFAR, LATENTS, CELEBA = (1, 28, 28), (3, 32, 32), (4, 64, 64), (3, 256, 256)
ODD_MNIST, ODD_CIFAR, ODD_CELEBA = (1, 27, 29), (1, 37, 83), (1, 1, 196607)
PURPOSE = 5

# Nothing is launched and no number is read: a launcher looks at dtypes, addresses, and the shapes of results.
ROWS = {dtype: torch.empty(16, dtype=dtype) for dtype in (U8, F16, BF16, F32)}
INDEX = torch.empty(16, dtype=torch.int64)
COUNTER = torch.empty(3, dtype=torch.int64)
COEFFICIENTS = torch.empty(1, 5, dtype=F64)
CHOSEN = torch.empty(16, dtype=torch.bool)


def images(batch, shape, dtype=F32):
    return torch.empty(batch, *shape, dtype=dtype)  # pages that nobody touches take no memory


def drawn_or(noise):
    """Noise and counter, as an op hands them on: one of the two."""
    return (None, COUNTER) if noise is None else (ROWS[noise], None)


def call_noising(shape, rows, noise, dtype=F32, with_target=True, channels_last=False):
    x_t, target = images(2, shape, dtype), images(2, shape)
    given = drawn_or(noise)
    noising(ROWS[rows], INDEX, COEFFICIENTS, *given, PURPOSE, with_target, dtype, channels_last, x_t, target)


def call_mixture(shape, rows, noise, dtype=F32, channels_last=False, ratio=None):
    x_t, one, other = images(2, shape, dtype), images(2, shape), images(2, shape)
    weights = torch.empty(2, dtype=F64), torch.empty(2, dtype=F64)
    stores, given = (ROWS[rows], INDEX, ROWS[rows], INDEX), drawn_or(noise)
    results = x_t, one, other, *weights
    mixture(*stores, COEFFICIENTS, CHOSEN, 0.5, ratio, *given, PURPOSE, dtype, channels_last, *results)


def call_residual(shape, dtype=F32):
    prediction, target, gradient = images(2, shape, dtype), images(2, shape), images(2, shape, dtype)
    residual(prediction, target, torch.empty(2), torch.empty(2), gradient)


def call_redirect(batch, shape, k, rows, noise, dtype=F32, distances=True, channels_last=False):
    """uint8 rows come from a store by index, float rows as they are."""
    index = INDEX if rows == U8 else None
    sqdist = torch.empty(batch, k, dtype=F64) if distances else None
    outputs = images(batch, shape, dtype), images(batch, shape), torch.empty(batch), torch.empty(batch, k)
    stores, given = (ROWS[rows], index, ROWS[rows], index), drawn_or(noise)
    redirect(*stores, COEFFICIENTS, sqdist, *given, PURPOSE, dtype, channels_last, *outputs)


def call_all():
    call_noising(CIFAR, U8, None)
    call_noising(CIFAR, F32, F32)
    call_noising(ODD_CIFAR, U8, F32)
    call_noising(CELEBA, U8, None, BF16)
    call_noising(CELEBA, U8, F32)
    call_noising(CELEBA, BF16, BF16, BF16, with_target=False)
    call_noising(CELEBA, U8, None, BF16, channels_last=True)
    call_noising(CELEBA, F32, F32, channels_last=True)

    call_mixture(MNIST, U8, None)
    call_mixture(CIFAR, U8, None, BF16)
    call_mixture(ODD_CIFAR, F32, F32)
    call_mixture(CELEBA, U8, None, BF16)
    call_mixture(CELEBA, U8, F32)
    call_mixture(CELEBA, F32, F32)
    call_mixture(CIFAR, U8, None, BF16, channels_last=True)
    call_mixture(CELEBA, F32, F32, channels_last=True)
    call_mixture(CIFAR, F32, F32, ratio=torch.empty(2, dtype=F64))
    call_mixture(CELEBA, F32, F32, ratio=torch.empty(2, dtype=F64))

    call_residual(MNIST)
    call_residual(CIFAR)
    call_residual(ODD_CIFAR, BF16)
    call_residual(CELEBA)
    call_residual(CELEBA, BF16)

    call_redirect(128, MNIST, 10, U8, None)
    call_redirect(128, MNIST, 10, F32, F32, distances=False)
    call_redirect(128, ODD_MNIST, 10, F32, F32, distances=False)
    call_redirect(128, CIFAR, 10, U8, None)
    call_redirect(128, CIFAR, 10, F32, F32, distances=False)
    call_redirect(128, CIFAR, 64, U8, None, BF16, distances=False, channels_last=True)
    call_redirect(128, ODD_CIFAR, 64, F32, None, distances=False)
    call_redirect(128, CIFAR, 1000, U8, None)
    call_redirect(128, CIFAR, 1000, F32, F32, distances=False)
    call_redirect(16, LATENTS, 10, F16, None, F16)
    call_redirect(16, LATENTS, 10, F32, F32, distances=False)
    call_redirect(64, CELEBA, 10, U8, None)
    call_redirect(64, CELEBA, 10, U8, F32)
    call_redirect(64, CELEBA, 10, F32, F32, distances=False)
    call_redirect(64, CELEBA, 10, BF16, BF16, BF16, distances=False)
    call_redirect(64, CELEBA, 10, U8, None, BF16, channels_last=True)
    call_redirect(64, CELEBA, 64, F32, None, distances=False)
    call_redirect(64, CELEBA, 1000, U8, None)
    call_redirect(64, ODD_CELEBA, 1000, F32, F32, distances=False)


def form(kernel, signature, constants, aligned, num_warps, num_stages, max_registers) -> str:
    """One compiled form of a kernel, to be compared and read."""
    arguments = []
    for name, kind in sorted(signature.items()):
        arguments.append(f"{name}: {kind}{' aligned' if name in aligned else ''}")
    arguments += [f"{name}={value!r}" for name, value in sorted(constants.items())]
    options = f"{num_warps} warps, {num_stages} stages, {max_registers} registers"
    return f"{kernel}[{options}]({', '.join(arguments)})"


def form_of_launch(launch: Launch) -> str:
    options = launch.options
    types = launch.signature, launch.constants, launch.aligned
    return form(launch.kernel, *types, options.num_warps, options.num_stages, options.maxnreg)


def form_of_variant(variant) -> str:
    types = variant.signature, variant.constants, variant.aligned()
    return form(variant.kernel.__name__, *types, variant.num_warps, variant.num_stages, variant.max_registers)


def expected_grid(launch: Launch) -> int:
    """Programs of a launch, from the numbers of samples, elements and neighbours among its arguments."""
    given = launch.arguments
    results = ("x_t", "spread", "loss", "retain_weight")
    samples = len(next(given[name] for name in results if name in given))
    if launch.kernel in ("redirect_kernel", "mixture_weights_kernel", "residual_sum_kernel"):
        return samples
    splits = math.ceil(given["D"] / given.get("BLOCK", given.get("BLOCK_D")))
    if launch.kernel == "redirect_dots_kernel":
        return samples * splits * math.ceil(given["K"] / given["group"])
    return samples * splits


def complaints(arch: int, check) -> list[str]:
    """What is wrong with the launches of `call_all` on `arch`; `check` is scripts/aot_check.py."""
    with compile_only(arch) as launches:
        call_all()

    found = []
    for launch in launches:
        name = form_of_launch(launch)
        programs = expected_grid(launch)
        if programs < 1 or launch.grid != (programs, 1, 1):
            found.append(f"{name}: expected a grid of {programs} programs, got {launch.grid}")
        if not launch.options.enable_fp_fusion:
            found.append(f"{name}: compiled without fused multiply-adds")
        used = check.registers_and_local_memory(launch.cubin)
        if isinstance(used, str) or used[1] > 0:
            found.append(f"{name}: expected no local memory, got (registers, bytes of it) {used}")

    launched = {form_of_launch(launch) for launch in launches}
    listed = set()
    for op in check.operations(None):
        listed |= {form_of_variant(variant) for variant in check.configurations(op)}
    found += [f"launched, but no configuration: {one}" for one in sorted(launched - listed)]
    found += [f"a configuration, but never launched: {one}" for one in sorted(listed - launched)]
    if not launches:
        found.append("nothing was launched")
    print(f"sm_{arch}: {len(launches)} launches of {len(launched)} kernels compiled")
    return found


def main() -> None:
    spec = importlib.util.spec_from_file_location("aot_check", ROOT / "scripts" / "aot_check.py")
    check = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(check)
    found = []
    for arch in map(int, sys.argv[1:] or SHARED_MEMORY):
        found += [f"sm_{arch}: {complaint}" for complaint in complaints(arch, check)]
    if found:
        sys.exit("\n".join(found))


if __name__ == "__main__":
    main()
