"""Whole steps of every method on the papers' networks: the limit, the papers' way, tuned eager, the strongest
plain torch, this package.

On a CPU the default is the network that the method's record names: that of MNIST for the methods that the
papers compare, one of 3 million parameters for the others; on a GPU the MNIST and the CIFAR-10 network.
`--full` adds the other pairs, torch.compile and, on a GPU, the large networks.
"""

from __future__ import annotations

import importlib.util

import pytest

from .steps.methods import timed
from .steps.networks import NETWORKS, SMOKE


def _cases() -> list:
    return [
        pytest.param(network, method, id=f"{network}-{method}") for network in NETWORKS for method in timed()
    ]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize(("network", "method"), _cases())
def test_step(compare_steps, network, method, precision):
    if compare_steps.options.smoke != (network == SMOKE):
        pytest.skip("another network runs" if compare_steps.options.smoke else "the network of --smoke")
    if NETWORKS[network].needs_diffusers and importlib.util.find_spec("diffusers") is None:
        pytest.skip("needs diffusers")
    gpu = compare_steps.accelerator is not None
    if precision == "bfloat16" and not gpu:
        pytest.skip(
            "bfloat16 runs on a GPU: the networks are float32 on a CPU, where the papers run them, too"
        )
    if network in (("small",) if gpu else ("cifar", "celeba", "sd")):
        pytest.skip("runs on a CPU" if gpu else "takes minutes a step on a CPU")
    default = network in ("mnist", "cifar") if gpu else network == timed()[method].network
    if not (default or compare_steps.options.full or compare_steps.options.smoke):
        pytest.skip("runs with --full")
    compare_steps(network, method, precision)
