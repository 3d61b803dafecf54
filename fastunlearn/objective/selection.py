"""What a step learns from, whatever its method: which timesteps, which frequencies, how much each counts.

arXiv 2510.17917 (Eq. 6 to 9) unlearns in a part of the timesteps and of the frequencies only: the forget term
has a density of timesteps and a band of its own, the retain term keeps what it had.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from torch import Tensor

from ..host import check, say
from . import time
from .draws import Draw, Same, Time, TimeLogRatio
from .frequency import LowPass
from .protocol import Method, has_own_objective
from .schedule import LOSS_WEIGHTS, NoiseSchedule
from .time import Density

TIMESTEPS = ("forget_timesteps", "retain_timesteps")  # fields of `Draws`
NOTHING_FILTERED = (
    "lowpass: %s keeps every frequency of images of %d x %d, as no band would (is its radius one in bins?)"
)
ARGUMENTS = {"forget": "time_window", "retain": "retain_density"}  # the density of each branch


@dataclass(frozen=True)
class Selection:
    """Which timesteps and frequencies count; None: as the schedule and the method have them.

    Args:
        time_window: the density that the timesteps of the forget branch are drawn from, such as
            `TimeWindow(250, 750)`; None: that of the schedule, uniform, or logit-normal for flow matching.
        retain_density: the same of the retain branch.
        lowpass: the spatial frequencies of the residual that count in the forget terms.
        loss_weight: what every row's loss is multiplied by at its timestep (`NoiseSchedule.loss_weight`):
            `"min_snr"` and others, or None.
        snr_gamma: gamma of `"min_snr"`; None: 5.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    time_window: Density | None = None
    retain_density: Density | None = None
    lowpass: LowPass | None = None
    loss_weight: str | None = None
    snr_gamma: float | None = None

    def __post_init__(self) -> None:
        for name in ARGUMENTS.values():
            if getattr(self, name) is not None:
                time.check_density(name, getattr(self, name))
        if not isinstance(self.lowpass, (LowPass, type(None))):
            raise TypeError(f"lowpass: expected a LowPass or None, got {check.describe(self.lowpass)}")
        if self.loss_weight is not None:
            check.one_of("loss_weight", self.loss_weight, LOSS_WEIGHTS)
        if self.loss_weight == "none":
            object.__setattr__(self, "loss_weight", None)
        if self.snr_gamma is None:
            return
        if self.loss_weight != "min_snr":
            expected = "expected None without loss_weight='min_snr', whose gamma it is"
            raise ValueError(f"snr_gamma: {expected}, got {check.describe(self.snr_gamma)}")
        gamma = check.number("snr_gamma", self.snr_gamma, low=0, low_open=True)
        object.__setattr__(self, "snr_gamma", gamma)

    @property
    def chosen(self) -> bool:
        """Whether anything is selected."""
        chosen = self.time_window, self.retain_density, self.lowpass, self.loss_weight
        return chosen != (None, None, None, None)

    def densities(self, method: Method, schedule: NoiseSchedule) -> dict[str, Density]:
        """What the timesteps of each branch are drawn from."""
        found = {}
        for branch, name in ARGUMENTS.items():
            chosen = getattr(self, name)
            found[branch] = default_density(schedule) if chosen is None else chosen
        own = _own_densities(method)
        # Two images that share a timestep share what the method itself draws it from, too.
        for name, how in method.draws().items():
            branch = name.removesuffix("_timesteps")
            if isinstance(how, Same) and name in TIMESTEPS and getattr(self, ARGUMENTS[branch]) is None:
                found[branch] = own.get(how.name.removesuffix("_timesteps"), found[branch])
        return found | own

    def draws_of(self, method: Method, schedule: NoiseSchedule) -> dict[str, Draw]:
        """What `method` draws, with the densities of its timesteps.

        Two images share a timestep only while both branches draw it alike; and where they do not, SISS'
        weights need the ratio of the densities.
        """
        densities = self.densities(method, schedule)
        apart = not time.draw_alike(densities["forget"], densities["retain"], len(schedule))
        wanted = dict(method.draws())
        shared = [how.name for name, how in wanted.items() if isinstance(how, Same) and name in TIMESTEPS]
        for name, how in wanted.items():
            if isinstance(how, Time):
                wanted[name] = Time(how.branch, densities.get(how.branch))
                # A pair draws once: in strata, where either branch has them.
                if name in shared and not apart:
                    in_strata = [each for each in densities.values() if isinstance(each, time.Stratified)]
                    wanted[name] = Time(how.branch, next(iter(in_strata), densities[how.branch]))
            elif isinstance(how, Same) and name in TIMESTEPS and apart:
                branch = name.removesuffix("_timesteps")
                wanted[name] = Time(branch, densities[branch])
            elif isinstance(how, TimeLogRatio) and apart:
                wanted[name] = TimeLogRatio(densities["forget"], densities["retain"])
        return wanted

    def weights_of(
        self, role: str, timesteps: Tensor, densities: dict[str, Density], schedule: NoiseSchedule
    ) -> Tensor | None:
        """What the losses of rows of `role` count at `timesteps` `[B]`: float64 `[B]`; None: 1."""
        weights = time.weights_of(timesteps, densities[role], len(schedule))
        if self.loss_weight is None:
            return weights
        of_loss = schedule.loss_weights_of(timesteps, self.loss_weight, gamma=self.snr_gamma)
        return of_loss if weights is None else weights * of_loss

    def check_fits(self, method: Method, schedule: NoiseSchedule) -> None:
        """Whether it makes sense with `method` and `schedule`; nothing on the device is read.

        Raises:
            ValueError: naming the argument that does not fit.
        """
        # What nobody chose fits: most steps end here, in microseconds.
        own = _own_densities(method)
        if not own and not self.chosen:
            return
        self._check_branches(method, own)
        densities = self.densities(method, schedule)
        for branch, density in densities.items():
            name = f"{type(method).__name__}.draws" if branch in own else ARGUMENTS[branch]
            _check_tables(name, density, len(schedule))
            if self.loss_weight is not None and branch in method.needs:
                self._check_counted(name, density, schedule)
        _check_covered(self.draws_of(method, schedule), len(schedule))
        if has_own_objective(method):
            self._check_unweighted(method, densities)

    def _check_branches(self, method: Method, own: dict[str, Density]) -> None:
        """Nothing may be selected of what the method does not read, or chooses by itself."""
        read = {"time_window": "forget", "lowpass": "forget", "retain_density": "retain"}
        for name, branch in read.items():
            chosen = getattr(self, name)
            if chosen is None:
                continue
            expected = None
            if branch not in method.needs:
                expected = f"{type(method).__name__} reads no {branch} images"
            elif name != "lowpass" and branch in own:
                expected = f"{type(method).__name__} draws its {branch} timesteps from {own[branch]}"
            if expected is not None:
                raise ValueError(f"{name}: expected None ({expected}), got {chosen}")

    def _check_counted(self, name: str, density: Density, schedule: NoiseSchedule) -> None:
        """A weight of 0 at every timestep that is drawn would be a run of zeros."""
        if not _counts(density, schedule, self.loss_weight, self.snr_gamma):
            expected = f"expected one that is above 0 at a timestep of {name}, {density}"
            raise ValueError(f"loss_weight: {expected}, got {self.loss_weight!r}, which is 0 at all of them")

    def _check_unweighted(self, method: Method, densities: dict[str, Density]) -> None:
        why = f"{type(method).__name__} makes more of its losses than a weighted sum"
        for branch, density in densities.items():
            if density.weighted:
                expected = f"expected a density that is drawn from ({why})"
                raise ValueError(f"{ARGUMENTS[branch]}: {expected}, got as_weight=True")
        if self.loss_weight is not None:
            raise ValueError(f"loss_weight: expected None ({why}), got {self.loss_weight!r}")


