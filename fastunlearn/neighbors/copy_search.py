"""The search of `near_copies(within="auto")`: candidates by the exact search, then a judgement of each."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..host.store import ImageStore
from . import renderings
from .likeness import EXACT, Judge, soft_resizes
from .uint8 import search_uint8

FIRST_CANDIDATES = 32  # of a forget row; more where half of them are copies
SAMPLE = 256  # retain rows whose distances to their nearest others are measured
CHUNK_BYTES = 2**24  # retain rows that are read at a time
QUERY_BYTES = 2**28
NOTHING = torch.iinfo(torch.int64).max  # no distance

# Forget rows, retain rows and orientations, int64 `[n]`, and distances, float64 `[n]`.
Pairs = tuple[Tensor, Tensor, Tensor, Tensor]


class CopySearch:
    """Finds the near copies of forget rows among retain rows. Both are stores of images of one shape."""

    def __init__(self, forget: ImageStore, retain: ImageStore):
        self.forget, self.retain = forget, retain
        size = forget.shape[1:]
        self.turns = renderings.orientations(*size)
        self.soften = soft_resizes(*size)

    def run(self) -> tuple[list[Pairs], float | None]:
        """The near copies, and the median distance of retain rows to their nearest others, if known."""
        nearest = self._distances_to_nearest()
        judge = Judge(nearest)
        pairs: list[Pairs] = []
        rows, count = list(range(len(self.forget))), FIRST_CANDIDATES
        while rows:
            # Where half of the candidates are copies there may be more: those rows are searched once more.
            crowded = []
            all_candidates = count >= len(self.retain) * len(self.turns)
            for row, (retain_rows, turns) in self._candidates_of(rows, count):
                found = judged(judge, self.forget, self.retain, row, retain_rows, turns)
                pairs.append(found)
                if 2 * len(found[0]) >= count and not all_candidates:
                    crowded.append(row)
            rows, count = crowded, 4 * count
        if len(nearest) == 0:
            return pairs, None
        return pairs, self._in_full_size(nearest.median().item())

    def _candidates_of(self, rows: list[int], count: int) -> Iterator[tuple[int, tuple[Tensor, Tensor]]]:
        """Each of the forget `rows` with its candidates: retain rows and orientations, int64 `[n]`."""
        block_size = self._rows_at_a_time(count)
        for start in range(0, len(rows), block_size):
            block = rows[start : start + block_size]
            for row, candidates in zip(block, self._candidates(torch.tensor(block), count), strict=True):
                yield row, torch.tensor(candidates).unbind(1)

    def _in_full_size(self, distance: float) -> float:
        """A distance in the reduced size as that of images without detail."""
        height, width = self.forget.shape[1:]
        reduced_height, reduced_width = renderings.reduced_size(height, width)
        return distance * (height * width / (reduced_height * reduced_width)) ** 0.5

    def _rows_at_a_time(self, count: int) -> int:
        """How many forget rows are searched together: a query takes 4 bytes a value and 100 a candidate."""
        values = self.forget.images[0].numel()
        queries = len(self.turns) * len(self.soften)
        return max(1, QUERY_BYTES // (queries * (4 * values + 100 * count)))

    def _chunks(self) -> Iterator[tuple[int, Tensor]]:
        """The retain rows in grey levels, `[n, C, H, W]` at a time, with the number of the first."""
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
        """Of each forget row the `count` nearest pairs (retain row, orientation), softened or not."""
        images = self.soften(renderings.grey_levels(self.forget.raw(rows)))
        oriented = [renderings.oriented(images, turn) for turn in self.turns]
        queries = torch.stack(oriented, dim=1)  # [n, O, V, C, h, w]
        turns = torch.tensor(self.turns)[:, None, None]
        # A pair is one number, retain row * 8 + orientation, so that equal pairs can be told by sorting.
        pairs = torch.empty(len(rows), 0, dtype=torch.int64)
        sqdist = torch.empty_like(pairs)
        for start, chunk in self._chunks():
            for version in range(len(self.soften)):
                # Softened forget rows are held against retain rows as they are, and the other way round.
                those = queries if version == 0 else queries[:, :, :1]
                kept = _bytes(self.soften.one(version, chunk))
                index, distances = _exact_search(_bytes(those.flatten(0, 2)), kept, count)
                found = (index.view(*those.shape[:3], -1) + start) * 8 + turns
                pairs = torch.cat([pairs, found.flatten(1)], dim=1)
                sqdist = torch.cat([sqdist, distances.view(len(rows), -1)], dim=1)
                pairs, sqdist = _nearest_different(pairs, sqdist, count)
        different = sqdist != NOTHING
        candidates = []
        for line, there in zip(pairs, different, strict=True):
            candidates.append([(pair // 8, pair % 8) for pair in line[there].tolist()])
        return candidates


def _nearest_different(keys: Tensor, values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Of each line the `count` different keys with the smallest values; where there are fewer, `NOTHING`."""
    # Sorted by value and then, stably, by key: of equal keys the smallest value comes first, and the others
    # are struck out.
    values, order = values.sort(dim=1, stable=True)
    keys, second = keys.gather(1, order).sort(dim=1, stable=True)
    values = values.gather(1, second)
    values[:, 1:][keys[:, 1:] == keys[:, :-1]] = NOTHING
    values, order = values.sort(dim=1, stable=True)
    return keys.gather(1, order)[:, :count], values[:, :count]


def judged(
    judge: Judge, forget: ImageStore, retain: ImageStore, row: int, retain_rows: Tensor, turns: Tensor
) -> Pairs:
    """Which candidates of a forget row are copies.

    Args:
        row: the forget row.
        retain_rows, turns: int64 `[n]`, the candidates: retain rows, and how they are turned.
    """
    image = renderings.grey_levels(forget.raw(torch.tensor([row])))[0]
    copies, distances = [], []
    for part in torch.arange(len(retain_rows)).split(max(1, CHUNK_BYTES // image.numel())):
        others = renderings.grey_levels(retain.raw(retain_rows[part]))
        upright = [renderings.upright(*pair) for pair in zip(others, turns[part].tolist(), strict=True)]
        others = torch.stack(upright)
        copies.append(judge.copies(image, others))
        distances.append((others.double() - image.double()).flatten(1).norm(dim=1))
    copies, distances = torch.cat(copies), torch.cat(distances)
    return torch.full_like(retain_rows[copies], row), retain_rows[copies], turns[copies], distances[copies]


def _sample(store: ImageStore) -> Tensor:
    """`[n, C, h, w]`: at most `SAMPLE` rows, evenly spread, in the reduced size."""
    rows = torch.linspace(0, len(store) - 1, min(SAMPLE, len(store))).long()
    return renderings.reduced(renderings.grey_levels(store.raw(rows)))


def nearest_in_sample(store: ImageStore) -> Tensor:
    """float64 `[n]`: from each row of a sample to its nearest other there; some of the set are nearer."""
    sample = _sample(store).flatten(1)
    if len(sample) < 2:
        return torch.empty(0, dtype=torch.float64)
    distances = torch.cdist(sample, sample, compute_mode=EXACT)
    return distances.fill_diagonal_(torch.inf).amin(1).double()


def _bytes(images: Tensor) -> Tensor:
    """Grey levels as uint8 rows `[n, D]`."""
    return images.round().clamp(0, 255).to(torch.uint8).flatten(1)


def _exact_search(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Indices and squared distances of at most `count` rows, `[Q, k]`."""
    return search_uint8(
        queries, rows, min(count, len(rows)), chunk_bytes=QUERY_BYTES, progress=lambda _: None
    )
