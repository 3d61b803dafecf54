"""sqdist: exact squared distances of uint8 rows, and `nearest`, which keeps the k smallest of each query.

`nearest` does not write the distances out.

Plain torch shifts both sides by -128, which leaves distances alone, so that the product is an int8 matrix
product with int32 sums: `||q - r||^2 = ||q||^2 + ||r||^2 - 2 <q, r>`. On a GPU that product is cuBLAS on
tensor cores, far from being what a search waits for (MNIST's 1,000 x 59,000 rows: 0.09 T operations of about
1,000 T a second), so there is no Triton kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn.functional import pad

from ._backends import find_kernel
from ._library import backend, define, define_native

INT32_COLUMNS = 33_025  # 33,025 * 255^2 < 2^31: up to here a squared distance of uint8 rows fits an int32
PRODUCT_COLUMNS = 65_536  # one int8 product at a time: 65,536 * 128^2 = 2^30
FLOAT_COLUMNS = 1_024  # float32 sums of centred uint8 products are exact up to here: 1,024 * 128^2 = 2^24
NORM_ELEMENTS = 2**18  # a slice of rows that stays in a core's second cache level


def sqdist(queries: Tensor, rows: Tensor) -> Tensor:
    """`||queries[i] - rows[j]||^2` as int64 `[Q, N]`, exact for any number of columns.

    Args:
        queries: uint8 `[Q, D]`.
        rows: uint8 `[N, D]`.
    """
    return _op(queries, rows)


def _eager(queries: Tensor, rows: Tensor) -> Tensor:
    # ||q - r||^2 = ||q||^2 + ||r||^2 - 2 <q, r>, all integers.
    left, right = centred(queries), centred(rows)
    norms = square_norms(left).long()[:, None] + square_norms(right).long()
    return norms - 2 * products(left, right).long()


def _empty(queries: Tensor, rows: Tensor) -> tuple[Tensor]:
    return (queries.new_empty((len(queries), len(rows)), dtype=torch.int64),)


def _prepare(args: tuple, outputs: tuple) -> tuple:
    return tuple(without_gaps(value) for value in args)


def _check(queries: Tensor, rows: Tensor) -> None:
    for name, value in (("queries", queries), ("rows", rows)):
        if value.dtype != torch.uint8 or value.ndim != 2 or value.shape[1] != queries.shape[1]:
            found = f"{value.dtype} of shape {tuple(value.shape)}"
            raise ValueError(f"{name}: expected uint8 rows of one length, got {found}")


_op = define(
    "sqdist",
    "Tensor queries, Tensor rows",
    ("distances",),
    check=_check,
    empty=_empty,
    eager=_eager,
    prepare=_prepare,
)
define_native("nearest", "Tensor queries, Tensor rows, int first_row, Tensor(a!) distances, Tensor(b!) index")


def nearest_kernel(device: torch.device) -> Callable | None:
    """`nearest(queries, rows, first_row, distances, index)` on `device`; None where plain torch has to do.

    It merges uint8 rows `[n, D]`, numbered from `first_row`, into the k best of uint8 queries `[Q, D]`:
    `distances` and `index`, int64 `[Q, k]`, ascending, ties by the lower number; at first full of the largest
    int64 and of -1. Numbers ascend from call to call.
    """
    if backend() == "eager":
        return None
    return find_kernel("nearest", device, (), required=backend() == "kernels" and device.type == "cpu")


def without_gaps(rows: Tensor) -> Tensor:
    """`[N, D]` with the columns of a row side by side, copied only if they are not (rows may lie apart)."""
    if rows.shape[1] == 1 or rows.stride(1) == 1:
        return rows
    return rows.contiguous()


# --- plain torch


def centred(rows: Tensor) -> Tensor:
    """uint8 `[M, D]` minus 128, as int8: flipping the top bit does both."""
    return (rows ^ 128).view(torch.int8)


def square_norms(rows: Tensor) -> Tensor:
    """Squared norm of each row of `[M, D]`, float64 `[M]` (exact for int8 rows)."""
    step = max(1, NORM_ELEMENTS // rows.shape[1])
    dtype = torch.float32 if rows.dtype == torch.int8 else torch.float64
    return torch.cat([part.to(dtype).square().sum(1, dtype=torch.float64) for part in rows.split(step)])


def products(queries: Tensor, rows: Tensor) -> Tensor:
    """Exact dot products `[Q, C]` of int8 `[Q, D]` and `[C, D]`.

    They are int32 up to `INT32_COLUMNS` columns, int64 beyond.
    """
    columns = queries.shape[1]
    integer = queries.device.type == "cuda" or (queries.device.type == "cpu" and int8_product_is_exact())
    # As many columns at once as the sums of a product hold exactly.
    step = PRODUCT_COLUMNS if integer else FLOAT_COLUMNS
    total = None
    for start in range(0, columns, step):
        left, right = queries[:, start : start + step], rows[:, start : start + step]
        if integer:
            part = int8_product(left, right)
        else:
            part = (left.float() @ right.float().T).to(torch.int32)
        if columns > INT32_COLUMNS:
            part = part.long()
        total = part if total is None else total.add_(part)
    return total


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """`left @ right.T` of int8 `[Q, D]` and `[C, D]`, int32, padded with zeros as `torch._int_mm` needs it.

    On a GPU that takes more than 16 queries, and columns and rows in multiples of 8; on a CPU torch 2.13
    reads past the end of matrices of one column.
    """
    (num_queries, columns), num_rows = left.shape, len(right)
    more_queries = max(17 - num_queries, 0)
    more_columns = max(16 - columns, -columns % 8)
    more_rows = -num_rows % 8
    if more_queries or more_columns:
        left = pad(left, (0, more_columns, 0, more_queries))
    if more_rows or more_columns:
        right = pad(right, (0, more_columns, 0, more_rows))
    return torch._int_mm(left, right.T)[:num_queries, :num_rows]


@cache
def int8_product_is_exact() -> bool:
    """Whether torch's int8 matrix product adds up without saturating on this CPU.

    Kernels for CPUs without VNNI may go through int16 sums. Both answers give the same neighbours; without it
    the product is done in float32, which is exact too and about five times slower.
    """
    # All pairs of extreme numbers: among them those of which two products overflow an int16.
    extremes = torch.tensor([[-128, -128], [127, 127], [-128, 127], [127, -128]], dtype=torch.int8)
    left = extremes.repeat(16, 392)  # [64, 784]
    right = extremes.flip(0).repeat(64, 392)
    return torch.equal(torch._int_mm(left, right.T).double(), left.double() @ right.double().T)
