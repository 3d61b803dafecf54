"""fastunlearn: make a trained diffusion model forget given training images.

ReTrack, SISS, EraseDiff and their baselines as single steps on a caller's own batches (`retrack_step`, `siss_step`, ...), or as an
`Unlearner` that owns the data and draws everything itself. See docs/architecture.md.
"""

from . import functional
from .draws import Draws
from .methods import SISS, EraseDiff, NegGrad, ReTrack, Vanilla
from .neighbors import nearest_neighbors
from .schedule import NoiseSchedule
from .step import StepOutput, erasediff_step, neggrad_step, retrack_step, siss_step, vanilla_step
from .store import ImageStore
from .unlearner import Unlearner

__version__ = "0.1.0"
__all__ = [
    "SISS",
    "Draws",
    "EraseDiff",
    "ImageStore",
    "NegGrad",
    "NoiseSchedule",
    "ReTrack",
    "StepOutput",
    "Unlearner",
    "Vanilla",
    "erasediff_step",
    "functional",
    "neggrad_step",
    "nearest_neighbors",
    "retrack_step",
    "siss_step",
    "vanilla_step",
]
