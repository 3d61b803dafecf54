"""sqdist and nearest: equal to the sums of int64 squares, in plain torch and in C++ with every instruction
set.
"""

from __future__ import annotations

import os
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn.ops._backends import build_command, extension
from fastunlearn.ops.sqdist import int8_product, nearest_kernel, sqdist

needs_extension = pytest.mark.skipif(
    not extension("_C"), reason=f"the C++ extension is not built; build it with: {build_command()}"
)
# Instruction set, and whether the u8 by s8 product is used where the processor has it (one without runs the
# best that it has).
NATIVE = [("portable", "0"), ("avx2", "0"), ("avx2", "1"), ("avx512", "0"), ("avx512", "1")]
COLUMNS = [1, 3, 15, 63, 64, 65, 784, 1024, 1025, 2049, 33_025, 33_100, 196_608]
FULL, EMPTY = torch.iinfo(torch.int64).max, -1


def kernel(isa: str = "avx512", vnni: str = "1"):
    """Environment in which only the C++ kernel may answer, with this instruction set."""
    return mock.patch.dict(
        os.environ, FASTUNLEARN_BACKEND="kernels", FASTUNLEARN_ISA=isa, FASTUNLEARN_VNNI=vnni
    )


def eager():
    return mock.patch.dict(os.environ, FASTUNLEARN_BACKEND="eager")


def direct(queries: Tensor, rows: Tensor) -> Tensor:
    """The definition, in int64."""
    left, right = queries.numpy().astype(np.int64), rows.numpy().astype(np.int64)
    return torch.from_numpy(np.stack([np.square(query - right).sum(1) for query in left]))


