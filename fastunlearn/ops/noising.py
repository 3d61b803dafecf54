"""noising: `x_t = alpha_t x_0 + sigma_t eps`."""

from __future__ import annotations

import torch
from torch import Tensor

from ._library import define, per_row


def noising(images: Tensor, noise: Tensor, coefficients: Tensor) -> Tensor:
    """`x_t` `[B, C, H, W]` from clean `images`, `noise` of that shape and `NoiseSchedule.coefficients` `[B, 5]`."""
    return _op(images, noise, coefficients)


def _eager(images: Tensor, noise: Tensor, coefficients: Tensor) -> Tensor:
    return torch.addcmul(per_row(coefficients[:, 0], images) * images, per_row(coefficients[:, 1], images), noise)


_op = define("noising", "(Tensor images, Tensor noise, Tensor coefficients) -> Tensor", _eager, lambda images, noise, coefficients: torch.empty_like(images))