def default_density(schedule: NoiseSchedule) -> Density:
    """What timesteps are drawn from where nobody says: as diffusers' scripts do.

    For flow matching logit-normal (mean 0, deviation 1): under the uniform density 94 % of the loss would
    come from the ten cleanest of 1000 timesteps.
    """
    return LOGIT_NORMAL if schedule.prediction_type == "flow" else time.UNIFORM


LOGIT_NORMAL = time.LogitNormal()


def check_drawable(density: Density, schedule: NoiseSchedule) -> None:
    """
    Raises:
        ValueError: `density` draws a timestep of `schedule` at which the loss is not defined.
    """
    if not schedule.all_usable:
        schedule.check_usable(density.drawn(len(schedule)))


def check_band(
    lowpass: LowPass | None, height: int, width: int, step: int | Tensor | None, total_steps: int | None
) -> None:
    """Whether `lowpass` has a mask for images of that size, at this step of so many.

    Raises:
        TypeError, ValueError: naming `lowpass`, `step` or `total_steps`.
    """
    if lowpass is None:
        return
    if lowpass.scheduled:
        for name, value in (("step", step), ("total_steps", total_steps)):
            if value is None:
                expected = f"expected a number with the schedule {lowpass.schedule!r} of lowpass"
                raise ValueError(f"{name}: {expected}, got None")
    try:
        lowpass.check_fits(height, width, total_steps)
    except ValueError as error:
        raise ValueError(f"lowpass: {error}") from None
    if not lowpass.scheduled and _keeps_all(lowpass, height, width):
        say.once(NOTHING_FILTERED, lowpass, height, width)


