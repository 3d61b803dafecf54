"""Replay: the whole step as one CUDA graph, recorded once and launched again without Python.

Everything on the device is in it: draw, compose, predict, residual, combine, update. Nothing of it may depend
on the host: the step's number and seed are a counter on the device, which the graph itself advances, and
learning rates are read from device memory. What belongs to the host (EMA, scheduler of the learning rate,
step index) comes after, eagerly.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..host import check
from ..host.packed import Packed
from ..host.profiling import stage
from ..step.take import StepOutput
from ..step.wrappers import Forget

log = logging.getLogger("fastunlearn")

# Eager ones before a capture: kernels are compiled and chosen, the optimizer's state is made.
WARM_UP_STEPS = 3
# Exactly these: a subclass may do on the host what a graph would not repeat.
CAPTURABLE = (torch.optim.Adam, torch.optim.AdamW, torch.optim.SGD)
_REQUIRES_GRAD = attrgetter("requires_grad")
# Of a parameter group: parameters are compared by address, and learning rates are read from memory.
_NOT_CONSTANT = ("params", "lr", "initial_lr")


class Graphs(Protocol):
    """How device work is recorded. `CudaGraphs` is the real one; tests have one for CPUs."""

    def warm_up(self, function: Callable[[], Any]) -> Any:
        """Runs `function`, as a rehearsal of the capture."""

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        """Records the device work of `function` without doing it.

        The result does it, in the memory that `function` used.
        """


class CudaGraphs:
    """CUDA graphs on a stream of their own, as capture demands.

    A graph has a memory pool of its own, which goes with it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._stream = torch.cuda.Stream(device)

    def warm_up(self, function: Callable[[], Any]) -> Any:
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                return function()
        finally:
            # After an error, too: what the caller does next finds the weights at rest.
            current.wait_stream(self._stream)

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        with _recording(graph, self._stream):
            function()
        return graph.replay


# Graphs whose capture failed. Torch's allocator of pinned memory goes on asking them whether they capture,
# and nothing can tell it to stop: so they have to stay.
_UNFINISHED: list[torch.cuda.CUDAGraph] = []


@contextmanager
def _recording(graph: torch.cuda.CUDAGraph, stream: torch.cuda.Stream) -> Iterator[None]:
    """Within the block, work of the device is recorded in `graph` on `stream`; its memory is the graph's own.

    torch.cuda.graph does the same. But where CUDA ends a capture that went wrong (a tensor was read, say),
    the call that ends it in torch raises half-way (2.11 to 2.13): the stream stays current, and allocator and
    generator stay in the mode of capturing. Here all of that is as before when the block ends. An error of
    the block is the one raised, whatever follows from it.
    """
    device, pool = stream.device, torch.cuda.graph_pool_handle()
    torch.cuda.synchronize(device)
    # The pool is new memory: what lies around is given back first.
    gc.collect()
    torch.cuda.empty_cache()
    try:
        with torch.cuda.device(device), torch.cuda.stream(stream):
            # Of this thread alone: what the user's other threads do meanwhile (a DataLoader that pins memory)
            # is none of the graph's business.
            graph.capture_begin(pool=pool, capture_error_mode="thread_local")
            try:
                yield
            except BaseException:
                # CUDA complains where the error has ended the capture already.
                with suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
    except BaseException:
        _leave_capture(graph, device, pool)
        raise


def _leave_capture(graph: torch.cuda.CUDAGraph, device: torch.device, pool: tuple[int, int]) -> None:
    """What torch leaves undone where a capture could not be begun or ended."""
    # "Not currently recording" says that torch came as far as that: then the pool goes with the graph.
    try:
        torch._C._cuda_endAllocateToPool(device.index, pool)
    except RuntimeError:
        pass
    else:
        torch._C._cuda_releasePool(device.index, pool)
        _UNFINISHED.append(graph)
    # While it captures, dropout raises: the generator gets a fresh state, with the same seed and position.
    generator = torch.cuda.default_generators[device.index]
    generator.graphsafe_set_state(generator.clone_state())


# By type of device; rehearsals add tapes for CPUs.
RECORDERS: dict[str, Callable[[torch.device], Graphs]] = {"cuda": CudaGraphs}


