"""diffusers checkpoints: a network and the scheduler it was trained with, from and to local folders.

Safetensors only, no remote code.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open

from ..host import check, disk
from ..host.atomic import atomic_directory
from ..host.finite import not_finite
from ..host.plain_json import read_json
from ..host.plain_names import plain, plain_copy
from ..objective.schedule import NoiseSchedule
from .sizes import check_size, check_timesteps
from .supported import check_network, check_parts, check_runs, check_surroundings

if TYPE_CHECKING:
    from diffusers import SchedulerMixin, UNet2DModel

MODELS = ("UNet2DModel",)
# Networks that diffusers has and this library does not train: they take more than a picture and a timestep.
NOT_YET = (
    "UNet2DConditionModel",
    "UNet3DConditionModel",
    "Transformer2DModel",
    "DiTTransformer2DModel",
    "PixArtTransformer2DModel",
    "SD3Transformer2DModel",
    "FluxTransformer2DModel",
    "UViTModel",
)
SCHEDULERS = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
)
WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.safetensors.index.json")
FLOATS = ("F16", "BF16", "F32", "F64")  # as safetensors calls them
REFUSED_SUFFIXES = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
LAYOUT = (
    "a folder of DDPMPipeline.save_pretrained, or of UNet2DModel.save_pretrained with a scheduler_config.json"
)


def load_checkpoint(
    path: str | os.PathLike, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu"
) -> tuple[UNet2DModel, SchedulerMixin]:
    """The network and the scheduler of a diffusers checkpoint in a local folder.

    Args:
        path: a pipeline folder (`model_index.json`, `unet/`, `scheduler/`), or the folder of a network alone
            with `scheduler_config.json` in it, in its `scheduler/`, or in `scheduler/` beside it.
        dtype: of the parameters, whatever the files hold; unlearning needs float32 masters.
        device: where the network goes.

    Returns:
        `(model, scheduler)`: a diffusers `UNet2DModel` in eval mode, and the diffusers scheduler that the
        folder names.

    Raises:
        ValueError: naming the file: missing, not JSON, a class that is not supported, a pipeline of latents,
            a network that needs labels or cannot be called, code from elsewhere, weights that are pickles,
            damaged, not those of the configuration, or not finite; a network that would not fit into memory.
        ImportError: the package diffusers is not installed.
    """
    root = Path(path)
    if root.is_file():
        raise ValueError(f"{root}: expected {LAYOUT}, got a file")
    if not root.is_dir():
        hint = "nothing is downloaded: `hf download NAME --local-dir DIR` does that"
        raise ValueError(f"{root}: expected {LAYOUT}, got a path that does not exist ({hint})")
    folder = _model_folder(root)
    config_file = folder / "config.json"
    config = _read_json(config_file)
    _supported(config_file, config.get("_class_name"), MODELS, "network")
    # Of the pipeline around the network, also where the folder of the network alone was given.
    index_file = folder.parent / "model_index.json"
    if index_file.is_file():
        check_parts(index_file, _read_json(index_file))
    check_surroundings(folder)
    # Everything that can be told from JSON is told before weights, which may be gigabytes, are read.
    scheduler = _load_scheduler(root, folder)
    check_network(config_file, config, len(scheduler))
    model = _load_model(folder, dtype).to(device)
    check_runs(config_file, model, len(scheduler))
    return model, scheduler


def fresh_network(model: UNet2DModel, seed: int) -> UNet2DModel:
    """A network of the class, configuration, dtype and device of `model`, with new weights.

    They are drawn on the CPU as diffusers does, so that they are the same for every device.

    Args:
        seed: of the weights, in [0, 2^32 - 1]: torch's CPU generator reads 32 bits.

    Raises:
        TypeError, ValueError: for a seed outside its range.
    """
    seed = check.integer("seed", seed, low=0, high=2**32 - 1)
    parameter = next(model.parameters())
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        fresh = type(model).from_config(model.config)
    if parameter.dtype != torch.float32:
        fresh = fresh.to(parameter.dtype)
    return fresh.to(parameter.device).train(model.training)


def save_checkpoint(
    output_dir: str | os.PathLike,
    model: UNet2DModel,
    scheduler: SchedulerMixin,
    *,
    files: Mapping[str, bytes] | None = None,
) -> Path:
    """Writes a folder that `diffusers.DDPMPipeline.from_pretrained` opens.

    An existing folder of that name is replaced, whole or not at all.

    Args:
        output_dir: the folder.
        model: a `UNet2DModel`; its parameters are written in their dtype, as safetensors. One that is
            compiled or in `DataParallel`, as a whole or in parts, is written as the network that it is
            without.
        scheduler: a diffusers scheduler.
        files: what else stands in the folder, from its first moment on: contents by name. diffusers does not
            look at names that it does not know.

    Returns:
        `output_dir`.

    Raises:
        TypeError: for another network or scheduler than those that `load_checkpoint` reads.
        ValueError: `output_dir` is a file, or a folder with something else in it; a name in `files` is no
            name of a file, or the pipeline has one of that name itself.
        OSError: the disk does not take it; nothing is changed.
        ImportError: the package diffusers is not installed.
    """
    if not isinstance(model, torch.nn.Module) or type(plain(model)).__name__ not in MODELS:
        raise TypeError(f"model: expected a diffusers {' or '.join(MODELS)}, got {check.describe(model)}")
    if type(scheduler).__name__ not in SCHEDULERS:
        expected = f"one of {', '.join(SCHEDULERS)} of diffusers"
        raise TypeError(f"scheduler: expected {expected}, got {check.describe(scheduler)}")
    output_dir = check_replaceable(output_dir)
    diffusers = check.package("diffusers", "save_checkpoint")
    # Row by row, since safetensors refuses tensors that are channels-last.
    model = plain_copy(model).to("cpu", memory_format=torch.contiguous_format)
    disk.require(output_dir, "a model", sum(tensor.nbytes for tensor in model.state_dict().values()))
    with atomic_directory(output_dir) as folder:
        pipeline = diffusers.DDPMPipeline(unet=model, scheduler=scheduler)
        pipeline.save_pretrained(folder, safe_serialization=True)
        for name, content in (files or {}).items():
            _write_beside(folder, name, content)
    return output_dir


def _write_beside(folder: Path, name: str, content: bytes) -> None:
    """Writes a file of the caller's into the `folder` of a pipeline.

    Raises:
        ValueError: see `save_checkpoint`.
    """
    if Path(name).name != name or (folder / name).exists():
        expected = "names of files that the pipeline does not have"
        raise ValueError(f"files: expected {expected}, got {name!r}")
    (folder / name).write_bytes(content)


def check_replaceable(output_dir: str | os.PathLike) -> Path:
    """Whether `save_checkpoint` may write to `output_dir`: worth asking before hours of work.

    Returns:
        `output_dir` as a path.

    Raises:
        ValueError: it is a file, or a folder with something else than a pipeline in it.
    """
    output_dir = Path(output_dir)
    if not output_dir.exists():
        return output_dir
    expected = "a new or empty folder, or a saved pipeline to replace"
    if not output_dir.is_dir():
        raise ValueError(f"output_dir: expected {expected}, got a file: {output_dir}")
    # A pipeline that was saved before may be replaced, and nothing else.
    is_pipeline = (output_dir / "model_index.json").is_file()
    if not is_pipeline and any(output_dir.iterdir()):
        raise ValueError(f"output_dir: expected {expected}, got a folder of something else: {output_dir}")
    return output_dir


def _model_folder(root: Path) -> Path:
    """The folder of the network; a pipeline must name classes of diffusers itself.

    Raises:
        ValueError: a pipeline without a network, or with one that is not supported.
    """
    index_file = root / "model_index.json"
    if not index_file.is_file():
        if (root / "unet" / "config.json").is_file():
            return root / "unet"
        return root
    index = _read_json(index_file)
    # A part that is left out of a pipeline stands in its index as [null, null].
    networks = [part for part in ("unet", "transformer") if index.get(part) not in (None, [None, None])]
    if not networks:
        parts = [key for key in index if not key.startswith("_")]
        raise ValueError(
            f"{index_file}: expected a pipeline with an entry unet, got {', '.join(parts) or 'none'}"
        )
    part = networks[0]
    _named_class(index_file, part, index[part], MODELS, "network")
    _named_class(index_file, "scheduler", index.get("scheduler"), SCHEDULERS, "scheduler")
    return root / part


def _named_class(file: Path, part: str, entry, allowed: tuple[str, ...], what: str) -> None:
    """That the `entry` of a part in the index of a pipeline names a supported class of diffusers.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(word, str) for word in entry):
        got = check.in_a_line(json.dumps(entry))
        raise ValueError(f"{file}: expected {part} to be [library, class], got {got}")
    # Any other library would be imported, from the folder of the checkpoint if it lies there.
    library, name = entry
    if library != "diffusers":
        got = f"{name} of {library!r} (code that comes with a checkpoint is never run)"
        raise ValueError(f"{file}: expected {part} to be a class of diffusers, got {got}")
    _supported(file, name, allowed, what)