@functools.lru_cache(maxsize=64)
def _keeps_all(lowpass: LowPass, height: int, width: int) -> bool:
    """Whether a fixed band filters nothing of images of that size: M is 1 everywhere."""
    table, inside, outside = lowpass.mask(height, width)
    whole = table.shape == (height // 2 + 1, width // 2 + 1) and bool(table.all())
    return (inside == 1 or not table.any()) and (outside == 1 or whole)


def _check_tables(name: str, density: Density, num_timesteps: int) -> None:
    try:
        time.check_tables(density, num_timesteps)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


@functools.lru_cache(maxsize=64)
def _counts(density: Density, schedule: NoiseSchedule, loss_weight: str, gamma: float | None) -> bool:
    """Whether a timestep that is drawn has a weight above 0. Looked at once, not at every step."""
    weights = schedule.loss_weight(loss_weight, gamma=gamma).nan_to_num(nan=0.0)
    return bool((density.drawn(len(schedule)) * weights).any())


@functools.lru_cache(maxsize=64)
def _not_covered(density: Density, other: Density, num_timesteps: int) -> int | None:
    """The first timestep that `other` draws and `density` never does; None: there is none."""
    missing = (other.drawn(num_timesteps) > 0) & (density.drawn(num_timesteps) == 0)
    return int(missing.nonzero()[0]) if missing.any() else None


def _own_densities(method: Method) -> dict[str, Density]:
    """Those that the method itself chooses, by branch."""
    own = {}
    for how in method.draws().values():
        if isinstance(how, Time) and how.density is not None:
            own[how.branch] = time.check_density(f"{type(method).__name__}.draws", how.density)
    return own


def _check_covered(wanted: dict[str, Draw], num_timesteps: int) -> None:
    """Where a mixture draws one branch alone, no weight can make up for timesteps that only the other has.

    Raises:
        ValueError: naming the density of the other branch.
    """
    for how in wanted.values():
        chance = getattr(wanted.get("from_forget"), "probability", None)
        if not isinstance(how, TimeLogRatio) or how.forget is None or chance not in (0, 1):
            continue
        alone, other = ("forget", "retain") if chance == 1 else ("retain", "forget")
        missing = _not_covered(getattr(how, alone), getattr(how, other), num_timesteps)
        if missing is not None:
            expected = f"expected timesteps that the {alone} branch draws, too, from which alone x_t comes"
            raise ValueError(f"{ARGUMENTS[other]}: {expected}, got t = {missing}")
