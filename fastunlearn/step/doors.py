"""The doors to a step for a training loop that already has its batches: `retrack_step`, `siss_step`, ..."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from ..host import check
from ..host.profiling import stage
from ..methods import SISS, EraseDiff, NegGrad, ReTrack, Vanilla
from ..objective import draws as draw
from ..objective.draws import Draws
from ..objective.frequency import LowPass
from ..objective.parameters import ParameterRule
from ..objective.protocol import Batch, Method
from ..objective.schedule import NoiseSchedule
from ..objective.selection import Selection, check_band, check_drawable
from ..objective.time import Density
from .compilation import Compile
from .conditioning import (
    check_distances,
    conditioning_of,
    keyword_arguments,
    warn_of_bytes,
    without_graph,
)
from .options import (
    Settings,
    StepOptions,
    check_moment,
    check_needs,
    check_reference,
    check_rules,
    check_sizes,
    checked,
)
from .take import StepOutput, take_step
from .trained import look_at, unwrapped

if TYPE_CHECKING:
    from typing_extensions import Unpack


def method_step(
    method: Method,
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    *,
    forget: Tensor | None = None,  # [B, C, H, W]
    retain: Tensor | None = None,  # [B', C, H, W]
    neighbors: Tensor | None = None,  # [B, K, C, H, W]
    sqdist: Tensor | None = None,  # [B, K]
    sizes: Mapping[str, int] | None = None,
    reference_model: Callable | None = None,
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
    rules: Sequence[ParameterRule] = (),
    time_window: Density | None = None,
    retain_density: Density | None = None,
    lowpass: LowPass | None = None,
    loss_weight: str | None = None,
    snr_gamma: float | None = None,
    step: int | Tensor | None = None,
    total_steps: int | None = None,
) -> StepOutput:
    """One step of any method on batches that the caller's loop already has.

    The door behind `retrack_step` and the others, which describe its arguments.

    Args:
        method: `ReTrack(...)`, or one of the caller's own.
        forget, retain, neighbors, sqdist: those that the method needs.
        sizes: how many images the whole sets have, `{"forget": 1, "retain": 29_999}`, for a method that asks
            (SISS with a superfactor); else None.
        reference_model: the network that the method compares with, called as `model` is, without a graph:
            `frozen_copy(model)`, the network as it was, or `without_adapters(model)`.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what was expected and what was given.
    """
    selection = Selection(time_window, retain_density, lowpass, loss_weight, snr_gamma)
    given = Settings(max_grad_norm, autocast_dtype, micro_batch_size, compile, rules, selection)
    settings = checked(model, schedule, given, process_group=process_group)
    check_needs(method)
    trained = look_at(model, optimizer, grad_scaler, process_group, keep_grad=keep_grad)
    check_rules(settings.rules, trained.optimizer, trained.parameters)
    if reference_model is not None or "reference" in method.needs:
        check_reference(method, trained.model, reference_model, settings.autocast_dtype)
        trained = trained._replace(reference=unwrapped(reference_model))
    _check_at_hand(method, neighbors)
    sizes = check_sizes(method, sizes)
    without_graph("neighbors", neighbors)
    without_graph("sqdist", sqdist)
    parameters = trained.parameters
    forget_conditioning = _check_images(method, "forget", forget, forget_kwargs, parameters)
    retain_conditioning = _check_images(method, "retain", retain, retain_kwargs, parameters)
    if forget is not None and retain is not None and "retain" in method.needs:
        _check_same_kind(forget, retain)
    if neighbors is not None:
        check_distances(forget, neighbors, sqdist)
    draws = Draws() if draws is None else draws
    selection.check_fits(method, schedule)
    wanted = selection.draws_of(method, schedule)
    _check_draws(draws, wanted, forget, retain, schedule)
    device = retain.device if forget is None else forget.device
    moment = check_moment(step, total_steps, device)
    if lowpass is not None:
        check_band(lowpass, *forget.shape[-2:], *moment)

    with stage("draw"):
        source = draw.GeneratorSource(device, generator)
        draws = draw.complete(draws, wanted, source, forget, retain, len(schedule))
    conditioning = forget_conditioning, retain_conditioning
    batch = Batch(forget, retain, neighbors, sqdist, *conditioning, sizes=sizes)
    return take_step(trained, method, schedule, batch, draws, settings, moment)


def retrack_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor,  # [B, C, H, W]
    neighbors: Tensor,  # [B, K, C, H, W]
    retain: Tensor | None = None,  # [B', C, H, W]
    *,
    lambd: float | Literal["auto"] = 0.005,
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
            (`nearest_neighbors`); with all of these the weights are those of `weights="self_normalized"`.
        retain: `[B', C, H, W]`, images to keep; None only if `lambd` is 1.
        lambd: weight of the forget term; "auto": what gives the gradients of both terms one norm (`ReTrack`).
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
        rules: what else is done to gradients and weights (`objective.parameters.ParameterRule`).
        time_window: the density that the forget branch's timesteps are drawn from (`TimeWindow(250, 750)`,
            docs/selection.md); None: that of the schedule, uniform, or logit-normal for flow matching. Given
            timesteps are taken to be drawn from it, too.
        retain_density: the same of the retain branch.
        lowpass: the spatial frequencies of the forget residual that count. ReTrack's spread, whose part in a
            band would take another pass over all neighbours, is then left out of the reported loss.
        loss_weight, snr_gamma: what every row's loss is multiplied by at its timestep
            (`NoiseSchedule.loss_weight`), such as `"min_snr"` with its gamma; None: 1, and 5.
        step, total_steps: where in the run this step is, for a `lowpass` with a schedule, which is refused
            without them; the step is a number, or a 0-d tensor on the device, which nobody reads.

    Returns:
        StepOutput, detached 0-d tensors.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what was expected and what was given.
    """
    method = ReTrack(k=_count_neighbors(neighbors), lambd=lambd)
    images = {"forget": forget, "retain": retain, "neighbors": neighbors, "sqdist": sqdist}
    return method_step(method, model, optimizer, schedule, **images, **options)


