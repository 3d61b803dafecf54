"""Which methods the benchmarks time, with which settings, and what a step of each asks of the network."""

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from bench.steps.contestants import papers_baseline
from bench.steps.job import Job
from bench.steps.limit import calls_of
from bench.steps.methods import timed
from bench.steps.networks import NETWORKS

# rows of each network call in batches, and backward passes of each (the methods' papers)
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
    "vanilla": [(1, 1)],
}


def test_all_methods_and_their_variants_are_timed():
    assert list(timed())[: len(CALLS)] == list(CALLS)


@pytest.mark.parametrize("method", CALLS)
def test_calls_are_those_of_the_method(method):
    before = torch.get_rng_state()
    job = Job(NETWORKS["tiny"], method, torch.device("cpu"))
    calls = job.calls
    assert [(call.rows / job.batch, call.backwards) for call in calls] == CALLS[method]
    assert torch.equal(torch.get_rng_state(), before)  # whoever draws next draws what it would have drawn
    assert calls_of(job, joined=True) == calls
    assert all(call.rows == job.batch for call in calls_of(job, joined=False))
    assert sum(call.rows for call in calls_of(job, joined=False)) == job.rows


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
    }
