"""The papers' way to take a step: this project's own rendering of the two public training loops, with all
that they pay for.

ReTrack's repository: a DataLoader for each branch, float images copied to the device, one network call for
each branch (its SISS throws half of each away), gradients of two-term methods told apart by cloning and
subtracting every parameter's `.grad`, norms by `.item()`, plain AdamW. SISS' repository: one noise and one
timestep for both branches, the mixture through the network once and two backward passes with the graph kept,
statistics by `.item()`. Both run in float32, through the learning-rate schedule and gradient clipping;
accelerate, which both use, is left out (it adds nothing on one device). DPO, KTO and NPO (`preferences.py`)
run in the same loop.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from . import objectives, preferences
from .job import Draw, Images, Job
from .networks import SISS_LAMBD, Step

RETRACK_METHODS = ("retrack", "siss", "erasediff", "neggrad", "vanilla")  # that its repository has
SISS_METHODS = ("siss", "siss no_is", "siss bernoulli")  # that its repository has, and we render


class _Endless(Sampler):
    """Rows in random order, for ever."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self) -> Iterator[int]:
        while True:
            yield from torch.randperm(self.count).tolist()


class _Floats(Dataset):
    """Float images in host memory, of the forget set each with its neighbours `[K, C, H, W]`."""

    def __init__(self, images: Tensor, retain: Tensor | None = None, index: Tensor | None = None):
        self.images, self.retain, self.index = images, retain, index

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, row: int):
        return self.images[row] if self.index is None else (self.images[row], self.retain[self.index[row]])


def loaders(job: Job) -> dict[str, Iterator]:
    """Batches without end: `"retain"` `[b, C, H, W]`, `"forget"` `[b, C, H, W]`, and `"knn"`, a forget batch
    with its neighbours; b as the papers have it.
    """
    forget, retain = (
        store.rows(torch.arange(len(store), device=store.device)).cpu() for store in (job.forget, job.retain)
    )
    sets = {
        "retain": _Floats(retain),
        "forget": _Floats(forget),
        "knn": _Floats(forget, retain, job.neighbors[0].cpu()),
    }
    size = job.network.papers_micro or job.batch
    return {
        name: iter(DataLoader(images, batch_size=size, sampler=_Endless(len(images))))
        for name, images in sets.items()
    }


def retrack_repository(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
) -> Step:
    """Its five methods."""
    return _Loop(job, model, optimizer, max_grad_norm, own_draws=True).step


def siss_repository(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, objective=None
) -> Step:
    """SISS and its variants; `objective` as `_Loop.mixture_terms`, in place of it."""
    return _Loop(job, model, optimizer, max_grad_norm, own_draws=False, objective=objective).step


def preference_loop(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None
) -> Step:
    """DPO, KTO and NPO, in the loop that the other two have in common."""
    terms = preferences.PapersTerms(job, model)
    own_draws = not job.shared_draws
    return _Loop(job, model, optimizer, max_grad_norm, own_draws=own_draws, objective=terms).step


