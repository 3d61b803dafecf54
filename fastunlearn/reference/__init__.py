"""The formulas of the papers, literally, in plain eager torch: the oracle of the tests.

Nothing here is fast, and nothing here is rearranged: each file computes one op, the way its equation is
printed, on tensors of any floating dtype (float64 makes it the truth). The package never calls it unless
asked; the tests compare every faster form with it.

Shared conventions: `[B]` is the batch, `...` the axes of one image (or latent), `||.||^2` sums over those
axes, losses are sums over elements and means over the batch. `alpha_t, sigma_t` come from a `NoiseSchedule`
in float64 and are rounded once to the dtype of the images.
"""

from __future__ import annotations

from .mixture import Mixture, mixture
from .noising import noising, prediction_target
from .redirect import Redirect, redirect
from .redirect_to_all import RedirectToAll, redirect_to_all
from .residual import denoising_loss

__all__ = [
    "Mixture",
    "Redirect",
    "RedirectToAll",
    "denoising_loss",
    "mixture",
    "noising",
    "prediction_target",
    "redirect",
    "redirect_to_all",
]
