"""attention in C++: values and gradients against float64, every layout and instruction set, and what it
refuses.
"""

import pytest
import torch
from kernel_cases import for_kernels
from torch.nn.functional import scaled_dot_product_attention

from fastunlearn.ops._backends import ISAS
from fastunlearn.ops.attention import attention
from fastunlearn.reference.attention import attention as formula
from fastunlearn.testing.budgets import assert_within_budget, shuffles

pytestmark = for_kernels
NAMES = ("query", "key", "value")
# B, H, Sq, Sk, D: one tile of keys and several, ends of vectors, blocks and tiles, cross-attention, depths
# with and without padding
SHAPES = [
    (2, 3, 1, 1, 8),
    (1, 2, 5, 3, 8),
    (2, 2, 49, 49, 8),
    (1, 2, 196, 196, 8),
    (1, 1, 33, 128, 8),
    (1, 2, 17, 129, 16),
    (1, 2, 64, 77, 16),
    (1, 2, 40, 300, 32),
    (1, 2, 31, 16, 64),
    (1, 1, 20, 140, 64),
    (2, 1, 19, 23, 1),
    (1, 2, 30, 21, 5),
    (1, 2, 35, 50, 40),
    (1, 1, 9, 12, 72),
]


def operands(shape, dtype=torch.float32, seed=0):
    """query, key, value and the gradient of the result."""
    batch, heads, queries, keys, depth = shape
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, heads, rows, depth, generator=generator).to(dtype)
        for rows in (queries, keys, keys, queries)
    ]


def with_gradients(function, query, key, value, grad_out):
    """`function(query, key, value)` and its gradients, by name."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (query, key, value)]
    out = function(*leaves)
    return {"out": out.detach()} | dict(
        zip(NAMES, torch.autograd.grad(out, leaves, grad_out.to(out.dtype)), strict=True)
    )


def in_several_orders(function, query, key, value, grad_out):
    """`with_gradients`, with queries, keys and the numbers of each in several orders.

    Results in the order given.
    """
    evaluations = []
    orders = (shuffles(size, 8) for size in (query.shape[2], key.shape[2], query.shape[3]))
    for queries, keys, depth in zip(*orders, strict=True):
        shuffled = (
            query[:, :, queries][..., depth],
            key[:, :, keys][..., depth],
            value[:, :, keys],
            grad_out[:, :, queries],
        )
        found, back = with_gradients(function, *shuffled), depth.argsort()
        rows = {"out": queries, "query": queries, "key": keys, "value": keys}
        found = {name: tensor[:, :, rows[name].argsort()] for name, tensor in found.items()}
        evaluations.append(found | {name: found[name][..., back] for name in ("query", "key")})
    return evaluations


def assert_all_within_budget(given, scale):
    """The op errs at most twice as much as torch's own attention, from the formula in float64 on the same
    inputs.

    The largest error of a few hundred numbers depends on the order in which a processor's torch adds: hence
    in several orders.
    """
    ours = with_gradients(lambda q, k, v: attention(q, k, v, scale)[0], *given)
    plain = in_several_orders(lambda q, k, v: scaled_dot_product_attention(q, k, v, scale=scale), *given)
    truth = with_gradients(lambda q, k, v: formula(q, k, v, scale), *[tensor.double() for tensor in given])
    for name in truth:
        assert ours[name].dtype == given[0].dtype
        assert_within_budget(name, ours[name], [evaluation[name] for evaluation in plain], truth[name])


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_error_is_at_most_twice_that_of_torch(shape, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    assert_all_within_budget(operands(shape), shape[-1] ** -0.5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 2, 49, 49, 8), (1, 2, 35, 140, 40)], ids=str)
def test_error_in_half_precision(shape, dtype, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    assert_all_within_budget(operands(shape, dtype), shape[-1] ** -0.5)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("scale", [30.0, -30.0, 1e-3])
def test_large_and_small_logits(scale, isa, monkeypatch):
    """Scores in the hundreds: a maximum that grows from tile to tile, and weights that underflow to exact
    zeros.
    """
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    query, key, value, grad_out = operands((1, 2, 40, 290, 8))
    key = key * torch.linspace(0.1, 1, 290).view(-1, 1)
    assert_all_within_budget((query, key, value, grad_out), scale)


def test_logsumexp():
    query, key, value, _ = operands((2, 3, 37, 150, 16))
    out, logsumexp = attention(query, key, value, 0.25)
    assert (out.shape, logsumexp.shape, logsumexp.dtype) == (query.shape, query.shape[:3], torch.float32)
    truth = (0.25 * (query.double() @ key.double().mT)).logsumexp(-1)
    assert_within_budget("logsumexp", logsumexp, (0.25 * (query @ key.mT)).logsumexp(-1), truth)
    assert not attention(query.requires_grad_(), key, value, 0.25)[1].requires_grad


def heads_inside(tensor):
    """As diffusers passes it: `[B, S, H, D]` in memory."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def part_of_more(tensor):
    """Queries, keys and values from one projection: rows lie apart."""
    return torch.cat([tensor, tensor + 1, tensor], dim=-1)[..., : tensor.shape[-1]]


