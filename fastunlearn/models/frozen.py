"""A network as it is now, to compare with while it is trained."""

from __future__ import annotations

import copy

from torch import nn

from ..host import check
from ..step.predict import unsteady_modules
from ..step.trained import unwrapped


def frozen_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` that stays as it is: the `reference_model` of DPO, KTO and NPO.

    Until the first update both networks have equal losses, to the bit. So the copy keeps what torch chooses
    kernels by, though no step makes a graph of it and no optimizer has its weights:

    - the mode. In training mode a dropout of 0 copies what goes through it, and lays it out anew. Only layers
      that change results in that mode (active dropout, averages that each call moves) are in `eval()`;
    - `requires_grad` of the weights, by which torch picks matrix products.

    Args:
        model: perhaps in DistributedDataParallel; in the mode that it will be trained in.

    Returns:
        A network of its class, as large in memory.

    Raises:
        TypeError: `model` is no module.
    """
    network = unwrapped(model)
    if not isinstance(network, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {check.describe(network)}")
    frozen = copy.deepcopy(network)
    for found in list(unsteady_modules(frozen)):
        found.module.training = False
    return frozen
