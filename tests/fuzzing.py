"""Valid files, changed at random, and what a reader may make of them: it reads them, or it refuses them with
an error of ours that names the file."""

from __future__ import annotations

import gzip
import io
import json
import os
import resource
import shutil
import struct
import sys
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hypothesis import Phase, settings
from hypothesis import strategies as st

from fastunlearn.cli import _exit_code

ASKED = os.environ.get("FASTUNLEARN_FUZZ_EXAMPLES")
ROOM = 4 << 30  # bytes of addresses that a reader may take beyond those of the process
LINES = 25  # of a message: one for each of the first files or rows that cannot be read
WIDTH = 1500  # characters of a line, with a path of some hundred

# --- what is put where other bytes and values were ----------------------------------------------------------

PIECES = [
    b"\0",
    b"\xff",
    bytes(8),
    b"\xff" * 8,
    struct.pack("<I", 1),
    struct.pack(">I", 1),
    struct.pack("<I", 2**31 - 1),
    struct.pack(">I", 2**31 - 1),
    struct.pack("<I", 10**6),
    struct.pack(">I", 10**6),
    struct.pack("<Q", 2**63),
    bytes(600),
    b"[" * 50,
    b'"',
    b"}",
    b"-1",
    b"9" * 30,
    b"\n",
    b"../",
    b"(" * 300,
]
VALUES = [
    None,
    True,
    False,
    -1,
    0,
    1,
    7,
    2**31,
    2**63,
    -(2**63),
    10**30,
    0.5,
    -1e308,
    1e308,
    float("nan"),
    float("inf"),
    "",
    "x",
    "..",
    "../x",
    "/etc/passwd",
    "\0",
    "\n",
    "\ud800",
    "x" * 2000,
    [],
    [[]],
    [None],
    ["x"],
    [-1, 2**40],
    list(range(40)),
    {},
    {"x": {}},
    {"__tensor__": "x"},
    {"__tuple__": 1},
    {"__items__": [[[], 1]]},
]

# --- changes ------------------------------------------------------------------------------------------------

SHARES = st.integers(0, 2**16 - 1).map(lambda number: number / 2**16)  # a place, as a share of what there is
KINDS = ("flip", "put", "insert", "cut", "drop", "repeat", "swap")
EDITS = st.lists(
    st.tuples(st.sampled_from(KINDS), SHARES, SHARES, st.sampled_from(PIECES)), min_size=1, max_size=3
)
WAYS = ("put", "remove", "add", "double", "rename")
JSON_EDITS = st.lists(
    st.tuples(st.sampled_from(WAYS), SHARES, st.sampled_from(VALUES)), min_size=1, max_size=3
)


def edited(content: bytes, edits: list[tuple[str, float, float, bytes]]) -> bytes:
    """Bytes that were changed, one edit after the other."""
    for kind, first, second, piece in edits:
        start, other = int(first * len(content)), int(second * len(content))
        end = min(len(content), start + max(1, int(second * 64)))
        if kind == "flip" and content:
            flipped = content[start] ^ 1 << int(second * 8)
            content = content[:start] + bytes([flipped]) + content[start + 1 :]
        elif kind == "put":
            content = content[:start] + piece + content[start + len(piece) :]
        elif kind == "insert":
            content = content[:start] + piece + content[start:]
        elif kind == "cut":
            content = content[:start]
        elif kind == "drop":
            content = content[:start] + content[end:]
        elif kind == "repeat":
            content = content[:end] + content[start:end] * 3 + content[end:]
        elif kind == "swap":
            content = content[:other] + content[start:end] + content[other + end - start :]
    return content


def edited_json(value: Any, edits: list[tuple[str, float, Any]]) -> Any:
    """A JSON value some of whose parts were changed, removed, added, doubled or renamed."""
    root = {"root": json.loads(json.dumps(value))}
    for way, share, hostile in edits:
        places = list(_places(root))
        if not places:
            break
        holder, key = places[int(share * len(places))]
        hostile = deepcopy(hostile)  # the next edit may change it
        if way == "put":
            holder[key] = hostile
        elif way == "add" and isinstance(holder, list):
            holder.insert(key, hostile)
        elif way == "add":
            holder["added"] = hostile
        elif way == "double" and isinstance(holder, list):
            holder.append(holder[key])
        elif holder is root:
            continue
        elif way == "rename" and isinstance(holder, dict):
            holder[str(hostile)[:100]] = holder.pop(key)
        else:
            del holder[key]
    return root.get("root")


def _places(holder: Any) -> Iterator[tuple[Any, Any]]:
    """Everything in a JSON value, as what holds it and its key there."""
    items = holder.items() if isinstance(holder, dict) else enumerate(holder)
    for key, value in list(items):
        yield holder, key
        if isinstance(value, (dict, list)):
            yield from _places(value)


# --- changes of what has an inner form ----------------------------------------------------------------------


