"""What a configuration would build, held against its weights and the memory before it is built."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from ..host import room

MOST_TIMESTEPS = 10**6  # of a scheduler, which makes tables of them, in loops of Python for some schedules
# Defaults of diffusers' UNet2DModel, for what a configuration leaves out.
WIDTHS, LAYERS, CHANNELS = (224, 448, 672, 896), 2, 3


def check_timesteps(config_file: Path, config: dict) -> None:
    """That the tables of a scheduler are of a length that means something.

    Raises:
        ValueError: naming file, entry and value.
    """
    count = config.get("num_train_timesteps")
    if isinstance(count, int) and count > MOST_TIMESTEPS:
        expected = f"num_train_timesteps of at most {MOST_TIMESTEPS}"
        raise ValueError(f"{config_file}: expected {expected}, got {count}")


def check_size(config_file: Path, config: dict, weights: Iterable[Path], dtype: torch.dtype) -> None:
    """Whether the network of a `UNet2DModel`'s configuration may be built.

    It costs no memory worth mentioning: files of weights are asked for the names and shapes of their tensors.
    Values of a wrong kind are left to diffusers.

    Args:
        config_file: what errors name.
        config: its content.
        weights: the safetensors files beside it.
        dtype: of the parameters.

    Raises:
        ValueError: it has more layers or parameters than the files, or does not fit into memory, or the
            pictures that it is for do not.
    """
    widths, layers = config.get("block_out_channels", WIDTHS), config.get("layers_per_block", LAYERS)
    numbers = [*widths, layers] if isinstance(widths, (list, tuple)) else [None]
    if len(numbers) < 2 or not all(isinstance(number, int) and number > 0 for number in numbers):
        return
    try:
        tensors, elements = _counted(weights)
    except (SafetensorError, OSError):  # damaged: diffusers refuses them, too
        return
    # Each layer of each block has several tensors.
    if len(widths) * layers > tensors:
        got = f"{layers} in {len(widths)} blocks, whose weights are {tensors} tensors"
        raise ValueError(f"{config_file}: expected layers_per_block of the weights beside it, got {got}")
    at_least = _fewest_parameters(config, widths, layers)
    if at_least > elements:
        got = f"one of at least {at_least}, where the weights beside it are {elements}"
        raise ValueError(f"{config_file}: expected a network of as many parameters as weights, got {got}")
    # Weights are read while the parameters that they replace are there.
    room.require_for(config_file, "a network", 2 * elements * dtype.itemsize)
    _check_pictures(config_file, config, widths[0], dtype)


def _counted(files: Iterable[Path]) -> tuple[int, int]:
    """How many tensors there are, and how many numbers in them."""
    tensors = elements = 0
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 (no dictionary)
                tensors += 1
                elements += math.prod(file.get_slice(name).get_shape())
    return tensors, elements


def _fewest_parameters(config: dict, widths: list[int], layers: int) -> int:
    """A bound from below: convolutions of 3x3 in each layer, at both ends, and the embedding of timesteps."""
    count = sum(9 * layers * width * width for width in widths)
    count += 4 * widths[0] * widths[0]
    for name in ("in_channels", "out_channels"):
        channels = config.get(name, CHANNELS)
        count += 9 * widths[0] * channels if isinstance(channels, int) else 0
    timesteps = config.get("num_train_timesteps")
    if config.get("time_embedding_type") == "learned" and isinstance(timesteps, int):
        count += timesteps * widths[0]
    return count


def _check_pictures(config_file: Path, config: dict, width: int, dtype: torch.dtype) -> None:
    """That a picture of `sample_size` fits into memory, with what the first layers make of it."""
    size, channels = config.get("sample_size"), config.get("in_channels", CHANNELS)
    sides = size if isinstance(size, (list, tuple)) else [size, size]
    if len(sides) != 2 or not all(isinstance(number, int) for number in (*sides, channels)):
        return
    # The answer of the first layer is kept for the last ones, and each layer has one of its own.
    numbers = (channels + 2 * width) * math.prod(sides)
    what = f"a network for pictures (sample_size {size})"
    room.require_for(config_file, what, numbers * dtype.itemsize)
