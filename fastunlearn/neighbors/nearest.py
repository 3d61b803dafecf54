"""Exact k-nearest-neighbour search of the forget set in the retain set.

ReTrack (arXiv 2509.13007, section 3.3) measures Euclidean distances on pixels.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..host import check
from ..host.atomic import atomic_file
from ..host.kept import KeptRows
from ..host.store import ImageStore
from .candidates import search_faiss
from .floating import search_float
from .tiles import ascending
from .uint8 import search_uint8

CACHE_FORMAT = "fastunlearn-neighbors"
SQDIST_DTYPES = (torch.int64, torch.float32, torch.float64)
CACHE_VERSION = 1  # raised whenever a search could give another answer
DEFAULT_CHUNK_BYTES = 2**28
ROWS_MEASURED = 256  # of neighbours that a caller gives
DISTANCE_ROUNDING = 1e-6  # between float rows, for callers who measured in float32
PART_VALUES = 2**24  # how many values of a set that may be on disk are looked at together
# The smallest float64 number ends near 1e-308. The square of this value, and a share of 1e-16 of that, which
# the error bounds reckon with, are still numbers.
SMALLEST = 1e-140
BACKENDS = ("auto", "exact", "faiss")


def nearest_neighbors(
    forget: ImageStore | Tensor,  # [N, ...]
    retain: ImageStore | Tensor,  # [M, ...]
    k: int,
    *,
    backend: str = "auto",
    cache_dir: str | Path | None = None,
    chunk_bytes: int = DEFAULT_CHUNK_BYTES,
    show_progress: bool = False,
    labels: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The k nearest retain rows of every forget row by Euclidean distance.

    The answer is exact: ascending distances, ties by the lower index. The retain set is streamed in tiles, so
    it may be a memory-mapped file larger than memory; equal forget rows are searched once.

    Args:
        forget: `[N, ...]`, a store or a tensor.
        retain: `[M, ...]`, the same kind (both uint8 or both floating) with rows of the same shape.
        k: how many, in [1, M].
        backend: "exact": this package's own search; "faiss": faiss finds candidates, which are ranked
            exactly, and rows whose candidates a bound cannot prove complete are searched by "exact"; "auto":
            the faster of the two as measured, which is "faiss" for float rows on a CPU where it is installed
            and "exact" otherwise. The answer is the same.
        cache_dir: a folder (created with mode 0700) where results are kept as safetensors files with mode
            0600, found again by the content of both sets and k. A damaged file is reported, searched anew and
            replaced.
        chunk_bytes: working memory of the search beside both sets; at least one tile of 64 rows is taken
            whatever it says.
        show_progress: a progress bar over the retain rows.
        labels: integers `[N]` of the forget rows and `[M]` of the retain rows: neighbours of a forget row are
            then among the retain rows of its label. The retain rows of one label are copied at a time.

    Returns:
        index int64 `[N, k]`, sqdist `[N, k]`, both on the device of `forget`. For uint8 rows sqdist is the
        exact int64 in grey levels (times `(2/255)^2`: in the scale of network input); for float rows it is
        the float64 sum over the differences of the given values.

    Raises:
        ImportError: faiss is asked for and not installed.
        TypeError, ValueError: for sets that are empty, of different kind or row shape, or not finite, and for
            k outside [1, M], or fewer than k retain rows with the label of a forget row.
    """
    forget_rows = _rows("forget", forget)
    # Rows of a file that are picked out of it are never all in memory.
    retain_rows = retain if isinstance(retain, KeptRows) else _rows("retain", retain)
    _check_alike(forget_rows, retain_rows)
    k = check.integer("k", k, low=1, high=len(retain_rows), of="the rows of retain")
    chunk_bytes = check.integer("chunk_bytes", chunk_bytes, low=1)
    check.one_of("backend", backend, BACKENDS)
    if labels is not None:
        labels = _check_labels(labels, len(forget_rows), len(retain_rows), k)

    path = found = None
    if cache_dir is not None:
        path = _cache_path(Path(cache_dir), forget, retain, k, labels)
        if path.is_file():  # opening a pipe would wait for a writer
            found = _read_cache(path, len(forget_rows), len(retain_rows), k)
    if found is None:
        options = k, backend, chunk_bytes, show_progress
        if labels is None:
            found = _search(forget_rows, retain_rows, *options)
        else:
            found = _search_within_labels(forget_rows, retain_rows, labels, *options)
        if path is not None:
            _write_cache(path, *found)
    index, sqdist = found
    return index.to(forget_rows.device), sqdist.to(forget_rows.device)


