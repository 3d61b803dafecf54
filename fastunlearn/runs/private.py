"""`RUN/private`: what of a run could give an image back, or confirm one, for its owner's eyes alone.

The folder has mode 0700, every file in it 0600. It holds the checkpoints of a run that is not finished (the
moments of an optimizer are gradients on images), caches and estimates, and `record.json`: the seed of the
draws, where the images to forget lay, and the key of the identifiers.

Whatever stands outside of it names data by HMACs under that key only: a plain hash of a set with one image
would confirm a candidate to anybody who can guess it.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from ..host.atomic import atomic_file, close_to_others, restore_displaced
from ..host.plain_json import read_json

PRIVATE_FOLDER = "private"  # inside a run folder: `purge` removes what is in it
RECORD = "record.json"
LINEAGE_KEY = "lineage.key"  # beside it; `purge` leaves it (lineage.py)
FORMAT = "fastunlearn-private"
HASH = re.compile("[0-9a-f]{64}")  # a SHA-256, and a key, as they are written


def check_private(run_dir: str | Path) -> Path:
    """`run_dir/private`, whether it is there or not.

    Raises:
        ValueError: it is a link: what is written there would lie elsewhere, where `purge` removes nothing.
    """
    folder = Path(run_dir) / PRIVATE_FOLDER
    if folder.is_symlink():
        raise ValueError(f"output_dir: expected a folder {PRIVATE_FOLDER} of its own, got a link, {folder}")
    return folder


def private_folder(run_dir: str | Path) -> Path:
    """`run_dir/private`, made if it is missing, and closed to others.

    Raises:
        ValueError: as `check_private`.
        OSError: it cannot be made.
    """
    folder = check_private(run_dir)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    # One that was there already, or that a mask made smaller.
    close_to_others(folder)
    return folder


# --- record.json --------------------------------------------------------------------------------------------


def read_private(folder: str | Path) -> dict[str, Any]:
    """The record in a private folder; empty where there is none.

    Raises:
        ValueError: it is no such record.
    """
    path = Path(folder) / RECORD
    restore_displaced(path.parent, RECORD)  # a kill may have come while it was replaced
    if not os.path.lexists(path):
        return {}
    try:
        record = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path}: expected the private record of a run, got {error}") from None
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise ValueError(f"{path}: expected a {FORMAT} record")
    key = record.get("identifiers_key")
    if not is_hash(key):
        raise ValueError(f"{path}: identifiers_key: expected 64 hex digits")
    seed = record.get("seed", 0)
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
        raise ValueError(f"{path}: seed: expected an integer in [0, 2^63)")
    return record


def update_private(run_dir: str | Path, **entries: Any) -> dict[str, Any]:
    """Replaces entries of the record of a run, and returns it; a new one gets a key of its own."""
    folder = private_folder(run_dir)
    record = read_private(folder)
    if not record:
        record = {"format": FORMAT, "version": 1, "identifiers_key": secrets.token_hex(32)}
    record |= entries
    with atomic_file(folder / RECORD, mode=0o600) as file:
        file.write((json.dumps(record, indent=1) + "\n").encode())
    return record


def key_in(folder: str | Path) -> str | None:
    """The key of the identifiers, as its private folder has it; None: it has none."""
    return read_private(folder).get("identifiers_key")


def new_seed(*, of_torch: bool = False) -> int:
    """A seed that nobody can guess.

    Args:
        of_torch: of weights too, for which torch's CPU generator reads 32 bits. No image depends on it.
    """
    # One more is counted up for each request of a protocol; all of them are below 2^63.
    return secrets.randbits(32) if of_torch else secrets.randbelow(2**63 - 2**32)


# --- identifiers --------------------------------------------------------------------------------------------


def keyed(description: Any, key: str) -> Any:
    """`description`, a value of JSON, with its HMAC-SHA256 under `key` in place of every SHA-256 in it.

    What stood under `sha256` stands under `hmac_sha256`.
    """
    if isinstance(description, dict):
        names = {name: "hmac_sha256" if name == "sha256" else name for name in description}
        return {names[name]: keyed(value, key) for name, value in description.items()}
    if isinstance(description, list):
        return [keyed(value, key) for value in description]
    # A hash is told by its look, so that none is forgotten, whatever it is called.
    if is_hash(description):
        return _hmac(description, key)
    return description


def is_hash(value: Any) -> bool:
    """Whether it is a SHA-256, an HMAC or a key, as they are written."""
    return isinstance(value, str) and HASH.fullmatch(value) is not None


def key_check(key: str) -> str:
    """Tells two keys apart, and says nothing else of them."""
    return _hmac("which key", key)[:16]


def _hmac(text: str, key: str) -> str:
    return hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()
