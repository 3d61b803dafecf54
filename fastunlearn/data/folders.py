"""Folders of images: every file below them is read, or named; none is left out because of its name."""

from __future__ import annotations

import os
import stat
from collections import deque
from collections.abc import Collection, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from .content import in_words
from .options import Options, Part, stack
from .pictures import check_pillow, decode, may_be_picture
from .refusals import Refused, listed, shown

# What file managers and Hugging Face's `imagefolder` leave beside images. Nothing else is passed over.
PASSED_OVER = (".ds_store", "thumbs.db", "desktop.ini", "metadata.jsonl", "metadata.csv")
MANY = 500  # files, from which on reading them takes a second or more
AHEAD = 64  # files that are decoded, or being decoded, before the row of the first is taken
Row = tuple[str, np.ndarray | ValueError]
KINDS = {
    stat.S_IFIFO: "a named pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


@dataclass
class Listing:
    """What lies below a folder. Links to folders are followed; one with several paths is entered once."""

    files: list[Path] = field(default_factory=list)  # regular ones, sorted by path
    passed_over: list[Path] = field(default_factory=list)
    entered_before: list[Path] = field(default_factory=list)  # further paths to a folder
    problems: dict[Path, str] = field(default_factory=dict)  # all else, and why it cannot be read
    entered: set[tuple[int, int]] = field(default_factory=set)  # device and inode of every folder

    @property
    def count(self) -> int:
        return len(self.files) + len(self.problems)

    def sentences(self) -> list[str]:
        return [f"{shown(path)}: {reason}" for path, reason in sorted(self.problems.items())]


def list_folder(root: Path) -> Listing:
    """Everything below `root`, sorted by path; nothing is opened but what may be passed over."""
    listing = Listing()
    folders, links = [root], []
    while folders or links:
        # Real folders are entered first, then links to folders, by path: a link adds only what is not there
        # yet, so a file keeps its real path wherever it has one below `root`.
        if not folders:
            links.sort(reverse=True)
            folders.append(links.pop())
        folder = folders.pop()
        try:
            status = os.stat(folder)
            # Device and inode name a folder whatever path leads to it. This also ends links in circles.
            identity = status.st_dev, status.st_ino
            if identity in listing.entered:
                listing.entered_before.append(folder)
                continue
            listing.entered.add(identity)
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError as error:
            listing.problems[folder] = f"expected a folder that can be read, got {error.strerror}"
            continue
        for entry in found:
            _sort_in(entry, listing, folders, links)
    for paths in (listing.files, listing.passed_over, listing.entered_before):
        paths.sort()
    return listing


def _sort_in(entry: os.DirEntry, listing: Listing, folders: list[Path], links: list[Path]) -> None:
    """Puts one entry of a folder where it belongs."""
    path = Path(entry.path)
    try:
        is_folder, is_file = entry.is_dir(), entry.is_file()
    except OSError:  # a link that leads in circles, or through a locked folder
        is_folder = is_file = False
    if is_folder and entry.is_symlink():
        links.append(path)
    elif is_folder:
        folders.append(path)
    # Only regular files are ever opened: a pipe would wait for a writer.
    elif not is_file:
        listing.problems[path] = _no_file(path)
    elif entry.name.lower() not in PASSED_OVER:
        listing.files.append(path)
    elif may_be_picture(path):
        listing.problems[path] = "expected no image under a name that is passed over, got one: rename it"
    else:
        listing.passed_over.append(path)


def _no_file(path: Path) -> str:
    """Why neither a folder nor a regular file stands at `path`."""
    try:
        kind = KINDS.get(stat.S_IFMT(os.stat(path).st_mode), "something else")
    except OSError as error:
        got = f"{error.strerror}"
        if path.is_symlink():
            got = f"a link to {shown(os.readlink(path))}: {got}"
        return f"expected a file that can be read, got {got}"
    return f"expected a file, got {kind}, which is never opened"


def read_folder(path: Path, options: Options) -> Part:
    """Every file below `path`, sorted by its path, as a row.

    Raises:
        Refused: naming all files that cannot become a row.
        ValueError: no images; loose ones with `labels`.
    """
    check_pillow(options)
    listing = list_folder(path)
    if listing.count == 0:
        but = " in it or below it"
        if listing.passed_over:
            but = f" but what is passed over: {listed(listing.passed_over)}"
        raise ValueError(f"{shown(path)}: expected a folder with images ({in_words()}), got none{but}")
    # All files are decoded before anything is refused, so that one error names every file to look at.
    problems, images = listing.sentences(), None
    try:
        rows = _decode_all(listing.files, options)
        count = len(listing.files)
        images = stack(_with_progress(rows, path, count, options), count, shown(path))
    except Refused as refused:
        problems += refused.problems
    if problems:
        raise Refused(problems, path, listing.count)
    labels = _folder_labels(path, listing.files) if options.labels else None
    return Part(
        images,
        labels,
        files=len(listing.files),
        passed_over=listing.passed_over,
        entered_before=listing.entered_before,
    )


def list_known(root: Path, known: Collection[str], what: str) -> Listing:
    """What lies in a folder of another kind, which holds files called like `known` directly in it.

    Raises:
        Refused: naming all other files, but for those that are passed over.
    """
    listing = list_folder(root)
    for file in listing.files:
        if file.parent != root or file.name not in known:
            expected = f"expected only files of {what} in {shown(root)}"
            listing.problems[file] = f"{expected}, got another one, which would not be read"
    count = len({*listing.files, *listing.problems})
    if listing.problems:
        raise Refused(listing.sentences(), root, count)
    return listing


def _decode_all(files: list[Path], options: Options) -> Iterator[Row]:
    """Names and pixels of `files`, in order; where one cannot be decoded, the error in place of pixels."""

    def attempt(file: Path) -> np.ndarray | ValueError:
        try:
            return decode(file, file, options)
        except ValueError as error:
            return error

    # Threads are enough, since Pillow releases the GIL while it decodes. More than eight wait for the disk.
    pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1))
    ahead: deque[tuple[str, Future]] = deque()
    try:
        for file in files:
            ahead.append((shown(file), pool.submit(attempt, file)))
            # Behind a file that takes long, the others would all be decoded and held.
            if len(ahead) > AHEAD:
                name, decoded = ahead.popleft()
                yield name, decoded.result()
        for name, decoded in ahead:
            yield name, decoded.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _with_progress(rows: Iterator[Row], path: Path, count: int, options: Options) -> Iterator[Row]:
    """`rows`, with a progress bar if one was asked for, and there are so many that they take a while."""
    from rich.progress import Progress

    shows = options.show_progress and count >= MANY
    if shows:
        # At once: where the output is no terminal, the bar is printed when all is done.
        print(f"reading {count} files below {shown(path)}", flush=True)
    with Progress(disable=not shows) as bar:
        yield from bar.track(rows, total=count, description="reading")


def _folder_labels(root: Path, files: list[Path]) -> np.ndarray:
    """int64 `[N]`: the number of the sub-folder of `root` that each file lies in, however deep.

    Raises:
        ValueError: a file that lies in none.
    """
    for file in files:
        if file.parent == root:
            expected = f"every image in a sub-folder of {root} that names its class (labels=True)"
            raise ValueError(f"{file}: expected {expected}, got one outside")
    classes = [file.relative_to(root).parts[0] for file in files]
    number = {name: label for label, name in enumerate(sorted(set(classes)))}
    return np.array([number[name] for name in classes], np.int64)
