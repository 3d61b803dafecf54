"""What the searches share: tiles of rows, and the ranking of candidates by exact distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int], None]  # called with the number of retain rows that were done

MARGIN = 24  # how many candidates beyond k are ranked again exactly
# More than the relative error of `exact_distances`, which is about D * 2^-53 for D columns at the most.
DISTANCE_ERROR = 2.0**-30


def exact_distances(forget: Tensor, retain: Tensor, query: Tensor, row: Tensor, chunk_bytes: int) -> Tensor:
    """`||forget[query] - retain[row]||^2` in float64 for pairs of rows.

    Args:
        forget: `[Q, D]`.
        retain: `[N, ...]`.
        query, row: int64 `[P]`, positions in the two sets.
        chunk_bytes: working memory.

    Returns:
        float64 `[P]`, on the CPU.
    """
    # In the order of the retain rows, which may be on disk. A pair takes 24 bytes a column: both rows, and
    # the difference in float64.
    order = row.argsort()
    distances = torch.empty(len(row), dtype=torch.float64)
    for pairs in order.split(max(1, chunk_bytes // (24 * forget.shape[1]))):
        difference = retain[row[pairs].to(retain.device)].flatten(1).cpu().double()
        difference -= forget[query[pairs].to(forget.device)].cpu()
        # numpy adds every line in the same order wherever it stands, so equal rows get equal numbers. torch
        # may split a long sum by threads.
        squares = np.square(difference.numpy(), out=difference.numpy())
        distances[pairs] = torch.from_numpy(squares.sum(axis=1))
    return distances


def ascending(index: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts each line of `[Q, n]` by distance, then index."""
    # A stable sort by the second criterion after one by the first keeps the order of the first where it ties.
    index, order = index.sort(1)
    distances, second = distances.gather(1, order).sort(dim=1, stable=True)
    return index.gather(1, second), distances


def tile_size(
    num_rows: int, num_queries: int, row_bytes: int, chunk_bytes: int, entry_bytes: int = 8
) -> tuple[int, int]:
    """How many rows and queries a tile has.

    Args:
        num_rows, num_queries: of the whole sets.
        row_bytes: working memory of a row.
        chunk_bytes: working memory of the tile.
        entry_bytes: working memory of an entry of the `[queries, rows]` matrix.
    """
    # Half of the memory is for the rows and half for the matrix. Fewer than 64 rows would be all overhead.
    tile_queries = min(num_queries, 4096)
    by_rows = chunk_bytes // 2 // row_bytes
    by_matrix = chunk_bytes // 2 // (entry_bytes * tile_queries)
    tile_rows = max(min(by_rows, by_matrix, num_rows), min(num_rows, 64))
    return tile_rows, tile_queries
