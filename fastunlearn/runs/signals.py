"""What stops a run in order, with a checkpoint: a signal, its launcher's end, the end of its time.

SIGINT (Ctrl-C), SIGTERM, SIGHUP (a terminal that closes) and SIGUSR1 (Slurm's `--signal=USR1@120`) let the
step that runs be finished and a checkpoint be written. None of them ends a run while it writes: Slurm and
Kubernetes send SIGTERM more than once, and a launcher passes on what its workers have got already. Two go
further: a second SIGINT acts at once, as somebody at a terminal expects (a third one under a launcher), and
so does a third SIGTERM. SIGHUP and SIGUSR1 that are ignored stay so: of the former `nohup` makes use.
"""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from . import launcher
from .processes import Processes
from .time_limit import TimeLimit, in_words

EX_TEMPFAIL = 75  # sysexits.h: "temporary failure; the user is invited to retry"
# Among the numbers of signals, of which the processes of a run agree on the largest.
OUT_OF_TIME = 1000


class RunInterrupted(SystemExit):
    """SIGINT, SIGTERM, SIGHUP or SIGUSR1: the step was finished and a checkpoint written.

    Ends the process with 128 + the signal's number unless it is caught. It counts as SIGTERM that the
    launcher (torchrun, accelerate launch) has ended which started the process.

    Attributes:
        signal_number: 0: no signal.
        checkpoint: None: it came between the runs of a protocol.
        reason: in words.
    """

    def __init__(self, signal_number: int, checkpoint_path: Path | None):
        super().__init__(128 + signal_number)
        self.signal_number, self.checkpoint = signal_number, checkpoint_path
        self.reason = signal.Signals(signal_number).name if signal_number else ""

    def __str__(self) -> str:
        return self.reason


class OutOfTime(RunInterrupted):
    """`max_time` would be over with the next step: as with a signal, a checkpoint was written.

    Ends the process with 75, which schedulers can tell from success and from failure.
    """

    def __init__(self, max_time: float, checkpoint_path: Path | None):
        super().__init__(0, checkpoint_path)
        self.code = EX_TEMPFAIL
        self.reason = f"max_time {in_words(max_time)}"


def interruption(number: int, limit: TimeLimit, checkpoint_path: Path) -> RunInterrupted:
    """What a run ends with that stops for `number`, which `Signals.agreed` gave."""
    if number == OUT_OF_TIME:
        return OutOfTime(limit.seconds, checkpoint_path)
    return RunInterrupted(number, checkpoint_path)


class Signals:
    """Within the block signals only set `received`; the module says which, and when they go further.

    A launcher sends them to all processes, but not at the same step, so the processes agree on one: each
    tells the others before a step what it has received, and all look at it after that step. What is told
    travels while the step is taken. So does word of the process that runs out of time.
    """

    def __init__(self, processes: Processes, limit: TimeLimit):
        self.received = 0
        self._before: dict[int, Any] = {}
        self._counts: Counter[int] = Counter()
        self._processes, self._limit = processes, limit
        self._told: Callable[[], int] = lambda: 0

    def tell(self) -> None:
        """Before a step: says to the other processes what this one has received."""
        # The launcher's end counts as SIGTERM: a launcher that is killed sends none.
        if not self.received and launcher.is_gone():
            launcher.notice()
            self.received = signal.SIGTERM
        number = self.received
        # They stop after the step that comes now: there has to be time for one more.
        if self._processes.count > 1 and self._limit.is_near(steps=2):
            number = OUT_OF_TIME
        self._told = self._processes.begin_largest(number)

    def agreed(self) -> int:
        """After it: what to stop for, the same in all processes: a signal's number, or OUT_OF_TIME.

        0: nothing.
        """
        if self._processes.count > 1:
            return self._told()
        # Alone, also what came during the step counts.
        return OUT_OF_TIME if self._limit.is_near(steps=1) else self.received

    def __enter__(self) -> Signals:
        self._before = _handled(self._receive)
        return self

    def _receive(self, number: int, frame: FrameType | None) -> None:
        """The handler: notes the first signal; passes on the one that is not to wait."""
        self.received = self.received or number
        self._counts[number] += 1
        if self._counts[number] == _not_to_wait(number):
            _restore(self._before)
            signal.raise_signal(number)

    def __exit__(self, *exception) -> None:
        _restore(self._before)


@contextmanager
def raised_at_once() -> Iterator[None]:
    """Within the block the first signal raises RunInterrupted, wherever the main thread is.

    For work between the steps of runs that loses nothing when it is done again.
    """

    def interrupt(number: int, frame: FrameType | None) -> None:
        _restore(before)
        raise RunInterrupted(number, None)

    before = _handled(interrupt)
    try:
        yield
    finally:
        _restore(before)


def _numbers() -> list[int]:
    """The signals that stop a run, as far as the system has them and nobody has them ignored."""
    asked = [signal.SIGINT, signal.SIGTERM]
    for name in ("SIGHUP", "SIGUSR1"):  # there are none on Windows
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            asked.append(number)
    return asked


def _not_to_wait(number: int) -> int | None:
    """The how-manieth of these signals acts at once; None: none does."""
    if number == signal.SIGTERM:
        return 3
    if number == signal.SIGINT:
        # Ctrl-C goes to all processes of a terminal, and a launcher among them sends it to its workers again.
        return 3 if launcher.started() else 2
    return None


def _handled(handler: Callable[[int, FrameType | None], None]) -> dict[int, Any]:
    """Lets `handler` have the signals; what had them before."""
    if threading.current_thread() is not threading.main_thread():  # Python allows handlers only there
        return {}
    return {number: signal.signal(number, handler) for number in _numbers()}


def _restore(before: dict[int, Any]) -> None:
    for number, handler in before.items():
        # None: another language has set it, and Python cannot do so again.
        signal.signal(number, signal.SIG_DFL if handler is None else handler)
