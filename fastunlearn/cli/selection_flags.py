"""The flags that choose timesteps and frequencies: from words of the command line to a `Selection`."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Annotated, Any, Literal

from .options import called, unset

if TYPE_CHECKING:
    from ..methods import Method
    from ..objective.frequency import LowPass
    from ..objective.schedule import NoiseSchedule
    from ..objective.selection import Selection
    from ..objective.time import Density

Window = tuple[int, int] | Literal["middle", "late", "last"] | None
WINDOW = "START STOP|middle|late|last"
IMAGES = {"forget": "images to forget", "retain": "images to keep"}  # of each branch


@dataclass(kw_only=True)
class TimestepFlags:
    """Which timesteps a run learns from. A window is START <= t < STOP; middle is the middle half of the
    schedule, late its last quarter, last its last timestep alone, as in SISS' released code.
    """

    forget_timesteps: Annotated[Window, unset("all", WINDOW)] = None
    """Window of the images to forget."""
    forget_timesteps_outside: float = 0.0
    """How often a timestep outside of it is drawn, relative to one within: 0 is never, 1 as often."""
    retain_timesteps: Annotated[Window, unset("all", WINDOW)] = None
    """Window of the images to keep."""
    retain_timesteps_outside: float = 0.0
    """As --forget_timesteps_outside."""
    timestep_density: Annotated[
        Literal["uniform", "logit_normal"] | None,
        unset("uniform; logit_normal for flow matching", "uniform|logit_normal"),
    ] = None
    """What both sets of images draw from, each within its window."""
    logit_mean: float = 0.0
    """Of logit_normal: larger is less noise."""
    logit_std: float = 1.0
    """Of logit_normal: larger is more of the least and of the most noise."""
    stratified_timesteps: bool = False
    """One timestep from each of as many equally likely parts as a batch has rows: the mean is the same, the \
variance lower."""
    timesteps_as_weight: bool = False
    """Draw uniformly, and let the windows weight the losses: the mean is the same, the variance higher."""
    loss_weight: Literal["none", "min_snr", "sigma_squared", "sigma_sqrt", "cosmap"] = "none"
    """Weight of the losses at each timestep: Min-SNR, or one of diffusers' SD3 script."""
    snr_gamma: Annotated[float | None, unset("5", "FLOAT")] = None
    """Of min_snr: the largest signal-to-noise ratio that counts."""

    def check(self, method_name: str, method: Method) -> None:
        """Whether the flags fit each other and the method.

        Raises:
            ValueError: naming the flag.
        """
        given = given_flags(self)
        for branch in IMAGES:
            window, outside = f"{branch}_timesteps", f"{branch}_timesteps_outside"
            if window in given:
                check_reads(branch, window, given[window], method_name, method)
            if outside in given and window not in given:
                raise ValueError(f"--{outside}: expected --{window} beside it, got none")
        for name in ("logit_mean", "logit_std"):
            if name in given and self.timestep_density != "logit_normal":
                got = self.timestep_density or "none"
                raise ValueError(f"--{name}: expected --timestep_density logit_normal beside it, got {got}")
        if self.timesteps_as_weight and not {"forget_timesteps", "retain_timesteps"} & given.keys():
            expected = "expected --forget_timesteps or --retain_timesteps beside it"
            raise ValueError(f"--timesteps_as_weight: {expected}, got neither")
        if self.snr_gamma is not None and self.loss_weight != "min_snr":
            expected = "expected --loss_weight min_snr beside it"
            raise ValueError(f"--snr_gamma: {expected}, got {self.loss_weight}")

    def density(self, branch: str, method: Method, schedule: NoiseSchedule) -> Density | None:
        """What `branch` draws from; None: what the library draws from where nobody says.

        Raises:
            TypeError, ValueError: naming the flag; for a window that ends beyond the schedule, say.
        """
        from ..objective.time import UNIFORM, Product, Stratified

        if branch not in method.needs or not self._chosen(branch):
            return None
        density = self._base(schedule)
        window = self._window(branch, schedule)
        if window is not None and density == UNIFORM:
            density = window
        elif window is not None and window.weighted:
            expected = "expected --timestep_density uniform, from which timesteps are drawn then"
            raise ValueError(f"--timesteps_as_weight: {expected}, got logit_normal")
        elif window is not None:
            density = Product(window, density)
        if self.stratified_timesteps:
            density = Stratified(density)
        # Looked at now: later is after the images have been read.
        window_flag = f"{branch}_timesteps"
        with called(start=window_flag, stop=window_flag, second="timestep_density"):
            density.table(len(schedule))
        return density

    def flag_of(self, branch: str) -> str:
        """The flag that a method may refuse of those that say what `branch` draws from."""
        if self.timesteps_as_weight:
            return "timesteps_as_weight"
        return next(iter(self._chosen(branch)), f"{branch}_timesteps")

    def _chosen(self, branch: str) -> list[str]:
        """The flags given that say what `branch` draws from, the first that says most."""
        names = (f"{branch}_timesteps", "timestep_density", "stratified_timesteps")
        given = given_flags(self)
        return [name for name in names if name in given]

    def _base(self, schedule: NoiseSchedule) -> Density:
        """What there is within the windows."""
        from ..objective.selection import default_density
        from ..objective.time import UNIFORM, LogitNormal

        if self.timestep_density is None:
            return default_density(schedule)
        if self.timestep_density == "uniform":
            return UNIFORM
        with called(mean="logit_mean", std="logit_std"):
            return LogitNormal(self.logit_mean, self.logit_std)

    def _window(self, branch: str, schedule: NoiseSchedule) -> Density | None:
        from ..objective.time import TimeWindow

        flag = f"{branch}_timesteps"
        chosen = getattr(self, flag)
        if chosen is None:
            return None
        options = {"outside": getattr(self, f"{flag}_outside"), "as_weight": self.timesteps_as_weight}
        with called(start=flag, stop=flag, of=flag, outside=f"{flag}_outside"):
            if isinstance(chosen, str):
                return getattr(TimeWindow, chosen)(schedule, **options)
            return TimeWindow(*chosen, **options)


