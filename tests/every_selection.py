"""Selections of timesteps and frequencies, of every kind, for tests of whole steps."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastunlearn import LowPass
from fastunlearn.methods import Method
from fastunlearn.objective.protocol import has_own_objective
from fastunlearn.objective.time import LogitNormal, Stratified, TimeWindow

TOTAL_STEPS = 8  # over which a band moves
SCHEDULED = {
    "linear_increase": LowPass(schedule="linear_increase", start=0.1, stop=0.9),
    "linear_decay": LowPass(schedule="linear_decay", start=0.9, stop=0.1),
    "step_increase": LowPass(schedule="step_increase", start=0.1, stop=0.9, stages=3),
    "step_decay": LowPass(schedule="step_decay", start=0.9, stop=0.1, kind="box"),
}
READS = {"time_window": "forget", "lowpass": "forget", "retain_density": "retain"}  # the branch of each
WINDOW = TimeWindow(250, 750)
WEIGHTS = {
    "time_window": TimeWindow(250, 750, as_weight=True),
    "retain_density": TimeWindow(0, 500, outside=0.5, as_weight=True),
}
STRATA = {
    "time_window": Stratified(TimeWindow(250, 750, outside=0.1)),
    "retain_density": Stratified(LogitNormal()),
}
EVERYTHING = {
    "time_window": Stratified(TimeWindow(250, 1000, as_weight=True)),
    "retain_density": Stratified(TimeWindow(0, 500, outside=0.5)),
    "lowpass": SCHEDULED["linear_decay"],
    "total_steps": TOTAL_STEPS,
    "loss_weight": "min_snr",
    "snr_gamma": 0.05,  # half of the window has a higher ratio
}
SELECTIONS: dict[str, dict[str, Any]] = {
    "window": {"time_window": WINDOW},
    "both ends": {"time_window": TimeWindow.last(), "retain_density": TimeWindow(0, 1)},
    "weights": WEIGHTS,
    "strata": STRATA,
    "low": {"lowpass": LowPass(0.5)},
    "mid": {"lowpass": LowPass(0.8, band="mid", inner=0.3, kind="box")},
    "high": {"lowpass": LowPass(0.4, band="high", high_frequency_weight=0.25)},
    **{name: {"lowpass": band, "total_steps": TOTAL_STEPS} for name, band in SCHEDULED.items()},
    "min_snr": {"loss_weight": "min_snr", "snr_gamma": 2.0},
    "sigma_squared": {"loss_weight": "sigma_squared"},
    "sigma_sqrt": {"loss_weight": "sigma_sqrt"},
    "everything": EVERYTHING,
}

# The axes of test_every_combination.py: what timesteps count in both branches, and what of a residual.
TIMES: dict[str, dict[str, Any]] = {
    "uniform": {},
    "window": {"time_window": WINDOW, "retain_density": TimeWindow(0, 500, outside=0.5)},
    "weighted strata": {
        name: value for name, value in EVERYTHING.items() if name not in ("lowpass", "total_steps")
    },
}
BANDS: dict[str, dict[str, Any]] = {
    "whole": {},
    "band": {name: EVERYTHING[name] for name in ("lowpass", "total_steps")},
}


def fitting(method: Method, selection: dict[str, Any]) -> dict[str, Any]:
    """`selection` without what `method` refuses: it reads no images of that branch, or weights none."""
    if has_own_objective(method):
        weights = ("loss_weight", "snr_gamma")
        selection = {name: _drawn(value) for name, value in selection.items() if name not in weights}
    return {name: value for name, value in selection.items() if READS.get(name) in {None, *method.needs}}


def meaningless(method: Method, selection: dict[str, Any]) -> dict[str, str]:
    """What of `selection` `method` refuses, each with the message that says so."""
    name, found = type(method).__name__, {}
    for argument, branch in READS.items():
        if argument in selection and branch not in method.needs:
            found[argument] = rf"^{argument}: expected None \({name} reads no {branch} images\), got "
    if not has_own_objective(method):
        return found
    why = rf"\({name} makes more of its losses than a weighted sum\)"
    for argument in ("time_window", "retain_density"):
        if argument not in found and _drawn(selection.get(argument)) != selection.get(argument):
            found[argument] = rf"^{argument}: expected a density that is drawn from {why}, got as_weight=True"
    if "loss_weight" in selection:
        found["loss_weight"] = rf"^loss_weight: expected None {why}, got "
    return found


def _drawn(value: Any) -> Any:
    """A density that is drawn from where it was weighted by; anything else as it is."""
    if isinstance(value, Stratified):
        return replace(value, density=_drawn(value.density))
    if isinstance(value, TimeWindow):
        return replace(value, as_weight=False)
    return value
