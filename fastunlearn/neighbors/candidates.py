"""faiss as a second backend: float32 candidates, ranked by exact distances.

A bound on what faiss may be off by proves that no neighbour is missing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.sqdist import square_norms
from .floating import LARGEST_NORM, search_float
from .tiles import DISTANCE_ERROR, MARGIN, Progress, ascending, exact_distances, tile_size
from .uint8 import search_uint8

LARGEST_GPU_COUNT = 2_048  # what faiss' GPU selection takes


def search_faiss(
    forget: Tensor, retain: Tensor, k: int, *, chunk_bytes: int, progress: Progress
) -> tuple[Tensor, Tensor]:
    """What `search_uint8` and `search_float` find, bit for bit, from candidates that faiss finds in float32.

    faiss gives the `k + MARGIN` rows that it holds for the nearest, and a value for each. A row that it left
    out has a value of at least the largest of these, so its distance is at least that less `_error_bound`.
    Where that is more than the k-th exact distance of the candidates, none is missing; all other forget rows
    are searched again exactly.

    Args:
        forget: `[Q, D]`, uint8 or floating.
        retain: `[N, ...]`, of the same kind.
        k: how many, in [1, N].
        chunk_bytes: working memory of the search.
        progress: called with the number of rows of each tile that is done.

    Returns:
        index int64 `[Q, k]`; squared distance int64 (uint8 rows) or float64 `[Q, k]`.

    Raises:
        ImportError: faiss is not installed.
    """
    knn = _knn(retain.device)
    integers = retain.dtype == torch.uint8
    search = search_uint8 if integers else search_float
    (num_queries, columns), num_rows = forget.shape, len(retain)
    count = min(num_rows, k + MARGIN)

    # Distances do not change with the origin, rounding errors do: they grow with the norms. Integers stay
    # integers, exact in float32.
    centre = forget.double().mean(0).to(retain.device)
    if integers:
        centre = centre.round()
    queries = _shifted(forget.to(retain.device), centre)
    query_norms = square_norms(queries).cpu()
    too_many = retain.is_cuda and count > LARGEST_GPU_COUNT
    if too_many or query_norms.max().item() > LARGEST_NORM:
        return search(forget, retain, k, chunk_bytes=chunk_bytes, progress=progress)
    values = torch.full((num_queries, count), torch.inf)
    index = torch.zeros((num_queries, count), dtype=torch.int64)
    largest_norm = 0.0
    tile_rows, _ = tile_size(num_rows, num_queries, 8 * columns, chunk_bytes)
    for start in range(0, num_rows, tile_rows):
        rows = _shifted(retain[start : start + tile_rows].flatten(1), centre)
        largest_norm = max(largest_norm, square_norms(rows).max().item())
        if largest_norm > LARGEST_NORM:
            return search(forget, retain, k, chunk_bytes=chunk_bytes, progress=progress)
        value, position = knn(queries, rows, min(count, len(rows)))
        values, order = torch.cat([values, value], 1).topk(count, dim=1, largest=False)
        index = torch.cat([index, position + start], 1).gather(1, order)
        progress(len(rows))

    query = torch.arange(num_queries).repeat_interleave(count)
    exact = exact_distances(forget, retain, query, index.flatten(), chunk_bytes).view(-1, count)
    error = _error_bound(query_norms, largest_norm, columns, retain.device)
    # The values of the candidates are held against the bound. Where one breaks it, faiss has computed in
    # another way than the bound assumes, and nothing is proven.
    as_bounded = ((values - exact).abs() <= error[:, None]).all(1)
    index, exact = ascending(index, exact)
    index, exact = index[:, :k].contiguous(), exact[:, :k].contiguous()
    # A row that was left out has a value of at least the largest kept: it is farther than the k-th neighbour.
    complete = values.amax(1) - error > exact[:, -1] * (1 + DISTANCE_ERROR)
    if count == num_rows:  # none was left out
        complete = torch.ones_like(complete)
    if integers:
        exact = exact.long()
    unproven = (~(as_bounded & complete)).nonzero().flatten()
    if len(unproven):
        queries = forget[unproven.to(forget.device)]
        found, distances = search(queries, retain, k, chunk_bytes=chunk_bytes, progress=lambda _: None)
        index[unproven], exact[unproven] = found.cpu(), distances.cpu()
    return index, exact


def _shifted(rows: Tensor, centre: Tensor) -> Tensor:
    """`rows - centre` in float32 with one rounding, none for integers."""
    if rows.dtype == torch.float64:
        return (rows.double() - centre).float()
    return rows.float() - centre.float()


def _error_bound(query_norms: Tensor, largest_norm: float, columns: int, device: torch.device) -> Tensor:
    """float64 `[Q]`: how far faiss' value may be from the distance.

    faiss sums squared differences, or adds `||q||^2 + ||r||^2 - 2 <q, r>`. In any order of summation either
    errs by at most `gamma_{D+3} (||q|| + ||r||)^2` (`gamma_n = n u / (1 - n u)`, `u = 2^-24`: Higham,
    Accuracy and Stability of Numerical Algorithms, section 3.1), and the rounding of both rows to float32
    before moves the distance by at most `(2 u + u^2) (||q|| + ||r||)^2`.

    Args:
        query_norms: `||q||^2`, float64 `[Q]`.
        largest_norm: the largest `||r||^2`.
        columns: D.
        device: where faiss computes.
    """
    # Of the 10: 3 of gamma, 2 for the rows, 2 for norms of rounded rows, and a reserve.
    terms = (columns + 10) * 2.0**-24
    if terms >= 0.5:
        return torch.full_like(query_norms, torch.inf)
    relative = terms / (1 - terms)
    # On a GPU the product may take rows rounded to TF32 (10 bits), which moves 2 <q, r> by at most
    # 2^-10 (||q|| + ||r||)^2.
    if device.type == "cuda":
        relative += 2.0**-10
    # Products below the smallest normal float32 number, 2^-126, may be lost as a whole.
    underflow = columns * 2.0**-125
    return relative * (query_norms.sqrt() + largest_norm**0.5).square() + underflow


def _knn(device: torch.device) -> Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]:
    """faiss' search, as a function of queries, rows and how many to find.

    Returns:
        `knn(queries, rows, count)`, which takes float32 `[Q, D]` and `[n, D]` and returns float32 values and
        int64 positions `[Q, count]` (not sorted), on the CPU.

    Raises:
        ImportError: faiss is not installed.
    """
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "backend='faiss': expected faiss to be installed; install it with: pip install faiss-cpu (on a "
            "GPU: faiss-gpu)"
        ) from error

    def on_gpu(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        with torch.cuda.device(device), torch_utils.using_stream(resources):
            values, index = faiss.knn_gpu(resources, queries.contiguous(), rows.contiguous(), count)
        return values.cpu(), index.cpu()

    # faiss has a number of threads of its own: for the time of a search it is torch's.
    def on_cpu(queries: Tensor, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        threads = faiss.omp_get_max_threads()
        faiss.omp_set_num_threads(torch.get_num_threads())
        try:
            values, index = faiss.knn(queries.cpu().numpy(), rows.cpu().numpy(), count)
        finally:
            faiss.omp_set_num_threads(threads)
        return torch.from_numpy(values), torch.from_numpy(index)

    if device.type != "cuda" or not faiss.get_num_gpus():
        return on_cpu
    import faiss.contrib.torch_utils as torch_utils  # makes faiss take tensors

    resources = faiss.StandardGpuResources()
    return on_gpu
