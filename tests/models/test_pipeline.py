"""Checkpoints of diffusers: what is read back is what was written, and what is refused says which file and
why.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastunlearn.host import disk, room
from fastunlearn.models import load_checkpoint, save_checkpoint
from fastunlearn.objective.schedule import NoiseSchedule
from fastunlearn.testing.checkpoints import TINY_TIMESTEPS, save_tiny_checkpoint, tiny_unet

diffusers = pytest.importorskip("diffusers")
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="session")
def saved(tmp_path_factory) -> Path:
    return save_tiny_checkpoint(tmp_path_factory.mktemp("saved") / "pipeline")


@pytest.fixture
def pipeline(saved, tmp_path) -> Path:
    """A copy that a test may spoil."""
    return Path(shutil.copytree(saved, tmp_path / "pipeline"))


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def assert_same_weights(model: torch.nn.Module, other: torch.nn.Module) -> None:
    expected = other.state_dict()
    assert model.state_dict().keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in model.state_dict().items())


def test_a_pipeline_is_read_back(saved):
    model, scheduler = load_checkpoint(saved)
    assert_same_weights(model, tiny_unet())
    assert type(scheduler) is diffusers.DDPMScheduler
    assert len(NoiseSchedule.from_diffusers(scheduler)) == TINY_TIMESTEPS
    assert not model.training


def test_diffusers_opens_what_is_saved(saved):
    assert_same_weights(diffusers.DDPMPipeline.from_pretrained(saved).unet, tiny_unet())


def test_scheduler_class_and_settings_survive(tmp_path):
    ddim = diffusers.DDIMScheduler(num_train_timesteps=30, prediction_type="v_prediction")
    save_checkpoint(tmp_path / "out", tiny_unet(), ddim)
    _, scheduler = load_checkpoint(tmp_path / "out")
    assert type(scheduler) is diffusers.DDIMScheduler
    assert (len(scheduler), scheduler.config.prediction_type) == (30, "v_prediction")


def test_dtype_is_kept_on_disk_and_float32_in_memory(tmp_path):
    save_checkpoint(tmp_path / "out", tiny_unet().to(torch.bfloat16), diffusers.DDPMScheduler())
    assert {tensor.dtype for tensor in load_file(tmp_path / "out" / "unet" / WEIGHTS).values()} == {
        torch.bfloat16
    }
    assert load_checkpoint(tmp_path / "out")[0].dtype == torch.float32
    assert load_checkpoint(tmp_path / "out", dtype=torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("place", ["beside", "subfolder", "in it"])
def test_a_network_alone_with_its_scheduler(pipeline, place):
    (pipeline / "model_index.json").unlink()
    folder = pipeline / "unet"
    if place != "beside":
        target = folder / "scheduler" if place == "subfolder" else folder
        target.mkdir(exist_ok=True)
        shutil.move(pipeline / "scheduler" / "scheduler_config.json", target / "scheduler_config.json")
    model, scheduler = load_checkpoint(folder)
    assert_same_weights(model, tiny_unet())
    assert len(scheduler) == TINY_TIMESTEPS


def test_a_saved_pipeline_is_replaced_and_other_folders_are_not(pipeline, tmp_path):
    save_checkpoint(pipeline, tiny_unet(seed=1), diffusers.DDPMScheduler())
    assert_same_weights(load_checkpoint(pipeline)[0], tiny_unet(seed=1))
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_text("precious")
    with pytest.raises(
        ValueError, match=r"output_dir: expected a new or empty folder.*got a folder of something else"
    ):
        save_checkpoint(tmp_path / "photos", tiny_unet(), diffusers.DDPMScheduler())
    assert (tmp_path / "photos" / "a.jpg").read_text() == "precious"


def test_other_files_stand_in_the_folder_from_its_first_moment_on(tmp_path, monkeypatch):
    """With the pipeline or not at all."""
    seen = []

    def replace(source, target):
        seen.append(sorted(path.name for path in source.iterdir()))
        os.rename(source, target)

    monkeypatch.setattr(os, "replace", replace)
    scheduler = diffusers.DDPMScheduler()
    save_checkpoint(tmp_path / "out", tiny_unet(), scheduler, files={"note.json": b"{}"})
    assert seen == [["model_index.json", "note.json", "scheduler", "unet"]]
    assert (tmp_path / "out" / "note.json").read_bytes() == b"{}"
    assert_same_weights(load_checkpoint(tmp_path / "out")[0], tiny_unet())
    for name in ("../note.json", "model_index.json", "", "unet", "a/b"):
        with pytest.raises(ValueError, match=r"^files: expected names of files that the pipeline does not"):
            save_checkpoint(tmp_path / "other", tiny_unet(), scheduler, files={name: b""})
        assert not (tmp_path / "other").exists()


def test_a_model_is_written_only_where_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(disk, "free_bytes", lambda path: 10)
    with pytest.raises(OSError, match=r"pipeline: expected .* of free disk for a model, got 10 bytes"):
        save_tiny_checkpoint(tmp_path / "pipeline")
    assert list(tmp_path.iterdir()) == []


def test_channels_last_networks_are_saved(tmp_path):
    model = tiny_unet().to(memory_format=torch.channels_last)
    save_checkpoint(tmp_path / "out", model, diffusers.DDPMScheduler())
    assert model.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert_same_weights(load_checkpoint(tmp_path / "out")[0], tiny_unet())


def test_shards_are_read(pipeline):
    shards(pipeline, "shard.safetensors")
    (pipeline / "unet" / WEIGHTS).rename(pipeline / "unet" / "shard.safetensors")
    assert_same_weights(load_checkpoint(pipeline)[0], tiny_unet())


@pytest.mark.parametrize("name", ["x" * 5000, "\0", "\ud800", "\n"])
def test_a_shard_of_a_name_that_no_file_has(pipeline, name):
    shards(pipeline, f"{name}.safetensors")
    with pytest.raises(ValueError, match=r"expected the name of a .safetensors file in") as refused:
        load_checkpoint(pipeline)
    assert len(str(refused.value)) < 1000


@pytest.mark.parametrize("place", ["", "unet"])
def test_a_shard_that_acts_is_not_opened(pipeline, place):
    """A pickle that an index names, in a folder that holds the plain weights as well: diffusers alone would
    run it.
    """
    ran = pipeline / "ran"

    class Acts:
        def __reduce__(self):
            return Path.touch, (ran,)

    shards(pipeline, "shard.bin")
    (pipeline / "unet" / "shard.bin").write_bytes(pickle.dumps(Acts()))
    with pytest.raises(ValueError, match=r"got 'shard\.bin'"):
        load_checkpoint(pipeline / place)
    assert not ran.exists()


def test_the_unet_of_a_pipeline_of_latents_is_not_taken_for_one_of_pictures(pipeline):
    ldm(pipeline)
    with pytest.raises(ValueError, match=r"model_index.json: expected a network of pictures alone"):
        load_checkpoint(pipeline / "unet")


def test_other_objects_are_not_saved(tmp_path):
    with pytest.raises(TypeError, match=r"model: expected a diffusers UNet2DModel, got Linear"):
        save_checkpoint(tmp_path / "out", torch.nn.Linear(1, 1), diffusers.DDPMScheduler())
    with pytest.raises(TypeError, match=r"scheduler: expected one of DDPMScheduler.*, got None"):
        save_checkpoint(tmp_path / "out", tiny_unet(), None)
    assert not (tmp_path / "out").exists()


def no_weights(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).unlink()


def pickled_weights(folder: Path) -> None:
    (folder / "unet" / WEIGHTS).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def nan_weights(folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    tensors["conv_in.bias"][3] = float("nan")
    save_file(tensors, folder / "unet" / WEIGHTS)


def missing_tensor(folder: Path) -> None:
    tensors = load_file(folder / "unet" / WEIGHTS)
    del tensors["conv_in.bias"]
    save_file(tensors, folder / "unet" / WEIGHTS)


def cut_weights(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-100])


def other_architecture(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", block_out_channels=[8, 16])


def unknown_block(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", down_block_types=["DownBlock2D", "NoBlock2D"])


def latent_diffusion(folder: Path) -> None:
    edit_json(folder / "model_index.json", unet=["diffusers", "UNet2DConditionModel"])


def sd3(folder: Path) -> None:
    edit_json(
        folder / "model_index.json", unet=[None, None], transformer=["diffusers", "SD3Transformer2DModel"]
    )


def remote_code(folder: Path) -> None:
    edit_json(folder / "model_index.json", unet=["my_module", "UNet2DModel"])


def remote_scheduler(folder: Path) -> None:
    edit_json(folder / "model_index.json", scheduler=["my_scheduler", "DDPMScheduler"])


def odd_entry(folder: Path) -> None:
    edit_json(folder / "model_index.json", unet="UNet2DModel")


def no_unet(folder: Path) -> None:
    edit_json(folder / "model_index.json", unet=[None, None])


def conditional_config(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", _class_name="UNet2DConditionModel")


def unknown_class(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", _class_name="os.system")


def unknown_scheduler(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", _class_name="MyScheduler")


def wrong_betas(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", beta_schedule="no such")


def nan_betas(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", beta_end=float("nan"))


def other_prediction(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", prediction_type="x" * 1000)


def no_times(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", num_train_timesteps=0)


def times_in_words(folder: Path) -> None:
    edit_json(folder / "scheduler" / "scheduler_config.json", num_train_timesteps="many")


def sides_in_words(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", sample_size="big")


def three_sides(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", sample_size=[8, 8, 8])


def channels_in_words(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", in_channels="x", out_channels="x")


def long_activation(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", act_fn="\x1b[31m" * 1000)


def all_shapes(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    save_file({name: torch.cat([value, value]) for name, value in load_file(file).items()}, file)


def of_kind(dtype: torch.dtype):
    def change(folder: Path) -> None:
        file = folder / "unet" / WEIGHTS
        save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)

    change.__name__ = str(dtype)
    return change


def broken_json(folder: Path) -> None:
    (folder / "unet" / "config.json").write_text("{")


def json_list(folder: Path) -> None:
    (folder / "model_index.json").write_text("[]")


def no_config(folder: Path) -> None:
    (folder / "unet" / "config.json").unlink()


def no_scheduler(folder: Path) -> None:
    shutil.rmtree(folder / "scheduler")


def gone(folder: Path) -> None:
    shutil.rmtree(folder)


def a_file(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("")


def ldm(folder: Path) -> None:
    edit_json(folder / "model_index.json", _class_name="LDMPipeline", vqvae=["diffusers", "VQModel"])


def audio(folder: Path) -> None:
    edit_json(folder / "model_index.json", mel=["audio_diffusion", "Mel"], vqvae=[None, None])


def vqvae_beside(folder: Path) -> None:
    (folder / "model_index.json").unlink()
    (folder / "vqvae").mkdir()
    (folder / "vqvae" / "config.json").write_text("{}")


def class_labels(folder: Path) -> None:
    save_checkpoint(folder, tiny_unet(num_class_embeds=10), diffusers.DDPMScheduler(TINY_TIMESTEPS))


def class_times(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", class_embed_type="timestep")


def super_resolution(folder: Path) -> None:
    save_checkpoint(folder, tiny_unet(in_channels=3), diffusers.DDPMScheduler(TINY_TIMESTEPS))


def fourier(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", time_embedding_type="fourier")


def few_times(folder: Path) -> None:
    network = tiny_unet(time_embedding_type="learned", num_train_timesteps=TINY_TIMESTEPS - 1)
    save_checkpoint(folder, network, diffusers.DDPMScheduler(TINY_TIMESTEPS))


def odd_size(folder: Path) -> None:
    edit_json(folder / "unet" / "config.json", sample_size=7)


def shards(folder: Path, file: str) -> None:
    """The weights in one shard, which an index calls `file`."""
    names = list(load_file(folder / "unet" / WEIGHTS))
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, file)}
    (folder / "unet" / (WEIGHTS + ".index.json")).write_text(json.dumps(index))


def pickled_shard(folder: Path) -> None:
    shards(folder, "shard.bin")
    (folder / "unet" / "shard.bin").write_bytes(b"")


def shard_elsewhere(folder: Path) -> None:
    shards(folder, "../shard.safetensors")
    shutil.copy(folder / "unet" / WEIGHTS, folder / "shard.safetensors")


def shard_anywhere(folder: Path) -> None:
    shutil.copy(folder / "unet" / WEIGHTS, folder / "shard.safetensors")
    shards(folder, str(folder / "shard.safetensors"))


def no_shard(folder: Path) -> None:
    shards(folder, "shard.safetensors")


def odd_shard(folder: Path) -> None:
    shards(folder, 3)


def no_shards(folder: Path) -> None:
    (folder / "unet" / (WEIGHTS + ".index.json")).write_text('{"weight_map": []}')


REFUSED = [
    (
        ldm,
        r"model_index.json: expected a network of pictures alone .*, got one that works on the latents of "
        r"its vqvae, which is not supported yet",
    ),
    (audio, r"model_index.json: expected a network of pictures alone .*, got a pipeline with mel too"),
    (
        vqvae_beside,
        r"unet: expected a network of pictures alone .*, got one that works on the latents of .*vqvae",
    ),
    (class_labels, r"config.json: expected an unconditional network, num_class_embeds: null .*, got 10"),
    (
        class_times,
        r"config.json: expected an unconditional network, class_embed_type: null .*, got 'timestep'",
    ),
    (
        super_resolution,
        r"config.json: expected .* out_channels equal to in_channels, 3, or twice as many .*, got 1",
    ),
    (
        fourier,
        r"config.json: expected a time_embedding_type of timesteps, positional or learned, got 'fourier'",
    ),
    (few_times, r"config.json: expected num_train_timesteps of at least the scheduler's 20, got 19"),
    (odd_size, r"config.json: expected a network that can be called on pictures of 1x7x7.*, got "),
    (
        pickled_shard,
        r"index.json: expected the name of a .safetensors file in .*unet for .*, got 'shard.bin'",
    ),
    (
        shard_elsewhere,
        r"index.json: expected the name of a .safetensors file in .*unet for .*, got '../shard.safetensors'",
    ),
    (
        shard_anywhere,
        r"index.json: expected the name of a .safetensors file in .*unet for .*, got '/.*shard.safetensors'",
    ),
    (no_shard, r"index.json: expected shard.safetensors, which holds .*, beside it, got no such file"),
    (odd_shard, r"index.json: expected the name of a .safetensors file in .*, got 3"),
    (no_shards, r"index.json: expected weight_map to name a file for each tensor, got list"),
    (no_weights, r"unet: expected diffusion_pytorch_model.safetensors, got no weights"),
    (
        pickled_weights,
        r"unet: expected diffusion_pytorch_model.safetensors, got diffusion_pytorch_model.bin: such files "
        r"are pickles",
    ),
    (
        nan_weights,
        r"diffusion_pytorch_model.safetensors: expected finite weights, got NaN or Inf in conv_in.bias",
    ),
    (
        missing_tensor,
        r"diffusion_pytorch_model.safetensors: expected the weights of the UNet2DModel in config.json "
        r"beside it, got .*1 missing key",
    ),
    (
        cut_weights,
        r"diffusion_pytorch_model.safetensors: expected the weights of the UNet2DModel.*, got files that "
        r"diffusers refuses",
    ),
    (
        other_architecture,
        r"diffusion_pytorch_model.safetensors: expected the weights of the UNet2DModel.*, got",
    ),
    (
        unknown_block,
        r"expected the weights of the UNet2DModel in config.json.*, got files that diffusers "
        r"refuses.*NoBlock2D",
    ),
    (
        latent_diffusion,
        r"model_index.json: expected the network UNet2DModel, got UNet2DConditionModel, which is not "
        r"supported yet",
    ),
    (
        sd3,
        r"model_index.json: expected the network UNet2DModel, got SD3Transformer2DModel, which is not "
        r"supported yet",
    ),
    (
        remote_code,
        r"model_index.json: expected unet to be a class of diffusers, got UNet2DModel of 'my_module' "
        r"\(code that comes",
    ),
    (
        remote_scheduler,
        r"model_index.json: expected scheduler to be a class of diffusers, got DDPMScheduler of "
        r"'my_scheduler'",
    ),
    (odd_entry, r"model_index.json: expected unet to be \[library, class\], got \"UNet2DModel\""),
    (no_unet, r"model_index.json: expected a pipeline with an entry unet, got"),
    (
        conditional_config,
        r"config.json: expected the network UNet2DModel, got UNet2DConditionModel, which is not supported "
        r"yet",
    ),
    (unknown_class, r"config.json: expected the network UNet2DModel in _class_name, got 'os.system'"),
    (unknown_scheduler, r"scheduler_config.json: expected the scheduler DDPMScheduler.*, got 'MyScheduler'"),
    (
        wrong_betas,
        r"scheduler_config.json: expected the configuration of a DDPMScheduler, got one that diffusers "
        r"refuses",
    ),
    (nan_betas, r"scheduler_config.json: expected finite noise levels, got NaN"),
    (
        other_prediction,
        r"scheduler_config.json: expected a schedule to train with, got one that is refused: "
        r"prediction_type: expected one of epsilon, v_prediction, sample, flow, got 'x",
    ),
    (
        no_times,
        r"scheduler_config.json: expected a schedule to train with, got one that is refused: alphas_cumprod",
    ),
    (
        times_in_words,
        r"scheduler_config.json: expected the configuration of a DDPMScheduler, got one that diffusers "
        r"refuses",
    ),
    (sides_in_words, r"config.json: expected sample_size of one or two integers >= 1, got 'big'"),
    (three_sides, r"config.json: expected sample_size of one or two integers >= 1, got \[8, 8, 8\]"),
    (channels_in_words, r"config.json: expected in_channels to be an integer >= 1, got 'x'"),
    (long_activation, r"diffusion_pytorch_model.safetensors: .* got files that diffusers refuses: .*x1b"),
    (all_shapes, r"diffusion_pytorch_model.safetensors: .* got files that diffusers refuses: .*size mism"),
    *(
        (of_kind(dtype), rf"{WEIGHTS}: expected weights of 16, 32 or 64 bits, got {kind} for \w")
        for dtype, kind in ((torch.float8_e4m3fn, "F8_E4M3"), (torch.complex64, "C64"), (torch.bool, "BOOL"))
    ),
    (broken_json, r"config.json: expected JSON, got text that is no JSON"),
    (json_list, r"model_index.json: expected a JSON object, got list"),
    (no_config, r"config.json: expected a folder of DDPMPipeline.save_pretrained.*, got no such file"),
    (no_scheduler, r"expected scheduler_config.json in .*, got none"),
    (gone, r"pipeline: expected a folder of DDPMPipeline.save_pretrained.*, got a path that does not exist"),
    (a_file, r"pipeline: expected a folder of DDPMPipeline.save_pretrained.*, got a file"),
]


@pytest.mark.parametrize(("spoil", "message"), REFUSED, ids=[spoil.__name__ for spoil, _ in REFUSED])
def test_refused(pipeline, spoil, message, capfd):
    spoil(pipeline)
    with pytest.raises(ValueError, match=message) as refusal:
        load_checkpoint(pipeline)
    assert not capfd.readouterr().err  # of diffusers, which warns of what is refused then
    text = str(refusal.value)
    assert text.isprintable()  # and so one line
    assert len(text) < 1000


TOO_MUCH = [
    ("unet/config.json", {"layers_per_block": 10**7}, "expected layers_per_block of the weights beside it"),
    ("unet/config.json", {"block_out_channels": [8] * 10**4}, "expected layers_per_block of the weights"),
    ("unet/config.json", {"block_out_channels": [10**6] * 2}, "expected a network of as many parameters"),
    ("unet/config.json", {"in_channels": 10**9, "out_channels": 10**9}, "expected a network of as many"),
    ("unet/config.json", {"sample_size": 10**6}, r"expected a network for pictures \(sample_size 1000000\)"),
    (
        "unet/config.json",
        {"time_embedding_type": "learned", "num_train_timesteps": 10**12},
        "expected a network of as many parameters as weights",
    ),
    (
        "scheduler/scheduler_config.json",
        {"num_train_timesteps": 10**9},
        "expected num_train_timesteps of at most 1000000, got 1000000000",
    ),
]


@pytest.mark.parametrize(("file", "changes", "message"), TOO_MUCH)
def test_a_network_is_not_built_where_its_configuration_says_too_much(
    pipeline, file, changes, message, monkeypatch
):
    def build(*arguments, **options):
        raise AssertionError("it was built")

    edit_json(pipeline / file, **changes)
    monkeypatch.setattr(room, "available_memory", lambda: 10**9)
    monkeypatch.setattr(diffusers.UNet2DModel, "from_config", build)
    with pytest.raises(ValueError, match=rf"{Path(file).name}: {message}"):
        load_checkpoint(pipeline)


def test_a_network_that_does_not_fit_into_memory_is_not_read(pipeline, monkeypatch):
    monkeypatch.setattr(room, "SMALL", 1)
    load_checkpoint(pipeline)
    monkeypatch.setattr(room, "available_memory", lambda: 20_000)
    with pytest.raises(ValueError, match=r"config.json: expected a network that fits into the 20.0 kB"):
        load_checkpoint(pipeline)
