"""Images to keep that show an image to forget: compressed, resized, turned or mirrored copies.

A copy that stays among the images to keep undoes the work: ReTrack redirects the image to itself. How copies
are told from images that look alike, and how well, is in docs/near_copies.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..host import check
from ..host.store import ImageStore
from . import renderings
from .copy_search import FIRST_CANDIDATES, CopySearch, Pairs, judged, nearest_in_sample
from .likeness import Judge
from .nearest import nearest_neighbors

FIRST_NEIGHBORS = 4  # of a forget row that `copies_among_neighbors` looks at
SHOWN_IMAGES, SHOWN_COPIES = 5, 3  # in one line


class NearCopyWarning(UserWarning):
    """Images to keep show images to forget."""


@dataclass(frozen=True)
class NearCopies:
    """Pairs of a forget row and a retain row that shows the same, by forget row, then distance.

    `str()` says it in one line, with numbers and rows.

    Attributes:
        forget_rows, retain_rows: int64 `[P]`.
        orientations: int64 `[P]`, how the copy is turned: by `o % 4` quarters and then, from 4 on, mirrored.
        distances: float64 `[P]`, L2 over all pixels between the copy and the forget row turned alike, in
            grey levels 0..255 (of latents: in their own unit).
        radius: the one asked for; None: "auto".
        apart: median distance of images of the retain set to their nearest others, in grey levels; None:
            not measured.
    """

    forget_rows: Tensor
    retain_rows: Tensor
    orientations: Tensor
    distances: Tensor
    radius: float | None = None
    apart: float | None = None

    def __len__(self) -> int:
        return len(self.forget_rows)

    def __str__(self) -> str:
        if len(self) == 0:
            return f"no near copies{self._scale()}"
        forget, retain = self.forget_rows.unique(), self.retain_rows.unique()
        near, far = self.distances.min().item(), self.distances.max().item()
        copies = "1 near copy" if len(retain) == 1 else f"{len(retain)} near copies"
        images = "1 image" if len(forget) == 1 else f"{len(forget)} images"
        rows = [self._of(row) for row in forget[:SHOWN_IMAGES].tolist()]
        if len(forget) > SHOWN_IMAGES:
            rows.append("...")
        away = f"{near:.4g} to {far:.4g} away{self._scale()}"
        return f"{copies} of {images} to forget, {away}: {'; '.join(rows)}"

    def unequal(self) -> NearCopies:
        """Without the pairs of equal rows."""
        unequal = (self.distances > 0) | (self.orientations > 0)
        columns = (self.forget_rows, self.retain_rows, self.orientations, self.distances)
        return NearCopies(*(column[unequal] for column in columns), self.radius, self.apart)

    def _scale(self) -> str:
        """What the distances are to be held against."""
        if self.radius is not None:
            return f" (L2; asked for: at most {self.radius:g})"
        if self.apart is not None:
            return f" (L2 in grey levels; images of the set are {self.apart:.4g} apart)"
        return " (L2 in grey levels)"

    def _of(self, forget_row: int) -> str:
        """The nearest copies of one image."""
        pairs = (self.forget_rows == forget_row).nonzero().flatten().tolist()
        shown = []
        for pair in pairs[:SHOWN_COPIES]:
            about = f"{self.distances[pair].item():.4g}"
            how = renderings.in_words(int(self.orientations[pair]))
            if how:
                about += f", {how}"
            shown.append(f"{int(self.retain_rows[pair])} ({about})")
        if len(pairs) > SHOWN_COPIES:
            shown.append("...")
        return f"forget row {forget_row}: retain rows {', '.join(shown)}"


def near_copies(forget: ImageStore, retain: ImageStore, *, within: float | str = "auto") -> NearCopies:
    """The retain rows that show an image to forget in any of its 8 orientations (4, if it is not square).

    Exactly equal rows are among them. The retain set is streamed. "auto" costs 56 queries of the exact
    neighbour search for each forget row (8 orientations, 7 versions: as they are, and one of the two softened
    in 3 ways), a radius costs 8. Where half of the candidates of a row are copies, it is searched for more.

    Args:
        forget: `[N, C, H, W]`, images or latents.
        retain: `[M, C, H, W]`, of the same kind.
        within: "auto": what compression (JPEG of quality 60 or better) and resizing (to half or more, and
            back) make of either of the two. A number: all rows at an L2 distance of at most so many grey
            levels, over all pixels, in 0..255; float images, in [-1, 1], count alike, times 127.5. For
            latents a number, in their own unit, and they are searched as they are: a latent turned is not the
            latent of the image turned.

    Raises:
        TypeError, ValueError: for anything but two stores of one shape and kind, for `within` that is neither
            "auto" nor a number >= 0, and for "auto" with latents.
    """
    _check_alike(forget, retain)
    if not isinstance(within, str):
        return _within_radius(forget, retain, check.number("within", within, low=0))
    if within != "auto":
        raise ValueError(f"within: expected 'auto' or a radius in grey levels, got {within!r}")
    if forget.latents:
        raise ValueError("within: expected a radius (latents cannot be turned or resized), got 'auto'")
    pairs, apart = CopySearch(forget, retain).run()
    return _collected(pairs, apart=apart)


def _check_alike(forget: ImageStore, retain: ImageStore) -> None:
    """That both are stores of one shape and kind."""
    for name, store in (("forget", forget), ("retain", retain)):
        if not isinstance(store, ImageStore):
            raise TypeError(f"{name}: expected an ImageStore, got {check.describe(store)}")
    if forget.shape != retain.shape:
        raise ValueError(f"retain: expected rows of shape {forget.shape}, as in forget, got {retain.shape}")
    if forget.latents and not retain.latents:
        raise ValueError("retain: expected latents, as in forget, got images")
    if retain.latents and not forget.latents:
        raise ValueError("retain: expected images, as in forget, got latents")
    if forget.is_uint8 != retain.is_uint8:
        raise TypeError(f"retain: expected the dtype of forget, {forget.dtype}, got {retain.dtype}")


def copies_among_neighbors(
    forget: ImageStore, retain: ImageStore, index: Tensor, sqdist: Tensor
) -> NearCopies:
    """Which first neighbours are near copies: what can be said without a search, so of no other orientation.

    Rows that equal the forget row are left out: `overlap` finds them, and a caller may have allowed them.

    Args:
        forget, retain: images.
        index, sqdist: `[N, k]`, as `nearest_neighbors` returns them.
    """
    judge = Judge(nearest_in_sample(retain))
    index, sqdist = index[:, :FIRST_NEIGHBORS].cpu(), sqdist[:, :FIRST_NEIGHBORS].cpu()
    pairs = []
    for row in range(len(forget)):
        near = index[row, sqdist[row] > 0]
        if len(near):
            pairs.append(judged(judge, forget, retain, row, near, torch.zeros_like(near)))
    return _collected(pairs)


# --- a radius -----------------------------------------------------------------------------------------------


def _within_radius(forget: ImageStore, retain: ImageStore, radius: float) -> NearCopies:
    """All pairs at an L2 distance of at most `radius`, in any orientation that images can have."""
    # Float images in [-1, 1] are 255 grey levels wide, too. Latents have a unit of their own.
    unit = 1.0 if forget.is_uint8 or forget.latents else 127.5
    turns = (0,) if forget.latents else renderings.orientations(*forget.shape[1:])
    pairs = []
    for turn in turns:
        pairs += _rows_within(renderings.oriented(forget.images, turn), retain, radius, unit, turn)
    return _collected(pairs, radius=radius)


def _rows_within(queries: Tensor, rows: ImageStore, radius: float, unit: float, turn: int) -> Iterator[Pairs]:
    """All pairs within the radius: more neighbours for the queries whose neighbours all were."""
    searched, count = torch.arange(len(queries)), min(FIRST_CANDIDATES, len(rows))
    while len(searched):
        index, sqdist = nearest_neighbors(queries[searched.to(queries.device)], rows, count)
        distances = sqdist.cpu().double().sqrt() * unit
        inside = distances <= radius
        # Distances ascend: where the last of them is outside, no row beyond it is inside.
        complete = ~inside[:, -1] | (count == len(rows))
        query, place = (inside & complete[:, None]).nonzero().unbind(1)
        found = index.cpu()[query, place]
        yield searched[query], found, torch.full_like(found, turn), distances[query, place]
        searched, count = searched[~complete], min(4 * count, len(rows))


def _collected(pairs: list[Pairs], **about: float | None) -> NearCopies:
    """Of a pair found in several orientations the nearest; by forget row, then distance."""
    # Nothing comes first, so that there is something to put together where no pair was found.
    integers = torch.empty(0, dtype=torch.int64)
    nothing = integers, integers, integers, torch.empty(0, dtype=torch.float64)
    columns = [torch.cat(parts) for parts in zip(nothing, *pairs, strict=True)]
    forget_rows, retain_rows, turns, distances = (column.numpy() for column in columns)
    # lexsort goes by its last key first. In that order the first of equal pairs is the nearest of them.
    order = np.lexsort((turns, retain_rows, distances, forget_rows))
    rows = np.stack([forget_rows[order], retain_rows[order]])
    _, first = np.unique(rows, axis=1, return_index=True)
    chosen = torch.from_numpy(order[np.sort(first)])
    return NearCopies(*(column[chosen] for column in columns), **about)
