"""What the processes of `test_distributed_steps.py` do, and the single process they are compared with does: a
few steps, and what came of them.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from small_methods import Anchor, Mask, Pairs
from torch import Tensor, nn

from fastunlearn import (
    SISS,
    ImageStore,
    Unlearner,
    erasediff_step,
    method_step,
    methods,
    retrack_step,
    siss_step,
)
from fastunlearn.engine import estimates
from fastunlearn.host.precision import tf32
from fastunlearn.objective.draws import Draws
from fastunlearn.step.take import StepOutput
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule
from fastunlearn.testing.methods import compared_with

SCHEDULE = linear_schedule()
BATCH, STEPS = 12, 4


class Denoiser(TinyDenoiser):
    """With a layer that no prediction depends on, and, if asked, a frozen one."""

    def __init__(self, frozen: bool = False):
        super().__init__()
        self.unused = nn.Linear(3, 2)
        nn.init.ones_(self.unused.weight)
        nn.init.zeros_(self.unused.bias)
        self.time.requires_grad_(not frozen)


def images(count: int, seed: int) -> Tensor:
    """`[count, 1, 8, 8]` uint8."""
    return torch.randint(
        0, 256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def world(alone: bool) -> dist.ProcessGroup | None:
    return None if alone else dist.group.WORLD


def build(
    method,
    alone: bool,
    *,
    wrapped: bool = False,
    frozen: bool = False,
    fused: bool = True,
    scaled: bool = False,
    sgd: bool = False,
    device: str = "cpu",
    **options,
) -> Unlearner:
    model: nn.Module = Denoiser(frozen).to(device)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if sgd:
        optimizer = torch.optim.SGD(trainable, lr=1e-4, momentum=0.9)
    else:
        optimizer = torch.optim.AdamW(trainable, lr=1e-3, weight_decay=0.1, fused=fused)
    if wrapped and not alone:
        model = nn.parallel.DistributedDataParallel(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10) if scaled else None
    group = None if wrapped else world(alone)
    stores = {"forget": ImageStore(images(4, 1)), "retain": ImageStore(images(20, 2))}
    fixed = {"batch_size": BATCH, "seed": 5, "grad_scaler": scaler, "process_group": group}
    fixed |= compared_with(method, TinyDenoiser(seed=1).to(device))
    return Unlearner(model, optimizer, SCHEDULE, method, **stores, **fixed | options)


def weights(model: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])


def numbers(output: StepOutput) -> dict[str, float]:
    return {name: float(value) for name, value in output._asdict().items() if value is not None}


def take_steps(method, alone: bool, options: dict[str, Any]) -> tuple[Tensor, list[dict[str, float]]]:
    """Weights `[P]` after `STEPS` steps of an `Unlearner`, and what each step reported."""
    unlearner = build(method, alone, **options)
    reports = [numbers(unlearner.step()) for _ in range(STEPS)]
    return weights(unlearner.model), reports


def take_steps_with_rules(method, alone: bool) -> tuple[Tensor, list[dict[str, float]]]:
    """`take_steps` with a mask and an anchor."""
    unlearner = build(method, alone)
    parameters = unlearner.parameters
    generator = torch.Generator().manual_seed(5)
    masks = [(torch.rand(each.shape, generator=generator) < 0.5).float() for each in parameters]
    anchor = Anchor([each.detach() + 0.1 for each in parameters], 0.5)
    unlearner.rules = (Mask(parameters, masks), anchor)
    reports = [numbers(unlearner.step()) for _ in range(STEPS)]
    return weights(unlearner.model), reports


def take_steps_with_mask_and_anchor(method, alone: bool, seed: int = 0) -> Any:
    """`take_steps` under the library's rules; what an error says, if one is raised.

    Args:
        seed: of the mask, to which other processes than the first add their rank.
    """
    unlearner = build(method, alone)
    rank = 0 if alone else seed * dist.get_rank()
    generator = torch.Generator().manual_seed(5 + rank)
    trained = {name: own for name, own in unlearner.model.named_parameters() if own.requires_grad}
    gradients = {name: torch.randn(own.shape, generator=generator) for name, own in trained.items()}
    mask = methods.Mask.from_gradients(gradients, 0.5, model=unlearner.model)
    mean = {name: own + 0.1 for name, own in trained.items()}
    unlearner.rules = (mask, methods.Anchor(mean, 2.0, 50.0, model=unlearner.model))
    try:
        reports = [numbers(unlearner.step()) for _ in range(STEPS)]
    except ValueError as error:
        return str(error)
    return weights(unlearner.model), reports


def estimates_in_one_process() -> list[dict[str, Tensor]] | None:
    """Those of process 0 for a network in DistributedDataParallel, while the others make none."""
    model = nn.parallel.DistributedDataParallel(TinyDenoiser())
    if dist.get_rank() != 0:
        return None
    return short_estimates(model)


def short_estimates(model: nn.Module) -> list[dict[str, Tensor]]:
    store = ImageStore(images(4, 1))
    return [
        estimates.forget_gradients(model, SCHEDULE, store, num_batches=2, batch_size=3),
        estimates.fisher(model, SCHEDULE, store, samples=2),
        estimates.swag_variance(model, SCHEDULE, store, steps=2, batch_size=3),
    ]


def objective_of_other_rows(method) -> str:
    """What a step with an objective says of a batch that is larger in the second process."""
    rows = 3 + dist.get_rank()
    forget, retain = (images(rows, seed).float() / 127.5 - 1 for seed in (1, 2))
    reference = TinyDenoiser(seed=1) if "reference" in method.needs else None
    given = {"forget": forget, "retain": retain, "reference_model": reference}
    try:
        method_step(method, TinyDenoiser(), None, SCHEDULE, **given, process_group=dist.group.WORLD)
    except ValueError as error:
        return str(error)
    return "nothing"


def references_that_are_the_model() -> list[str]:
    """What is said of the network inside of DistributedDataParallel as reference, from both sides."""
    network = TinyDenoiser()
    wrapped = nn.parallel.DistributedDataParallel(network)
    refusals = []
    for model, reference in ((wrapped, network), (network, wrapped)):
        pictures = images(2, 1).float() / 127.5 - 1
        given = {"forget": pictures, "retain": pictures, "process_group": dist.group.WORLD}
        optimizer = torch.optim.AdamW(network.parameters(), fused=True)
        stores = {"forget": ImageStore(images(2, 1)), "retain": ImageStore(images(4, 2)), "batch_size": 2}
        try:
            method_step(Pairs(), model, optimizer, SCHEDULE, reference_model=reference, **given)
        except ValueError as error:
            refusals.append(str(error))
        try:
            Unlearner(model, optimizer, SCHEDULE, Pairs(), reference_model=reference, **stores)
        except ValueError as error:
            refusals.append(str(error))
    return refusals


def step_with_references_apart() -> str:
    """What the first step says of references that have other weights in the second process."""
    unlearner = build(Pairs(), False, reference_model=TinyDenoiser(seed=1 + dist.get_rank()))
    try:
        unlearner.step()
    except ValueError as error:
        return str(error)
    return "nothing"


class Constant(nn.Module):
    """A network without parameters, whose answer is a buffer."""

    def __init__(self, answer: float):
        super().__init__()
        self.register_buffer("answer", torch.tensor(answer))

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        return self.answer.expand(x_t.shape)


def step_with_references_without_parameters(apart: float) -> str:
    """What the first step says of references whose buffers are `apart` from process to process."""
    unlearner = build(Pairs(), False, reference_model=Constant(1.0 + apart * dist.get_rank()))
    try:
        unlearner.step()
    except ValueError as error:
        return str(error)
    return "nothing"


def take_steps_on(
    device: str, method, alone: bool, options: dict[str, Any]
) -> tuple[Tensor, list[dict[str, float]]]:
    """`take_steps` on `device`, in float32 throughout; the weights come back on the CPU."""
    with tf32(False):
        found, reports = take_steps(
            method,
            alone,
            {"device": device, "compile": False, "autocast_dtype": None, "replay": False} | options,
        )
    return found.cpu(), reports


def drawn_rows(method, alone: bool, options: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Rows, timesteps and noise of this process at step 2 of a run."""
    unlearner = build(method, alone, **options or {})
    unlearner._count_from(2)
    batch, draws = unlearner._draw(Draws())
    return {
        "forget_rows": batch.forget.index,
        "retain_rows": batch.retain.index,
        "forget_timesteps": draws.forget_timesteps,
        "retain_timesteps": draws.retain_timesteps,
        "forget_noise": draws.forget_noise.numbers(),
        "retain_noise": draws.retain_noise.numbers(),
    }


