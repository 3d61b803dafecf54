"""Exact neighbours: golden vectors, brute force over integers and float64, planted ties, streaming, the
cache, bad input.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastunlearn.host.store import ImageStore
from fastunlearn.neighbors import candidates, floating, nearest, uint8
from fastunlearn.ops import sqdist as sqdist_op
from fastunlearn.ops._backends import build_command, extension

needs_extension = pytest.mark.skipif(
    not extension("_C"), reason=f"the C++ extension is not built; build it with: {build_command()}"
)
in_torch_and_in_cpp = pytest.mark.parametrize(
    "arithmetic", ["eager", pytest.param("kernels", marks=needs_extension)]
)


def using(arithmetic: str):
    return mock.patch.dict(os.environ, FASTUNLEARN_BACKEND=arithmetic)


def brute_force(forget: Tensor, retain: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Literal definition: int64 for uint8 rows, float64 otherwise.

    A stable sort puts equal distances by the lower index.
    """
    dtype = np.int64 if forget.dtype == torch.uint8 else np.float64
    queries, rows = (
        x.flatten(1).to(torch.int64 if dtype is np.int64 else torch.float64).numpy() for x in (forget, retain)
    )
    distances = np.stack([np.square(query - rows).sum(1) for query in queries])
    index = np.argsort(distances, axis=1, kind="stable")[:, :k]
    return torch.from_numpy(index), torch.from_numpy(np.take_along_axis(distances, index, 1))


def nearest_neighbors(forget, retain, k, **options) -> tuple[Tensor, Tensor]:
    """By both backends where a test leaves the choice: float rows go to faiss by default, and this package's
    own search must say the same.
    """
    found = nearest.nearest_neighbors(forget, retain, k, **options)
    if (
        isinstance(forget, Tensor)
        and forget.is_floating_point()
        and not {"backend", "cache_dir"} & options.keys()
    ):
        assert_same(nearest.nearest_neighbors(forget, retain, k, backend="exact", **options), found)
    return found


