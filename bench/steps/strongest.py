"""The strongest step without this package's kernels: fewest network calls, closed-form gradients, no buffer
that is not needed, a fused optimizer.

The algebra is that of docs/decisions.md: one target in place of K, weights by `sigmoid`, the gradient of a
squared error written down. Forget weights are divided by their largest, so that tiny ones do not become
subnormal numbers: the rescaling of SISS cancels a common factor.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from .job import Draw, Images, Job
from .networks import SISS_LAMBD, Step


class Call(NamedTuple):
    """One network call: `[R, ...]`, and by role ("forget", "retain") the target `[R, C, H, W]` and weight
    `[R]` of a squared error.
    """

    x_t: Tensor
    timesteps: Tensor
    terms: dict[str, tuple[Tensor, Tensor]]

    def split(self, size: int | None) -> list[Call]:
        if size is None or size >= len(self.x_t):
            return [self]
        parts = [slice(start, start + size) for start in range(0, len(self.x_t), size)]
        return [
            Call(
                self.x_t[part],
                self.timesteps[part],
                {role: (t[part], w[part]) for role, (t, w) in self.terms.items()},
            )
            for part in parts
        ]


def closed_form(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    images: Images,
    joined: bool,
) -> Step:
    """`joined`: ReTrack's two branches go through the network together."""
    parameters = list(model.parameters())
    compose = _Compose(job, joined)

    def step(draw: Draw | None = None) -> None:
        rows = job.batch if draw is None else len(draw.from_forget)
        calls = [
            part
            for call in compose(images.rows(0, rows), job.draw() if draw is None else draw)
            for part in call.split(job.micro)
        ]
        # the forget gradient, while `.grad` holds the other one
        forget: list[Tensor | None] = [None] * len(parameters)
        # Where no forget gradient follows a retain gradient, the rescaled first one is what the second
        # accumulates upon.
        in_place = job.method.startswith("siss") and (len(calls) == 1 or job.method == "siss no_is")
        role = next(iter(calls[0].terms))
        for call in calls:
            with job.autocast():
                prediction = model(call.x_t, call.timesteps, **job.conditioning(len(call.x_t))).sample
            for index, (wanted, (target, weight)) in enumerate(call.terms.items()):
                if wanted != role and in_place:
                    gradients = [parameter.grad for parameter in parameters]
                    torch._foreach_mul_(gradients, -_rescaling(job, gradients))
                elif wanted != role:
                    _swap(parameters, forget)
                role = wanted
                gradient = 2 * weight.view(-1, 1, 1, 1) * (prediction.detach().float() - target)
                prediction.backward(
                    gradient.to(prediction.dtype), retain_graph=index + 1 < len(call.terms), inputs=parameters
                )
            del prediction
        if forget[0] is not None:
            _combine(job, [parameter.grad for parameter in parameters], forget)
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _swap(parameters: list[nn.Parameter], parked: list[Tensor | None]) -> None:
    for index, parameter in enumerate(parameters):
        parameter.grad, parked[index] = parked[index], parameter.grad


def _rescaling(job: Job, forget: list[Tensor]) -> Tensor:
    factor = job.instance.scaling_norm / nn.utils.get_total_norm(forget)
    return torch.where(factor.isinf(), torch.zeros_like(factor), factor)


def _combine(job: Job, main: list[Tensor], forget: list[Tensor]) -> None:
    """`main -= factor * forget`, in place."""
    if job.method == "erasediff":
        norm = nn.utils.get_total_norm(forget)
        product = torch.stack([value.sum() for value in torch._foreach_mul(main, forget)]).sum()
        factor = -(job.instance.eta - product / norm**2).clamp(min=0)
    else:
        factor = _rescaling(job, forget)
    torch._foreach_mul_(forget, -factor)
    torch._foreach_add_(main, forget)


