"""Processes in one gloo group that run functions together.

They are forked from the server of `crash.py`, which has imported torch already, and wait for work: starting a
team costs a fraction of a second (of fresh processes, some seconds).
A function that fails or takes too long ends its team, so that no test waits for another's processes.
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import sys
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import crash
import torch
import torch.distributed as dist

PATIENCE = 300  # seconds for one function: only a defect reaches it, on any machine
GROUP_PATIENCE = 2 * PATIENCE  # of the processes for each other: a wait for its end is found out before


class Team:
    """`count` processes; a context that ends them.

    `fresh` ones share nothing with the server, which may have asked for GPUs: CUDA then refuses its children.
    """

    def __init__(self, count: int, *, fresh: bool = False):
        self.count = count
        self._context = multiprocessing.get_context("spawn") if fresh else crash.CONTEXT
        self._folder = tempfile.TemporaryDirectory()
        self._members: list = []

    def __enter__(self) -> Team:
        return self

    def __exit__(self, *exception) -> None:
        self.end()
        self._folder.cleanup()

    def run(self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE) -> list[Any]:
        """`function(*arguments)` in every process at once; what it returned in each, by rank.

        `dist.group.WORLD` is the team.
        """
        answers = self.answers(function, *arguments, patience=patience)
        failed = {rank: text for rank, (succeeded, text) in enumerate(answers) if not succeeded}
        if failed:
            self.end()
            raise AssertionError("\n".join(f"--- process {rank}\n{text}" for rank, text in failed.items()))
        return [value for _, value in answers]

    def answers(
        self, function: Callable[..., Any], *arguments: Any, patience: float = PATIENCE
    ) -> list[tuple[bool, Any]]:
        """The same for a function that may fail: (True, what it returned) or (False, the traceback)."""
        if not self._members:
            self._start()
        for _, pipe in self._members:
            pipe.send_bytes(pickle.dumps((function, arguments)))
        answers = []
        for rank, (process, pipe) in enumerate(self._members):
            try:
                answered = pipe.poll(patience)
                answers.append(
                    pickle.loads(pipe.recv_bytes()) if answered else (False, f"no answer after {patience} s")
                )
            except EOFError:
                process.join(patience)
                answers.append((False, f"process {rank} ended with {process.exitcode}"))
        return answers

    def end(self) -> None:
        """The next function gets new processes."""
        members, self._members = self._members, []
        for process, pipe in members:
            pipe.close()
            process.kill()
        for process, _ in members:
            process.join()

    def _start(self) -> None:
        if self._context is crash.CONTEXT:
            crash.start_server()
        store = Path(self._folder.name) / f"store-{len(list(Path(self._folder.name).iterdir()))}"
        for rank in range(self.count):
            ours, theirs = self._context.Pipe()
            process = self._context.Process(
                target=_serve, args=(rank, self.count, str(store), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._members.append((process, ours))


def tell_place(rank: int, count: int) -> None:
    """Sets in this process what a launcher tells: accelerate reads it, and gloo."""
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in places.items()}, OMP_NUM_THREADS="1")
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the machine's name resolves to


def _serve(rank: int, count: int, store: str, pipe) -> None:
    torch.set_num_threads(1)
    tell_place(rank, count)
    place = {"init_method": f"file://{store}", "rank": rank, "world_size": count}
    dist.init_process_group("gloo", **place, timeout=timedelta(seconds=GROUP_PATIENCE))
    while True:
        try:
            function, arguments = pickle.loads(pipe.recv_bytes())
        except EOFError:  # the tests are over, however they ended
            return
        try:
            answer = True, function(*arguments)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))
