"""Cases of two processes in a gloo group, each of which hashes what it has."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import parts, steps, unlearners
from .registry import add
from .unlearners import Setting


def take_together(method: str, setting: Setting, wrapped: bool, place=None) -> dict[str, Any]:
    """Steps of an Unlearner with a process group, or around a model in DistributedDataParallel."""
    chosen = unlearners.METHODS[method]
    if not wrapped:
        return unlearners.take_steps(chosen, setting, process_group=dist.group.WORLD)
    network = parts.Denoiser()
    network.labels.requires_grad_(False)
    around = nn.parallel.DistributedDataParallel(network)
    return unlearners.take_steps(chosen, setting, make_network=lambda: around)


def own_loop(kind: str, setting: steps.Setting, place=None) -> dict[str, Any]:
    """`*_step` with a process group: each process has half of the rows."""
    part = slice(0, 3) if dist.get_rank() == 0 else slice(3, 6)
    return steps.take_steps(steps.KINDS[kind], setting, group=dist.group.WORLD, part=part)


UNLEARNERS = {
    "plain": (Setting(), False),
    "micro batches of 2": (Setting({"micro_batch_size": 2}), False),
    "DistributedDataParallel": (Setting(average=True, decaying=True), True),
}
STEPS = {
    "plain": steps.Setting(),
    "gradient kept": steps.Setting({"keep_grad": True}, standing=True),
    "micro batches of 2": steps.Setting({"micro_batch_size": 2}),
    "bfloat16 with a scaler": steps.Setting({"autocast_dtype": torch.bfloat16}, scaler=True),
}

for method in ("retrack", "siss", "erasediff", "vanilla"):
    for name, (setting, wrapped) in UNLEARNERS.items():
        run = partial(take_together, method, setting, wrapped)
        add("two processes", f"Unlearner, {method}, {name}", run, mode="pair")
for kind in ("retrack", "siss", "siss no_is", "erasediff", "neggrad"):
    for name, setting in STEPS.items():
        add("two processes", f"{kind} step, {name}", partial(own_loop, kind, setting), mode="pair")