def _check_alike(forget: Tensor, retain: Tensor | KeptRows) -> None:
    """That distances between the rows of both mean something."""
    shape = tuple(forget.shape[1:])
    other = retain.shape if isinstance(retain, KeptRows) else tuple(retain.shape[1:])
    if shape != other:
        raise ValueError(f"retain: expected rows of shape {shape} (those of forget), got {other}")
    if (forget.dtype == torch.uint8) != (retain.dtype == torch.uint8):
        expected = "rows of the kind of forget (both uint8 or both floating)"
        raise TypeError(f"retain: expected {expected}, got {retain.dtype} beside {forget.dtype}")


def check_neighbors(forget: ImageStore, retain: ImageStore, index: Tensor, sqdist: Tensor) -> None:
    """Whether `index` and `sqdist`, `[N, k]`, can be neighbours of the forget rows.

    They have to be in order, and as far away as they say. Found for other images, or for these in another
    order, they would redirect every forget image to strangers, and no error would say so. At most 256 forget
    rows, spread over the set, are measured.

    Raises:
        ValueError: distances that descend, that are not finite, or that are not those of the rows.
    """
    if "meta" in (forget.device.type, retain.device.type):  # there are no values
        return
    finite = bool(torch.isfinite(sqdist).all())
    if not finite or bool((sqdist.diff(dim=1) < 0).any()) or bool((sqdist < 0).any()):
        raise ValueError("neighbors: expected finite squared distances, ascending in each row, got others")
    for row in torch.linspace(0, len(forget) - 1, min(len(forget), ROWS_MEASURED)).long().tolist():
        own = forget.images[row].flatten()
        others = retain.raw(index[row]).flatten(1).to(own.device)
        # Distances of uint8 rows are integers, so there is no rounding to allow for.
        if forget.is_uint8:
            measured = (others.long() - own.long()).square().sum(1)
            agree = torch.equal(measured, sqdist[row].to(measured))
        else:
            measured = (others.double() - own.double()).square().sum(1)
            agree = torch.allclose(measured, sqdist[row].to(measured), rtol=DISTANCE_ROUNDING, atol=0)
        if not agree:
            expected = "neighbours of these forget rows, as nearest_neighbors returns them"
            found = f"row {row} has {measured[0].item():g} to its first"
            got = f"a squared distance of {sqdist[row, 0].item():g}"
            raise ValueError(f"neighbors: expected {expected} ({found}), got {got}")


def _rows(name: str, images: ImageStore | Tensor) -> Tensor:
    """The rows of a store or a tensor, `[N, ...]`, once they are known to be uint8 or finite floats."""
    if isinstance(images, ImageStore):  # has checked its values
        return images.images
    if not isinstance(images, Tensor):
        raise TypeError(f"{name}: expected an ImageStore or a tensor [N, ...], got {check.describe(images)}")
    if images.dtype != torch.uint8 and not images.is_floating_point():
        raise TypeError(f"{name}: expected uint8 or floating-point rows, got {check.describe(images)}")
    if images.ndim < 2 or images.numel() == 0:
        raise ValueError(f"{name}: expected at least one row [N, ...], got {check.describe(images)}")
    if images.is_floating_point():
        # A memory-mapped set is never read as a whole.
        for part in _parts(images):
            check.finite(name, part)
    return images.detach()


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, PART_VALUES // rows[0].numel()))


def _search(
    forget: Tensor, retain: Tensor | KeptRows, k: int, backend: str, chunk_bytes: int, show_progress: bool
) -> tuple[Tensor, Tensor]:
    """index int64 `[N, k]` and sqdist `[N, k]` on the CPU, without the cache."""
    from rich.progress import Progress

    _refuse_tiny(forget, retain)
    search = _searcher(backend, retain)
    # Equal forget rows have equal neighbours: each is searched once, and its answer handed out again.
    first, inverse = _distinct(forget)
    with Progress(disable=not show_progress) as bar, torch.no_grad():
        task = bar.add_task("nearest neighbours", total=len(retain))
        queries = forget[first.to(forget.device)].flatten(1)
        options = {"chunk_bytes": chunk_bytes, "progress": lambda rows: bar.advance(task, rows)}
        if isinstance(retain, KeptRows):
            index, sqdist = _search_in_chunks(search, queries, retain, k, options)
        else:
            index, sqdist = search(queries, retain, k, **options)
    return index.cpu()[inverse], sqdist.cpu()[inverse]