class _Compose:
    """The network calls of a step."""

    def __init__(self, job: Job, joined: bool):
        self.job, self.joined = job, joined
        # float64
        self.alpha, self.sigma = job.schedule.alpha.to(job.device), job.schedule.sigma.to(job.device)

    def __call__(self, images: Images, draw: Draw) -> list[Call]:
        method = self.job.method
        if method in ("siss", "siss bernoulli"):
            return [self._mixture(images, draw)]
        if method == "retrack":
            return self._retrack(images, draw)
        forget = ("forget", images.forget, draw.forget_noise, draw.forget_timesteps)
        retain = ("retain", images.retain, draw.retain_noise, draw.retain_timesteps)
        if method == "vanilla":
            return [self._denoising(*retain)]
        if method == "neggrad":
            # one gradient: the role does not matter
            return [self._denoising("retain", *forget[1:], scale=-1.0)]
        return [
            self._denoising(*forget, target=draw.uniform_target if method == "erasediff" else None),
            self._denoising(*retain),
        ]

    def _denoising(
        self,
        role: str,
        images: Tensor,
        noise: Tensor,
        timesteps: Tensor,
        *,
        target: Tensor | None = None,
        scale: float = 1.0,
    ) -> Call:
        weight = torch.full((len(images),), scale / len(images), device=images.device)
        return Call(
            self._noised(images, noise, timesteps),
            timesteps,
            {role: (noise if target is None else target, weight)},
        )

    def _retrack(self, images: Images, draw: Draw) -> list[Call]:
        lambd, rows, noise = self.job.instance.lambd, len(images.forget), draw.forget_noise
        rho = (self.alpha / self.sigma)[draw.forget_timesteps].view(-1, 1)
        # <eps, a - x_j>, [B, K]
        dots = torch.bmm(
            (images.forget[:, None] - images.neighbors).flatten(2), noise.flatten(1).unsqueeze(2)
        ).squeeze(2)
        p = torch.softmax(
            -rho * dots - 0.5 * rho**2 * (images.sqdist - images.sqdist.amin(1, keepdim=True)), dim=1
        ).float()
        mean = torch.bmm(p.unsqueeze(1), images.neighbors.flatten(2)).view_as(images.forget)
        target = noise + rho.float().view(-1, 1, 1, 1) * (images.forget - mean)
        retain = self._denoising(
            "retain", images.retain, draw.retain_noise, draw.retain_timesteps, scale=1 - lambd
        )
        weight = torch.full((rows,), lambd / rows, device=noise.device)
        forget = Call(
            self._noised(images.forget, noise, draw.forget_timesteps),
            draw.forget_timesteps,
            {"retain": (target, weight)},
        )
        if not self.joined:
            return [forget, retain]
        (target, weight), (retain_target, retain_weight) = forget.terms["retain"], retain.terms["retain"]
        terms = {"retain": (torch.cat([target, retain_target]), torch.cat([weight, retain_weight]))}
        return [
            Call(torch.cat([forget.x_t, retain.x_t]), torch.cat([forget.timesteps, retain.timesteps]), terms)
        ]

    def _mixture(self, images: Images, draw: Draw) -> Call:
        timesteps, noise, chosen = draw.forget_timesteps, draw.forget_noise, draw.from_forget
        rows, column = len(chosen), chosen.view(-1, 1, 1, 1)
        x_t = self._noised(torch.where(column, images.forget, images.retain), noise, timesteps)
        if self.job.method == "siss bernoulli":
            shares = chosen.float() / rows, (~chosen).float() / (rows * (1 - SISS_LAMBD))
            return Call(x_t, timesteps, {"forget": (noise, shares[0]), "retain": (noise, shares[1])})
        difference = images.retain - images.forget
        rho = (self.alpha / self.sigma)[timesteps]
        u = -rho * (noise * difference).sum((1, 2, 3)) + torch.where(
            chosen, 0.5, -0.5
        ) * rho**2 * difference.square().sum((1, 2, 3))
        shift = rho.float().view(-1, 1, 1, 1) * difference  # from one image's target to the other's
        retain_target, forget_target = (
            torch.where(column, noise - shift, noise),
            torch.where(column, noise, noise + shift),
        )
        forget_weight = torch.sigmoid(u)  # lambd = 1/2: log(lambd / (1 - lambd)) is zero
        relative = forget_weight / forget_weight.amax().clamp(min=1e-300)
        relative = torch.where(relative < 2.0**-60, torch.zeros_like(relative), relative)
        terms = {
            "forget": (forget_target, (relative / rows).float()),
            "retain": (retain_target, (torch.sigmoid(-u) / (1 - SISS_LAMBD) / rows).float()),
        }
        return Call(x_t, timesteps, terms)

    def _noised(self, images: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        alpha, sigma = (table[timesteps].float().view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
        return alpha * images + sigma * noise
