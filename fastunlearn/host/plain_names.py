"""Names of a network's tensors as they are without the wrappers that torch puts around modules.

`torch.compile(module)`, `DataParallel` and `DistributedDataParallel` are modules that hold the real one, so
every name in them has one part more (`_orig_mod.`, `module.`). What is written to disk has plain names: it
can be read into the same network in any other wrapping, or in none. Wrappers are known by their class, not by
these words: a network may well have a part of its own that is called `module`.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Collection, Mapping
from typing import Any

from torch import nn

PARALLEL = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def wrapper_classes() -> tuple[type[nn.Module], ...]:
    """`DataParallel`, `DistributedDataParallel`, and what `torch.compile` makes of a module."""
    # Importing the compiler takes a second; where nobody has, there is nothing compiled.
    compiler = sys.modules.get("torch._dynamo.eval_frame")
    if compiler is None:
        return PARALLEL
    return (*PARALLEL, compiler.OptimizedModule)


def attribute(module: nn.Module) -> str | None:
    """Under which name a wrapper holds what it wraps; None: `module` is no wrapper."""
    if not isinstance(module, wrapper_classes()):
        return None
    return "module" if isinstance(module, PARALLEL) else "_orig_mod"


def plain(module: nn.Module) -> nn.Module:
    """What is left of `module` without the wrappers around it; those of its parts stay."""
    while (inner := attribute(module)) is not None:
        module = module._modules[inner]
    return module


def plain_names(module: nn.Module, names: Collection[str]) -> dict[str, str]:
    """For each of `names` of tensors in `module.state_dict()` the name without wrappers."""
    wrappers = wrapper_classes()
    if not any(issubclass(kind, wrappers) for kind in set(map(type, module.modules()))):
        return dict(zip(names, names, strict=True))
    # Where the wrappers stand: beginnings of names, whose last word is the wrapper's own.
    insides = []
    for path, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, wrappers):
            insides.append(f"{path}.{attribute(part)}." if path else f"{attribute(part)}.")
    # Each of them takes one word out of the names that begin so: the one at its depth.
    plain_of = {}
    for name in names:
        dropped = {inside.count(".") - 1 for inside in insides if name.startswith(inside)}
        kept = [word for position, word in enumerate(name.split(".")) if position not in dropped]
        plain_of[name] = ".".join(kept)
    return plain_of


def plain_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of `module` by plain name, in the order of `module.parameters()`: tied ones once."""
    parameters = dict(module.named_parameters())
    return dict(zip(plain_names(module, parameters).values(), parameters.values(), strict=True))


def plain_state(module: nn.Module) -> dict[str, Any]:
    """`module.state_dict()` with plain names."""
    state = module.state_dict()
    return dict(zip(plain_names(module, state).values(), state.values(), strict=True))


def load_plain_state(module: nn.Module, state: Mapping[str, Any]) -> None:
    """`module.load_state_dict(state)` for a `state` of exactly the names of `plain_state(module)`."""
    names = plain_names(module, module.state_dict())
    module.load_state_dict({own: state[name] for own, name in names.items()})


def plain_copy(module: nn.Module) -> nn.Module:
    """A copy of `module` without wrappers, neither around it nor around its parts."""
    copied = copy.deepcopy(plain(module))
    for part in list(copied.modules()):
        for name, child in list(part._modules.items()):
            if child is not None and attribute(child) is not None:
                setattr(part, name, plain(child))
    return copied
