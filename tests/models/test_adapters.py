"""A network without its adapters: of peft where it is installed, and of layers that keep to its protocol."""

from __future__ import annotations

import copy

import pytest
import torch
from lora import WithLora
from torch import nn

from fastunlearn import DPO, KTO, NPO, method_step, without_adapters
from fastunlearn.step import compilation
from fastunlearn.testing.budgets import relative_l2
from fastunlearn.testing.factories import TinyDenoiser, linear_schedule

SCHEDULE = linear_schedule()
METHODS = pytest.mark.parametrize("method", [DPO(2.0), KTO(2.0), NPO(2.0)], ids=str)


def images(count=5, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return {role: torch.randn(count, 1, 8, 8, generator=generator).to(dtype) for role in ("forget", "retain")}


def step(method, model, reference, **options):
    """Loss and gradients of a step."""
    given = {**images(dtype=next(model.parameters()).dtype), "generator": torch.Generator().manual_seed(4)}
    output = method_step(method, model, None, SCHEDULE, **given, reference_model=reference, **options)
    gradients = [weight.grad for weight in model.parameters() if weight.requires_grad]
    for weight in model.parameters():
        weight.grad = None
    return output.loss, gradients


def test_it_is_the_network_as_it_was():
    network = WithLora().moved()
    x_t, t = images()["forget"], torch.arange(5) * 100
    assert torch.equal(without_adapters(network)(x_t, t), TinyDenoiser()(x_t, t))
    assert torch.equal(without_adapters(network)(x_t, t=t), TinyDenoiser()(x_t, t))
    assert not torch.equal(network(x_t, t), TinyDenoiser()(x_t, t))


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 4}], ids=str)
@METHODS
def test_a_step_is_that_of_a_frozen_copy(method, options):
    """In float64; the copy is one of the network before there were adapters."""
    network = WithLora().moved().double()
    loss, gradients = step(method, network, without_adapters(network), **options)
    expected_loss, expected = step(method, network, TinyDenoiser().double(), **options)
    assert len(gradients) == 4
    assert relative_l2(gradients, expected) <= 1e-12
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)


@METHODS
def test_a_compiled_network_has_its_adapters_again(method, monkeypatch):
    monkeypatch.setattr(compilation, "BACKEND", "aot_eager")
    network = WithLora().moved().double()
    _, plain = step(method, network, without_adapters(network))
    for _ in range(2):
        _, gradients = step(method, network, without_adapters(network), compile=True)
        assert relative_l2(gradients, plain) <= 1e-12


@METHODS
def test_new_adapters_change_no_bit(method, monkeypatch):
    """Their product is 0: the losses with and without them are equal to the bit."""
    compared, own = [], type(method).objective

    def objective(method, losses, reference, elements):
        compared.extend(torch.equal(losses[role], loss) for role, loss in reference.items())
        return own(method, losses, reference, elements)

    monkeypatch.setattr(type(method), "objective", objective)
    for options in ({}, {"autocast_dtype": torch.bfloat16}, {"micro_batch_size": 4}):
        network = WithLora()
        step(method, network, without_adapters(network), **options)
    assert compared
    assert all(compared)


def states(network):
    layers = [network.enter.off, network.leave.off]
    return layers, [weight.requires_grad for weight in network.parameters()]


class Fails(WithLora):
    def forward(self, x_t, t):
        if self.enter.off:
            raise RuntimeError("out of memory")
        return super().forward(x_t, t)


def test_all_is_as_it_was_after_a_call_that_fails():
    network = Fails()
    before, reference = states(network), without_adapters(network)
    with pytest.raises(RuntimeError, match="out of memory"):
        step(DPO(), network, reference)
    assert states(network) == before
    assert all(weight.grad is None for weight in network.parameters())


def test_what_the_caller_has_switched_off_or_frozen_stays_so():
    network = WithLora()
    network.leave.enable_adapters(False)
    network.enter.down.requires_grad_(False)
    before = states(network)
    assert before[0] == [False, True]
    without_adapters(network)(images()["forget"], torch.zeros(5, dtype=torch.long))
    assert states(network) == before


def dropping():
    """A network with adapters whose results differ from call to call, and which counts its calls."""
    network = WithLora().moved()
    channels = network.enter.base.out_channels
    network.enter = nn.Sequential(network.enter, nn.BatchNorm2d(channels, affine=False), nn.Dropout(0.5))
    return network.train()


def test_it_is_the_same_at_every_call():
    network = dropping()
    x_t, t = images()["forget"], torch.arange(5) * 100
    before, modes = copy.deepcopy(network.state_dict()), [own.training for own in network.modules()]
    assert not torch.equal(network(x_t, t), network(x_t, t))
    network.load_state_dict(before)

    reference = without_adapters(network)
    first = reference(x_t, t)
    assert torch.equal(reference(x_t, t), first)
    assert torch.equal(without_adapters(copy.deepcopy(network).eval())(x_t, t), first)
    assert [own.training for own in network.modules()] == modes
    assert all(torch.equal(own, before[name]) for name, own in network.state_dict().items())


