"""Which methods the benchmarks time, with which settings, and what a step of each asks of the network."""

import math

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from bench.steps.contestants import Setting, papers_baseline
from bench.steps.job import Job
from bench.steps.limit import calls_of
from bench.steps.methods import timed
from bench.steps.networks import NETWORKS

# Rows of each network call in batches, and backward passes of each (the methods' papers); without one the
# call makes no graph: that of a reference.
CALLS = {
    "retrack": [(2, 1)],
    "retrack auto": [(1, 1), (1, 1)],
    "retrack self_normalized": [(2, 1)],
    "retrack importance": [(2, 1)],
    "siss": [(1, 2)],
    "siss no_is": [(1, 1), (1, 1)],
    "siss bernoulli": [(1, 2)],
    "siss ratio": [(1, 2)],
    "siss clip": [(1, 2)],
    "siss superfactor": [(1, 1)],
    "erasediff": [(1, 1), (1, 1)],
    "neggrad": [(1, 1)],
    "neggrad mask": [(1, 1)],
    "neggrad anchor": [(1, 1)],
    "vanilla": [(1, 1)],
    "erasediff_bome": [(1, 1), (1, 1)],
    "erasediff_bome fixed": [(1, 1), (1, 1)],
    "erasediff_bome inner": [(1, 1), (1, 1)],
    "dpo": [(2, 0), (2, 1)],
    "kto": [(2, 0), (2, 1)],
    "kto class": [(2, 0), (2, 1)],
    "kto zero": [(2, 0), (2, 1)],
    "npo": [(1, 0), (1, 1), (1, 1)],
    "npo forget_only": [(1, 0), (1, 1)],
}


def test_all_methods_and_their_variants_are_timed():
    assert list(timed()) == list(CALLS)


@pytest.mark.parametrize("method", CALLS)
def test_calls_are_those_of_the_method(method):
    before = torch.get_rng_state()
    job = Job(NETWORKS["tiny"], method, torch.device("cpu"))
    calls = job.calls
    assert [(call.rows / job.batch, call.backwards) for call in calls] == CALLS[method]
    assert torch.equal(torch.get_rng_state(), before)  # whoever draws next draws what it would have drawn
    assert calls_of(job, joined=True) == calls
    assert all(call.rows == job.batch for call in calls_of(job, joined=False))
    assert sum(call.rows for call in calls_of(job, joined=False) if call.backwards) == job.rows
    inner = [(call.rows / job.batch, call.backwards) for call in job.inner_calls]
    assert inner == ([(1, 1)] if method == "erasediff_bome inner" else [])


def operations(setting, name):
    """Floating-point operations of products in one step of a contestant."""
    step = setting.build(name)
    # The second step has the optimizer's state.
    step()
    # The counter knows addmm, but not the one in place.
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * math.prod(left) * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        step()
    return counter.get_total_flops()


@pytest.mark.parametrize("method", CALLS)
def test_the_limit_has_the_products_that_a_step_cannot_do_without(method):
    """Of the network, a reference, inner steps and whole sets: as many as our step has."""
    job = Job(NETWORKS["tiny"], method, torch.device("cpu"))
    setting = Setting(job, torch.contiguous_format, joined=False)
    ours = operations(setting, "Unlearner")
    of_limit = operations(setting, "limit")
    assert of_limit > 0
    if job.instance.name == "siss" and job.timed.two_gradients:
        # Rows that one of the two gradients has no use for take one pass back.
        assert ours <= of_limit
    else:
        assert ours == of_limit


def test_inner_steps_of_the_limit_are_taken_back():
    """Three updates were made, and one is left."""
    job = Job(NETWORKS["tiny"], "erasediff_bome inner", torch.device("cpu"))
    setting = Setting(job, torch.contiguous_format, joined=False)
    before = [weight.detach().clone() for weight in setting.model("limit").parameters()]
    setting.build("limit")()
    after = list(setting.model("limit").parameters())
    # AdamW's update is hardly longer than the learning rate where gradients are of one size.
    moved = max((one - two).abs().max().item() for one, two in zip(before, after, strict=True))
    assert 0 < moved <= 1.5 * job.lr


class Copies(TorchDispatchMode):
    """Bytes of each copy."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        if function is torch.ops.aten.copy_.default:
            self.sizes.append(arguments[0].nbytes)
        return function(*arguments, **(kwargs or {}))


@pytest.mark.parametrize(("method", "of_a_weight"), [("neggrad mask", 31), ("neggrad anchor", 20)])
def test_a_rule_of_the_limit_moves_its_bytes(method, of_a_weight):
    job = Job(NETWORKS["tiny"], method, torch.device("cpu"))
    setting = Setting(job, torch.contiguous_format, joined=False)
    step = setting.build("limit")
    with Copies() as copies:
        step()
    weights = sum(weight.numel() for weight in setting.model("limit").parameters())
    # Each byte of a copy is read and written.
    assert 2 * max(copies.sizes) == pytest.approx(of_a_weight * weights, abs=1)


AS_PUBLISHED = {"scaling": "norm", "superfactor": None}
# The papers' hyperparameters on the networks of their experiments.
RETRACK = {"k": 10, "weights": "truncated", "within_condition": False}
HYPERPARAMETERS = {
    ("mnist", "retrack"): RETRACK | {"lambd": 0.005},
    ("cifar", "retrack"): RETRACK | {"lambd": 0.02},
    ("celeba", "siss"): {"lambd": 0.5, "scaling_norm": 500.0, "variant": "mixture"} | AS_PUBLISHED,
    ("celeba", "siss no_is"): {"lambd": 0.5, "scaling_norm": 500.0, "variant": "no_is"} | AS_PUBLISHED,
    ("sd", "siss bernoulli"): {"lambd": 0.5, "scaling_norm": 750.0, "variant": "bernoulli"} | AS_PUBLISHED,
    ("sd", "retrack"): RETRACK | {"lambd": 0.5},
    ("sd", "erasediff"): {"eta": 1e-2},
    ("small", "erasediff"): {"eta": 1e-3},
}
LEARNING_RATES = {"mnist": 5e-5, "small": 2e-5, "cifar": 2e-5, "celeba": 5e-6, "sd": 1e-5, "tiny": 5e-5}


@pytest.mark.parametrize(("network", "method"), HYPERPARAMETERS)
def test_hyperparameters_are_the_papers(network, method):
    assert vars(timed()[method].setting(NETWORKS[network]).method) == HYPERPARAMETERS[network, method]


@pytest.mark.parametrize("network", NETWORKS)
def test_learning_rates_are_the_papers(network):
    rates = {one.setting(NETWORKS[network]).lr for one in timed().values()}
    assert rates == {LEARNING_RATES[network]} == {NETWORKS[network].lr}


def test_every_method_of_the_papers_has_their_way_as_a_baseline():
    assert {method: papers_baseline(method) for method in CALLS} == {
        **dict.fromkeys(CALLS, "retrack repo"),
        **dict.fromkeys(("retrack auto", "retrack self_normalized", "retrack importance")),
        "siss no_is": "siss repo",
        "siss bernoulli": "siss repo",
        # What no paper has run.
        **dict.fromkeys(("siss ratio", "siss clip", "siss superfactor")),
        **dict.fromkeys(("neggrad mask", "neggrad anchor")),
        **dict.fromkeys(("erasediff_bome", "erasediff_bome fixed", "erasediff_bome inner")),
        **dict.fromkeys(("dpo", "kto", "kto class", "kto zero", "npo", "npo forget_only"), "papers' formula"),
    }
