"""Tensors that belong to the parameters of a network: by plain name outside, in a step's order within."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..host import check
from ..host.arrays import tensor_bytes
from ..host.atomic import atomic_file
from ..host.plain_names import plain_parameters

FORMAT = "fastunlearn-parameters"


class NamedTensors:
    """One tensor a parameter, of its shape, on its device and in its layout in memory; in the model's order.

    Args:
        argument: what errors name.
        tensors: by plain name (without the words of `torch.compile`, DistributedDataParallel); copied.
        model: whose parameters they belong to; not all of them need one.
        dtype: of the copies; None: that of each parameter, float32 at least.

    Raises:
        TypeError, ValueError: a name that the model has not, no tensor, or one of another shape.
    """

    def __init__(
        self,
        argument: str,
        tensors: Mapping[str, Tensor],
        model: nn.Module,
        *,
        dtype: torch.dtype | None = None,
    ):
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {check.describe(model)}")
        if not isinstance(tensors, Mapping) or not tensors:
            expected = "expected a tensor for each name of a parameter"
            raise TypeError(f"{argument}: {expected}, got {check.describe(tensors)}")
        self.argument = argument
        self.parameters: dict[str, nn.Parameter] = {}
        self.tensors: dict[str, Tensor] = {}
        known = plain_parameters(model)
        unknown = [name for name in tensors if name not in known]
        if unknown:
            raise ValueError(f"{argument}: expected names of parameters of model, got {unknown[0]!r}")
        # In the model's order: a file has another one, and a run is known by a hash over all of them.
        for name in [own for own in known if own in tensors]:
            parameter, tensor = known[name], tensors[name]
            if not isinstance(tensor, Tensor) or tensor.shape != parameter.shape:
                expected = f"expected a tensor of shape {tuple(parameter.shape)}"
                raise ValueError(f"{argument}[{name!r}]: {expected}, got {check.describe(tensor)}")
            kept = torch.promote_types(parameter.dtype, torch.float32) if dtype is None else dtype
            self.parameters[name] = parameter
            self.tensors[name] = torch.empty_like(parameter, dtype=kept, requires_grad=False).copy_(
                tensor.detach()
            )
        self._order: tuple[int, ...] = ()
        self._ordered: list[Tensor] = []

    def of(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Those of `parameters`, in their order.

        Raises:
            ValueError: one of them has none, or has been moved to another device.
        """
        order = tuple(map(id, parameters))
        if order != self._order:
            # Names are found by identity: parameters of equal shapes are different ones.
            name_of = {id(parameter): name for name, parameter in self.parameters.items()}
            ordered = []
            for parameter in parameters:
                if id(parameter) not in name_of:
                    got = f"none for a parameter of shape {tuple(parameter.shape)}"
                    expected = "expected one for each parameter that is trained"
                    raise ValueError(f"{self.argument}: {expected}, got {got}")
                ordered.append(self.tensors[name_of[id(parameter)]])
            self._order, self._ordered = order, ordered
        for parameter, tensor in zip(parameters[:1], self._ordered[:1], strict=True):
            check.same_device(self.argument, tensor, "the model", parameter)
        return self._ordered

    def copy_from(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the values of `tensors`, in the memory that there is: a captured step goes on reading it.

        Raises:
            ValueError: other names or shapes; nothing is changed.
        """
        shapes = {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}
        found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name in dict.fromkeys([*shapes, *found]):
            if shapes.get(name) != found.get(name):
                expected = f"expected {shapes.get(name, 'no entry')} for {name}"
                raise ValueError(f"{self.argument}: {expected}, got {found.get(name, 'none')}")
        for name, tensor in tensors.items():
            self.tensors[name].copy_(tensor)


def write_tensors(path: str | os.PathLike, tensors: Mapping[str, Tensor], about: str) -> None:
    """Writes `tensors` as one safetensors file (mode 0600), whole or not at all.

    Args:
        about: what they were made of, for `read_tensors`.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "about": about, "sha256": _content_hash(held)}
    with atomic_file(path, mode=0o600) as file:
        file.write(save(held, metadata))


def read_tensors(path: str | os.PathLike, about: str | None = None) -> dict[str, Tensor] | None:
    """What `write_tensors` has written, on the CPU; None: the file is about something else than `about`.

    Raises:
        ValueError: naming the file, which is missing, damaged or of another kind.
    """
    # A pipe would wait for a writer.
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path}: expected a safetensors file, got something else")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT:
                got = check.in_a_line(metadata.get("format"))
                raise ValueError(f"{path}: expected a file of {FORMAT}, got {got}")
            if about is not None and metadata.get("about") != about:
                return None
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (OSError, SafetensorError) as error:
        said = check.in_a_line(error)
        raise ValueError(f"{path}: expected a safetensors file, got {said}") from error
    # A mask of other bits would let other weights move, and no number of a step would show it.
    if metadata.get("sha256") != _content_hash(tensors):
        raise ValueError(f"{path}: expected the content that its hash was taken of, got another (damaged)")
    return tensors


def _content_hash(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, dtypes, shapes and bytes, in the order of names."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor_bytes(tensor.flatten()))
    return digest.hexdigest()
