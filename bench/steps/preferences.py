"""DPO, KTO and NPO beside this package: their papers' way, the same tuned, and plain torch at its best.

Written from the formulas (Diffusion-DPO, arXiv 2311.12908, Eq. 14; Diffusion-KTO, arXiv 2404.04465; NPO,
arXiv 2404.05868), with the signs that unlearning gives them: a retain image is preferred, a forget image is
not. Losses are means over the elements of an image, as in the papers' code, whose `beta` ours is; NPO's
factor makes it tend to the summed gradient of NegGrad. None of the three splits its rows into micro-batches.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid

from .job import Draw, Images, Job
from .networks import Step, reference_of

METHODS = ("dpo", "kto", "kto class", "kto zero", "npo", "npo forget_only")

ByRole = dict[str, Tensor]  # for "forget" and "retain"


def loss_of(job: Job, losses: ByRole, reference: ByRole) -> Tensor:
    """What the method descends, 0-d, of losses `[B]` that are means over the elements of an image."""
    method = job.instance
    beta, elements = method.beta, job.images.forget[0].numel()
    # The implicit reward: by how much a row's loss has become smaller.
    reward = {role: reference[role] - losses[role] for role in reference}
    if method.name == "dpo":
        return -logsigmoid(beta * (reward["retain"] - reward["forget"])).mean()
    if method.name == "kto":
        z0 = reference_point(method.z0, reward)
        wanted = 1 - torch.sigmoid(beta * (reward["retain"] - z0))
        unwanted = 1 - torch.sigmoid(beta * (z0 - reward["forget"]))
        return wanted.mean() + unwanted.mean()
    loss = -(2 * elements / beta) * logsigmoid(-beta * reward["forget"]).mean()
    if "retain" in losses:
        loss = loss + method.retain_weight * elements * losses["retain"].mean()
    return loss


def reference_point(kind: str, reward: ByRole) -> Tensor | float:
    """KTO's z0, without a gradient."""
    if kind == "zero":
        return 0.0
    rows = [own.detach() for own in reward.values()]
    if kind == "class":
        rows = [own.mean(0, keepdim=True) for own in rows]
    return torch.cat(rows).mean().clamp(min=0)


def slopes(job: Job, losses: ByRole, reference: ByRole) -> ByRole:
    """The derivative of `loss_of` by each loss, `[B]`, written out."""
    method = job.instance
    beta, elements = method.beta, job.images.forget[0].numel()
    reward = {role: reference[role] - losses[role] for role in reference}
    if method.name == "dpo":
        slope = beta * torch.sigmoid(-beta * (reward["retain"] - reward["forget"]))
        found = {"retain": slope, "forget": -slope}
    elif method.name == "kto":
        z0 = reference_point(method.z0, reward)
        likely = {role: torch.sigmoid(beta * (own - z0)) for role, own in reward.items()}
        found = {role: beta * own * (1 - own) for role, own in likely.items()}
        found["forget"] = -found["forget"]
    else:
        found = {"forget": -2 * elements * torch.sigmoid(beta * reward["forget"])}
        if "retain" in losses:
            found["retain"] = torch.full_like(losses["retain"], method.retain_weight * elements)
    return {role: slope / len(slope) for role, slope in found.items()}