class Replay:
    """Takes steps: the first few eagerly, then one that is captured, and from then on replays of it.

    Whatever the graph holds as a constant is compared at every step, on the host (0.15 ms for 700
    parameters): where it has changed, steps are eager again for the time of a warm-up, and then captured
    anew.

    Args:
        graphs: who records.
        optimizer: its learning rates may change from step to step; they are copied to the device when they
            do.
        tensors: parameters and buffers whose memory the graph reads and writes.
        required: a step that cannot be replayed is an error.
    """

    def __init__(
        self,
        graphs: Graphs,
        optimizer: torch.optim.Optimizer,
        tensors: Sequence[Tensor],
        *,
        required: bool = False,
    ):
        self.graphs, self.optimizer, self.tensors, self.required = graphs, optimizer, tuple(tensors), required
        # The learning rates, in float32: what fused optimizers read.
        count, device = len(optimizer.param_groups), self.tensors[0].device
        self._rates = torch.zeros(count, dtype=torch.float32, device=device)
        # What `_rates` holds.
        self._on_device: list[float | None] = [None] * len(self._rates)

        # What the graph holds as constants, and the graph; its outputs are overwritten by every replay.
        self._constants: tuple | None = None
        self._warm_up_left = WARM_UP_STEPS
        self._run: Callable[[], None] | None = None
        self._outputs: Packed | None = None
        # To capture: every step is eager.
        self.failed = False
        self._said: set[str] = set()
        # torch's mark that the optimizer has warned. It would warn of warm-up steps, which set `capturable`
        # and capture nothing, as is right.
        optimizer._warned_capturable_if_run_uncaptured = True

    @property
    def captured(self) -> bool:
        """Whether there is a graph: the next step is a replay, unless something has changed."""
        return self._run is not None

    def step(self, take: Callable[[], StepOutput], settings: tuple) -> StepOutput:
        """One step: what `take()` does on the device.

        Args:
            take: an eager step; not kept.
            settings: what else `take` reads on the host (hashable or not: compared with `==`).

        Raises:
            RuntimeError: the capture failed, and replay is required.
        """
        if self.failed:
            return take()
        constants = self._read_constants(settings)
        if constants != self._constants:
            if self._run is not None:
                changed = "settings of the step, its parameters or its optimizer have changed"
                log.info("replay: %s: the step is captured anew", changed)
            self._constants, self._warm_up_left = constants, WARM_UP_STEPS
            # The memory of the old graph is given back before the steps that need it.
            self._run = self._outputs = None
        self._fill_rates()
        if self._warm_up_left > 0:
            self._warm_up_left -= 1
            with self._rates_on_device():
                return _unpack(self.graphs.warm_up(lambda: _pack(take())))
        if self._run is None and not self._capture(take):
            return take()
        with stage("step (replayed)"):
            self._run()
        return _unpack(self._outputs)

    def set_aside(self, reason: str) -> None:
        """The caller takes this step eagerly.

        Raises:
            ValueError: replay is required.
        """
        if self.required:
            remedy = "replay=None takes such a step eagerly"
            raise ValueError(f"replay: expected a step that can be replayed, got {reason}; {remedy}")
        self._say(f"{reason}: such steps run eagerly")

    def _capture(self, take: Callable[[], StepOutput]) -> bool:
        """Whether there is a graph of the step now."""

        def record() -> None:
            self._outputs = _pack(take())

        # Errors are of many kinds: a model that reads a tensor, memory that does not suffice.
        try:
            with self._rates_on_device():
                self._run = self.graphs.capture(record)
        except Exception as error:
            what = f"the step could not be captured in a CUDA graph ({type(error).__name__}: {error})"
            if self.required:
                raise RuntimeError(f"replay: {what}; replay=None or False runs it eagerly") from error
            log.warning("replay: %s: it runs eagerly from now on", what)
            self._outputs, self.failed = None, True
        # What the error kept of the graph's memory.
        if self.failed:
            gc.collect()
        return not self.failed

    def _read_constants(self, settings: tuple) -> tuple:
        """What a graph holds as a constant, to be compared with `==`."""
        # Hyperparameters by value. Learning rates are read from memory: only where they lie is a constant.
        options, places = [], []
        for group in self.optimizer.param_groups:
            options.append({name: value for name, value in group.items() if name not in _NOT_CONSTANT})
            rate = group["lr"]
            place = rate.data_ptr() if self._is_ours(rate) else None
            places.append((len(group["params"]), place))
        # The optimizer's state by identity: load_state_dict makes another.
        return (
            settings,
            options,
            places,
            _Same(self.optimizer.state),
            list(map(Tensor.data_ptr, self.tensors)),
            list(map(_REQUIRES_GRAD, self.tensors)),
        )

    def _is_ours(self, rate: float | Tensor) -> bool:
        """Whether a learning rate lies on our device already: whoever put it there fills it."""
        return isinstance(rate, Tensor) and rate.device == self._rates.device

    def _fill_rates(self) -> None:
        for index, group in enumerate(self.optimizer.param_groups):
            if not self._is_ours(group["lr"]) and float(group["lr"]) != self._on_device[index]:
                self._on_device[index] = float(group["lr"])
                # A kernel with a number: nothing is copied from the host.
                self._rates[index].fill_(self._on_device[index])

    @contextmanager
    def _rates_on_device(self) -> Iterator[None]:
        """Within the block the optimizer reads its learning rates from the device.

        Schedulers and checkpoints, outside of it, see the numbers that they know.
        """
        groups = self.optimizer.param_groups
        before = [{name: group[name] for name in ("lr", "capturable") if name in group} for group in groups]
        for rate, group in zip(self._rates.unbind(), groups, strict=True):
            if not self._is_ours(group["lr"]):
                group["lr"] = rate
            if "capturable" in group:
                group["capturable"] = True
        try:
            yield
        finally:
            for group, values in zip(groups, before, strict=True):
                group.update(values)

    def _say(self, what: str) -> None:
        """Says it in the log, once."""
        if what not in self._said:
            self._said.add(what)
            log.info("replay: %s", what)


