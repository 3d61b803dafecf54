"""What several commands share."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tyro.conf import arg

from .launch_settings import device_name

if TYPE_CHECKING:
    import torch

    from ..host.store import ImageStore
    from .picture_flags import PictureFlags


def unset(default: str, metavar: str | None = None, *aliases: str, help: str | None = None):
    """A flag whose default None means `default`, in words; `help`: where no docstring stands below it."""
    return arg(help=help, help_behavior_hint=f"(default: {default})", metavar=metavar, aliases=aliases)


def also(*aliases: str):
    """Other names of a flag."""
    return arg(aliases=aliases)


@contextmanager
def called(**flags: str) -> Iterator[None]:
    """In the block, errors of the library that name an argument name its flag.

    Args:
        flags: for each argument the flag that it comes from, without dashes.
    """
    try:
        yield
    except (TypeError, ValueError) as error:
        argument, colon, text = str(error).partition(": ")
        if not colon or argument not in flags:
            raise
        raise type(error)(f"--{flags[argument]}: {text}") from error


def pick_device(name: str | None) -> torch.device:
    """The device called `name`; None: what a launcher says, else the first GPU, or the CPU.

    Raises:
        ValueError: there is no such device here; it says which there are. Or a launcher asks for another.
    """
    import torch

    name = device_name(name)
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name is None:
        return torch.device("cuda" if count else "cpu")
    # Not by torch, which takes cuda:300 for cuda:44, and knows devices that nothing here runs on.
    gpu = re.fullmatch("cuda(?::(0|[1-9][0-9]{0,3}))?", name)
    if name != "cpu" and (gpu is None or int(gpu[1] or 0) >= count):
        raise ValueError(f"--device: expected {_devices_there_are(count)}, got {name!r}")
    return torch.device(name)


def _devices_there_are(count: int) -> str:
    """In words, with the reason where `count`, the number of GPUs, is 0."""
    import torch

    if count:
        return f"cpu, cuda or cuda:N with N < {count}, the GPUs that torch sees here"
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if not torch.backends.cuda.is_built():
        reason = "this torch was built without them"
    elif visible is None:
        reason = "torch finds none here"
    else:
        reason = f"CUDA_VISIBLE_DEVICES is {visible!r}"
    return f"cpu (no GPUs: {reason})"


def prepare_host(device: torch.device) -> None:
    """Before the work on `device` starts: on a CPU the process keeps the memory that steps free.

    A command has its process to itself.
    """
    from ..host.memory import keep_freed_memory

    if device.type == "cpu":
        keep_freed_memory()


def model_shape(model) -> tuple[int, int, int]:
    """`(C, H, W)` of the images that a diffusers network was trained on."""
    from ..models.supported import picture_shape

    shape = picture_shape(model)
    if shape is None:
        raise ValueError("model: expected sample_size in its config.json, got none")
    return shape


def check_outside(output: Path, **inputs: tuple[Path, ...]) -> None:
    """Refuses an `output` among what is read: it would count as images, or take their place.

    Args:
        output: a file or a folder, which need not be there.
        inputs: for each flag its paths.

    Raises:
        ValueError: `output` is one of the paths, or lies in a folder that is read, links followed; naming
            both.
    """
    place = output.resolve()
    there = (each.stat() for each in (place, *place.parents) if each.exists())
    around = {(status.st_dev, status.st_ino) for status in there}
    for flag, paths in inputs.items():
        for path in paths:
            if path.is_dir() and not around.isdisjoint(_folders_read(path)):
                expected = f"expected a place outside of the folders in --{flag}"
                raise ValueError(f"output: {expected}, got {output}, which is in {path}")
            if path.resolve() == place:
                raise ValueError(f"output: expected another file than those of --{flag}, got {output}")


def check_not_inside(output: Path, **inputs: tuple[Path, ...]) -> None:
    """Refuses paths in the folder `output`, in which a run replaces and removes what it finds.

    Args:
        output: a folder, which need not be there.
        inputs: for each flag its paths.

    Raises:
        ValueError: a path is `output` or lies in it, or leads there; naming it.
    """
    place = output.resolve()
    for flag, paths in inputs.items():
        for path in paths:
            for read in (Path(os.path.abspath(path)), path.resolve()):
                if place in (read, *read.parents):
                    expected = f"expected paths outside of --output, {output}"
                    raise ValueError(f"--{flag}: {expected}, got {path}")


def check_not_private(output: Path) -> None:
    """Refuses an `output` in the private folder of a run, which `purge` empties.

    Raises:
        ValueError: naming that folder.
    """
    from ..runs.private import PRIVATE_FOLDER
    from ..runs.run_record import RUN_FILE

    place = output.resolve()
    for folder in (place, *place.parents):
        if folder.name == PRIVATE_FOLDER and os.path.lexists(folder.parent / RUN_FILE):
            expected = f"expected a place outside of {folder}, which purge empties"
            raise ValueError(f"--output: {expected}, got {output}")


def check_file(flag: str, path: Path) -> None:
    """Refuses a place where no file could be written, before the work that it is to hold.

    Raises:
        ValueError: something else than a file is there.
    """
    from ..host.atomic import in_the_way

    other = in_the_way(path)
    if other is not None:
        raise ValueError(f"{flag}: expected a file, or nothing yet, got {other}: {path}")


def _folders_read(folder: Path) -> set[tuple[int, int]]:
    """Device and inode of `folder`, and of all that are read with it, links followed."""
    from ..data.folders import list_folder

    return list_folder(folder).entered


def load_for(
    model, name: str, paths: tuple[Path, ...], pictures: PictureFlags, record: dict[str, Any]
) -> ImageStore:
    """The images in `paths` as `model` takes them: image files are cropped, resized and converted; arrays
    must have its shape.

    Says how many rows and files there are, and what was passed over; notes the numbers and `pictures` in
    `record`, under `name`.

    Raises:
        ValueError: naming the file, or the flag `name` where there are no paths.
    """
    if not paths:
        raise ValueError(f"{name}: expected at least one path, got none")
    channels, height, width = model_shape(model)
    return pictures.load(name, paths, record, size=(height, width), channels=channels)
