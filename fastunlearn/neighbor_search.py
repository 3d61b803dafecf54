"""The two searches behind `nearest_neighbors`: integer arithmetic for uint8 rows, certified floating point for float rows.

Both stream the retain rows in tiles and never hold the `[Q, N]` matrix of distances. `neighbors.py` validates, removes duplicates and
caches; here `forget` is flattened to `[Q, D]`, `retain` is `[N, ...]` with D elements a row (flattened tile by tile, so that a permuted
view of a memory-mapped file is never copied as a whole), neither is empty, and `1 <= k <= N`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import numpy as np
import torch
from torch import Tensor

Progress = Callable[[int], None]  # called with the number of retain rows that were done

INT32_COLUMNS = 33_025  # 33,025 * 255^2 < 2^31: up to here a squared distance of uint8 rows fits an int32
PRODUCT_COLUMNS = 65_536  # one int8 product at a time: 65,536 * 128^2 = 2^30
FLOAT_COLUMNS = 1_024  # float32 sums of centred uint8 products are exact up to here: 1,024 * 128^2 = 2^24
CACHE_ELEMENTS = 2**20  # a selection works on so many distances at a time, about what a core's second cache level holds
MARGIN = 24  # float rows: how many candidates beyond k are ranked again in float64


# --- uint8 rows ------------------------------------------------------------------------------------------------------------------


def search_uint8(forget: Tensor, retain: Tensor, k: int, *, chunk_bytes: int, progress: Progress) -> tuple[Tensor, Tensor]:
    """Exact nearest rows by integer arithmetic.

    With both sets shifted by -128 (which leaves distances alone), `||q - r||^2 = ||q||^2 + (||r||^2 - 2 <q, r>)`, and the product is an
    int8 matrix product with int32 sums. Each distance travels with its row number in one int64, `distance * 2^bits + row`, so the
    smallest numbers are the nearest rows with ties in favour of the lower row.

    Args:
        forget: uint8 `[Q, D]`.
        retain: uint8 `[N, ...]`, read in order, one tile at a time.

    Returns:
        index int64 `[Q, k]` and squared distance int64 `[Q, k]`, ascending, on the device of `retain`.
    """
    (num_queries, columns), num_rows = forget.shape, len(retain)
    row_bits = num_rows.bit_length()
    if (3 * 2**14 * columns).bit_length() + row_bits > 63:
        raise ValueError(f"retain: expected rows * columns below about 2^47 (distance and row number share 64 bits), got {num_rows} rows of {columns} columns")
    best = torch.full((num_queries, k), torch.iinfo(torch.int64).max, device=retain.device)
    queries = _centred(forget.to(retain.device))
    tile_rows, tile_queries = _tile_size(num_rows, num_queries, columns, 2 * columns, chunk_bytes)
    rows_buffer = torch.empty((tile_rows, columns), dtype=torch.int8, device=retain.device)
    norms_buffer = torch.empty(tile_rows, dtype=torch.int32 if columns <= INT32_COLUMNS else torch.int64, device=retain.device)
    with _workers(retain.device) as (workers, run):
        for start in range(0, num_rows, tile_rows):
            tile = retain[start : start + tile_rows]
            rows, norms = rows_buffer[: len(tile)], norms_buffer[: len(tile)]

            def prepare(part: slice, tile=tile, rows=rows, norms=norms) -> None:
                rows[part] = _centred(tile[part].flatten(1))
                norms[part] = square_norms(rows[part]).to(norms.dtype)

            def search(block: slice, rows=rows, norms=norms, start=start) -> None:
                _keep_smallest(best[block], _products(queries[block], rows), norms, start, row_bits)

            run(prepare, _slices(len(tile), -(-len(tile) // workers)))
            run(search, _slices(num_queries, -(-tile_queries // workers)))
            progress(len(tile))
    index = best & (2**row_bits - 1)
    return index, (best >> row_bits) + square_norms(queries).long()[:, None]


@contextmanager
def _workers(device: torch.device) -> Iterator[tuple[int, Callable[[Callable[[slice], None], list[slice]], None]]]:
    """`(count, run)`: `run(function, parts)` calls `function` on every part, on a CPU by as many threads as torch uses, each computing alone.

    One join a part instead of one barrier an operation: where other processes compete for the cores, that is twice as fast.
    """
    count = torch.get_num_threads() if device.type == "cpu" else 1
    if count == 1:
        yield 1, lambda function, parts: [function(part) for part in parts]
        return
    try:
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            yield count, lambda function, parts: list(pool.map(function, parts))
    finally:
        torch.set_num_threads(count)  # the setting of the threads that start later; this one has kept its own


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _centred(rows: Tensor) -> Tensor:
    """uint8 `[M, D]` minus 128, as int8: flipping the top bit does both."""
    return (rows ^ 128).view(torch.int8)


def square_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row of `[M, D]`, float64 `[M]` (exact for int8 rows); a cache-sized slice at a time."""
    step = max(1, CACHE_ELEMENTS // 4 // rows.shape[1])
    dtype = torch.float32 if rows.dtype == torch.int8 else torch.float64
    return torch.cat([part.to(dtype).square().sum(1, dtype=torch.float64) for part in rows.split(step)])


def _products(queries: Tensor, rows: Tensor) -> Tensor:
    """Exact dot products of int8 `[Q, D]` and `[C, D]`: `[Q, C]`, int32 up to `INT32_COLUMNS` columns, int64 beyond."""
    columns = queries.shape[1]
    wide = columns > INT32_COLUMNS
    integer = queries.device.type == "cpu" and int8_product_is_exact()
    step = PRODUCT_COLUMNS if integer else FLOAT_COLUMNS
    total = None
    for start in range(0, columns, step):
        left, right = queries[:, start : start + step], rows[:, start : start + step]
        if integer and left.shape[1] >= 16:  # torch 2.13's int8 product reads past the end of matrices of one column
            part = torch._int_mm(left, right.T)
        else:
            part = (left.float() @ right.float().T).to(torch.int32)
        if wide:
            part = part.long()
        total = part if total is None else total.add_(part)
    return total


@cache
def int8_product_is_exact() -> bool:
    """Whether torch's int8 matrix product adds up without saturating here: kernels for CPUs without VNNI may go through int16 sums.

    Both answers give the same neighbours; without it the product is done in float32, which is exact too and about five times slower.
    """
    extremes = torch.tensor([[-128, -128], [127, 127], [-128, 127], [127, -128]], dtype=torch.int8)
    left = extremes.repeat(16, 392)  # [64, 784]
    right = extremes.flip(0).repeat(64, 392)
    return torch.equal(torch._int_mm(left, right.T).double(), left.double() @ right.double().T)


def _keep_smallest(best: Tensor, products: Tensor, norms: Tensor, first_row: int, row_bits: int) -> None:
    """Merges a tile into `best` int64 `[Q, k]` in place. `products` `[Q, C]` is overwritten with `norms - 2 products`.

    The k smallest (distance, row) pairs of a line lie in its k blocks with the smallest (block minimum, block number): an entry of any
    other block has k smaller ones before it. So one pass over the distances finds the blocks and only those are looked into.
    """
    k, width = best.shape[1], products.shape[1]
    size = 2 ** max(0, ((width // k).bit_length() - 1) // 2)  # about sqrt(width / k): as many block minima as entries in the k blocks
    blocks = width // size
    prune = size >= 8 and blocks > k
    numbers = torch.arange(first_row, first_row + width, device=best.device)
    step = max(1, CACHE_ELEMENTS // width)
    for start in range(0, len(best), step):
        part = products[start : start + step]
        part.mul_(-2).add_(norms)
        if prune:
            head = part[:, : blocks * size].unflatten(1, (blocks, size))
            minima = (head.amin(2).long() << blocks.bit_length()) + torch.arange(blocks, device=best.device)
            chosen = minima.topk(k, largest=False, sorted=False).indices  # [q, k]
            inside = head.gather(1, chosen[:, :, None].expand(-1, -1, size)).long()
            inside = (inside << row_bits) + numbers[: blocks * size].view(blocks, size)[chosen]
            tail = (part[:, blocks * size :].long() << row_bits) + numbers[blocks * size :]
            candidates = [best[start : start + step], inside.flatten(1), tail]
        else:
            candidates = [best[start : start + step], (part.long() << row_bits) + numbers]
        best[start : start + step] = torch.cat(candidates, 1).topk(k, largest=False).values


# --- float rows ------------------------------------------------------------------------------------------------------------------


def search_float(forget: Tensor, retain: Tensor, k: int, *, chunk_bytes: int, progress: Progress) -> tuple[Tensor, Tensor]:
    """Nearest rows by float32 products, ranked again by float64 distances, with a proof for every row.

    The float32 products of blocks of 1,024 columns are summed in float64, so that each is off by at most `gamma_1026 ||q|| ||r||`
    (`gamma_n = n u / (1 - n u)`, `u = 2^-24`: Higham, Accuracy and Stability of Numerical Algorithms, section 3.1; the two more roundings are
    those of float64 rows to float32). The best `k + MARGIN` by that value are ranked by the float64 distance. A row is proven when the
    worst of them is still, by that bound, farther than the k-th neighbour; else a second pass ranks everything the bound cannot exclude.

    Args:
        forget: floating `[Q, D]`.
        retain: floating `[N, ...]`.

    Returns:
        index int64 `[Q, k]` and squared distance float64 `[Q, k]` on the CPU, ascending, equal float64 distances by the lower index.

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
        smallest, position = torch.cat([values[block], smallest.cpu()], 1), torch.cat([index[block], position.cpu() + rows.start], 1)
        values[block], order = smallest.topk(count, dim=1, largest=False)
        index[block] = position.gather(1, order)
    error = _error_bound(query_norms, largest_norm, forget.shape[1])

    query = torch.arange(len(forget)).repeat_interleave(count)
    exact = exact_distances(forget, retain, query, index.flatten(), chunk_bytes).view(-1, count)
    index, exact = _ascending(index, exact)
    index, exact = index[:, :k].contiguous(), exact[:, :k].contiguous()
    limit = exact[:, -1] * (1 + 2.0**-30) - query_norms + error  # an approximate value above it cannot belong to one of the k nearest
    unproven = (values.amax(1) <= limit).nonzero().flatten() if count < num_rows else query[:0]
    if len(unproven):
        index[unproven], exact[unproven] = _search_within(forget[unproven.to(forget.device)], retain, k, limit[unproven], chunk_bytes)
    return index, exact


def _search_within(forget: Tensor, retain: Tensor, k: int, limit: Tensor, chunk_bytes: int) -> tuple[Tensor, Tensor]:
    """The k nearest among the rows whose approximate value is at most `limit` float64 `[Q]`; these are known to include them."""
    found_index = [torch.empty(0, dtype=torch.int64)] * len(forget)
    found_exact = [torch.empty(0, dtype=torch.float64)] * len(forget)
    for rows, block, approximate, _ in _approximate_tiles(forget, retain, chunk_bytes, lambda _: None):
        query, position = (approximate <= limit[block].to(approximate.device)[:, None]).nonzero().cpu().unbind(1)
        query, position = query + block.start, position + rows.start
        exact = exact_distances(forget, retain, query, position, chunk_bytes)
        for q in query.unique().tolist():
            index, distances = _ascending(torch.cat([found_index[q], position[query == q]])[None], torch.cat([found_exact[q], exact[query == q]])[None])
            found_index[q], found_exact[q] = index[0, :k], distances[0, :k]
    return torch.stack(found_index), torch.stack(found_exact)


def _approximate_tiles(forget: Tensor, retain: Tensor, chunk_bytes: int, progress: Progress) -> Iterator[tuple[slice, slice, Tensor, Tensor]]:
    """`||r||^2 - 2 <q, r>` in tiles: yields the retain slice, the forget slice, float64 `[q, c]`, and the squared norms float64 `[c]`."""
    columns = forget.shape[1]
    tile_rows, tile_queries = _tile_size(len(retain), len(forget), 3 * columns, 4 * columns, chunk_bytes, entry_bytes=20)
    for start in range(0, len(retain), tile_rows):
        rows = retain[start : start + tile_rows].flatten(1)
        norms, rows32 = square_norms(rows), rows.float()
        if norms.max().item() > 1e36:
            raise ValueError(f"retain: expected rows with a squared norm below 1e36 (float32 products), got {norms.max().item():.3g}")
        for block in range(0, len(forget), tile_queries):
            queries32 = forget[block : block + tile_queries].to(retain.device).float()
            total = norms.repeat(len(queries32), 1)
            with _full_float32():
                for column in range(0, columns, FLOAT_COLUMNS):
                    part = queries32[:, column : column + FLOAT_COLUMNS] @ rows32[:, column : column + FLOAT_COLUMNS].T
                    total.add_(part, alpha=-2)
            yield slice(start, start + len(rows)), slice(block, block + len(queries32)), total, norms
        progress(len(rows))


def _error_bound(query_norms: Tensor, largest_norm: float, columns: int) -> Tensor:
    """float64 `[Q]`: how far an approximate value and a float64 distance may be off, for any retain row up to the largest squared norm."""
    terms = (min(columns, FLOAT_COLUMNS) + 2) * 2.0**-24
    gamma = terms / (1 - terms)
    summed = columns * 2.0**-50  # norms and sums in float64
    underflow = columns * 2.0**-125
    return 2 * gamma * (query_norms * largest_norm).sqrt() + 4 * summed * (query_norms + largest_norm) + underflow


@contextmanager
def _full_float32() -> Iterator[None]:
    """float32 products in float32: the bound does not hold for TF32 or bfloat16 products, which a caller may have allowed."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def exact_distances(forget: Tensor, retain: Tensor, query: Tensor, row: Tensor, chunk_bytes: int) -> Tensor:
    """`||forget[query] - retain[row]||^2` in float64 for pairs `[P]`, read in the order of the retain rows.

    numpy adds every line in the same order wherever it stands, so equal rows get equal numbers (torch may split a long sum by threads).
    """
    order = row.argsort()
    distances = torch.empty(len(row), dtype=torch.float64)
    for pairs in order.split(max(1, chunk_bytes // (24 * forget.shape[1]))):
        difference = retain[row[pairs].to(retain.device)].flatten(1).cpu().double()
        difference -= forget[query[pairs].to(forget.device)].cpu()
        distances[pairs] = torch.from_numpy(np.square(difference.numpy(), out=difference.numpy()).sum(axis=1))
    return distances


def _ascending(index: Tensor, distances: Tensor) -> tuple[Tensor, Tensor]:
    """Sorts each line by distance, then index."""
    index, order = index.sort(1)
    distances, second = distances.gather(1, order).sort(dim=1, stable=True)
    return index.gather(1, second), distances


def _tile_size(num_rows: int, num_queries: int, columns: int, row_bytes: int, chunk_bytes: int, entry_bytes: int = 8) -> tuple[int, int]:
    """Rows and queries of a tile: half of `chunk_bytes` for the rows and half for the `[queries, rows]` matrix, both at least one line."""
    tile_queries = min(num_queries, 4096)
    tile_rows = min(chunk_bytes // 2 // row_bytes, chunk_bytes // 2 // (entry_bytes * tile_queries), num_rows)
    tile_rows = max(tile_rows, min(num_rows, 64))
    return tile_rows, tile_queries
