"""The neighbours that an `Unlearner` serves: searched or given, checked, on its device."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from ..host import check
from ..host.store import ImageStore
from ..neighbors.copies import NearCopyWarning, copies_among_neighbors
from ..neighbors.nearest import check_neighbors, nearest_neighbors

# From integer squared distances to those of images in [-1, 1].
UINT8_SCALE = (2 / 255) ** 2


def find_neighbors(
    forget: ImageStore,
    retain: ImageStore,
    k: int,
    given: tuple[Tensor, Tensor] | None,
    device: torch.device,
    *,
    searched: ImageStore,
    warn: bool,
    within_condition: bool = False,
) -> tuple[Tensor, Tensor]:
    """The `k` nearest rows of `retain` for each forget row.

    Args:
        given: `(index [N, k], sqdist [N, k])` as `nearest_neighbors` returns them; None: they are searched.
        searched: `retain`, where it lies: perhaps on the device.
        warn: of neighbours that show the forget row itself.
        within_condition: among the rows that have the label of the forget row; both stores have labels.

    Returns:
        `[N, k]` int64 and float64 on `device`; squared distances between images in [-1, 1].

    Raises:
        TypeError, ValueError: naming what of `k`, `neighbors` or the labels does not fit.
    """
    k = check.integer("k", k, low=1, high=len(retain), of="the rows of retain")
    labels = labels_of(forget, retain) if within_condition else None
    if given is None:
        index, sqdist = nearest_neighbors(forget, searched, k, labels=labels)
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        index, sqdist = given
    else:
        expected = "expected a pair (index, sqdist) as nearest_neighbors returns it"
        raise TypeError(f"neighbors: {expected}, got {check.describe(given)}")
    _check_pair(index, sqdist, (len(forget), k), retain)
    if given is not None:
        check_neighbors(forget, searched, index, sqdist)
        if labels is not None:
            _check_labels(index, *labels)
    if warn and not retain.latents:
        _warn_of_near_copies(forget, retain, index, sqdist)
    sqdist = sqdist.double()
    if retain.is_uint8:
        sqdist = sqdist * UINT8_SCALE
    return index.long().to(device), sqdist.to(device)


def labels_of(forget: ImageStore, retain: ImageStore) -> tuple[Tensor, Tensor]:
    """The labels of both sets, which `within_condition` compares.

    Raises:
        ValueError: a set has none.
    """
    for name, store in (("forget", forget), ("retain", retain)):
        if store.labels is None:
            expected = "expected an ImageStore with labels, which within_condition=True compares"
            raise ValueError(f"{name}: {expected}, got one without")
    return forget.labels, retain.labels


def _check_labels(index: Tensor, forget: Tensor, retain: Tensor) -> None:
    """
    Raises:
        ValueError: a neighbour has another label than the forget row.
    """
    found = retain[index.cpu().long()]
    other = (found != forget[:, None]).any(1)
    if other.any():
        row = int(other.nonzero()[0])
        expected = "neighbours with the label of the forget row (within_condition=True)"
        got = f"labels {sorted(set(found[row].tolist()))} for row {row} of label {int(forget[row])}"
        raise ValueError(f"neighbors: expected {expected}, got {got}")


def _check_pair(index: Tensor, sqdist: Tensor, shape: tuple[int, int], retain: ImageStore) -> None:
    """
    Raises:
        TypeError, ValueError: they are not rows of `retain` and distances, each of `shape`.
    """
    check.tensor("neighbors[0]", index, ndim=2, floating=False)
    # Of uint8 rows: the integer distance, scaled later.
    check.tensor("neighbors[1]", sqdist, ndim=2, floating=not retain.is_uint8)
    if index.shape != shape or sqdist.shape != index.shape:
        expected = f"expected index and sqdist of shape {shape}"
        raise ValueError(f"neighbors: {expected}, got {tuple(index.shape)} and {tuple(sqdist.shape)}")
    if int(index.min()) < 0 or int(index.max()) >= len(retain):
        got = f"[{int(index.min())}, {int(index.max())}]"
        raise ValueError(f"neighbors: expected rows of retain, [0, {len(retain) - 1}], got {got}")


def _warn_of_near_copies(forget: ImageStore, retain: ImageStore, index: Tensor, sqdist: Tensor) -> None:
    found = copies_among_neighbors(forget, retain, index, sqdist)
    if len(found):
        hint = "near_copies(forget, retain) finds all of them, retain.select(rows) leaves them out"
        text = f"neighbors: expected images that do not show the image to forget, got {found}. {hint}"
        # Said of the line that makes the Unlearner: above `find_neighbors`, `_find_neighbors` and `__init__`.
        warnings.warn(text, NearCopyWarning, stacklevel=5)