def inner_json(content: bytes, edits: list) -> bytes:
    """A JSON file with other values."""
    return json.dumps(edited_json(json.loads(content), edits)).encode("utf-8", "surrogatepass")


def inner_safetensors(content: bytes, edits: list) -> bytes:
    """A safetensors file with other values in its header, which is JSON."""
    (length,) = struct.unpack("<Q", content[:8])
    header = inner_json(content[8 : 8 + length], edits)
    return struct.pack("<Q", len(header)) + header + content[8 + length :]


def inner_png(content: bytes, edits: list) -> bytes:
    """A PNG that was changed, with checksums that fit."""
    content = edited(content, edits)
    result, place = content[:8], 8
    while place + 12 <= len(content):
        (length,) = struct.unpack(">I", content[place : place + 4])
        body = content[place + 4 : place + 8 + length]
        if place + 12 + length > len(content):
            break
        result += content[place : place + 4] + body + struct.pack(">I", zlib.crc32(body))
        place += 12 + length
    return result + content[place:]


def inner_zip(content: bytes, edits: list) -> bytes:
    """An archive whose first member was changed, with a checksum that fits."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(buffer, "w") as after:
        for number, name in enumerate(before.namelist()):
            member = before.read(name)
            after.writestr(name, edited(member, edits) if number == 0 else member)
    return buffer.getvalue()


def inner_gzip(content: bytes, edits: list) -> bytes:
    """A gzip file of something else."""
    return gzip.compress(edited(gzip.decompress(content), edits), mtime=0)


INNER: dict[str, tuple[Callable[[bytes, list], bytes], st.SearchStrategy]] = {
    ".json": (inner_json, JSON_EDITS),
    ".safetensors": (inner_safetensors, JSON_EDITS),
    ".png": (inner_png, EDITS),
    ".npz": (inner_zip, EDITS),
    ".gz": (inner_gzip, EDITS),
}


@dataclass(frozen=True)
class Change:
    """What becomes of the file `name`."""

    name: str
    apply: Callable[[bytes, list], bytes]
    edits: list

    def __call__(self, files: dict[str, bytes]) -> dict[str, bytes]:
        return files | {self.name: self.apply(files[self.name], self.edits)}


def changes(names: list[str]) -> st.SearchStrategy[Change]:
    """Changes of one of the files: of its bytes or, where its kind has an inner form, of that."""

    def of(name: str) -> st.SearchStrategy[Change]:
        ways = [(edited, EDITS)]
        if Path(name).suffix in INNER:
            ways.insert(0, INNER[Path(name).suffix])
        return st.one_of([st.builds(Change, st.just(name), st.just(way), edits) for way, edits in ways])

    return st.sampled_from(names).flatmap(of)


# --- outcomes -----------------------------------------------------------------------------------------------


def examples(count: int) -> settings:
    """The same `count` examples at every run; FASTUNLEARN_FUZZ_EXAMPLES asks for others, and more."""
    # A failure says what was changed, which is little: looking for less takes minutes.
    phases = (Phase.explicit, Phase.generate)
    if ASKED is None:
        return settings(max_examples=count, derandomize=True, database=None, phases=phases)
    return settings(max_examples=int(ASKED), derandomize=False, database=None, phases=phases)


def was_read(read: Callable[[Path], Any], folder: Path) -> bool:
    """Whether `read(folder)` succeeds; False: an error of ours.

    Raises:
        AssertionError: any other error, or one that does not name the folder or a file of it.
    """
    try:
        with limited_memory(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
    except Exception as error:
        _check_ours(error, folder)
        return False
    return True


def _check_ours(error: Exception, folder: Path) -> None:
    """That an error is one that the command shows as a line, and names a file below `folder`."""
    text = str(error)
    if _exit_code(error) is None:
        raise AssertionError(f"{type(error).__name__}: {text}") from error
    if str(folder) not in text:
        raise AssertionError(f"names no file: {text}") from error
    lines = text.splitlines()
    if len(lines) > LINES or max(map(len, lines)) > WIDTH:
        raise AssertionError(f"is long: {text}") from error


@contextmanager
def limited_memory() -> Iterator[None]:
    """In the block the process gets no addresses beyond ROOM: a MemoryError, which is none of ours."""
    if sys.platform != "linux":
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + ROOM, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def write(folder: Path, files: dict[str, bytes]) -> None:
    """The files anew: what is still mapped of an earlier example keeps its own."""
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content)


def content_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by their paths in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@dataclass(frozen=True)
class Reader:
    """Files that are read together."""

    files: dict[str, bytes] = field(repr=False)
    read: Callable[[Path], Any]
    prepare: Callable[[Path], Any] = lambda folder: None  # after one of the files was changed


def check(reader: Reader, folder: Path, change: Change) -> None:
    """That the files, one of them changed, are read or refused."""
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, change(reader.files))
    reader.prepare(folder)
    was_read(reader.read, folder)
