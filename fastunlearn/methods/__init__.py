"""The methods: frozen dataclasses of hyperparameters.

They say what a step composes and how it combines the gradients.
"""

from ..objective.combine import Balance, Project, Rescale, Sum
from ..objective.draws import FORGET, RETAIN, Bernoulli, Normal, Same, Time, TimeLogRatio, Uniform
from ..objective.parameters import ParameterRule
from ..objective.protocol import Batch, Method, Pass, Predicted, Term
from .erasediff import EraseDiff
from .neggrad import NegGrad
from .registry import register
from .retrack import ReTrack
from .siss import SISS
from .vanilla import Vanilla

__all__ = [
    "FORGET",
    "RETAIN",
    "SISS",
    "Balance",
    "Batch",
    "Bernoulli",
    "EraseDiff",
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
