"""Buffers of a network, such as the averages of BatchNorm, which a call in training mode moves."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def buffers_put_back(model: Any) -> Iterator[None]:
    """Within the block calls of `model` may change its buffers; after it, and after an error, they are as
    before, in the same memory. What is no module has none.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    before = [
        (module, name, buffer, buffer.clone())
        for module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, values in before:
                buffer.copy_(values)
                # A call may have put another tensor in its place.
                module._buffers[name] = buffer
