"""Reports a person can read: a page with pictures and a table, and the same as PNG and JSON."""

from .document import Figure, Report, Section, Table
from .transition import transition_figure
from .unlearning import ReconstructionPair, reconstructions_section, samples_section, training_section
from .verdict import Criterion, all_passed, frequency_criterion, quality_criterion, reconstruction_criterion

__all__ = [
    "Criterion",
    "Figure",
    "ReconstructionPair",
    "Report",
    "Section",
    "Table",
    "all_passed",
    "frequency_criterion",
    "quality_criterion",
    "reconstruction_criterion",
    "reconstructions_section",
    "samples_section",
    "training_section",
    "transition_figure",
]
