"""A frozen copy is the network as it was: its weights, its mode, and so its bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastunlearn import DPO, KTO, NPO, frozen_copy, method_step
from fastunlearn.step.predict import unsteady
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()


def unet(**options):
    """Has an attention, whose dropout of 0 makes another layout in training mode than in evaluation mode."""
    diffusers = pytest.importorskip("diffusers")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.UNet2DModel(
            sample_size=16, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
            block_out_channels=(16, 32), attention_head_dim=8,
            down_block_types=("DownBlock2D", "AttnDownBlock2D"),
            up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options,
        )  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("autocast_dtype", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("method", [DPO(), KTO(), NPO()], ids=str)
def test_a_first_step_finds_no_difference(method, training, autocast_dtype, checkpointing, monkeypatch):
    """Both networks have equal losses, to the bit."""
    compared, own = [], type(method).objective

    def objective(method, losses, reference, elements):
        compared.extend(torch.equal(losses[role], loss) for role, loss in reference.items())
        return own(method, losses, reference, elements)

    monkeypatch.setattr(type(method), "objective", objective)
    model = unet().train(training)
    if checkpointing:
        model.enable_gradient_checkpointing()
    generator = torch.Generator().manual_seed(0)
    forget, retain = torch.randn(2, 8, 1, 16, 16, generator=generator)
    method_step(
        method, model, None, SCHEDULE, forget=forget, retain=retain, reference_model=frozen_copy(model),
        autocast_dtype=autocast_dtype, generator=generator,
    )  # fmt: skip
    assert compared
    assert all(compared)


@pytest.mark.parametrize("training", [True, False])
def test_it_shares_mode_and_weights_and_no_memory(training):
    model = TinyDenoiser().train(training)
    model.enter.train(not training)
    model.leave.requires_grad_(False)
    frozen = frozen_copy(model)
    assert [own.training for own in frozen.modules()] == [own.training for own in model.modules()]
    for own, other in zip(frozen.parameters(), model.parameters(), strict=True):
        assert torch.equal(own, other)
        assert own.data_ptr() != other.data_ptr()
        assert own.requires_grad == other.requires_grad


@pytest.mark.parametrize(
    "layer",
    [
        nn.Dropout(0.1),
        nn.BatchNorm2d(1),
        nn.MultiheadAttention(4, 2, dropout=0.1),
        nn.LSTM(4, 4, num_layers=2, dropout=0.1),
    ],
    ids=lambda layer: type(layer).__name__,
)
def test_it_gives_the_same_at_every_call(layer):
    """A step would refuse a reference that each call changes, or whose calls differ."""
    model = TinyDenoiser().train()
    model.layer = layer.train()
    assert unsteady(model) is not None
    frozen = frozen_copy(model)
    assert unsteady(frozen) is None
    assert model.layer.training


def test_what_is_no_network_is_refused():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got function"):
        frozen_copy(lambda x_t, t: x_t)