def siss_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    forget: Tensor,  # [B, C, H, W]
    retain: Tensor,  # [B, C, H, W]
    *,
    lambd: float = 0.5,
    scaling_norm: float | None = None,
    variant: str = "mixture",
    scaling: str = "norm",
    superfactor: float | None = None,
    sizes: Mapping[str, int] | None = None,
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One SISS step (arXiv 2503.01034): `forget` and `retain` `[B, C, H, W]` are pairs.

    Options as in `retrack_step`, hyperparameters as in `SISS`. With a `superfactor`, `sizes` tells how many
    images the whole sets have: `{"forget": 1, "retain": 29_999}`.
    """
    method = SISS(lambd, scaling_norm, variant, scaling, superfactor)
    images = {"forget": forget, "retain": retain, "sizes": sizes}
    return method_step(method, model, optimizer, schedule, **images, **options)


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
    method = EraseDiff(eta)
    return method_step(method, model, optimizer, schedule, forget=forget, retain=retain, **options)


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
    return method_step(NegGrad(superfactor), model, optimizer, schedule, forget=forget, **options)


def vanilla_step(
    model: Callable,
    optimizer: torch.optim.Optimizer | None,
    schedule: NoiseSchedule,
    retain: Tensor,  # [B, C, H, W]
    **options: Unpack[StepOptions],
) -> StepOutput:
    """One denoising step on `retain` alone (naive deletion). Options as in `retrack_step`."""
    return method_step(Vanilla(), model, optimizer, schedule, retain=retain, **options)


def _check_at_hand(method: Method, neighbors: Tensor | None) -> None:
    """
    Raises:
        TypeError: there are no neighbours where the method reads them.
        ValueError: the method reads what an `Unlearner` alone has.
    """
    if "neighbors" in method.needs:
        check.tensor("neighbors", neighbors, ndim=5)
    if "stores" in method.needs:
        expected = "expected one that works on batches alone"
        which = f"{type(method).__name__}, which reads the whole sets (stores): an Unlearner has them"
        raise ValueError(f"method: {expected}, got {which}")


def _check_images(
    method: Method, name: str, images: Tensor | None, kwargs: dict[str, Any] | None, trained: Sequence[Tensor]
) -> dict[str, Any]:
    """The conditioning of a batch, `name`, with a row for each image; `{}` where the method reads no images.

    Args:
        trained: parameters that a tensor of `kwargs` may be.

    Raises:
        TypeError, ValueError: the method reads the batch, and it is none; or it does not, and is conditioned.
    """
    given = keyword_arguments(f"{name}_kwargs", kwargs)
    if name not in method.needs:
        if given:
            raise ValueError(
                f"{name}_kwargs: expected none ({type(method).__name__} reads no {name} images), "
                f"got {', '.join(given)}"
            )
        return {}
    check.images(name, images)
    without_graph(name, images)
    warn_of_bytes(name, images)
    conditioning = conditioning_of(f"{name}_kwargs", given, len(images), trained)
    if check.values_enabled():
        check.finite(name, images)
    return conditioning


def _check_same_kind(forget: Tensor, retain: Tensor) -> None:
    """
    Raises:
        TypeError, ValueError: rows of the two batches could not share a call of the network.
    """
    if forget.shape[1:] != retain.shape[1:]:
        raise ValueError(
            f"forget: expected images of the shape of retain, {tuple(retain.shape[1:])}, "
            f"got {tuple(forget.shape[1:])}"
        )
    check.same_device("forget", forget, "retain", retain)
    if forget.dtype != retain.dtype:
        raise TypeError(f"forget: expected the dtype of retain, {retain.dtype}, got {forget.dtype}")


def _check_draws(
    draws: Draws,
    wanted: dict[str, draw.Draw],
    forget: Tensor | None,
    retain: Tensor | None,
    schedule: NoiseSchedule,
) -> None:
    """
    Raises:
        TypeError, ValueError: the caller's draws do not fit, or the schedule has timesteps that the step must
            not draw.
    """
    if not isinstance(draws, Draws):
        raise TypeError(f"draws: expected Draws or None, got {check.describe(draws)}")
    draw.validate(draws, wanted, forget, retain, schedule)
    given = draws.given()
    for field in sorted(given):
        without_graph(f"draws.{field}", getattr(draws, field))
    for field, how in wanted.items():
        if field not in given and isinstance(how, draw.Time):
            check_drawable(how.density, schedule)


def _count_neighbors(neighbors) -> int:
    check.tensor("neighbors", neighbors, ndim=5)
    if neighbors.shape[1] == 0:
        raise ValueError(f"neighbors: expected [B, K, C, H, W] with K >= 1, got {tuple(neighbors.shape)}")
    return neighbors.shape[1]