class _Loop:
    def __init__(
        self,
        job: Job,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        max_grad_norm: float | None,
        *,
        own_draws: bool,
        objective=None,
    ):
        self.job, self.model, self.optimizer, self.max_grad_norm = job, model, optimizer, max_grad_norm
        self.own_draws = own_draws  # each branch has its own noise and timesteps
        self.terms = objective or (self.retrack_terms if own_draws else self.mixture_terms)
        self.two_gradients = job.timed.two_gradients
        self.batches = loaders(job)
        self.alpha = job.alphas_cumprod.sqrt().to(job.device)
        self.sigma = (1 - job.alphas_cumprod).sqrt().to(job.device)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda _: 1.0)
        self.branches = [name for name in ("forget", "retain") if name in job.instance.needs]

    def step(self, draw: Draw | None = None) -> None:
        """A whole step; with a `draw` on the job's own images."""
        size = self.job.network.papers_micro or self.job.batch
        rows = self.job.batch if draw is None else len(draw.from_forget)
        parts = [(start, min(start + size, rows)) for start in range(0, rows, size)]
        correction: dict[str, Tensor] = {}
        for start, stop in parts:
            if draw is None:
                images, numbers = self.load(), self.numbers(stop - start)
            else:
                images, numbers = self.job.images.rows(start, stop), draw.rows(start, stop)
            self.backward(self.terms(images, numbers), len(parts), correction)
        if self.two_gradients:
            self.combine(correction)
        if self.max_grad_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()

    def load(self) -> Images:
        loaded = {"forget": None, "retain": None, "neighbors": None}
        for name in self.branches:
            if name == "forget" and self.job.method == "retrack":
                loaded["forget"], loaded["neighbors"] = (
                    images.to(self.job.device, torch.float32) for images in next(self.batches["knn"])
                )
            else:
                loaded[name] = next(self.batches[name]).to(self.job.device, torch.float32)
        return Images(**loaded, sqdist=None)

    def numbers(self, rows: int) -> Draw:
        shape, device = (rows, *self.job.network.shape), self.job.device
        branches = [
            (torch.randint(0, 1000, (rows,), device=device), torch.randn(shape, device=device))
            for _ in range(1 + self.own_draws)
        ]
        mask = torch.rand(rows) <= SISS_LAMBD if self.job.method in ("siss", "siss bernoulli") else None
        uniform = torch.rand(shape, device=device) if self.job.method == "erasediff" else None
        return Draw(*branches[0], *branches[-1], mask if mask is None else mask.to(device), uniform)

    def predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self.model(x_t, timesteps, **self.job.conditioning(len(x_t))).sample

    def levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[timesteps].view(-1, 1, 1, 1), self.sigma[timesteps].view(-1, 1, 1, 1)

    def _add_noise(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As a DDPM scheduler of diffusers does it, with roots taken at every call."""
        cumulated = self.job.alphas_cumprod.to(clean.device)[timesteps].view(-1, 1, 1, 1)
        return cumulated**0.5 * clean + (1 - cumulated) ** 0.5 * noise

    def retrack_terms(self, images: Images, draw: Draw):
        """The loss, or the two losses of two-gradient methods, as ReTrack's repository computes them: every
        branch through the network.
        """
        x_t, predictions = {}, {}
        for name in self.branches:
            timesteps = getattr(draw, f"{name}_timesteps")
            x_t[name] = self._add_noise(getattr(images, name), getattr(draw, f"{name}_noise"), timesteps)
            predictions[name] = self.predict(x_t[name], timesteps)
        method, lambd = self.job.method, getattr(self.job.instance, "lambd", None)
        if method == "vanilla":
            return objectives.denoising(predictions["retain"], draw.retain_noise)
        if method == "neggrad":
            return -objectives.denoising(predictions["forget"], draw.forget_noise)
        if method == "erasediff":
            return objectives.denoising(predictions["retain"], draw.retain_noise), objectives.denoising(
                predictions["forget"], draw.uniform_target
            )
        if method == "retrack":
            unlearn = objectives.retrack(
                predictions["forget"], x_t["forget"], images.neighbors, *self.levels(draw.forget_timesteps)
            )
            return lambd * unlearn + (1 - lambd) * objectives.denoising(
                predictions["retain"], draw.retain_noise
            )
        timesteps = objectives.picked(draw.from_forget, draw.forget_timesteps, draw.retain_timesteps)
        mixed, prediction = (
            objectives.picked(draw.from_forget, values["forget"], values["retain"])
            for values in (x_t, predictions)
        )
        retain, forget, _, _ = objectives.mixture(
            prediction, mixed, images.retain, images.forget, *self.levels(timesteps)
        )
        return retain.mean(), forget.mean()

    def mixture_terms(self, images: Images, draw: Draw):
        """The two losses as SISS' repository computes them, with the statistics that it logs."""
        timesteps, noise = draw.forget_timesteps, draw.forget_noise
        noisy = {
            name: self._add_noise(getattr(images, name), noise, timesteps) for name in ("forget", "retain")
        }
        if self.job.method == "siss no_is":
            terms = tuple(
                (self.predict(noisy[name], timesteps) - noise) ** 2 for name in ("retain", "forget")
            )
            log_statistics(*terms)
            return tuple(term.sum() / len(noise) for term in terms)
        x_t = objectives.picked(draw.from_forget, noisy["forget"], noisy["retain"])
        prediction = self.predict(x_t, timesteps)
        if self.job.method == "siss bernoulli":
            errors = (prediction - noise) ** 2
            terms = errors[~draw.from_forget] / (1 - SISS_LAMBD), errors[draw.from_forget]
            log_statistics(*(term for term in terms if len(term)))
            return tuple(term.sum() / len(noise) for term in terms)
        *terms, retain_weight, forget_weight = objectives.mixture(
            prediction, x_t, images.retain, images.forget, *self.levels(timesteps)
        )
        log_statistics(*terms, retain_weight, forget_weight)
        return tuple(term.sum() / len(noise) for term in terms)

    def backward(self, terms, accumulation: int, correction: dict[str, Tensor]) -> None:
        """Accumulates gradients in `.grad`; of two losses the second's also in `correction`, by
        subtraction.
        """
        if not self.two_gradients:
            (terms / accumulation).backward()
            return
        main, forget = terms
        # ReTrack's loop keeps the graph for all methods, SISS' for those whose terms share it.
        (main / accumulation).backward(retain_graph=self.own_draws or self.job.method != "siss no_is")
        before = {name: parameter.grad.clone() for name, parameter in self.model.named_parameters()}
        (forget / accumulation).backward()
        for name, parameter in self.model.named_parameters():
            gradient = parameter.grad.clone() - before[name]
            correction[name] = correction[name] + gradient if name in correction else gradient

    def combine(self, correction: dict[str, Tensor]) -> None:
        main = {
            name: parameter.grad.clone() - correction[name]
            for name, parameter in self.model.named_parameters()
        }
        if self.own_draws:
            norm = sum(torch.norm(gradient).item() ** 2 for gradient in correction.values()) ** 0.5
        else:
            norms = [
                sum(torch.norm(gradient) ** 2 for gradient in gradients.values()).sqrt()
                for gradients in (main, correction)
            ]
            norm = log(*norms)[1]
        if self.job.method == "erasediff":
            product = sum((main[name] * correction[name]).sum() for name in main)
            factor = -max(self.job.instance.eta - product / norm**2, 0.0)
        else:
            # as SISS' loop; ReTrack's would divide by zero
            factor = self.job.instance.scaling_norm / norm if norm else 0.0
        for name, parameter in self.model.named_parameters():
            parameter.grad = main[name] - factor * correction[name]
        if self.own_draws and self.job.device.type == "cuda":
            torch.cuda.empty_cache()  # ReTrack's loop does, at every step


def log_statistics(*values: Tensor) -> list[float]:
    """Mean, largest, smallest and standard deviation over the rows: what SISS' loop sends to its logger."""
    rows = [value.flatten(1).mean(1) if value.ndim > 1 else value for value in values]
    return log(
        *(
            statistic
            for value in rows
            for statistic in (value.mean(), value.max(), value.min(), value.std(correction=0))
        )
    )


def log(*values: Tensor) -> list[float]:
    """Numbers on the host, one by one."""
    return [value.item() for value in values]
