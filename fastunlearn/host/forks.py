"""A forked child computes with one thread.

Threads do not come along when a process forks: of a pool that has computed in the parent, the child has the
record and none of the threads. At its first operation with two of them it would wait for the other one for
ever (`os.fork`, `multiprocessing` with "fork"; programs that are started, and "spawn", are not concerned).
What a child computes alone is right, so this is what it gets, as torch's own DataLoader gives its workers.
A child whose parent has not computed yet may take more with `torch.set_num_threads`.
"""

from __future__ import annotations

import os

import torch


def _compute_alone() -> None:
    if torch.get_num_threads() > 1:
        torch.set_num_threads(1)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_compute_alone)