def assert_same(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    assert found[1].dtype == expected[1].dtype
    assert torch.equal(found[1], expected[1])
    assert torch.equal(found[0], expected[0])


def random_rows(seed: int, *shape: int, high: int = 256) -> Tensor:
    return torch.randint(high, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


# --- golden


@pytest.mark.parametrize("k", [1, 10, 100])
@pytest.mark.parametrize("kind", ["uint8", "float32"])
@pytest.mark.parametrize("case", ["knn_digits", "knn_digits_class9"])
def test_golden(golden: Path, case: str, kind: str, k: int):
    digits = torch.from_numpy(np.load(golden / "knn" / "digits_uint8.npz")["data"])
    data = np.load(golden / "knn" / f"{case}.npz")
    # that case measures digits / 8 - 1
    scale = 1 / 64 if json.loads(str(data["meta"]))["data_shape"] == [1797, 1, 8, 8] else 1.0
    if kind == "float32":
        digits = digits.float() / 8 - 1 if scale != 1 else digits.float()
    forget, retain = digits[data["in.deletion_rows"]], digits[data["in.remain_rows"]]
    index, sqdist = nearest_neighbors(forget, retain, k)
    expected = data[f"out.sq_dist_k{k}"]
    measured = sqdist.double().numpy() * (scale if kind == "uint8" else 1.0)
    np.testing.assert_array_equal(measured, expected)
    np.testing.assert_array_equal(measured, data["out.sorted_sq_dist_top"][:, :k])
    for row in np.flatnonzero(~data[f"out.boundary_tie_k{k}"]):
        assert set(index[row].tolist()) == set(data[f"out.indices_k{k}"][row])
        if data[f"out.n_ties_inside_k{k}"][row] == 0:
            assert index[row].tolist() == data[f"out.indices_k{k}"][row].tolist()
    assert_same((index, sqdist), brute_force(forget, retain, k))


# --- uint8


@in_torch_and_in_cpp
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_forget=st.integers(1, 9),
    num_retain=st.integers(1, 700),
    columns=st.integers(1, 40),
    high=st.sampled_from([2, 3, 256]),
    k=st.integers(1, 30),
    copies=st.integers(0, 40),
    chunk_bytes=st.sampled_from([1, 20_000, 2**28]),
)
def test_uint8_equals_brute_force_with_planted_ties(
    arithmetic, seed, num_forget, num_retain, columns, high, k, copies, chunk_bytes
):
    forget, retain = rows_with_ties(seed, num_forget, num_retain, columns, high, copies)
    k = min(k, num_retain)
    with using(arithmetic):
        assert_same(
            nearest_neighbors(forget, retain, k, chunk_bytes=chunk_bytes), brute_force(forget, retain, k)
        )


def rows_with_ties(
    seed: int, num_forget: int, num_retain: int, columns: int, high: int, copies: int
) -> tuple[Tensor, Tensor]:
    """Equal retain rows far apart, and some equal to a forget row."""
    generator = np.random.default_rng(seed)
    forget, retain = (
        random_rows(seed, num_forget, columns, high=high),
        random_rows(seed + 1, num_retain, columns, high=high),
    )
    for _ in range(copies):
        source = (
            retain[generator.integers(num_retain)]
            if generator.random() < 0.7
            else forget[generator.integers(num_forget)]
        )
        retain[generator.integers(num_retain)] = source
    return forget, retain


@in_torch_and_in_cpp
@pytest.mark.parametrize("columns", [33_025, 33_026, 65_536, 65_537, 131_073, 200_000])
def test_long_rows_do_not_overflow(columns: int, arithmetic: str):
    forget = torch.stack(
        [
            torch.zeros(columns, dtype=torch.uint8),
            torch.full((columns,), 255, dtype=torch.uint8),
            random_rows(0, columns),
        ]
    )
    retain = torch.cat([random_rows(1, 3, columns), forget[[1, 0, 2, 1]]])
    with using(arithmetic):
        assert_same(nearest_neighbors(forget, retain, 7), brute_force(forget, retain, 7))


@pytest.mark.parametrize("columns", [784, 40_000])
def test_float_products_give_the_same_integers(monkeypatch, columns: int):
    forget, retain = random_rows(2, 4, columns), random_rows(3, 90, columns)
    monkeypatch.setattr(sqdist_op, "int8_product_is_exact", lambda: False)
    monkeypatch.setattr(torch, "_int_mm", None)
    with using("eager"):
        assert_same(nearest_neighbors(forget, retain, 9), brute_force(forget, retain, 9))


def test_int8_product_check_is_sound():
    assert sqdist_op.int8_product_is_exact() in (True, False)
    left, right = random_rows(4, 70, 3000).view(torch.int8), random_rows(5, 300, 3000).view(torch.int8)
    exact = left.double() @ right.double().T
    assert torch.equal(sqdist_op.products(left, right).double(), exact)
    assert torch.equal(
        sqdist_op.products(left[:, 7:8], right[:, 7:8]).double(),
        left[:, 7:8].double() @ right[:, 7:8].double().T,
    )


@in_torch_and_in_cpp
def test_a_large_tile_keeps_ties_in_order(arithmetic: str):
    retain = random_rows(6, 20_000, 3, high=4)  # 64 different rows: every distance ties hundreds of times
    forget = random_rows(7, 5, 3, high=4)
    with using(arithmetic):
        assert_same(nearest_neighbors(forget, retain, 20), brute_force(forget, retain, 20))


def test_a_distance_too_large_for_the_key_is_refused():
    row = torch.zeros(1, 1, dtype=torch.uint8)
    with pytest.raises(ValueError, match="retain: expected rows \\* columns"):
        uint8.search_uint8(row.expand(1, 2**48), row, 1, chunk_bytes=1, progress=int)


@in_torch_and_in_cpp
def test_threads_share_the_work_and_the_setting_stays(arithmetic: str):
    forget, retain = random_rows(17, 7, 50, high=6), random_rows(18, 3000, 50, high=6)
    torch.set_num_threads(3)
    try:
        with using(arithmetic):
            found = nearest_neighbors(forget, retain, 6, chunk_bytes=200_000)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert_same(found, brute_force(forget, retain, 6))


# --- float


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_forget=st.integers(1, 5),
    num_retain=st.integers(1, 400),
    columns=st.sampled_from([1, 7, 64, 1500]),
    k=st.integers(1, 20),
    spread=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    chunk_bytes=st.sampled_from([1, 100_000, 2**28]),
)
def test_float_equals_brute_force_with_near_ties(
    seed, num_forget, num_retain, columns, k, spread, dtype, chunk_bytes
):
    """`spread` 1e-6 gives distances that float32 cannot tell apart; 0 makes all retain rows equal."""
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(columns, generator=generator)
    retain = (centre + spread * torch.randn(num_retain, columns, generator=generator)).to(dtype)
    forget = torch.randn(num_forget, columns, generator=generator).to(dtype)
    k = min(k, num_retain)
    assert_same(nearest_neighbors(forget, retain, k, chunk_bytes=chunk_bytes), brute_force(forget, retain, k))