def _supported(file: Path, name, allowed: tuple[str, ...], what: str) -> None:
    """That the class `name` of a network or scheduler is one of those `allowed`."""
    if name in NOT_YET:
        raise ValueError(
            f"{file}: expected the {what} {' or '.join(allowed)}, got {name}, which is not supported yet"
        )
    if name not in allowed:
        raise ValueError(
            f"{file}: expected the {what} {', '.join(allowed)} in _class_name, got {check.describe(name)}"
        )


def _scheduler_file(root: Path, folder: Path) -> Path:
    """Where the configuration of the scheduler is: in what was given, or beside the folder of the network."""
    for place in (root / "scheduler", root, folder.parent / "scheduler", folder):
        if (place / "scheduler_config.json").is_file():
            return place / "scheduler_config.json"
    raise ValueError(
        f"{root}: expected scheduler_config.json in {root.name}/ or {root.name}/scheduler/, got none"
    )


def _load_scheduler(root: Path, folder: Path) -> SchedulerMixin:
    """The scheduler of the network in `folder`.

    Raises:
        ValueError: naming the file: missing, of another class, or refused by diffusers.
    """
    diffusers = check.package("diffusers", "load_checkpoint")
    file = _scheduler_file(root, folder)
    config = _read_json(file)
    name = config.get("_class_name")
    _supported(file, name, SCHEDULERS, "scheduler")
    check_timesteps(file, config)
    # Of the class that the file names, which is one of SCHEDULERS, so no other code is run.
    try:
        scheduler = getattr(diffusers, name).from_config(config)
    except Exception as error:  # whatever a value of the wrong kind makes diffusers or torch raise
        raise ValueError(
            f"{file}: expected the configuration of a {name}, got one that diffusers refuses: "
            f"{check.in_a_line(error)}"
        ) from error
    # diffusers computes the levels from betas, which a file may set to anything.
    if not torch.isfinite(scheduler.alphas_cumprod).all():
        raise ValueError(f"{file}: expected finite noise levels, got NaN or Inf in alphas_cumprod")
    # Whatever is done with the network needs its noise levels and what it predicts.
    try:
        NoiseSchedule.from_diffusers(scheduler)
    except Exception as error:
        expected = "expected a schedule to train with, got one that is refused"
        raise ValueError(f"{file}: {expected}: {check.in_a_line(error)}") from error
    return scheduler


