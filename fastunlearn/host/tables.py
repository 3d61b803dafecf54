"""Tables that are made once, and kept on each device that asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MOST = 256  # tables that are kept for whoever asks next

# In order of use, the latest last: one that nobody has asked for while `MOST` others were used goes.
_TABLES: dict[tuple, Tensor] = {}

# A CUDA graph reads a table at the address that it had when it was captured, and holds no reference to it.
# Whose graph it is (an Unlearner's, or a loop's own torch.cuda.graph) is not known here, nor when it goes: so
# these stay. There are as many as captures, not as steps, since one that takes another window is no replay.
_CAPTURED: dict[tuple, Tensor] = {}


def on_device(make: Callable[..., Tensor], arguments: tuple, device: torch.device) -> Tensor:
    """`make(*arguments)` on `device`. The first call copies it there, which waits; later ones do not.

    Args:
        arguments: hashable; equal ones have equal tables.
    """
    key = make, arguments, device
    table = _CAPTURED.get(key)
    if table is not None:
        return table
    table = _TABLES.pop(key, None)
    if table is None:
        table = make(*arguments).to(device)
    if type(table) is not Tensor:  # that of a trace holds no numbers
        return table
    if _captures(device):
        _CAPTURED[key] = table
        return table
    _TABLES[key] = table
    while len(_TABLES) > MOST:
        _TABLES.pop(next(iter(_TABLES)), None)
    return table


def _captures(device: torch.device) -> bool:
    """Whether work of the device is being recorded in a CUDA graph."""
    if device.type != "cuda" or not torch.cuda.is_initialized():
        return False
    return torch.cuda.is_current_stream_capturing()
