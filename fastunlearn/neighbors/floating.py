"""Float rows: float32 products find candidates, float64 distances rank them.

A bound on the rounding of the products proves that no neighbour is missing.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..host.precision import tf32
from ..ops.sqdist import FLOAT_COLUMNS, square_norms
from .tiles import DISTANCE_ERROR, MARGIN, Progress, ascending, exact_distances, tile_size

LARGEST_NORM = 1e36  # squared: beyond it float32 products, at most 3.4e38, may overflow


def search_float(
    forget: Tensor, retain: Tensor, k: int, *, chunk_bytes: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Nearest rows by float32 products, ranked again by float64 distances, with a proof for every row.

    The float32 products of blocks of 1,024 columns are summed in float64, so that each is off by at most
    `gamma_1026 ||q|| ||r||` (`gamma_n = n u / (1 - n u)`, `u = 2^-24`: Higham, Accuracy and Stability of
    Numerical Algorithms, section 3.1; the two more roundings are those of float64 rows to float32). The best
    `k + MARGIN` by that value are ranked by the float64 distance. A row is proven when the worst of them is
    still, by that bound, farther than the k-th neighbour; else a second pass ranks everything the bound
    cannot exclude.

    Args:
        forget: floating `[Q, D]`.
        retain: floating `[N, ...]`.
        k: how many, in [1, N].
        chunk_bytes: working memory of the search.
        progress: called with the number of rows of each tile that is done.

    Returns:
        index int64 `[Q, k]` and squared distance float64 `[Q, k]` on the CPU, ascending, equal float64
        distances by the lower index.

    Raises:
        ValueError: for rows so large that float32 products could overflow.
    """
    num_rows = len(retain)
    count = min(num_rows, k + MARGIN)
    query_norms = square_norms(forget).cpu()
    values = torch.full((len(forget), count), torch.inf, dtype=torch.float64)
    index = torch.zeros((len(forget), count), dtype=torch.int64)
    largest_norm = 0.0
    for rows, block, approximate, norms in _approximate_tiles(forget, retain, chunk_bytes, progress):
        largest_norm = max(largest_norm, norms.max().item())
        smallest, position = approximate.topk(min(count, approximate.shape[1]), dim=1, largest=False)
        smallest = torch.cat([values[block], smallest.cpu()], 1)
        position = torch.cat([index[block], position.cpu() + rows.start], 1)
        values[block], order = smallest.topk(count, dim=1, largest=False)
        index[block] = position.gather(1, order)
    error = _error_bound(query_norms, largest_norm, forget.shape[1])

    query = torch.arange(len(forget)).repeat_interleave(count)
    exact = exact_distances(forget, retain, query, index.flatten(), chunk_bytes).view(-1, count)
    index, exact = ascending(index, exact)
    index, exact = index[:, :k].contiguous(), exact[:, :k].contiguous()
    if count == num_rows:  # every row was a candidate
        return index, exact

    # Values approximate ||r||^2 - 2 <q, r> = distance - ||q||^2. One above this limit cannot belong to one of
    # the k nearest, and no row that was left out has a value below the largest that was kept.
    limit = exact[:, -1] * (1 + DISTANCE_ERROR) - query_norms + error
    unproven = (values.amax(1) <= limit).nonzero().flatten()
    if len(unproven):
        queries = forget[unproven.to(forget.device)]
        found = _search_within(queries, retain, k, limit[unproven], chunk_bytes)
        index[unproven], exact[unproven] = found
    return index, exact


def _search_within(
    forget: Tensor, retain: Tensor, k: int, limit: Tensor, chunk_bytes: int
) -> tuple[Tensor, Tensor]:
    """The k nearest among the rows whose approximate value is at most `limit`.

    Args:
        forget: floating `[Q, D]`.
        limit: float64 `[Q]`, so large that the k nearest are known to be among these rows.

    Returns:
        As `search_float`.
    """
    found_index = [torch.empty(0, dtype=torch.int64)] * len(forget)
    found_exact = [torch.empty(0, dtype=torch.float64)] * len(forget)
    for rows, block, approximate, _ in _approximate_tiles(forget, retain, chunk_bytes, lambda _: None):
        inside = approximate <= limit[block].to(approximate.device)[:, None]
        query, position = inside.nonzero().cpu().unbind(1)
        query, position = query + block.start, position + rows.start
        exact = exact_distances(forget, retain, query, position, chunk_bytes)
        # How many rows are inside differs from query to query, so each is merged by itself.
        for number in query.unique().tolist():
            own = query == number
            index, distances = ascending(
                torch.cat([found_index[number], position[own]])[None],
                torch.cat([found_exact[number], exact[own]])[None],
            )
            found_index[number], found_exact[number] = index[0, :k], distances[0, :k]
    return torch.stack(found_index), torch.stack(found_exact)


def _approximate_tiles(
    forget: Tensor, retain: Tensor, chunk_bytes: int, progress: Progress
) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """`||r||^2 - 2 <q, r>` in tiles.

    Yields:
        The slice of the retain rows, the slice of the forget rows, the values float64 `[q, c]`, and the
        squared norms of the retain rows float64 `[c]`.
    """
    columns = forget.shape[1]
    tile_rows, tile_queries = tile_size(len(retain), len(forget), 4 * columns, chunk_bytes, entry_bytes=20)
    for start in range(0, len(retain), tile_rows):
        rows = retain[start : start + tile_rows].flatten(1)
        norms, rows32 = square_norms(rows), rows.float()
        largest = norms.max().item()
        if largest > LARGEST_NORM:
            expected = "rows with a squared norm below 1e36 (float32 products)"
            raise ValueError(f"retain: expected {expected}, got {largest:.3g}")
        for block in range(0, len(forget), tile_queries):
            queries32 = forget[block : block + tile_queries].to(retain.device).float()
            total = norms.repeat(len(queries32), 1)
            # The bound holds for float32 products only, and a caller may have allowed TF32.
            with tf32(False):
                for column in range(0, columns, FLOAT_COLUMNS):
                    part = slice(column, column + FLOAT_COLUMNS)
                    total.add_(queries32[:, part] @ rows32[:, part].T, alpha=-2)
            yield slice(start, start + len(rows)), slice(block, block + len(queries32)), total, norms
        progress(len(rows))


def _error_bound(query_norms: Tensor, largest_norm: float, columns: int) -> Tensor:
    """float64 `[Q]`: how far an approximate value and a float64 distance may be off together.

    Args:
        query_norms: `||q||^2`, float64 `[Q]`.
        largest_norm: the largest `||r||^2`.
        columns: D.
    """
    # |fl(<q, r>) - <q, r>| <= gamma_n ||q|| ||r|| with gamma_n = n u / (1 - n u) and u = 2^-24, in blocks of
    # FLOAT_COLUMNS; two more roundings are those of q and r to float32. The value holds -2 <q, r>.
    terms = (min(columns, FLOAT_COLUMNS) + 2) * 2.0**-24
    gamma = terms / (1 - terms)
    products = 2 * gamma * (query_norms * largest_norm).sqrt()
    # Norms, sums of blocks and distances are float64 sums of D terms: D * 2^-50 leaves room above D * 2^-53.
    sums = 4 * (columns * 2.0**-50) * (query_norms + largest_norm)
    # Products below the smallest normal float32 number, 2^-126, may be lost as a whole.
    underflow = columns * 2.0**-125
    return products + sums + underflow
