"""What no step can avoid: the network passes of the method on the same rows, and the optimizer.

No draws, no loss, no combination, no clipping.

The network runs as in this package's step: on a CPU with its attention. The other contestants have torch's.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastunlearn.step.attention import fast_attention

from .job import Call, Draw, Images, Job
from .networks import Step


def calls_of(job: Job, joined: bool) -> list[Call]:
    """The network calls of a step, before they are split into micro-batches; unless `joined`, none has more
    rows than a batch.
    """
    if joined:
        return job.calls
    return [Call(job.batch, call.backwards) for call in job.calls for _ in range(call.rows // job.batch)]


def passes(job: Job, model: nn.Module, images: Images, joined: bool) -> Step:
    """The network passes alone; gradients accumulate in `.grad`.

    The rows are noised once. The gradient at the output is fixed: normal, of standard deviation 0.01.
    """
    draw = job.draw()
    alpha, sigma = (
        table[draw.retain_timesteps.cpu()].float().view(-1, 1, 1, 1).to(job.device)
        for table in (job.schedule.alpha, job.schedule.sigma)
    )
    x_t = alpha * images.retain + sigma * draw.retain_noise
    parts: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for rows, backwards in calls_of(job, joined):
        repeated = [torch.cat([part] * (rows // job.batch)) for part in (x_t, draw.retain_timesteps)]
        whole = (*repeated, 0.01 * torch.randn_like(repeated[0]))
        pieces = zip(*(each.split(job.micro or rows) for each in whole), strict=True)
        parts += [(backwards, *piece) for piece in pieces]

    def run(draw: Draw | None = None) -> None:
        for backwards, x_t, timesteps, gradient in parts:
            with job.autocast(), fast_attention() if job.device.type == "cpu" else nullcontext():
                prediction = model(x_t, timesteps, **job.conditioning(len(x_t))).sample
            for index in range(backwards):
                prediction.backward(gradient.to(prediction.dtype), retain_graph=index + 1 < backwards)
            del prediction

    return run


def limit(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, joined: bool) -> Step:
    """A step that cannot be shortened; what it learns is nonsense, so it passes no gate."""
    run = passes(job, model, images, joined)

    def step(draw: Draw | None = None) -> None:
        run()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step
