"""What masks and anchors are made of: gradients of a set, the Fisher information, variances of weights.

Each estimate is a function of its seed, active dropout included, and leaves the network and torch's random
numbers as they were. Several processes make it in one of them (`Mask.save`, `Anchor.save`), or all with the
same seed: none waits for the others, also where the network is in DistributedDataParallel.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..host import check
from ..host.buffers import buffers_put_back
from ..host.plain_names import plain_copy, plain_parameters
from ..host.store import ImageStore
from ..host.tensor_lists import divide
from ..methods import Vanilla
from ..models import load_checkpoint
from ..objective.anchor import Anchor
from ..objective.schedule import NoiseSchedule
from ..objective.time import Density, check_density
from ..step.doors import method_step
from ..step.trained import unwrapped
from ..step.update import clipping

SEEDS = 2**63 - 1
CLIPPED_TO = 1.0  # L2 norm of a fine-tune's gradients, as in other steps.


def forget_gradients(
    model: nn.Module,
    schedule: NoiseSchedule,
    forget: ImageStore,
    *,
    num_batches: int = 50,
    batch_size: int = 128,
    batch_norm: float | None = 1.0,
    seed: int = 0,
    time_window: Density | None = None,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The sum of the gradients of the denoising loss of `forget` over batches: SalUn's saliency.

    `sum_b clip(grad mean_i ||eps - eps_theta(a_t, t)||^2)`, signed: what points in another direction in every
    batch cancels (arXiv 2310.12508, its code for DDPM). `Mask.from_gradients` takes the absolute value.

    It costs the forward and backward passes of `num_batches` steps, and a copy of the trained weights, in
    float32 at least.

    Args:
        model: its trained parameters (`requires_grad`) have gradients; those that the loss does not reach
            have zeros.
        forget: its rows are taken in order, again and again; of a distribution, the means.
        num_batches, batch_size: how many rows in all.
        batch_norm: the gradient of a batch is clipped to this L2 norm, as published; None: not at all.
        seed: of noise and timesteps.
        time_window: what timesteps are drawn from; None: the density of the schedule.
        micro_batch_size, autocast_dtype: as in `retrack_step`.

    Returns:
        By plain name.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    num_batches = check.integer("num_batches", num_batches, low=1)
    if time_window is not None:
        check_density("time_window", time_window)
    if batch_norm is not None:
        batch_norm = check.number("batch_norm", batch_norm, low=0, low_open=True)
    model = unwrapped(model)
    parameters = _trained(model)
    sums = _zeros(parameters)
    batches = _batches("forget", forget, parameters, batch_size, num_batches)
    options = _step_options(parameters, seed, micro_batch_size, autocast_dtype)
    # The only images of these steps are those to forget, which `Vanilla` knows as images to keep.
    options["retain_density"] = time_window
    with buffers_put_back(model), _random_numbers_of(seed, parameters):
        for images in batches:
            norm = method_step(Vanilla(), model, None, schedule, retain=images, **options).grad_norm
            own, gradients = _take_gradients(parameters, sums)
            divide(gradients, clipping(norm, batch_norm))
            torch._foreach_add_(own, gradients)
    return dict(zip(parameters, sums, strict=True))


def fisher(
    model: nn.Module,
    schedule: NoiseSchedule,
    retain: ImageStore,
    *,
    samples: int = 256,
    timesteps_per_sample: int = 8,
    seed: int = 0,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The diagonal of the Fisher information of the retain losses: `mean_i (grad_theta l_i)^2`.

    `l_i` is the denoising loss of one image, `mean_t ||eps - eps_theta(x_t, t)||^2` over a few timesteps (as
    elastic weight consolidation does for diffusion models).

    It costs `samples` steps of `timesteps_per_sample` rows each, and a copy of the trained weights.

    Args:
        retain: its first rows, again from the start where `samples` is more than there are.
        samples: images, each with a gradient of its own.
        timesteps_per_sample: over which the loss of an image is averaged.
        seed, micro_batch_size, autocast_dtype: as in `forget_gradients`.

    Returns:
        By plain name, >= 0; 0 where the loss does not reach.

    Raises:
        TypeError, ValueError: naming the argument, or a weight of which it is not finite.
    """
    samples = check.integer("samples", samples, low=1)
    timesteps_per_sample = check.integer("timesteps_per_sample", timesteps_per_sample, low=1)
    model = unwrapped(model)
    parameters = _trained(model)
    sums = _zeros(parameters)
    images_one_by_one = _batches("retain", retain, parameters, 1, samples)
    options = _step_options(parameters, seed, micro_batch_size, autocast_dtype)
    with buffers_put_back(model), _random_numbers_of(seed, parameters):
        for image in images_one_by_one:
            images = image.expand(timesteps_per_sample, -1, -1, -1)
            method_step(Vanilla(), model, None, schedule, retain=images, **options)
            own, gradients = _take_gradients(parameters, sums)
            torch._foreach_addcmul_(own, gradients, gradients)
    torch._foreach_div_(sums, samples)
    return _finite("fisher", dict(zip(parameters, sums, strict=True)))


