"""Number formats and memory layouts of a run: what `"auto"` means, and the switch for TensorFloat-32."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch

from . import check

AUTOCAST_DTYPES = (torch.bfloat16, torch.float16)
MEMORY_FORMATS = (torch.contiguous_format, torch.channels_last)


def resolve_autocast(
    requested: Literal["auto"] | torch.dtype | None, device: torch.device | str
) -> torch.dtype | None:
    """The dtype in which autocast runs the network on `device`, or None for no autocast.

    Weights, losses and norms stay float32 either way.

    `"auto"` is bfloat16 on GPUs that compute in it (compute capability 8.0 and up, and AMD's), and None
    elsewhere. On an H100 a replayed step with the papers' MNIST network takes 0.54 of the time of float32
    (neither compiled). On a CPU (Zen 5, contiguous weights, forward, backward and AdamW) bfloat16 takes 0.65
    of the time of float32 with the papers' MNIST network and 0.73 with the demo's, so it is worth asking for;
    but 2.4 and 13 times as long where oneDNN is held to AVX-512 without bfloat16 and to AVX2. A CPU run's
    numbers are float32's unless something else is asked for.

    Raises:
        TypeError, ValueError: `requested` is something else.
    """
    expected = "torch.bfloat16, torch.float16, 'auto' or None"
    if requested is None or not _is_auto("autocast_dtype", requested, AUTOCAST_DTYPES, expected):
        return requested
    device = torch.device(device)
    if device.type != "cuda":
        return None
    with torch.cuda.device(device):  # torch asks about the current one
        computes_in_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if computes_in_bfloat16 else None


def memory_format(
    requested: Literal["auto"] | torch.memory_format, device: torch.device | str
) -> torch.memory_format:
    """The memory format for a network's weights on `device`. Its activations follow.

    Used as `model.to(memory_format=memory_format("auto", device))`.

    `"auto"` is channels-last on GPUs, whose half-precision convolutions are written for it. With the papers'
    MNIST network, the only one measured, it was the slower choice: 1.15 of the contiguous time in bfloat16
    (H200), 1.13 in float32 (H100), replayed. `"auto"` is contiguous on CPUs: there (Zen 5, forward, backward
    and AdamW, float32) channels-last takes 1.00 of the time with the papers' MNIST network and 0.98 to 1.04
    with the demo's, but 1.2 under bfloat16 autocast.

    Raises:
        TypeError, ValueError: `requested` is something else.
    """
    expected = "torch.channels_last, torch.contiguous_format or 'auto'"
    if not _is_auto("memory_format", requested, MEMORY_FORMATS, expected):
        return requested
    return torch.channels_last if torch.device(device).type == "cuda" else torch.contiguous_format


def _is_auto(argument: str, requested, choices: tuple, expected: str) -> bool:
    """Whether `requested` is `"auto"` and not one of `choices`; anything else is refused."""
    if isinstance(requested, type(choices[0])):
        if requested not in choices:
            raise ValueError(f"{argument}: expected {expected}, got {requested}")
        return False
    if not isinstance(requested, str):
        raise TypeError(f"{argument}: expected {expected}, got {check.describe(requested)}")
    if requested != "auto":
        raise ValueError(f"{argument}: expected {expected}, got {requested!r}")
    return True


@contextmanager
def tf32(enabled: bool | None) -> Iterator[None]:
    """Within the block float32 products and convolutions may (True) or must not (False) be rounded.

    They are then rounded to TensorFloat-32, which keeps 10 bits. None leaves torch's settings alone: by
    default NVIDIA GPUs round convolutions and not products. Products on CPUs are set too; few can do it.
    Only float32 is concerned: under autocast little of a network is.

    The settings are the process's. Where several threads are inside at once, nothing is rounded while one of
    them must not be; whoever leaves last, in any order, the settings are then those that the first one found.

    torch has two generations of this switch, and reading an old one (`allow_tf32`,
    `get_float32_matmul_precision`) that disagrees with a new one (`fp32_precision`) is an error, which the
    compiler runs into (pytorch issue 166387). So both are set here, and both come back as they were; an old
    one that could not be read before follows the new one.

    Raises:
        TypeError: `enabled` is neither a bool nor None.
    """
    if enabled is not None and not isinstance(enabled, bool):
        raise TypeError(f"tf32: expected True, False or None, got {check.describe(enabled)}")
    if enabled is None:
        yield
        return
    block = _enter(enabled)
    try:
        yield
    finally:
        _leave(block)


@dataclass(eq=False)
class _Block:
    """Somebody inside `tf32`."""

    enabled: bool
    thread: int
    found: _Switches  # the settings when it was entered


_LOCK = threading.Lock()
_BLOCKS: list[_Block] = []  # in the order in which they were entered


def _enter(enabled: bool) -> _Block:
    """Notes what was set, and sets what all who are inside allow."""
    with _LOCK:
        block = _Block(enabled, threading.get_ident(), _Switches.read())
        _BLOCKS.append(block)
        _Switches.of(_rounded()).write()
    return block


def _leave(block: _Block) -> None:
    """Sets what those allow who stay; what the first one found, where nobody does."""
    with _LOCK:
        place = _BLOCKS.index(block)
        _BLOCKS.remove(block)
        latest = place == len(_BLOCKS)
        # The last of all, or nested in another block of its thread: everything is as it was.
        if latest and (not _BLOCKS or _BLOCKS[-1].thread == block.thread):
            block.found.write()
            return
        # What the next one found was this one's doing: it takes over what this one found.
        if not latest:
            _BLOCKS[place].found = block.found
        _Switches.of(_rounded()).write()


def _rounded() -> bool:
    """Whether all who are inside allow it; of several blocks in a thread the innermost counts."""
    innermost = {block.thread: block.enabled for block in _BLOCKS}
    return all(innermost.values())


class _Switches(NamedTuple):
    """torch's settings of both generations."""

    products: str
    convolutions: bool
    operations: tuple[str, ...]  # of `_operations()`

    @classmethod
    def of(cls, enabled: bool) -> _Switches:
        wanted = "tf32" if enabled else "ieee"
        return cls("high" if enabled else "highest", enabled, (wanted,) * len(_operations()))

    @classmethod
    def read(cls) -> _Switches:
        operations = tuple(operation.fp32_precision for operation in _operations())
        follows = "high" if operations[0] == "tf32" else "highest"
        products = _read_old(torch.get_float32_matmul_precision, follows)
        convolutions = _read_old(lambda: torch.backends.cudnn.allow_tf32, operations[1] == "tf32")
        return cls(products, convolutions, operations)

    def write(self) -> None:
        # The old ones first: they write the new ones too.
        torch.set_float32_matmul_precision(self.products)
        torch.backends.cudnn.allow_tf32 = self.convolutions
        for operation, precision in zip(_operations(), self.operations, strict=True):
            operation.fp32_precision = precision


def _operations() -> tuple:
    """What the new generation sets apart."""
    cudnn = torch.backends.cudnn
    return torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn, torch.backends.mkldnn.matmul


def _read_old(read: Callable, follow):
    """What `read` returns, or `follow` where torch refuses because old and new switches disagree."""
    try:
        return read()
    except RuntimeError:
        return follow