def step_with_a_nan(rank_of_nan: int | None, fused: bool) -> tuple[Tensor, Tensor, list[bool], int]:
    """Weights before and after a step whose noise is NaN on one process, which of two steps were skipped, and
    how many were counted.
    """
    from fastunlearn.methods import ReTrack

    unlearner = build(ReTrack(k=2), False, fused=fused)
    before = weights(unlearner.model)
    noise = torch.full((unlearner.rows_here, 1, 8, 8), float("nan") if unlearner.rank == rank_of_nan else 0.5)
    skipped = [bool(unlearner.step(Draws(retain_noise=noise)).skipped)]
    after = weights(unlearner.model)
    skipped.append(bool(unlearner.step().skipped))
    return before, after, skipped, int(unlearner.skipped_steps)


def own_loop(
    name: str,
    alone: bool,
    prepared: str,
    micro_batch_size: int | None = None,
    keep_grad: bool = False,
    selection: dict[str, Any] | None = None,
    **hyperparameters: Any,
) -> tuple[Tensor, list[dict[str, float]]]:
    """A caller's loop: each process hands its share of the global batch to a `*_step`, with the rows that it
    drew itself.

    For SISS the rows of the first process are all one-sided toward the forget image, and those of the others
    need both gradients or the retain one. For "faint siss" all rows come from retain images: the forget
    weights of the first process are 0 in float64, those of the others about 1e-20. With `keep_grad` a
    gradient that is the same in all processes stands in `.grad` before each step. `hyperparameters` are
    SISS'.
    """
    rank, count = (0, 1) if alone else (dist.get_rank(), dist.get_world_size())
    model: nn.Module = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    group = None
    if not alone and prepared == "ddp":
        model = nn.parallel.DistributedDataParallel(model)
    elif not alone and prepared == "accelerate":
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        model, optimizer = accelerator.prepare(model, optimizer)
        assert isinstance(model, nn.parallel.DistributedDataParallel)
    else:
        group = world(alone)
    share = slice(rank * BATCH // count, (rank + 1) * BATCH // count)
    reports = []
    for step in range(STEPS):
        forget, retain = (images(BATCH, seed) * (2 / 255) - 1 for seed in (step, 50 + step))
        generator = torch.Generator().manual_seed(100 + step)
        noise = torch.randn(2, BATCH, 1, 8, 8, generator=generator)
        timesteps = torch.randint(1000, (2, BATCH), generator=generator)
        options = {"process_group": group, "micro_batch_size": micro_batch_size, "keep_grad": keep_grad}
        if selection is not None:
            options |= selection | {"step": step}
        if keep_grad:
            penalty = sum((parameter - 1).square().sum() for parameter in model.parameters())
            penalty.backward()
        if name.endswith("siss"):
            faint = name == "faint siss"
            timesteps = torch.tensor(
                [10] * (BATCH // 2) + [150] * (BATCH // 2)
                if faint
                else [100] * (BATCH // 2) + [999, 100] * (BATCH // 4)
            )
            from_forget = torch.tensor([not faint] * (BATCH // 2) + [False] * (BATCH - BATCH // 2))
            draws = Draws(
                noise[0][share],
                noise[0][share],
                timesteps[share],
                timesteps[share],
                from_forget=from_forget[share],
            )
            pair = forget[share], retain[share]
            output = siss_step(model, optimizer, SCHEDULE, *pair, draws=draws, **hyperparameters, **options)
        elif name == "erasediff":
            uniform = torch.rand(forget.shape, generator=generator)[share]
            draws = Draws(
                noise[0][share],
                noise[1][share],
                timesteps[0][share],
                timesteps[1][share],
                uniform_target=uniform,
            )
            output = erasediff_step(
                model, optimizer, SCHEDULE, forget[share], retain[share], draws=draws, **options
            )
        else:
            neighbors = (retain[:, None] + torch.tensor([0.1, -0.1]).view(1, 2, 1, 1, 1))[share]
            draws = Draws(noise[0][share], noise[1][share], timesteps[0][share], timesteps[1][share])
            output = retrack_step(
                model,
                optimizer,
                SCHEDULE,
                forget[share],
                neighbors,
                retain[share],
                lambd=0.3,
                draws=draws,
                **options,
            )
        reports.append(numbers(output))
    return weights(model), reports


def scaled_loop(
    name: str, alone: bool, micro_batch_size: int | None, hyperparameters: dict[str, Any]
) -> tuple[Tensor, list[dict[str, float]]]:
    """`own_loop` of SISS."""
    return own_loop(name, alone, "group", micro_batch_size, **hyperparameters)


def begin_apart(what: str) -> None:
    """A first step of processes of which the second one has something else."""
    unlearner = build(SISS(), False)
    if dist.get_rank() == 1:
        if what == "weights":
            with torch.no_grad():
                swapped = unlearner.parameters[0].flatten()[:2].flip(0)  # the same numbers in other places
                unlearner.parameters[0].view(-1)[:2] = swapped
        elif what == "step":
            unlearner._count_from(1)
    unlearner.step()


def begin_with_other_seeds() -> None:
    build(SISS(), False, seed=dist.get_rank()).step()


def begin_with_other_selections(*selections: dict) -> None:
    """Each process has its own."""
    build(SISS(), False, **selections[dist.get_rank()]).step()


def step_with_other_rows(roles: tuple[str, ...]) -> None:
    """A step of which the second process has a row more."""
    model = Denoiser()
    optimizer = torch.optim.AdamW(model.parameters())
    rows = {role: 3 + (dist.get_rank() if role in roles else 0) for role in ("forget", "retain")}
    forget, retain = (images(rows[role], 1) * (2 / 255) - 1 for role in ("forget", "retain"))
    erasediff_step(model, optimizer, SCHEDULE, forget, retain, process_group=dist.group.WORLD)
