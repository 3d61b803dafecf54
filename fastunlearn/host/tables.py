"""Tables that are made once, and kept on each device that asks for them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# They stay: a CUDA graph reads them at the address that they had when it was captured.
_TABLES: dict[tuple, Tensor] = {}


def on_device(make: Callable[..., Tensor], arguments: tuple, device: torch.device) -> Tensor:
    """`make(*arguments)` on `device`. The first call copies it there, which waits; later ones do not.

    Args:
        arguments: hashable; equal ones have equal tables.
    """
    key = make, arguments, device
    if key in _TABLES:
        return _TABLES[key]
    table = make(*arguments).to(device)
    if type(table) is Tensor:  # that of a trace holds no numbers
        _TABLES[key] = table
    return table
