"""`torch.compile` for a step: a function of the network as one graph, or the blocks that it repeats."""

from __future__ import annotations

import logging
import time
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree

log = logging.getLogger("fastunlearn")

# True: a failure is an error. "try": it is logged, and the network runs eagerly. "regional": blocks alone.
Compile = bool | Literal["try", "regional"]
# Of torch.compile.
BACKEND = "inductor"
# Sets of shapes, dtypes and terms that one network is compiled for. torch gives up after 8; micro-batches and
# several methods need more.
VARIANTS = 64
# Parameters from which compile=None takes the blocks alone.
REGIONAL_FROM = 300_000_000


class _Network:
    """What is compiled for one network."""

    def __init__(self):
        # What compile=None means for it.
        self.automatic: Compile | None = None
        # The functions that `whole` compiled, by what they were; the blocks with their compiled calls.
        self.functions: dict[Callable, Callable] = {}
        self.blocks: list[tuple[nn.Module, Callable]] | None = None
        # To compile, where that was not required.
        self.failed = False
        # What first calls took, by their shapes and constants.
        self.seconds: dict[Any, float] = {}


_NETWORKS: weakref.WeakKeyDictionary[nn.Module, _Network] = weakref.WeakKeyDictionary()


def _of(model: nn.Module) -> _Network:
    return _NETWORKS.get(model) or _NETWORKS.setdefault(model, _Network())


def resolve_compile(requested: Compile | None, model: Callable, device: torch.device) -> Compile:
    """What `compile=None` means for `model`: on for GPUs, off for CPUs.

    On is blocks only, where a network is big and names those that it repeats.

    Raises:
        TypeError: compiling was asked for, and the model is no `torch.nn.Module`.
    """
    if requested is not None:
        if requested and not isinstance(model, nn.Module):
            raise TypeError(f"compile: expected a torch.nn.Module as model, got {type(model).__name__}")
        return requested
    if device.type == "cpu" or not isinstance(model, nn.Module):
        return False

    # Asked at every step; parameters are counted once.
    network = _of(model)
    if network.automatic is None:
        network.automatic = True
        big = sum(parameter.numel() for parameter in model.parameters()) >= REGIONAL_FROM
        if big and getattr(model, "_repeated_blocks", None):
            network.automatic = "regional"
    return network.automatic


def whole(model: nn.Module, function: Callable, arguments: tuple, *, required: bool) -> Any | None:
    """`function(model, *arguments)`, compiled as one graph.

    It is compiled at the first call for each set of shapes and dtypes. None where that failed and is not
    `required`: then, and at all later calls.

    Raises:
        RuntimeError: compilation failed, and is required.
    """
    network = _of(model)
    if network.failed and not required:
        return None
    if function not in network.functions:
        # TorchDynamo keeps what it compiled, and counts how often it did, by code object: one for all
        # networks would keep their graphs for ever, and count them together. So each network gets a function
        # with a copy of the code, which goes with it.
        copied = types.FunctionType(function.__code__.replace(), function.__globals__)
        network.functions[function] = torch.compile(
            copied, fullgraph=True, dynamic=False, backend=BACKEND, options=_options(model)
        )
    try:
        with _timed(network, model, arguments), _limits():
            return network.functions[function](model, *arguments)
    except Exception as error:
        shape = tuple(_pytree.tree_leaves(arguments)[0].shape)
        what = f"torch.compile failed on {type(model).__name__} with {shape}: {type(error).__name__}: {error}"
        if required:
            raise RuntimeError(
                f"compile: {what}\ncompile='try' runs the network eagerly in that case, compile=False always"
            ) from error
        log.warning("%s; the network runs eagerly", what)
        network.failed = True
        return None


def by_blocks(model: nn.Module, function: Callable, arguments: tuple) -> Any:
    """`function(model, *arguments)`, with those blocks compiled that a diffusers network repeats.

    Compiled once for all of them, which takes minutes less than a whole network of hundreds of millions of
    weights does. Outside of this call the network is as it was.

    Raises:
        ValueError: the network does not say which blocks it repeats.
        RuntimeError: compilation failed.
    """
    network = _of(model)
    if network.blocks is None:
        network.blocks = _compile_blocks(model)
    # torch's own mark of a compiled module: where it is set, calling the module calls it.
    try:
        for module, call in network.blocks:
            module._compiled_call_impl = call
        with _timed(network, model, arguments), _limits():
            return function(model, *arguments)
    except torch._dynamo.exc.TorchDynamoException as error:
        what = (
            f"torch.compile failed on the blocks of {type(model).__name__}: {type(error).__name__}: {error}"
        )
        raise RuntimeError(f"compile: {what}\ncompile=False runs the network eagerly") from error
    finally:
        for module, _ in network.blocks:
            module._compiled_call_impl = None


def _compile_blocks(model: nn.Module) -> list[tuple[nn.Module, Callable]]:
    """The blocks that `model` repeats, each with its compiled call; those that the caller compiled are not.

    Raises:
        ValueError: the network does not say which blocks it repeats.
    """
    if not getattr(model, "_repeated_blocks", None):
        raise ValueError(
            "compile: expected a diffusers network that names its repeated blocks for 'regional', "
            f"got {type(model).__name__}"
        )
    before = {module for module in model.modules() if module._compiled_call_impl is not None}
    model.compile_repeated_blocks(fullgraph=True, dynamic=False, backend=BACKEND, options=_options(model))
    blocks = []
    for module in model.modules():
        if module._compiled_call_impl is not None and module not in before:
            blocks.append((module, module._compiled_call_impl))
    return blocks


def _options(model: nn.Module) -> dict[str, Any] | None:
    """Of the backend.

    On CPUs inductor (torch 2.13) loses gradients of channels-last convolutions, and would make all of them
    channels-last by itself.
    """
    if BACKEND != "inductor" or any(parameter.device.type != "cpu" for parameter in model.parameters()):
        return None
    if any(parameter.ndim == 4 and not parameter.is_contiguous() for parameter in model.parameters()):
        what = (
            "on a CPU torch.compile gave wrong gradients for a network in channels-last, as this "
            f"{type(model).__name__} is"
        )
        log.warning("compile: %s; compare them with compile=False, or use contiguous weights", what)
    return {"layout_optimization": False}


@contextmanager
def _limits() -> Iterator[None]:
    """Within the block, graphs allow a second backward pass, and are made for as many shapes as needed."""
    # Buffers of a graph are not donated: functorch would hand them to the first backward pass for reuse.
    with (
        torch._functorch.config.patch(donated_buffer=False),
        torch._dynamo.config.patch(recompile_limit=VARIANTS),
    ):
        yield


@contextmanager
def _timed(network: _Network, model: nn.Module, arguments: tuple) -> Iterator[None]:
    """Notes what the first call for these shapes and constants takes."""
    key = tuple(map(_constant, _pytree.tree_leaves(arguments)))
    if key in network.seconds:
        yield
        return
    started = time.perf_counter()
    yield
    network.seconds[key] = time.perf_counter() - started
    log.info("compiled %s: the first forward pass took %.1f s", type(model).__name__, network.seconds[key])


def _constant(leaf: Any) -> Any:
    """What a compiled graph holds of an argument: shape and dtype of a tensor, the value of anything else."""
    if isinstance(leaf, Tensor):
        return tuple(leaf.shape), leaf.dtype
    return leaf


def compile_seconds(model: Callable) -> float:
    """What the first calls of the compiled `model` took, together.

    What the first backward pass adds is not in it.
    """
    if not isinstance(model, nn.Module) or model not in _NETWORKS:
        return 0.0
    return sum(_NETWORKS[model].seconds.values())
