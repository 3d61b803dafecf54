"""The step: draw, compose, predict, residual, combine, update. Read it top to bottom.

`take_step` is the one loop behind every method; `retrack_step`, `siss_step`, ... are its doors for a training
loop that already has its batches. Nothing here asks which method it runs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
import torch.distributed as dist
from torch import Tensor

from ..host import check
from ..host.precision import AUTOCAST_DTYPES
from ..host.profiling import stage
from ..host.tensor_lists import total_norm
from ..methods import SISS, Batch, EraseDiff, Method, NegGrad, Pass, ReTrack, Vanilla
from ..objective import draws as draw
from ..objective.draws import Draws
from ..objective.schedule import NoiseSchedule
from .accumulate import Accumulator
from .compilation import Compile, resolve_compile
from .conditioning import check_distances, conditioning_of, keyword_arguments, warn_of_bytes, without_graph
from .losses import Losses
from .predict import evaluate
from .trained import Trained, add_kept, check_reached, look_at, say_unscaled, set_aside
from .update import clipping, update
from .wrappers import tell_skipped

if TYPE_CHECKING:
    from typing_extensions import Unpack


class StepOutput(NamedTuple):
    """What a step reports: detached 0-d tensors on the device.

    Reading one waits for the device, so the caller chooses when.
    """

    loss: Tensor  # what the step descends: with two gradients `retain_loss - scaling_factor * forget_loss`
    # mean over the forget rows, with importance weights and spread, without lambd; None if the method has no
    # such term
    forget_loss: Tensor | None
    retain_loss: Tensor | None  # the same over the retain rows
    grad_norm: Tensor  # L2 norm of the combined gradient, before clipping
    correction_norm: Tensor | None  # L2 norm of the forget gradient, for methods that keep it apart
    scaling_factor: Tensor | None  # f in `g_retain - f g_forget`
    skipped: Tensor  # bool: loss or norm was not finite, and the update was not made


def take_step(
    method: Method,
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    *,
    grad_scaler: torch.amp.GradScaler | None = None,
    process_group: dist.ProcessGroup | None = None,
    keep_grad: bool = False,
    **options: Any,
) -> StepOutput:
    """One unlearning step on a complete `batch` and complete `draws`.

    The arguments are those of `retrack_step`.
    """
    trained = look_at(model, optimizer, grad_scaler, process_group, keep_grad=keep_grad)
    return take_step_on(trained, method, schedule, batch, draws, **options)


def take_step_on(
    trained: Trained, method: Method, schedule: NoiseSchedule, batch: Batch, draws: Draws, **options: Any
) -> StepOutput:
    """`take_step` with arguments that have been looked at. If it raises, `.grad` is as before."""
    with set_aside(trained.parameters) as kept:
        output = _six_stages(trained, kept, method, schedule, batch, draws, **options)
    tell_skipped(trained.wrappers, output.skipped)
    return output


def _six_stages(
    trained: Trained,
    kept: list[Tensor | None],
    method: Method,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    *,
    max_grad_norm: float | None = 1.0,
    autocast_dtype: torch.dtype | None = None,
    micro_batch_size: int | None = None,
    compile: Compile | None = None,
) -> StepOutput:
    model, parameters, optimizer, grad_scaler, process_group, _ = trained
    if autocast_dtype == torch.float16 and grad_scaler is None and optimizer is not None:
        say_unscaled()
    device = parameters[0].device
    compile = resolve_compile(compile, model, device)

    with stage("compose"):
        passes = method.compose(batch, draws, schedule)
        losses = Losses(passes, process_group)
        apart = method.combine is not None
        # Which rows a term needs is data: on an accelerator, reading it would be a wait, and under
        # torch.compile every number of rows a compilation.
        passes, in_place = _arrange(
            passes,
            micro_batch_size,
            apart=apart,
            by_role=device.type == "cpu" and not compile,
            alone=process_group is None,
        )
        loss_scale = 1.0 if grad_scaler is None else grad_scaler.scale(torch.ones((), device=device))
        factors = {
            "retain": loss_scale,
            "forget": loss_scale if losses.unit_ratio is None else loss_scale * losses.unit_ratio,
        }
        gradients = Accumulator(
            parameters,
            method.combine,
            in_place=in_place,
            unit=losses.unit,
            loss_scale=loss_scale,
            group=process_group,
        )

    for part in passes:  # predict, residual; graphs that share no rows never live together
        evaluation = evaluate(
            model,
            part,
            schedule,
            apart=apart,
            factors=factors,
            autocast_dtype=autocast_dtype,
            compile=compile,
        )
        losses.add(part, evaluation.losses)
        with stage("combine"):
            roles = sorted(evaluation.gradients)  # forget before retain
            for role in roles:
                gradients.backward(
                    role, evaluation.prediction, evaluation.gradients[role], retain_graph=role != roles[-1]
                )
        del evaluation

    with stage("combine"):
        combined = gradients.finish()
    check_reached(model, parameters)
    add_kept(parameters, kept)  # not earlier: the norms and products that combine are the step's own

    with stage("update"):
        loss, means = losses.result(combined)
        if optimizer is not None and grad_scaler is not None:
            grad_scaler.unscale_(optimizer)
        present = [parameter.grad for parameter in parameters if parameter.grad is not None]
        norm = total_norm(present, device)
        if optimizer is None:
            # the gradients that it leaves are scaled, for the caller's scaler to unscale
            norm = norm / loss_scale
        finite = torch.isfinite(loss) & torch.isfinite(norm)
        if optimizer is not None:
            update(optimizer, clipping(norm, max_grad_norm), finite, present, grad_scaler)
            for parameter in parameters:
                parameter.grad = None
    return StepOutput(
        loss,
        means.get("forget"),
        means.get("retain"),
        norm,
        combined.correction_norm,
        combined.scaling_factor,
        ~finite,
    )


def _arrange(
    whole: list[Pass], micro_batch_size: int | None, *, apart: bool, by_role: bool, alone: bool
) -> tuple[list[Pass], bool]:
    """The network calls of a step in order, and whether the forget gradient is complete before the retain
    gradient begins.

    Where the two are kept `apart`, passes of the forget gradient alone come first and those of the retain
    gradient alone last.
    """

    def split(passes: list[Pass]) -> list[Pass]:
        return [part for composed in passes for part in composed.split(micro_batch_size)]

    passes = split([part for composed in whole for part in composed.by_role()] if by_role else whole)
    if apart:
        passes.sort(key=lambda part: ("retain" in part.roles) - ("forget" in part.roles))
    # Several processes reduce their gradients in the same order: what decides it must not depend on the rows
    # that one of them has.
    decisive = passes if alone else split(whole)
    return passes, sum(len(part.roles) > 1 for part in decisive) <= 1


class StepOptions(TypedDict, total=False):
    """Keyword arguments of every `*_step`, described in `retrack_step`."""

    draws: Draws | None
    generator: torch.Generator | None
    forget_kwargs: dict[str, Any] | None
    retain_kwargs: dict[str, Any] | None
    max_grad_norm: float | None
    autocast_dtype: torch.dtype | None
    grad_scaler: torch.amp.GradScaler | None
    keep_grad: bool
    micro_batch_size: int | None
    compile: Compile | None
    process_group: dist.ProcessGroup | None
    time_window: None
    lowpass: None


def check_options(
    model,
    schedule,
    max_grad_norm,
    micro_batch_size,
    autocast_dtype,
    grad_scaler,
    *,
    compile,
    process_group,
    time_window,
    lowpass,
) -> tuple[float | None, int | None]:
    """The checks that a `*_step` and an `Unlearner` share; none of them reads the device.

    Returns:
        `max_grad_norm` and `micro_batch_size` as Python numbers.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    if not isinstance(schedule, NoiseSchedule):
        raise TypeError(
            f"schedule: expected a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler) makes one), got {check.describe(schedule)}"
        )
    if not callable(model):
        raise TypeError(f"model: expected a callable (x_t, t, **kwargs), got {check.describe(model)}")
    if max_grad_norm is not None:
        max_grad_norm = check.number("max_grad_norm", max_grad_norm, low=0, low_open=True)
    if micro_batch_size is not None:
        micro_batch_size = check.integer("micro_batch_size", micro_batch_size, low=1)
    if autocast_dtype is not None and autocast_dtype not in AUTOCAST_DTYPES:
        raise ValueError(
            f"autocast_dtype: expected torch.bfloat16, torch.float16 or None, got {autocast_dtype!r}"
        )
    if grad_scaler is not None and not isinstance(grad_scaler, torch.amp.GradScaler):
        raise TypeError(
            f"grad_scaler: expected a torch.amp.GradScaler or None, got {check.describe(grad_scaler)}"
        )
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            f"process_group: expected a torch.distributed.ProcessGroup or None, got {check.describe(process_group)}"
        )
    if compile not in (None, True, False, "try", "regional"):
        raise ValueError(f"compile: expected None, True, False, 'try' or 'regional', got {compile!r}")
    check.not_in_this_version(time_window=time_window, lowpass=lowpass)
    return max_grad_norm, micro_batch_size


