"""Whether a state that was read from a file is one that an object can take, which has one of its own.

Nothing here changes anything. So a checkpoint is looked at as a whole before any part of it is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..host import check

# Numbers of torch's, diffusers' and our objects that count steps.
COUNTERS = (
    "last_epoch",
    "_step_count",
    "optimization_step",
    "step_index",
    "skipped_steps",
    "_growth_tracker",
)
FLOAT32_MAX = torch.finfo(torch.float32).max
COUNTER_END = 2**32  # a step has 32 bits in the counters of random numbers
# Numbers of torch's and diffusers' objects that are never below 0.
NOT_NEGATIVE = (
    "lr",
    "initial_lr",
    "max_lr",
    "min_lr",
    "base_lrs",
    "_last_lr",
    "eps",
    "weight_decay",
    "momentum",
    "betas",
    "decay",
    "scale",
    "step",
)


@dataclass(frozen=True)
class Entry:
    """One value of a checkpoint, as messages name it: a tensor of `STEM.safetensors`, or of metadata.json."""

    path: Path
    stem: str
    name: str = ""

    def __getitem__(self, key: Any) -> Entry:
        """The entry `key` of this one."""
        prefix = f"{self.name}." if self.name else ""
        return replace(self, name=f"{prefix}{key}")

    @property
    def key(self) -> str:
        """The last word of the name that is no position in a list."""
        words = [word for word in self.name.split(".") if not word.isdigit()]
        return words[-1] if words else ""

    def error(self, expected: str, found: Any) -> ValueError:
        """What to raise where `expected` should stand and `found` does: it names file and entry."""
        # A state lies in two files: its tensors in one, all else in the other.
        file = f"{self.stem}.safetensors" if isinstance(found, Tensor) else "metadata.json"
        name = check.in_a_line(f"{self.stem}.{self.name}" if self.name else self.stem)
        got = check.describe(found)
        if isinstance(found, (list, tuple, dict)):
            got = f"a {type(found).__name__} of {len(found)}"
        return ValueError(f"{self.path / file}: {name}: expected {expected}, got {got}")


def check_state(
    entry: Entry, found: Any, own: Any, moving: Collection[str] | None = None, *, growing: bool = False
) -> None:
    """Whether `found` may take the place of `own`: the same keys, lengths, kinds, shapes, dtypes; finite.

    Args:
        own: a `state_dict()` of the object that `found` is for, or a part of one. Where it is None, `found`
            may be any number or text.
        moving: names of what changes in a run: all other numbers and texts have to be equal to those of
            `own`. None: it is not known what changes.
        growing: of an object of the user's: what is None or empty at first may have become anything finite,
            and lists of numbers may have other lengths.

    Raises:
        ValueError: naming file and entry.
    """
    # Some objects fill their state as they go: what is empty before the first step says nothing of its kind.
    if growing and _may_grow(own):
        check_finite(entry, found)
    elif isinstance(own, Tensor):
        check_tensor(entry, found, own)
    elif isinstance(own, Mapping):
        check_keys(entry, found, own)
        for key, value in own.items():
            # The functions of a LambdaLR are the user's. Where they are objects their attributes stand here,
            # and nobody knows which of them change.
            if key == "lr_lambdas":
                check_state(entry[key], found[key], value, None, growing=True)
            else:
                check_state(entry[key], found[key], value, moving, growing=growing)
    elif isinstance(own, (list, tuple)):
        kind = list if isinstance(own, list) else tuple
        if not isinstance(found, kind) or len(found) != len(own):
            raise entry.error(f"a {kind.__name__} of {len(own)} values", found)
        for index, value in enumerate(own):
            check_state(entry[index], found[index], value, moving, growing=growing)
    elif moving is not None and entry.key not in moving and not _equal(found, own):
        raise entry.error(f"{own!r}, the present setting", found)
    elif isinstance(own, (int, float)) and not isinstance(own, bool):
        check_number(entry, found, own)
    elif own is None:
        if isinstance(found, (Tensor, Mapping, list, tuple)):
            raise entry.error("None, a number or a text", found)
        if isinstance(found, (int, float)):
            check_number(entry, found, 0.0)
    elif type(found) is not type(own):
        raise entry.error(f"{check.describe(own)} or another {type(own).__name__}", found)


def _may_grow(own: Any) -> bool:
    """Whether `own` is None, empty, or a list of numbers and texts."""
    if isinstance(own, list):
        return all(isinstance(item, (bool, int, float, str)) for item in own)
    return own is None or own == {}


def check_finite(entry: Entry, found: Any) -> None:
    """Whether all tensors and numbers in `found` are finite."""
    if isinstance(found, Mapping):
        for key, value in found.items():
            check_finite(entry[key], value)
    elif isinstance(found, (list, tuple)):
        for index, value in enumerate(found):
            check_finite(entry[index], value)
    elif isinstance(found, Tensor):
        check_tensor(entry, found, torch.zeros_like(found))
    elif isinstance(found, (int, float)) and not isinstance(found, bool):
        check_number(entry, found, 0.0)


def _equal(found: Any, own: Any) -> bool:
    """1 is 1.0, and is not True."""
    return found == own and isinstance(found, bool) == isinstance(own, bool)


def check_keys(entry: Entry, found: Any, own: Mapping) -> None:
    """Whether `found` is a dict with exactly the keys of `own`."""
    if not isinstance(found, Mapping):
        raise entry.error("an entry for each name", found)
    for key in own:
        if key not in found:
            raise entry[key].error("an entry of this name", None)
    for key in found:
        if key not in own:
            raise entry[key].error("no entry of this name", found[key])


def check_tensor(entry: Entry, found: Any, own: Tensor) -> None:
    """Whether `found` has the shape and dtype of `own`, and finite values (but where `own` has others)."""
    expected = f"{str(own.dtype).removeprefix('torch.')} of shape {tuple(own.shape)}"
    if not isinstance(found, Tensor) or found.shape != own.shape or found.dtype != own.dtype:
        raise entry.error(expected, found)
    if not (found.is_floating_point() or found.is_complex()):
        return
    # The usual case takes one pass, without a mask as large as the tensor.
    if not torch.isfinite(found).all():
        bad = ~torch.isfinite(found)
        if (bad & torch.isfinite(own.detach().to(found.device))).any():
            raise entry.error(f"finite values, not {int(bad.sum())} that are NaN or Inf", found)


def check_number(entry: Entry, found: Any, own: float) -> None:
    """Whether `found` is a number that can stand where `own` does.

    Finite if `own` is, not below 0 if its name says so, and an integer of 32 bits if it counts steps.
    """
    # True is an int in Python, and no number in a state.
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        raise entry.error("a number", found)
    if entry.key in COUNTERS:
        low = min(0, int(own))  # -1: a scheduler whose turn has not come
        if not isinstance(found, int) or not low <= found < COUNTER_END:
            raise entry.error(f"an integer in [{low}, {COUNTER_END})", found)
    # JSON has integers of any length; torch has 64 bits for them.
    elif isinstance(found, int) and abs(found) >= 2**63:
        raise entry.error("a number of at most 64 bits", found)
    elif math.isfinite(own) and not math.isfinite(found):
        raise entry.error("a finite number", found)
    elif entry.key in NOT_NEGATIVE and own >= 0 and not 0 <= found <= FLOAT32_MAX:
        raise entry.error("a float32 number >= 0", found)
    elif entry.key == "scale" and found == 0:
        raise entry.error("a number > 0", found)
    elif entry.key == "betas" and found > 1:
        raise entry.error("a number in [0, 1]", found)


def like(found: Any, own: Any, device: torch.device) -> Any:
    """`found` with every tensor on the device and in the layout of that in `own`, paired by `check_state`.

    Args:
        device: of tensors that are new.
    """
    if isinstance(found, Tensor):
        if isinstance(own, Tensor):
            return torch.empty_like(own).copy_(found)
        return found.to(device)
    if isinstance(found, Mapping):
        known = own if isinstance(own, Mapping) else {}
        # JSON may have come back in another order: some objects go through their state in theirs.
        order = known if known.keys() == found.keys() else found
        return {key: like(found[key], known.get(key), device) for key in order}
    if isinstance(found, (list, tuple)):
        known = own
        if not isinstance(own, (list, tuple)) or len(own) != len(found):
            known = [None] * len(found)
        return type(found)(like(value, other, device) for value, other in zip(found, known, strict=True))
    return found