def swag_variance(
    model: nn.Module,
    schedule: NoiseSchedule,
    retain: ImageStore,
    *,
    steps: int = 50,
    lr: float = 5e-5,
    batch_size: int = 128,
    seed: int = 0,
    micro_batch_size: int | None = None,
    autocast_dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The variance of every trained weight over the iterates of a short fine-tune on `retain`.

    The diagonal of SWAG (arXiv 1902.02476), of AdamW's iterates. It costs `steps` steps, and a copy of the
    network, its optimizer's state, and two more copies of the trained weights.

    Args:
        steps, lr: of the fine-tune of a copy of `model`, at a constant rate, without weight decay; at least 2
            steps.
        batch_size: rows a step, in order.
        seed, micro_batch_size, autocast_dtype: as in `forget_gradients`.

    Returns:
        By plain name, unbiased; 0 for a weight that never moved.

    Raises:
        TypeError, ValueError: naming the argument, or a weight of which it is not finite.
    """
    steps = check.integer("steps", steps, low=2)
    lr = check.number("lr", lr, low=0, low_open=True)
    _trained(model)
    network = plain_copy(unwrapped(model))
    parameters = _trained(network)
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, weight_decay=0.0, fused=True)
    moments = _Moments()
    options = _step_options(parameters, seed, micro_batch_size, autocast_dtype)
    batches = _batches("retain", retain, parameters, batch_size, steps)
    with _random_numbers_of(seed, parameters):
        for images in batches:
            # The update is made here: of several processes one may estimate, which a step would warn of.
            norm = method_step(Vanilla(), network, None, schedule, retain=images, **options).grad_norm
            gradients = [own.grad for own in parameters.values() if own.grad is not None]
            divide(gradients, clipping(norm, CLIPPED_TO))
            optimizer.step()
            optimizer.zero_grad()
            moments.add([parameter.detach() for parameter in parameters.values()])
    return _finite("swag_variance", dict(zip(parameters, moments.variance, strict=True)))


def checkpoint_moments(
    model: nn.Module, checkpoints: Sequence[str | os.PathLike]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Mean and unbiased variance of every trained weight over checkpoints, read one after the other.

    Args:
        model: the network whose trained parameters they are for.
        checkpoints: two at least, each the folder of a diffusers network or pipeline, a safetensors file with
            the plain names of `model`, or a folder with `model.safetensors` (a checkpoint of a run).

    Returns:
        Mean and variance by plain name, in float32 at least.

    Raises:
        TypeError, ValueError: naming the checkpoint that lacks a weight, or has one of another shape; or no
            weight differs in any of them.
    """
    parameters = _trained(model)
    moments = _Moments()
    for path in _paths(checkpoints):
        found = _weights(Path(path))
        own = []
        for name, parameter in parameters.items():
            weight = found.get(name)
            fits = weight is not None and weight.shape == parameter.shape and weight.is_floating_point()
            if not fits:
                expected = f"expected {name} of shape {tuple(parameter.shape)} in floats"
                raise ValueError(f"checkpoints: {path}: {expected}, got {check.describe(weight)}")
            check.finite(f"checkpoints: {path}: {name}", weight)
            own.append(weight.to(parameter.device))
        moments.add(own)
    variance = moments.variance
    # Held as firmly as can be, such weights would never move, and no number would say why.
    if not any(bool(own.any()) for own in variance):
        raise ValueError("checkpoints: expected networks that were trained apart, got equal weights in all")
    return dict(zip(parameters, moments.means, strict=True)), dict(zip(parameters, variance, strict=True))


def vdu(model: nn.Module, checkpoints: Sequence[str | os.PathLike], gamma: float, **options: Any) -> Anchor:
    """VDU's anchor (arXiv 2510.04058) in its derived form: mean and variance over independent trainings.

    Args:
        checkpoints: as in `checkpoint_moments`.
        gamma, options: as in `Anchor`.

    Raises:
        TypeError, ValueError: naming the argument, or the checkpoint that does not fit.
    """
    mean, variance = checkpoint_moments(model, checkpoints)
    precision = {name: own.reciprocal() for name, own in variance.items()}
    return Anchor(mean, precision, gamma, model=model, **options)


def vdu_laplace(
    model: nn.Module,
    schedule: NoiseSchedule,
    retain: ImageStore,
    gamma: float,
    *,
    prior_precision: float = 0.0,
    max_precision: float | None = None,
    **options: Any,
) -> Anchor:
    """An anchor at the weights as they are, with the precision `N F + prior_precision` of a Laplace
    approximation from one checkpoint: not VDU as published, which has several.

    Args:
        retain: N rows, of which `fisher` takes some.
        gamma, max_precision: as in `Anchor`.
        prior_precision: added to the precision of every weight; it holds those that no loss reaches.
        options: as in `fisher`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_options("vdu_laplace", options, fisher)
    prior = check.number("prior_precision", prior_precision, low=0)
    information = fisher(model, schedule, retain, **options)
    precision = {name: own.mul_(len(retain)).add_(prior) for name, own in information.items()}
    return Anchor(trained_weights(model), precision, gamma, model=model, **_at_most(max_precision))


def vdu_swag(
    model: nn.Module,
    schedule: NoiseSchedule,
    retain: ImageStore,
    gamma: float,
    *,
    max_precision: float | None = None,
    **options: Any,
) -> Anchor:
    """An anchor at the weights as they are, with one over the variance of a short fine-tune from one
    checkpoint as precision: not VDU as published, which has several.

    Args:
        retain: what the fine-tune is on.
        gamma, max_precision: as in `Anchor`.
        options: as in `swag_variance`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    _check_options("vdu_swag", options, swag_variance)
    variance = swag_variance(model, schedule, retain, **options)
    precision = {name: own.reciprocal_() for name, own in variance.items()}
    return Anchor(trained_weights(model), precision, gamma, model=model, **_at_most(max_precision))


def _check_options(caller: str, options: Mapping[str, Any], function: Callable) -> None:
    """That `caller` was given no option but those of the `function` that it hands them to."""
    parameters = inspect.signature(function).parameters.values()
    known = [each.name for each in parameters if each.kind is each.KEYWORD_ONLY]
    for name in options:
        if name not in known:
            raise TypeError(f"{caller}: expected options {', '.join(known)}, got {name}")


def vdu_l2(model: nn.Module, gamma: float) -> Anchor:
    """An anchor at the weights as they are, the same for all: `gamma / n ||theta - theta_0||^2 / 2`.

    Not VDU as published, which has a precision for each weight.

    Args:
        gamma: as in `Anchor`.

    Raises:
        TypeError, ValueError: naming the argument.
    """
    return Anchor(trained_weights(model), 1.0, gamma, model=model)


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """The trained weights of `model` by plain name, as they are; not copied."""
    return {name: parameter.detach() for name, parameter in _trained(model).items()}


class _Moments:
    """Mean and variance of weights that come one set after the other (Welford), in float32 at least."""

    def __init__(self):
        self.count = 0

    def add(self, weights: list[Tensor]) -> None:
        self.count += 1
        dtypes = [torch.promote_types(weight.dtype, torch.float32) for weight in weights]
        wide = [weight.to(dtype) for weight, dtype in zip(weights, dtypes, strict=True)]
        if self.count == 1:
            self.means = [weight.clone() for weight in wide]
            self._squares = [torch.zeros_like(weight) for weight in wide]
            return
        before = torch._foreach_sub(wide, self.means)
        torch._foreach_add_(self.means, torch._foreach_div(before, self.count))
        torch._foreach_addcmul_(self._squares, before, torch._foreach_sub(wide, self.means))

    @property
    def variance(self) -> list[Tensor]:
        # Rounding may leave a square of less than 0 where a weight hardly varies.
        return torch._foreach_clamp_min(torch._foreach_div(self._squares, self.count - 1), 0.0)


def _paths(checkpoints: Any) -> Sequence[str | os.PathLike]:
    """
    Raises:
        TypeError, ValueError: they are no paths, or fewer than two.
    """
    expected = "expected at least two, over which a variance can be taken"
    if isinstance(checkpoints, (str, os.PathLike)):
        raise ValueError(f"checkpoints: {expected}, got one")
    if not isinstance(checkpoints, (list, tuple)):
        raise TypeError(f"checkpoints: {expected}, got {check.describe(checkpoints)}")
    for path in checkpoints:
        if not isinstance(path, (str, os.PathLike)):
            raise TypeError(f"checkpoints: expected paths, got {check.describe(path)}")
    if len(checkpoints) < 2:
        raise ValueError(f"checkpoints: {expected}, got {'one' if checkpoints else 'none'}")
    return checkpoints


def _finite(estimate: str, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """`found`, where every number is finite: as a precision, infinity would stand for the largest.

    Raises:
        ValueError: there are others.
    """
    for name, own in found.items():
        check.finite(f"{estimate}[{name!r}]", own)
    return found


def _at_most(max_precision: float | None) -> dict[str, float]:
    return {} if max_precision is None else {"max_precision": max_precision}


def _trained(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by plain name.

    Raises:
        TypeError, ValueError: no module, or one without such.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {check.describe(model)}")
    named = plain_parameters(model)
    trained = {name: parameter for name, parameter in named.items() if parameter.requires_grad}
    if not trained:
        raise ValueError("model: expected parameters with requires_grad=True, got none")
    return trained


def _zeros(parameters: Mapping[str, nn.Parameter]) -> list[Tensor]:
    return [
        torch.zeros_like(parameter, dtype=torch.promote_types(parameter.dtype, torch.float32))
        for parameter in parameters.values()
    ]


def _step_options(
    parameters: Mapping[str, nn.Parameter],
    seed: int,
    micro_batch_size: int | None,
    autocast_dtype: torch.dtype | None,
) -> dict[str, Any]:
    """How the steps of an estimate are taken.

    Raises:
        TypeError, ValueError: no seed, or a network that could not take the rows of a store.
    """
    first = next(iter(parameters.values()))
    if autocast_dtype is None and first.dtype.itemsize < 4:
        expected = "expected float32 parameters, or autocast_dtype (stores serve float32 rows)"
        raise TypeError(f"model: {expected}, got {first.dtype}")
    seed = check.integer("seed", seed, low=0, high=SEEDS)
    return {
        "generator": torch.Generator(first.device).manual_seed(seed),
        "micro_batch_size": micro_batch_size,
        "autocast_dtype": autocast_dtype,
        # Few steps, of shapes of their own.
        "compile": False,
    }


@contextmanager
def _random_numbers_of(seed: int, parameters: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """In the block, torch's own random numbers, those of dropout, follow from `seed`; after it they go on."""
    device = next(iter(parameters.values())).device
    # Another seed than that of the noise, whose numbers dropout would repeat.
    own = SEEDS - seed
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(own)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(own)
        yield


def _batches(
    name: str, store: ImageStore, parameters: Mapping[str, nn.Parameter], batch_size: int, count: int
) -> Iterator[Tensor]:
    """`count` batches of rows in order, from the first again after the last, as the network takes them.

    Everything is looked at here, and rows are read when they are asked for.
    """
    if not isinstance(store, ImageStore):
        raise TypeError(f"{name}: expected an ImageStore, got {check.describe(store)}")
    batch_size = check.integer("batch_size", batch_size, low=1)
    first, rows = next(iter(parameters.values())), store.freeze()

    def read() -> Iterator[Tensor]:
        for batch in range(count):
            index = torch.arange(batch * batch_size, (batch + 1) * batch_size) % len(rows)
            yield rows.rows(index).to(first.device, torch.promote_types(first.dtype, torch.float32))

    return read()


def _take_gradients(
    parameters: Mapping[str, nn.Parameter], sums: list[Tensor]
) -> tuple[list[Tensor], list[Tensor]]:
    """What a step has left in `.grad`, which is cleared, beside the sums that it belongs to."""
    own, gradients = [], []
    for parameter, total in zip(parameters.values(), sums, strict=True):
        if parameter.grad is not None:
            own.append(total)
            gradients.append(parameter.grad.to(total.dtype))
            parameter.grad = None
    return own, gradients


def _weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint by plain name."""
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        network, _ = load_checkpoint(path)
        return {name: parameter.detach() for name, parameter in plain_parameters(network).items()}
    # A pipe would wait for a writer.
    if file.exists() and not file.is_file():
        raise ValueError(f"checkpoints: {file}: expected a safetensors file, got something else")
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        said = check.in_a_line(error)
        raise ValueError(f"checkpoints: {file}: expected a safetensors file, got {said}") from error
