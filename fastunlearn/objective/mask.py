"""A mask on weights: those that matter most to the forget loss move, all others stay as they are."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from ..host import check
from ..host.tensor_lists import portions
from .named_tensors import NamedTensors, read_tensors, write_tensors
from .parameters import ParameterRule

PUT_BACK_ON_CPU = 1 << 20  # Bytes of weights.
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # By the bytes of a weight.


class Mask(ParameterRule):
    """Lets some weights move, with any method; the others stay, bit for bit.

    SalUn's (arXiv 2310.12508), without its random labels. Gradients are multiplied by the mask before any
    norm of them is taken. What weight decay and momentum do to masked weights all the same is undone after
    the update, so an average of the weights sees them unchanged.

    It takes 2 bytes a trained weight, and a copy of the trained weights for the time of an update; a step
    reads and writes the weights three times more, and its gradients once. A mask of ones changes no bit.

    Args:
        masks: bool, by plain name of the parameter, of its shape; True: the weight moves. Every parameter
            that is trained needs one.
        model: the network whose parameters they are.

    Raises:
        TypeError, ValueError: naming the entry that is no mask of a parameter.
    """

    def __init__(self, masks: Mapping[str, Tensor], *, model: nn.Module):
        if isinstance(masks, Mapping):
            for name, mask in masks.items():
                if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
                    got = check.describe(mask)
                    raise TypeError(f"masks[{name!r}]: expected a tensor of booleans, got {got}")
        self._moving = NamedTensors("masks", masks, model, dtype=torch.bool)
        self._staying = NamedTensors("masks", self._inverse(), model, dtype=torch.bool)
        self._whole = self._all_move()
        # What masked weights were before the update, as integers; 0 where they move.
        self._before: list[Tensor] | None = None

    @classmethod
    def from_gradients(
        cls, gradients: Mapping[str, Tensor], fraction: float = 0.5, *, model: nn.Module
    ) -> Mask:
        """The weights of the largest absolute gradients, over all parameters together.

        Exactly `floor(fraction n)` of n weights move; of equal gradients those of the lower index, counted
        through all parameters in the order of `gradients`.

        Args:
            gradients: by plain name, such as `forget_gradients(...)`.
            fraction: in (0, 1]; the papers take 0.5.
            model: as in `Mask`.

        Raises:
            TypeError, ValueError: gradients that are not finite or all 0, or a fraction of less than one
                weight.
        """
        fraction = check.number("fraction", fraction, low=0, high=1, low_open=True)
        if not isinstance(gradients, Mapping) or not gradients:
            got = check.describe(gradients)
            raise TypeError(f"gradients: expected a tensor for each name of a parameter, got {got}")
        for name, gradient in gradients.items():
            check.tensor(f"gradients[{name!r}]", gradient, ndim=getattr(gradient, "ndim", 0))
            check.finite(f"gradients[{name!r}]", gradient)
        sizes = torch.cat([gradient.detach().flatten() for gradient in gradients.values()]).abs_()
        if not sizes.any():
            raise ValueError("gradients: expected some that are not 0, got none")
        # Of the decimal that was written: 0.29 of 100 weights are 29, although 0.29 * 100 is a little less.
        count = math.floor(Fraction(repr(fraction)) * len(sizes))
        if count == 0:
            raise ValueError(
                f"fraction: expected at least one of {len(sizes)} weights, got {fraction:g} of them"
            )
        chosen = largest(sizes, count).split([gradient.numel() for gradient in gradients.values()])
        masks = {
            name: mask.view(gradient.shape)
            for mask, (name, gradient) in zip(chosen, gradients.items(), strict=True)
        }
        return cls(masks, model=model)

    @classmethod
    def load(cls, path: str | os.PathLike, *, model: nn.Module) -> Mask:
        """The mask in a file of `save`.

        Raises:
            TypeError, ValueError: naming the file, or the entry that does not fit `model`.
        """
        return cls(read_tensors(path), model=model)

    def save(self, path: str | os.PathLike) -> None:
        """Writes the mask as a safetensors file, a byte a weight."""
        write_tensors(path, self._moving.tensors, "mask")

    @property
    def masks(self) -> dict[str, Tensor]:
        """Bool by plain name, True where a weight moves; to be read only."""
        return dict(self._moving.tensors)

    @property
    def idle(self) -> bool:
        return self._whole

    def check(self, parameters: Sequence[nn.Parameter]) -> None:
        self._moving.of(parameters)

    def restrict(self, parameters: Sequence[nn.Parameter], gradients: Sequence[Tensor | None]) -> None:
        if self._whole:
            return
        masks, present = [], []
        for gradient, mask in zip(gradients, self._moving.of(parameters), strict=True):
            if gradient is not None:
                present.append(gradient)
                masks.append(mask)
        # In integers, in which x * 1 + 0 and x * 0 + y are x and y whatever numbers their bits mean. On a CPU
        # they are multiplied by booleans four times as fast as floats are.
        with torch.no_grad():
            torch._foreach_mul_(_bits(present), masks)
            # The update comes after: nothing has moved yet. Of two gradients the second finds the same.
            self._before = torch._foreach_mul(_bits(parameters), self._staying.of(parameters))

    def after_update(self, parameters: Sequence[nn.Parameter]) -> None:
        if self._before is None:
            return
        # In portions that on a CPU are still in the cache when what was before is added to them.
        at_once = PUT_BACK_ON_CPU if parameters[0].device.type == "cpu" else sys.maxsize
        rows = list(zip(_bits(parameters), self._moving.of(parameters), self._before, strict=True))
        with torch.no_grad():
            for some in portions(rows, at_once):
                weights, masks, before = map(list, zip(*some, strict=True))
                torch._foreach_mul_(weights, masks)
                torch._foreach_add_(weights, before)
        self._before = None

    def state_dict(self) -> dict[str, Any]:
        return {"masks": self.masks}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._moving.copy_from(state["masks"])
        self._staying.copy_from(self._inverse())
        self._whole = self._all_move()
        # A step that raised has left weights that the masks of before were to put back.
        self._before = None

    def _inverse(self) -> dict[str, Tensor]:
        return {name: ~mask for name, mask in self._moving.tensors.items()}

    def _all_move(self) -> bool:
        return all(bool(mask.all()) for mask in self._moving.tensors.values())


def largest(values: Tensor, count: int) -> Tensor:
    """`[n]` bool: the `count` largest of `values` `[n]`, of equal ones those that come first."""
    if count == len(values):
        return torch.ones_like(values, dtype=torch.bool)
    threshold = values.kthvalue(len(values) - count + 1).values
    chosen, equal = values > threshold, values == threshold
    return chosen | (equal & (equal.cumsum(0) <= count - chosen.sum()))


def _bits(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Views of them as integers."""
    return [tensor.detach().view(INTEGERS[tensor.element_size()]) for tensor in tensors]
