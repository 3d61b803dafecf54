"""Whether the processes that take a step together begin with the same.

Averaged gradients of different weights train nothing.
"""

from __future__ import annotations

import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # By the bytes of an element.
SUMMED_AT_ONCE = 1 << 20  # Elements.


def check_agreement(weights: list[Tensor], numbers: dict[str, int], group: dist.ProcessGroup) -> None:
    """Compares `weights` (their bits) and `numbers` over the processes of `group`; every process calls it.

    One pass over the weights and one wait for the device: worth it once, before the first step.

    Raises:
        ValueError: in every process, naming what differs.
    """
    named = {"the weights of model": bits_of(weights), **numbers}
    device = weights[0].device
    # Where the smallest number of all processes is the largest, they have the same.
    lowest = torch.tensor([int(number) for number in named.values()], dtype=torch.int64).to(device)
    highest = lowest.clone()
    dist.all_reduce(lowest, op=dist.ReduceOp.MIN, group=group)
    dist.all_reduce(highest, op=dist.ReduceOp.MAX, group=group)
    differ = [name for name, same in zip(named, (lowest == highest).tolist(), strict=True) if not same]
    if differ:
        remedy = "DistributedDataParallel and unlearn() share the weights of process 0"
        raise ValueError(
            f"process_group: expected the same in all processes ({remedy}), got different {', '.join(differ)}"
        )


def bits_of_state(state: Any) -> int:
    """A number that differs where a nested `state` of tensors, numbers and texts does."""
    held = [int(bits_of([leaf])) if isinstance(leaf, Tensor) else leaf for leaf in tree_leaves(state)]
    return zlib.crc32(repr(held).encode())


def bits_of(tensors: list[Tensor]) -> Tensor:
    """A sum over the bits of all `tensors` in which every element's place counts; it may wrap around."""
    device = tensors[0].device if tensors else None
    total = torch.zeros((), dtype=torch.int64, device=device)
    first = 1
    for tensor in tensors:
        flat = tensor.detach().contiguous().flatten()
        for part in flat.view(INTEGERS[flat.element_size()]).split(SUMMED_AT_ONCE):
            places = torch.arange(first, first + len(part), device=part.device)
            total += (part.to(torch.int64) * places).sum()
            first += len(part)
    return total
