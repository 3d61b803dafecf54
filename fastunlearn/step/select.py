"""The rows of a step, weighted and filtered as its selection says: after compose, before the network runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..host import say
from ..objective.frequency import BandMask, LowPass
from ..objective.protocol import Method, Pass, Term
from ..objective.schedule import NoiseSchedule
from ..objective.selection import Selection, check_band
from ..objective.time import Density

LEFT_OUT = (
    "lowpass: %s reports its forget loss without the spread of its targets, whose part in the band would "
    "take another pass over all neighbours; gradients do not depend on it"
)


class Moment(NamedTuple):
    """Where in a run a step is: a band with a schedule asks for it. None: nobody has said."""

    step: int | Tensor | None = None  # 0-d where it lies on the device
    total_steps: int | None = None


UNKNOWN = Moment()


def select(
    passes: Sequence[Pass], method: Method, schedule: NoiseSchedule, selection: Selection, moment: Moment
) -> list[Pass]:
    """`passes` whose terms count the rows and the frequencies that are selected.

    Raises:
        ValueError: a band that the method gives fits neither the images nor the moment, or stands against
            that of the selection.
    """
    densities = selection.densities(method, schedule)
    weighted = selection.loss_weight is not None or any(each.weighted for each in densities.values())
    banded = selection.lowpass is not None or any(
        isinstance(term.band, LowPass) for each in passes for term in each.terms
    )
    if not weighted and not banded:
        return list(passes)

    masks: dict[LowPass, BandMask] = {}
    selected = []
    for each in passes:
        terms = each.terms
        if weighted:
            terms = [_weighted(term, each, selection, densities, schedule) for term in terms]
        if banded:
            terms = [_banded(term, each, method, selection.lowpass, moment, masks) for term in terms]
        selected.append(replace(each, terms=tuple(terms)))
    return selected


def _weighted(
    term: Term, whole: Pass, selection: Selection, densities: dict[str, Density], schedule: NoiseSchedule
) -> Term:
    timesteps = whole.timesteps[term.rows.start : term.rows.stop]
    weights = selection.weights_of(term.role, timesteps, densities, schedule)
    if weights is None:
        return term
    # Those of SISS may be too small for float32 until they are divided by their unit.
    dtype = torch.promote_types(whole.x_t.dtype, torch.float32)
    if term.weight is not None:
        weights = term.weight * weights
        dtype = term.weight.dtype if term.weight.is_floating_point() else dtype
    return replace(term, weight=weights.to(dtype))


def _banded(
    term: Term,
    whole: Pass,
    method: Method,
    lowpass: LowPass | None,
    moment: Moment,
    masks: dict[LowPass, BandMask],
) -> Term:
    band = term.band
    if term.role == "forget" and lowpass is not None:
        if band is not None:
            expected = f"expected None ({type(method).__name__} has a band of its own)"
            raise ValueError(f"lowpass: {expected}, got {lowpass}")
        band = lowpass
    if not isinstance(band, LowPass):
        return term
    if band not in masks:
        height, width = whole.x_t.shape[-2:]
        check_band(band, height, width, *moment)
        masks[band] = _mask(band, height, width, moment, whole.x_t.device)
    if term.spread is not None:
        say.once(LEFT_OUT, type(method).__name__)
    return replace(term, band=masks[band], spread=None)


def _mask(band: LowPass, height: int, width: int, moment: Moment, device: torch.device) -> BandMask:
    if not band.scheduled:
        return band.mask_on(height, width, device)
    return band.mask_at(height, width, moment.step, moment.total_steps, device)
