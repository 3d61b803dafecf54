"""The cases of `scripts/compare_bits.py`: what the package computes, as hashes."""

from __future__ import annotations

from .registry import CASES, Case


def all_cases() -> list[Case]:
    """Imports the modules of cases, and with them fastunlearn."""
    from . import ops, pairs, refusals, rehearsals, runs, steps, unlearners  # noqa: F401

    return CASES
