"""Which images the runs before this one were asked to forget, said in a way that only a key can read.

`model/lineage.json` holds an HMAC-SHA256 of every row that a network was made to forget, by the last run and
by those before it. It is handed on from run to run, so that no later one teaches the network such an image
again because it still stands among the images to keep. Without the key nobody can tell whether an image is
among them; with it everybody can who has the image. The key lies in `private/lineage.key` of the run, or
where its owner keeps it (docs/lineage.md).

Rows are the same where `host.store.overlap` says so. They can only be compared if they were decoded alike,
so rows stand in groups, each with what says how: shape, dtype and the options of `load_images`.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..host import check
from ..host.arrays import name
from ..host.atomic import atomic_file
from ..host.folder_lock import locked, locked_file
from ..host.plain_json import read_bytes, read_json
from ..host.store import ImageStore, row_contents
from .private import LINEAGE_KEY, PRIVATE_FOLDER, is_hash

FILE = "lineage.json"  # beside model_index.json
FORMAT, VERSION = "fastunlearn-lineage", 1
KEY_BYTES = 32
LONGEST_KEY = 1000  # bytes of a file with one
LONGEST_WORD = 100  # characters of an option, or of its value
CHECKED = b"the key of a lineage"  # what is hashed to tell one key from another; no row begins like this
# Options of `load_images` that the shape of the rows tells.
OF_THE_SHAPE = ("size", "channels")
# What such an option does not refuse, it leaves as it is: whatever another one does, it does not to these.
REFUSING = {"crop": "none", "alpha": "refuse"}


@dataclass(frozen=True)
class Group:
    """Forgotten rows that were decoded alike.

    Attributes:
        shape: `[C, H, W]`.
        dtype: of their store, such as "uint8".
        latents: whether they are latents.
        options: exif, crop, resample and alpha, as `load_images` was told; None: not said.
        rows: an HMAC each, in hex.
    """

    shape: tuple[int, ...]
    dtype: str
    latents: bool
    options: tuple[tuple[str, str], ...] | None
    rows: frozenset[str]

    def head(self) -> dict[str, Any]:
        """What rows of this group have in common, for JSON."""
        options = None if self.options is None else dict(self.options)
        alike = {"shape": list(self.shape), "dtype": self.dtype, "latents": self.latents}
        return alike | {"options": options}


@dataclass(frozen=True)
class Part:
    """The groups under one key; `key_check` says which."""

    key_check: str
    groups: tuple[Group, ...]


@dataclass(frozen=True)
class Lineage:
    """What `lineage.json` says. It has more than one part where a run had no key to what it handed on."""

    parts: tuple[Part, ...] = ()

    def __len__(self) -> int:
        """How many rows were forgotten."""
        return sum(len(group.rows) for part in self.parts for group in part.groups)

    def opened_by(self, key: bytes) -> bool:
        """Whether `key` is the key to all of it."""
        return all(part.key_check == _key_check(key) for part in self.parts)

    def is_under(self, key: bytes) -> bool:
        """Whether `key` is the key to a part of it."""
        return any(part.key_check == _key_check(key) for part in self.parts)

    def content(self) -> bytes:
        """The bytes of `lineage.json`: the same for the same rows, in whatever order they were forgotten."""
        parts = [
            {
                "key_check": part.key_check,
                "groups": [group.head() | {"rows": sorted(group.rows)} for group in part.groups],
            }
            for part in self.parts
        ]
        record = {"format": FORMAT, "version": VERSION, "parts": parts}
        return (json.dumps(record, indent=1) + "\n").encode()


# --- rows ---------------------------------------------------------------------------------------------------


def rows_to_leave_out(
    retain: ImageStore, lineage: Lineage, key: bytes, options: Mapping[str, Any] | None = None
) -> Tensor:
    """The rows of `retain` that an earlier run was asked to forget.

    The store is streamed.

    Args:
        key: that the lineage was written with (`read_key`).
        options: those that `load_images` has read `retain` with (`Reading.options`); None: not compared.

    Returns:
        int64 `[M]` on the CPU, ascending.

    Raises:
        ValueError: the key is another one, or rows that were decoded so cannot be compared with those that
            were forgotten: naming what differs, with both values.
    """
    if not lineage.opened_by(key):
        raise ValueError("lineage_key: expected the key that the lineage was written with, got another")
    groups = [group for part in lineage.parts for group in part.groups]
    for group in groups:
        _check_comparable(retain, options, group)
    forgotten = frozenset().union(*(group.rows for group in groups))
    found = [row for row, value in enumerate(_hashed(retain, key)) if value in forgotten]
    return torch.tensor(found, dtype=torch.int64)


def with_rows(
    lineage: Lineage, key: bytes, forget: ImageStore, options: Mapping[str, Any] | None = None
) -> Lineage:
    """`lineage` and the rows of `forget`, under `key`; what it holds under another key stays as it is.

    Args:
        options: those that `load_images` has read `forget` with (`Reading.options`); None: not said.
    """
    added = Group(
        shape=forget.shape,
        dtype=name(forget.dtype),
        latents=forget.latents,
        options=_told(options),
        rows=frozenset(_hashed(forget, key)),
    )
    check = _key_check(key)
    groups = {part.key_check: part.groups for part in lineage.parts}
    groups[check] = _with_group(groups.get(check, ()), added)
    return Lineage(tuple(Part(check, groups[check]) for check in sorted(groups)))


def _with_group(groups: tuple[Group, ...], added: Group) -> tuple[Group, ...]:
    """The groups and the rows of `added`: in the group that they belong to, or as one more."""
    joined = [
        replace(group, rows=group.rows | added.rows) if group.head() == added.head() else group
        for group in groups
    ]
    if all(group.head() != added.head() for group in groups):
        joined.append(added)
    return tuple(sorted(joined, key=lambda group: json.dumps(group.head())))


def _hashed(store: ImageStore, key: bytes) -> Iterator[str]:
    """An HMAC of each row, in hex: equal where `overlap` calls rows of this shape and dtype equal."""
    about = f" {name(store.dtype)} {list(store.shape)} latents={store.latents}\n".encode()
    for kind, row in row_contents(store, as_stored=True):
        code = hmac.new(key, kind + about, "sha256")
        code.update(row)
        yield code.hexdigest()


def _told(options: Mapping[str, Any] | None) -> tuple[tuple[str, str], ...] | None:
    """What of the options of `load_images` the shape of the rows does not say."""
    if options is None:
        return None
    told = {option: str(value) for option, value in options.items() if option not in OF_THE_SHAPE}
    return tuple(sorted(told.items()))


def _check_comparable(retain: ImageStore, options: Mapping[str, Any] | None, group: Group) -> None:
    """Whether a row of `group`, if it stood in `retain`, would have the same bytes there.

    Raises:
        ValueError: it would not.
    """
    whose = "as images that were forgotten before have"
    for what, here, there in (
        ("the shape", list(retain.shape), list(group.shape)),
        ("the dtype", name(retain.dtype), group.dtype),
        ("latents", retain.latents, group.latents),
    ):
        if here != there:
            raise ValueError(f"retain: expected {what} {there}, {whose}, got {here}")
    ours, theirs = _told(options), group.options
    if ours is None or theirs is None:
        return
    here, there = dict(ours), dict(theirs)
    for option in sorted(here.keys() | there.keys()):
        values = here.get(option), there.get(option)
        if values[0] != values[1] and REFUSING.get(option, "") not in values:
            expected = f"expected {values[1]}, with which images were read that were forgotten before"
            raise ValueError(f"{option}: {expected}, got {values[0]}")


# --- lineage.json -------------------------------------------------------------------------------------------


def file_of(model: str | Path) -> Path | None:
    """The `lineage.json` of a pipeline, or of the folder of the network in one; None: it has none."""
    folder = Path(os.path.realpath(model))
    for place in (folder, folder.parent):
        if os.path.lexists(place / FILE):
            return place / FILE
    return None


def read_lineage(model: str | Path) -> Lineage:
    """The lineage of the network in the folder `model`; an empty one where there is none.

    Raises:
        ValueError: its file cannot be read, or is no such record.
    """
    file = file_of(model)
    if file is None:
        return Lineage()
    expected = f"model: expected {file} to be a {FORMAT} record of version {VERSION}"
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{expected}, got {error}") from None
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{expected}, got another")
    if content.get("version") != VERSION:
        raise ValueError(f"{expected}, got one of version {check.describe(content.get('version'))}")
    parts = content.get("parts")
    if not isinstance(parts, list) or not all(map(_is_part, parts)):
        raise ValueError(f"{expected}, got one that is damaged")
    checks = [part["key_check"] for part in parts]
    if len(checks) != len(set(checks)):
        raise ValueError(f"{expected}, got one with two parts under one key")
    return Lineage(tuple(_part(part) for part in parts))


def _is_part(content: Any) -> bool:
    if not isinstance(content, dict) or not is_hash(content.get("key_check")):
        return False
    groups = content.get("groups")
    return isinstance(groups, list) and all(map(_is_group, groups))


def _is_group(content: Any) -> bool:
    if not isinstance(content, dict) or content.keys() != {"shape", "dtype", "latents", "options", "rows"}:
        return False
    shape, options, rows = content["shape"], content["options"], content["rows"]
    texts = isinstance(options, dict) and all(map(_is_word, [*options, *options.values()]))
    return (
        isinstance(shape, list)
        and all(type(length) is int for length in shape)
        and _is_word(content["dtype"])
        and isinstance(content["latents"], bool)
        and (options is None or texts)
        and isinstance(rows, list)
        and all(map(is_hash, rows))
    )


def _is_word(content: Any) -> bool:
    """Whether it may stand in an error."""
    return isinstance(content, str) and content.isprintable() and len(content) <= LONGEST_WORD


def _part(content: dict[str, Any]) -> Part:
    groups = tuple(
        Group(
            shape=tuple(group["shape"]),
            dtype=group["dtype"],
            latents=group["latents"],
            options=_told(group["options"]),
            rows=frozenset(group["rows"]),
        )
        for group in content["groups"]
    )
    return Part(content["key_check"], groups)


# --- the key ------------------------------------------------------------------------------------------------


def new_key() -> bytes:
    """32 random bytes."""
    return secrets.token_bytes(KEY_BYTES)


def read_key(path: str | Path) -> bytes:
    """The key in a file.

    Raises:
        ValueError: there is none.
    """
    expected = f"lineage_key: expected {path} to hold {2 * KEY_BYTES} hex digits"
    try:
        text = read_bytes(path, LONGEST_KEY).decode("ascii", "replace").strip()
    except ValueError as error:
        raise ValueError(f"{expected}, got {error}") from None
    if not is_hash(text):
        raise ValueError(f"{expected}, got other text")
    return bytes.fromhex(text)


def write_key(path: str | Path, key: bytes) -> None:
    """Puts the key into a file that only its owner may read."""
    with atomic_file(path, mode=0o600) as file:
        file.write(f"{key.hex()}\n".encode())


def shared_key(path: str | Path) -> bytes:
    """The key in a file, which gets a new one if it is not there; of several runs at once, all get the same.

    Raises:
        ValueError: the file holds no key.
        FolderLocked: another run makes it at this moment.
        OSError: it cannot be written.
    """
    if os.path.lexists(path):
        return read_key(path)
    with locked_file(path, "lineage key"):
        if not os.path.lexists(path):
            write_key(path, new_key())
        return read_key(path)


def _key_check(key: bytes) -> str:
    return hmac.digest(key, CHECKED, "sha256").hex()


def forget_lineage(run_dir: str | Path) -> list[Path]:
    """Removes the lineage of a run, and its key: later runs from its model may learn the images again.

    A key elsewhere (`--lineage_key`) stays, and so does what other runs have of either.

    Returns:
        What was removed.

    Raises:
        FolderLocked: another process, or another thread, writes to `run_dir`.
    """
    with locked(run_dir, "forget_lineage"):
        removed = what_tells(run_dir)
        for file in removed:
            file.unlink()
    return removed


def what_tells(run_dir: str | Path) -> list[Path]:
    """The lineage that a run has left, and its key, as far as they are there.

    Both together say of any image whether it was forgotten.
    """
    files = (Path(run_dir) / "model" / FILE, Path(run_dir) / PRIVATE_FOLDER / LINEAGE_KEY)
    # Behind a link to a folder would be the files of somebody else.
    return [file for file in files if os.path.lexists(file) and not file.parent.is_symlink()]