def test_unproven_rows_are_searched_again(monkeypatch):
    searched = []
    within = floating._search_within
    monkeypatch.setattr(
        floating,
        "_search_within",
        lambda forget, *args: searched.append(len(forget)) or within(forget, *args),
    )
    generator = torch.Generator().manual_seed(0)
    spread_out, crowded = (
        torch.randn(300, 500, generator=generator),
        3 + 1e-7 * torch.randn(300, 500, generator=generator),
    )
    near_nothing_else, near_the_crowd = spread_out[:1] + 0.01, torch.full((1, 500), 3.5)
    retain = torch.cat([spread_out, crowded])
    forget = torch.cat([near_nothing_else, near_the_crowd])
    assert_same(nearest_neighbors(forget, retain, 5, backend="exact"), brute_force(forget, retain, 5))
    assert searched == [1]


def test_bound_holds_where_reduced_precision_products_are_allowed():
    forget, retain = torch.randn(4, 700), torch.randn(200, 700)
    switches = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    before = [switch.fp32_precision for switch in switches]
    torch.set_float32_matmul_precision("medium")
    try:
        found = nearest_neighbors(forget, retain, 8)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
    assert_same(found, brute_force(forget, retain, 8))


# --- faiss


@pytest.fixture
def searched_again(monkeypatch) -> list[int]:
    """How many rows each exact search behind faiss was asked for."""
    pytest.importorskip("faiss")
    counts = []

    def counted(search):
        return lambda forget, *args, **kwargs: counts.append(len(forget)) or search(forget, *args, **kwargs)

    for name in ("search_uint8", "search_float"):
        monkeypatch.setattr(candidates, name, counted(getattr(candidates, name)))
    return counts


