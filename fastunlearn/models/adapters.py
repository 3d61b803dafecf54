"""Networks with adapters (LoRA and its kin): the network as it is without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..host import check
from ..step.trained import unwrapped


def without_adapters(model: nn.Module) -> Callable:
    """A function that calls `model` with its adapters switched off: the network before they were trained.

    It is the `reference_model` of DPO, KTO and NPO where adapters alone are trained, and takes no memory of
    its own. Adapters are those of peft, also where diffusers has added them (`model.add_adapter`): layers
    with a method `enable_adapters(enabled)`, which freezes what it switches off, and a property
    `disable_adapters`. After every call, also one that fails, they are as they were, with what of them is
    frozen.

    The function calls the very network that is trained: its dropout is active unless the network is in
    `eval()`, and it is not compiled, so that a compiled network and this one are equal up to rounding only.

    Args:
        model: called as `model(x_t, t, **kwargs)`; perhaps in DistributedDataParallel.

    Returns:
        A function of the arguments of `model`, with its output.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no adapters, or trains other weights beside them.
    """
    network = unwrapped(model)
    if not isinstance(network, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {check.describe(network)}")
    if not _adapters(network):
        expected = "expected a network with adapters (layers with enable_adapters, as those of peft)"
        raise ValueError(f"model: {expected}, got {type(network).__name__} without")
    # Without its adapters the network has to stay what it is.
    with _switched_off(network):
        trained = [name for name, weight in network.named_parameters() if weight.requires_grad]
    if trained:
        expected = "expected a network whose adapters alone are trained"
        raise ValueError(f"model: {expected}, got {trained[0]}, which is trained beside them")

    def base(*args, **kwargs):
        with _switched_off(network):
            return network(*args, **kwargs)

    return base


def _adapters(network: nn.Module) -> list[nn.Module]:
    # In diffusers' networks `disable_adapters` is a method of the whole; in a layer it says how it stands.
    return [
        module
        for module in network.modules()
        if callable(getattr(module, "enable_adapters", None))
        and isinstance(getattr(module, "disable_adapters", None), bool)
    ]


@contextmanager
def _switched_off(network: nn.Module) -> Iterator[None]:
    layers = [layer for layer in _adapters(network) if not layer.disable_adapters]
    weights = [weight for layer in layers for weight in layer.parameters()]
    trained = [weight.requires_grad for weight in weights]
    try:
        for layer in layers:
            layer.enable_adapters(False)
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)
        # peft thaws all of an adapter that it switches on, also what the caller had frozen.
        for weight, own in zip(weights, trained, strict=True):
            weight.requires_grad_(own)
