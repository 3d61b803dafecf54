"""What waits for the device, and what a CUDA graph would record, seen on a machine without one: by looking at
every op that torch dispatches.

On a CPU nothing waits, so reading a tensor goes unnoticed there; these modes make it an error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Their result is a Python number.
_VALUES = ("_local_scalar_dense", "item", "is_nonzero", "equal", "allclose")
# The shape of their result is data.
_SHAPES = (
    "nonzero",
    "nonzero_numpy",
    "argwhere",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique",
    "_unique2",
    "unique_dim_consecutive",
    "bincount",
    "histc",
    "repeat_interleave",
)
_READS = tuple(
    getattr(Tensor, name)
    for name in (
        "item",
        "tolist",
        "numpy",
        "cpu",
        "__bool__",
        "__float__",
        "__int__",
        "__index__",
        "__array__",
    )
)
# on a GPU: from pageable host memory
_COPIES = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.asarray)


class HostSync(AssertionError):
    """An op that would wait for the device."""


def refuse(op: torch._ops.OpOverload, args: tuple, kwargs: dict, device: str = "cpu") -> None:
    """
    Raises:
        HostSync: if tensors on `device` lay on a GPU, `op` with these arguments would make the host wait for
            it.
    """
    name = op.overloadpacket.__name__
    _refuse_copy(op, name, args, kwargs)
    if not any(tensor.device.type == device for tensor in _tensors((args, kwargs))):
        return
    if name in _VALUES or (
        name in _SHAPES and not (name == "repeat_interleave" and kwargs.get("output_size") is not None)
    ):
        raise HostSync(f"{op} waits for the device")
    if name.startswith(("index", "_index", "_unsafe_index")) and any(
        index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1:2])
    ):
        raise HostSync(f"{op} with a mask as index waits for the device: its shape is data")


def _refuse_copy(op: torch._ops.OpOverload, name: str, args: tuple, kwargs: dict) -> None:
    target = kwargs.get("device")
    if name == "_to_copy" and target is not None and torch.device(target) != args[0].device:
        raise HostSync(f"{op} from {args[0].device} to {target} waits for the device")
    if name == "copy_" and args[0].device != args[1].device and not (len(args) > 2 and args[2]):
        raise HostSync(f"{op} from {args[1].device} to {args[0].device} waits for the device")


class NoHostSync(TorchDispatchMode):
    """Within the block, `HostSync` where an op would wait for the device: forward, backward (on a CPU it runs
    in the same thread) and optimizer.

    This package's own ops are looked into; other ops written in C++ are taken at their word. What never gets
    to the dispatcher on a CPU (`tolist()`, `.cpu()`, `torch.tensor(...)`) is seen by `no_host_sync()`.

    Args:
        device: the type of device whose tensors stand for those on a GPU: `"cpu"`, or `"meta"`, which leaves
            the CPU what it is, the host.
    """

    def __init__(self, device: str = "cpu"):
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        refuse(func, args, kwargs, self.device)
        return self.run(func, args, kwargs)

    def run(self, func, args: tuple, kwargs: dict):
        """`func`; of an op of this package every op within."""
        if func.namespace != "fastunlearn":
            return func(*args, **kwargs)
        device = _tensors(args)[0].device.type
        keys = torch._C.DispatchKeySet(
            torch._C.DispatchKey.Meta if device == "meta" else torch._C.DispatchKey.CPU
        )
        with self:
            return func.redispatch(keys, *args, **kwargs)


class _NoReads(TorchFunctionMode):
    def __init__(self, device: str):
        super().__init__()
        self.device = device

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if (func in _READS and args[0].device.type == self.device) or func in _COPIES:
            raise HostSync(f"{getattr(func, '__qualname__', func)} waits for the device")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_host_sync(device: str = "cpu") -> Iterator[None]:
    """Within the block, `HostSync` where something would wait for the device if the tensors on `device` lay
    on one; see `NoHostSync`.
    """
    with _NoReads(device), NoHostSync(device):
        yield


class Tape(NoHostSync):
    """What a CUDA graph is, on a CPU: the ops of a block with the memory that they read and wrote, to be run
    again without any Python between them.

    As with a graph, recording leaves no trace: what existed before has its values back when the block ends.
    Temporaries keep their memory.
    """

    def __init__(self):
        super().__init__()
        self._calls: list[tuple[Callable, tuple, dict, list]] = []
        # storage -> whole of it, and a copy: of what was there before it was written to
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        self._own: set[int] = set()  # storages made while recording

    def run(self, func, args: tuple, kwargs: dict):
        for tensor in _written(func, args, kwargs):
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in self._own | set(self._before):
                whole = torch.empty(0, dtype=torch.uint8).set_(storage)
                self._before[storage.data_ptr()] = whole, whole.clone()
        known = {_memory(tensor) for tensor in _tensors((args, kwargs))}
        result = func(*args, **kwargs)
        outputs = [tensor.detach() for tensor in _tensors(result)]
        self._own |= {_memory(tensor) for tensor in outputs} - known
        self._calls.append((func, args, kwargs, outputs))
        return result

    def __exit__(self, *exception):
        super().__exit__(*exception)
        for whole, copy in self._before.values():
            whole.copy_(copy)

    def replay(self) -> None:
        """Runs the recorded ops again, on the same memory."""
        with torch.no_grad():
            for func, args, kwargs, outputs in self._calls:
                for output, again in zip(outputs, _tensors(func(*args, **kwargs)), strict=True):
                    if output.data_ptr() != again.data_ptr():
                        output.copy_(again)


class TapeGraphs:
    """`fastunlearn.engine.replay.Graphs` for CPUs. What is captured must not wait for the device."""

    def __init__(self):
        self.warm_ups = self.captures = self.replays = 0

    def warm_up(self, function: Callable[[], Any]) -> Any:
        self.warm_ups += 1
        return function()

    def capture(self, function: Callable[[], None]) -> Callable[[], None]:
        self.captures += 1
        # Dynamo gives up a frame for good when it meets it under a tape: compiled code runs eagerly there.
        with torch.compiler.set_stance("force_eager"), _NoReads("cpu"), Tape() as tape:
            function()

        def replay() -> None:
            self.replays += 1
            tape.replay()

        return replay


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _written(func, args: tuple, kwargs: dict) -> list[Tensor]:
    """The arguments that `func` writes to."""
    schema = func._schema.arguments
    values = [
        args[index] if index < len(args) else kwargs.get(argument.name)
        for index, argument in enumerate(schema)
    ]
    return _tensors(
        [
            value
            for argument, value in zip(schema, values, strict=True)
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
    )