def assert_faiss_equals_exact(forget: Tensor, retain: Tensor, k: int, chunk_bytes: int = 2**28) -> None:
    found = nearest_neighbors(forget, retain, k, backend="faiss", chunk_bytes=chunk_bytes)
    assert_same(found, nearest_neighbors(forget, retain, k, backend="exact"))
    assert_same(found, brute_force(forget, retain, k))


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_forget=st.integers(1, 30),
    num_retain=st.integers(1, 400),
    columns=st.sampled_from([1, 3, 40, 300]),
    high=st.sampled_from([2, 3, 256]),
    k=st.integers(1, 60),
    copies=st.integers(0, 40),
    chunk_bytes=st.sampled_from([1, 20_000, 2**28]),
)
def test_faiss_equals_exact_with_planted_ties(
    seed, num_forget, num_retain, columns, high, k, copies, chunk_bytes
):
    pytest.importorskip("faiss")
    assert_faiss_equals_exact(
        *rows_with_ties(seed, num_forget, num_retain, columns, high, copies), min(k, num_retain), chunk_bytes
    )


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    num_forget=st.integers(1, 30),
    num_retain=st.integers(1, 400),
    columns=st.sampled_from([1, 7, 64, 1500]),
    k=st.integers(1, 40),
    spread=st.sampled_from([1.0, 1e-3, 1e-6, 0.0]),
    offset=st.sampled_from([0.0, 1.0, 1e4]),
    duplicates=st.integers(0, 60),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
    chunk_bytes=st.sampled_from([1, 100_000, 2**28]),
)
def test_faiss_equals_exact_on_float_rows(
    seed, num_forget, num_retain, columns, k, spread, offset, duplicates, dtype, chunk_bytes
):
    """Distances that float32 cannot tell apart, equal rows, and offsets beside which differences vanish."""
    pytest.importorskip("faiss")
    generator = torch.Generator().manual_seed(seed)
    centre = torch.randn(columns, generator=generator, dtype=torch.float64) + offset
    retain = (centre + spread * torch.randn(num_retain, columns, generator=generator)).to(dtype)
    retain[max(num_retain - duplicates, 1) :] = retain[0].clone()
    forget = (torch.randn(num_forget, columns, generator=generator) + offset).to(dtype)
    forget[0] = retain[0]
    assert_faiss_equals_exact(forget, retain, min(k, num_retain), chunk_bytes)


@pytest.mark.parametrize("kind", ["uint8", "float32"])
def test_candidates_of_faiss_are_proven_or_searched_again(searched_again, kind: str):
    generator = torch.Generator().manual_seed(0)
    # Beside `lonely` 300 rows at different distances; at `crowded` the k-th neighbour and 100 more are
    # equally far.
    lonely, crowded = torch.full((1, 500), 100.0), torch.full((1, 500), 200.0)
    apart = 100 + torch.linspace(1, 60, 300)[:, None] * torch.randn(300, 500, generator=generator).sign()
    equal = 200 + 3 * torch.randn(100, 500, generator=generator).sign()
    forget, retain = torch.cat([lonely, crowded]), torch.cat([apart, equal])
    if kind == "uint8":
        forget, retain = forget.to(torch.uint8), retain.round().to(torch.uint8)
    assert_faiss_equals_exact(forget, retain, 5)
    assert searched_again == [1]
    searched_again.clear()
    assert_faiss_equals_exact(
        forget + (1 if kind == "uint8" else 2.0**20), retain + (1 if kind == "uint8" else 2.0**20), 5
    )
    assert searched_again == [1]


def test_candidates_that_are_all_rows_need_no_proof(searched_again):
    assert_faiss_equals_exact(random_rows(0, 3, 4, high=2), random_rows(1, 20, 4, high=2), 5)
    assert searched_again == []


@pytest.mark.parametrize(
    "wrong", [lambda values: values * 1.01, lambda values: values + float("nan"), lambda values: values - 100]
)
def test_faiss_that_computes_otherwise_than_assumed_is_not_believed(monkeypatch, searched_again, wrong):
    faiss = pytest.importorskip("faiss")
    knn = faiss.knn

    def worse(queries, rows, count):
        values, index = knn(queries, rows, len(rows))
        return wrong(values[:, -count:]), index[:, -count:]  # the farthest rows

    monkeypatch.setattr(faiss, "knn", worse)
    assert_faiss_equals_exact(random_rows(2, 3, 100), random_rows(3, 200, 100), 5)
    assert searched_again == [3]


def test_faiss_does_not_hide_rows_that_float32_cannot_hold():
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="retain: expected rows with a squared norm below 1e36"):
        nearest_neighbors(torch.ones(2, 4), torch.ones(60, 4) * 1e20, 1, backend="faiss")
    far = torch.ones(1, 4) * 1e19
    assert_faiss_equals_exact(far, torch.randn(60, 4, generator=torch.Generator().manual_seed(0)), 3)


