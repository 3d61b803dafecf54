"""Exact nearest neighbours and near copies, streamed: the N x N matrix of distances never exists.

`nearest.py` validates, removes duplicates and caches. Behind it are integer arithmetic for uint8 rows
(`uint8.py`), certified floating point for float rows (`floating.py`), and faiss with a proof
(`candidates.py`). There `forget` is flattened to `[Q, D]`, `retain` is `[N, ...]` with D elements a row
(flattened tile by tile, so that a permuted view of a memory-mapped file is never copied as a whole), neither
is empty, and `1 <= k <= N`. `copies.py` finds images of one motif.
"""

from .copies import near_copies
from .nearest import nearest_neighbors

__all__ = ["near_copies", "nearest_neighbors"]
