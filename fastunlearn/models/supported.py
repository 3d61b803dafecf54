"""What may be trained as it is: a network that takes a noisy picture and a timestep, and nothing else.

All that is not is refused by name. A pipeline with more parts than a network and a scheduler does something
with its pictures before the network sees them. Trained on the pictures themselves, such a network would lose
what it can do, and no error would say so.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from ..host import check

PARTS = ("unet", "transformer", "scheduler")  # what a pipeline of pictures is made of
AUTOENCODERS = ("vae", "vqvae", "vqgan", "movq")  # diffusers' names of the part that makes latents
PICTURES_ALONE = "expected a network of pictures alone (DDPMPipeline)"


def check_parts(index_file: Path, index: dict) -> None:
    """Refuses a pipeline that has more parts than a network and a scheduler; `index`: its `model_index.json`.

    Raises:
        ValueError: naming the parts.
    """
    parts = [name for name, value in index.items() if isinstance(value, list) and value != [None, None]]
    more = [name for name in parts if name not in PARTS]
    latents = [name for name in more if name in AUTOENCODERS]
    if latents:
        got = f"one that works on the latents of its {latents[0]}, which is not supported yet"
        raise ValueError(f"{index_file}: {PICTURES_ALONE}, got {got}")
    if more:
        got = f"a pipeline with {check.in_a_line(', '.join(more))} too, which is not supported yet"
        raise ValueError(f"{index_file}: {PICTURES_ALONE}, got {got}")


def check_surroundings(folder: Path) -> None:
    """Refuses the network in `folder` if an autoencoder lies beside it.

    It is then a part of a pipeline of latents.

    Raises:
        ValueError: naming the folder of the autoencoder.
    """
    for name in AUTOENCODERS:
        beside = folder.parent / name
        if (beside / "config.json").is_file():
            got = f"one that works on the latents of {beside}, which is not supported yet"
            raise ValueError(f"{folder}: {PICTURES_ALONE}, got {got}")


def check_network(config_file: Path, config: dict, num_timesteps: int) -> None:
    """Refuses networks that ask for more than a picture and a timestep, or answer with something else.

    Args:
        config_file: what errors name.
        config: its content.
        num_timesteps: of the scheduler that the network was trained with.

    Raises:
        ValueError: naming `config_file`, the entry and its value.
    """
    for entry in ("class_embed_type", "num_class_embeds"):
        if config.get(entry) is not None:
            elsewhere = "the *_step functions take class_labels in forget_kwargs and retain_kwargs"
            expected = f"an unconditional network, {entry}: null ({elsewhere})"
            got = check.in_a_line(repr(config[entry]))
            raise ValueError(f"{config_file}: expected {expected}, got {got}")
    channels = _whole_number(config_file, "in_channels", config.get("in_channels", 3))
    answered = _whole_number(config_file, "out_channels", config.get("out_channels", 3))
    if answered not in (channels, 2 * channels):
        expected = f"out_channels equal to in_channels, {channels}, or twice as many (a learned variance)"
        raise ValueError(f"{config_file}: {PICTURES_ALONE}, {expected}, got {answered}")
    embedding = config.get("time_embedding_type", "positional")
    # Fourier embeddings take noise levels for timesteps, and such networks divide by them.
    if embedding == "fourier":
        expected = "a time_embedding_type of timesteps, positional or learned"
        raise ValueError(f"{config_file}: expected {expected}, got 'fourier'")
    # A learned embedding is a table: a timestep beyond its end would be an error in the middle of a run.
    known = config.get("num_train_timesteps")
    if known is not None:
        known = _whole_number(config_file, "num_train_timesteps", known)
    if embedding == "learned" and known is not None and known < num_timesteps:
        expected = f"num_train_timesteps of at least the scheduler's {num_timesteps}"
        raise ValueError(f"{config_file}: expected {expected}, got {known}")
    size = config.get("sample_size")
    sides = size if isinstance(size, list) else [size, size]
    if size is not None and (len(sides) != 2 or not all(map(_is_whole, sides))):
        got = check.in_a_line(repr(size))
        raise ValueError(f"{config_file}: expected sample_size of one or two integers >= 1, got {got}")


def _whole_number(config_file: Path, entry: str, value: object) -> int:
    """The `value` of an entry, which has to be an integer >= 1."""
    if not _is_whole(value):
        got = check.describe(value)
        raise ValueError(f"{config_file}: expected {entry} to be an integer >= 1, got {got}")
    return value


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def picture_shape(model: nn.Module) -> tuple[int, int, int] | None:
    """`(C, H, W)` of the pictures that a diffusers network was trained on; None: it does not say."""
    size = model.config.sample_size
    if size is None:
        return None
    if isinstance(size, int):
        size = (size, size)
    height, width = size
    return model.config.in_channels, height, width


@torch.no_grad()
def check_runs(config_file: Path, model: nn.Module, num_timesteps: int) -> None:
    """Calls the network once, on an empty picture.

    One that cannot be called is so refused before hours of work.

    Raises:
        ValueError: it raises, or answers with something else than one picture, or one with a variance.
    """
    shape = picture_shape(model)
    if shape is None:  # the commands refuse it: they would not know what pictures to make
        return
    channels, height, width = shape
    parameter = next(model.parameters())
    pictures = f"pictures of {channels}x{height}x{width}"
    expected = f"{config_file}: expected a network that can be called on {pictures}"
    try:
        picture = torch.zeros(1, channels, height, width, device=parameter.device, dtype=parameter.dtype)
        answer = model(picture, torch.tensor([num_timesteps - 1], device=parameter.device)).sample
    except Exception as error:  # whatever a layer makes of what does not fit
        said = check.in_a_line(f"{type(error).__name__}: {error}")
        raise ValueError(f"{expected}, got {said}") from error
    if tuple(answer.shape) not in ((1, channels, height, width), (1, 2 * channels, height, width)):
        raise ValueError(f"{expected} and answers with their shape, got {check.describe(answer)}")