def depth_outside(tensor):
    return tensor.mT.contiguous().mT


@pytest.mark.parametrize("layout", [heads_inside, part_of_more, depth_outside])
@pytest.mark.parametrize("isa", ISAS)
def test_layouts_do_not_change_a_bit(layout, isa, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_ISA", isa)
    given = operands((2, 3, 21, 34, 8))
    dense = with_gradients(lambda q, k, v: attention(q, k, v, 0.3)[0], *given)
    leaves = [tensor.requires_grad_() for tensor in operands((2, 3, 21, 34, 8))[:3]]
    out = attention(*[layout(leaf) for leaf in leaves], 0.3)[0]
    assert out.transpose(1, 2).is_contiguous()
    assert torch.equal(out, dense["out"])
    for name, gradient in zip(NAMES, torch.autograd.grad(out, leaves, layout(given[3])), strict=True):
        assert torch.equal(gradient, dense[name])


def test_gradients_lie_as_the_result_does():
    query, key, value, grad_out = operands((2, 3, 21, 34, 8))
    gradients = torch.ops.fastunlearn.attention_backward(
        grad_out, query, key, value, *attention(query, key, value, 0.3), 0.3
    )
    assert all(gradient.transpose(1, 2).is_contiguous() for gradient in gradients)


def test_threads_do_not_change_a_bit():
    given, results = operands((2, 3, 49, 49, 8)), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        try:
            results.append(with_gradients(lambda q, k, v: attention(q, k, v, 0.3)[0], *given))
        finally:
            torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(other[name], tensor) for name, tensor in results[0].items())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_numbers_that_are_none_stay_in_their_head(bad):
    query, key, value, grad_out = operands((1, 3, 20, 30, 8))
    query[0, 1, 3, 2] = bad
    out = with_gradients(lambda q, k, v: attention(q, k, v, 0.3)[0], query, key, value, grad_out)
    assert out["out"][0, 1, 3].isnan().all()
    assert out["out"].isnan().flatten(2).any(-1).tolist() == [[False, True, False]]
    assert out["key"].isnan().flatten(2).any(-1).tolist() == [[False, True, False]]
    assert torch.equal(out["out"][0, 1, 4:].isfinite(), torch.ones(16, 8, dtype=torch.bool))


@pytest.mark.parametrize("backend", ["kernels", "eager"])
@pytest.mark.parametrize("layout", [torch.clone, heads_inside])
def test_opcheck(layout, backend, monkeypatch):
    monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
    query, key, value, grad_out = operands((2, 2, 7, 5, 8))
    given = [layout(tensor).detach().requires_grad_() for tensor in (query, key, value)]
    torch.library.opcheck(torch.ops.fastunlearn.attention.default, (*given, 0.3))
    saved = [tensor.detach() for tensor in (*given, *attention(*given, 0.3))]
    torch.library.opcheck(torch.ops.fastunlearn.attention_backward.default, (layout(grad_out), *saved, 0.3))


def test_kernel_agrees_with_the_closed_form(monkeypatch):
    given, results = operands((2, 3, 21, 34, 16), torch.bfloat16), []
    for backend in ("kernels", "eager"):
        monkeypatch.setenv("FASTUNLEARN_BACKEND", backend)
        results.append(with_gradients(lambda q, k, v: attention(q, k, v, 0.3)[0], *given))
    for name, tensor in results[0].items():
        assert (tensor.dtype, tensor.shape) == (results[1][name].dtype, results[1][name].shape)
        torch.testing.assert_close(tensor, results[1][name])


def test_compiles_in_one_graph_with_its_gradient():
    given = operands((2, 2, 21, 34, 8))
    compiled = torch.compile(lambda q, k, v: attention(q, k, v, 0.3)[0], fullgraph=True, backend="aot_eager")
    expected = with_gradients(lambda q, k, v: attention(q, k, v, 0.3)[0], *given)
    for name, tensor in with_gradients(compiled, *given).items():
        assert torch.equal(tensor, expected[name])


