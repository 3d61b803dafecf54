"""Which timesteps and frequencies a run learns from: in its identity, and in words for `run.json`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from fractions import Fraction
from typing import Any

from ..objective.frequency import LowPass
from ..objective.protocol import Method
from ..objective.schedule import MIN_SNR_GAMMA
from ..objective.selection import LOGIT_NORMAL, Selection
from ..objective.time import UNIFORM, Density, LogitNormal, Product, Stratified, TimeWindow, Uniform

# What a run without such an entry has: one of before there was a choice has none either.
WITHOUT = {"timesteps": "uniform", "lowpass": "none", "loss_weight": "none"}


def selected(unlearner) -> dict[str, Any]:
    """The entries of a run's identity; none for what every run had before there was a choice."""
    selection = getattr(unlearner, "selection", None)
    if selection is None:
        return {}
    entries: dict[str, Any] = {}
    densities = _densities(unlearner)
    if any(density != UNIFORM for density in densities.values()):
        length = len(unlearner.schedule)
        entries["timesteps"] = {branch: _entry(each, length) for branch, each in densities.items()}
    if selection.lowpass is not None:
        entries["lowpass"] = _entry(selection.lowpass)
    # The radius of a step depends on how many there are; a method may have a band of its own.
    bands = [selection.lowpass, *_own_bands(unlearner.method).values()]
    if any(band is not None and band.scheduled for band in bands):
        entries["total_steps"] = unlearner.total_steps
    if selection.loss_weight is not None:
        entries["loss_weight"] = {"name": selection.loss_weight}
    if selection.loss_weight == "min_snr":
        entries["loss_weight"]["gamma"] = _gamma(selection)
    return entries


def reason(name: str, present: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """Why the entry `name` of a run differs from that of a checkpoint, where nobody need have changed it."""
    if name != "timesteps" or name not in present or name in saved:
        return ""
    default = _entry(LOGIT_NORMAL)
    if any(each != default for each in present[name].values()):
        return ""
    return (
        "; flow matching drew uniformly before it drew logit-normal by default, and goes on so with "
        "time_window=Uniform() and retain_density=Uniform(), or --timestep_density uniform"
    )


def in_words(unlearner) -> dict[str, str]:
    """Which timesteps and frequencies are used, for people; also where nothing was chosen."""
    selection = getattr(unlearner, "selection", None)
    if selection is None:
        return {}
    length = len(unlearner.schedule)
    words = {f"{branch} timesteps": _of(each, length) for branch, each in _densities(unlearner).items()}
    if "forget" in unlearner.method.needs:
        words["forget frequencies"] = _of_band(selection.lowpass, unlearner.total_steps)
    # Of which terms it is, the method alone knows.
    own = _own_bands(unlearner.method)
    if own and selection.lowpass is None:
        words["forget frequencies"] = "as the method has them"
    for name, band in own.items():
        words[f"the method's {name}"] = _of_band(band, unlearner.total_steps)
    weight = selection.loss_weight or "none"
    if weight == "min_snr":
        weight += f", gamma {_gamma(selection):g}"
    return words | {"loss weight": weight}


def _densities(unlearner) -> dict[str, Density]:
    """What is drawn from, for each branch that the method reads."""
    densities = unlearner.selection.densities(unlearner.method, unlearner.schedule)
    return {branch: each for branch, each in densities.items() if branch in unlearner.method.needs}


def _own_bands(method: Method) -> dict[str, LowPass]:
    """Those that are settings of the method, by their names."""
    return {name: value for name, value in vars(method).items() if isinstance(value, LowPass)}


def _gamma(selection: Selection) -> float:
    return MIN_SNR_GAMMA if selection.snr_gamma is None else selection.snr_gamma


def _entry(value: Any, num_timesteps: int | None = None) -> Any:
    """A density or a band with its numbers."""
    if isinstance(value, Fraction):
        # The decimal that means the same to `LowPass`, where there is one: 3/10 is 0.3.
        decimal = float(value)
        return decimal if Fraction(repr(decimal)) == value else str(value)
    if is_dataclass(value):
        numbers = {each.name: _entry(getattr(value, each.name), num_timesteps) for each in fields(value)}
        return {"name": type(value).__name__} | numbers
    if isinstance(value, Density):  # of the user's: nothing is known of it but what it gives
        tables = {"drawn": value.drawn(num_timesteps), "weights": value.weights(num_timesteps)}
        return {"name": type(value).__name__} | tables
    return value


def _of(density: Density, num_timesteps: int) -> str:
    match density:
        case Uniform():
            return f"all {num_timesteps}"
        case LogitNormal(mean, std):
            return f"all {num_timesteps}, logit-normal with mean {mean:g} and deviation {std:g}"
        case TimeWindow(start, stop, outside, as_weight):
            words = f"{start} <= t < {stop} of {num_timesteps}"
            if outside:
                words += f", the others {outside:g} times as often"
            return f"{words}, as a weight of uniform draws" if as_weight else words
        case Product(first, second):
            factor = _of(second, num_timesteps).removeprefix(f"all {num_timesteps}, ")
            return f"{_of(first, num_timesteps)}, times {factor}"
        case Stratified(inner):
            return f"{_of(inner, num_timesteps)}, in strata"
    return f"{type(density).__name__} of {num_timesteps}"  # of the user's: its numbers are in the identity


def _of_band(lowpass: LowPass | None, total_steps: int | None) -> str:
    if lowpass is None:
        return "all"
    return lowpass.in_words(total_steps)
