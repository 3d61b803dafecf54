"""Kills processes at awkward moments: shared by the tests of `unlearn` and `pretrain`.

Children are forked from a server that has imported torch but never used it, so that starting one costs milliseconds and is safe.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from multiprocessing import forkserver
from pathlib import Path

CONTEXT = multiprocessing.get_context("forkserver")


@dataclass
class Kills:
    total: int = 0
    while_saving: int = 0  # a temporary checkpoint folder was there


@cache
def start_server() -> None:
    here = Path(__file__).parent
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), *filter(None, [before])])  # Python 3.11's server ignores sys.path
    CONTEXT.set_forkserver_preload(["crash_preload"])
    forkserver.ensure_running()
    if before is None:
        del os.environ["PYTHONPATH"]
    else:
        os.environ["PYTHONPATH"] = before


def start(target: Callable[[str], None], run_dir: Path) -> multiprocessing.Process:
    start_server()
    process = CONTEXT.Process(target=target, args=(str(run_dir),))
    process.start()
    return process


def run_to_end(target: Callable[[str], None], run_dir: Path) -> float:
    """Runs `target(run_dir)` in a child; seconds. Fails if the child does."""
    started = time.perf_counter()
    process = start(target, run_dir)
    process.join(120)
    assert process.exitcode == 0, f"the child ended with {process.exitcode}"
    return time.perf_counter() - started


def kill_once(target: Callable[[str], None], run_dir: Path, checkpoint_dir: Path, delay: float, kills: Kills, *, while_saving: bool) -> bool:
    """Starts a child and ends it with SIGKILL after `delay` seconds, or then at the next checkpoint being written; False if it was done before."""
    process = start(target, run_dir)
    process.join(delay)
    while while_saving and process.is_alive() and not _saving(process, checkpoint_dir):
        pass
    if process.is_alive():
        time.sleep(random.Random(delay).random() * 2e-3 if while_saving else 0)
        os.kill(process.pid, signal.SIGKILL)
    process.join(60)
    assert process.exitcode in (0, -signal.SIGKILL), f"the child ended with {process.exitcode}"
    killed = process.exitcode != 0
    kills.total += killed
    kills.while_saving += killed and _saving(process, checkpoint_dir)
    return killed


def _saving(process: multiprocessing.Process, checkpoint_dir: Path) -> bool:
    try:
        return any(name.startswith(".checkpoint-") and name.endswith(f".{process.pid}.tmp") for name in os.listdir(checkpoint_dir))
    except FileNotFoundError:
        return False
