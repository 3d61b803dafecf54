"""Networks with adapters (LoRA and its kin): the network as it is without them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from ..host import check
from ..step.predict import unsteady_modules
from ..step.trained import unwrapped


def without_adapters(model: nn.Module) -> Callable:
    """A function that calls `model` with its adapters switched off: the network before they were trained.

    It is the `reference_model` of DPO, KTO and NPO where adapters alone are trained, and takes no memory of
    its own. Adapters are those of peft, also where diffusers has added them (`model.add_adapter`): layers
    with a method `enable_adapters(enabled)`, which freezes what it switches off, and a property
    `disable_adapters`. After every call, also one that fails, they are as they were, with what of them is
    frozen.

    Without its adapters the network is what it was if they began as nothing, as LoRA's do unless peft is told
    otherwise (`init_lora_weights`). During a call no dropout is active, and no averages move. The function is
    not compiled, so that a compiled network and this one are equal up to rounding only.

    Args:
        model: called as `model(x_t, t, **kwargs)`; perhaps in DistributedDataParallel.

    Returns:
        A function of the arguments of `model`, with its output.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no adapters, or trains other weights beside them; or one of them would be missing
            in what the network was: it is not trained, or merged into the weights.
    """
    network = unwrapped(model)
    if not isinstance(network, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {check.describe(network)}")
    layers = _adapters(network)
    if not layers:
        expected = "expected a network with adapters (layers with enable_adapters, as those of peft)"
        raise ValueError(f"model: {expected}, got {type(network).__name__} without")
    _check_trained(layers)
    # Without its adapters the network has to stay what it is.
    with _switched_off(network):
        trained = [name for name, weight in network.named_parameters() if weight.requires_grad]
    if trained:
        expected = "expected a network whose adapters alone are trained"
        raise ValueError(f"model: {expected}, got {trained[0]}, which is trained beside them")

    def base(*args, **kwargs):
        with _switched_off(network), _steady(network):
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


def _check_trained(layers: list[nn.Module]) -> None:
    """
    Raises:
        ValueError: an adapter that is on belongs to the network as it was.
    """
    if any(getattr(layer, "merged", False) for layer in layers):
        expected = "expected adapters beside the weights"
        raise ValueError(
            f"model: {expected}, got some that are merged into them (unmerge_adapter() undoes it)"
        )
    # A layer of peft may have several adapters, whose names stand in those of their weights.
    trained: dict[str, bool] = {}
    for layer in layers:
        if layer.disable_adapters:
            continue
        for name in getattr(layer, "active_adapters", ()):
            trained.setdefault(name, False)
            for path, weight in layer.named_parameters():
                if name in path.split("."):
                    trained[name] |= weight.requires_grad
    kept = [name for name, any_weight in trained.items() if not any_weight]
    if kept:
        expected = (
            "expected adapters that are all trained (merge_and_unload() makes others part of the network)"
        )
        raise ValueError(f"model: {expected}, got {kept[0]!r}, which is not, and would be switched off too")


@contextmanager
def _steady(network: nn.Module) -> Iterator[None]:
    """Without what makes a call of `network` change it, or differ from the next one."""
    modules = [found.module for found in unsteady_modules(network)]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module in modules:
            module.training = True


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
