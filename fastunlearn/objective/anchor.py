"""An anchor of weights: a quadratic penalty around a mean, each weight with a precision of its own."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..host import check
from ..host.tensor_lists import inner_product, multiply, portions
from .named_tensors import NamedTensors, read_tensors, write_tensors
from .parameters import ParameterRule

MAX_PRECISION = 1e10  # A standard deviation of 1e-5.
# Bytes of weights: what keeps a GPU busy, and what stays in a core's cache from one pass to the next.
ADDED_AT_ONCE, ADDED_ON_CPU = 64 << 20, 1 << 20


class Anchor(ParameterRule):
    """Adds `gamma / n sum_i precision_i (theta_i - mean_i)^2 / 2` to what a step descends; n weights.

    The stability regulariser of VDU (arXiv 2510.04058) as it follows from a Gaussian posterior of the
    weights; the paper's printed form is not known to us. VDU descends it together with `NegGrad`. Its mean
    and variance are those of several networks that were trained independently (`vdu`); from a single
    checkpoint there are `vdu_laplace`, `vdu_swag` and `vdu_l2`, which are not the published method.

    gamma counts for the mean over the weights: a pull of `a (theta_i - mean_i)` on each takes gamma `a n`.
    The gradient is added after those of the method are combined, averaged over processes and unscaled, and
    before clipping. A gamma of 0 changes no bit.

    Mean and precision take as much memory as the trained weights each (a precision that is a number none),
    in float32 at least, and stand in every checkpoint; a step reads both, and holds two temporaries of at
    most 64 MiB (on a CPU 1 MiB), or of the largest tensor.

    Args:
        mean: by plain name of the parameter, of its shape. Every parameter that is trained needs one.
        precision: the same, one over a variance, or one number >= 0 for all.
        gamma: weight of the penalty, >= 0.
        model: the network whose parameters they are.
        max_precision: larger ones, such as that of a weight that never varied, count as this one.

    Raises:
        TypeError, ValueError: naming the argument or the entry; precisions below 0, or NaN.
    """

    def __init__(
        self,
        mean: Mapping[str, Tensor],
        precision: Mapping[str, Tensor] | float,
        gamma: float,
        *,
        model: nn.Module,
        max_precision: float = MAX_PRECISION,
    ):
        self._gamma = check.number("gamma", gamma, low=0)
        self._max_precision = check.number("max_precision", max_precision, low=0, low_open=True)
        self._mean = NamedTensors("mean", mean, model)
        for name, tensor in self._mean.tensors.items():
            check.finite(f"mean[{name!r}]", tensor)
        self._precision: NamedTensors | float
        if not isinstance(precision, Mapping):
            self._precision = min(check.number("precision", precision, low=0), self._max_precision)
            return
        if precision.keys() != self._mean.tensors.keys():
            name = sorted(precision.keys() ^ self._mean.tensors.keys())[0]
            raise ValueError(f"precision: expected the names of mean, got another set ({name!r} is in one)")
        self._precision = NamedTensors("precision", precision, model)
        for name, tensor in self._precision.tensors.items():
            # NaN compares as False.
            if not bool((tensor >= 0).all()):
                raise ValueError(f"precision[{name!r}]: expected numbers >= 0, got some that are not")
            tensor.clamp_(max=self._max_precision)

    @classmethod
    def load(cls, path: str | os.PathLike, gamma: float, *, model: nn.Module, **options: Any) -> Anchor:
        """The mean and the precision in a file of `save`, with a gamma.

        Raises:
            TypeError, ValueError: naming the file, or the entry that does not fit `model`.
        """
        mean, precision = {}, {}
        for name, tensor in read_tensors(path).items():
            kind, _, own = name.partition("/")
            if kind not in ("mean", "precision"):
                raise ValueError(f"{path}: expected tensors of an anchor, got {name!r}")
            {"mean": mean, "precision": precision}[kind][own] = tensor
        if precision.keys() == {""}:
            number = precision[""]
            if number.numel() != 1:
                raise ValueError(f"{path}: expected one precision for all, got {check.describe(number)}")
            precision = number.item()
        return cls(mean, precision, gamma, model=model, **options)

    def save(self, path: str | os.PathLike) -> None:
        """Writes mean and precision as a safetensors file."""
        tensors = {f"mean/{name}": tensor for name, tensor in self._mean.tensors.items()}
        if isinstance(self._precision, float):
            tensors["precision/"] = torch.tensor(self._precision, dtype=torch.float64)
        else:
            tensors |= {f"precision/{name}": tensor for name, tensor in self._precision.tensors.items()}
        write_tensors(path, tensors, "anchor")

    @property
    def gamma(self) -> float:
        """A captured step holds it as a constant: another gamma is another anchor."""
        return self._gamma

    @property
    def mean(self) -> dict[str, Tensor]:
        """By plain name; to be read only."""
        return dict(self._mean.tensors)

    @property
    def precision(self) -> dict[str, Tensor] | float:
        """As it counts, clamped; to be read only."""
        if isinstance(self._precision, float):
            return self._precision
        return dict(self._precision.tensors)

    @property
    def idle(self) -> bool:
        return self.gamma == 0

    def check(self, parameters: Sequence[nn.Parameter]) -> None:
        self._mean.of(parameters)

    def add(self, parameters: Sequence[nn.Parameter], loss_scale: Tensor | float) -> Tensor | None:
        if self.gamma == 0:
            return None
        factor = self.gamma / sum(parameter.numel() for parameter in parameters)
        means = self._mean.of(parameters)
        precisions: Sequence[Tensor | float] = [self._precision] * len(means)
        if not isinstance(self._precision, float):
            precisions = self._precision.of(parameters)
        device = parameters[0].device
        at_once = ADDED_ON_CPU if device.type == "cpu" else ADDED_AT_ONCE
        penalty = torch.zeros((), device=device)
        with torch.no_grad():
            for some in portions(list(zip(means, parameters, precisions, strict=True)), at_once):
                own_means, weights, own_precisions = map(list, zip(*some, strict=True))
                # gamma / n precision_i (theta_i - mean_i), the gradient; half of its product with
                # theta_i - mean_i is the penalty. bfloat16 weights are subtracted in float32. What is a
                # number for all weights is multiplied where the gradient is added.
                differences = torch._foreach_sub([weight.detach() for weight in weights], own_means)
                if isinstance(self._precision, float):
                    pull, number = differences, factor * self._precision
                else:
                    pull, number = torch._foreach_mul(differences, own_precisions), factor
                penalty = penalty + number / 2 * inner_product(differences, pull, device)
                _add_scaled(weights, pull, number, loss_scale)
        return penalty

    def state_dict(self) -> dict[str, Any]:
        settings = {"gamma": self._gamma, "max_precision": self._max_precision}
        return {**settings, "mean": self.mean, "precision": self.precision}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        is_number = isinstance(self._precision, float)
        if is_number == isinstance(state["precision"], Mapping):
            expected = "one number for all" if is_number else "a tensor for each parameter"
            raise ValueError(f"precision: expected {expected}, got {check.describe(state['precision'])}")
        self._mean.copy_from(state["mean"])
        if is_number:
            self._precision = float(state["precision"])
        else:
            self._precision.copy_from(state["precision"])
        self._gamma, self._max_precision = float(state["gamma"]), float(state["max_precision"])


def _add_scaled(
    parameters: list[nn.Parameter], pull: list[Tensor], number: float, loss_scale: Tensor | float
) -> None:
    """`.grad += loss_scale number pull`; a parameter that the method does not reach gets its pull alone."""
    if isinstance(loss_scale, Tensor):
        multiply(pull, loss_scale)
    else:
        number = number * loss_scale
    gradients, added = [], []
    for parameter, own in zip(parameters, pull, strict=True):
        if parameter.grad is None:
            parameter.grad = own.mul_(number).to(parameter.dtype)
        else:
            gradients.append(parameter.grad)
            added.append(own)
    if gradients:
        torch._foreach_add_(gradients, added, alpha=number)
