"""Several processes of one run: which of them writes, and what they tell each other beside the gradients.

Gradients go over the process group of the `Unlearner` (nccl on GPUs) inside a step. All else is small and
lives on the host; it goes over a gloo group of its own, so that no device is waited for and a long checkpoint
meets no nccl timeout. A process that dies closes its connections: the others get an error at once, not a
timeout.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import nn

from ..host.folder_lock import locked

# How long processes wait for what process 0 does alone, such as a search for neighbours.
PATIENCE = timedelta(hours=6)

T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """What this process waited for failed in another one, which says more."""


class Processes:
    """The processes of `group`, or this one alone (None).

    A context; every process enters it, and calls its methods in the same order.

    Attributes:
        rank, count: which one this is, of how many.
        group: for gradients.

    Raises:
        ValueError: `group` is a part of the processes that were launched: the others would have to help with
            making a second group.
    """

    def __init__(self, group: dist.ProcessGroup | None):
        self.group, self._control = group, None
        self.rank, self.count = 0, 1
        if group is None:
            return
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        launched = dist.get_world_size()
        if self.count != launched:
            expected = f"a group of all {launched} processes for unlearn()"
            raise ValueError(f"process_group: expected {expected}, got one of {self.count}")

    def __enter__(self) -> Processes:
        # gloo works on the host, whatever the devices of `group` are.
        if self.group is not None:
            self._control = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def __exit__(self, *exception) -> None:
        if self._control is not None:
            dist.destroy_process_group(self._control)

    def by_first(self, work: Callable[[], T]) -> T:
        """`work()`, done by process 0 while the others wait.

        Returns:
            What it returns, in every process; it has to be picklable.

        Raises:
            OtherProcessFailed: in the others, where `work` raises in process 0.
        """
        if self._control is None:
            return work()
        # An error is told to the others, too: they would wait for a result that never comes.
        error = result = failure = None
        if self.rank == 0:
            try:
                result = work()
            except (Exception, SystemExit) as caught:  # a signal, where it raises at once, is the latter
                error, failure = caught, _in_words(caught)
        outcome = [result, failure]
        dist.broadcast_object_list(outcome, group=self._control, group_src=0)
        if error is not None:
            raise error
        result, failure = outcome
        if failure is not None:
            raise OtherProcessFailed(f"process 0: {failure}")
        return result

    def by_all(self, work: Callable[[], T]) -> T:
        """`work()`, done by every process; none goes on before all have succeeded.

        Raises:
            OtherProcessFailed: `work` raised in another process.
        """
        error = result = failure = None
        try:
            result = work()
        except Exception as caught:
            error, failure = caught, _in_words(caught)
        failures = self.gather(failure)
        if error is not None:
            raise error
        for rank, failure in enumerate(failures):
            if failure is not None:
                raise OtherProcessFailed(f"process {rank}: {failure}")
        return result

    def gather(self, value: T) -> list[T]:
        """The `value` (picklable) of every process, by rank."""
        if self._control is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._control)
        return values

    @contextmanager
    def alone_in(self, folder: Path, work: str) -> Iterator[None]:
        """No other run writes to `folder` while the block lasts: process 0 holds its lock, for all of them.

        Raises:
            FolderLocked, OSError: as `folder_lock.locked`, in process 0; OtherProcessFailed in the others.
        """
        # Only in process 0 does the stack hold anything, which it gives back after the block.
        with ExitStack() as held:
            self.by_first(lambda: held.enter_context(locked(folder, work)))
            yield

    def check_same(self, argument: str, values: dict[str, Any]) -> None:
        """Whether all processes were given the same.

        Raises:
            ValueError: naming what differs, in all of them.
        """
        # Everybody compares everything, so that all raise the same error and none waits for the others.
        first, *others = self.gather(values)
        for rank, other in enumerate(others, start=1):
            for name, value in first.items():
                if other[name] != value:
                    got = f"{value!r} in process 0 and {other[name]!r} in process {rank}"
                    raise ValueError(f"{argument}: expected the same {name} in all processes, got {got}")

    def share_weights(self, model: nn.Module) -> None:
        """Gives all processes the parameters and buffers that process 0 has."""
        if self.group is not None:
            for tensor in model.state_dict().values():
                dist.broadcast(tensor, group=self.group, group_src=0)

    def begin_largest(self, number: int) -> Callable[[], int]:
        """Starts to find the largest `number` of all processes; the function returned waits for it.

        In between the host is free.
        """
        if self._control is None:
            return lambda: number
        largest = torch.tensor([number])
        work = dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=self._control, async_op=True)

        def finish() -> int:
            work.wait()
            return int(largest)

        return finish


def _in_words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
