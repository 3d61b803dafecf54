"""What the searches share: tiles of rows, and the ranking of candidates by exact distances."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int], None]  # called with the number of retain rows that were done

MARGIN = 24  # how many candidates beyond k are ranked again exactly


def exact_distances(forget: Tensor, retain: Tensor, query: Tensor, row: Tensor, chunk_bytes: int) -> Tensor:
    """`||forget[query] - retain[row]||^2` in float64 for pairs `[P]`, read in the order of the retain rows.

    numpy adds every line in the same order wherever it stands, so equal rows get equal numbers (torch may
    split a long sum by threads).
    """
    order = row.argsort()
    distances = torch.empty(len(row), dtype=torch.float64)
    for pairs in order.split(max(1, chunk_bytes // (24 * forget.shape[1]))):
        difference = retain[row[pairs].to(retain.device)].flatten(1).cpu().double()
        difference -= forget[query[pairs].to(forget.device)].cpu()
        distances[pairs] = torch.from_numpy(np.square(difference.numpy(), out=difference.numpy()).sum(axis=1))
    return distances


def ascending(index: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts each line by distance, then index."""
    index, order = index.sort(1)
    distances, second = distances.gather(1, order).sort(dim=1, stable=True)
    return index.gather(1, second), distances


def tile_size(
    num_rows: int, num_queries: int, columns: int, row_bytes: int, chunk_bytes: int, entry_bytes: int = 8
) -> tuple[int, int]:
    """Rows and queries of a tile: half of `chunk_bytes` for the rows and half for the `[queries, rows]`
    matrix, both at least one line.
    """
    tile_queries = min(num_queries, 4096)
    tile_rows = min(chunk_bytes // 2 // row_bytes, chunk_bytes // 2 // (entry_bytes * tile_queries), num_rows)
    tile_rows = max(tile_rows, min(num_rows, 64))
    return tile_rows, tile_queries