@dataclass(kw_only=True)
class FrequencyFlags:
    """Which spatial frequencies of its residual the forget term sees; radii are in --lowpass_unit."""

    lowpass: Annotated[tuple[float] | tuple[float, float] | None, unset("all", "RADIUS|FIRST LAST")] = None
    """Those within RADIUS, or, with --lowpass_schedule, within one that moves from FIRST to LAST."""
    lowpass_schedule: Literal["fixed", "linear_increase", "linear_decay", "step_increase", "step_decay"] = (
        "fixed"
    )
    """How the radius moves over the steps of the run."""
    lowpass_stages: Annotated[int | None, unset("4", "INT")] = None
    """Of step_increase and step_decay: how many radii there are."""
    lowpass_band: Literal["low", "mid", "high"] = "low"
    """low: within the radius. mid: within it, but not within --lowpass_inner. high: not within it."""
    lowpass_inner: Annotated[float | None, unset("none", "RADIUS")] = None
    """Where the mid band begins."""
    lowpass_kind: Literal["disc", "box"] = "disc"
    """disc: a frequency's length is compared with the radius. box: each of its two parts is."""
    lowpass_unit: Literal["nyquist", "bins"] = "nyquist"
    """Of radii. nyquist: fractions of the highest frequency of an axis. bins: periods in an image."""
    high_frequency_weight: float = 0.0
    """Factor of the residual's frequencies outside of the band."""

    def build(self, method_name: str, method: Method) -> LowPass | None:
        """The band; None: all frequencies count.

        Raises:
            TypeError, ValueError: naming the flag.
        """
        from ..objective.frequency import LowPass

        if self.lowpass is None:
            for name, value in given_flags(self).items():
                raise ValueError(f"--{name}: expected --lowpass beside it, got {in_words(value)} alone")
            return None
        check_reads("forget", "lowpass", self.lowpass, method_name, method)
        self._check_together()
        if len(self.lowpass) == 1:
            radii = {"radius": self.lowpass[0]}
        else:
            radii = dict(zip(("start", "stop"), self.lowpass, strict=True))
        flags = dict.fromkeys(("radius", "start", "stop"), "lowpass")
        flags |= {"inner": "lowpass_inner", "stages": "lowpass_stages"}
        with called(**flags, high_frequency_weight="high_frequency_weight"):
            return LowPass(
                **radii,
                kind=self.lowpass_kind,
                band=self.lowpass_band,
                inner=self.lowpass_inner,
                high_frequency_weight=self.high_frequency_weight,
                unit=self.lowpass_unit,
                schedule=self.lowpass_schedule,
                stages=self.lowpass_stages,
            )

    def _check_together(self) -> None:
        """Whether --lowpass and what is said of it fit each other."""
        scheduled, radii = self.lowpass_schedule != "fixed", in_words(self.lowpass)
        if scheduled and len(self.lowpass) != 2:
            expected = f"expected two radii, FIRST and LAST, with --lowpass_schedule {self.lowpass_schedule}"
            raise ValueError(f"--lowpass: {expected}, got {radii}")
        if scheduled:
            self._check_order(*self.lowpass)
        if not scheduled and len(self.lowpass) != 1:
            raise ValueError(f"--lowpass: expected one radius, or --lowpass_schedule beside two, got {radii}")
        if self.lowpass_stages is not None and not self.lowpass_schedule.startswith("step"):
            expected = "expected --lowpass_schedule step_increase or step_decay beside it"
            raise ValueError(f"--lowpass_stages: {expected}, got {self.lowpass_schedule}")
        if self.lowpass_band == "mid" and self.lowpass_inner is None:
            raise ValueError("--lowpass_inner: expected a radius with --lowpass_band mid, got none")
        if self.lowpass_band != "mid" and self.lowpass_inner is not None:
            expected = "expected --lowpass_band mid beside it"
            raise ValueError(f"--lowpass_inner: {expected}, got {self.lowpass_band}")

    def _check_order(self, first: float, last: float) -> None:
        """Whether two radii move as the schedule does."""
        schedule = self.lowpass_schedule
        grows = schedule.endswith("increase")
        if first == last or grows != (first < last):
            expected = (
                f"expected LAST {'above' if grows else 'below'} FIRST with --lowpass_schedule {schedule}"
            )
            raise ValueError(f"--lowpass: {expected}, got {in_words((first, last))}")


