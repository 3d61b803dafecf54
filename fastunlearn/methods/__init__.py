"""The methods: frozen dataclasses of hyperparameters.

They say what a step composes and how it combines the gradients.
"""

from ..objective.anchor import Anchor
from ..objective.combine import Balance, Project, Rescale, Sum
from ..objective.draws import FORGET, PAIR, RETAIN, Bernoulli, Normal, Same, Time, TimeLogRatio, Uniform
from ..objective.mask import Mask
from ..objective.parameters import ParameterRule
from ..objective.protocol import Batch, Method, Pass, Predicted, Term
from .dpo import DPO
from .erasediff import EraseDiff
from .erasediff_bome import EraseDiffBome
from .kto import KTO
from .neggrad import NegGrad
from .npo import NPO
from .registry import register
from .retrack import ReTrack
from .siss import SISS
from .vanilla import Vanilla

__all__ = [
    "DPO",
    "FORGET",
    "KTO",
    "NPO",
    "PAIR",
    "RETAIN",
    "SISS",
    "Anchor",
    "Balance",
    "Batch",
    "Bernoulli",
    "EraseDiff",
    "EraseDiffBome",
    "Mask",
    "Method",
    "NegGrad",
    "Normal",
    "ParameterRule",
    "Pass",
    "Predicted",
    "Project",
    "ReTrack",
    "Rescale",
    "Same",
    "Sum",
    "Term",
    "Time",
    "TimeLogRatio",
    "Uniform",
    "Vanilla",
    "register",
]
