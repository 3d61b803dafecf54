"""How long a run may go on: from the start of its process until there is only time left for a checkpoint."""

from __future__ import annotations

import functools
import os
import re
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..host import check

FORMS = "HH:MM:SS, MM:SS or D-HH:MM:SS"
FEWEST_STEPS = 10  # of which the longest one counts
# Of what was measured: disks and GPUs that others use, too, are slower at times.
RESERVE = 1.2
LEAVING = 3.0  # seconds that Python and torch may take to end

_imported, _importer = time.monotonic(), os.getpid()


def parse_time(name: str, value: float | str | None) -> float | None:
    """Seconds: a number of them, or a time as in Slurm's `--time`; None: no limit.

    Raises:
        TypeError, ValueError: naming the argument `name`. So for text without a colon or days: Slurm takes it
            for minutes, others for seconds.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        return check.number(name, value, low=0, low_open=True)
    found = re.fullmatch(
        r"(?:([0-9]{1,4})-)?([0-9]{1,6})(?::([0-9]{2}))?(?::([0-9]{2}))?", value.strip(), re.A
    )
    parts = [] if found is None else [int(part) for part in found.groups()[1:] if part is not None]
    has_days = found is not None and found[1] is not None
    # Behind days come hours, then minutes; without days the last number is that of the seconds.
    in_range = all(part < 60 for part in parts[1:]) and not (has_days and parts[0] >= 24)
    if not in_range or len(parts) < (1 if has_days else 2):
        raise ValueError(f"{name}: expected {FORMS}, got {value!r}")
    if has_days:
        parts = [*parts, 0, 0][:3]
    hours, minutes, seconds = [0] * (3 - len(parts)) + parts
    days = int(found[1]) if has_days else 0
    total = ((days * 24 + hours) * 60 + minutes) * 60 + seconds
    if total == 0:
        raise ValueError(f"{name}: expected a time above 0, got {value!r}")
    return float(total)


def in_words(seconds: float) -> str:
    """HH:MM:SS, with the days before it where there are any."""
    minutes, rest = divmod(int(seconds), 60)
    days, minutes = divmod(minutes, 24 * 60)
    clock = f"{minutes // 60:02}:{minutes % 60:02}:{rest:02}"
    return f"{days}-{clock}" if days else clock


def process_seconds() -> float:
    """Since this process started, as far as the system tells; else since this file was imported."""
    return time.monotonic() - _started(os.getpid())


@functools.cache
def _started(pid: int) -> float:
    """When this process, of number `pid`, started, by `time.monotonic`."""
    try:
        # The program's name, in brackets, may hold spaces. The start is the 22nd entry (man proc_pid_stat).
        entries = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        after_boot = int(entries[19]) / os.sysconf("SC_CLK_TCK")
        ago = time.clock_gettime(time.CLOCK_BOOTTIME) - after_boot
    except (OSError, ValueError, IndexError, AttributeError):  # not Linux
        return _imported
    return min(time.monotonic() - ago, _imported) if pid == _importer else time.monotonic() - ago


class TimeLimit:
    """Watches the time of a run.

    Args:
        seconds: that the process may take; None: any.
        window: steps of which the longest one is what the next may take.
    """

    def __init__(self, seconds: float | None, window: int = FEWEST_STEPS):
        self.seconds = seconds
        self._steps: deque[float] = deque(maxlen=max(window, FEWEST_STEPS))
        self._save: float | None = None

    @property
    def lacks_a_save(self) -> bool:
        """Whether the time that a checkpoint takes is wanted, and not known yet."""
        return self.seconds is not None and self._save is None

    def is_over(self) -> bool:
        return self.seconds is not None and process_seconds() >= self.seconds

    def is_near(self, *, steps: int) -> bool:
        """Whether so many steps more, and the checkpoint after them, would not end in time."""
        if self.seconds is None or not self._steps:
            return False
        # Before them a checkpoint may be due that has nothing to do with the time.
        needed = RESERVE * (steps * max(self._steps) + 2 * (self._save or 0.0))
        return process_seconds() + needed + LEAVING > self.seconds

    def check_begun(self) -> None:
        """That a run may begin.

        Raises:
            ValueError: its time is over before the first step, and would be whenever it is tried again.
        """
        if self.is_over():
            passed = f"the {in_words(process_seconds())} since this process started"
            raise ValueError(f"max_time: expected more than {passed}, got {in_words(self.seconds)}")

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measures a step."""
        began = process_seconds()
        yield
        self._steps.append(process_seconds() - began)

    @contextmanager
    def save(self) -> Iterator[None]:
        """Measures a checkpoint; the longest one counts."""
        began = process_seconds()
        yield
        self._save = max(self._save or 0.0, process_seconds() - began)