def test_a_second_derivative_is_refused():
    query, key, value, _ = operands((1, 1, 4, 4, 8))
    (gradient,) = torch.autograd.grad(
        attention(query.requires_grad_(), key, value, 0.3)[0].square().sum(), query, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="attention: expected a first derivative, got a second one"):
        gradient.sum().backward()


def test_bad_arguments_are_named_by_the_op():
    query, key, value, _ = operands((2, 3, 4, 5, 8))
    for given, error, message in (
        (
            (query.double(), key, value),
            TypeError,
            "query: expected float16, bfloat16 or float32, got torch.float64",
        ),
        (
            (query[0], key, value),
            ValueError,
            r"query: expected at least one row \[B, H, S, D\], got shape \(3, 4, 8\)",
        ),
        (
            (query, key[:, :, :0], value),
            ValueError,
            r"key: expected at least one row \[B, H, S, D\], got shape \(2, 3, 0, 8\)",
        ),
        (
            (query, key.half(), value),
            TypeError,
            "key: expected the dtype of query, torch.float32, got torch.float16",
        ),
        ((query, key[..., :7], value), ValueError, r"key: expected shape \(2, 3, 5, 8\), got \(2, 3, 5, 7\)"),
        ((query, key, value[:, :2]), ValueError, r"value: expected shape \(2, 3, 5, 8\), got \(2, 2, 5, 8\)"),
    ):
        with pytest.raises(error, match=message):
            attention(*given, 0.3)
    saved = query, key, value, *attention(query, key, value, 0.3)
    with pytest.raises(ValueError, match=r"grad_out: expected shape \(2, 3, 4, 8\), got \(2, 3, 5, 8\)"):
        torch.ops.fastunlearn.attention_backward(key, *saved, 0.3)
    with pytest.raises(
        ValueError,
        match=r"logsumexp: expected float32 of shape \(2, 3, 4\), got torch.float64 of shape \(2, 3, 4\)",
    ):
        torch.ops.fastunlearn.attention_backward(query, *saved[:4], saved[4].double(), 0.3)


def test_bad_arguments_are_named_by_the_kernel():
    """The op checks and arranges before."""
    query, key, value, grad_out = operands((2, 3, 4, 5, 8))
    logsumexp = torch.empty(2, 3, 4)
    forward = dict(
        query=query, key=key, value=value, scale=0.3, out=torch.empty_like(query), logsumexp=logsumexp
    )
    backward = dict(
        grad_out=grad_out,
        query=query,
        key=key,
        value=value,
        out=query,
        logsumexp=logsumexp.zero_(),
        scale=0.3,
    )
    backward |= dict(
        grad_query=torch.empty_like(query), grad_key=torch.empty_like(key), grad_value=torch.empty_like(value)
    )

    def run(arguments):
        name = "attention_backward" if "grad_out" in arguments else "attention"
        getattr(torch.ops.fastunlearn_native, name)(*arguments.values())

    run(forward)
    run(backward)
    for arguments, name, bad, message in (
        (forward, "query", query.double(), "query: expected float16, bfloat16 or float32, got Double"),
        (forward, "query", query[:0], r"query: expected \[B, H, S, D\] with at least one number"),
        (forward, "key", key[:, :, :0], r"key: expected \[B, H, S, D\] with at least one row"),
        (forward, "key", depth_outside(key), "key: expected stride 1 in dimension 3, got 5"),
        (forward, "value", value[:, :, :4], "value: expected size 5 in dimension 2, got 4"),
        (forward, "value", value[0], r"value: expected \[B, H, S, D\], got 3 dimensions"),
        (forward, "value", value.half(), "value: expected the type of query, Float, got Half"),
        (forward, "out", key, "out: expected size 4 in dimension 2, got 5"),
        (forward, "logsumexp", logsumexp.double(), r"logsumexp: expected contiguous float32 \[2, 3, 4\]"),
        (backward, "grad_out", depth_outside(grad_out), "grad_out: expected stride 1 in dimension 3, got 4"),
        (backward, "out", key, "out: expected size 4 in dimension 2, got 5"),
        (backward, "logsumexp", logsumexp[:1], r"logsumexp: expected contiguous float32 \[2, 3, 4\]"),
        (backward, "grad_key", query, "grad_key: expected size 5 in dimension 2, got 4"),
    ):
        with pytest.raises(RuntimeError, match=message):
            run(arguments | {name: bad})
