"""Who takes part, how each is built, and whether it learns the same as the papers' way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastunlearn.engine.replay import WARM_UP_STEPS
from fastunlearn.step import compilation
from fastunlearn.testing.accelerator import Accelerator

from . import limit, official, ours, papers_way, preferences, strongest, tuned
from .job import Draw, Images, Job
from .networks import Step
from .replayed import Replayed

LIMIT, RETRACK_REPO, SISS_REPO, EAGER, STRONGEST = (
    "limit",
    "retrack repo",
    "siss repo",
    "eager tuned",
    "strongest",
)
PREFERENCES = "papers' formula"  # of DPO, KTO and NPO
OURS, UNLEARNER = "fastunlearn", "Unlearner"
OFFICIAL_RETRACK, OFFICIAL_SISS = "official retrack", "official siss"
# float32, plain AdamW, torch's own layout, whatever the others have
PAPERS = (RETRACK_REPO, SISS_REPO, PREFERENCES, OFFICIAL_RETRACK, OFFICIAL_SISS)
GATE = 1e-3  # relative L2 distance of the updates, float32
MOST_ALLOWED = 0.1  # whatever the precision
GATE_ROWS = 4  # on a CPU
# of the gate: below, the papers' float32 weights are rounding (docs/trust.md)
_LEAST_TIMESTEP = 100


class Mode(NamedTuple):
    """How a step runs: its network compiled or not, as one graph or call by call."""

    compiled: bool = False
    replayed: bool = False

    def of(self, base: str) -> str:
        """The name of contestant `base` in this mode."""
        return base + ", compiled" * self.compiled + ", replayed" * self.replayed


EAGERLY, COMPILED, REPLAYED, BOTH = Mode(), Mode(compiled=True), Mode(replayed=True), Mode(True, True)


def mode_of(name: str) -> Mode:
    """The mode of the contestant that is called `name`."""
    return Mode(", compiled" in name, ", replayed" in name)


def base_of(name: str) -> str:
    """What the contestant is called in its eager mode."""
    return name.partition(",")[0]


@dataclass
class Setting:
    """One job, and what its contestants share: the weights (in torch's own layout, and in `layout`), the rows
    in `layout`.
    """

    job: Job
    layout: torch.memory_format
    joined: bool  # ReTrack's branches go through the network together
    accelerator: Accelerator | None = None
    official: dict[str, str] = field(default_factory=dict)  # contestant -> checkout of the repository
    models: dict[torch.memory_format, nn.Module] = field(default_factory=dict)
    images: Images | None = None

    def __post_init__(self):
        for layout in (torch.contiguous_format, self.layout):
            if layout not in self.models:
                self.models[layout] = self.job.network.build().to(self.job.device, memory_format=layout)
        self.images = self.job.in_layout(self.layout)
        self._compiled: nn.Module | None = None

    def model(self, name: str) -> nn.Module:
        return self.models[torch.contiguous_format if name in PAPERS else self.layout]

    def build(self, name: str, *, plain: bool = False) -> Step:
        """The step of `name`.

        Args:
            plain: with SGD of learning rate 1 and without clipping, so that the update is the gradient.

        Raises:
            Exception: whatever hinders the contestant from running here.
        """
        job, mode, base = self.job, mode_of(name), base_of(name)
        model = self.model(name)
        optimizer = self._optimizer(name, model, plain=plain)
        max_grad_norm = None if plain else 1.0
        common = (job, model, optimizer, max_grad_norm)
        if base == OURS:
            return ours.functional(*common, self.images, compile=mode.compiled)
        if base == UNLEARNER:
            return ours.unlearner(*common, self.images, compile=mode.compiled, replay=mode.replayed)
        if name in self.official:
            return {OFFICIAL_RETRACK: official.retrack, OFFICIAL_SISS: official.siss}[name](
                *common, self.official[name]
            )
        if name in PAPERS:
            loop = {
                RETRACK_REPO: papers_way.retrack_repository,
                SISS_REPO: papers_way.siss_repository,
                PREFERENCES: papers_way.preference_loop,
            }
            return loop[name](*common)
        step = self._plain_torch(base, self.compiled() if mode.compiled else model, optimizer, max_grad_norm)
        return Replayed(step, self.accelerator.graphs()) if mode.replayed else step

    def compiled(self) -> nn.Module:
        """The network under torch.compile, one for all baselines: what was compiled for one serves the
        others.
        """
        if self._compiled is None:
            # a graph that is kept for a second backward pass cannot donate its buffers
            torch._functorch.config.donated_buffer = False
            # Past its limit dynamo would run the network eagerly without a word: in full graphs that is an
            # error.
            torch._dynamo.config.recompile_limit = compilation.VARIANTS
            model = self.models[self.layout]
            self._compiled = torch.compile(model, fullgraph=True, dynamic=False, backend=compilation.BACKEND)
        return self._compiled

    def _optimizer(self, name: str, model: nn.Module, *, plain: bool) -> torch.optim.Optimizer:
        mode, base = mode_of(name), base_of(name)
        if plain:
            return torch.optim.SGD(model.parameters(), lr=1.0, fused=mode.replayed)
        if name in PAPERS:
            return self.job.network.optimizer(model.parameters(), self.job.lr)
        # `Unlearner` makes its optimizer capturable by itself.
        capturable = mode.replayed and base != UNLEARNER
        return self.job.network.optimizer(model.parameters(), self.job.lr, fused=True, capturable=capturable)

    def _plain_torch(
        self, base: str, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
    ) -> Step:
        common = (self.job, model, optimizer)
        if base == LIMIT:
            return limit.limit(*common, self.images, self.joined)
        if self.job.method in preferences.METHODS and base in (EAGER, STRONGEST):
            plain = {EAGER: preferences.eager, STRONGEST: preferences.strongest}[base]
            return plain(*common, max_grad_norm, self.images, self.joined)
        if base == EAGER:
            return tuned.eager(*common, max_grad_norm, self.images)
        if base == STRONGEST:
            return strongest.closed_form(*common, max_grad_norm, self.images, self.joined)
        raise ValueError(f"name: expected a contestant, got {base!r}")

    def in_float32(self) -> Setting:
        """The same weights and rows for the gate."""
        if self.job.precision == "float32":
            return self
        return replace(
            self, job=Job(self.job.network, self.job.method, self.job.device, batch=self.job.batch)
        )


def papers_baseline(method: str) -> str | None:
    """The contestant (1) of a method: ReTrack's repository has five of them, the two other SISS variants are
    in SISS' own; preferences have their papers' formulas. None: nobody has published a loop of it.
    """
    if method in papers_way.RETRACK_METHODS:
        return RETRACK_REPO
    if method in preferences.METHODS:
        return PREFERENCES
    return SISS_REPO if method in papers_way.SISS_METHODS else None


def names(job: Job, *, compiled: bool, replayed: bool, official: dict[str, str]) -> list[str]:
    """Who takes part in a comparison, the limit first, this package last.

    Whatever ours may do, the baselines may, too. A method that nobody has published a loop of has no
    baselines but the limit.
    """
    loops = {
        RETRACK_REPO: papers_way.RETRACK_METHODS,
        SISS_REPO: papers_way.SISS_METHODS,
        PREFERENCES: preferences.METHODS,
    }
    papers = [name for name, methods in loops.items() if job.method in methods]
    repositories = {RETRACK_REPO: OFFICIAL_RETRACK, SISS_REPO: OFFICIAL_SISS}
    real = [repositories[name] for name in papers if name in repositories]
    modes = [EAGERLY] + [COMPILED] * compiled + [REPLAYED] * replayed + [BOTH] * (compiled and replayed)
    return [
        *(mode.of(LIMIT) for mode in modes),
        *papers,
        *(name for name in real if name in official),
        *([EAGER, *(mode.of(STRONGEST) for mode in modes)] if papers else []),
        # a function of the caller's loop cannot be replayed, and has no whole sets
        *(mode.of(OURS) for mode in modes if not mode.replayed and not _reads_stores(job)),
        *(mode.of(UNLEARNER) for mode in modes),
    ]


def _reads_stores(job: Job) -> bool:
    """Whether the method can be run by an `Unlearner` alone."""
    return "stores" in job.instance.needs


class Checked(NamedTuple):
    """What the gate found."""

    error: float  # relative L2 distance of the update
    allowed: float
    seconds: float  # of the first call, with compilation


class Gate:
    """One step of plain gradient descent from equal weights on the same rows and random numbers: do the
    updates agree with the papers'? Where the papers have no such method, with that of our own eager step?

    Eager contestants are checked in float32. A compiled or replayed one is checked as it is timed, and may
    err twice as much as its eager form does in that precision: to check it in float32 would compile the
    network once more.
    """

    def __init__(self, setting: Setting, rows: int | None):
        self.timed, self.setting = setting, setting.in_float32()
        job = self.setting.job
        torch.manual_seed(7)
        draw = job.draw(rows and min(rows, job.batch), least_timestep=_LEAST_TIMESTEP)
        # both branches
        self.draw: Draw = replace(
            draw, from_forget=torch.arange(len(draw.from_forget), device=job.device) % 2 == 0
        )
        own = UNLEARNER if _reads_stores(job) else OURS
        self.reference = self._update(self.setting, papers_baseline(job.method) or own)[0]
        self._eager_errors: dict[str, float] = {}
        self._own_draws: list[Tensor] | None = None  # the update of an eager Unlearner that draws by itself

    def check(self, name: str) -> Checked:
        """
        Raises:
            Exception: whatever hinders the contestant from taking a step here.
        """
        mode = mode_of(name)
        if mode == EAGERLY:
            update, seconds = self._update(self.setting, name)
            return Checked(_distance(update, self.reference), GATE, seconds)
        if base_of(name) == UNLEARNER and mode.replayed:
            # Replay takes no draws from outside: the yardstick is the eager Unlearner at the same step, which
            # has passed the gate itself.
            if self._own_draws is None:
                self._own_draws = self._update(self.timed, UNLEARNER, draws=False)[0]
            update, seconds = self._update(self.timed, name, draws=False)
            return Checked(_distance(update, self._own_draws), self._allowed(UNLEARNER), seconds)
        update, seconds = self._update(self.timed, name)
        return Checked(_distance(update, self.reference), self._allowed(base_of(name)), seconds)

    def _allowed(self, base: str) -> float:
        """Of a contestant in the precision that is timed."""
        if self.timed.job.precision == "float32":
            return GATE
        if base not in self._eager_errors:
            self._eager_errors[base] = _distance(self._update(self.timed, base)[0], self.reference)
        return min(GATE + 2 * self._eager_errors[base], MOST_ALLOWED)

    def _update(self, setting: Setting, name: str, *, draws: bool = True) -> tuple[list[Tensor], float]:
        """What one step does to the weights, which get their values back, and the seconds of the first call.

        Args:
            draws: the contestant is given the gate's random numbers; otherwise it draws for itself, and the
                step that counts is one that would be replayed.
        """
        parameters = list(setting.model(name).parameters())
        calls = WARM_UP_STEPS + 2
        if draws:
            calls = 2 if mode_of(name).replayed else 1
        first = None
        with keeping(parameters) as start, _float32_products():
            step = setting.build(name, plain=True)
            # The calls before the one that counts start elsewhere: a step that repeats itself would go unseen
            # otherwise.
            elsewhere = torch._foreach_mul(start, 1.05)
            for call in range(calls):
                _restore(parameters, start if call == calls - 1 else elsewhere)
                began = time.perf_counter()
                step(self.draw if draws else None)
                first = first or time.perf_counter() - began
            update = [
                parameter.detach() - before for parameter, before in zip(parameters, start, strict=True)
            ]
        return update, first


@contextlib.contextmanager
def keeping(parameters: list[nn.Parameter]) -> Iterator[list[Tensor]]:
    """Gives the values of `parameters`, which have them back after the block, and no gradients."""
    values = [parameter.detach().clone() for parameter in parameters]
    try:
        yield values
    finally:
        _restore(parameters, values)
        for parameter in parameters:
            parameter.grad = None


def _restore(parameters: list[nn.Parameter], values: list[Tensor]) -> None:
    with torch.no_grad():
        torch._foreach_copy_(parameters, values)


def _distance(update: list[Tensor], reference: list[Tensor]) -> float:
    """Relative L2."""
    difference = sum(float((a - b).double().square().sum()) for a, b in zip(update, reference, strict=True))
    return (difference / sum(float(b.double().square().sum()) for b in reference)) ** 0.5


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """Without TF32, which torch uses for convolutions on a GPU."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield
