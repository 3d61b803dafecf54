"""Predict and residual: the network on the rows of a pass, and the gradients of the loss with respect to its output. Eagerly, or compiled as one graph."""

from __future__ import annotations

import logging
import time
import types
import weakref
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from . import _check
from . import functional as F
from .attention import fast_attention
from .methods.base import Pass, Role
from .profiling import stage
from .schedule import NoiseSchedule

log = logging.getLogger("fastunlearn")

Compile = bool | Literal["try", "regional"]  # True: a failure is an error; "try": it is logged, and the network runs eagerly


class Evaluation(NamedTuple):
    prediction: Tensor  # [R, C, H, W], with its graph
    losses: list[Tensor]  # [B] for each term of the pass: the weighted squared errors of its rows, without its scale
    gradients: dict[Role, Tensor]  # d loss / d prediction, [R, C, H, W] in the dtype of the prediction


def evaluate(
    model: Callable,
    part: Pass,
    schedule: NoiseSchedule,
    *,
    apart: bool,
    factors: dict[Role, Tensor | float],
    autocast_dtype: torch.dtype | None = None,
    compile: Compile = False,
) -> Evaluation:
    """The network's prediction for the rows of `part`, the losses of its terms, and their gradients.

    Args:
        apart: a gradient for each role, instead of one for all terms together.
        factors: what the gradients of a role are multiplied by, beside the scale of its terms.
    """
    inputs = part.x_t, schedule.model_input(part.timesteps), part.kwargs
    spans = tuple((term.role if apart else "retain", term.start, term.stop, term.scale) for term in part.terms)
    regression = spans, [term.target for term in part.terms], [term.weight for term in part.terms], [factors[term.role] for term in part.terms]
    if compile and compile != "regional":
        with stage("predict+residual"):
            evaluation = _compiled(model, inputs, regression, autocast_dtype, required=compile != "try")
        if evaluation is not None:
            _check_prediction(evaluation.prediction)
            return evaluation
    with stage("predict"):
        prediction = _predict_by_blocks(model, inputs, autocast_dtype) if compile == "regional" else predict(model, *inputs, autocast_dtype)
        _check_prediction(prediction)
    with stage("residual"):
        return Evaluation(prediction, *residuals(prediction.detach(), *regression))


def predict(model: Callable, x_t: Tensor, t: Tensor, kwargs: dict, autocast_dtype: torch.dtype | None) -> Tensor:
    """What the network returns for `x_t`, `[R, C, H, W]`."""
    if autocast_dtype is None:
        output = _call(model, x_t, t, kwargs)
    else:
        with torch.autocast(x_t.device.type, dtype=autocast_dtype):  # a `with` of its own: TorchDynamo cannot trace one in an ExitStack
            output = _call(model, x_t, t, kwargs)
    prediction = getattr(output, "sample", output)
    rows, channels, *plane = x_t.shape
    if not isinstance(prediction, Tensor) or list(prediction.shape) not in ([rows, channels, *plane], [rows, 2 * channels, *plane]):
        expected = f"an output (or its .sample) of shape {(rows, channels, *plane)}, or with {2 * channels} channels"
        raise ValueError(f"model: expected {expected}, got {_check.describe(prediction)}")
    return prediction[:, :channels]  # a learned variance, if there is one, is left alone


def _call(model: Callable, x_t: Tensor, t: Tensor, kwargs: dict):
    if x_t.device.type == "cpu" and not torch.compiler.is_compiling():
        with fast_attention():
            return model(x_t, t, **kwargs)
    return model(x_t, t, **kwargs)


def residuals(
    prediction: Tensor, spans: tuple[tuple[Role, int, int, float], ...], targets: list[Tensor], weights: list[Tensor], factors: list[Tensor | float]
) -> tuple[list[Tensor], dict[Role, Tensor]]:
    """Losses of the terms and gradients of the roles. In float32 or better: half precision is rounded to once, after all factors."""
    dtype, losses, gradients = prediction.dtype, [], {}
    prediction = prediction.to(torch.promote_types(dtype, torch.float32))
    for (role, start, stop, scale), target, weight, factor in zip(spans, targets, weights, factors, strict=True):
        loss, gradient = F.weighted_residual(prediction[start:stop], target, weight)
        losses.append(loss)
        for number in (scale, factor):
            gradient = gradient if isinstance(number, float) and number == 1 else gradient * number
        if stop - start == len(prediction) and role not in gradients:
            gradients[role] = gradient
        else:
            gradients.setdefault(role, torch.zeros_like(prediction))[start:stop] += gradient
    return losses, {role: gradient.to(dtype) for role, gradient in gradients.items()}


def _check_prediction(prediction: Tensor) -> None:
    if not prediction.requires_grad:
        raise ValueError("model: expected an output that depends on trainable parameters, got one without a gradient (is the model frozen, or under no_grad?)")


# --- torch.compile ------------------------------------------------------------------------------------------------------------------


BACKEND = "inductor"  # of torch.compile
VARIANTS = 64  # sets of shapes, dtypes and terms that one network is compiled for; torch gives up after 8, micro-batches and several methods need more


