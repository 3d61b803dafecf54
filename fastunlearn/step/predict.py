"""Predict: what a network returns for noisy images."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..host import check
from .attention import fast_attention


def predict(
    model: Callable,
    x_t: Tensor,
    t: Tensor,
    kwargs: dict,
    autocast_dtype: torch.dtype | None,
    name: str = "model",
) -> Tensor:
    """What the network returns for `x_t`, `[R, C, H, W]`.

    Args:
        name: of the argument that the network came as.

    Raises:
        ValueError: it returns something else than a prediction.
    """
    if autocast_dtype is None:
        output = _call(model, x_t, t, kwargs)
    else:
        # A `with` of its own: TorchDynamo cannot trace one in an ExitStack.
        with torch.autocast(x_t.device.type, dtype=autocast_dtype):
            output = _call(model, x_t, t, kwargs)
    prediction = check.network_output(output)
    rows, channels, *plane = x_t.shape
    fitting = [rows, channels, *plane], [rows, 2 * channels, *plane]
    if not isinstance(prediction, Tensor) or list(prediction.shape) not in fitting:
        shapes = f"of shape {(rows, channels, *plane)}, or with {2 * channels} channels"
        expected = f"an output (or its .sample, or the first of a tuple) {shapes}"
        raise ValueError(f"{name}: expected {expected}, got {check.describe(prediction)}")
    # A learned variance, if there is one, is left alone.
    return prediction[:, :channels]


def _call(model: Callable, x_t: Tensor, t: Tensor, kwargs: dict):
    if x_t.device.type == "cpu" and not torch.compiler.is_compiling():
        with fast_attention():
            return model(x_t, t, **kwargs)
    return model(x_t, t, **kwargs)


class Unsteady(NamedTuple):
    """A module of a network by which a call of it changes it, or differs from the next one."""

    module: nn.Module
    what: str
    where: str


def unsteady_modules(network: Callable) -> Iterator[Unsteady]:
    """Those of `network` in the mode that it is in; none where it is no module."""
    if not isinstance(network, nn.Module):
        return
    for name, module in network.named_modules():
        if not module.training:
            continue
        where = f"{type(module).__name__} ({name})"
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            yield Unsteady(module, "active dropout", where)
        # These drop by themselves, without a layer for it.
        if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)) and module.dropout > 0:
            yield Unsteady(module, "active dropout", where)
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.track_running_stats:
            yield Unsteady(module, "averages that each call moves", where)


def unsteady(network: Callable) -> Unsteady | None:
    """The first of them."""
    return next(unsteady_modules(network), None)


def check_prediction(prediction: Tensor) -> None:
    """
    Raises:
        ValueError: nothing that is trained has made `prediction`.
    """
    if not prediction.requires_grad:
        why = "is the model frozen, under no_grad, or in an activation checkpoint with use_reentrant=True?"
        expected = "expected an output that depends on trainable parameters"
        raise ValueError(f"model: {expected}, got one without a gradient ({why})")
