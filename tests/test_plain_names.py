"""What is saved has the names of the network itself, in whatever wrapping it was trained, and is read into
any other."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
import torch
from safetensors.torch import load_file
from torch import nn

from fastunlearn.host import plain_names
from fastunlearn.runs.run_record import read_run
from fastunlearn.testing.factories import TinyDenoiser

PLAIN = {"enter.weight", "enter.bias", "time.weight", "time.bias", "leave.weight", "leave.bias"}


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")


def with_a_compiled_part(model: nn.Module) -> nn.Module:
    model.enter = compiled(model.enter)
    return model


def compiled_in_place(model: nn.Module) -> nn.Module:
    model.compile(backend="eager")
    return model


WRAPS = {
    "plain": lambda model: model,
    "compiled": compiled,
    "compiled in place": compiled_in_place,
    "parallel": nn.DataParallel,
    "parallel around compiled": lambda model: nn.DataParallel(compiled(model)),
    "compiled around parallel": lambda model: compiled(nn.DataParallel(model)),
    "a compiled part": with_a_compiled_part,
    "a compiled part in parallel": lambda model: nn.DataParallel(with_a_compiled_part(model)),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, torch.Tensor]:
    return runs.whole(tmp_path_factory.mktemp("whole"))


@pytest.mark.parametrize("name", WRAPS)
def test_names_are_plain_and_any_wrapping_goes_on(
    whole: tuple[Path, torch.Tensor], tmp_path: Path, name: str
):
    folder, expected = whole
    saved = runs.stop(runs.make(wrap=WRAPS[name]), tmp_path)
    assert set(load_file(saved / "model.safetensors")) == PLAIN
    assert set(load_file(saved / "ema.safetensors")) == {
        f"ema.shadow_params.by_parameter.{name}" for name in PLAIN
    }
    moments = ("exp_avg", "exp_avg_sq", "step")
    assert set(load_file(saved / "optimizer.safetensors")) == {
        f"optimizer.state.{name}.{key}" for name in PLAIN for key in moments
    }
    for file in ("metadata.json", "manifest.json"):
        assert "_orig_mod" not in (saved / file).read_text()
        assert "module." not in (saved / file).read_text()
    for file in ("model", "ema", "optimizer"):
        same = load_file(runs.saved_in(folder, 2) / f"{file}.safetensors")
        assert runs.same(load_file(saved / f"{file}.safetensors"), same)

    from_wrapped, from_plain = runs.make(), runs.make(wrap=WRAPS[name])
    runs.run(from_wrapped, tmp_path, resume_from_checkpoint="latest")
    runs.run(from_plain, tmp_path / "other", resume_from_checkpoint=runs.saved_in(folder, 2))
    assert torch.equal(runs.weights(from_wrapped), expected)
    assert torch.equal(runs.weights(from_plain), expected)
    assert read_run(tmp_path)["network"]["name"] == "TinyDenoiser"


class Own(nn.Module):
    """Parts that are called like those of wrappers, and are none; one that stands in two places."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(2, 2)
        self._orig_mod = nn.ModuleDict({"module": nn.Linear(2, 2)})
        self.twice = self.module


def test_a_part_of_the_network_may_be_called_like_a_wrapper():
    names = list(Own().state_dict())
    assert "module.weight" in names
    for wrap in (
        lambda model: model,
        compiled,
        nn.DataParallel,
        lambda model: compiled(nn.DataParallel(model)),
    ):
        model = wrap(Own())
        assert list(plain_names.plain_state(model)) == names
        assert list(plain_names.plain_parameters(model)) == [name for name, _ in Own().named_parameters()]


def test_wrapped_parts_that_stand_in_two_places():
    model = Own()
    model.module = model.twice = compiled(model.module)
    assert list(plain_names.plain_state(model)) == list(Own().state_dict())
    copied = plain_names.plain_copy(model)
    assert list(copied.state_dict()) == list(Own().state_dict())
    assert copied.twice is copied.module
    assert list(model.state_dict()) != list(Own().state_dict())  # the original stays as it is


@pytest.mark.parametrize("name", WRAPS)
def test_a_state_is_loaded_into_any_wrapping(name: str):
    state, model = TinyDenoiser(seed=3).state_dict(), WRAPS[name](TinyDenoiser())
    plain_names.load_plain_state(model, state)
    assert runs.same(plain_names.plain_state(model), dict(state))


@pytest.mark.parametrize(
    "name", ["compiled", "compiled in place", "parallel", "parallel around compiled", "a compiled part"]
)
def test_a_wrapped_pipeline_is_saved_as_the_network(tmp_path: Path, name: str):
    diffusers = pytest.importorskip("diffusers")
    from fastunlearn.models import load_checkpoint, save_checkpoint
    from fastunlearn.testing.checkpoints import tiny_unet

    def a_part(model: nn.Module) -> nn.Module:
        model.conv_in = compiled(model.conv_in)
        model.down_blocks[0] = compiled(model.down_blocks[0])
        return model

    model = tiny_unet()
    expected = {key: value.clone() for key, value in model.state_dict().items()}
    wrapped = a_part(model) if name == "a compiled part" else WRAPS[name](model)
    save_checkpoint(tmp_path / "model", wrapped, diffusers.DDPMScheduler())
    assert runs.same(load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"), expected)
    assert type(load_checkpoint(tmp_path / "model")[0]).__name__ == "UNet2DModel"


def test_a_wrapped_network_of_another_class_is_refused(tmp_path: Path):
    from fastunlearn.models import save_checkpoint

    with pytest.raises(TypeError, match="model: expected a diffusers UNet2DModel"):
        save_checkpoint(tmp_path / "model", compiled(TinyDenoiser()), None)
