"""Images to keep that show an image to forget: compressed, resized, turned or mirrored copies, which are not equal.

A copy that stays among the images to keep undoes the work: ReTrack redirects the image to itself. How copies are
told from images that look alike, and how well, is in docs/near_copies.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _check
from .neighbor_search import likeness, renderings, search_uint8
from .neighbors import nearest_neighbors
from .store import ImageStore

FIRST_CANDIDATES = 32  # of a forget row; more where half of them are copies
FIRST_NEIGHBORS = 4  # of a forget row that `copies_among_neighbors` looks at
SAMPLE = 256  # retain rows whose distances to their nearest others are measured
CHUNK_BYTES = 2**24  # retain rows that are read at a time
QUERY_BYTES = 2**28
NOTHING = torch.iinfo(torch.int64).max  # no distance
SHOWN_IMAGES, SHOWN_COPIES = 5, 3  # in one line


class NearCopyWarning(UserWarning):
    """Images to keep show images to forget."""


@dataclass(frozen=True)
class NearCopies:
    """Pairs of a forget row and a retain row that shows the same, by forget row, then distance. `str()` is one line.

    Attributes:
        forget_rows, retain_rows: int64 `[P]`.
        orientations: int64 `[P]`, how the copy is turned: by `o % 4` quarters and then, from 4 on, mirrored.
        distances: float64 `[P]`, L2 over all pixels between the copy and the forget row turned alike, in grey levels
            0..255 (of latents: in their own unit).
        radius: the one asked for; None: "auto".
        apart: median distance of images of the retain set to their nearest others, in grey levels; None: not measured.
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
        if not len(self):
            return f"no near copies{self._scale()}"
        forget, retain = self.forget_rows.unique(), self.retain_rows.unique()
        near, far = self.distances.min().item(), self.distances.max().item()
        copies = f"{len(retain)} near cop{'y' if len(retain) == 1 else 'ies'}"
        images = f"{len(forget)} image{'s' * (len(forget) > 1)} to forget"
        rows = [self._of(row) for row in forget[:SHOWN_IMAGES].tolist()]
        shown = "; ".join(rows + ["..."] * (len(forget) > SHOWN_IMAGES))
        return f"{copies} of {images}, {near:.4g} to {far:.4g} away{self._scale()}: {shown}"

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
            details = [
                f"{self.distances[pair].item():.4g}",
                renderings.in_words(int(self.orientations[pair])),
            ]
            shown.append(f"{int(self.retain_rows[pair])} ({', '.join(part for part in details if part)})")
        more = ", ..." if len(pairs) > SHOWN_COPIES else ""
        return f"forget row {forget_row}: retain rows {', '.join(shown)}{more}"


def near_copies(forget: ImageStore, retain: ImageStore, *, within: float | str = "auto") -> NearCopies:
    """The retain rows that show an image to forget in any of its 8 orientations (4, if it is not square).

    Exactly equal rows are among them. The retain set is streamed. "auto" costs 56 queries of the exact neighbour
    search for each forget row (8 orientations, as it is and softened, on either side), a radius costs 8; where half of
    the candidates of a row are copies, it is searched again for more.

    Args:
        forget: `[N, C, H, W]`, images or latents.
        retain: `[M, C, H, W]`, of the same kind.
        within: "auto": what compression (JPEG of quality 60 or better) and resizing (to half or more, and back) leave
            alike. A number: all rows at an L2 distance of at most so many grey levels, over all pixels, in 0..255;
            float images, in [-1, 1], count alike, times 127.5. For latents a number, in their own unit, and they are
            searched as they are: a latent turned is not the latent of the image turned.

    Raises:
        TypeError, ValueError: for anything but two stores of one shape and kind, for `within` that is neither "auto"
            nor a number >= 0, and for "auto" with latents.
    """
    for name, store in (("forget", forget), ("retain", retain)):
        if not isinstance(store, ImageStore):
            raise TypeError(f"{name}: expected an ImageStore, got {_check.describe(store)}")
    if forget.shape != retain.shape:
        raise ValueError(f"retain: expected rows of shape {forget.shape}, as in forget, got {retain.shape}")
    if forget.latents != retain.latents:
        expected, given = ("latents", "images") if forget.latents else ("images", "latents")
        raise ValueError(f"retain: expected {expected}, as in forget, got {given}")
    if not isinstance(within, str):
        return _within_radius(forget, retain, _check.number("within", within, low=0))
    if within != "auto":
        raise ValueError(f"within: expected 'auto' or a radius in grey levels, got {within!r}")
    if forget.latents:
        raise ValueError(
            "within: expected a radius (latents cannot be turned, resized or compressed), got 'auto'"
        )
    return _Search(forget, retain).run()


