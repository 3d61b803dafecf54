"""What a file says of itself is held against the memory there is, before any of it is taken."""

from __future__ import annotations

import gzip
import io
import struct
import threading
import zipfile
from pathlib import Path

import numpy as np
import pytest
from encoded_images import COLOURS, encoded, needs_pyarrow, put, table
from PIL import Image, PngImagePlugin

from fastunlearn.data import folders, load_images
from fastunlearn.data.idx import idx_header
from fastunlearn.host import room

FREE = 10**6  # bytes of memory, as the tests of readers have it


# --- how much there is -----------------------------------------------------------------------------------


def system(root: Path, **files: str) -> Path:
    """A `/` with these files; `__` in a name stands for a `/`."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


MEMINFO = "MemTotal:       2000 kB\nMemFree:         10 kB\n\nMemAvailable:   1000 kB\n"


def write_group(folder: Path, names: tuple[str, str], limit: str, usage: int, stat: str = "") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{usage}\n")
    (folder / "memory.stat").write_text(stat)


SECOND = ("memory.max", "memory.current")
FIRST = ("memory.limit_in_bytes", "memory.usage_in_bytes")


def test_memory_is_what_the_machine_has_left(tmp_path):
    assert room.available_memory(system(tmp_path, proc__meminfo=MEMINFO)) == 1000 * 1024


def test_memory_is_unknown_where_the_system_does_not_say(tmp_path):
    assert room.available_memory(tmp_path) is None
    assert room.available_memory(system(tmp_path, proc__meminfo="MemTotal: 5 kB\n")) is None


@pytest.mark.parametrize("limited", ["jobs/7", "jobs", ""])
def test_memory_is_what_the_group_has_left_or_one_around_it(limited, tmp_path):
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/jobs/7\n")
    for name in ("jobs/7", "jobs"):
        write_group(tmp_path / "sys/fs/cgroup" / name, SECOND, "max", 600)
    write_group(tmp_path / "sys/fs/cgroup" / limited, SECOND, "900", 600)
    assert room.available_memory(tmp_path) == 300


def test_files_that_a_group_caches_count_as_free(tmp_path):
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    stat = "anon 100\nfile 500\ninactive_file 200\nactive_file 150\n"
    write_group(tmp_path / "sys/fs/cgroup", SECOND, "900", 600, stat)
    assert room.available_memory(tmp_path) == 650


@pytest.mark.parametrize("seen", ["docker/4f", ""])  # in a container the group has the host's name
def test_the_first_version_of_groups(seen, tmp_path):
    system(
        tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="3:cpu:/docker/4f\n2:memory:/docker/4f\n0::/\n"
    )
    write_group(tmp_path / "sys/fs/cgroup/memory", FIRST, str(2**63 - 4096), 600)
    stat = "inactive_file 1\ntotal_inactive_file 20\ntotal_active_file 10\n"
    write_group(tmp_path / "sys/fs/cgroup/memory" / seen, FIRST, "900", 600, stat)
    assert room.available_memory(tmp_path) == 330


def test_a_group_that_is_full_has_nothing_left(tmp_path):
    system(tmp_path, proc__meminfo=MEMINFO, proc__self__cgroup="0::/\n")
    write_group(tmp_path / "sys/fs/cgroup", SECOND, "900", 950)
    assert room.available_memory(tmp_path) == 0


@pytest.mark.parametrize(
    ("size", "words"), [(12, "12 bytes"), (1500, "1.5 kB"), (3_200_000_000, "3.2 GB"), (7 * 10**12, "7.0 TB")]
)
def test_bytes_in_words(size, words):
    assert room.in_words(size) == words


# --- readers ---------------------------------------------------------------------------------------------


@pytest.fixture
def little(monkeypatch):
    """Of memory there is `FREE`, and everything is asked about."""
    monkeypatch.setattr(room, "available_memory", lambda: FREE)
    monkeypatch.setattr(room, "SMALL", 1)


def png_header(width: int, height: int) -> bytes:
    """A PNG of one grey level, of which only the header is long."""
    content = io.BytesIO()
    Image.new("L", (1, 1)).save(content, "PNG")
    head = b"IHDR" + struct.pack(">2I", width, height) + content.getvalue()[24:29]
    checksum = struct.pack(">I", zipfile.crc32(head))
    return content.getvalue()[:12] + head + checksum + content.getvalue()[33:]


def test_a_narrow_image_takes_more_than_its_pixels(tmp_path, little):
    path = put(tmp_path, png_header(1, 80_000))
    expected = (
        r"x.png: expected an image that fits into the 1.0 MB of memory that are free, got one that takes"
    )
    with pytest.raises(ValueError, match=rf"{expected} 2.4 MB$"):
        load_images(path)


def test_the_size_that_is_asked_for_counts_too(tmp_path, little):
    path = put(tmp_path, encoded(COLOURS))
    load_images(path, size=64)
    with pytest.raises(
        ValueError, match=r"x.png: expected an image that fits .* got one that takes 10\.\d MB"
    ):
        load_images(path, size=1000)


def test_images_that_do_not_fit_together_are_decoded_one_after_another(tmp_path, monkeypatch):
    """Four threads, and memory for one and a half of the images."""
    for number in range(8):
        put(tmp_path, encoded(COLOURS), f"{number}.png")
    size = room_of_one(tmp_path / "0.png", monkeypatch)
    monkeypatch.setattr(room, "available_memory", lambda: size * 3 // 2)
    monkeypatch.setattr(folders.os, "cpu_count", lambda: 4)
    together, most, another = set(), [], threading.Event()
    load = PngImagePlugin.PngImageFile.load

    def watched_load(self):
        first = not hasattr(self, "seen")
        self.seen = True
        together.add(id(self))
        most.append(len(together))
        if len(together) > 1:
            another.set()
        if first:
            another.wait(0.05)  # for one that must not come
        result = load(self)
        together.discard(id(self))
        return result

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", watched_load)
    assert len(load_images(tmp_path)) == 8
    assert most == [1] * len(most)
    assert room._taken == 0


def room_of_one(path: Path, monkeypatch) -> int:
    """What decoding `path` is thought to take."""
    monkeypatch.setattr(room, "SMALL", 1)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(room, "require", lambda what, size: asked.append(size))
        load_images(path)
    return asked[0]


def test_what_fits_is_taken_by_several_at_once(little):
    """Two blocks wait for each other inside: they could not if only one were let in."""
    meeting = threading.Barrier(2, timeout=60)

    def take() -> None:
        with room.taking("an image", FREE // 2):
            meeting.wait()

    threads = [threading.Thread(target=take) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meeting.broken
    assert room._taken == 0


def test_a_set_of_images_that_does_not_fit_is_refused_at_the_first(tmp_path, little):
    for number in range(8):
        put(tmp_path, encoded(np.zeros((200, 200, 3), np.uint8)), f"{number}.png")
    load_images(tmp_path / "0.png")
    with pytest.raises(
        ValueError, match=rf"{tmp_path.name}: expected a set of images .* got one that takes 960\.0 kB"
    ) as error:
        room_is(700_000, load_images, tmp_path)
    assert "\n" not in str(error.value)


def room_is(free: int, call, *arguments):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "available_memory", lambda: free)
        return call(*arguments)


def test_a_small_npz_that_unpacks_to_much_is_refused(tmp_path, little):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, images=np.zeros((1, 1200, 1200), np.uint8))
    assert path.stat().st_size < FREE / 100
    with pytest.raises(ValueError, match=r"x.npz: expected an archive of arrays that fits .* takes 1.4 MB"):
        load_images(path)
    np.savez_compressed(path, images=np.ones((8, 300, 300), np.uint8), other=np.zeros(10**7))
    assert len(load_images(path, npz_key="images")) == 8  # the other is not read


def test_an_npz_whose_array_says_more_than_there_is_takes_no_memory(tmp_path, monkeypatch):
    """numpy would take memory for all of it. That the archive has less is seen without knowing the memory."""
    monkeypatch.setattr(room, "available_memory", lambda: None)
    header = io.BytesIO()
    shape = (10**5, 10**5)
    np.lib.format.write_array_header_1_0(header, {"descr": "|u1", "fortran_order": False, "shape": shape})
    with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
        archive.writestr("images.npy", header.getvalue() + bytes(100))
    with pytest.raises(
        ValueError, match=r"x.npz: expected an .npz file .*10000000000 bytes, of which .* 100"
    ):
        load_images(tmp_path / "x.npz")


def test_arrays_that_are_joined_in_memory_have_to_fit(tmp_path, little):
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.ones((600, 1, 32, 32), np.uint8) * 9)
    assert load_images(tmp_path / "a.npy").on_disk
    with pytest.raises(ValueError, match=r"paths: expected a set of images that fits .* takes 1.2 MB"):
        load_images([tmp_path / "a.npy", tmp_path / "b.npy"])


def test_an_array_in_foreign_byte_order_is_copied_only_if_it_fits(tmp_path, little):
    np.save(tmp_path / "x.npy", np.zeros((300, 1, 32, 32), ">f4"))
    with pytest.raises(ValueError, match=r"x.npy: expected an array that fits .* takes 1.2 MB"):
        load_images(tmp_path / "x.npy")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2**32 - 1,) * 3, r"got a gzip file of \d+, which cannot hold them"),
        ((2000, 30, 30), r"expected an array that fits .* takes 1.8 MB"),
    ],
)
def test_idx_gz_is_not_unpacked_where_its_header_says_too_much(shape, message, tmp_path, little):
    content = gzip.compress(idx_header(shape) + bytes(2 * FREE))
    with pytest.raises(ValueError, match=rf"x.gz: .*{message}"):
        load_images(put(tmp_path, content, "x.gz"))


@needs_pyarrow
def test_a_table_is_held_against_memory(tmp_path, little):
    noise = np.random.default_rng(0)
    picture = encoded(noise.integers(0, 256, (200, 200, 3)).astype(np.uint8))
    path = table(tmp_path, image=[picture] * 4, label=[0] * 4)
    assert len(load_images(path)) == 4
    path = table(tmp_path, image=[noise.bytes(300_000) for _ in range(4)])
    with pytest.raises(ValueError, match=r"x.parquet: expected a column of a row group .* takes 1.2 MB"):
        load_images(path)
    path = table(tmp_path, image=[encoded(np.zeros((100, 100, 3), np.uint8))] * 40)
    with pytest.raises(ValueError, match=r"x.parquet: expected a set of images that fits .* takes 1.2 MB"):
        load_images(path)
