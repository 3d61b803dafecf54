"""A command that `accelerate launch` or `torchrun` started in several processes at once."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stdout
from typing import TYPE_CHECKING

from . import launch_settings
from .options import pick_device

if TYPE_CHECKING:
    import torch

    from ..runs.processes import Processes


@contextmanager
def launched(device: str | None) -> Iterator[tuple[Processes, torch.device]]:
    """The processes of this command, and where this one computes.

    Several have a process group as long as the block lasts, and leave it together.

    Of several, each has a GPU of its own where there are GPUs (nccl), or all share the CPUs (gloo);
    accelerate reads what the launcher says.

    Args:
        device: `--device`: cpu, cuda or cuda:N; None: GPUs if there are any.

    Raises:
        ValueError: `device` is one GPU for several processes, there are fewer GPUs than processes, or the
            launcher asks for what is not supported.
    """
    from ..runs.processes import Processes

    launch_settings.check_supported()
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Processes(None), pick_device(device)
        return
    on_cpu = _on_cpu(device)
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

    state = PartialState(cpu=on_cpu)
    # dropout: not the same activations in every process
    torch.manual_seed(torch.initial_seed() + state.process_index)
    with ExitStack() as silence, Processes(dist.group.WORLD) as processes:
        if processes.rank != 0:  # process 0 speaks for all; errors go to standard error
            silence.enter_context(redirect_stdout(silence.enter_context(open(os.devnull, "w"))))
        yield processes, state.device
    state.destroy_process_group()  # not after an error: nccl would wait for the others


def _on_cpu(device: str | None) -> bool:
    import torch

    count, here = (
        int(os.environ["WORLD_SIZE"]),
        int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"])),
    )
    if "RANK" not in os.environ or "LOCAL_RANK" not in os.environ:
        expected = "expected RANK and LOCAL_RANK beside it, as accelerate launch and torchrun set them"
        raise ValueError(f"WORLD_SIZE: {expected}, got only WORLD_SIZE={count}")
    chosen = pick_device(device)
    # accelerate would put them all on the one that this variable names.
    if chosen.index is not None or (chosen.type == "cuda" and "ACCELERATE_TORCH_DEVICE" in os.environ):
        expected = f"expected cpu or cuda for {count} processes (each takes a GPU of its own)"
        raise ValueError(f"--device: {expected}, got {os.environ.get('ACCELERATE_TORCH_DEVICE', device)}")
    if chosen.type == "cuda" and here > torch.cuda.device_count():
        expected = f"expected at most {torch.cuda.device_count()} on this machine, one for each GPU"
        raise ValueError(f"num_processes: {expected}, got {here}")
    return chosen.type == "cpu"