def copies_among_neighbors(
    forget: ImageStore, retain: ImageStore, index: Tensor, sqdist: Tensor
) -> NearCopies:
    """Which first neighbours are near copies: what can be said without a search, so of no other orientation.

    Rows that equal the forget row are left out: `overlap` finds them, and a caller may have allowed them.

    Args:
        forget, retain: images.
        index, sqdist: `[N, k]`, as `nearest_neighbors` returns them.
    """
    judge = likeness.Judge(_nearest_in_sample(retain))
    pairs = []
    for row in range(len(forget)):
        near = index[row, :FIRST_NEIGHBORS].cpu()[sqdist[row, :FIRST_NEIGHBORS].cpu() > 0]
        if len(near):
            pairs.append(_judged(judge, forget, retain, row, near, torch.zeros_like(near)))
    return _collected(pairs)


# --- a radius --------------------------------------------------------------------------------------------------------


def _within_radius(forget: ImageStore, retain: ImageStore, radius: float) -> NearCopies:
    alike = forget.is_uint8 == retain.is_uint8
    in_grey_levels = not alike or not (forget.is_uint8 or forget.latents)
    queries, rows = forget.images, retain.images
    if not alike:
        queries, rows = renderings.grey_levels(queries), renderings.grey_levels(rows)
    unit = 127.5 if alike and in_grey_levels else 1.0
    turns = (0,) if forget.latents else renderings.orientations(*forget.shape[1:])
    pairs = []
    for turn in turns:
        pairs += _rows_within(renderings.oriented(queries, turn), rows, radius, unit, turn)
    return _collected(pairs, radius=radius)


def _rows_within(
    queries: Tensor, rows: Tensor, radius: float, unit: float, turn: int
) -> Iterator[tuple[Tensor, ...]]:
    """All pairs within the radius: more neighbours for the queries whose neighbours all were."""
    searched, count = torch.arange(len(queries)), min(FIRST_CANDIDATES, len(rows))
    while len(searched):
        index, sqdist = nearest_neighbors(queries[searched.to(queries.device)], rows, count)
        distances = sqdist.cpu().double().sqrt() * unit
        inside = distances <= radius
        complete = ~inside[:, -1] | (count == len(rows))
        query, place = (inside & complete[:, None]).nonzero().unbind(1)
        found = index.cpu()[query, place]
        yield searched[query], found, torch.full_like(found, turn), distances[query, place]
        searched, count = searched[~complete], min(4 * count, len(rows))


def _collected(pairs: list[tuple[Tensor, ...]], **about: float | None) -> NearCopies:
    """Of a pair found in several orientations the nearest; by forget row, then distance."""
    ranked = sorted(
        (forget_row, distance, retain_row, turn)
        for columns in pairs
        for forget_row, retain_row, turn, distance in zip(
            *(column.tolist() for column in columns), strict=True
        )
    )
    nearest: dict[tuple[int, int], tuple[int, float]] = {}
    for forget_row, distance, retain_row, turn in ranked:
        nearest.setdefault((forget_row, retain_row), (turn, distance))
    rows = torch.tensor(list(nearest), dtype=torch.int64).reshape(-1, 2)
    turns = torch.tensor([turn for turn, _ in nearest.values()], dtype=torch.int64)
    distances = torch.tensor([distance for _, distance in nearest.values()], dtype=torch.float64)
    return NearCopies(rows[:, 0], rows[:, 1], turns, distances, **about)


# --- "auto" ----------------------------------------------------------------------------------------------------------


