"""The papers' algorithm, tuned: images and draws on the device, foreach in place of loops over parameters, no
`.item()`, a fused optimizer.

It still makes one network call for each branch, computes the losses as the papers do (`objectives.py`) with
autograd, and tells two gradients apart by subtracting. For SISS the algorithm is that of SISS' own
repository: the mixture goes through the network once.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import objectives
from .job import Draw, Images, Job
from .networks import SISS_LAMBD, Step


def eager(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, images: Images
) -> Step:
    """`images`: the fixed rows of the job, in the layout that the network runs in."""
    parameters = list(model.parameters())
    terms = _Terms(job, model)

    def step(draw: Draw | None = None) -> None:
        rows = job.batch if draw is None else len(draw.from_forget)
        draw = job.draw() if draw is None else draw
        size = job.micro or rows
        correction = None
        for start in range(0, rows, size):
            stop = min(start + size, rows)
            with job.autocast():
                loss = terms(images.rows(start, stop), draw.rows(start, stop))
            share = (stop - start) / rows
            if not job.timed.two_gradients:
                (loss * share).backward()
                continue
            main, forget = loss
            (main * share).backward(retain_graph=job.method != "siss no_is")
            before = torch._foreach_add([parameter.grad for parameter in parameters], 0.0)
            (forget * share).backward()
            gradient = torch._foreach_sub([parameter.grad for parameter in parameters], before)
            correction = gradient if correction is None else torch._foreach_add(correction, gradient)
        if correction is not None:
            _combine(job, parameters, correction)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _combine(job: Job, parameters: list[nn.Parameter], correction: list[Tensor]) -> None:
    main = torch._foreach_sub([parameter.grad for parameter in parameters], correction)
    norm = nn.utils.get_total_norm(correction)
    if job.method == "erasediff":
        product = torch.stack([value.sum() for value in torch._foreach_mul(main, correction)]).sum()
        factor = -(job.instance.eta - product / norm**2).clamp(min=0)
    else:
        factor = job.instance.scaling_norm / norm
        factor = torch.where(factor.isinf(), torch.zeros_like(factor), factor)
    torch._foreach_sub_(main, torch._foreach_mul(correction, factor))
    for parameter, gradient in zip(parameters, main, strict=True):
        parameter.grad = gradient


class _Terms:
    """The loss, or the two losses, of a micro-batch."""

    def __init__(self, job: Job, model: nn.Module):
        self.job, self.model = job, model
        self.alpha = job.alphas_cumprod.sqrt().to(job.device)
        self.sigma = (1 - job.alphas_cumprod).sqrt().to(job.device)

    def __call__(self, images: Images, draw: Draw):
        method, settings = self.job.method, self.job.instance
        if method in ("siss", "siss bernoulli"):
            return self._mixed(images, draw)
        if method == "vanilla":
            return self._denoising(images.retain, draw.retain_noise, draw.retain_timesteps)
        if method == "neggrad":
            return -self._denoising(images.forget, draw.forget_noise, draw.forget_timesteps)
        retain = self._denoising(images.retain, draw.retain_noise, draw.retain_timesteps)
        if method == "siss no_is":
            return retain, self._denoising(images.forget, draw.forget_noise, draw.forget_timesteps)
        if method == "erasediff":
            return retain, self._denoising(
                images.forget, draw.forget_noise, draw.forget_timesteps, draw.uniform_target
            )
        levels = self._levels(draw.forget_timesteps)
        x_t = _noised(images.forget, draw.forget_noise, *levels)
        unlearn = objectives.retrack(
            self._predict(x_t, draw.forget_timesteps), x_t, images.neighbors, *levels
        )
        return settings.lambd * unlearn + (1 - settings.lambd) * retain

    def _mixed(self, images: Images, draw: Draw) -> tuple[Tensor, Tensor]:
        timesteps, noise = draw.forget_timesteps, draw.forget_noise
        levels = self._levels(timesteps)
        x_t = _noised(
            torch.where(draw.from_forget.view(-1, 1, 1, 1), images.forget, images.retain), noise, *levels
        )
        prediction = self._predict(x_t, timesteps)
        if self.job.method == "siss":
            retain, forget, _, _ = objectives.mixture(prediction, x_t, images.retain, images.forget, *levels)
            return retain.mean(), forget.mean()
        errors = (prediction - noise).square().sum((1, 2, 3))
        return (errors * ~draw.from_forget).mean() / (1 - SISS_LAMBD), (errors * draw.from_forget).mean()

    def _denoising(
        self, images: Tensor, noise: Tensor, timesteps: Tensor, target: Tensor | None = None
    ) -> Tensor:
        prediction = self._predict(_noised(images, noise, *self._levels(timesteps)), timesteps)
        return objectives.denoising(prediction, noise if target is None else target)

    def _predict(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return self.model(x_t, timesteps, **self.job.conditioning(len(x_t))).sample.float()

    def _levels(self, timesteps: Tensor) -> tuple[Tensor, Tensor]:
        return self.alpha[timesteps].view(-1, 1, 1, 1), self.sigma[timesteps].view(-1, 1, 1, 1)


def _noised(images: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    return alpha * images + sigma * noise
