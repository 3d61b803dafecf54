"""Pure functions on tensors: validate, then call the op.

Samples are rows; losses are per sample, summed over elements.

Where images are asked for, `store.Rows` (rows of a store by index, uint8 or floating) may stand in for a
tensor, and `philox.Noise` for noise: the op then gathers, dequantises and draws as it reads, and the images
and the noise are never stored.

Timesteps outside the schedule, or where the loss is not defined, are refused on a CPU. On a GPU they are not
looked at, unless `FASTUNLEARN_CHECK=1` asks for it: what is made of them is NaN.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .host import check
from .host.philox import Noise, check_noise
from .host.store import Rows
from .objective.frequency import BandMask, LowPass, check_mask
from .objective.schedule import NoiseSchedule
from .ops._library import at_least_float32, backend, laid_out, served
from .ops.lowpass_residual import lowpass_residual as _lowpass_residual
from .ops.mixture import mixture as _mixture
from .ops.noising import noising as _noising
from .ops.redirect import redirect as _redirect
from .ops.redirect_to_all import redirect_to_all as _redirect_to_all
from .ops.residual import residual as _residual
from .reference.lowpass_residual import lowpass_residual as _literal_lowpass
from .reference.mixture import Mixture
from .reference.mixture import mixture as _literal_mixture
from .reference.noising import noising as _literal_noising
from .reference.noising import prediction_target as _literal_target
from .reference.redirect import Redirect
from .reference.redirect import redirect as _literal_redirect
from .reference.redirect_to_all import RedirectToAll
from .reference.redirect_to_all import redirect_to_all as _literal_redirect_to_all
from .reference.residual import denoising_loss as _literal_loss


class Noised(NamedTuple):
    x_t: Tensor  # [B, C, H, W]
    target: Tensor  # [B, C, H, W], in the model's prediction space


def noised(
    images: Tensor | Rows, noise: Tensor | Noise, timesteps: Tensor, schedule: NoiseSchedule
) -> Noised:
    """`x_t = alpha_t x_0 + sigma_t eps`, and the vanilla denoising target: what the network should predict.

    Args:
        images: `[B, C, H, W]` floating point, or rows of a store.
        noise: `[B, C, H, W]`, or a `Noise` to make it from.
        timesteps: `[B]` int64, indices into `schedule`.

    Raises:
        TypeError, ValueError: for arguments of another rank, shape, dtype or device.
    """
    coefficients = _prepare("images", images, noise, timesteps, schedule)
    if backend() == "reference":
        images, noise = _gathered(images), _numbers(noise, images.dtype)
        x_t = _literal_noising(images, noise, timesteps, schedule)
        return Noised(x_t, _literal_target(images, noise, timesteps, schedule))

    # A network that predicts epsilon has the noise itself for its target, which need not be written again.
    known = schedule.prediction_type == "epsilon" and isinstance(noise, Tensor)
    x_t, target = _noising(
        *_source(images),
        coefficients,
        *_noise_arguments(noise),
        not known,
        images.dtype,
        _channels_last(images),
    )
    return Noised(x_t, noise if known else target)


def redirect(
    forget: Tensor | Rows,
    neighbors: Tensor | Rows,
    noise: Tensor | Noise | None,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    *,
    x_t: Tensor | None = None,
    sqdist: Tensor | None = None,
) -> Redirect:
    """ReTrack's single target: the weighted mean of the directions toward the k nearest neighbours.

    ReTrack section 3.3, by the one-target identity: `loss = ||prediction - target||^2 + spread` equals the
    paper's `sum_j p_j ||prediction - v_j||^2`, with `p = softmax_j(-||x_t - alpha x_j||^2 / (2 sigma^2))`;
    `p` carries no gradient.

    Args:
        forget: `[B, C, H, W]`, the images to forget, or rows of a store.
        neighbors: `[B, K, C, H, W]`, their nearest neighbours among the images to keep, or rows of a store
            (index `[B, K]`).
        noise: `[B, C, H, W]`, or a `Noise` to make it from; not used (and may be None) where `x_t` is given,
            which implies it.
        timesteps: `[B]` int64, indices into `schedule`.
        x_t: `[B, C, H, W]`, noised forget images made elsewhere; the noise is then `(x_t - alpha a) / sigma`.
        sqdist: `[B, K]`, `||a - x_j||^2` of the float images (uint8 rows: the integer distance times
            `(2/255)^2`); accumulated in float64 if None.

    Raises:
        TypeError, ValueError: for arguments of another rank, shape, dtype or device.
    """
    _check_images("forget", forget)

    # Neighbours: K rows of the same kind for each image.
    if isinstance(neighbors, Rows):
        check.tensor("neighbors.index", neighbors.index, ndim=2, floating=False)
        check.rows_within("neighbors.index", neighbors.index, len(neighbors.images))
    else:
        check.tensor("neighbors", neighbors, ndim=5)
    batch, k, *image_shape = neighbors.shape
    if k == 0 or (batch, *image_shape) != tuple(forget.shape):
        wanted = f"[B, K, C, H, W] = {_with_k(forget)} with K >= 1"
        raise ValueError(f"neighbors: expected {wanted}, got {tuple(neighbors.shape)}")
    check.same_device("neighbors", neighbors, "forget", forget)
    if neighbors.dtype != forget.dtype:
        raise TypeError(f"neighbors: expected the dtype of forget, {forget.dtype}, got {neighbors.dtype}")

    # Distances that were computed once, with the neighbours.
    if sqdist is not None:
        check.tensor("sqdist", sqdist, ndim=2)
        if sqdist.shape != neighbors.shape[:2]:
            wanted = f"one distance a neighbour, {tuple(neighbors.shape[:2])}"
            raise ValueError(f"sqdist: expected {wanted}, got {tuple(sqdist.shape)}")
        check.same_device("sqdist", sqdist, "forget", forget)
    _check_data(forget=forget, neighbors=neighbors, noise=noise, x_t=x_t)

    # The op makes x_t itself. One that was made elsewhere stands for the noise that leads to it, and is
    # returned as it came.
    noise = _noise_of("forget", forget, noise, x_t, timesteps, schedule)
    coefficients = _prepare("forget", forget, noise, timesteps, schedule)
    if backend() == "reference":
        forget, neighbors = _gathered(forget), _gathered(neighbors)
        noise = _numbers(noise, forget.dtype)
        return _literal_redirect(forget, neighbors, noise, timesteps, schedule, x_t=x_t)
    rest = coefficients, sqdist, *_noise_arguments(noise), forget.dtype, _channels_last(forget)
    made, target, spread, weights = _redirect(*_source(forget), *_source(neighbors), *rest)
    return Redirect(made if x_t is None else x_t, target, spread, weights)


def redirect_to_all(
    forget: Tensor | Rows,
    retain_set: Tensor,
    noise: Tensor | Noise,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    *,
    forget_set: Tensor | None = None,
) -> RedirectToAll:
    """ReTrack's single target before it is truncated: the weighted mean over all images to keep.

    As `redirect` with all of them as neighbours, in any number: they are streamed, in float64. With a forget
    set there is the rest of the exact importance weight of ReTrack's section 3.2, too: `weight` is
    `p_retain(x_t) / p_forget(x_t)`, the densities of the two noised sets, 1 on average over x_t.

    A step reads both sets as a whole and takes `4 B M D` operations in float64 for M images of D elements.

    Args:
        forget: `[B, C, H, W]`, the images to forget, or rows of a store.
        retain_set: `[M, C, H, W]` as stored (`ImageStore.images`): uint8, or floating as network input.
        noise: `[B, C, H, W]`, or a `Noise` to make it from.
        timesteps: `[B]` int64, indices into `schedule`.
        forget_set: `[N, C, H, W]` as stored; `forget` are some of its images.

    Raises:
        TypeError, ValueError: for arguments of another rank, shape, dtype or device.
    """
    _check_images("forget", forget)
    for name, images in (("retain_set", retain_set), ("forget_set", forget_set)):
        if images is not None or name == "retain_set":
            _check_set(name, images, forget)
    _check_data(forget=forget, noise=noise, retain_set=retain_set, forget_set=forget_set)
    coefficients = _prepare("forget", forget, noise, timesteps, schedule)
    noise = _numbers(noise, forget.dtype)
    if backend() == "reference":
        images, dtype = _gathered(forget), forget.dtype
        retain_set = served(retain_set, dtype)
        if forget_set is not None:
            forget_set = served(forget_set, dtype)
        return _literal_redirect_to_all(images, retain_set, noise, timesteps, schedule, forget_set=forget_set)

    x_t, _ = noised(forget, noise, timesteps, schedule)
    target, spread, weight = _redirect_to_all(
        _in_float64(forget), retain_set, noise.double(), coefficients, forget_set
    )
    precision = at_least_float32(forget.dtype)
    return RedirectToAll(
        x_t, laid_out(target, precision, _channels_last(forget)), spread.to(precision), weight
    )


def mixture(
    retain: Tensor | Rows,
    forget: Tensor | Rows,
    noise: Tensor | Noise | None,
    timesteps: Tensor,
    schedule: NoiseSchedule,
    lambd: float,
    from_forget: Tensor,
    *,
    x_t: Tensor | None = None,
    time_log_ratio: Tensor | None = None,
) -> Mixture:
    """The SISS mixture sample with both targets and importance weights (SISS Eq. 6).

    The weights of a row are bound to each other: `(1 - lambd) w_x + lambd w_a = 1`.

    Args:
        retain: `[B, C, H, W]`, images to keep, or rows of a store.
        forget: `[B, C, H, W]`, images to forget, or rows of a store.
        noise: `[B, C, H, W]`, or a `Noise` to make it from; not used (and may be None) where `x_t` is given,
            which implies it.
        timesteps: `[B]` int64, indices into `schedule`.
        lambd: in [0, 1], the share of forget images in the mixture.
        from_forget: `[B]` bool, True where `x_t` is made from the forget image.
        x_t: `[B, C, H, W]`, mixture samples made elsewhere.
        time_log_ratio: `[B]`, `log p_forget(t) / p_retain(t)` where the branches draw timesteps from
            different densities. Where one of them never draws `t`, or has another condition than the row, it
            is infinite, and the weights are 0 and `1 / lambd` or `1 / (1 - lambd)`: infinite, too, at lambd 0
            or 1 for a row that the mixture cannot draw.

    Raises:
        TypeError, ValueError: for arguments of another rank, shape, dtype or device, or lambd outside [0, 1].
    """
    _check_images("retain", retain)
    _check_images("forget", forget)
    check.same_shape("forget", forget, "retain", retain)
    check.same_device("forget", forget, "retain", retain)
    if forget.dtype != retain.dtype:
        raise TypeError(f"forget: expected the dtype of retain, {retain.dtype}, got {forget.dtype}")
    lambd = check.number("lambd", lambd, low=0, high=1)
    is_bool = isinstance(from_forget, Tensor) and from_forget.dtype == torch.bool
    if not is_bool or from_forget.shape != retain.shape[:1]:
        wanted = f"a bool tensor of shape ({len(retain)},)"
        raise TypeError(f"from_forget: expected {wanted}, got {check.describe(from_forget)}")
    check.same_device("from_forget", from_forget, "retain", retain)
    # Where both branches draw timesteps from one density, and rows share their condition, there is no ratio.
    if time_log_ratio is not None:
        check.vector("time_log_ratio", time_log_ratio, len(retain), retain.device)
    _check_data(retain=retain, forget=forget, noise=noise, x_t=x_t)
    if x_t is not None:
        # A given x_t was made from the image of its branch, and implies the noise that was added to it.
        drawn = torch.where(from_forget.view(-1, 1, 1, 1), _gathered(forget), _gathered(retain))
        noise = _noise_of("retain", drawn, noise, x_t, timesteps, schedule)
    coefficients = _prepare("retain", retain, noise, timesteps, schedule)
    if backend() == "reference":
        retain, forget = _gathered(retain), _gathered(forget)
        pair = retain, forget, _numbers(noise, retain.dtype), timesteps, schedule, lambd, from_forget
        return _literal_mixture(*pair, x_t=x_t, time_log_ratio=time_log_ratio)
    rest = (
        coefficients,
        from_forget,
        lambd,
        time_log_ratio,
        *_noise_arguments(noise),
        retain.dtype,
        _channels_last(retain),
    )
    made, *targets_and_weights = _mixture(*_source(retain), *_source(forget), *rest)
    return Mixture(made if x_t is None else x_t, *targets_and_weights)


def denoising_loss(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    lowpass: LowPass | BandMask | None = None,
) -> Tensor:
    """`weight ||prediction - target||^2` per sample, `[B]`, summed over elements.

    It is differentiable in `prediction` only.

    Args:
        prediction: `[B, C, H, W]`, any floating dtype; sums are float32 or better.
        target: `[B, C, H, W]`.
        weight: `[B]`; None is 1.
        lowpass: the band of spatial frequencies that counts (arXiv 2510.17917, Eq. 8), or the mask that it
            has for images of this size; None: all.

    Raises:
        TypeError, ValueError: for arguments of another rank, shape or device.
        ValueError: for a target or weight that requires a gradient, which this loss does not give them, or a
            mask for images of another size.
    """
    return weighted_residual(prediction, target, weight, lowpass)[0]


def weighted_residual(
    prediction: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    lowpass: LowPass | BandMask | None = None,
) -> tuple[Tensor, Tensor]:
    """`denoising_loss` and, from the same pass, its gradient `[B, C, H, W]` in the dtype of `prediction`."""
    check.images("prediction", prediction)
    check.like("target", target, "prediction", prediction)
    if weight is None:
        weight = torch.ones(len(prediction), device=prediction.device)
    else:
        check.vector("weight", weight, len(prediction), prediction.device)
    # The op returns a gradient for the prediction alone: one that is asked for and not given would be lost.
    for name, value in (("target", target), ("weight", weight)):
        if value.requires_grad:
            expected = "expected no gradient (the loss is differentiable in prediction only)"
            raise ValueError(f"{name}: {expected}, got requires_grad=True; detach it")

    # All frequencies: w ||prediction - target||^2, whose gradient is 2 w (prediction - target).
    if lowpass is None:
        if backend() == "reference":
            slope = 2 * weight.to(prediction.dtype).view(-1, 1, 1, 1)
            gradient = slope * (prediction - target).detach()
            return _literal_loss(prediction, target, weight), gradient
        return _residual(prediction, target, weight)

    # A band of them: the same of the residual's part within it (arXiv 2510.17917, Eq. 8).
    if isinstance(lowpass, LowPass):
        lowpass = _mask(lowpass, *prediction.shape[-2:], prediction.device)
    elif not isinstance(lowpass, BandMask):
        raise TypeError(f"lowpass: expected a LowPass, a BandMask or None, got {check.describe(lowpass)}")
    check_mask("lowpass", lowpass, *prediction.shape[-2:])
    check.same_device("lowpass.table", lowpass.table, "prediction", prediction)
    band, inside, outside = lowpass
    if backend() == "reference":
        return _literal_lowpass(prediction, target, weight, band, inside, outside)
    return _lowpass_residual(prediction, target, weight, band, inside, outside)


def _mask(lowpass: LowPass, height: int, width: int, device: torch.device) -> BandMask:
    """A constant of a compiled graph: a plain tuple, made for the images that it is used on."""
    return BandMask(*lowpass.mask_on(height, width, device))


# The mask is made of numbers that a trace knows, so the compiler may run this and keep the result. That is
# what torch.compiler.assume_constant_result says, by this marker; but the decorator itself would import
# torch._dynamo, and with it Triton, at every start of a program.
_mask._dynamo_marked_constant = True


def _check_images(name: str, images: Tensor | Rows) -> None:
    if isinstance(images, Rows):
        check.tensor(f"{name}.index", images.index, ndim=1, floating=False)
        check.rows_within(f"{name}.index", images.index, len(images.images))
    else:
        check.images(name, images)


def _check_set(name: str, images: Tensor, forget: Tensor | Rows) -> None:
    """A whole set of images, as stored."""
    is_stored = isinstance(images, Tensor) and (images.dtype == torch.uint8 or images.is_floating_point())
    if not is_stored:
        raise TypeError(f"{name}: expected uint8 or floating-point images, got {check.describe(images)}")
    if images.ndim != 4 or len(images) == 0 or images.shape[1:] != tuple(forget.shape[1:]):
        expected = f"images [M, C, H, W] of the shape of forget, {tuple(forget.shape[1:])}"
        raise ValueError(f"{name}: expected {expected}, got {check.describe(images)}")
    check.same_device(name, images, "forget", forget)


def _check_data(**arguments: Tensor | Rows | Noise | None) -> None:
    """Refuses a gradient that would be lost: importance weights and targets are constants of a step."""
    for name, value in arguments.items():
        if isinstance(value, Tensor) and value.requires_grad:
            expected = "expected no gradient (weights and targets are constants of a step)"
            raise ValueError(f"{name}: {expected}, got requires_grad=True; detach it")


def _source(images: Tensor | Rows) -> tuple[Tensor, Tensor | None]:
    """`(images, index)` as the ops take them."""
    if isinstance(images, Rows):
        return images.images, images.index
    return images, None


def _gathered(images: Tensor | Rows) -> Tensor:
    """The images themselves."""
    return images.gather() if isinstance(images, Rows) else images


def _in_float64(images: Tensor | Rows) -> Tensor:
    """The images themselves in float64; of uint8 rows the quotients that float32 rounds."""
    if not isinstance(images, Rows):
        return images.double()
    rows = images.images[images.index.long()].double()
    return rows * (2 / 255) - 1 if images.images.dtype == torch.uint8 else rows


def _noise_arguments(noise: Tensor | Noise) -> tuple[Tensor | None, Tensor | None, int]:
    """`(noise, counter, purpose)` as the ops take them."""
    if isinstance(noise, Noise):
        return None, noise.counter, int(noise.purpose)
    return noise, None, 0


def _numbers(noise: Tensor | Noise, dtype: torch.dtype) -> Tensor:
    """The noise itself."""
    return noise.numbers(dtype) if isinstance(noise, Noise) else noise


def _channels_last(images: Tensor | Rows) -> bool:
    """Whether results are to lie in channels-last order: where images do, and are not contiguous as well."""
    if isinstance(images, Rows) or images.is_contiguous():
        return False
    return images.is_contiguous(memory_format=torch.channels_last)


def _prepare(
    name: str, images: Tensor | Rows, noise: Tensor | Noise | None, timesteps: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """Checks what all ops take; the schedule's coefficients `[B, 5]` float64 of the rows."""
    _check_images(name, images)
    if isinstance(noise, Noise):
        check.same_shape("noise", noise, name, images)
        check.vector("noise.counter", noise.counter, 3, images.device, floating=False)
        check_noise("noise", noise)
    else:
        check.like("noise", noise, name, images)
    _check_timesteps(timesteps, images, schedule)
    return schedule.coefficients(timesteps)