def _functional_step(
    method: Method,
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor | None,
    retain: Tensor | None,
    neighbors: Tensor | None = None,
    sqdist: Tensor | None = None,
    *,
    draws: Draws | None = None,
    generator: torch.Generator | None = None,
    forget_kwargs: dict[str, Any] | None = None,
    retain_kwargs: dict[str, Any] | None = None,
    max_grad_norm: float | None = 1.0,
    autocast_dtype: torch.dtype | None = None,
    grad_scaler: torch.amp.GradScaler | None = None,
    keep_grad: bool = False,
    micro_batch_size: int | None = None,
    compile: Compile | None = None,
    process_group: dist.ProcessGroup | None = None,
    time_window: None = None,
    lowpass: None = None,
) -> StepOutput:
    """Validates what a caller's own loop hands over, draws what it left open, and takes the step."""
    max_grad_norm, micro_batch_size = check_options(
        model, schedule, max_grad_norm, micro_batch_size, autocast_dtype, grad_scaler,
        compile=compile, process_group=process_group, time_window=time_window, lowpass=lowpass,
    )  # fmt: skip
    trained = look_at(model, optimizer, grad_scaler, process_group, keep_grad=keep_grad)
    without_graph("neighbors", neighbors)
    without_graph("sqdist", sqdist)
    conditioning = {"forget": {}, "retain": {}}
    for name, images, kwargs in (("forget", forget, forget_kwargs), ("retain", retain, retain_kwargs)):
        given = keyword_arguments(f"{name}_kwargs", kwargs)
        if name in method.batches:
            check.images(name, images)
            without_graph(name, images)
            warn_of_bytes(name, images)
            conditioning[name] = conditioning_of(f"{name}_kwargs", given, len(images), trained.parameters)
            if check.values_enabled():
                check.finite(name, images)
        elif given:
            raise ValueError(
                f"{name}_kwargs: expected none ({type(method).__name__} reads no {name} images), got {', '.join(given)}"
            )
    if forget is not None and retain is not None and "retain" in method.batches:
        if forget.shape[1:] != retain.shape[1:]:
            raise ValueError(
                f"forget: expected images of the shape of retain, {tuple(retain.shape[1:])}, got {tuple(forget.shape[1:])}"
            )
        check.same_device("forget", forget, "retain", retain)
        if forget.dtype != retain.dtype:
            raise TypeError(f"forget: expected the dtype of retain, {retain.dtype}, got {forget.dtype}")
    if neighbors is not None:
        check_distances(forget, neighbors, sqdist)
    draws = Draws() if draws is None else draws
    if not isinstance(draws, Draws):
        raise TypeError(f"draws: expected Draws or None, got {check.describe(draws)}")
    draw.validate(draws, method.draws, forget, retain, schedule)
    for field in sorted(draws.given()):
        without_graph(f"draws.{field}", getattr(draws, field))
    if any(field.endswith("timesteps") for field in method.draws - draws.given()):
        schedule.check_usable()

    with stage("draw"):
        source = draw.GeneratorSource((retain if forget is None else forget).device, generator)
        draws = draw.complete(draws, method, source, forget, retain, len(schedule))
    batch = Batch(forget, retain, neighbors, sqdist, conditioning["forget"], conditioning["retain"])
    return take_step_on(
        trained, method, schedule, batch, draws,
        max_grad_norm=max_grad_norm, autocast_dtype=autocast_dtype, micro_batch_size=micro_batch_size,
        compile=compile,
    )  # fmt: skip


