"""What "auto" means on each device, and that the TF32 switch leaves torch's settings as it found them."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from itertools import permutations, product

import pytest
import torch

from fastunlearn.host.precision import memory_format, resolve_autocast, tf32

OPERATIONS = {
    "products": torch.backends.cuda.matmul,
    "convolutions": torch.backends.cudnn.conv,
    "recurrent": torch.backends.cudnn.rnn,
    "products on CPUs": torch.backends.mkldnn.matmul,
}


# --- autocast and memory format


@pytest.mark.parametrize("requested", [torch.bfloat16, torch.float16, None])
@pytest.mark.parametrize("device", ["cpu", "cuda:1"])
def test_what_is_asked_for_is_given(requested, device):
    assert resolve_autocast(requested, device) is requested


@pytest.mark.parametrize(
    ("device", "native", "expected"),
    [("cpu", True, None), ("cuda", True, torch.bfloat16), ("cuda:1", False, None)],
)
def test_auto_is_bfloat16_where_a_gpu_computes_in_it(monkeypatch, device, native, expected):
    asked = []

    def is_bf16_supported(including_emulation: bool) -> bool:
        assert not including_emulation
        return native

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_bf16_supported)
    monkeypatch.setattr(torch.cuda, "device", lambda device: asked.append(device) or nullcontext())
    assert resolve_autocast("auto", device) is expected
    assert asked == ([] if device == "cpu" else [torch.device(device)])


@pytest.mark.gpu
def test_auto_on_this_gpu(gpu):
    native = gpu.device.type == "cuda" and (
        torch.cuda.get_device_capability(gpu.device) >= (8, 0) or torch.version.hip is not None
    )
    assert resolve_autocast("auto", gpu.device) is (torch.bfloat16 if native else None)


@pytest.mark.parametrize("requested", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_memory_format_that_is_asked_for_is_given(requested, device):
    assert memory_format(requested, device) is requested


def test_auto_memory_format():
    assert memory_format("auto", torch.device("cuda", 1)) is torch.channels_last
    assert memory_format("auto", "cpu") is torch.contiguous_format


WRONG = [
    (
        lambda: resolve_autocast(torch.float32, "cpu"),
        ValueError,
        r"autocast_dtype: expected torch.bfloat16, .*, got torch.float32",
    ),
    (lambda: resolve_autocast("bf16", "cpu"), ValueError, r"autocast_dtype: expected .*, got 'bf16'"),
    (lambda: resolve_autocast(True, "cpu"), TypeError, r"autocast_dtype: expected .*, got True"),
    (
        lambda: memory_format(torch.channels_last_3d, "cpu"),
        ValueError,
        r"memory_format: expected .*, got torch.channels_last_3d",
    ),
    (lambda: memory_format("on", "cpu"), ValueError, r"memory_format: expected .*, got 'on'"),
    (lambda: memory_format(None, "cpu"), TypeError, r"memory_format: expected .*, got None"),
    (lambda: tf32("on").__enter__(), TypeError, r"tf32: expected True, False or None, got 'on'"),
    (lambda: tf32(1).__enter__(), TypeError, r"tf32: expected True, False or None, got 1"),
]


@pytest.mark.parametrize(("call", "error", "message"), WRONG)
def test_wrong_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- TF32


def switches() -> dict[str, object]:
    """Every switch of both generations.

    Reading an old one that disagrees with a new one raises: here, `RuntimeError` itself is the value.
    """

    def read(getter):
        try:
            return getter()
        except RuntimeError:
            return RuntimeError

    values = {name: operation.fp32_precision for name, operation in OPERATIONS.items()}
    values["old products"] = read(lambda: torch.backends.cuda.matmul.allow_tf32)
    values["old convolutions"] = read(lambda: torch.backends.cudnn.allow_tf32)
    values["old precision"] = read(torch.get_float32_matmul_precision)
    return values


@pytest.fixture(autouse=True)
def default_switches():
    """Those of a new process, before and after each test."""
    yield
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    for name, operation in OPERATIONS.items():
        operation.fp32_precision = "none" if "products" in name else "tf32"


def only_new() -> None:
    torch.backends.cuda.matmul.fp32_precision = "tf32"


def convolutions_off() -> None:
    torch.backends.cudnn.conv.fp32_precision = "ieee"


BEFORE = {
    "defaults": lambda: None,
    "high": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "old": lambda: setattr(torch.backends.cudnn, "allow_tf32", False),
    "only new products": only_new,
    "only new convolutions": convolutions_off,
}


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_sets_every_switch_and_puts_it_back(before, enabled):
    BEFORE[before]()
    found = switches()
    with tf32(enabled):
        wanted = dict.fromkeys(OPERATIONS, "tf32" if enabled else "ieee")
        assert switches() == wanted | {
            "old products": enabled,
            "old convolutions": enabled,
            "old precision": "high" if enabled else "highest",
        }
    left = switches()
    readable = [name for name, value in found.items() if value is not RuntimeError]
    assert [left[name] for name in readable] == [found[name] for name in readable]


def test_tf32_comes_back_after_an_exception():
    found = switches()
    with pytest.raises(KeyError), tf32(True):
        raise KeyError
    assert switches() == found


def test_none_leaves_the_switches_alone():
    only_new()
    found = switches()
    with tf32(None):
        assert switches() == found
    assert switches() == found


def test_blocks_nest():
    found = switches()
    with tf32(True):
        outer = switches()
        with tf32(False):
            assert switches() != outer
        assert switches() == outer
    assert switches() == found


# --- several threads ----------------------------------------------------------------------------------------


class Inside:
    """A thread that enters `tf32(enabled)` when it is made, and leaves it when it is told to."""

    def __init__(self, enabled: bool):
        self.entered, self.told, self.enabled = threading.Event(), threading.Event(), enabled
        self.thread = threading.Thread(target=self._stay, daemon=True)
        self.thread.start()
        assert self.entered.wait(60)

    def _stay(self) -> None:
        with tf32(self.enabled):
            self.entered.set()
            self.told.wait(60)

    def leave(self) -> None:
        self.told.set()
        self.thread.join(60)
        assert not self.thread.is_alive()


def rounded() -> bool:
    """Whether products may be rounded; every other switch must say the same."""
    found = switches()
    enabled = found["products"] == "tf32"
    wanted = dict.fromkeys(OPERATIONS, "tf32" if enabled else "ieee")
    wanted |= {"old products": enabled, "old convolutions": enabled}
    assert found == wanted | {"old precision": "high" if enabled else "highest"}
    return enabled


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_the_last_of_two_threads_puts_back_what_the_first_found(before, order):
    BEFORE[before]()
    found = switches()
    threads = Inside(False), Inside(False)
    for place in order:
        assert not rounded()
        threads[place].leave()
    left = switches()
    readable = [name for name, value in found.items() if value is not RuntimeError]
    assert [left[name] for name in readable] == [found[name] for name in readable]


@pytest.mark.parametrize("order", list(permutations(range(3))), ids=str)
@pytest.mark.parametrize("asked", list(product([True, False], repeat=3)), ids=str)
def test_nothing_is_rounded_while_one_thread_must_not(asked, order):
    torch.set_float32_matmul_precision("medium")
    found = switches()
    threads, inside = [], {}
    for place, enabled in enumerate(asked):
        threads.append(Inside(enabled))
        inside[place] = enabled
        assert rounded() == all(inside.values())
    for place in order:
        threads[place].leave()
        del inside[place]
        assert not inside or rounded() == all(inside.values())
    assert switches() == found


def test_of_blocks_that_nest_in_a_thread_the_innermost_counts():
    found = switches()
    with tf32(False):
        other = Inside(True)
        assert not rounded()
        with tf32(True):
            assert rounded()
        assert not rounded()
        other.leave()
        assert not rounded()
    assert switches() == found


def test_a_setting_made_within_a_block_outlives_a_block_in_it():
    with tf32(True):
        torch.set_float32_matmul_precision("medium")
        changed = switches()
        with tf32(False):
            pass
        assert switches() == changed


@pytest.mark.gpu
def test_tf32_rounds_products_on_this_gpu(gpu):
    if gpu.device.type != "cuda":
        pytest.skip("cannot be rehearsed: a CPU has no TF32")
    a, b = (
        torch.randn(256, 256, device=gpu.device, generator=torch.Generator(gpu.device).manual_seed(seed))
        for seed in (0, 1)
    )
    truth = a.double() @ b.double()
    errors = {}
    for enabled in (False, True):
        with tf32(enabled):
            errors[enabled] = (a @ b - truth).abs().max().item()
    assert errors[False] < 1e-3 < errors[True]  # 24 and 11 bits, 256 terms of about 1
