"""Reading golden vectors: the papers' own numbers, made by running their code (`tests/golden/data/README.md`
says how).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..objective.schedule import NoiseSchedule

VARIABLE = "FASTUNLEARN_GOLDEN"


def root(selection: Path) -> Path:
    """The folder with `losses/`, `steps/` and `knn/`: `$FASTUNLEARN_GOLDEN` where it is set, else the
    committed `selection`.

    Raises:
        FileNotFoundError: the folder is missing or holds no vectors. A test-suite without its numbers must
            fail, not pass empty.
    """
    folder = Path(os.environ.get(VARIABLE) or selection)
    for part in ("losses", "steps", "knn"):
        if not any(folder.glob(f"{part}/*.npz")):
            raise FileNotFoundError(f"{VARIABLE}: expected a folder with {part}/*.npz, got {folder}")
    return folder


def case_names(folder: Path, prefix: str = "") -> list[str]:
    """The cases that the manifests of `folder` announce and whose name starts with `prefix`; every one must
    be there.

    Raises:
        FileNotFoundError: a manifest announces a case without a file, or no case has the prefix.
    """
    announced = {
        name.rpartition("/")[2]
        for manifest in sorted(folder.glob("manifest*.json"))
        for name in json.loads(manifest.read_text())
    }
    names = sorted(name for name in announced if name.startswith(prefix))
    missing = [name for name in names if not (folder / f"{name}.npz").is_file()]
    if missing or not names:
        raise FileNotFoundError(
            f"{folder}: expected the cases of its manifests ({prefix}*), missing {missing or 'all'}"
        )
    return names


class Case:
    """One `.npz` of golden vectors: arrays as tensors, settings in `meta`."""

    def __init__(self, path: Path):
        with np.load(path, allow_pickle=False) as arrays:
            self._arrays = {key: arrays[key] for key in arrays.files}
        self.name, self.meta = path.stem, json.loads(str(self._arrays.pop("meta")))

    def __contains__(self, key: str) -> bool:
        return key in self._arrays

    def __call__(self, key: str, dtype: torch.dtype | None = None) -> Tensor:
        """The array `key`; floats converted to `dtype` (float32 inputs are exact in float64), integers and
        masks as they are.
        """
        tensor = torch.from_numpy(np.array(self._arrays[key]))
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    def keys(self, prefix: str) -> set[str]:
        """The keys that start with `prefix`, without it."""
        return {key[len(prefix) :] for key in self._arrays if key.startswith(prefix)}

    def schedule(self) -> NoiseSchedule:
        return NoiseSchedule.from_alphas_cumprod(self("in.alphas_cumprod"))


def assert_all_checked(expected: set[str], checked: Iterable[str], exceptions: Iterable[str] = ()) -> None:
    """Fail if an array was not checked, without being named in `exceptions`, or if a check has no array."""
    checked, exceptions = set(checked), set(exceptions)
    unchecked, unknown = sorted(expected - checked - exceptions), sorted(checked - expected)
    assert not unchecked, f"golden arrays that no test checks: {unchecked}"
    assert not unknown, f"checked, but not in the golden vectors: {unknown}"
