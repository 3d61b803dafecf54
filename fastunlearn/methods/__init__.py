"""The methods: frozen dataclasses of hyperparameters.

They say what a step composes and how it combines the gradients.
"""

from ..objective.draws import FORGET, RETAIN
from ..objective.protocol import Batch, Method, Pass, Term
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
    "Batch",
    "EraseDiff",
    "Method",
    "NegGrad",
    "Pass",
    "ReTrack",
    "Term",
    "Vanilla",
    "register",
]
