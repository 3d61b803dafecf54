"""What no step can avoid: the network passes of the method on the same rows, and the optimizer.

No draws, no loss, no combination, no clipping.

The network runs as in this package's step: on a CPU with its attention. The other contestants have torch's.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastunlearn.step.attention import fast_attention

from .job import Draw, Images, Job
from .networks import Step

BACKWARDS = {"siss": 2, "siss bernoulli": 2}  # of one forward pass; 1 for the others


def rows_of_calls(job: Job, joined: bool) -> list[int]:
    """Rows of each network call of a step, before they are split into micro-batches."""
    if job.method == "retrack" and joined:
        return [2 * job.batch]
    return [job.batch] * (2 if job.method in ("retrack", "erasediff", "siss no_is") else 1)


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
    calls: list[tuple[Tensor, Tensor, Tensor]] = []
    for rows in rows_of_calls(job, joined):
        repeated = [torch.cat([part] * (rows // job.batch)) for part in (x_t, draw.retain_timesteps)]
        calls += zip(
            *(part.split(job.micro or rows) for part in (*repeated, 0.01 * torch.randn_like(repeated[0]))),
            strict=True,
        )
    backwards = BACKWARDS.get(job.method, 1)

    def run(draw: Draw | None = None) -> None:
        for x_t, timesteps, gradient in calls:
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