def test_faiss_leaves_its_own_number_of_threads_alone():
    faiss = pytest.importorskip("faiss")
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(before + 1)
    try:
        nearest_neighbors(random_rows(0, 3, 4), random_rows(1, 200, 4), 5, backend="faiss")
        assert faiss.omp_get_max_threads() == before + 1
    finally:
        faiss.omp_set_num_threads(before)


def test_missing_faiss_is_said_with_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ImportError,
        match="backend='faiss': expected faiss to be installed; install it with: pip install faiss-cpu",
    ):
        nearest_neighbors(random_rows(0, 3, 4), random_rows(1, 20, 4), 5, backend="faiss")
    nearest_neighbors(random_rows(0, 3, 4), random_rows(1, 20, 4), 5)


def test_backends_share_the_cache(cached):
    forget, retain, folder, searches = cached
    for backend in ("exact", "faiss", "auto"):
        assert_same(
            nearest_neighbors(forget, retain, 3, backend=backend, cache_dir=folder),
            brute_force(forget, retain, 3),
        )
    assert not searches


# --- duplicates, stores, streaming


def test_equal_forget_rows_are_searched_once(monkeypatch):
    searched = []
    search = nearest.search_uint8
    monkeypatch.setattr(
        nearest,
        "search_uint8",
        lambda forget, *args, **kwargs: searched.append(len(forget)) or search(forget, *args, **kwargs),
    )
    forget, retain = random_rows(8, 3, 20)[[0, 1, 0, 0, 2, 1]], random_rows(9, 50, 20)
    assert_same(nearest_neighbors(forget, retain, 4), brute_force(forget, retain, 4))
    assert searched == [3]


@pytest.mark.parametrize("latents", [False, True])
def test_stores_give_what_tensors_give(latents: bool):
    forget, retain = random_rows(10, 4, 3, 5, 6), random_rows(11, 60, 3, 5, 6)
    if latents:
        forget, retain = forget / 20, retain / 20
    found = nearest_neighbors(
        ImageStore(forget, latents=latents), ImageStore(retain, latents=latents), 5, show_progress=True
    )
    assert_same(found, brute_force(forget, retain, 5))


@in_torch_and_in_cpp
def test_rows_that_are_no_dense_array_are_measured_as_they_are(arithmetic: str):
    images = [random_rows(12 + i, n, 5, 6, 3).permute(0, 3, 1, 2) for i, n in enumerate((4, 60))]
    apart = [random_rows(12 + i, n, 90)[::2, 3:70] for i, n in enumerate((4, 60))]
    across = [random_rows(12 + i, 20, n).t() for i, n in enumerate((4, 60))]
    repeated = [row.expand(n, 20) for row, n in zip(random_rows(12, 2, 1, 20), (4, 60), strict=True)]
    with using(arithmetic):
        for forget, retain in (images, apart, across, repeated):
            for chunk_bytes in (1, 2**28):
                assert_same(
                    nearest_neighbors(forget, retain, 5, chunk_bytes=chunk_bytes),
                    brute_force(forget, retain, 5),
                )


@needs_extension
def test_rows_are_read_where_they_lie(monkeypatch):
    """Stores, tensors, rows of a wider matrix and arrays of other libraries are searched without a copy."""

    class Foreign:
        """All that another library's array has to have."""

        def __init__(self, array: np.ndarray):
            self.array = array

        def __dlpack__(self, **kwargs):
            return self.array.__dlpack__(**kwargs)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    addresses = []
    kernel = uint8.nearest_kernel(torch.device("cpu"))
    monkeypatch.setattr(
        uint8,
        "nearest_kernel",
        lambda device: (
            lambda queries, rows, *rest: addresses.append(rows.data_ptr()) or kernel(queries, rows, *rest)
        ),
    )
    forget, retain, wide = random_rows(12, 4, 1, 5, 6), random_rows(13, 60, 1, 5, 6), random_rows(14, 60, 40)
    foreign = ImageStore(Foreign(retain.numpy()))
    for few, many in ((forget, retain), (ImageStore(forget), foreign), (forget.flatten(1), wide[:, 7:37])):
        nearest_neighbors(few, many, 5)
    assert addresses == [retain.data_ptr(), retain.data_ptr(), wide.data_ptr() + 7]


