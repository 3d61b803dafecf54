"""Softmax attention (Vaswani et al. 2017, Eq. 1)."""

from __future__ import annotations

import torch
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """`softmax(scale query key') value`.

    Args:
        query: `[B, H, Sq, D]`.
        key, value: `[B, H, Sk, D]`.
    """
    return torch.softmax(scale * (query @ key.mT), dim=-1) @ value