class _Same:
    """Equal to itself alone: compares what it holds by identity."""

    def __init__(self, value: object):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value

    __hash__ = None


def _pack(output: StepOutput) -> Packed:
    """So that one copy takes the numbers out of a graph's memory."""
    return Packed.of({name: value for name, value in output._asdict().items() if value is not None})


def _unpack(packed: Packed) -> StepOutput:
    return StepOutput(**dict.fromkeys(StepOutput._fields) | packed.unpacked())


def make_replay(
    requested: bool | None,
    model: Callable,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    *,
    forbidden: str | None = None,
) -> Replay | None:
    """The `Replay` of a run on `device`; None: its steps are eager.

    Args:
        requested: None: on a GPU, where nothing stands against it (else the log says what, once); True: in
            any case; False: not at all.
        forbidden: what the caller knows to stand against it.

    Raises:
        TypeError: `requested` is something else.
        ValueError: `requested` is True, and something stands against it.
    """
    if requested not in (None, True, False):
        raise TypeError(f"replay: expected None, True or False, got {requested!r}")
    if requested is False or (requested is None and device.type not in RECORDERS):
        return None
    obstacle = _obstacle(model, optimizer, device) or forbidden
    if obstacle is None:
        tensors = [*model.parameters(), *model.buffers()]
        return Replay(RECORDERS[device.type](device), optimizer, tensors, required=bool(requested))
    if requested:
        raise ValueError(f"replay: expected a step that a CUDA graph can hold, got {obstacle}")
    log.info("replay: the step runs eagerly: %s", obstacle)
    return None


def _obstacle(model: Callable, optimizer: torch.optim.Optimizer, device: torch.device) -> str | None:
    """What of a run a CUDA graph cannot hold; None: nothing."""
    if device.type not in RECORDERS:
        return f"parameters on {device}"
    if type(optimizer) not in CAPTURABLE or not all(group.get("fused") for group in optimizer.param_groups):
        names = ", ".join(f"{kind.__name__}(fused=True)" for kind in CAPTURABLE)
        given = f"the optimizer {type(optimizer).__name__}, which is none of {names}"
        return f"{given}: its step waits for the device"
    if check.values_enabled():
        return "FASTUNLEARN_CHECK=1, whose checks read the device"
    hooks = *optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()
    # Hooks of the class Forget are our own: an Unlearner does without them.
    if not all(isinstance(hook, Forget) for hook in hooks):
        return "an optimizer with hooks, which a replayed step would not call"
    if not isinstance(model, nn.Module):
        return f"a model that is no torch.nn.Module, but {type(model).__name__}"
    for name, module in model.named_modules():
        hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_hf_hook")
        if any(getattr(module, hook, None) for hook in hooks):
            where = name or type(module).__name__
            return f"a model with hooks ({where}), which a replayed step would not call"
    if _elsewhere(model, device):
        return "a model that is not on one device as a whole"
    return None


def _elsewhere(model: nn.Module, device: torch.device) -> bool:
    """Whether a parameter or a buffer is not on `device`."""
    return any(tensor.device != device for tensor in (*model.parameters(), *model.buffers()))
