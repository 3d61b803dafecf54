"""Who takes part, how each is built, and whether it learns the same as the papers' way."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from . import limit, official, ours, papers_way, strongest, tuned
from .job import Draw, Images, Job
from .networks import Step

LIMIT, RETRACK_REPO, SISS_REPO, EAGER, STRONGEST = "limit", "retrack repo", "siss repo", "eager tuned", "strongest"
OURS, UNLEARNER = "fastunlearn", "Unlearner"
OFFICIAL_RETRACK, OFFICIAL_SISS = "official retrack", "official siss"
PAPERS = (RETRACK_REPO, SISS_REPO, OFFICIAL_RETRACK, OFFICIAL_SISS)  # float32, plain AdamW, torch's own layout, whatever the others have
COMPILED = ", compiled"
_OURS = {  # name -> how it is built, keyword arguments
    OURS: (ours.functional, {}),
    UNLEARNER: (ours.unlearner, {}),
    OURS + COMPILED: (ours.functional, {"compile": True}),
    UNLEARNER + COMPILED: (ours.unlearner, {"compile": True}),
    UNLEARNER + ", replayed": (ours.unlearner, {"replay": True}),
}
GATE = 1e-3  # relative L2 distance of the updates, float32
GATE_ROWS = 4  # on a CPU
_LEAST_TIMESTEP = 100  # of the gate: below, the papers' float32 weights are rounding (methods.md, golden/README)


@dataclass
class Setting:
    """One job, and what its contestants share: the weights (in torch's own layout, and in `layout`), the rows in `layout`."""

    job: Job
    layout: torch.memory_format
    joined: bool  # ReTrack's branches go through the network together
    official: dict[str, str] = field(default_factory=dict)  # contestant -> checkout of the repository
    models: dict[torch.memory_format, nn.Module] = field(default_factory=dict)
    images: Images | None = None

    def __post_init__(self):
        for layout in (torch.contiguous_format, self.layout):
            if layout not in self.models:
                self.models[layout] = self.job.network.build().to(self.job.device, memory_format=layout)
        self.images = self.job.in_layout(self.layout)

    def model(self, name: str) -> nn.Module:
        return self.models[torch.contiguous_format if name in PAPERS else self.layout]

    def build(self, name: str, *, plain: bool = False) -> Step:
        """The step of `name`.

        Args:
            plain: with SGD of learning rate 1 and without clipping, so that the update is the gradient.

        Raises:
            Exception: whatever hinders the contestant from running here.
        """
        job, model = self.job, self.model(name)
        max_grad_norm = None if plain else 1.0
        if plain:
            optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        else:
            optimizer = job.network.optimizer(model.parameters(), **({} if name in PAPERS else {"fused": True}))
        common = (job, model, optimizer, max_grad_norm)
        if name in _OURS:
            make, options = _OURS[name]
            return make(*common, self.images, **options)
        if name in self.official:
            return {OFFICIAL_RETRACK: official.retrack, OFFICIAL_SISS: official.siss}[name](*common, self.official[name])
        if name in PAPERS:
            return {RETRACK_REPO: papers_way.retrack_repository, SISS_REPO: papers_way.siss_repository}[name](*common)
        if name.endswith(COMPILED):
            torch._functorch.config.donated_buffer = False  # a graph that is kept for a second backward pass cannot donate its buffers
            model = torch.compile(model, dynamic=False)
        match name.removesuffix(COMPILED):
            case "limit":
                return limit.limit(job, model, optimizer, self.images, self.joined)
            case "eager tuned":
                return tuned.eager(*common, self.images)
            case "strongest":
                return strongest.closed_form(job, model, optimizer, max_grad_norm, self.images, self.joined)
        raise ValueError(f"name: expected a contestant, got {name!r}")

    def in_float32(self) -> Setting:
        """The same weights and rows for the gate."""
        if self.job.precision == "float32":
            return self
        return replace(self, job=Job(self.job.network, self.job.method, self.job.device, batch=self.job.batch))


def papers_baseline(method: str) -> str:
    """The contestant (1) of a method: ReTrack's repository has five of them, the two other SISS variants are in SISS' own."""
    return SISS_REPO if method in ("siss no_is", "siss bernoulli") else RETRACK_REPO


def names(job: Job, *, compiled: bool, official: dict[str, str]) -> list[str]:
    """Who takes part in a comparison, the limit first, this package last."""
    papers = [RETRACK_REPO, SISS_REPO] if job.method == "siss" else [papers_baseline(job.method)]
    real = [{RETRACK_REPO: OFFICIAL_RETRACK, SISS_REPO: OFFICIAL_SISS}[name] for name in papers]
    last = [OURS, UNLEARNER] + [OURS + COMPILED, UNLEARNER + COMPILED] * compiled + [UNLEARNER + ", replayed"] * (job.device.type == "cuda")
    compiled_others = [LIMIT + COMPILED, STRONGEST + COMPILED] if compiled else []
    return [LIMIT, *papers, *(name for name in real if name in official), EAGER, STRONGEST, *compiled_others, *last]


class Gate:
    """One step of plain gradient descent from equal weights on the same rows and random numbers: do the updates agree with the papers'?"""

    def __init__(self, setting: Setting, rows: int | None):
        self.setting = setting.in_float32()
        job = self.setting.job
        torch.manual_seed(7)
        draw = job.draw(rows and min(rows, job.batch), least_timestep=_LEAST_TIMESTEP)
        self.draw: Draw = replace(draw, from_forget=torch.arange(len(draw.from_forget), device=job.device) % 2 == 0)  # both branches
        self.reference = self.update(papers_baseline(job.method))[0]

    def error(self, name: str) -> tuple[float, float]:
        """Relative L2 distance of the update, and the seconds of the call."""
        update, seconds = self.update(name)
        difference = sum(float((a - b).double().square().sum()) for a, b in zip(update, self.reference, strict=True))
        return (difference / sum(float(b.double().square().sum()) for b in self.reference)) ** 0.5, seconds

    def update(self, name: str) -> tuple[list[Tensor], float]:
        parameters = list(self.setting.model(name).parameters())
        start = [parameter.detach().clone() for parameter in parameters]
        try:
            with _float32_products():
                step = self.setting.build(name, plain=True)
                began = time.perf_counter()
                step(self.draw)
                update = [(parameter.detach() - before) for parameter, before in zip(parameters, start, strict=True)]
                return update, time.perf_counter() - began
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, start)
            for parameter in parameters:
                parameter.grad = None


@contextlib.contextmanager
def _float32_products() -> Iterator[None]:
    """Without TF32, which torch uses for convolutions on a GPU."""
    with torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        yield