def _load_model(folder: Path, dtype: torch.dtype) -> UNet2DModel:
    """The network in `folder`, in eval mode, with finite weights.

    Raises:
        ValueError: naming the file: missing, a pickle, damaged, or not that of the configuration.
    """
    diffusers = check.package("diffusers", "load_checkpoint")
    config = _read_json(folder / "config.json")
    name, weights = config["_class_name"], _weights_file(folder)
    files = [weights]
    # diffusers prefers the shards, whatever else there is.
    if (folder / WEIGHTS[1]).is_file():
        files = _shards(folder / WEIGHTS[1])
    for file in files:
        _check_kinds(file)
    check_size(folder / "config.json", config, files, dtype)
    expected = f"{weights}: expected the weights of the {name} in config.json beside it"
    try:
        with _quiet(diffusers):
            model, info = getattr(diffusers, name).from_pretrained(
                folder,
                use_safetensors=True,
                local_files_only=True,
                torch_dtype=dtype,
                low_cpu_mem_usage=False,
                output_loading_info=True,
            )
    # OSError, ValueError, RuntimeError, SafetensorError, KeyError, TypeError: as many as there are ways to be
    # wrong.
    except Exception as error:
        raise ValueError(f"{expected}, got files that diffusers refuses: {check.in_a_line(error)}") from error
    # diffusers only warns of these, and leaves the parameters in question as they were drawn.
    wrong = []
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if info[key]:
            wrong.append(f"{len(info[key])} {key.replace('_', ' ')}")
    if wrong:
        raise ValueError(f"{expected}, got {', '.join(wrong)}")
    bad = not_finite(model.state_dict())
    if bad:
        raise ValueError(f"{weights}: expected finite weights, got NaN or Inf in {bad[0]}")
    return model.eval()


