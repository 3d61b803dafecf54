"""What a stage of the check of GPUs says of itself before its process ends, which may take long.

A plugin of pytest: `-p gpu_outcomes`. Of tests that several processes share (pytest-xdist) the one that hands
them out tells. Two files, each where its variable names one:

GPU_CHECK_TESTS     a line of JSON for each test as it ends: a run that is stopped loses none
GPU_CHECK_MARK      pytest's exit status, once no test and no table is to come. With pytest-xdist already once
                    all tests have been reported, before its processes end.

SIGUSR2 makes every process that has loaded this print where all of its threads are. And none clears its
memory before it leaves: after many compilations Python took 12 seconds to collect all objects.
"""

from __future__ import annotations

import atexit
import faulthandler
import gc
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

MOST_SAID = 4000  # characters of a failure


def print_stacks_on_signal() -> None:
    """Into what is the standard error now, also while pytest captures it."""
    faulthandler.register(signal.SIGUSR2, file=os.dup(2))


class Leaving:
    """Ends the process behind everything else that is to be done at its end."""

    def __init__(self):
        self.status: int | None = None  # None: the session is not over, and Python goes its way
        atexit.register(self._leave)  # who registers first is called last

    def _leave(self) -> None:
        if self.status is not None:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(self.status)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session):
        result = yield
        self.status = int(session.exitstatus)
        gc.freeze()  # pytest collects five more times
        return result


class Outcomes:
    """
    Args:
        tests, mark: the two files; None: not wanted.
    """

    def __init__(self, tests: Path | None, mark: Path | None):
        self.tests, self.mark = tests, mark
        self.began = time.monotonic()
        self.status: int | None = None  # as the mark has it
        self._failed = False
        self._shared: set[str] | None = None  # the tests that several processes share
        self._running: dict[str, dict] = {}
        self._ended: set[str] = set()

    def tell(self, status: int) -> None:
        """Writes the mark; a reader sees all of it or nothing."""
        self.status = status
        if self.mark is not None:
            temporary = self.mark.with_suffix(".tmp")
            temporary.write_text(str(status))
            temporary.replace(self.mark)

    def _append(self, line: dict) -> None:
        if self.tests is not None:
            with self.tests.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._append({"collected": len(session.items)})

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node, ids) -> None:
        """Each process has found all tests; the first one says which."""
        if self._shared is None:
            self._shared = set(ids)
            self._append({"collected": len(self._shared)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._failed = True
            said = report.longreprtext[-MOST_SAID:]
            self._append({"test": report.nodeid, "outcome": "failed", "at": self._now(), "said": said})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        new = {"test": report.nodeid, "outcome": "passed", "seconds": 0.0}
        test = self._running.setdefault(report.nodeid, new)
        test["seconds"] = round(test["seconds"] + report.duration, 2)
        if report.failed:
            test |= {"outcome": "failed", "said": report.longreprtext[-MOST_SAID:]}
            self._failed = True
        elif report.skipped and test["outcome"] == "passed":
            test |= {"outcome": "skipped", "said": report.longreprtext[-MOST_SAID:]}
        # After its teardown; or, with neither call nor teardown, after a crash of the process that ran it.
        if report.when not in ("setup", "call"):
            self._append(self._running.pop(report.nodeid) | {"at": self._now()})
            self._ended.add(report.nodeid)
            if self._shared is not None and self._ended >= self._shared:
                self.tell(int(self._failed))

    def _now(self) -> float:
        """Seconds since the beginning."""
        return round(time.monotonic() - self.began, 1)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int):
        # The tables of a session are printed, and other processes are ended, within the yield.
        if self._shared is not None and self.status is None:
            self.tell(int(exitstatus))
        result = yield
        # Who interrupts a session that only would not end says nothing about its tests.
        if self.status is None or session.exitstatus != pytest.ExitCode.INTERRUPTED:
            self.tell(int(session.exitstatus))
        return result


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(LEAVING, "gpu_outcomes: how its process leaves")
    if hasattr(config, "workerinput"):  # of pytest-xdist: what it reports reaches the process that tells
        return
    tests, mark = _path("GPU_CHECK_TESTS"), _path("GPU_CHECK_MARK")
    config.pluginmanager.register(Outcomes(tests, mark), "gpu_outcomes: what its tests do")


def _path(variable: str) -> Path | None:
    given = os.environ.get(variable)
    return Path(given) if given else None


LEAVING = Leaving()
print_stacks_on_signal()