def _search_in_chunks(
    search: Callable[..., tuple[Tensor, Tensor]], queries: Tensor, retain: KeptRows, k: int, options: dict
) -> tuple[Tensor, Tensor]:
    """As `search`: the nearest of all rows are among the nearest of each chunk of them."""
    found = []
    for start, rows in retain.chunks():
        index, sqdist = search(queries, rows, min(k, len(rows)), **options)
        found.append((index + start, sqdist))
        index, sqdist = ascending(*(torch.cat(parts, dim=1) for parts in zip(*found, strict=True)))
        found = [(index[:, :k], sqdist[:, :k])]
    return found[0]


def _search_within_labels(
    forget: Tensor, retain: Tensor | KeptRows, labels: tuple[Tensor, Tensor], k: int, *options
) -> tuple[Tensor, Tensor]:
    """As `_search`, for each label of the forget rows among the retain rows that have it, too."""
    index = torch.empty(len(forget), k, dtype=torch.int64)
    sqdist = None
    for label in labels[0].unique():
        own, others = ((each == label).nonzero().squeeze(1) for each in labels)
        kept = isinstance(retain, KeptRows)
        subset = retain.raw(others) if kept else retain[others.to(retain.device)]
        position, distances = _search(forget[own.to(forget.device)], subset, k, *options)
        if sqdist is None:
            sqdist = torch.empty(len(forget), k, dtype=distances.dtype)
        # The rows of a label keep their order, so ties go to the lower index of the whole set, too.
        index[own], sqdist[own] = others[position], distances
    return index, sqdist


def _check_labels(labels, num_forget: int, num_retain: int, k: int) -> tuple[Tensor, Tensor]:
    """Labels of both sets on the CPU, where every forget row has k retain rows of its label.

    Raises:
        TypeError, ValueError: naming `labels`.
    """
    if not isinstance(labels, (tuple, list)) or len(labels) != 2:
        expected = "expected a pair, labels of the forget rows and of the retain rows, or None"
        raise TypeError(f"labels: {expected}, got {check.describe(labels)}")
    kept = []
    for name, own, count in zip(("labels[0]", "labels[1]"), labels, (num_forget, num_retain), strict=True):
        check.tensor(name, own, ndim=1, floating=False)
        if len(own) != count:
            raise ValueError(f"{name}: expected one label a row, [{count}], got {tuple(own.shape)}")
        kept.append(own.cpu().long())
    forget, retain = kept
    for label in forget.unique().tolist():
        found = int((retain == label).sum())
        if found < k:
            row = int((forget == label).nonzero()[0])
            expected = f"expected at least k = {k} retain rows with the label of every forget row"
            raise ValueError(f"labels: {expected}, got {found} with label {label} (forget row {row})")
    return forget, retain


def _searcher(backend: str, retain: Tensor | KeptRows) -> Callable[..., tuple[Tensor, Tensor]]:
    """The search that `backend` means for rows of this kind, in this place."""
    integers = retain.dtype == torch.uint8
    # For float rows on a CPU faiss is the faster one as measured; the answer is the same.
    if backend == "auto" and not integers and retain.device.type == "cpu":
        installed = importlib.util.find_spec("faiss") is not None
        backend = "faiss" if installed else "exact"
    if backend == "faiss":
        return search_faiss
    if integers:
        return search_uint8
    return search_float


