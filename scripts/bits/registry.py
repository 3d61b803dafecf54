"""What a case is, and how that which it returns becomes hashes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# In which process a case runs: a plain one, one where a CPU stands in for a GPU, each of two in a gloo group.
MODES = ("plain", "rehearsal", "pair")


@dataclass(frozen=True)
class Place:
    """Where a case may write, and where it finds what the old tree wrote (both the same in the old tree)."""

    scratch: Path
    handed: Path


@dataclass(frozen=True)
class Case:
    group: str
    name: str
    run: Callable[[Place], Any]
    mode: str
    quick: bool
    refused: bool  # an error is what is expected

    @property
    def title(self) -> str:
        return f"{self.group}: {self.name}"


CASES: list[Case] = []


def add(
    group: str,
    name: str,
    run: Callable[[Place], Any],
    *,
    mode: str = "plain",
    quick: bool = True,
    refused: bool = False,
) -> None:
    case = Case(group, name, run, mode, quick, refused)
    if case.title in {known.title for known in CASES}:
        raise ValueError(f"two cases are called {case.title!r}")
    CASES.append(case)


def select(*, quick: bool, word: str) -> list[Case]:
    return [case for case in CASES if word in case.title and (case.quick or not quick)]


def hashed(value: Any) -> dict[str, str]:
    """What a case returned, as one text for each tensor, number and name in it."""
    return {name or "result": _text(leaf) for name, leaf in _leaves(value, "")}


def _leaves(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    if hasattr(value, "_asdict"):
        value = value._asdict()
    if isinstance(value, Mapping):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    for key, item in items:
        yield from _leaves(item, f"{name}.{key}" if name else str(key))


def _text(leaf: Any) -> str:
    """Type, shape and SHA-256 of the bytes of a tensor; anything else as Python writes it."""
    if not isinstance(leaf, Tensor):
        return repr(leaf)
    kind = f"{str(leaf.dtype).removeprefix('torch.')} {list(leaf.shape)}"
    data = leaf.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    value = f" ({leaf.item()!r})" if leaf.numel() == 1 else ""
    return f"{kind} {hashlib.sha256(kind.encode() + data).hexdigest()[:32]}{value}"
