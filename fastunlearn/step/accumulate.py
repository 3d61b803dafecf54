"""Backward passes, which accumulate one gradient or two, and the mean of gradients over processes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..host import say
from ..host.tensor_lists import multiply, portions, total_norm
from ..objective.combine import Combination, Combined, Sum
from ..objective.parameters import ParameterRule, overrides

MISSING = (
    "%d parameters get no gradient: every step waits for the device to learn whether they have one in "
    "another process; requires_grad_(False) avoids it"
)
SUM = Sum()
REDUCED_AT_ONCE = 64 << 20  # Bytes of gradients in one all-reduce.

# What torch says of a network whose backward pass is not the step's to take, and what that means here.
REFUSED_BACKWARD = {
    "use_reentrant": (
        "model: expected activation checkpoints with use_reentrant=False (in diffusers and transformers an "
        "argument of what enables gradient checkpointing), got reentrant ones, which cannot go back for the "
        "trained parameters alone"
    ),
    "backward through the graph a second time": (
        "model: expected an output whose graph is that of its own call, got one that shares a part with "
        "another call of the step (something with a graph that was computed before, such as a text "
        "embedding: detach() it, or compute it inside of the model)"
    ),
}


class Accumulator:
    """Backward passes for the gradients of a combination, and how they become one gradient in `.grad`.

    Of two gradients the first is the correction, the second the main one. With `in_place` all passes of the
    correction come first: it is then scaled where it lies, and the main gradient is added to it. Otherwise
    the two have a set of buffers each, swapped between `.grad` and here, never copied.

    Args:
        combination: names the gradients.
        unit: 0-d; the correction was computed divided by it.
        loss_scale: all gradients are multiplied by it.
        group: processes whose mean the gradients are; each gradient is reduced before its norm is taken.
        rules: those with a `restrict` see each gradient apart, before its norm is taken, so they rule out
            `in_place`.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        combination: Combination = SUM,
        *,
        in_place: bool = False,
        unit: Tensor | float = 1.0,
        loss_scale: Tensor | float = 1.0,
        group: dist.ProcessGroup | None = None,
        rules: Sequence[ParameterRule] = (),
    ):
        self.parameters = list(parameters)
        self.combination, self.unit, self.loss_scale, self.group = combination, unit, loss_scale, group
        for parameter in self.parameters:
            parameter.grad = None
        self._restricting = [rule for rule in rules if overrides(rule, "restrict") and not rule.idle]

        # Buffers of the gradient that is not in `.grad` now.
        self._parked: list[Tensor | None] = [None] * len(self.parameters)
        # The report, once there is nothing left to combine.
        self._combined: Combined | None = None
        if len(combination.gradients) == 1:
            self._correction, self._main = None, combination.gradients[0]
            self._in_place, self._combined = False, Combined()
        else:
            self._correction, self._main = combination.gradients
            # What needs both gradients at once cannot begin with one, and a mask acts on each of them alone.
            self._in_place = in_place and not combination.needs_main and not self._restricting

        # The gradient that backward passes add to `.grad`.
        self._current = self._correction if self._in_place else self._main

    def backward(self, prediction: Tensor, gradients: dict[str, Tensor]) -> None:
        """Adds to each of the `gradients` what its d loss / d prediction brings.

        Two of one prediction take two passes over its graph: the correction first.
        """
        names = [name for name in self.combination.gradients if name in gradients]
        for name in names:
            self._select(name)
            self._back(prediction, gradients[name], retain_graph=name != names[-1])

    def _back(self, prediction: Tensor, gradient: Tensor, *, retain_graph: bool) -> None:
        try:
            torch.autograd.backward(prediction, gradient, retain_graph=retain_graph, inputs=self.parameters)
        except RuntimeError as error:
            for text, explanation in REFUSED_BACKWARD.items():
                if text in str(error):
                    raise ValueError(explanation) from error
            raise

    def finish(self) -> Combined:
        """Leaves the combined gradient in `.grad`: of all processes, still multiplied by the loss scale."""
        self._select(self._main)
        self._reduce()
        self.restrict()
        if self._combined is None:
            self._combined = self._merge()
        return self._combined

    def _merge(self) -> Combined:
        """Adds the parked correction to the main gradient: `main - f correction` is left in `.grad`.

        The main gradient may have a factor, too.
        """
        # The correction comes into `.grad`, the main gradient into the parked buffers.
        self._swap()
        self._reduce()
        self.restrict()
        norm = total_norm(self._present(), self._device)
        present = [parameter.grad for parameter in self.parameters]
        factor, main_factor = self.combination.factors(
            norm, self._parked, present, self.loss_scale, self.unit
        )

        # A parameter may have one of the two gradients alone.
        mains, corrections, alone, main_alone = [], [], [], []
        for main, parameter in zip(self._parked, self.parameters, strict=True):
            if parameter.grad is None:
                if main is not None:
                    main_alone.append(main)
            elif main is None:
                alone.append(parameter.grad)
            else:
                mains.append(main)
                corrections.append(parameter.grad)
        if main_factor is not None:
            multiply(mains + main_alone, main_factor)
        multiply(alone, -factor)

        # One pass over both; on GPUs foreach has a fast way for tensors of equal shapes only.
        if mains and self._device.type == "cpu":
            torch._foreach_addcmul_(mains, corrections, [(-factor).to(main.dtype) for main in mains])
        elif mains:
            multiply(corrections, -factor)
            torch._foreach_add_(mains, corrections)
        for parameter, main in zip(self.parameters, self._parked, strict=True):
            if main is not None:
                parameter.grad = main
        self._parked = [None] * len(self.parameters)
        return self._report(norm, factor, main_factor)

    def _select(self, name: str) -> None:
        """Lets backward passes accumulate the gradient `name`."""
        if name == self._current:
            return
        if not self._in_place:
            self._swap()
        elif name == self._correction:
            raise RuntimeError("the correction was complete: its passes come first")
        else:
            self._settle()
        self._current = name

    def _settle(self) -> None:
        """Makes the complete correction in `.grad`, g_a, to -f g_a, to which the main gradient is added."""
        self._reduce()
        correction = self._present()
        norm = total_norm(correction, self._device)
        factor, _ = self.combination.factors(norm, [], [], self.loss_scale, self.unit)
        multiply(correction, -factor)
        self._combined = self._report(norm, factor)

    def _report(self, norm: Tensor, factor: Tensor, main_factor: Tensor | None = None) -> Combined:
        # The correction was computed as `g_a loss_scale / unit`: f holds for `g_a / unit`.
        return Combined(norm * self.unit / self.loss_scale, factor / self.unit, factor, main_factor)

    def _swap(self) -> None:
        for index, parameter in enumerate(self.parameters):
            parameter.grad, self._parked[index] = self._parked[index], parameter.grad

    def _present(self) -> list[Tensor]:
        return [parameter.grad for parameter in self.parameters if parameter.grad is not None]

    def _reduce(self) -> None:
        """Makes `.grad` the mean over the processes.

        A gradient that is missing here counts as zero; one that is missing everywhere stays missing, since an
        optimizer would decay the parameter of a zero one.
        """
        if self.group is None:
            return
        # All processes reduce the same tensors: zeros where a gradient is missing, and a count of who has it.
        missing = [index for index, parameter in enumerate(self.parameters) if parameter.grad is None]
        present = torch.ones(len(self.parameters), device=self._device)
        for index in missing:
            self.parameters[index].grad = torch.zeros_like(self.parameters[index])
            present[index].zero_()
        reduce_mean([*self._present(), present], self.group)
        if missing:
            if self._device.type != "cpu":
                say.once(MISSING, len(missing))
            shares = present.tolist()
            for index in missing:
                if shares[index] == 0:
                    self.parameters[index].grad = None

    def restrict(self) -> None:
        """Lets the rules on parameters change what lies in `.grad`."""
        # A tuple, and nothing is taken back: what a rule does not do in place would be lost without a word.
        gradients = tuple(parameter.grad for parameter in self.parameters)
        for rule in self._restricting:
            if rule.restrict(self.parameters, gradients) is not None:
                expected = "expected gradients changed in place and None returned"
                raise TypeError(f"{type(rule).__name__}.restrict: {expected}, got something returned")

    @property
    def _device(self) -> torch.device:
        return self.parameters[0].device


def reduce_mean(tensors: list[Tensor], group: dist.ProcessGroup) -> None:
    """The mean of `tensors` over the processes of `group`, in place.

    Every process brings the same shapes in the same order.
    """
    for some in portions(tensors, REDUCED_AT_ONCE):
        flat = torch.cat([tensor.flatten() for tensor in some])
        dist.all_reduce(flat, group=group)
        flat /= dist.get_world_size(group)
        parts = flat.split([tensor.numel() for tensor in some])
        shaped = [part.view_as(tensor) for part, tensor in zip(parts, some, strict=True)]
        torch._foreach_copy_(some, shaped)