def _refuse_tiny(forget: Tensor, retain: Tensor | KeptRows) -> None:
    """That the values are not so small that their squares are 0 in float64, and with them all distances.

    Raises:
        ValueError: they are.
    """
    if not forget.is_floating_point() or forget.is_meta:
        return
    # Where a forget row has a value that is large enough, the larger set need not be looked at.
    largest = float(forget.abs().amax())
    if largest >= SMALLEST:
        return
    kept = isinstance(retain, KeptRows)
    parts = (rows for _, rows in retain.chunks()) if kept else retain.split(1024)
    largest = max(largest, *(float(part.abs().amax()) for part in parts))
    if 0 < largest < SMALLEST:
        expected = f"values of at least {SMALLEST:g}"
        raise ValueError(f"forget, retain: expected {expected}, got at most {largest:g}: scale them")


def _distinct(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Position of the first of each group of equal rows, and for every row `[N]` the number of its group."""
    groups: dict[bytes, int] = {}
    first, inverse = [], []
    for position, row in enumerate(rows):
        digest = hashlib.blake2b(_bytes(row), digest_size=32).digest()
        if digest not in groups:
            groups[digest] = len(groups)
            first.append(position)
        inverse.append(groups[digest])
    return torch.tensor(first), torch.tensor(inverse)


# --- cache --------------------------------------------------------------------------------------------------


def _cache_path(
    folder: Path,
    forget: ImageStore | Tensor,
    retain: ImageStore | Tensor,
    k: int,
    labels: tuple[Tensor, Tensor] | None,
) -> Path:
    """The file whose name says by what the result is decided: the content of both sets, k, and their labels.

    The backend does not stand in it, since all of them give the same answer.
    """
    decisive = [CACHE_FORMAT, CACHE_VERSION, _content_hash(forget), _content_hash(retain), k]
    if labels is not None:
        decisive += [_content_hash(own) for own in labels]
    key = json.dumps(decisive)
    return folder / f"{CACHE_FORMAT}-{hashlib.sha256(key.encode()).hexdigest()[:40]}.safetensors"


def _content_hash(images: ImageStore | Tensor) -> str:
    """SHA-256 over dtype, shape and values."""
    if isinstance(images, ImageStore):
        return images.content_hash()
    digest = hashlib.sha256(f"{images.dtype} {tuple(images.shape)}".encode())
    for part in _parts(images):
        digest.update(_bytes(part))
    return digest.hexdigest()


def _bytes(rows: Tensor) -> memoryview:
    return memoryview(rows.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())


def _write_cache(path: Path, index: Tensor, sqdist: Tensor) -> None:
    """Written aside with mode 0600 and renamed, so a reader finds a whole file or none."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    metadata = {"format": CACHE_FORMAT, "version": str(CACHE_VERSION), "of": path.stem}
    metadata["sha256"] = _result_hash(index, sqdist)
    with atomic_file(path, mode=0o600) as file:
        file.write(save({"index": index.contiguous(), "sqdist": sqdist.contiguous()}, metadata=metadata))


def _read_cache(path: Path, num_forget: int, num_retain: int, k: int) -> tuple[Tensor, Tensor] | None:
    """The kept result, or None, with a warning, when the file is damaged."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            index, sqdist = file.get_tensor("index"), file.get_tensor("sqdist")
        if metadata.get("format") != CACHE_FORMAT or metadata.get("sha256") != _result_hash(index, sqdist):
            raise ValueError("its content does not have the hash it carries")
        # A file that was renamed has the right hash, and is the answer to another question.
        if metadata.get("of", path.stem) != path.stem:
            raise ValueError("it was found for other sets, and carries their name")
        right_shape = index.shape == sqdist.shape == (num_forget, k)
        if index.dtype != torch.int64 or sqdist.dtype not in SQDIST_DTYPES:
            raise ValueError(f"it holds {index.dtype} and {sqdist.dtype}")
        if not right_shape or index.min() < 0 or index.max() >= num_retain:
            raise ValueError(f"it holds {tuple(index.shape)} neighbours, not {(num_forget, k)}")
    except (SafetensorError, ValueError, OSError, KeyError) as error:
        said = check.in_a_line(error)
        warnings.warn(
            f"{path}: damaged neighbour cache ({said}); searching again and replacing it", stacklevel=3
        )
        return None
    return index, sqdist


def _result_hash(index: Tensor, sqdist: Tensor) -> str:
    digest = hashlib.sha256(f"{index.dtype} {tuple(index.shape)} {sqdist.dtype}".encode())
    digest.update(_bytes(index))
    digest.update(_bytes(sqdist))
    return digest.hexdigest()
