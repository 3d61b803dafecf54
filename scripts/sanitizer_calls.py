"""Calls every kernel a few times, at small and awkward shapes, for compute-sanitizer to watch.

    python scripts/sanitizer_calls.py [cuda|cpu] [few]

few: each kernel, at the shapes where it is most likely to go wrong, in seconds. scripts/gpu_check.sh runs it.
"""

from __future__ import annotations

import faulthandler
import itertools
import os
import signal
import sys

os.environ["FASTUNLEARN_BACKEND"] = "kernels"  # a fallback would pass every check

import torch

from fastunlearn.host.store import network_input
from fastunlearn.ops.lowpass_residual import lowpass_residual
from fastunlearn.ops.mixture import mixture
from fastunlearn.ops.noising import noising
from fastunlearn.ops.redirect import redirect
from fastunlearn.ops.residual import residual
from fastunlearn.testing.factories import linear_schedule

# The last one has more elements than one pass of redirect takes.
SHAPES = ((3, 5, 7), (1, 28, 28), (3, 40, 41))
PLANES = ((1, 28, 28), (3, 32, 32), (1, 33, 47), (1, 64, 64), (1, 256, 256))
COUNTS = (1, 10, 70)  # of neighbours
BATCH, STORED = 3, 9
DEVICE = sys.argv[1] if len(sys.argv) > 1 else "cuda"
if "few" in sys.argv[2:]:
    SHAPES, COUNTS = SHAPES[::2], (10, 70)
    PLANES = ((1, 28, 28), (1, 33, 47))


def images(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    pixels = torch.randint(256, (STORED, *shape), device=DEVICE, dtype=torch.uint8)
    return pixels if dtype == torch.uint8 else network_input(pixels).to(dtype)


def main() -> None:
    faulthandler.register(signal.SIGUSR2)  # tells where it hangs (gpu_run.py)
    torch.manual_seed(0)
    coefficients = linear_schedule().coefficients(torch.tensor([0, 500, 999], device=DEVICE))
    index = torch.tensor([8, 0, 4], device=DEVICE)
    counter = torch.tensor([1, 2, 3], device=DEVICE)
    from_forget = torch.tensor([True, False, True], device=DEVICE)
    weight = torch.rand(BATCH, device=DEVICE)
    for shape, (stored, made, channels_last) in itertools.product(
        SHAPES, ((torch.uint8, torch.float32, False), (torch.bfloat16, torch.bfloat16, True))
    ):
        rows, noise = images(shape, stored), torch.randn(BATCH, *shape, device=DEVICE)
        for drawn in ((noise, None, 0), (None, counter, 5)):
            layout = (*drawn, made, channels_last)
            noising(rows, index, coefficients, *drawn, True, made, channels_last)
            mixture(rows, index, rows, index.flip(0), coefficients, from_forget, 0.5, None, *layout)
            for count in COUNTS:
                neighbors = torch.randint(STORED, (BATCH, count), device=DEVICE)
                redirect(rows, index, rows, neighbors, coefficients, None, *layout)
                distances = torch.rand(BATCH, count, device=DEVICE).double()
                redirect(rows[index], None, rows[neighbors], None, coefficients, distances, *layout)
        residual(noise.to(made), noise + 1, weight)
    for shape, dtype in itertools.product(PLANES, (torch.float32, torch.bfloat16)):
        prediction, target = torch.randn(2, BATCH, *shape, device=DEVICE)
        # Bands up to a quarter and half of Nyquist, and all frequencies.
        for part, (inside, outside) in itertools.product((8, 4, 2), ((1.0, 0.0), (1.0, 0.1), (0.0, 1.0))):
            band = torch.ones(shape[1] // part + 1, shape[2] // part + 1, device=DEVICE)
            lowpass_residual(prediction.to(dtype), target, weight, band, inside, outside)
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    print("every kernel has run", flush=True)


if __name__ == "__main__":
    main()
