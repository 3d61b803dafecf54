"""Whether the disk takes what a run will write: asked before its first step."""

from __future__ import annotations

from pathlib import Path

from ..host import disk
from ..host.plain_names import plain_state
from . import optimizer_state
from .run_state import part_state, parts_of
from .state_tree import flatten


def check_space(
    unlearner, output_dir: Path, num_steps: int, checkpointing_steps: int | None, keep: int | None
) -> None:
    """Whether there is room for the checkpoints of the steps that are left, and for the model at the end.

    Args:
        num_steps, checkpointing_steps: of the run.
        keep: how many checkpoints stay; None: all.

    Raises:
        OSError: with what it takes, and what is free. Quotas are not known.
    """
    first, last = unlearner.step_index, num_steps
    checkpoints = 1
    if checkpointing_steps is not None:
        checkpoints += max(0, last - 1) // checkpointing_steps - first // checkpointing_steps
    # One more than stays, for it is written before the oldest goes. Those of a run that goes on are there.
    if keep is not None:
        there = keep if first > 0 else 0
        checkpoints = min(checkpoints, keep + 1 - there)
    model, checkpoint = _bytes_of(unlearner)
    what = f"{checkpoints} checkpoint{'' if checkpoints == 1 else 's'} and the model"
    disk.require(output_dir, what, checkpoints * checkpoint + model)


def _bytes_of(unlearner) -> tuple[int, int]:
    """Of the model, and of a checkpoint: of the tensors, beside which all else is small."""
    model, optimizer = plain_state(unlearner.model), unlearner.optimizer
    states = [part_state(part, unlearner.model) for part in parts_of(unlearner).values()]
    if optimizer.state:
        states.append(optimizer_state.named(optimizer, unlearner.model))
        moments = 0
    else:
        # Before its first step an optimizer keeps nothing yet. Adam and its kin keep two moments.
        trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
        moments = 2 * sum(parameter.nbytes for parameter in trained)
    size = _tensor_bytes(model)
    return size, size + moments + sum(_tensor_bytes(state) for state in states)


def _tensor_bytes(state: dict) -> int:
    _, tensors = flatten(state)
    return sum(tensor.nbytes for tensor in tensors.values())
