"""fastunlearn: make a trained diffusion model forget given training images.

ReTrack, SISS, EraseDiff and their baselines as single steps on a caller's own batches (`retrack_step`, `siss_step`, ...), or as an
`Unlearner` that owns the data and draws everything itself. See docs/architecture.md.

The names are imported when they are first used, so that `fastunlearn --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import functional
    from .copies import near_copies
    from .draws import Draws
    from .methods import SISS, EraseDiff, NegGrad, ReTrack, Vanilla
    from .neighbors import nearest_neighbors
    from .schedule import NoiseSchedule
    from .selection import LowPass
    from .step import StepOutput, erasediff_step, neggrad_step, retrack_step, siss_step, vanilla_step
    from .store import ImageStore
    from .unlearner import Unlearner

__version__ = "0.1.0"
__all__ = [
    "SISS",
    "Draws",
    "EraseDiff",
    "ImageStore",
    "LowPass",
    "NegGrad",
    "NoiseSchedule",
    "ReTrack",
    "StepOutput",
    "Unlearner",
    "Vanilla",
    "erasediff_step",
    "functional",
    "near_copies",
    "neggrad_step",
    "nearest_neighbors",
    "retrack_step",
    "siss_step",
    "vanilla_step",
]
_MODULES = ("functional", "draws", "copies", "methods", "neighbors", "schedule", "selection", "step", "store", "unlearner")  # where the names above live


def __getattr__(name: str):
    if name == "functional":
        return import_module(".functional", __name__)
    if name in __all__:
        for module in _MODULES:
            found = getattr(import_module(f".{module}", __name__), name, None)
            if found is not None:
                globals()[name] = found
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
