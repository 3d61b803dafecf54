"""What no step can avoid: the network passes of the method on the same rows, and the optimizer.

No draws, no loss, no combination, no clipping. What a method has beside the passes that it learns from
counts: forward passes without a graph (of a reference, say), inner steps with what it takes to put the
weights back, the products over a whole set, the bytes of a rule on parameters.

The network runs as in this package's step: on a CPU with its attention. The other contestants have torch's.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from fastunlearn.step.attention import fast_attention

from .job import Call, Draw, Images, Job
from .networks import Step
from .rules import RULES

# Values of a block of a whole set, in float64: what stays in a core's cache, and what keeps a GPU busy.
CPU_BLOCK, GPU_BLOCK = 1 << 17, 1 << 23


def calls_of(job: Job, joined: bool) -> list[Call]:
    """The network calls of a step, before they are split into micro-batches; unless `joined`, none has more
    rows than a batch.
    """
    if joined:
        return job.calls
    return [Call(job.batch, call.backwards) for call in job.calls for _ in range(call.rows // job.batch)]


def passes(job: Job, model: nn.Module, images: Images, calls: list[Call]) -> Callable[[], None]:
    """The network passes of `calls` alone; gradients accumulate in `.grad`.

    The rows are noised once. The gradient at the output is fixed: normal, of standard deviation 0.01.
    """
    draw = job.draw()
    alpha, sigma = (
        table[draw.retain_timesteps.cpu()].float().view(-1, 1, 1, 1).to(job.device)
        for table in (job.schedule.alpha, job.schedule.sigma)
    )
    x_t = alpha * images.retain + sigma * draw.retain_noise
    parts: list[tuple[int, Tensor, Tensor, Tensor]] = []
    for rows, backwards in calls:
        repeated = [torch.cat([part] * (rows // job.batch)) for part in (x_t, draw.retain_timesteps)]
        whole = (*repeated, 0.01 * torch.randn_like(repeated[0]))
        pieces = zip(*(each.split(job.micro or rows) for each in whole), strict=True)
        parts += [(backwards, *piece) for piece in pieces]

    def run() -> None:
        for backwards, x_t, timesteps, gradient in parts:
            graph = nullcontext() if backwards else torch.no_grad()
            with graph, job.autocast(), fast_attention() if job.device.type == "cpu" else nullcontext():
                prediction = model(x_t, timesteps, **job.conditioning(len(x_t))).sample
            for index in range(backwards):
                prediction.backward(gradient.to(prediction.dtype), retain_graph=index + 1 < backwards)
            del prediction

    return run


def limit(job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, images: Images, joined: bool) -> Step:
    """A step that cannot be shortened; what it learns is nonsense, so it passes no gate."""
    run = passes(job, model, images, calls_of(job, joined))
    before: list[Callable[[], None]] = []
    if job.instance.inner_steps:
        before.append(_inner_steps(job, model, optimizer, images))
    if "stores" in job.instance.needs:
        before.append(_whole_sets(job, images))
    if job.timed.rule:
        before.append(_bytes_of_a_rule(job, model))

    def step(draw: Draw | None = None) -> None:
        for work in before:
            work()
        run()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def _inner_steps(
    job: Job, model: nn.Module, optimizer: torch.optim.Optimizer, images: Images
) -> Callable[[], None]:
    """The updates that are taken back, and the loss that they lead to: copies of the weights and of the
    optimizer's state, the steps, a forward pass, the weights as they were.
    """
    steps = passes(job, model, images, job.inner_calls)
    loss = passes(job, model, images, [Call(call.rows, 0) for call in job.inner_calls])
    parameters = list(model.parameters())
    weights = [torch.empty_like(parameter) for parameter in parameters]
    moments = [torch.empty_like(parameter) for parameter in parameters for _ in range(2)]

    def state() -> list[Tensor]:
        own = [value for entry in optimizer.state.values() for value in entry.values()]
        return [value for value in own if value.ndim > 0]

    @torch.no_grad()
    def keep() -> None:
        torch._foreach_copy_(weights, parameters)
        if optimizer.state:
            torch._foreach_copy_(moments, state())

    def run() -> None:
        keep()
        for _ in range(job.instance.inner_steps):
            steps()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        loss()
        with torch.no_grad():
            torch._foreach_copy_(parameters, weights)

    return run


def _whole_sets(job: Job, images: Images) -> Callable[[], None]:
    """ReTrack's weights over all images: of each row two products with the set to keep, and for a density one
    with that to forget, in float64 as they are defined, in blocks of what is stored.
    """
    rows = images.forget.flatten(1).double()
    values = CPU_BLOCK if job.device.type == "cpu" else GPU_BLOCK
    size = max(1, values // rows.shape[1])
    retain, forget = job.retain.images.split(size), job.forget.images.split(size)

    def run() -> None:
        total = torch.zeros_like(rows)
        for block in retain:
            block = block.flatten(1).double()
            total.addmm_(rows @ block.T, block)
        if job.instance.weights == "importance":
            for block in forget:
                rows @ block.flatten(1).double().T

    return run


def _bytes_of_a_rule(job: Job, model: nn.Module) -> Callable[[], None]:
    """What the rule reads and writes, moved by a copy."""
    weights = sum(parameter.numel() for parameter in model.parameters())
    source = torch.ones(RULES[job.timed.rule].bytes_of_a_weight * weights // 2, dtype=torch.uint8)
    source = source.to(job.device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)