def test_its_mode_comes_back_after_a_call_that_fails():
    network = dropping()
    modes = [own.training for own in network.modules()]
    with pytest.raises(RuntimeError):
        without_adapters(network)(torch.randn(2, 3, 8, 8), torch.zeros(2, dtype=torch.long))
    assert [own.training for own in network.modules()] == modes


def test_networks_that_have_no_reference_in_them_are_refused():
    with pytest.raises(TypeError, match=r"^model: expected a torch.nn.Module, got function"):
        without_adapters(lambda x_t, t: x_t)
    with pytest.raises(ValueError, match=r"^model: expected a network with adapters .* got TinyDenoiser"):
        without_adapters(TinyDenoiser())
    network = WithLora()
    network.time.requires_grad_(True)
    before = states(network)
    expected = r"^model: expected a network whose adapters alone are trained, got time.weight, which"
    with pytest.raises(ValueError, match=expected):
        without_adapters(network)
    assert states(network) == before


# --- peft


def with_peft(network, names, **options):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=names, **options)
    return peft.get_peft_model(network, config), config


@METHODS
def test_adapters_of_peft(method):
    base = TinyDenoiser().double()
    network, _ = with_peft(copy.deepcopy(base), ["enter", "leave"], init_lora_weights=False)
    network = network.double()
    loss, gradients = step(method, network, without_adapters(network))
    expected_loss, expected = step(method, network, base)
    assert len(gradients) == 4
    assert relative_l2(gradients, expected) <= 1e-12
    torch.testing.assert_close(loss, expected_loss, rtol=1e-12, atol=0)


def test_peft_thaws_nothing_that_was_frozen():
    network, _ = with_peft(TinyDenoiser(), ["enter", "leave"])
    next(weight for weight in network.parameters() if weight.requires_grad).requires_grad_(False)
    before = [weight.requires_grad for weight in network.parameters()]
    without_adapters(network)(images()["forget"], torch.zeros(5, dtype=torch.long))
    assert [weight.requires_grad for weight in network.parameters()] == before


def test_weights_that_peft_trains_beside_an_adapter_are_refused():
    network, _ = with_peft(TinyDenoiser(), ["enter"], bias="all")
    with pytest.raises(ValueError, match=r"^model: expected a network whose adapters alone are trained"):
        without_adapters(network)
    # A whole layer that peft copies, trains, and puts back.
    network, _ = with_peft(TinyDenoiser(), ["enter"], modules_to_save=["leave"])
    with torch.no_grad():
        for weight in network.parameters():
            if weight.requires_grad:
                weight.normal_()
    x_t, t = images()["forget"], torch.arange(5) * 100
    assert torch.equal(without_adapters(network)(x_t, t), TinyDenoiser()(x_t, t))


def test_an_adapter_that_belongs_to_the_network_is_not_switched_off():
    """One of two, which was there before and is not trained: the network without both is another one."""
    network, config = with_peft(TinyDenoiser(), ["enter", "leave"])
    network.add_adapter("further", config)
    network.base_model.set_adapter(["default", "further"])
    without_adapters(network)
    for name, weight in network.named_parameters():
        if ".default." in name:
            weight.requires_grad_(False)
    expected = r"^model: expected adapters that are all trained .* got 'default', which is not, and would"
    with pytest.raises(ValueError, match=expected):
        without_adapters(network)
    network.base_model.set_adapter("further")
    without_adapters(network)


def test_merged_adapters_are_refused():
    """peft would take them out of the weights, and leave them so."""
    network, _ = with_peft(TinyDenoiser(), ["enter"])
    network.merge_adapter()
    with pytest.raises(ValueError, match=r"^model: expected adapters beside the weights, got some that are"):
        without_adapters(network)
    network.unmerge_adapter()
    without_adapters(network)


def test_adapters_that_diffusers_has_added():
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    network = diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, norm_num_groups=4,
        block_out_channels=(8, 8), cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    base = copy.deepcopy(network)
    network.requires_grad_(False)
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    x_t, t = images()["forget"], torch.arange(5) * 100
    prompts = {"encoder_hidden_states": torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(1))}
    with torch.no_grad():
        assert torch.equal(
            without_adapters(network)(x_t, t, **prompts).sample, base(x_t, t, **prompts).sample
        )
        assert not torch.equal(network(x_t, t, **prompts).sample, base(x_t, t, **prompts).sample)
    conditions = {"forget_kwargs": prompts, "retain_kwargs": prompts}
    _, gradients = step(DPO(), network, without_adapters(network), **conditions)
    _, expected = step(DPO(), network, base, **conditions)
    assert all(map(torch.equal, gradients, expected))