def case(num_queries: int, num_rows: int, columns: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows with gaps between them, both extremes on either side, and equal rows."""
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(256, (num_queries, columns), dtype=torch.uint8, generator=generator)
    rows = torch.randint(256, (num_rows, columns + 5), dtype=torch.uint8, generator=generator)[
        :, 2 : 2 + columns
    ]
    queries[0], rows[0] = 255, 0
    queries[-1], rows[-1] = 0, 255
    rows[num_rows // 2] = rows[num_rows // 3]
    return queries, rows


def merged(queries: Tensor, rows: Tensor, k: int, tile: int) -> tuple[Tensor, Tensor]:
    """`nearest` over tiles of rows: distances and index `[Q, k]`."""
    distances, index = torch.full((len(queries), k), FULL), torch.full((len(queries), k), EMPTY)
    for start in range(0, len(rows), tile):
        nearest_kernel(queries.device)(queries, rows[start : start + tile], start, distances, index)
    return distances, index


def assert_nearest(found: tuple[Tensor, Tensor], queries: Tensor, rows: Tensor) -> None:
    expected = direct(queries, rows)
    index = torch.from_numpy(np.argsort(expected.numpy(), axis=1, kind="stable"))[:, : found[1].shape[1]]
    assert torch.equal(found[0], expected.gather(1, index))
    assert torch.equal(found[1], index)


# --- all distances


@pytest.mark.parametrize("columns", COLUMNS)
def test_eager_is_exact(columns: int):
    queries, rows = case(3, 40, columns)
    with eager():
        assert torch.equal(sqdist(queries, rows), direct(queries, rows))


@needs_extension
@pytest.mark.parametrize(("isa", "vnni"), NATIVE)
@pytest.mark.parametrize("columns", COLUMNS)
def test_kernel_is_exact(columns: int, isa: str, vnni: str):
    queries, rows = case(17, 30, columns)
    with kernel(isa, vnni):
        assert torch.equal(sqdist(queries, rows), direct(queries, rows))


@needs_extension
@pytest.mark.parametrize(
    ("num_queries", "num_rows"), [(1, 1), (1, 700), (16, 24), (17, 25), (1100, 1), (33, 481)]
)
@pytest.mark.parametrize("columns", [5, 1030])
def test_kernel_covers_whole_and_partial_tiles(num_queries: int, num_rows: int, columns: int):
    queries, rows = case(num_queries, num_rows, columns)
    with kernel():
        assert torch.equal(sqdist(queries, rows), direct(queries, rows))


@needs_extension
def test_columns_may_lie_apart():
    queries, rows = (x.t().contiguous().t() for x in case(4, 50, 70))
    with kernel():
        assert torch.equal(sqdist(queries, rows), direct(queries, rows))


@pytest.mark.parametrize("environment", [eager, pytest.param(kernel, marks=needs_extension)])
def test_op_contract(environment):
    with environment():
        torch.library.opcheck(
            torch.ops.fastunlearn.sqdist, case(3, 20, 31), test_utils=("test_schema", "test_faketensor")
        )
        compiled = torch.compile(sqdist, fullgraph=True, backend="aot_eager")(*case(3, 20, 31))
    assert torch.equal(compiled, direct(*case(3, 20, 31)))


@settings(max_examples=40, deadline=None)
@given(
    num_queries=st.integers(1, 40),
    num_rows=st.integers(1, 70),
    columns=st.integers(1, 40),
    seed=st.integers(0, 2**32 - 1),
)
def test_padded_product_is_the_product(num_queries: int, num_rows: int, columns: int, seed: int):
    """What GPUs ask of torch's int8 product is done on CPUs too."""
    generator = torch.Generator().manual_seed(seed)
    left, right = (
        torch.randint(-128, 128, (count, columns), dtype=torch.int8, generator=generator)
        for count in (num_queries, num_rows)
    )
    with mock.patch.object(torch, "_int_mm", side_effect=picky_int_mm):
        assert torch.equal(int8_product(left, right).long(), left.long() @ right.long().T)


def picky_int_mm(left: Tensor, right: Tensor) -> Tensor:
    """The sizes that `torch._int_mm` takes on a GPU."""
    assert left.shape[0] > 16
    assert left.shape[1] % 8 == right.shape[1] % 8 == 0
    return (left.long() @ right.long()).int()


# --- the k nearest


@needs_extension
@pytest.mark.parametrize(("isa", "vnni"), NATIVE)
@pytest.mark.parametrize("columns", [1, 3, 65, 784, 1025, 33_100])
def test_nearest_with_ties_over_tiles(columns: int, isa: str, vnni: str):
    queries, rows = case(5, 300, columns)
    # hundreds of equal distances
    queries, rows = (queries // 100, rows // 100) if columns < 100 else (queries, rows)
    with kernel(isa, vnni):
        for k, tile in ((1, 300), (7, 300), (7, 50), (40, 24), (300, 300), (300, 7)):
            assert_nearest(merged(queries, rows, k, tile), queries, rows)


@needs_extension
def test_nearest_of_rows_196_608_long():
    queries, rows = case(2, 30, 196_608)
    with kernel():
        assert_nearest(merged(queries, rows, 30, 16), queries, rows)


@needs_extension
@settings(max_examples=100, deadline=None)
@given(
    num_queries=st.integers(1, 40),
    num_rows=st.integers(1, 600),
    columns=st.integers(1, 90),
    high=st.sampled_from([2, 256]),
    k=st.integers(1, 40),
    tile=st.integers(1, 700),
    gap=st.integers(0, 9),
    way=st.sampled_from(NATIVE),
    seed=st.integers(0, 2**32 - 1),
)
def test_nearest_is_a_stable_sort(num_queries, num_rows, columns, high, k, tile, gap, way, seed):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randint(high, (num_queries, columns + gap), dtype=torch.uint8, generator=generator)[
        :, gap:
    ]
    rows = torch.randint(high, (num_rows, columns + gap), dtype=torch.uint8, generator=generator)[:, :columns]
    with kernel(*way):
        assert_nearest(merged(queries, rows, min(k, num_rows), tile), queries, rows)


@needs_extension
@pytest.mark.parametrize("columns", [20, 1500])
def test_threads_share_the_rows_and_ties_stay_in_order(columns: int):
    queries, rows = case(70, 3000, columns)
    queries, rows = queries // 128, rows // 128
    torch.set_num_threads(3)
    try:
        with kernel():
            found = merged(queries, rows, 25, 2000)
    finally:
        torch.set_num_threads(1)
    assert_nearest(found, queries, rows)


@needs_extension
def test_fewer_rows_than_wanted_leave_the_rest_empty():
    queries, rows = case(4, 3, 10)
    with kernel():
        distances, index = merged(queries, rows, 5, 3)
    assert_nearest((distances[:, :3], index[:, :3]), queries, rows)
    assert torch.equal(distances[:, 3:], torch.full((4, 2), FULL))
    assert torch.equal(index[:, 3:], torch.full((4, 2), EMPTY))


# --- bad input


def best(rows: int, k: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.zeros(rows, k, dtype=dtype)


@needs_extension
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"queries": torch.zeros(2, 8)}, "queries: expected uint8 of two dimensions"),
        ({"rows": torch.zeros(8, dtype=torch.uint8)}, "rows: expected uint8 of two dimensions"),
        ({"rows": torch.zeros(3, 7, dtype=torch.uint8)}, "rows: expected 8 columns, as queries, got 7"),
        (
            {"rows": torch.zeros(8, 3, dtype=torch.uint8).t()},
            "rows: expected rows without gaps, got a column stride of 3",
        ),
        ({"rows": torch.zeros(0, 8, dtype=torch.uint8)}, "rows: expected at least one row and one column"),
        ({"distances": best(2, 0), "index": best(2, 0)}, "distances: expected at least one column"),
        ({"distances": best(2, 4, torch.int32)}, "distances: expected contiguous int64 of two dimensions"),
        ({"distances": best(4, 2).t()}, "distances: expected contiguous int64 of two dimensions"),
        ({"index": best(2, 3)}, r"index: expected shape \[2, 4\], got \[2, 3\]"),
        ({"distances": best(3, 4)}, r"distances: expected shape \[2, 4\], got \[3, 4\]"),
    ],
)
def test_kernel_refuses_what_it_cannot_read(change: dict, message: str):
    queries, rows = torch.zeros(2, 8, dtype=torch.uint8), torch.zeros(3, 8, dtype=torch.uint8)
    arguments = {"queries": queries, "rows": rows, "distances": best(2, 4), "index": best(2, 4)} | change
    with kernel(), pytest.raises(RuntimeError, match=message):
        nearest_kernel(queries.device)(
            arguments["queries"], arguments["rows"], 0, arguments["distances"], arguments["index"]
        )