class _Rows:
    """Noisy images of a step, by role: all that the three contestants have in common.

    Args:
        joined: both sets go through a network in one call, where both are compared with the reference.
    """

    def __init__(self, job: Job, model: nn.Module, joined: bool):
        self.job, self.model, self.reference = job, model, reference_of(model)
        self.alpha = job.alphas_cumprod.sqrt().to(job.device)
        self.sigma = (1 - job.alphas_cumprod).sqrt().to(job.device)
        self.roles = [role for role in ("forget", "retain") if role in job.instance.needs]
        self.compared = [role for role in self.roles if role in job.instance.compared]
        both = len(self.compared) == 2 and joined
        self.calls = [self.roles] if both else [[role] for role in self.roles]

    def noisy(self, images: Images, draw: Draw) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """x_t, timesteps and noise of each role."""
        found = {}
        for role in self.roles:
            timesteps, noise = getattr(draw, f"{role}_timesteps"), getattr(draw, f"{role}_noise")
            alpha, sigma = (table[timesteps].view(-1, 1, 1, 1) for table in (self.alpha, self.sigma))
            found[role] = alpha * getattr(images, role) + sigma * noise, timesteps, noise
        return found

    def residuals(self, network: nn.Module, rows: dict, roles: list[str]) -> Tensor:
        """Prediction less noise, `[R, C, H, W]`, in one call for `roles`."""
        x_t, timesteps, noise = (torch.cat([rows[role][part] for role in roles]) for part in range(3))
        with self.job.autocast():
            prediction = network(x_t, timesteps, **self.job.conditioning(len(x_t))).sample
        return prediction.float() - noise

    def losses(self, residual: Tensor, roles: list[str]) -> ByRole:
        """Means over the elements of an image, `[B]` for each role."""
        means = residual.square().flatten(1).mean(1)
        return dict(zip(roles, means.chunk(len(roles)), strict=True))

    @torch.no_grad()
    def of_reference(self, rows: dict) -> ByRole:
        found: ByRole = {}
        for roles in self.calls:
            if roles[0] in self.compared:
                found |= self.losses(self.residuals(self.reference, rows, roles), roles)
        return found


class PapersTerms:
    """The objective as their loops compute it, in one call of each network for both sets; the reference comes
    after the network, whose graph waits for it. What they log is read at every step.
    """

    def __init__(self, job: Job, model: nn.Module):
        self.rows = _Rows(job, model, joined=True)

    def __call__(self, images: Images, draw: Draw) -> Tensor:
        rows = self.rows.noisy(images, draw)
        losses: ByRole = {}
        for roles in self.rows.calls:
            losses |= self.rows.losses(self.rows.residuals(self.rows.model, rows, roles), roles)
        reference = self.rows.of_reference(rows)
        loss = loss_of(self.rows.job, losses, reference)
        for value in (loss, *(losses[role].mean() for role in losses), *map(torch.mean, reference.values())):
            value.item()
        return loss


def eager(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    images: Images,
    joined: bool,
) -> Step:
    """The reference first, the loss by autograd, foreach and a fused optimizer; nothing is read."""
    rows_of = _Rows(job, model, joined)

    def backward(rows: dict, reference: ByRole) -> None:
        losses: ByRole = {}
        for roles in rows_of.calls:
            losses |= rows_of.losses(rows_of.residuals(model, rows, roles), roles)
        loss_of(job, losses, reference).backward()

    return _step(rows_of, optimizer, max_grad_norm, images, backward)


def strongest(
    job: Job,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    max_grad_norm: float | None,
    images: Images,
    joined: bool,
) -> Step:
    """The same with the derivative written out: autograd begins at the predictions."""
    rows_of = _Rows(job, model, joined)

    def backward(rows: dict, reference: ByRole) -> None:
        residuals = [rows_of.residuals(model, rows, roles) for roles in rows_of.calls]
        losses: ByRole = {}
        for residual, roles in zip(residuals, rows_of.calls, strict=True):
            losses |= rows_of.losses(residual.detach(), roles)
        slope = slopes(job, losses, reference)
        elements = residuals[0][0].numel()
        for residual, roles in zip(residuals, rows_of.calls, strict=True):
            of_rows = torch.cat([slope[role] for role in roles]).view(-1, 1, 1, 1)
            residual.backward(residual.detach() * (2 / elements * of_rows))

    return _step(rows_of, optimizer, max_grad_norm, images, backward)


def _step(
    rows_of: _Rows, optimizer: torch.optim.Optimizer, max_grad_norm: float | None, images: Images, backward
) -> Step:
    job, parameters = rows_of.job, list(rows_of.model.parameters())

    def step(draw: Draw | None = None) -> None:
        count = job.batch if draw is None else len(draw.from_forget)
        rows = rows_of.noisy(images.rows(0, count), job.draw() if draw is None else draw)
        backward(rows, rows_of.of_reference(rows))
        if max_grad_norm is not None:
            nn.utils.clip_grad_norm_(parameters, max_grad_norm, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