@contextmanager
def _quiet(diffusers) -> Iterator[None]:
    """In the block, diffusers does not warn of what is refused afterwards."""
    before = diffusers.logging.get_verbosity()
    diffusers.logging.set_verbosity_error()
    try:
        yield
    finally:
        diffusers.logging.set_verbosity(before)


def _check_kinds(file: Path) -> None:
    """Refuses weights that are no floats of 16 bits or more: torch would convert them, and lose something.

    Raises:
        ValueError: naming file and tensor.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            kinds = {name: opened.get_slice(name).get_dtype() for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError):  # damaged: diffusers refuses it, too
        return
    for name, kind in kinds.items():
        if kind not in FLOATS:
            got = f"{kind} for {check.in_a_line(name)}"
            raise ValueError(f"{file}: expected weights of 16, 32 or 64 bits, got {got}")


def _weights_file(folder: Path) -> Path:
    """The file of the weights in `folder`, or the index of their shards."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = "no weights"
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix in REFUSED_SUFFIXES)
    if pickles:
        found = f"{', '.join(pickles)}: such files are pickles, and unpickling runs whatever code they hold"
    raise ValueError(f"{folder}: expected {WEIGHTS[0]}, got {found}")


def _shards(index_file: Path) -> list[Path]:
    """The files of an index, which may name nothing but safetensors beside it.

    diffusers reads what it names, and unpickles a .bin.

    Raises:
        ValueError: naming the entry.
    """
    shards = _read_json(index_file).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(
            f"{index_file}: expected weight_map to name a file for each tensor, got {check.describe(shards)}"
        )
    for name, shard in shards.items():
        tensor = check.in_a_line(name)
        if not check.is_file_name(shard) or not shard.endswith(".safetensors"):
            expected = f"the name of a .safetensors file in {index_file.parent} for {tensor}"
            raise ValueError(f"{index_file}: expected {expected}, got {check.in_a_line(repr(shard))}")
        if not (index_file.parent / shard).is_file():
            raise ValueError(
                f"{index_file}: expected {shard}, which holds {tensor}, beside it, got no such file"
            )
    return [index_file.parent / shard for shard in sorted(set(shards.values()))]


def _read_json(file: Path) -> dict:
    """The JSON object in `file`.

    Raises:
        ValueError: there is none.
    """
    if not file.is_file():
        raise ValueError(f"{file}: expected {LAYOUT}, got no such file")
    try:
        content = read_json(file)
    except ValueError as error:
        raise ValueError(f"{file}: expected JSON, got {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object, got {type(content).__name__}")
    return content