class _Search:
    """Candidates, by the exact search in the reduced size; then a judgement of each."""

    def __init__(self, forget: ImageStore, retain: ImageStore):
        self.forget, self.retain = forget, retain
        size = forget.shape[1:]
        self.turns = renderings.orientations(*size)
        self.soften = likeness.soft_resizes(*size)

    def run(self) -> NearCopies:
        nearest = self._distances_to_nearest()
        judge = likeness.Judge(nearest)
        pairs, rows, count = [], list(range(len(self.forget))), FIRST_CANDIDATES
        while rows:
            crowded = []
            block_size = self._rows_at_a_time(count)
            for start in range(0, len(rows), block_size):
                block = rows[start : start + block_size]
                for row, candidates in zip(block, self._candidates(torch.tensor(block), count), strict=True):
                    retain_rows, turns = torch.tensor(candidates).unbind(1)
                    found = _judged(judge, self.forget, self.retain, row, retain_rows, turns)
                    pairs.append(found)
                    if 2 * len(found[0]) >= count and count < len(self.retain) * len(self.turns):
                        crowded.append(row)
            rows, count = crowded, 4 * count
        return _collected(pairs, apart=self._in_full_size(nearest.median().item()) if len(nearest) else None)

    def _in_full_size(self, distance: float) -> float:
        """A distance in the reduced size as that of images without detail."""
        height, width = self.forget.shape[1:]
        reduced_height, reduced_width = renderings.reduced_size(height, width)
        return distance * (height * width / (reduced_height * reduced_width)) ** 0.5

    def _rows_at_a_time(self, count: int) -> int:
        values = self.forget.images[0].numel()
        return max(1, QUERY_BYTES // (len(self.turns) * len(self.soften) * (4 * values + 100 * count)))

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        for start, rows in self.retain.chunks(CHUNK_BYTES):
            yield start, renderings.grey_levels(rows)

    def _distances_to_nearest(self) -> Tensor:
        """float64 `[n]`, in the reduced size: of a sample of the retain rows, each to its nearest other."""
        queries = _bytes(_sample(self.retain))
        if len(queries) < 2:
            return torch.empty(0, dtype=torch.float64)
        best = torch.full((len(queries), 2), NOTHING)
        for _, rows in self._chunks():
            _, sqdist = _exact_search(queries, _bytes(renderings.reduced(rows)), 2)
            best = torch.cat([best, sqdist], 1).topk(2, largest=False, sorted=True).values
        return best[:, 1].double().sqrt()  # the nearest is the row itself, or one that equals it

    def _candidates(self, rows: Tensor, count: int) -> list[list[tuple[int, int]]]:
        """For each forget row the `count` nearest pairs (retain row, orientation), as they are or one of them softened."""
        images = self.soften(renderings.grey_levels(self.forget.raw(rows)))
        queries = torch.stack(
            [renderings.oriented(images, turn) for turn in self.turns], dim=1
        )  # [n, O, V, C, h, w]
        pairs = torch.empty(len(rows), 0, dtype=torch.int64)  # retain row * 8 + orientation
        sqdist = torch.empty_like(pairs)
        turns = torch.tensor(self.turns)[:, None, None]
        for start, chunk in self._chunks():
            for version in range(len(self.soften)):
                # Softened forget rows are held against retain rows as they are, and the other way round.
                those = queries if version == 0 else queries[:, :, :1]
                index, distances = (
                    found.view(*those.shape[:3], -1)
                    for found in _exact_search(
                        _bytes(those.flatten(0, 2)), _bytes(self.soften.one(version, chunk)), count
                    )
                )
                found = (index + start) * 8 + turns
                pairs, sqdist = (
                    torch.cat([pairs, found.flatten(1)], 1),
                    torch.cat([sqdist, distances.flatten(1)], 1),
                )
                pairs, sqdist = _nearest_different(pairs, sqdist, count)
        return [
            [(pair // 8, pair % 8) for pair, distance in zip(*row, strict=True) if distance != NOTHING]
            for row in zip(pairs.tolist(), sqdist.tolist(), strict=True)
        ]


def _nearest_different(keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each line the `count` different keys with the smallest values; `NOTHING` as a value where there are fewer."""
    values, order = values.sort(dim=1, stable=True)
    keys, second = keys.gather(1, order).sort(dim=1, stable=True)
    values = values.gather(1, second)  # of equal keys the smallest value comes first
    values[:, 1:][keys[:, 1:] == keys[:, :-1]] = NOTHING
    values, order = values.sort(dim=1, stable=True)
    return keys.gather(1, order)[:, :count], values[:, :count]


def _judged(
    judge: likeness.Judge,
    forget: ImageStore,
    retain: ImageStore,
    row: int,
    retain_rows: Tensor,
    turns: Tensor,
) -> tuple[Tensor, ...]:
    """Which of the candidates `[n]` of a forget row are copies: rows, orientations and distances."""
    image = renderings.grey_levels(forget.raw(torch.tensor([row])))[0]
    copies, distances = [], []
    for part in torch.arange(len(retain_rows)).split(max(1, CHUNK_BYTES // image.numel())):
        others = renderings.grey_levels(retain.raw(retain_rows[part]))
        others = torch.stack(
            [renderings.upright(*pair) for pair in zip(others, turns[part].tolist(), strict=True)]
        )
        copies.append(judge.copies(image, others))
        distances.append((others.double() - image.double()).flatten(1).norm(dim=1))
    copies, distances = torch.cat(copies), torch.cat(distances)
    return torch.full_like(retain_rows[copies], row), retain_rows[copies], turns[copies], distances[copies]


def _sample(store: ImageStore) -> Tensor:
    """`[n, C, h, w]`: at most `SAMPLE` rows, evenly spread, in the reduced size."""
    rows = torch.linspace(0, len(store) - 1, min(SAMPLE, len(store))).long()
    return renderings.reduced(renderings.grey_levels(store.raw(rows)))


def _nearest_in_sample(store: ImageStore) -> Tensor:
    """float64 `[n]`: the distance of each row of a sample to its nearest other there: at least that in the whole set."""
    sample = _sample(store).flatten(1)
    if len(sample) < 2:
        return torch.empty(0, dtype=torch.float64)
    return torch.cdist(sample, sample).fill_diagonal_(torch.inf).amin(1).double()


def _bytes(images: Tensor) -> Tensor:
    """Grey levels as uint8 rows `[n, D]`."""
    return images.round().clamp(0, 255).to(torch.uint8).flatten(1)


def _exact_search(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances of at most `count` rows, `[Q, k]`."""
    return search_uint8(
        queries, rows, min(count, len(rows)), chunk_bytes=QUERY_BYTES, progress=lambda _: None
    )
