"""uint8 rows: exact by integer arithmetic, in C++ where the extension is built."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from threading import Barrier, Lock

import torch
from torch import Tensor

from ..ops.sqdist import INT32_COLUMNS, centred, nearest_kernel, products, square_norms, without_gaps
from .tiles import Progress, tile_size

# Of a call of the kernel, where it reads the rows in place: it takes seconds at most, so that progress shows.
TILE_ROWS = 2**16
# Held while torch's number of threads is another than the process's.
_STARTING = Lock()
# A selection works on so many distances at a time: about what a core's second cache level holds.
CACHE_ELEMENTS = 2**20


def search_uint8(
    forget: Tensor, retain: Tensor, k: int, *, chunk_bytes: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """Exact nearest rows by integer arithmetic.

    Args:
        forget: uint8 `[Q, D]`.
        retain: uint8 `[N, ...]`, read in order, one tile at a time.
        k: how many, in [1, N].
        chunk_bytes: working memory of the search.
        progress: called with the number of rows of each tile that is done.

    Returns:
        index int64 `[Q, k]` and squared distance int64 `[Q, k]`, ascending, on the device of `retain`.

    Raises:
        ValueError: so many rows and columns that distance and row number do not fit into 64 bits.
    """
    (num_queries, columns), num_rows = forget.shape, len(retain)
    # Values of centred rows are at most 2^7, so ||r||^2 - 2 <q, r> is at most 3 * 2^14 a column.
    distance_bits = (3 * 2**14 * columns).bit_length()
    if distance_bits + num_rows.bit_length() > 63:
        expected = "rows * columns below about 2^47 (distance and row number share 64 bits)"
        raise ValueError(f"retain: expected {expected}, got {num_rows} rows of {columns} columns")
    forget, kernel = forget.to(retain.device), nearest_kernel(retain.device)
    if kernel is None:
        return _in_torch(forget, retain, k, chunk_bytes, progress)
    queries = without_gaps(forget)
    sqdist = torch.full((num_queries, k), torch.iinfo(torch.int64).max)
    index = torch.full((num_queries, k), -1)
    # The kernel wants the values of a row side by side. Rows that are not so (of a permuted view, say) are
    # copied tile by tile, and only then does a tile take memory.
    first = retain[:1].flatten(1)
    in_place = first.data_ptr() == retain.data_ptr() and (columns == 1 or first.stride(1) == 1)
    tile_rows = TILE_ROWS if in_place else max(chunk_bytes // columns, 64)
    for start in range(0, num_rows, tile_rows):
        tile = without_gaps(retain[start : start + tile_rows].flatten(1))
        kernel(queries, tile, start, sqdist, index)
        progress(len(tile))
    return index, sqdist


# --- plain torch --------------------------------------------------------------------------------------------


def _in_torch(
    forget: Tensor, retain: Tensor, k: int, chunk_bytes: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """`search_uint8` where there is no kernel: by an int8 matrix product.

    With both sets shifted by -128, which leaves distances alone, and q fixed,
    `||q - r||^2 = ||q||^2 + (||r||^2 - 2 <q, r>)`: the term in brackets ranks the rows.

    That term travels with its row number in one int64, `term * 2^bits + row`, so the smallest numbers are the
    nearest rows, with ties in favour of the lower row.
    """
    (num_queries, columns), num_rows = forget.shape, len(retain)
    row_bits = num_rows.bit_length()
    best = torch.full((num_queries, k), torch.iinfo(torch.int64).max, device=retain.device)
    queries = centred(forget)
    tile_rows, tile_queries = tile_size(num_rows, num_queries, 2 * columns, chunk_bytes)
    rows_buffer = torch.empty((tile_rows, columns), dtype=torch.int8, device=retain.device)
    # Squared norms of short rows fit into 32 bits, which are half the memory to go through.
    norms_dtype = torch.int32 if columns <= INT32_COLUMNS else torch.int64
    norms_buffer = torch.empty(tile_rows, dtype=norms_dtype, device=retain.device)
    with _workers(retain.device) as (workers, run):
        for start in range(0, num_rows, tile_rows):
            tile = retain[start : start + tile_rows]
            rows, norms = rows_buffer[: len(tile)], norms_buffer[: len(tile)]

            def prepare(part: slice, tile=tile, rows=rows, norms=norms) -> None:
                rows[part] = centred(tile[part].flatten(1))
                norms[part] = square_norms(rows[part]).to(norms.dtype)

            def search(block: slice, rows=rows, norms=norms, start=start) -> None:
                _keep_smallest(best[block], products(queries[block], rows), norms, start, row_bits)

            run(prepare, _slices(len(tile), -(-len(tile) // workers)))
            run(search, _slices(num_queries, -(-tile_queries // workers)))
            progress(len(tile))
    # The lower bits are the row. The shift keeps the sign of the term, which may be negative; ||q||^2 makes a
    # distance of it.
    index = best & (2**row_bits - 1)
    return index, (best >> row_bits) + square_norms(queries).long()[:, None]


@contextmanager
def _workers(
    device: torch.device,
) -> Iterator[tuple[int, Callable[[Callable[[slice], None], list[slice]], None]]]:
    """`(count, run)`: `run(function, parts)` calls `function` on every part.

    On a CPU it does so by as many threads as torch uses, each computing alone: one join a part instead of one
    barrier an operation. Where other processes compete for the cores, that is twice as fast.
    """
    count = torch.get_num_threads() if device.type == "cpu" else 1
    if count == 1:
        yield 1, lambda function, parts: [function(part) for part in parts]
        return
    # A list waits for all parts, and raises what one of them raised.
    with ThreadPoolExecutor(count) as pool:
        _compute_alone(pool, count)
        yield count, lambda function, parts: list(pool.map(function, parts))


def _compute_alone(pool: ThreadPoolExecutor, count: int) -> None:
    """Has every one of the `count` threads of `pool` compute by itself.

    That is a thread's own setting, but making it also changes what threads that start later find, anywhere in
    the process. So all of `pool` make it before this returns, and the setting for later threads is put back
    at once.
    """
    ready = Barrier(count)  # so that each task has a thread of its own

    def alone() -> None:
        torch.get_num_threads()  # a thread takes the process's number at its first use: let that be now
        torch.set_num_threads(1)
        ready.wait()

    with _STARTING:
        try:
            wait([pool.submit(alone) for _ in range(count)])
        except BaseException:
            ready.abort()
            raise
        finally:
            torch.set_num_threads(count)


def _slices(length: int, size: int) -> list[slice]:
    """0 to `length` in parts of `size`, the last of which may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _keep_smallest(best: Tensor, products: Tensor, norms: Tensor, first_row: int, row_bits: int) -> None:
    """Merges a tile into `best` int64 `[Q, k]` in place.

    `products` `[Q, C]` is overwritten with `norms - 2 products`.

    The k smallest (distance, row) pairs of a line lie in its k blocks with the smallest (block minimum, block
    number): an entry of any other block has k smaller ones before it. So one pass over the distances finds
    the blocks and only those are looked into.
    """
    k, width = best.shape[1], products.shape[1]
    # A size of about sqrt(width / k) gives as many block minima as there are entries in the k blocks. Small
    # blocks, or few of them, are not worth it.
    size = 2 ** max(0, ((width // k).bit_length() - 1) // 2)
    blocks = width // size
    prune = size >= 8 and blocks > k
    numbers = torch.arange(first_row, first_row + width, device=best.device)
    step = max(1, CACHE_ELEMENTS // width)
    for start in range(0, len(best), step):
        part = products[start : start + step]
        part.mul_(-2).add_(norms)
        if prune:
            head = part[:, : blocks * size].unflatten(1, (blocks, size))
            # The number of a block decides between equal minima, as that of a row does between distances.
            minima = (head.amin(2).long() << blocks.bit_length()) + torch.arange(blocks, device=best.device)
            chosen = minima.topk(k, largest=False, sorted=False).indices  # [q, k]
            inside = head.gather(1, chosen[:, :, None].expand(-1, -1, size)).long()
            inside = (inside << row_bits) + numbers[: blocks * size].view(blocks, size)[chosen]
            # What is left over at the end fills no block: all of it is a candidate.
            tail = (part[:, blocks * size :].long() << row_bits) + numbers[blocks * size :]
            candidates = [best[start : start + step], inside.flatten(1), tail]
        else:
            candidates = [best[start : start + step], (part.long() << row_bits) + numbers]
        best[start : start + step] = torch.cat(candidates, 1).topk(k, largest=False).values
