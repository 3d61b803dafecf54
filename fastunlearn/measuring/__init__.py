"""What `fastunlearn evaluate` does: plan what can be had, measure it, write it down as it comes, and decide.

A metric that cannot be had costs its row, with the reason; the others stand.
"""

from __future__ import annotations

from .measurement import Measurement, measure
from .planning import METRICS, Images, Settings, Subject, parse_metrics, plan
from .record import Record
from .verdict import Verdict, decide

__all__ = [
    "METRICS",
    "Images",
    "Measurement",
    "Record",
    "Settings",
    "Subject",
    "Verdict",
    "decide",
    "measure",
    "parse_metrics",
    "plan",
]