def _check_timesteps(timesteps: Tensor, images: Tensor | Rows, schedule: NoiseSchedule) -> None:
    if not isinstance(schedule, NoiseSchedule):
        wanted = "a NoiseSchedule (NoiseSchedule.from_diffusers(scheduler) makes one)"
        raise TypeError(f"schedule: expected {wanted}, got {check.describe(schedule)}")
    check.vector("timesteps", timesteps, len(images), images.device, floating=False)


def _noise_of(
    name: str,
    images: Tensor | Rows,
    noise: Tensor | Noise | None,
    x_t: Tensor | None,
    timesteps: Tensor,
    schedule: NoiseSchedule,
) -> Tensor | Noise | None:
    """The noise that `x_t` implies, `(x_t - alpha x) / sigma`, or `noise` where `x_t` is not given."""
    if x_t is None:
        return noise
    images = _gathered(images)
    check.like("x_t", x_t, name, images)
    _check_timesteps(timesteps, images, schedule)
    alpha, sigma = (schedule.coefficients(timesteps)[:, column].view(-1, 1, 1, 1) for column in (0, 1))
    return ((x_t.double() - alpha * images.double()) / sigma).to(images.dtype)


def _with_k(images: Tensor | Rows) -> str:
    """`(B, K, C, H, W)` with the sizes of `images`, for a message."""
    batch, *rest = images.shape
    return f"({batch}, K, {', '.join(map(str, rest))})"