def _forward_and_residual(model: Callable, inputs: tuple, regression: tuple, autocast_dtype: torch.dtype | None) -> tuple[Tensor, list[Tensor], dict]:
    prediction = predict(model, *inputs, autocast_dtype)
    return prediction, *residuals(prediction.detach(), *regression)


class _Compiled:
    """`_forward_and_residual` for one network: compiled at its first call for each set of shapes, dtypes and terms.

    TorchDynamo keeps what it compiled, and counts how often it did, by code object: a copy of the code for each network, which goes with it.
    """

    def __init__(self):
        code = _forward_and_residual.__code__.replace()
        self.function = torch.compile(types.FunctionType(code, globals()), fullgraph=True, dynamic=False, backend=BACKEND)
        self.seconds: dict[tuple, float] = {}  # of first calls
        self.failed = False


REGIONAL_FROM = 300_000_000  # parameters
_AUTOMATIC: weakref.WeakKeyDictionary[nn.Module, Compile] = weakref.WeakKeyDictionary()


def resolve_compile(requested: Compile | None, model: Callable, device: torch.device) -> Compile:
    """What `compile=None` means for `model`: on for GPUs (blocks only, where a network is big and names those that it repeats), off for CPUs.

    Raises:
        TypeError: compiling was asked for, and the model is no `torch.nn.Module`.
    """
    if requested is None:
        if device.type == "cpu" or not isinstance(model, nn.Module):
            return False
        if model not in _AUTOMATIC:
            big = sum(parameter.numel() for parameter in model.parameters()) >= REGIONAL_FROM
            _AUTOMATIC[model] = "regional" if big and getattr(model, "_repeated_blocks", None) else True
        return _AUTOMATIC[model]
    if requested and not isinstance(model, nn.Module):
        raise TypeError(f"compile: expected a torch.nn.Module as model, got {type(model).__name__}")
    return requested


_COMPILED: weakref.WeakKeyDictionary[nn.Module, _Compiled] = weakref.WeakKeyDictionary()


def _compiled(model: nn.Module, inputs: tuple, regression: tuple, autocast_dtype: torch.dtype | None, *, required: bool) -> Evaluation | None:
    """The evaluation by the compiled function; None where compilation failed and is not `required`."""
    compiled = _COMPILED.get(model) or _COMPILED.setdefault(model, _Compiled())
    if compiled.failed and not required:
        return None
    x_t, (spans, *_) = inputs[0], regression
    key = tuple(x_t.shape), x_t.dtype, autocast_dtype, spans
    # A second backward pass over the same graph must find its buffers: functorch would else hand them to the first one for reuse.
    with torch._functorch.config.patch(donated_buffer=False):
        if key in compiled.seconds:
            return Evaluation(*compiled.function(model, inputs, regression, autocast_dtype))
        started = time.perf_counter()
        try:
            with torch._dynamo.config.patch(recompile_limit=VARIANTS):
                evaluation = Evaluation(*compiled.function(model, inputs, regression, autocast_dtype))
        except Exception as error:
            what = f"torch.compile failed on {type(model).__name__} with {tuple(x_t.shape)}: {type(error).__name__}: {error}"
            if required:
                raise RuntimeError(f"compile: {what}\ncompile='try' runs the network eagerly in that case, compile=False always") from error
            log.warning("%s; the network runs eagerly", what)
            compiled.failed = True
            return None
        compiled.seconds[key] = time.perf_counter() - started
    log.info("compiled %s for %s: the first forward pass took %.1f s", type(model).__name__, tuple(x_t.shape), compiled.seconds[key])
    return evaluation


_REGIONAL: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def _compile_blocks(model: nn.Module) -> None:
    """Compiles the blocks that a diffusers network repeats, once for all of them: minutes less than a whole network of hundreds of millions of weights.

    Raises:
        ValueError: the network does not say which blocks it repeats.
    """
    if model in _REGIONAL:
        return
    if not getattr(model, "_repeated_blocks", None):
        raise ValueError(f"compile: expected a diffusers network that names its repeated blocks for 'regional', got {type(model).__name__}")
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=BACKEND)
    _REGIONAL.add(model)


def _predict_by_blocks(model: nn.Module, inputs: tuple, autocast_dtype: torch.dtype | None) -> Tensor:
    """`predict` with compiled blocks."""
    _compile_blocks(model)
    compiled = _COMPILED.get(model) or _COMPILED.setdefault(model, _Compiled())
    key = tuple(inputs[0].shape), inputs[0].dtype, autocast_dtype
    started = time.perf_counter()
    with torch._functorch.config.patch(donated_buffer=False), torch._dynamo.config.patch(recompile_limit=VARIANTS):  # for the reasons of `_compiled`
        prediction = predict(model, *inputs, autocast_dtype)
    if key not in compiled.seconds:
        compiled.seconds[key] = time.perf_counter() - started
    return prediction


def compile_seconds(model: nn.Module) -> float:
    """What the first calls of the compiled `model` took, together; the backward graph is compiled in the first backward pass, which is not in it."""
    compiled = _COMPILED.get(model) if isinstance(model, nn.Module) else None
    return sum(compiled.seconds.values()) if compiled else 0.0
