"""The searches behind `nearest_neighbors`: integer arithmetic for uint8 rows, certified floating point for float rows, and faiss with a proof.

All stream the retain rows in tiles and never hold the `[Q, N]` matrix of distances. `neighbors.py` validates, removes duplicates and
caches; here `forget` is flattened to `[Q, D]`, `retain` is `[N, ...]` with D elements a row (flattened tile by tile, so that a permuted
view of a memory-mapped file is never copied as a whole), neither is empty, and `1 <= k <= N`.
"""

from .candidates import search_faiss
from .floating import search_float
from .uint8 import search_uint8

__all__ = ["search_faiss", "search_float", "search_uint8"]