def selection(
    timesteps: TimestepFlags,
    frequencies: FrequencyFlags,
    method_name: str,
    method: Method,
    schedule: NoiseSchedule,
    size: tuple[int, int],
    total_steps: int,
) -> Selection:
    """What the flags choose. Everything is looked at that an `Unlearner` would refuse.

    Args:
        size: height and width of the images.
        total_steps: of the run.

    Raises:
        TypeError, ValueError: naming the flag.
    """
    from ..objective.selection import Selection, check_drawable

    timesteps.check(method_name, method)
    densities = [timesteps.density(branch, method, schedule) for branch in IMAGES]
    lowpass = frequencies.build(method_name, method)
    flags = {"time_window": timesteps.flag_of("forget"), "retain_density": timesteps.flag_of("retain")}
    flags |= {name: name for name in ("loss_weight", "snr_gamma", "lowpass")}
    with called(**flags):
        chosen = Selection(*densities, lowpass, timesteps.loss_weight, timesteps.snr_gamma)
        chosen.check_fits(method, schedule)
    for branch, density in chosen.densities(method, schedule).items():
        if branch in method.needs:
            check_drawable(density, schedule)
    if lowpass is not None:
        with called(LowPass="lowpass", total_steps="max_train_steps"):
            lowpass.mask_at(*size, 0, total_steps)
    return chosen


def given_flags(flags: TimestepFlags | FrequencyFlags) -> dict[str, Any]:
    """Those that say something else than their default."""
    values = {each.name: (getattr(flags, each.name), each.default) for each in fields(flags)}
    return {name: value for name, (value, default) in values.items() if value != default}


def check_reads(branch: str, flag: str, value: Any, method_name: str, method: Method) -> None:
    """
    Raises:
        ValueError: naming `flag`; the method has no images of `branch`.
    """
    if branch not in method.needs:
        expected = f"expected a --method that reads {IMAGES[branch]}"
        raise ValueError(f"--{flag}: {expected}, got --{flag} {in_words(value)} with {method_name}")


def in_words(value: Any) -> str:
    """A value as it is written on the command line."""
    if isinstance(value, tuple):
        return " ".join(f"{each:g}" for each in value)
    return str(value)
