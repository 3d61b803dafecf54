"""fastunlearn: make a trained diffusion model forget given training images.

ReTrack, SISS, EraseDiff, DPO, KTO, NPO and their baselines as single steps on a caller's own batches
(`retrack_step`, `siss_step`, ..., and `method_step` for all), or as an `Unlearner` that owns the data and
draws everything itself. See docs/methods.md and docs/architecture.md.

The names are imported when they are first used, so that `fastunlearn --help` does not wait for torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import functional
    from .engine.estimates import forget_gradients, vdu, vdu_l2, vdu_laplace, vdu_swag
    from .engine.unlearner import Unlearner
    from .host.store import ImageStore
    from .methods import DPO, KTO, NPO, SISS, EraseDiff, EraseDiffBome, NegGrad, ReTrack, Vanilla
    from .models.adapters import without_adapters
    from .models.frozen import frozen_copy
    from .models.transition import find_transition
    from .neighbors import near_copies, nearest_neighbors
    from .objective.anchor import Anchor
    from .objective.draws import Draws
    from .objective.frequency import LowPass
    from .objective.mask import Mask
    from .objective.schedule import NoiseSchedule
    from .objective.time import LogitNormal, Product, Stratified, TimeWindow, Uniform
    from .step.doors import (
        erasediff_step,
        method_step,
        neggrad_step,
        retrack_step,
        siss_step,
        vanilla_step,
    )
    from .step.take import StepOutput

__version__ = "0.1.0"
__all__ = [
    "DPO",
    "KTO",
    "NPO",
    "SISS",
    "Anchor",
    "Draws",
    "EraseDiff",
    "EraseDiffBome",
    "ImageStore",
    "LogitNormal",
    "LowPass",
    "Mask",
    "NegGrad",
    "NoiseSchedule",
    "Product",
    "ReTrack",
    "StepOutput",
    "Stratified",
    "TimeWindow",
    "Uniform",
    "Unlearner",
    "Vanilla",
    "erasediff_step",
    "find_transition",
    "forget_gradients",
    "frozen_copy",
    "functional",
    "method_step",
    "near_copies",
    "neggrad_step",
    "nearest_neighbors",
    "retrack_step",
    "siss_step",
    "vanilla_step",
    "vdu",
    "vdu_l2",
    "vdu_laplace",
    "vdu_swag",
    "without_adapters",
]

# Where the names above live.
_HOMES = {
    "engine.estimates": ["forget_gradients", "vdu", "vdu_l2", "vdu_laplace", "vdu_swag"],
    "engine.unlearner": ["Unlearner"],
    "host.store": ["ImageStore"],
    "methods": ["DPO", "KTO", "NPO", "SISS", "EraseDiff", "EraseDiffBome", "NegGrad", "ReTrack", "Vanilla"],
    "models.adapters": ["without_adapters"],
    "models.frozen": ["frozen_copy"],
    "models.transition": ["find_transition"],
    "neighbors": ["near_copies", "nearest_neighbors"],
    "objective.anchor": ["Anchor"],
    "objective.draws": ["Draws"],
    "objective.frequency": ["LowPass"],
    "objective.mask": ["Mask"],
    "objective.schedule": ["NoiseSchedule"],
    "objective.time": ["LogitNormal", "Product", "Stratified", "TimeWindow", "Uniform"],
    "step.doors": [
        "erasediff_step",
        "method_step",
        "neggrad_step",
        "retrack_step",
        "siss_step",
        "vanilla_step",
    ],
    "step.take": ["StepOutput"],
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


# Modules under a name of their own, where they are documented so.
_MODULES = {"functional": "functional", "host_memory": "host.memory", "profiling": "host.profiling"}


def __getattr__(name: str):
    if name in _MODULES:
        return import_module(f".{_MODULES[name]}", __name__)
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(import_module(f".{_HOME_OF[name]}", __name__), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
