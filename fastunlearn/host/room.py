"""How much memory there is, asked before what a file says of itself is believed and allocated."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Less than this is not asked about: asking takes a millisecond or two, in which four megapixels are not
# decoded, and eight threads at once take no more than 512 MB.
SMALL = 64 << 20
# Files of a control group: what it may take, what it has taken, and what of that is a cache of files, which
# the kernel gives back. The second is `memory` of Linux' first version of control groups.
GROUP_FILES = ("memory.max", "memory.current", ("inactive_file", "active_file"))
FIRST_GROUP_FILES = (
    "memory.limit_in_bytes",
    "memory.usage_in_bytes",
    ("total_inactive_file", "total_active_file"),
)


class NoRoom(ValueError):
    """`expected ..., got ...`, without the name of what it is about."""


def available_memory(root: Path = Path("/")) -> int | None:
    """Bytes of memory that this process may still take; None where the system does not say (not Linux).

    That is what the machine has left, or less where a control group allows less: a container, a job of a
    scheduler. What `ulimit -v` allows is not looked at.

    Args:
        root: where `proc` and `sys` are.
    """
    found = [_left_in_the_machine(root), *_left_in_groups(root)]
    return min((size for size in found if size is not None), default=None)


def require(what: str, size: int) -> None:
    """Refuses what would not fit into memory.

    Args:
        what: in words, such as "an array".
        size: the bytes that it would take.

    Raises:
        NoRoom: it would take more than there is.
    """
    if size < SMALL:
        return
    available = available_memory()
    if available is not None and size > available:
        expected = f"{what} that fits into the {in_words(available)} of memory that are free"
        raise NoRoom(f"expected {expected}, got one that takes {in_words(size)}")


def require_for(name: object, what: str, size: int) -> None:
    """`require`, with an error that begins with `name`: a file, or an argument.

    Raises:
        ValueError: it would take more than there is.
    """
    try:
        require(what, size)
    except NoRoom as refused:
        raise ValueError(f"{name}: {refused}") from None


@contextmanager
def taking(what: str, size: int) -> Iterator[None]:
    """The block takes `size` bytes of memory, and gives them back at its end.

    Threads that would together take more than there is wait for each other.

    Raises:
        NoRoom: it would not fit alone either.
    """
    if size < SMALL:
        yield
        return
    global _taken
    with _given_back:
        # How much of what the others take is there already, nobody knows. It counts in full beside what is
        # free: at worst a thread waits where it need not.
        while _taken and not _fits(_taken + size):
            _given_back.wait()
        require(what, size)
        _taken += size
    try:
        yield
    finally:
        with _given_back:
            _taken -= size
            _given_back.notify_all()


_taken = 0  # by all blocks of `taking` at this moment
_given_back = threading.Condition()


def in_words(size: int) -> str:
    """A number of bytes, as people say it."""
    for unit, power in (("TB", 4), ("GB", 3), ("MB", 2), ("kB", 1)):
        if size >= 1000**power:
            return f"{size / 1000**power:.1f} {unit}"
    return f"{size} bytes"


def _fits(size: int) -> bool:
    available = available_memory()
    return available is None or size <= available


def _left_in_the_machine(root: Path) -> int | None:
    """What the kernel calls available: free, or a cache that it would give back."""
    return _entry(root / "proc/meminfo", "MemAvailable:", 1024)


def _left_in_groups(root: Path) -> list[int | None]:
    """The same for each control group that this process is in, and for those around it."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return []
    left = []
    for line in lines:
        # `4:memory:/jobs/7`, or `0::/jobs/7` in the second version.
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if "memory" in controllers.split(","):
            left += _left_above(root / "sys/fs/cgroup/memory", path, FIRST_GROUP_FILES)
        elif number == "0":
            left += _left_above(root / "sys/fs/cgroup", path, GROUP_FILES)
    return left


def _left_above(mount: Path, path: str, files: tuple[str, str, tuple[str, ...]]) -> list[int | None]:
    """What is left in the group `path` below `mount`, and in every one that it lies in.

    In a container the path may be that of the host, which is not there: the limit then stands at the mount.
    """
    limit_file, usage_file, caches = files
    group = mount / path.strip("/")
    left = []
    for folder in (group, *group.parents):
        limit, usage = _number(folder / limit_file), _number(folder / usage_file)
        if limit is not None and usage is not None:
            cached = sum(_entry(folder / "memory.stat", name) or 0 for name in caches)
            left.append(max(0, limit - usage + min(cached, usage)))
        if folder == mount:
            break
    return left


def _number(file: Path) -> int | None:
    """The number in `file`; None: no such file, or `max`, which is no limit."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def _entry(file: Path, name: str, unit: int = 1) -> int | None:
    """The number behind `name` in a file of lines; None: no such line."""
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        words = line.split()
        if words[:1] == [name] and words[1:] and words[1].isdigit():
            return unit * int(words[1])
    return None
