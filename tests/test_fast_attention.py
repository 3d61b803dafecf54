"""fast_attention: which calls it redirects, and that a network computes the same with it."""

import copy
import functools
from contextlib import nullcontext
from unittest import mock

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from fastunlearn.ops._backends import build_command, extension
from fastunlearn.step import attention as module
from fastunlearn.step.attention import FEWEST_SCORES, LARGEST_DEPTH, fast_attention
from fastunlearn.testing.budgets import assert_within_budget, relative_l2

pytestmark = [
    pytest.mark.skipif(
        not extension("_C"), reason=f"the C++ extension is not built; build it with: {build_command()}"
    ),
    pytest.mark.skipif(
        torch.backends.cpu.get_cpu_capability() not in LARGEST_DEPTH,
        reason="attention was not measured with the instruction set of this processor",
    ),
]


def heads(batch=2, heads=4, rows=64, depth=8, **options):
    return [
        torch.randn(batch, heads, rows, depth, generator=torch.Generator().manual_seed(seed)).to(**options)
        for seed in range(3)
    ]


@pytest.fixture
def calls():
    """How often the op was called."""
    with mock.patch.object(module, "attention", wraps=module.attention) as op:
        yield lambda: op.call_count


def call(query, key, value, *rest, **options):
    """As networks call it: a function looked up at every call."""
    return torch.nn.functional.scaled_dot_product_attention(query, key, value, *rest, **options)


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (heads(), {}),
        (heads(dtype=torch.bfloat16), {}),
        (heads(depth=16), {"scale": 0.5}),
        (heads(), {"attn_mask": None, "dropout_p": 0.0, "is_causal": False, "enable_gqa": False}),
        ([heads()[0], *heads(rows=40)[1:]], {}),
    ],
    ids=["float32", "bfloat16", "scale", "defaults", "cross"],
)
def test_redirected(given, options, calls):
    expected = call(*given, **options)
    with fast_attention():
        result = call(*given, **options)
    assert calls() == 1
    assert result.dtype == expected.dtype
    assert_within_budget("out", result, expected, call(*[tensor.double() for tensor in given], **options))


def test_arguments_may_have_names(calls):
    query, key, value = heads()
    with fast_attention():
        named = torch.nn.functional.scaled_dot_product_attention(value=value, query=query, key=key)
        assert torch.equal(call(query, key, value, None, 0.0, False), named)
    assert calls() == 2


@pytest.mark.parametrize(
    ("given", "options"),
    [
        (heads(), {"attn_mask": torch.ones(64, 64, dtype=torch.bool).tril()}),
        (heads(), {"is_causal": True}),
        (heads(), {"dropout_p": 1.0}),
        ([heads()[0], *[tensor[:, :2] for tensor in heads()[1:]]], {"enable_gqa": True}),
        (heads(dtype=torch.float64), {}),
        (heads(dtype=torch.float16), {}),
        (heads(depth=128), {}),
        (heads(rows=32), {}),
        ([tensor[0] for tensor in heads(batch=1, heads=8)], {}),
        ([heads()[0], *heads(batch=1)[1:]], {}),
        ([tensor.to("meta") for tensor in heads()], {}),
        ([torch.nn.Parameter(tensor) for tensor in heads()], {}),
    ],
    ids=[
        "mask",
        "causal",
        "dropout",
        "grouped",
        "float64",
        "float16",
        "deep",
        "few scores",
        "3 dimensions",
        "broadcast",
        "meta",
        "subclass",
    ],
)
def test_left_to_torch(given, options, calls):
    with fast_attention():
        result = call(*given, **options)
    assert calls() == 0
    if result.device.type != "meta":
        assert torch.equal(result, call(*given, **options))


def test_limits_are_those_that_are_named(calls):
    assert 2 * 4 * 32 * 32 < FEWEST_SCORES <= 2 * 4 * 64 * 64
    depth = LARGEST_DEPTH[torch.backends.cpu.get_cpu_capability()]
    with fast_attention():
        call(*heads(depth=depth))
        assert calls() == 1
        call(*heads(depth=depth + 1))
    assert calls() == 1


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_left_to_torch_by_backend(backend, calls, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    with fast_attention():
        assert torch.equal(call(*heads()), scaled_dot_product_attention(*heads()))
    assert calls() == 0


def test_left_to_torch_with_more_threads_than_heads(calls):
    torch.set_num_threads(4)
    try:
        with fast_attention():
            call(*heads(batch=1, heads=3, rows=128))
            assert calls() == 0
            call(*heads(batch=1, heads=4, rows=128))
        assert calls() == 1
    finally:
        torch.set_num_threads(1)


def test_left_to_torch_without_the_extension(calls):
    with mock.patch.object(module, "extension", return_value=False), fast_attention():
        call(*heads())
    assert calls() == 0


def test_autocast_decides_on_the_dtype(calls):
    with fast_attention(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert call(*heads()).dtype == torch.bfloat16  # torch rounds them
        assert calls() == 0
        assert call(*heads(dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert calls() == 1


def test_nothing_changes_outside():
    before = call(*heads())
    with fast_attention():
        within = call(*heads())
    assert torch.equal(call(*heads()), before)
    with pytest.raises(ZeroDivisionError), fast_attention():
        raise ZeroDivisionError
    assert torch.equal(call(*heads()), before)
    assert within.grad_fn is None


def test_compiled_code_keeps_the_attention_of_torch(calls):
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    with fast_attention():
        result = compiled(*heads())
    assert calls() == 0
    assert torch.equal(result, call(*heads()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant):
    """Its second forward pass happens outside the context."""
    leaves = [tensor.requires_grad_() for tensor in heads()]
    expected = torch.autograd.grad(call(*leaves).square().sum(), leaves)
    with fast_attention():
        out = checkpoint(call, *leaves, use_reentrant=reentrant)
    out.square().sum().backward()
    torch.testing.assert_close([leaf.grad for leaf in leaves], list(expected))


def test_transforms_keep_the_attention_of_torch(calls):
    query, key, value = heads()
    with fast_attention():
        gradient = torch.func.grad(lambda query: call(query, key, value).square().sum())(query)
    assert calls() == 0
    assert gradient.shape == query.shape


@functools.cache
def network():
    unet = pytest.importorskip("diffusers").UNet2DModel
    torch.manual_seed(0)
    blocks = dict(
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D")
    )
    net = unet(
        sample_size=16,
        in_channels=1,
        out_channels=1,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        **blocks,
    )
    assert net.config.attention_head_dim == 8
    return net


def outputs_and_gradients(context, dtype=torch.float32):
    net = copy.deepcopy(network()).to(dtype)
    generator = torch.Generator().manual_seed(1)
    images, grad = (torch.randn(4, 1, 16, 16, generator=generator).to(dtype) for _ in range(2))
    with context:
        prediction = net(images, torch.tensor([3, 500, 0, 999])).sample
    return [prediction.detach(), *torch.autograd.grad(prediction, list(net.parameters()), grad)]


def test_a_network_computes_the_same(calls):
    """Its prediction and its gradient err at most twice as much as with torch's attention, from the network
    in float64.
    """
    exact, *exact_gradient = outputs_and_gradients(nullcontext(), torch.float64)
    plain, *plain_gradient = outputs_and_gradients(nullcontext())
    assert calls() == 0
    ours, *our_gradient = outputs_and_gradients(fast_attention())
    assert calls() == 4  # one in the down block, one in the middle, two in the up block
    assert_within_budget("prediction", ours, plain, exact)
    assert relative_l2(our_gradient, exact_gradient) <= 2 * relative_l2(plain_gradient, exact_gradient)
