"""Inner steps: updates on the forget gradient alone that are tried out before a step, and taken back.

They are ordinary steps, on the images and random numbers of the step that they stand before: micro-batches,
processes, precision and selections are those of any step. What they changed is put back bit for bit.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..host.buffers import buffers_put_back
from ..objective.draws import Draw, Draws
from ..objective.parameters import ParameterRule
from ..objective.protocol import Batch, Method, Pass, has_own_objective
from ..objective.schedule import NoiseSchedule
from .arrange import gradient_of
from .options import Settings
from .select import Moment
from .trained import Trained
from .wrappers import Forget


@dataclass(frozen=True)
class Correction(Method):
    """The forget gradient of `whole` alone, which then is the only one."""

    whole: Method
    name: ClassVar[str] = "correction"
    needs: ClassVar[frozenset[str]] = frozenset({"forget"})

    def draws(self) -> dict[str, Draw]:
        return self.whole.draws()

    def compose(self, batch: Batch, draws: Draws, schedule: NoiseSchedule) -> list[Pass]:
        combination = self.whole.combine
        passes = []
        for each in self.whole.compose(batch, draws, schedule):
            terms = tuple(
                replace(term, gradient=None)
                for term in each.terms
                if gradient_of(term, combination) == combination.gradients[0]
            )
            if terms:
                passes.append(replace(each, terms=terms))
        return passes


def loss_of_inner_steps(
    take_step: Callable,
    loss_of_step: Callable,
    trained: Trained,
    method: Method,
    schedule: NoiseSchedule,
    batch: Batch,
    draws: Draws,
    settings: Settings,
    moment: Moment,
) -> Tensor:
    """The forget loss after `method.inner_steps` updates on it, 0-d. Everything is as before then.

    It is that of the same noisy images which the step itself sees, so the two losses can be compared. A
    forward pass without a graph is enough for it.

    Raises:
        ValueError: before any work, where inner steps make no sense, or could not be taken back.
    """
    check_inner_steps(method, trained.optimizer, settings.rules)
    inner = Correction(method)
    arguments = inner, schedule, batch, draws, settings, moment
    with put_back(trained):
        alone = trained._replace(wrappers=[])
        for _ in range(method.inner_steps):
            take_step(alone, *arguments)
            # Where the caller has an autocast context around the step, torch keeps the weights in half.
            torch.clear_autocast_cache()
        return loss_of_step(alone, *arguments)


def check_inner_steps(
    method: Method, optimizer: torch.optim.Optimizer | None, rules: Sequence[ParameterRule]
) -> None:
    """
    Raises:
        ValueError: the method does not keep its forget gradient apart, there is no update to try out, or
            something takes part in it that keeps a state of its own.
    """
    obstacle = None
    working = [type(rule).__name__ for rule in rules if not rule.idle]
    if len(method.combine.gradients) < 2 or has_own_objective(method):
        obstacle = f"{type(method).__name__}, which is no sum of losses with the forget gradient apart"
    elif optimizer is None:
        obstacle = "optimizer None: there is no update to try out"
    elif working:
        obstacle = f"rules ({', '.join(working)}), whose state could not be taken back"
    elif any(isinstance(value, torch.optim.Optimizer) for value in vars(optimizer).values()):
        obstacle = f"{type(optimizer).__name__} around another optimizer, whose state could not be taken back"
    else:
        hooks = *optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values()
        # Those of the class Forget are our own, and look at what a wrapper of accelerate remembers.
        if not all(isinstance(hook, Forget) for hook in hooks):
            obstacle = "an optimizer with hooks, which would see steps that are taken back"
    if obstacle is not None:
        raise ValueError(f"inner_steps: expected 0 here, got {method.inner_steps} with {obstacle}")


@contextmanager
def put_back(trained: Trained) -> Iterator[None]:
    """Within the block a step may change what it wants; after it, and after an error, all is as before.

    That is weights, `.grad`, buffers of the network, state and options of the optimizer, the scaler, and
    torch's random numbers (of active dropout). Nothing waits for the device.
    """
    parameters, optimizer, scaler = trained.parameters, trained.optimizer, trained.grad_scaler
    weights = [parameter.detach().clone() for parameter in parameters]
    gradients = [parameter.grad for parameter in parameters]
    devices = [parameters[0].device] if parameters[0].device.type == "cuda" else []
    with (
        torch.random.fork_rng(devices=devices),
        buffers_put_back(trained.model),
        _lent(optimizer, parameters),
        _lent(scaler, parameters),
    ):
        for parameter in parameters:
            parameter.grad = None
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(parameters, weights)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            torch.clear_autocast_cache()


def _clones(state: Any) -> dict[int, Tensor]:
    """Copies of the tensors in `state` by identity, which deepcopy then need not make.

    It takes five times as long for each. What it alone would copy rightly is left to it: subclasses, tensors
    that share memory or have attributes of their own.
    """
    leaves = {id(leaf): leaf for leaf in tree_leaves(state) if type(leaf) is Tensor}
    owners = Counter(leaf.untyped_storage().data_ptr() for leaf in leaves.values())
    return {
        key: leaf.clone()
        for key, leaf in leaves.items()
        if owners[leaf.untyped_storage().data_ptr()] == 1 and not leaf.requires_grad and not vars(leaf)
    }


# What of an optimizer and a scaler an update changes. An optimizer may have tensors under other names, too.
CHANGED = ("state", "param_groups", "_scale", "_growth_tracker", "_per_optimizer_states")


@contextmanager
def _lent(owner: Any, parameters: list[nn.Parameter]) -> Iterator[None]:
    """Within the block the numbers of `owner` are copies. After it they are the objects that they were."""
    if owner is None:
        yield
        return
    before = dict(vars(owner))
    # The parameters themselves are named in the numbers of an optimizer, and are not copied.
    named = {id(parameter): parameter for parameter in parameters}
    for group in before.get("param_groups", []):
        named |= {id(parameter): parameter for parameter in group["params"]}
    changed = {name: value for name, value in before.items() if name in CHANGED or _holds_tensors(value)}
    vars(owner).update(copy.deepcopy(changed, named | _clones(changed)))
    try:
        yield
    finally:
        vars(owner).clear()
        vars(owner).update(before)


def _holds_tensors(value: Any) -> bool:
    """Whether `value` is a tensor, or a list or dict of nothing but such."""
    leaves = tree_leaves(value)
    return bool(leaves) and all(isinstance(leaf, Tensor) for leaf in leaves)