def retrack_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor,  # [B, C, H, W]
    neighbors: Tensor,  # [B, K, C, H, W]
    retain: Tensor | None = None,  # [B', C, H, W]
    *,
    lambd: float = 0.005,
    sqdist: Tensor | None = None,  # [B, K]
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One ReTrack step (arXiv 2509.13007, section 3.4) on batches that the caller's loop already has.

    Args:
        model: a diffusers model, or any callable `(x_t, t, **kwargs)` that returns a tensor, a tuple that
            begins with one, or an object with `.sample`.
        optimizer: makes one update, and its gradients are cleared; None leaves the combined gradient,
            unclipped, in `.grad`. accelerate's prepared optimizer is taken for the one in it, with its
            scaler, and learns whether the step was skipped, so that a prepared scheduler stands still.
            Between the updates of `accelerator.accumulate()` it is refused: one call takes all rows of an
            update, and `micro_batch_size` splits them. What updates parameters elsewhere (DeepSpeed,
            Megatron-LM, FSDP, hooks after accumulation) is refused. Hooks of tensors see the gradient of each
            backward pass alone, of which a step takes several; those of a fused optimizer's step() see
            gradients before they are clipped.
        schedule: the forward process and prediction type; `NoiseSchedule.from_diffusers(scheduler)`.
        forget: `[B, C, H, W]` floating point, images to forget, in the range the network was trained on.
        neighbors: `[B, K, C, H, W]`, their k nearest neighbours among the images to keep
            (`nearest_neighbors`).
        retain: `[B', C, H, W]`, images to keep; None only if `lambd` is 1.
        lambd: weight of the forget term.
        sqdist: `[B, K]`, squared distances to the neighbours, between the images as they are given (of uint8
            rows: what `nearest_neighbors` returns, times `(2 / 255)^2`); computed if None.
        draws: a `Draws` with given noise or timesteps; what it lacks is drawn. A timestep outside the
            schedule is refused on a CPU; on a GPU it is not looked at (but with `FASTUNLEARN_CHECK=1`), and
            the step is skipped.
        generator: where the rest is drawn from (None: torch's global generator).
        max_grad_norm: gradients are clipped to this L2 norm; None: not at all.
        autocast_dtype: bfloat16 or float16 for the network call; None: as it is.
        grad_scaler: a `torch.amp.GradScaler` for float16; norms and factors are those of the unscaled
            gradients. Its own step waits for the device unless the optimizer is fused. With `optimizer=None`
            the gradients in `.grad` stay scaled.
        keep_grad: False: a gradient that stands in `.grad` before the step (one of zeros, too) is an error.
            True: it is added to the combined gradient, before norm and clipping; no rescaling or projection
            sees it. With a grad_scaler it is expected multiplied by the scale, as
            `scaler.scale(loss).backward()` leaves it; of several processes it is expected to be their mean
            already.
        forget_kwargs, retain_kwargs: what the network is given beside x_t and t: tensors with the batch first
            (or one row for the whole batch), without a graph; numbers, strings, booleans and None, equal in
            both where forget and retain rows share a call of the network; dicts of all these. SISS works
            on pairs: each tensor of one shape in both.
        micro_batch_size: at most this many rows in one network call; gradients accumulate over the calls.
        compile: True compiles forward pass and loss as one graph (minutes, once for each set of shapes),
            `"regional"` only the blocks that a diffusers network repeats; `"try"` goes on eagerly where
            compiling fails. None: on for GPUs, off for CPUs, where it was measured to gain little.
        process_group: processes that take this step together, each on its own batch of the same size:
            gradients, losses and norms are their mean, so all of them make the same update. None: those of a
            model wrapped in DistributedDataParallel.
        time_window, lowpass: not in this version; None.

    Returns:
        StepOutput, detached 0-d tensors.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what was expected and what was given.
    """
    return _functional_step(
        ReTrack(k=_count_neighbors(neighbors), lambd=lambd),
        model,
        optimizer,
        schedule,
        forget,
        retain,
        neighbors,
        sqdist,
        **options,
    )


def siss_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor,  # [B, C, H, W]
    retain: Tensor,  # [B, C, H, W]
    *,
    lambd: float = 0.5,
    scaling_norm: float = 5.0,
    variant: str = "mixture",
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One SISS step (arXiv 2503.01034): `forget` and `retain` `[B, C, H, W]` are pairs.

    Options as in `retrack_step`, hyperparameters as in `SISS`.
    """
    return _functional_step(
        SISS(lambd, scaling_norm, variant), model, optimizer, schedule, forget, retain, **options
    )


def erasediff_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor,  # [B, C, H, W]
    retain: Tensor,  # [B', C, H, W]
    *,
    eta: float = 1e-3,
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One EraseDiff step, as compared by SISS and ReTrack.

    Options as in `retrack_step`, hyperparameters as in `EraseDiff`.
    """
    return _functional_step(EraseDiff(eta), model, optimizer, schedule, forget, retain, **options)


def neggrad_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor,  # [B, C, H, W]
    *,
    superfactor: float = 1.0,
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One step of gradient ascent on `forget`.

    Options as in `retrack_step`, hyperparameters as in `NegGrad`.
    """
    return _functional_step(NegGrad(superfactor), model, optimizer, schedule, forget, None, **options)


def vanilla_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    retain: Tensor,  # [B, C, H, W]
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One denoising step on `retain` alone (naive deletion). Options as in `retrack_step`."""
    return _functional_step(Vanilla(), model, optimizer, schedule, None, retain, **options)


def _count_neighbors(neighbors) -> int:
    check.tensor("neighbors", neighbors, ndim=5)
    if neighbors.shape[1] == 0:
        raise ValueError(f"neighbors: expected [B, K, C, H, W] with K >= 1, got {tuple(neighbors.shape)}")
    return neighbors.shape[1]