STREAM = """
import resource, sys
import numpy as np, torch
from fastunlearn.neighbors import nearest_neighbors
from fastunlearn.host.store import ImageStore
torch.set_num_threads(1)
retain = np.memmap(sys.argv[1], dtype=np.uint8, mode="r", shape=({rows}, 3, 64, 64))
forget = torch.full((2, 3, 64, 64), 9, dtype=torch.uint8)
forget[1] = 200
some = torch.zeros(300, 3, 64, 64, dtype=torch.uint8)
nearest_neighbors(forget, some, 3, chunk_bytes=2**24)  # loads what a product needs
used = next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, (used + {allowed}, used + {allowed}))
try:
    np.array(retain)
    sys.exit("the limit does not hold: the whole set fits")
except MemoryError:
    pass
queries = ImageStore(torch.from_numpy(forget.numpy()))
index, sqdist = nearest_neighbors(queries, ImageStore(retain), 3, chunk_bytes=2**24)
print(index.tolist(), sqdist.tolist())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA bounds anonymous memory on Linux only")
def test_memory_mapped_set_larger_than_the_memory_allowed(tmp_path: Path):
    """400 MB of retain rows, searched by a process that may not allocate 100 MB."""
    rows, columns = 34_000, 3 * 64 * 64
    path = tmp_path / "retain.bin"
    retain = np.memmap(path, dtype=np.uint8, mode="w+", shape=(rows, columns))  # a sparse file of zeros
    retain[33_999], retain[17], retain[20_000] = 9, 10, 10
    retain[25_000] = 203
    retain.flush()
    script = STREAM.format(rows=rows, allowed=100 * 2**20)
    result = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, result.stderr
    expected_index = [[33_999, 17, 20_000], [25_000, 17, 20_000]]
    expected = [[0, columns, columns], [9 * columns, 190**2 * columns, 190**2 * columns]]
    assert result.stdout.strip() == f"{expected_index} {expected}"


# --- cache


@pytest.fixture
def cached(tmp_path, monkeypatch):
    """A filled cache: forget, retain, the folder, and the list of searches made since."""
    searches = []
    search = nearest._search
    monkeypatch.setattr(nearest, "_search", lambda *args: searches.append(args) or search(*args))
    forget, retain = random_rows(14, 4, 1, 4, 4), random_rows(15, 40, 1, 4, 4)
    folder = tmp_path / "cache"
    nearest_neighbors(forget, retain, 3, cache_dir=folder)
    searches.clear()
    return forget, retain, folder, searches


def test_cache_is_used_private_and_keyed_by_content(cached):
    forget, retain, folder, searches = cached
    (file,) = folder.iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    assert folder.stat().st_mode & 0o777 == 0o700
    assert_same(
        nearest_neighbors(forget.clone(), retain.clone(), 3, cache_dir=folder), brute_force(forget, retain, 3)
    )
    assert not searches
    other = retain.clone()
    other[39, 0, 0, 0] ^= 1
    nearest_neighbors(forget, retain, 4, cache_dir=folder)
    nearest_neighbors(forget, other, 3, cache_dir=folder)
    nearest_neighbors(forget.flip(0), retain, 3, cache_dir=folder)
    nearest_neighbors(ImageStore(forget), ImageStore(retain), 3, cache_dir=folder)
    assert len(searches) == len(list(folder.iterdir())) - 1 == 4


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty", "header", "foreign", "of other sets"])
def test_damaged_cache_is_reported_and_replaced(cached, damage: str):
    forget, retain, folder, searches = cached
    (file,) = folder.iterdir()
    content = bytearray(file.read_bytes())
    if damage == "flip":
        content[-5] ^= 4
    elif damage == "truncate":
        del content[-8:]
    elif damage == "empty":
        content.clear()
    elif damage == "header":
        content[:8] = b"\xff" * 8
    else:
        others = forget[:2] if damage == "foreign" else forget.flip(0)
        nearest_neighbors(others, retain, 3, cache_dir=folder.parent / "other")
        content = next((folder.parent / "other").iterdir()).read_bytes()
        searches.clear()
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="damaged neighbour cache"):
        assert_same(nearest_neighbors(forget, retain, 3, cache_dir=folder), brute_force(forget, retain, 3))
    assert len(searches) == 1
    assert_same(nearest_neighbors(forget, retain, 3, cache_dir=folder), brute_force(forget, retain, 3))
    assert len(searches) == 1


def test_values_whose_squares_are_zero_are_refused():
    rows = torch.rand(9, 1, 2, 2, dtype=torch.float64) + 0.5
    for tiny in (1e-170, 1e-145):
        with pytest.raises(
            ValueError, match="forget, retain: expected values of at least 1e-140, got at most"
        ):
            nearest_neighbors(rows[:2] * tiny, rows[2:] * tiny, 3)
    assert_same(
        nearest_neighbors(rows[:2] * 1e-100, rows[2:] * 1e-100, 3),
        brute_force(rows[:2] * 1e-100, rows[2:] * 1e-100, 3),
    )
    zeros = nearest_neighbors(torch.zeros(1, 1, 2, 2), torch.zeros(4, 1, 2, 2), 2)
    assert zeros[0].tolist() == [[0, 1]]


def test_failed_cache_write_leaves_nothing(cached, monkeypatch):
    forget, retain, folder, _ = cached
    before = sorted(folder.iterdir())

    def full_disk(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space"):
        nearest_neighbors(forget, retain, 5, cache_dir=folder)
    assert sorted(folder.iterdir()) == before


# --- bad input

ROWS = random_rows(16, 6, 4)


@pytest.mark.parametrize(
    ("forget", "retain", "k", "error", "text"),
    [
        (ROWS, ROWS, 0, ValueError, r"k: expected an integer in \[1, 6\] \(the rows of retain\), got 0"),
        (ROWS, ROWS, 7, ValueError, r"k: expected an integer in \[1, 6\] \(the rows of retain\), got 7"),
        (ROWS, ROWS, 2.0, TypeError, "k: expected an integer, got 2.0"),
        (
            ROWS,
            ROWS[:, :3],
            1,
            ValueError,
            r"retain: expected rows of shape \(4,\) \(those of forget\), got \(3,\)",
        ),
        (ROWS, ROWS.float(), 1, TypeError, "retain: expected rows of the kind of forget"),
        (ROWS, ROWS.int(), 1, TypeError, "retain: expected uint8 or floating-point rows, got int32"),
        (ROWS[:0], ROWS, 1, ValueError, "forget: expected at least one row"),
        (ROWS, ROWS[:0], 1, ValueError, "retain: expected at least one row"),
        (ROWS[0], ROWS, 1, ValueError, "forget: expected at least one row"),
        (ROWS.tolist(), ROWS, 1, TypeError, "forget: expected an ImageStore or a tensor"),
        (
            ROWS.float(),
            ROWS / torch.tensor([1.0, 1.0, 1.0, 0.0]),
            1,
            ValueError,
            "retain: expected finite values",
        ),
        (
            ROWS.float(),
            ROWS.float() * 1e20,
            1,
            ValueError,
            "retain: expected rows with a squared norm below 1e36",
        ),
    ],
)
def test_bad_input(forget, retain, k, error, text):
    with pytest.raises(error, match=text):
        nearest_neighbors(forget, retain, k)


def test_unknown_backend():
    with pytest.raises(ValueError, match="backend: expected one of auto, exact, faiss, got 'flat'"):
        nearest_neighbors(ROWS, ROWS, 1, backend="flat")
